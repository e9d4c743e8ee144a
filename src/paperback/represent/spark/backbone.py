"""What an encoder of SparK must have, and an adapter for networks of other libraries."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from paperback.errors import DataError


@runtime_checkable
class HierarchicalBackbone(Protocol):
    """A convolutional network that gives a feature map for each of its scales.

    Attributes:
        widths: channels of each map.
        stride: pixels of the image to a position of the last map; each map before it has half the stride of
            the one after it.
    """

    widths: tuple[int, ...]
    stride: int

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """S1 .. Sk, from fine to coarse, of normalised images ``(n, c, h, w)``."""


class FeatureMaps(nn.Module):
    """A network of `timm` (``features_only=True``) or of `transformers` (an `AutoBackbone`) as a backbone.

    Args:
        network: images to a list of maps, from fine to coarse, or to an output with them as `feature_maps`.
        widths: channels of each map.
        stride: pixels of the image to a position of the last map.
    """

    def __init__(self, network: nn.Module, widths: tuple[int, ...], stride: int) -> None:
        super().__init__()
        self.network = network
        self.widths = tuple(widths)
        self.stride = stride
        self.dim = self.widths[-1]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The maps of the network."""
        found: Any = self.network(images)
        return list(getattr(found, "feature_maps", found))

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last map over its positions, ``(n, dim)``."""
        return self.feature_maps(images)[-1].mean((2, 3))


def check_backbone(backbone: nn.Module) -> None:
    """Refuse a network without feature maps.

    Raises:
        DataError: naming the network and what it needs.
    """
    if not isinstance(backbone, HierarchicalBackbone):
        raise DataError(
            f"a {type(backbone).__name__} has no feature maps, widths and stride, which SparK needs: take "
            '"resnet" or "convnext", or put a convolutional network into spark.FeatureMaps.'
        )


def check_maps(maps: list[Tensor], widths: tuple[int, ...], grid: tuple[int, int]) -> None:
    """Refuse maps that are not those the backbone announced: each twice the side of the next.

    Raises:
        DataError: naming the map.
    """
    for i, found in enumerate(reversed(maps)):
        expected = (widths[-1 - i], grid[0] * 2**i, grid[1] * 2**i)
        if tuple(found.shape[1:]) != expected:
            raise DataError(
                f"feature map {len(maps) - i} of the backbone is {tuple(found.shape[1:])}, not {expected}: "
                "from the last map up, each must have twice the side of the one before, and its width."
            )
