"""The files that ship in ``data/files``: where they are and whether they are whole.

A load compares the size with the manifest, which catches a checkout or an installation that was cut short;
a test compares the SHA-256.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from paperback.errors import DataError

FOLDER = Path(__file__).parent / "files"


@cache
def manifest() -> dict[str, dict[str, Any]]:
    """What MANIFEST.json says of each shipped file: size, hashes, and its columns, shapes or parts."""
    entries: dict[str, dict[str, Any]] = json.loads((FOLDER / "MANIFEST.json").read_text("utf-8"))
    return entries


def shipped(name: str) -> Path:
    """The path of a shipped file, once its size is as the manifest says.

    Args:
        name: of the file, such as ``"diamonds.csv.gz"``.

    Raises:
        DataError: if the file is missing or of another size.
    """
    path = FOLDER / name
    size = path.stat().st_size if path.is_file() else None
    expected = manifest()[name]["file_bytes"]
    if size != expected:
        found = "is missing" if size is None else f"has {size:,} bytes instead of {expected:,}"
        raise DataError(f"{path} {found}; it ships with paperback, so install paperback again.")
    return path
