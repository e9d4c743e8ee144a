"""A folder of image files, read to arrays.

Three layouts are understood. A flat folder has images and no labels. A folder of sub-folders has one class
per sub-folder (images may lie deeper in it). A folder of ``train`` and perhaps ``val`` and ``test`` has
parts that are fixed, each flat or with one class per sub-folder.

Hidden files are skipped. Links to folders are not followed, nor links to files outside the folder: a data
set is what lies in it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from paperback.data import sniff
from paperback.errors import DataError

Channels = Literal["grey", "rgb"]
Size = tuple[int, int]  # height, width

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_BOMB = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, which a few kilobytes may unpack to"
_GREY_MODES = frozenset({"1", "L", "I", "F", "I;16", "I;16B", "I;16L", "LA", "La"})


@dataclass(frozen=True)
class Listing:
    """The images of one part of a data set.

    Attributes:
        files: their paths, in order.
        labels: name of the class of each, or None.
    """

    files: tuple[Path, ...]
    labels: tuple[str, ...] | None


def list_images(root: Path) -> tuple[dict[str, Listing], tuple[str, ...]]:
    """Find the images of a folder and their classes.

    Args:
        root: the folder.

    Returns:
        "train" and perhaps "val" and "test" to their `Listing`, and notes on what was left out.

    Raises:
        DataError: if there are no images or the layout is ambiguous.
    """
    folders = {entry.name: entry for entry in _visible(root) if entry.is_dir() and not entry.is_symlink()}
    own: dict[str, Path] = {
        _PARTS[name.lower()]: folder for name, folder in folders.items() if name.lower() in _PARTS
    }
    skipped: list[Path] = []
    if "train" in own and len(own) == len(folders):
        folders = {part: own[part] for part in ("train", "val", "test") if part in own}
    else:
        folders = {"train": root}
    listings = {part: _list_part(folder, root, skipped) for part, folder in folders.items()}
    if not skipped:
        return listings, ()
    return listings, (f"{len(skipped)} link(s) not followed, first {skipped[0].relative_to(root)}.",)


def read_images(
    listings: Sequence[Listing], size: Size | None, channels: Channels | None
) -> tuple[list[NDArray[np.uint8]], Channels]:
    """Read the pixels of some listings, all to one size and one number of channels.

    Args:
        listings: what to read.
        size: height and width to bring every image to; if None they must be equal already.
        channels: "grey" or "rgb"; if None, grey when every image is.

    Returns:
        One array per listing, ``(n, height, width)`` for grey and ``(n, height, width, 3)`` for rgb; and
        which it is.

    Raises:
        DataError: naming the first file that is no image, is damaged, or has another size.
    """
    files = [file for listing in listings for file in listing.files]
    found, all_grey = _inspect(files, size)
    chosen: Channels = channels or ("grey" if all_grey else "rgb")
    shape = found if chosen == "grey" else (*found, 3)
    if len(files) * int(np.prod(shape)) > sniff.MAX_BYTES:
        raise DataError(
            f"{files[0].parent}: {len(files):,} images of {found[1]}x{found[0]} pixels exceed the "
            f"{sniff.MAX_BYTES / 2**30:.0f} GiB that are read at once; give a smaller size."
        )
    arrays = []
    for listing in listings:
        pixels = np.empty((len(listing.files), *shape), np.uint8)
        for row, file in enumerate(listing.files):
            pixels[row] = _read_image(file, found, chosen)
        arrays.append(pixels)
    return arrays, chosen


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Bring an image to a size: area means where it shrinks, Lanczos where it grows; aspect may change."""
    if (image.height, image.width) == size:
        return image
    shrinks = image.height >= size[0] and image.width >= size[1]
    return image.resize((size[1], size[0]), Image.Resampling.BOX if shrinks else Image.Resampling.LANCZOS)


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except PermissionError as error:
        raise DataError(f"{folder} cannot be read (no permission); change its permissions.") from error


def _list_part(folder: Path, root: Path, skipped: list[Path]) -> Listing:
    """One part: flat, or one class per sub-folder."""
    flat = [entry for entry in _visible(folder) if _is_image(entry, root, skipped)]
    classes: dict[str, list[Path]] = {}
    for entry in _visible(folder):
        if entry.is_dir() and entry.is_symlink():
            skipped.append(entry)
        elif entry.is_dir() and (files := _walk(entry, root, skipped)):
            classes[entry.name] = files
    if flat and classes:
        raise DataError(
            f"{folder} has images both directly in it (first {flat[0].name}) and in sub-folders (first "
            f"{next(iter(classes))}); put either every image into a sub-folder, one per class, or none."
        )
    if not flat and not classes:
        raise DataError(
            f"{folder} contains no image ({', '.join(sorted(SUFFIXES))}); give the folder that holds them."
        )
    if flat:
        return Listing(tuple(flat), None)
    return Listing(
        tuple(file for files in classes.values() for file in files),
        tuple(name for name, files in classes.items() for _ in files),
    )


def _walk(folder: Path, root: Path, skipped: list[Path]) -> list[Path]:
    """Every image below a folder, in order."""
    found = []
    for directory, subfolders, files in os.walk(folder, followlinks=False):
        here = Path(directory)
        skipped.extend(here / name for name in subfolders if (here / name).is_symlink())
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            here / name
            for name in sorted(files)
            if not name.startswith(".") and _is_image(here / name, root, skipped)
        ]
    return found


def _is_image(path: Path, root: Path, skipped: list[Path]) -> bool:
    """Whether a path is named as an image and lies in the folder, also after its links are followed."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        return False
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        skipped.append(path)
        return False
    return True


def _inspect(files: Sequence[Path], size: Size | None) -> tuple[Size, bool]:
    """The common size and whether all are grey, from the headers alone."""
    first: Size | None = None
    all_grey = True
    for file in files:
        with _opened(file) as image:
            found = (image.height, image.width)
            all_grey &= image.mode in _GREY_MODES or (image.mode == "P" and _grey_palette(image))
            # The orientation tag may turn it by a quarter. In a PNG, looking for it would decode the pixels.
            if image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:
                found = (found[1], found[0])
        first = first or found
        if size is None and found != first:
            raise DataError(
                f"{file} has {found[1]}x{found[0]} pixels, {files[0].name} has {first[1]}x{first[0]}; give a "
                f"size to bring all images to, such as size={min(*first, 64)}."
            )
    assert first is not None  # a listing is never empty
    return size or first, all_grey


def _grey_palette(image: Image.Image) -> bool:
    palette = np.frombuffer(image.convert("RGB").tobytes(), np.uint8).reshape(-1, 3)
    return bool((palette == palette[:, :1]).all())


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image lazily; refuse what is none, what would fill the memory, what proves damaged."""
    sniff.check_file(file)
    kind = sniff.kind_of(file)
    if kind not in sniff.IMAGE_KINDS:
        raise DataError(f"{file} is {kind}, not an image as its name says; remove it or export it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield image
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"{file} claims {_BOMB}; shrink or remove it.") from error
    except (
        Exception
    ) as error:  # a decoder raises whatever it trips over: OSError, SyntaxError, struct.error ...
        raise DataError(f"{file} is cut short or damaged; remove it or export it again.") from error


def _read_image(file: Path, size: Size, channels: Channels) -> NDArray[np.uint8]:
    with _opened(file) as opened:
        turned = opened if opened.format == "PNG" else ImageOps.exif_transpose(opened)
        image = _to_8_bits(file, turned)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = resize(image.convert("L" if channels == "grey" else "RGB"), size)
        return np.asarray(image, np.uint8)


def _to_8_bits(file: Path, image: Image.Image) -> Image.Image:
    """Pillow's own conversion from 16 bits clips at 255; here grey levels are scaled."""
    if not image.mode.startswith(("I", "F")):
        return image
    values: NDArray[Any] = np.asarray(image)
    top = 1.0 if image.mode == "F" else 255.0 if values.max() <= 255 else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise DataError(
            f"{file} has values from {values.min():g} to {values.max():g}; expected 0 to {top:g}, so scale "
            "it or save it with 8 bits."
        )
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
