"""What convolutional networks of several stages have in common: feature maps, pooled features, a head.

A stem halves the image, and every stage after the first halves it again: the maps S1, S2, ... of the stages
have strides 2, 4, 8, ... and the widths w, 2w, 4w, ... (Lin et al. 2017 call this the bottom-up pathway of a
feature pyramid). Features are the mean of the last map over its positions.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.saving import Saved

Norm = Literal["batch", "layer", "group", "none"]
NORMS = ("batch", "layer", "group", "none")


class FeaturePyramid(Saved, nn.Module):
    """A stem, stages, and a linear head where classes are given. `ResNet` and `ConvNeXt` fill it.

    Attributes:
        stem: the module before the first stage.
        stages: the modules whose outputs are the feature maps.
        head: the linear layer from features to logits; Identity without classes.
        widths: channels of each feature map.
        stride: pixels of the image to a position of the last map.
        dim: length of the pooled features, ``widths[-1]``.
    """

    stem: nn.Module
    stages: nn.ModuleList
    head: nn.Module

    def __init__(
        self,
        in_channels: int,
        width: int,
        stages: int,
        blocks: int,
        classes: int | None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, width=width, stages=stages, blocks=blocks)
        if classes is not None:
            check_sizes(classes=classes)
        self.in_channels = in_channels
        self.classes = classes
        self.widths = tuple(width * 2**i for i in range(stages))
        self.dim = self.widths[-1]
        self.stride = 2**stages

    def feature_maps(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """The output of every stage.

        Args:
            images: float ``(n, in_channels, h, w)``, normalised as the network was trained.

        Returns:
            S1 .. Sk: Si is ``(n, widths[i], ceil(h / 2**(i + 1)), ceil(w / 2**(i + 1)))``, counted from 0.

        Raises:
            DataError: if the images have another shape or type.
        """
        check_images(images, self.in_channels)
        x = self.stem(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        """The pooled features, also of a network that has classes. Arguments are those of `feature_maps`."""
        return self.feature_maps(images)[-1].mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out"]:
        """Logits ``(n, classes)``, or pooled features ``(n, dim)`` without classes."""
        return self.head(self.features(images))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels at each position of a map ``(n, c, h, w)``."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(norm: str, channels: int) -> nn.Module:
    """The normalisation of that name: "batch", "layer" (over channels), "group" (8 channels each), "none".

    Raises:
        DataError: if there is no such normalisation.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "layer":
        return LayerNorm2d(channels, eps=1e-6)
    if norm == "group":
        return nn.GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)
    if norm == "none":
        return nn.Identity()
    raise DataError(f"norm is {norm!r}; it must be one of {', '.join(NORMS)}.")


def make_head(dim: int, classes: int | None) -> nn.Module:
    """A linear layer to the logits, or nothing."""
    return nn.Identity() if classes is None else nn.Linear(dim, classes)


def check_sizes(**sizes: int) -> None:
    """Refuse numbers of layers, channels or classes below 1.

    Raises:
        DataError: naming the argument.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise DataError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def check_images(images: Tensor, in_channels: int) -> None:
    """Refuse what is not a batch of images for a network of so many channels.

    Raises:
        DataError: saying what was given and how to mend it.
    """
    if images.ndim != 4 or images.shape[1] != in_channels:
        raise DataError(
            f"images have shape {tuple(images.shape)}; the network takes (n, {in_channels}, height, width): "
            "grey images (n, height, width) need images.unsqueeze(1)."
        )
    if not torch.is_floating_point(images):
        raise DataError(f"images are {images.dtype}; the network takes floats: images.float() / 255.")
