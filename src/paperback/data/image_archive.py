"""An ``.npz`` archive of images, read to arrays of one form: uint8, channels last, one label per image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from paperback.data import image_folder, npz
from paperback.data.image_folder import Channels, Size
from paperback.errors import DataError

Part = tuple[NDArray[np.uint8], NDArray[Any] | None]  # images and their labels

# Names of arrays in an .npz, in any case: images and labels of each part. The second form is MedMNIST's.
_NPZ_PARTS = (
    {"train": ("x_train", "y_train"), "val": ("x_val", "y_val"), "test": ("x_test", "y_test")},
    {
        "train": ("train_images", "train_labels"),
        "val": ("val_images", "val_labels"),
        "test": ("test_images", "test_labels"),
    },
)
_NPZ_WHOLE = (("images", "labels"), ("x", "y"), ("arr_0", "arr_1"))
_ROUNDING = 1e-6  # by which floats may exceed 1


def read_archive(
    path: Path, size: Size | None, channels: Channels | None
) -> tuple[dict[str, Part], tuple[str, ...] | None]:
    """Read images and labels.

    Args:
        path: of the archive; `paperback.data.images.read` says what is looked for in it.
        size: height and width to bring every image to, or None.
        channels: "grey", "rgb", or None for what they are.

    Returns:
        "train" and perhaps "val" and "test" to images, ``(n, height, width)`` or ``(n, height, width, 3)``,
        and labels, ``(n,)`` or None; then the names of the classes, if the archive has them.

    Raises:
        DataError: naming the array and what is wrong with it.
    """
    if path.exists() and path.suffix.lower() != ".npz":
        raise DataError(f"{path} is not an .npz archive or a folder of images; give one of these.")
    present = {name.lower(): name for name in npz.names(path)}
    layout = _layout(path, present)
    wanted = [present[name] for pair in layout.values() for name in pair if name in present]
    arrays = npz.read_arrays(path, wanted + ([present["classes"]] if "classes" in present else []))
    parts: dict[str, Part] = {}
    for part, (x_name, y_name) in layout.items():
        place = f"{path}, array {present[x_name]}"
        pixels = _with_channels(_as_images(place, arrays[present[x_name]]), channels, size)
        y = arrays.get(present.get(y_name, ""))
        parts[part] = (
            pixels,
            None if y is None else _checked_labels(f"{path}, array {present[y_name]}", y, len(pixels)),
        )
    shapes = {part: pixels.shape[1:] for part, (pixels, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{shape} in {part}" for part, shape in shapes.items())
        raise DataError(f"{path} has images of different shapes, {listed}; give a size or channels for all.")
    named = arrays.get(present.get("classes", ""))
    return parts, None if named is None else tuple(str(name) for name in named.ravel())


def _layout(path: Path, present: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Which arrays are images and labels of which part."""
    for parts in _NPZ_PARTS:
        if parts["train"][0] in present:
            return {part: pair for part, pair in parts.items() if pair[0] in present}
    for pair in _NPZ_WHOLE:
        if pair[0] in present:
            return {"train": pair}
    found = ", ".join(list(present.values())[:12]) or "nothing"
    raise DataError(
        f"{path} holds {found}; name the images 'images' and their labels 'labels' (or x_train, y_train, "
        "x_test, y_test)."
    )


def _as_images(place: str, array: NDArray[Any]) -> NDArray[np.uint8]:
    """Any accepted array as uint8 ``(n, height, width)`` or ``(n, height, width, 3)``."""
    if array.dtype.kind not in "biuf":
        raise DataError(f"{place} has dtype {array.dtype}; images are integers in 0..255 or floats in 0..1.")
    if array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = np.moveaxis(array, 1, -1)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] not in (1, 3)):
        raise DataError(
            f"{place} has shape {array.shape}; expected (n, height, width), perhaps with 1 or 3 channels, so "
            "reshape it (the rows of a table belong into a CSV file)."
        )
    if array.size == 0:
        raise DataError(f"{place} has shape {array.shape}, which is empty; export it again.")
    array = array[..., 0] if array.shape[-1] == 1 and array.ndim == 4 else array
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array))[0][0])
            raise DataError(f"{place}, image {row} contains NaN or infinity; replace or remove it.")
        if low >= 0 and high <= 1 + _ROUNDING:
            return np.rint(array.astype(np.float64) * 255).clip(max=255).astype(np.uint8)
        whole = bool((array == np.rint(array)).all())
    else:
        whole = True
    if low < 0 or high > 255 or not whole:
        raise DataError(
            f"{place} has values from {low:g} to {high:g}; scale floats to 0..1 or integers to 0..255."
        )
    return array.astype(np.uint8)


def _with_channels(
    images: NDArray[np.uint8], channels: Channels | None, size: Size | None
) -> NDArray[np.uint8]:
    """Convert between grey and colour, and resize, where asked to."""
    if channels is None or channels == ("rgb" if images.ndim == 4 else "grey"):
        mode = None
    else:
        mode = "L" if channels == "grey" else "RGB"
    if mode is None and (size is None or size == images.shape[1:3]):
        return images
    converted = []
    for pixels in images:
        image = Image.fromarray(pixels)
        image = image.convert(mode) if mode else image
        converted.append(np.asarray(image_folder.resize(image, size) if size else image, np.uint8))
    return np.stack(converted)


def _checked_labels(place: str, y: NDArray[Any], n_rows: int) -> NDArray[Any]:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (n_rows,):
        raise DataError(
            f"{place} has shape {y.shape} for {n_rows:,} images; give one label per image (argmax(1) of a "
            "one-hot array)."
        )
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            row = int(np.argwhere(~np.isfinite(y))[0][0])
            raise DataError(f"{place}, row {row} is NaN or infinite; give every image a label or remove it.")
        if not (y == np.rint(y)).all():
            raise DataError(f"{place} holds fractions; labels are whole numbers or names.")
        y = y.astype(np.int64)
    return y
