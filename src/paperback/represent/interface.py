"""What every encoder does: it learns features from images, with few or no labels, and gives them back.

Images are uint8 in 0..255 or floats in 0..1, ``(n, height, width)`` for grey or ``(n, channels, height,
width)``, in numpy or torch. A method of this wing writes `_fit`, and `_features` where its features are not
simply those of its backbone; all else is written here once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.saving import Saved
from paperback.study.measure import Stopwatch
from paperback.training import History, seeded

Images = Tensor | NDArray[Any]
ImagesOrArray = TypeVar("ImagesOrArray", Tensor, NDArray[Any])  # what comes in comes out
Backbone = str | Mapping[str, Any] | nn.Module

BACKBONES = ("resnet", "convnext", "vit")
LEAST_SPREAD = 1e-3  # standard deviation of a channel, below which it is not divided by


class Encoder(Saved, nn.Module, ABC):
    """Images to features, learned.

    A subclass takes JSON values in its constructor (then it can be saved), calls
    ``super().__init__(backbone, in_channels, image_size, seed)`` and writes `_fit`. Weights of its own are
    drawn ``with seeded(seed, "...")``. `fit` goes on from the weights that are there: those drawn by the
    seed, or those of an encoder that was loaded or fitted before.

    Args:
        backbone: "resnet", "convnext" or "vit"; or a mapping with that under "name" and arguments of the
            network beside it, such as ``{"name": "resnet", "width": 32}``; or any module from images to
            features ``(n, dim)`` with an attribute ``dim``, with which the encoder cannot be saved.
        in_channels: of the images, 1 or 3.
        image_size: height and width of the images, which a "vit" needs; convolutional networks take any.
        seed: of everything drawn.

    Attributes:
        backbone: the module from normalised images to features.
        dim: number of features.
        mean: of each channel of the images that it was fitted to, ``(channels, 1, 1)``.
        std: likewise.
        history_: of the training, once fitted.
        fit_seconds_: wall time of `fit`.

    Raises:
        DataError: if there is no such backbone, or it does not take the arguments.
    """

    supervised: ClassVar[bool] = False  # whether `fit` needs labels
    mean: Tensor
    std: Tensor
    history_: History | None
    fit_seconds_: float

    def __init__(
        self, backbone: Backbone = "resnet", in_channels: int = 1, image_size: int = 28, seed: int = 0
    ) -> None:
        super().__init__()
        if in_channels not in (1, 3):
            raise DataError(f"in_channels is {in_channels}; images have 1 (grey) or 3 (colour).")
        self.in_channels = in_channels
        self.image_size = image_size
        self.seed = seed
        self.history_ = None
        with seeded(seed, "backbone"):
            self.backbone = make_backbone(backbone, in_channels, image_size)
        self.dim = features_of(self.backbone)
        self.register_buffer("mean", torch.full((in_channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((in_channels, 1, 1), 0.25))

    # -- what a user calls -----------------------------------------------------------------------------------

    def fit(self, images: Images, labels: Images | None = None, *, progress: bool = True) -> Self:
        """Learn from images.

        Args:
            images: uint8 in 0..255 or floats in 0..1, ``(n, h, w)`` or ``(n, c, h, w)``.
            labels: integers ``(n,)``, -1 for an image without a label. Methods that learn without labels
                leave them out.
            progress: show a bar.

        Returns:
            The encoder itself, in evaluation mode.

        Raises:
            DataError: if images or labels cannot be used, or a supervised method gets no labels.
        """
        x = self._checked(images)
        if len(x) == 0:
            raise DataError("images is empty; an encoder needs some to learn from.")
        y = None
        if self.supervised:
            if labels is None:
                raise DataError(f"{type(self).__name__} learns from labels; give fit the labels too.")
            y = as_labels(labels, len(x))
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
        self.mean.copy_(mean[:, None, None])
        self.std.copy_(torch.where(std > LEAST_SPREAD, std, 1.0)[:, None, None])
        with Stopwatch() as watch:
            self.history_ = self._fit(x, y, progress)
        self.fit_seconds_ = watch.seconds
        return self.eval()

    def transform(self, images: ImagesOrArray, batch_size: int = 512) -> ImagesOrArray:
        """The features of images, without gradients and in evaluation mode.

        Args:
            images: as `fit` takes them.
            batch_size: images at a time.

        Returns:
            ``(n, dim)`` float32: a numpy array if images is one, otherwise a tensor on the device of images.

        Raises:
            DataError: if the images cannot be used.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
        x = self._checked(images)
        device, training = self.mean.device, self.training
        self.eval()
        try:
            with torch.no_grad():
                parts = [self(part.to(device)).to(x.device) for part in x.split(batch_size)]
        finally:
            self.train(training)
        features = torch.cat(parts).float() if len(x) else torch.zeros(0, self.dim, device=x.device)
        return features.numpy() if isinstance(images, np.ndarray) else features

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        """Features of images in 0..1, with gradients; what `torch.nn.Module` calls."""
        return self._features(images)

    def normalise(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Images in 0..1 with mean 0 and standard deviation 1 in each channel: what the backbone takes.

        This is the one place where it happens; augmentations come before it.
        """
        return (images - self.mean) / self.std

    # -- what a subclass fills in ----------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, images: Float[Tensor, "n c h w"], labels: Tensor | None, progress: bool) -> History | None:
        """Train in place.

        Args:
            images: float32 in 0..1, on the device where the user had them.
            labels: int64 ``(n,)`` for a supervised method, otherwise None.
            progress: show a bar.

        Returns:
            The course of the training, where there is one.
        """

    def _features(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        """Features of images in 0..1; those of the backbone unless a method has others."""
        features: Tensor = self.backbone(self.normalise(images))
        return features

    def feature_maps(self, images: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """Maps of a convolutional backbone for images in 0..1, from fine to coarse.

        Raises:
            NotSupportedError: if the backbone has none.
        """
        maps = getattr(self.backbone, "feature_maps", None)
        if maps is None:
            raise NotSupportedError(
                f"a {type(self.backbone).__name__} has no feature maps; the backbones resnet and convnext do."
            )
        result: list[Tensor] = maps(self.normalise(images))
        return result

    def _checked(self, images: Images) -> Tensor:
        x = as_images(images)
        if x.shape[1] != self.in_channels:
            raise DataError(
                f"images have {x.shape[1]} channel(s) and the encoder takes {self.in_channels}; build it "
                f"with in_channels={x.shape[1]}."
            )
        return x


# -- backbones and images, also for those who write a method -------------------------------------------------


def make_backbone(backbone: Backbone, in_channels: int, image_size: int) -> nn.Module:
    """A network from its name and arguments; a module is passed through. See `Encoder`.

    Raises:
        DataError: if there is no such network, or it does not take the arguments.
    """
    if isinstance(backbone, nn.Module):
        return backbone
    arguments = {"name": backbone} if isinstance(backbone, str) else dict(backbone)
    name = arguments.pop("name", None)
    if name not in BACKBONES:
        raise DataError(f"there is no backbone {name!r}; take one of {', '.join(BACKBONES)}, or a module.")
    try:
        if name == "resnet":
            from paperback.networks.resnet import ResNet

            return ResNet(**{"in_channels": in_channels} | arguments)
        if name == "convnext":
            from paperback.networks.convnext import ConvNeXt

            return ConvNeXt(**{"in_channels": in_channels} | arguments)
        from paperback.networks.vit import ViT

        return ViT(**{"in_channels": in_channels, "image_size": image_size} | arguments)
    except TypeError as error:
        raise DataError(f"the backbone {name!r} does not take these arguments: {error}.") from error


def features_of(backbone: nn.Module) -> int:
    """Number of features of a backbone, from its attribute ``dim``.

    Raises:
        DataError: if it has none.
    """
    dim = getattr(backbone, "dim", None)
    if not isinstance(dim, int):
        raise DataError(
            f"the backbone {type(backbone).__name__} does not say its number of features; "
            "give it an integer attribute dim."
        )
    return dim


def as_images(images: Images) -> Float[Tensor, "n c h w"]:
    """Images as ``(n, channels, height, width)`` float32 in 0..1, a copy unless they are that already.

    Args:
        images: uint8 in 0..255 or floats in 0..1, ``(n, h, w)`` or ``(n, c, h, w)`` with 1 or 3 channels.

    Returns:
        A tensor on the device of images.

    Raises:
        DataError: naming what does not fit: the type, the shape, or the first image with a value outside.
    """
    if not isinstance(images, Tensor | np.ndarray):
        raise DataError(f"images is a {type(images).__name__}; give a numpy array or a tensor.")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "uf":
        raise DataError(f"images have dtype {images.dtype}; give uint8 in 0..255 or floats in 0..1.")
    x = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images.detach()
    if x.ndim not in (3, 4):
        raise DataError(f"images have shape {tuple(x.shape)}; give (n, h, w) or (n, channels, h, w).")
    if x.ndim == 3:
        x = x[:, None]
    if x.shape[1] not in (1, 3):
        hint = "; move the channels before the height" if x.shape[-1] in (1, 3) else ""
        raise DataError(f"images have {x.shape[1]} channels; 1 (grey) or 3 (colour) are taken{hint}.")
    if x.dtype == torch.uint8:
        return x.float() / 255
    if not x.is_floating_point():
        raise DataError(f"images have dtype {x.dtype}; give uint8 in 0..255 or floats in 0..1.")
    x = x.float()
    inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)  # False for NaN too
    if not inside.all():
        raise DataError(
            f"image {int((~inside).nonzero()[0])} has a value outside 0..1, or NaN; scale floats to 0..1, "
            "or give uint8."
        )
    return x


def as_labels(labels: Any, n: int) -> Tensor:
    """Integer labels ``(n,)`` as int64.

    Raises:
        DataError: if they are not integers, or not n.
    """
    y = torch.as_tensor(labels)
    if y.shape != (n,) or y.is_floating_point() or y.dtype == torch.bool:
        raise DataError(f"labels have shape {tuple(y.shape)} and dtype {y.dtype}; expected {n} integers.")
    return y.long()
