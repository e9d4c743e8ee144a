"""Features of images from whatever makes them: ours, `transformers`', a module, a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.interface import Encoder, Images, as_images

Array = NDArray[np.float64]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of its channels


def features(source: Any, images: Images, batch_size: int = 512) -> Array:
    """Features of images as float64, without gradients and in evaluation mode.

    Args:
        source: an `Encoder`; a vision model of `transformers`, see `vision_model`; a module or function from
            float32 images ``(n, c, h, w)`` in 0..1 to features ``(n, dim)``, tensor or array.
        images: uint8 in 0..255 or floats in 0..1, ``(n, h, w)`` or ``(n, c, h, w)``.
        batch_size: images at a time.

    Returns:
        ``(n, dim)``.

    Raises:
        DataError: if the images cannot be used, or what comes out is not one finite row for each.
    """
    x = as_images(images)
    if isinstance(source, Encoder):
        found: Any = source.transform(x, batch_size)
    else:
        found = np.concatenate([_numbers(part) for part in _answers(source, x, batch_size)])
    rows = _numbers(found)
    if rows.ndim != 2 or len(rows) != len(x):
        raise DataError(
            f"{_name(source)} gives features of shape {rows.shape} for {len(x)} images; expected one row for "
            "each (average over positions first)."
        )
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        raise DataError(f"{_name(source)} gives a feature that is not finite for image {finite.argmin()}.")
    return rows


def vision_model(
    model: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> nn.Module:
    """A vision model of `transformers` as a module from images in 0..1 to features.

    Images are brought to the model's size and number of channels. Its feature is the ``pooler_output``, or
    where it has none the mean of ``last_hidden_state`` over positions.

    Args:
        model: takes ``pixel_values``, such as `AutoModel.from_pretrained` gives for ViT, DINOv2, ResNet.
        mean: of the channels in 0..1. What preprocessor_config.json says beside the model, if it was loaded
            from a folder that has it, otherwise that of ImageNet.
        std: likewise.

    Returns:
        The module; its gradients reach the model.

    Raises:
        DataError: if the model does not take pixel_values.
    """
    return _VisionModel(model, mean, std)


# -- helpers -------------------------------------------------------------------------------------------------


class _VisionModel(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        if not _takes_pixels(model):
            raise DataError(
                f"{type(model).__name__} does not take pixel_values; give the vision model "
                "(of a model for text and images its vision_model)."
            )
        self.model = model
        self.channels = int(getattr(model.config, "num_channels", 3))
        self.size = _size(getattr(model.config, "image_size", None))
        own_mean, own_std = _preprocessor(model)
        for name, given in (("mean", mean or own_mean), ("std", std or own_std)):
            values = torch.tensor(given, dtype=torch.float32)
            if len(values) != self.channels:
                values = values.mean().expand(self.channels).clone()
            self.register_buffer(name, values[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        if x.shape[1] == 1 and self.channels > 1:
            x = x.expand(-1, self.channels, -1, -1)
        elif x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True)
        if self.size is not None and tuple(x.shape[2:]) != self.size:
            x = nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True)
        found = self.model(pixel_values=(x - self.mean) / self.std)
        pooled: Tensor | None = getattr(found, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last: Tensor = found.last_hidden_state
        return last.mean(1) if last.ndim == 3 else last.flatten(2).mean(2)


def as_module(source: Any) -> Callable[[Tensor], Any]:
    """The source as something to call with float images; vision models of `transformers` wrapped."""
    if isinstance(source, nn.Module) and _takes_pixels(source):
        return vision_model(source)
    if not callable(source):
        raise DataError(f"{_name(source)} cannot be called; give an encoder, a module or a function.")
    function: Callable[[Tensor], Any] = source
    return function


def _answers(source: Any, x: Tensor, batch_size: int) -> list[Any]:
    function = as_module(source)
    module = function if isinstance(function, nn.Module) else nn.Module()
    place = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), x.device)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return [function(part.to(place)) for part in x.split(batch_size)]
    finally:
        module.train(training)


def _numbers(found: Any) -> Array:
    if isinstance(found, Tensor):
        found = found.detach().cpu().double().numpy()
    try:
        return np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"features are a {type(found).__name__}; expected a tensor or an array.") from None


def _takes_pixels(model: Any) -> bool:
    return getattr(model, "main_input_name", None) == "pixel_values" and hasattr(model, "config")


def _size(size: Any) -> tuple[int, int] | None:
    """Height and width; None where the model takes any."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _preprocessor(model: Any) -> tuple[Sequence[float], Sequence[float]]:
    path = Path(str(getattr(model, "name_or_path", ""))) / "preprocessor_config.json"
    if not path.is_file():
        return IMAGENET
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config["image_mean"], config["image_std"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not give image_mean and image_std ({error}); pass mean and std."
        ) from error


def _name(source: Any) -> str:
    return getattr(source, "__name__", type(source).__name__)
