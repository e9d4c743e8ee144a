"""Read whatever a path names: the entry for the command line and the benches."""

from __future__ import annotations

from pathlib import Path

from paperback.data import images, sniff, table_files, tables
from paperback.data.dataset import Dataset, Labels
from paperback.data.image_folder import SUFFIXES as IMAGE_SUFFIXES
from paperback.data.image_folder import Channels, Size
from paperback.data.tables import TargetIs
from paperback.errors import DataError


def read(
    path: str | Path,
    target: str | None = None,
    *,
    size: int | Size | None = None,
    channels: Channels | None = None,
    target_is: TargetIs = "auto",
    labels: Labels = "optional",
    seed: int = 0,
) -> Dataset:
    """Read the user's data: a table, an ``.npz`` archive of images, or a folder of images.

    Args:
        path: a ``.csv``, ``.tsv`` (also ``.gz``), ``.parquet`` or ``.pq`` file, an ``.npz`` archive, or a
            folder.
        target: column to predict; tables only.
        size: height and width, or one number for both, to bring every image to; images only.
        channels: "grey" or "rgb"; images only.
        target_is: "class", "number" or "auto"; tables only.
        labels: "required" refuses data without labels or with one class only.
        seed: of the split.

    Returns:
        A `Dataset`; see `images.read` and `tables.read` for its types.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    path = Path(path).expanduser()
    name = path.name.lower()
    is_images = path.is_dir() or name.endswith(".npz")
    if is_images and target is not None:
        raise DataError(f"{path} holds images, which have no column {target!r}; leave the target out.")
    if is_images:
        return images.read(path, size, seed, channels=channels, labels=labels)
    sniff.check_file(path)
    if name.endswith(table_files.SUFFIXES):
        if size is not None or channels is not None:
            raise DataError(f"{path} is a table, which has no size or channels; leave them out.")
        return tables.read(path, target, seed, target_is=target_is, labels=labels)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path} is a single image; give the folder that holds the images ({path.parent}).")
    raise DataError(
        f"{path} is {sniff.kind_of(path)} with a suffix that is not known; give a folder of images, an .npz "
        f"archive, or one of {', '.join(table_files.SUFFIXES)}."
    )
