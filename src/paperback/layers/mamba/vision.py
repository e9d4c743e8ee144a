"""An image classifier of Mamba blocks: the image as a sequence of patches, scanned in the order asked for.

    tokens = W_patch image + positions;   logits = W_head RMSNorm( blocks(tokens) )[class token, or mean]

With ``scan="bidirectional"`` and a class token in the middle of the sequence it is Vision Mamba (Vim); with
``scan="cross"`` and the mean over positions its blocks are those of VMamba. Every other scan of
`ScanOrder` can take their place, and attention blocks can stand between.

Sources: Zhu et al., Vision Mamba (2024); Liu et al., VMamba (2024), as in the survey arXiv 2408.01129.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.layers.interface import Cost
from paperback.layers.mamba.blocks import NORM_EPS, BlockStack
from paperback.layers.mamba.scan_orders import needs_grid
from paperback.saving import Saved

Pool = Literal["mean", "class"]
INIT_STD = 0.02  # of positions and class token


class VisionMamba(Saved, nn.Module):
    """A classifier of images.

    Args:
        image_size: height and width in pixels, or one number for both.
        patch: side of a patch in pixels; it must divide height and width.
        channels: of the image.
        classes: number of logits.
        d_model: width.
        layers: one letter for each block: M Mamba, A attention, F feed-forward.
        scan: the order of the M blocks, by name; see `scan_orders.order_of`.
        pool: "class" reads a learned token that stands in the middle of the sequence (Vim), where a scan is
            one of sequences; "mean" the mean over all positions. If not given, "class" for "bidirectional",
            else "mean".
        num_heads: of attention blocks.
        **settings: of `Mamba`.

    Attributes:
        grid: height and width in patches.

    Raises:
        DataError: if an argument is out of range, or a class token is asked for in an order of images.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch: int = 1,
        channels: int = 1,
        classes: int = 10,
        d_model: int = 64,
        layers: str = "MM",
        scan: str = "bidirectional",
        pool: Pool | None = None,
        num_heads: int = 4,
        **settings: Any,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch < 1 or height < 1 or width < 1 or height % patch or width % patch:
            raise DataError(f"patch is {patch}, the image {height}x{width}; patch must divide both sides.")
        is_image = needs_grid(scan)
        self.pool = pool or ("class" if scan == "bidirectional" else "mean")
        if self.pool not in ("mean", "class"):
            raise DataError(f'pool is {pool!r}; it must be "mean" or "class".')
        if self.pool == "class" and is_image:
            raise DataError(
                f"scan={scan!r} visits the positions of an image, and a class token has none; "
                'use pool="mean".'
            )
        self.image_size, self.channels, self.grid = (
            (height, width),
            channels,
            (height // patch, width // patch),
        )
        positions = self.grid[0] * self.grid[1]
        self.embed = nn.Conv2d(channels, d_model, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(positions, d_model) * INIT_STD)
        if self.pool == "class":
            self.class_token = nn.Parameter(torch.randn(d_model) * INIT_STD)
        self.middle = positions // 2  # where the class token stands: half of the image on either side
        if is_image:
            settings["grid"] = self.grid
        self.blocks = BlockStack(layers, d_model, num_heads, causal=False, scan=scan, **settings)
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.head = nn.Linear(d_model, classes)

    def forward(
        self, images: Float[Tensor, "batch *channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of each image.

        Args:
            images: ``(batch, channels, height, width)``, or ``(batch, height, width)`` with one channel.

        Raises:
            DataError: if the images are of another form.
        """
        features = self.norm(self.features(images))
        return self.head(features[:, self.middle] if self.pool == "class" else features.mean(1))

    def features(self, images: Tensor) -> Float[Tensor, "batch positions d_model"]:
        """What the last block puts out at every position, the class token among them."""
        tokens = self.embed(self._checked(images)).flatten(2).transpose(1, 2) + self.positions
        if self.pool == "class":
            token = self.class_token.expand(len(tokens), 1, -1)
            tokens = torch.cat([tokens[:, : self.middle], token, tokens[:, self.middle :]], 1)
        return self.blocks(tokens)

    def cost(self) -> Cost:
        """Operations and bytes of one image in training, the blocks' part of it."""
        length = self.positions.shape[0] + (self.pool == "class")
        return self.blocks.cost(length)

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim == 3:
            images = images.unsqueeze(1)
        if images.ndim != 4 or images.shape[1:] != (self.channels, *self.image_size):
            raise DataError(
                f"images have shape {tuple(images.shape)}; give (batch, {self.channels}, "
                f"{self.image_size[0]}, {self.image_size[1]})."
            )
        if not images.is_floating_point():
            raise DataError(f"images are {images.dtype}; give floating point, for example images / 255.")
        return images
