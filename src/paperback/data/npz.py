"""Reading ``.npz`` archives that somebody else made.

`numpy.load` allocates whatever an archive's headers claim, and with pickled objects in it runs code. Here
every header is read first and compared with the bytes that are really there; only then are arrays read,
never objects.
"""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from paperback.data import sniff
from paperback.errors import DataError

# The most that one compressed byte can stand for: 1032 in deflate by its format; in LZMA and bzip2 by
# experiment on zeros, with room.
_MAX_RATIO = {
    zipfile.ZIP_STORED: 1,
    zipfile.ZIP_DEFLATED: 1_040,
    zipfile.ZIP_BZIP2: 2_000_000,
    zipfile.ZIP_LZMA: 20_000,
}
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


def names(path: Path) -> tuple[str, ...]:
    """Names of the arrays in an archive, without their ``.npy``.

    Raises:
        DataError: if it is not a whole zip archive.
    """
    with _open(path) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def read_arrays(path: Path, wanted: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read named arrays.

    Args:
        path: of the archive.
        wanted: names as `names` returns them.

    Returns:
        Name to array, in the order wanted.

    Raises:
        DataError: if an array holds objects, claims more than the archive has, or is cut short or damaged.
    """
    with _open(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        total = sum(members[name].file_size for name in wanted)
        if total > sniff.MAX_BYTES:
            raise DataError(
                f"{path} unpacks to {total / 2**30:,.0f} GiB, more than the {sniff.MAX_BYTES / 2**30:.0f} "
                "GiB that is read at once; store fewer or smaller arrays."
            )
        return {name: _read_member(path, archive, members[name]) for name in wanted}


def _open(path: Path) -> zipfile.ZipFile:
    sniff.check_file(path)
    sniff.check_kind(path, "a zip archive")
    try:
        return zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise DataError(f"{path} is cut short or damaged; copy or export it again.") from error


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    place = f"{path}, array {info.filename.removesuffix('.npy')}"
    if info.flag_bits & 1:
        raise DataError(f"{place} is encrypted; store it without a password.")
    if info.file_size > _MAX_RATIO.get(info.compress_type, 1) * max(info.compress_size, 1):
        raise DataError(
            f"{place} claims {info.file_size:,} bytes, which {info.compress_size:,} compressed bytes cannot "
            "hold; it is damaged or forged, export it again."
        )
    try:
        with archive.open(info) as file:
            shape, fortran_order, dtype = _header(place, file)
            claimed = math.prod(shape) * dtype.itemsize
            if claimed != info.file_size - file.tell():
                raise DataError(
                    f"{place} claims shape {shape} of {dtype}, which is {claimed:,} bytes, but holds "
                    f"{info.file_size - file.tell():,}; it is damaged or forged, export it again."
                )
            data = file.read()
    except _DAMAGE as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place} is cut short or damaged; copy or export it again.") from error
    if len(data) != claimed:
        raise DataError(f"{place} ends after {len(data):,} of {claimed:,} bytes; copy or export it again.")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _header(place: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type that a member claims; refused unless plain numbers or strings."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if dtype.hasobject:
        raise DataError(
            f"{place} holds Python objects, which are never loaded because they can run code; store numbers "
            "(for images of one size, np.stack them first)."
        )
    if dtype.kind not in "biufU":
        raise DataError(f"{place} has dtype {dtype}; store integers, floats, booleans or strings.")
    return shape, fortran_order, dtype
