"""Images: two small sets that ship, and the user's own.

Every loader gives uint8 tensors, ``(n, height, width)`` for grey and ``(n, 3, height, width)`` for colour,
with int64 labels.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from paperback.data import image_archive, image_folder, npz, splits
from paperback.data.dataset import Dataset, Labels, Split
from paperback.data.image_archive import Part
from paperback.data.image_folder import Channels, Size
from paperback.data.shipped import shipped
from paperback.errors import DataError


def fashion_mnist(n_train: int | None = None, seed: int = 0, *, n_val: int = 1000) -> Dataset:
    """Fashion-MNIST: grey images of clothing in ten balanced classes, a tenth of the original.

    The test part is the file's own, 2,000 images. Validation is drawn from the 10,000 training images, then
    the training part from the rest, both stratified by class; the same seed gives the same validation part
    whatever n_train.

    Args:
        n_train: number of training images, 10 to 10,000 - n_val; all that are left if not given.
        seed: of the draw.
        n_val: number of validation images, 0 to 9,990.

    Returns:
        A `Dataset` of kind "images": x uint8 ``(n, 28, 28)`` in 0..255, y int64 ``(n,)`` in 0..9.

    Raises:
        DataError: if more images are asked for than there are.
    """
    arrays = _fashion_mnist_arrays()
    x, y = arrays["x_train"], arrays["y_train"].astype(np.int64)
    if n_train is not None and not 10 <= n_train <= len(x) - n_val:
        raise DataError(
            f"n_train is {n_train}; it must lie in 10..{len(x) - n_val:,} with {n_val:,} images kept for "
            "validation."
        )
    rng = np.random.default_rng(seed)
    val, train = splits.draw(np.arange(len(x)), n_val, rng, y)
    if n_train is not None and n_train < len(train):
        train = splits.draw(train, n_train, rng, y)[0]

    def part(images: NDArray[Any], labels: NDArray[Any]) -> Split:
        return Split(torch.tensor(images), torch.tensor(labels, dtype=torch.int64))

    return Dataset(
        name="fashion_mnist",
        kind="images",
        train=part(x[train], y[train]),
        val=part(x[val], y[val]),
        test=part(arrays["x_test"], arrays["y_test"]),
        source="Fashion-MNIST (Xiao, Rasul and Vollgraf 2017), from Debian dataset-fashion-mnist",
        licence="MIT",
        description="grey images of clothing.",
        classes=tuple(str(name) for name in arrays["classes"]),
        target="label",
    )


def digits(seed: int = 0, *, n_val: int = 180, n_test: int = 360) -> Dataset:
    """Handwritten digits of scikit-learn: 1,797 small grey images in ten classes.

    Args:
        seed: of the split, which is stratified by class.
        n_val: number of validation images; 0 leaves 1,437 for training.
        n_test: number of test images.

    Returns:
        A `Dataset` of kind "images": x uint8 ``(n, 8, 8)`` in 0..16, y int64 ``(n,)`` in 0..9; 1,257, 180
        and 360 rows.

    Raises:
        DataError: if more images are asked for than there are.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.tensor(bunch.images).to(torch.uint8), torch.tensor(bunch.target, dtype=torch.int64)
    train, val, test = (
        Split(x[rows], y[rows]) for rows in splits.three_parts(len(x), seed, y.numpy(), n_val, n_test)
    )
    return Dataset(
        name="digits",
        kind="images",
        train=train,
        val=val,
        test=test,
        source="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), from scikit-learn",
        licence="CC BY 4.0",
        description="handwritten digits, counts of dark pixels in blocks of 4x4.",
        classes=tuple("0123456789"),
        target="label",
    )


def read(
    path: str | Path,
    size: int | Size | None = None,
    seed: int = 0,
    *,
    channels: Channels | None = None,
    labels: Labels = "optional",
) -> Dataset:
    """Read the user's images from an ``.npz`` archive or a folder of image files.

    A folder is flat (no labels), or has one sub-folder per class, or has ``train`` and perhaps ``val`` and
    ``test`` of either form; see `paperback.data.image_folder`. PNG, JPEG, BMP, GIF (first frame), TIFF and
    WebP are read; transparent parts become white.

    An archive has arrays named (in any case) ``x_train, y_train, x_val, y_val, x_test, y_test``; or
    ``train_images, train_labels, ...`` as in MedMNIST; or ``images, labels``; or ``X, y``; or one unnamed
    array. Only images are a must. ``classes`` may name the classes that integer labels index. Images are
    ``(n, height, width)``, ``(n, height, width, channels)`` or ``(n, channels, height, width)`` with 1 or 3
    channels: integers in 0..255 (kept as they are), floats in 0..1 (times 255, rounded), or floats that are
    whole numbers in 0..255.

    Parts that are missing are drawn by seed, stratified by class: a fifth of the rows for the test, a tenth
    for validation.

    Args:
        path: of the archive or the folder.
        size: height and width, or one number for both, to bring every image to; None if they have one size
            already.
        seed: of the split.
        channels: "grey" or "rgb"; if None, grey when every image is.
        labels: "required" also refuses images without labels or of one class.

    Returns:
        A `Dataset` of kind "images": x uint8 ``(n, height, width)`` or ``(n, 3, height, width)``, y int64
        ``(n,)`` or None.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    path = Path(path).expanduser()
    target_size = _checked_size(size)
    if channels not in (None, "grey", "rgb"):
        raise DataError(f'channels is {channels!r}; it must be "grey" or "rgb".')
    if path.is_dir():
        parts, notes = _read_folder(path, target_size, channels)
        classes: tuple[str, ...] | None = None
    else:
        parts, classes = image_archive.read_archive(path, target_size, channels)
        notes = ()
    return _assemble(path, parts, classes, notes, seed, labels)


# -- the user's images -------------------------------------------------------------------------------------


@cache
def _fashion_mnist_arrays() -> dict[str, NDArray[Any]]:
    """Decompression takes half a second, so it happens once."""
    return npz.read_arrays(
        shipped("fashion_mnist.npz"), ("x_train", "y_train", "x_test", "y_test", "classes")
    )


def _checked_size(size: int | Size | None) -> Size | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if not (1 <= height <= 4096 and 1 <= width <= 4096):
        raise DataError(f"size is {size}; height and width must lie in 1..4096.")
    return height, width


def _read_folder(
    path: Path, size: Size | None, channels: Channels | None
) -> tuple[dict[str, Part], tuple[str, ...]]:
    listings, notes = image_folder.list_images(path)
    arrays, _ = image_folder.read_images(list(listings.values()), size, channels)
    parts: dict[str, Part] = {}
    for (part, listing), pixels in zip(listings.items(), arrays, strict=True):
        parts[part] = (pixels, None if listing.labels is None else np.array(listing.labels))
    return parts, notes


def _assemble(
    path: Path,
    parts: dict[str, Part],
    names: tuple[str, ...] | None,
    notes: tuple[str, ...],
    seed: int,
    labels: Labels,
) -> Dataset:
    """Encode the labels, draw the parts that are missing, and make the `Dataset`."""
    coded, classes = _encode(path, parts, names, labels)
    images = {part: np.moveaxis(x, -1, 1) if x.ndim == 4 else x for part, (x, _) in parts.items()}
    try:
        rows = _rows({part: len(x) for part, x in images.items()}, coded.get("train"), seed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error

    def split(part: str) -> Split:
        source, mine = rows[part]
        y = torch.tensor(coded[source][mine]) if coded else None
        return Split(torch.tensor(images[source][mine]), y)

    return Dataset(
        name=path.resolve().name if path.is_dir() else path.stem,
        kind="images",
        train=split("train"),
        val=split("val"),
        test=split("test"),
        source=str(path),
        licence="not stated (your data)",
        description="grey images." if images["train"].ndim == 3 else "colour images.",
        classes=classes,
        target="label" if classes else "",
        notes=notes,
    )


def _rows(
    sizes: dict[str, int], train_labels: NDArray[np.int64] | None, seed: int
) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Each part's rows and which part they are of; what the data lack is drawn from their training part."""
    rng = np.random.default_rng(seed)
    rows = {part: (part, np.arange(size)) for part, size in sizes.items()}
    train = rows["train"][1]
    for part, fraction in (("test", splits.TEST_FRACTION), ("val", splits.VAL_FRACTION)):
        if part not in rows:
            drawn, train = splits.draw(train, max(1, round(sizes["train"] * fraction)), rng, train_labels)
            rows[part] = ("train", drawn)
    if len(train) == 0:
        raise DataError(f"{sizes['train']} image(s) are too few for training, validation and test; add more.")
    rows["train"] = ("train", train)
    return rows


def _encode(
    path: Path, parts: dict[str, Part], names: tuple[str, ...] | None, labels: Labels
) -> tuple[dict[str, NDArray[np.int64]], tuple[str, ...]]:
    """Labels as class indices, by part (nothing if there are none), and the classes of the training part."""
    values = {part: y for part, (_, y) in parts.items() if y is not None}
    if not values:
        if labels == "required":
            raise DataError(
                f"{path} has no labels, which are needed here; put the images into one sub-folder per class, "
                "or add an array 'labels'."
            )
        return {}, ()
    if len(values) < len(parts):
        without = next(part for part in parts if part not in values)
        raise DataError(f"{path} has labels, but none for its {without} part; add them or leave all out.")
    # Labels that are names already need no others.
    named = names is not None and values["train"].dtype.kind != "U"
    known = np.arange(len(names or ())) if named else np.unique(values["train"])
    if labels == "required" and len(np.unique(values["train"])) < 2:
        raise DataError(f"{path} has one class only ({values['train'][0]}); at least two are needed here.")
    for part, y in values.items():
        strange = ~np.isin(y, known)
        if strange.any():
            row = int(strange.argmax())
            place = f"{path}, {part} part, row {row}" if len(parts) > 1 else f"{path}, row {row}"
            why = f"'classes' names {len(known)} only" if named else "the training part has no such class"
            raise DataError(f"{place} has label {y[row]}, but {why}; add it or remove the row.")
    coded = {part: np.searchsorted(known, y).astype(np.int64) for part, y in values.items()}
    return coded, (names or ()) if named else tuple(str(value) for value in known)
