"""What a file really is, before a reader trusts its name.

A file is judged by its first bytes. That turns the parser errors of a dozen libraries into one sentence:
"cars.csv is a PNG image, not ...".
"""

from __future__ import annotations

import os
from pathlib import Path

from paperback.errors import DataError

# No reader allocates more than this for one file: what claims more is a hoax, or too much for one machine.
MAX_BYTES = 8 * 2**30

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"PAR1", "a Parquet file"),
    (b"\x93NUMPY", "a .npy array"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"\xfd7zXZ\x00", "xz-compressed data"),
    (b"BZh", "bzip2-compressed data"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"ARROW1", "an Arrow file"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
# What to do where renaming the file or exporting it once more is not the answer.
_REMEDIES = {
    "a Git LFS pointer": "the data itself was not checked out, so run 'git lfs pull'",
    "a Python pickle": "it can run code and is never opened, so export the data as CSV, Parquet or .npz",
    "an Office document": "save the sheet as CSV",
    "an old Office document": "save the sheet as CSV",
    "text in UTF-16": "save it as UTF-8",
}
IMAGE_KINDS = frozenset(
    {"a PNG image", "a JPEG image", "a GIF image", "a TIFF image", "a BMP image", "a WebP image"}
)


def kind_of(path: Path) -> str:
    """What the first bytes of a file say that it is, with its article.

    Args:
        path: of a regular file.

    Returns:
        For example "a PNG image", "a zip archive", "text" or "binary data".
    """
    with path.open("rb") as file:
        head = file.read(4096)
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page"
    is_text = b"\x00" not in head and head[:64].isascii()
    for signature, kind in _SIGNATURES:
        # A table may have a column PAR1, so letters alone prove nothing where text follows.
        if head.startswith(signature) and not (signature.isalnum() and is_text):
            return kind
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        office = b"[Content_Types].xml" in head or b"xl/" in head
        return "an Office document" if office else "a zip archive"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[:2] == b"BM" and b"\x00" in head[:14]:
        return "a BMP image"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle"
    return "binary data" if b"\x00" in head else "text"


def check_file(path: Path) -> None:
    """Refuse what cannot be a data file: missing, a folder, a device, unreadable, empty.

    Args:
        path: as the user gave it.

    Raises:
        DataError: saying which of these it is.
    """
    if not path.exists():
        near = _near_miss(path)
        raise DataError(f"{path} does not exist{near}; give the path of a file or a folder.")
    if path.is_dir():
        raise DataError(f"{path} is a folder where a file was expected; give the file in it.")
    if not path.is_file():
        raise DataError(f"{path} is a pipe or a device; copy its content to a file first.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read (no permission); change its permissions.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes); export or copy it again.")


def check_kind(path: Path, expected: str) -> None:
    """Refuse a file whose content is not what its name says.

    Args:
        path: of a regular file.
        expected: a kind as `kind_of` returns it.

    Raises:
        DataError: naming the file and what it is.
    """
    found = kind_of(path)
    if found in _REMEDIES:
        raise DataError(f"{path} is {found}; {_REMEDIES[found]}.")
    if found != expected:
        raise DataError(f"{path} is {found}, not {expected} as its name says; rename it or export it again.")


def _near_miss(path: Path) -> str:
    """', but a.csv does' if the folder has a file of nearly that name."""
    from difflib import get_close_matches

    if not path.parent.is_dir():
        return f" (nor does its folder {path.parent})"
    close = get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.75)
    return f", but {close[0]} does" if close else ""
