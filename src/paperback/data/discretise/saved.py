"""The one check that both discretisers make before they restore themselves from a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paperback.errors import ArtefactError


def check_kind(saved: Mapping[str, Any], kind: str) -> None:
    if not isinstance(saved, Mapping) or saved.get("kind") != kind:
        raise ArtefactError(f"this is no saved {kind}; restore it with the class that saved it.")
