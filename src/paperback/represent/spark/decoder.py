"""From sparse maps of all scales to pixels: densify, then a light U-shaped decoder.

From the smallest map up, i = 0, 1, ...: the map is normalised at its active positions, a learned mask token
fills the others, and a projection brings it to the decoder's width D / 2^i (1x1 for i = 0, 3x3 after); then

    x <- block_i(x + projected_i)

for log2(R) blocks, each of which doubles the side (transposed convolution, 3x3 convolution, batch norm,
ReLU6, 3x3 convolution to half the width, batch norm), and a 1x1 convolution gives pixels.

Source: Tian et al. 2023, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.networks.pyramid import LayerNorm2d
from paperback.represent.spark.context import SparseContext
from paperback.represent.spark.layers import SparseBatchNorm2d, SparseLayerNorm2d

TOKEN_DEVIATION = 0.02  # of the truncated normal from which mask tokens and convolutions are drawn


class Densify(nn.Module):
    """One map, normalised, filled up with mask tokens and projected."""

    def __init__(
        self, width: int, decoder_width: int, kernel_size: int, norm: str, sparse: bool, mask_token: bool
    ) -> None:
        """
        Args:
            width: channels of the map.
            decoder_width: channels that the decoder expects.
            kernel_size: of the projection; 1 with equal widths is no projection at all.
            norm: "batch" or "layer".
            sparse: False for a map without absent positions: a dense norm, and no token.
            mask_token: False leaves zeros at inactive positions.
        """
        super().__init__()
        self.norm: nn.Module
        if norm == "batch":
            self.norm = (SparseBatchNorm2d if sparse else nn.BatchNorm2d)(width)
        else:
            self.norm = (SparseLayerNorm2d if sparse else LayerNorm2d)(width, eps=1e-6)
        self.token: nn.Parameter | None = None
        if sparse and mask_token:
            token, s = torch.empty(width), TOKEN_DEVIATION
            self.token = nn.Parameter(nn.init.trunc_normal_(token, std=s, a=-s, b=s))
        self.project: nn.Module = nn.Identity()
        if kernel_size > 1 or width != decoder_width:
            self.project = nn.Conv2d(width, decoder_width, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, context: SparseContext) -> Tensor:
        x = self.norm(x)
        if self.token is not None:
            active = context.at(*x.shape[-2:])
            x = x + self.token[:, None, None] * (1 - active)  # x is 0 where it is not active
        return self.project(x)


class Block(nn.Module):
    """Twice the side, half the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1)
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True),
            nn.Conv2d(width, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.refine(self.up(x))


class Decoder(nn.Module):
    """Projected maps, the smallest first, to an image of ``stride`` times the smallest side.

    Args:
        stride: total stride of the encoder, a power of two.
        width: channels of the smallest map, D.
        channels: of the image.

    Raises:
        DataError: if the stride is not a power of two, or the width cannot be halved so often.
    """

    def __init__(self, stride: int, width: int, channels: int) -> None:
        super().__init__()
        if stride < 2 or stride & (stride - 1):
            raise DataError(
                f"the stride of the backbone is {stride}; the decoder doubles the side block by block, so it "
                "must be a power of two."
            )
        if width < stride or width % stride:
            raise DataError(
                f"decoder_width is {width}; it is halved in each block, so it must be a multiple of the "
                f"backbone's stride, {stride}."
            )
        blocks = stride.bit_length() - 1
        self.blocks = nn.ModuleList(Block(width // 2**i) for i in range(blocks))
        self.to_pixels = nn.Conv2d(width // stride, channels, 1)
        for m in self.modules():
            if isinstance(m, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, nn.Conv2d):
                nn.init.trunc_normal_(m.weight, std=TOKEN_DEVIATION)
            if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.bias is not None:
                nn.init.zeros_(m.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """
        Args:
            maps: from the smallest up; at least one, at most one per block.

        Returns:
            ``(n, channels, h, w)``.
        """
        x = maps[0]
        for i, block in enumerate(self.blocks):
            if 0 < i < len(maps):
                x = x + maps[i]
            x = block(x)
        return self.to_pixels(x)
