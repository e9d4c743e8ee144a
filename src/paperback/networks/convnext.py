"""ConvNeXt: a convolutional network with the proportions of a vision transformer, for small images.

A block mixes positions with a depth-wise 7x7 convolution and channels with a two-layer perceptron of four
times the width, y = x + gamma * W2 gelu(W1 norm(depthwise(x))), where gamma is a learned scale of each
channel that begins at 1e-6 in the paper and at 0.1 here, because these networks are shallow and trained
briefly. The perceptron is written as 1x1 convolutions, the same arithmetic, so that whatever acts on
convolutions (sparse twins, pruning) acts on it too.

Source: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, A ConvNet for the 2020s, CVPR 2022, figure 4 and
section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.networks.pyramid import FeaturePyramid, LayerNorm2d, make_head

LAYER_SCALE = 0.1


class ConvNeXt(FeaturePyramid):
    """A ConvNeXt: images to pooled features, or to logits where classes are given."""

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 16,
        stages: int = 3,
        blocks: int = 2,
        kernel_size: int = 7,
        classes: int | None = None,
    ) -> None:
        """Draw the weights from torch's global generator (`paperback.training.seeded` fixes it).

        Args:
            in_channels: channels of the images.
            width: channels of the first stage; each later stage has twice as many.
            stages: number of feature maps; the last has stride ``2**stages``.
            blocks: blocks of each stage.
            kernel_size: side of the depth-wise convolutions, odd.
            classes: number of logits; None gives pooled features.

        Raises:
            DataError: if a number is below 1 or kernel_size is even.
        """
        super().__init__(in_channels, width, stages, blocks, classes)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise DataError(f"kernel_size is {kernel_size}; it must be odd, so that a map keeps its side.")
        self.stem = nn.Sequential(PatchConv2d(in_channels, width), LayerNorm2d(width, eps=1e-6))
        self.stages = nn.ModuleList()
        channels = width
        for i, out in enumerate(self.widths):
            halve = [LayerNorm2d(channels, eps=1e-6), PatchConv2d(channels, out)] if i > 0 else []
            self.stages.append(nn.Sequential(*halve, *(Block(out, kernel_size) for _ in range(blocks))))
            channels = out
        self.head_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.head = make_head(self.dim, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def features(self, images: Tensor) -> Tensor:
        """The mean of the last map over its positions, normalised."""
        return self.head_norm(super().features(images))


class Block(nn.Module):
    """x + gamma * W2 gelu(W1 norm(depthwise(x)))."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.GELU()
        self.project = nn.Conv2d(4 * channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.project(self.act(self.expand(self.norm(self.depthwise(x)))))


class PatchConv2d(nn.Conv2d):
    """A 2x2 convolution of stride 2; an odd side is first filled up with a row or column of zeros."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (0, width % 2, 0, height % 2)))
