"""Principal components of the pixels: the best linear features for restoring the images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.interface import Encoder


class PCA(Encoder):
    """Coordinates along the directions of largest variance.

    Args:
        n_components: number of features, at most the number of pixels.
        whiten: divide each feature by its standard deviation.
        in_channels: of the images, 1 or 3.
        image_size: side of the images, all of which have to be this size.
        seed: draws nothing; every encoder has one.

    Raises:
        DataError: if there are not so many components.
    """

    def __init__(
        self,
        n_components: int = 64,
        whiten: bool = False,
        in_channels: int = 1,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        pixels = in_channels * image_size**2
        if not 1 <= n_components <= pixels:
            raise DataError(f"n_components is {n_components}; it must lie in 1..{pixels}, the pixels.")
        super().__init__(Projection(pixels, n_components), in_channels, image_size, seed)
        self.whiten = whiten

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> None:
        if images.shape[2:] != (self.image_size, self.image_size):
            height, width = images.shape[2:]
            raise DataError(f"images are {height}x{width}; build it with image_size of square images.")
        if len(images) <= self.dim:
            raise DataError(
                f"{len(images)} images have fewer than n_components {self.dim}; give more images."
            )
        x = self.normalise(images.to(self.mean.device)).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        directions = vectors.flip(1)[:, : self.dim]
        if self.whiten:
            variance = values.flip(0)[: self.dim]
            # Directions without variance, which constant pixels make, are left as they are.
            spread = variance.clamp(min=0).sqrt()
            directions = directions / torch.where(spread > 1e-6 * spread[0], spread, 1.0)
        assert isinstance(self.backbone, Projection)
        self.backbone.centre.copy_(x.mean(0))
        self.backbone.directions.copy_(directions)


class Projection(nn.Module):
    """(x - centre) directions, of flattened images."""

    centre: Tensor
    directions: Tensor

    def __init__(self, pixels: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("centre", torch.zeros(pixels))
        self.register_buffer("directions", torch.eye(pixels, dim))

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        if x.shape[1] != len(self.centre):
            raise DataError(f"images have {x.shape[1]} values each, the projection takes {len(self.centre)}.")
        return (x - self.centre) @ self.directions
