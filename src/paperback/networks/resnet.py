"""Residual networks for images of 28 to 64 pixels.

A block adds to its input what two 3x3 convolutions make of it, y = relu(x + F(x)), so that a block has only
the difference to learn and gradients pass unchanged beside it. The stem is a 3x3 convolution of stride 2
without max pooling, as small images ask; each stage after the first halves the map and doubles the channels.

Source: He, Zhang, Ren and Sun, Deep residual learning for image recognition, CVPR 2016, sections 3.1 and 3.3.
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from paperback.networks.pyramid import FeaturePyramid, Norm, make_head, make_norm


class ResNet(FeaturePyramid):
    """A residual network: images to pooled features, or to logits where classes are given."""

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 16,
        stages: int = 3,
        blocks: int = 1,
        norm: Norm = "batch",
        classes: int | None = None,
    ) -> None:
        """Draw the weights from torch's global generator (`paperback.training.seeded` fixes it).

        Args:
            in_channels: channels of the images.
            width: channels of the first stage; each later stage has twice as many.
            stages: number of feature maps; the last has stride ``2**stages``.
            blocks: residual blocks of each stage.
            norm: "batch", "layer" (over the channels at each position), "group", or "none"; without one the
                convolutions have biases and the residual branches are scaled down.
            classes: number of logits; None gives pooled features.

        Raises:
            DataError: if a number is below 1 or there is no such norm.
        """
        super().__init__(in_channels, width, stages, blocks, classes)
        self.stem = nn.Sequential(
            convolution(in_channels, width, 3, stride=2, norm=norm), make_norm(norm, width), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        channels = width
        for i, out in enumerate(self.widths):
            stage = [ResidualBlock(channels, out, 1 if i == 0 else 2, norm)]
            stage += [ResidualBlock(out, out, 1, norm) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
            channels = out
        self.head = make_head(self.dim, classes)
        initialise(self)
        if norm == "none":
            # Every branch adds to the variance; at 1 / sqrt(number of blocks) the sum keeps its order.
            for block in self.modules():
                if isinstance(block, ResidualBlock):
                    block.conv2.weight.data /= math.sqrt(stages * blocks)


class ResidualBlock(nn.Module):
    """y = relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), the basic block of the paper's figure 2."""

    norm_after: ClassVar[dict[str, str]] = {
        "conv1": "norm1",
        "conv2": "norm2",
    }  # which alone reads the convolution's output

    def __init__(self, channels: int, out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = convolution(channels, out, 3, stride, norm)
        self.norm1 = make_norm(norm, out)
        self.act1 = nn.ReLU()
        self.conv2 = convolution(out, out, 3, 1, norm)
        self.norm2 = make_norm(norm, out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.shortcut = nn.Sequential(convolution(channels, out, 1, stride, norm), make_norm(norm, out))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act1(self.norm1(self.conv1(x)))
        return self.act2(self.shortcut(x) + self.norm2(self.conv2(inner)))


def convolution(channels: int, out: int, size: int, stride: int, norm: Norm) -> nn.Conv2d:
    """A convolution that keeps the side at stride 1; without a norm it needs a bias of its own."""
    return nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=norm == "none")


def initialise(network: nn.Module) -> None:
    """He's normal weights for the convolutions, which keep the order of the activations, and zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
