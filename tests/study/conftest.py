"""Makes the fake studies importable whatever import mode pytest runs in, and a catalogue that knows them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_studies import fake_method

from paperback import catalogue


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes the catalogue hold fake methods only, one per name of a study in fake_studies."""

    def install(*studies: str) -> None:
        known = {f"fake-{study.replace('_', '-')}": fake_method(study) for study in studies}
        monkeypatch.setattr(catalogue, "find", known.__getitem__)
        monkeypatch.setattr(catalogue, "methods", lambda: tuple(known.values()))

    return install
