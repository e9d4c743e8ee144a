"""Every bad file of the corpus gets one clear sentence: what, where, and what to do."""

from __future__ import annotations

import contextlib
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.corpus import CASES, SEED, Case, csv_bytes, good_frame, good_rows, grey_images, save_images

from paperback import data
from paperback.data import sniff
from paperback.errors import DataError


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_file_gets_one_sentence_with_place_and_remedy(case: Case, tmp_path: Path) -> None:
    path = case.make(tmp_path, np.random.default_rng(SEED))
    with pytest.raises(DataError) as caught:
        data.read(path, **case.arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message.replace(str(tmp_path), "")) < 300
    assert message.endswith((".", "?"))
    for fragment in case.place:
        assert fragment in message
    assert case.remedy in message


def test_corpus_names_are_unique_and_many() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_pickle_in_an_archive_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.mkdir, (tmp_path / "ran",))  # type: ignore[return-value]

    np.savez(tmp_path / "a.npz", images=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match="can run code"):
        data.read(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cars.csv", "cars.csv.gz", "cars.parquet", "pictures.npz"])
def test_more_than_the_limit_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _good_file(tmp_path, name)
    data.read(path)
    monkeypatch.setattr(sniff, "MAX_BYTES", 500)
    with pytest.raises(DataError, match="read at once"):
        data.read(path)


def test_a_folder_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_images(tmp_path / "pictures", grey_images(np.random.default_rng(0)))
    monkeypatch.setattr(sniff, "MAX_BYTES", 500)
    with pytest.raises(DataError, match="give a smaller size"):
        data.read(tmp_path / "pictures")


@pytest.mark.parametrize(
    "name",
    [
        "cars.csv",
        "cars.csv.gz",
        "cars.parquet",
        "pictures.npz",
        *(f"pictures/000.{suffix}" for suffix in ("png", "jpg", "gif", "tif", "bmp", "webp")),
    ],
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cut=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 7)), max_size=4))
def test_no_damage_escapes_as_another_error(
    name: str, tmp_path: Path, cut: float, flips: list[tuple[float, int]]
) -> None:
    path = _good_file(tmp_path, name)
    raw = bytearray(path.read_bytes())
    del raw[round(len(raw) * (0.3 + 0.7 * cut)) :]
    for place, bit in flips:
        raw[int(place * len(raw))] ^= 1 << bit
    path.write_bytes(raw)
    with contextlib.suppress(DataError):
        found = data.read(path.parent if path.parent.name == "pictures" else path)
        assert len(found.train) > 0


def _good_file(folder: Path, name: str) -> Path:
    """A healthy file of the kind that the name says."""
    rng = np.random.default_rng(SEED)
    path = folder / name
    if name.startswith("pictures/"):
        images = np.kron(grey_images(rng, 3), np.ones((1, 4, 4), np.uint8))
        return save_images(path.parent, images, path.suffix)[0]
    if name.endswith(".npz"):
        np.savez_compressed(path, images=grey_images(rng), labels=np.arange(20) % 2)
    elif name.endswith(".parquet"):
        buffer = io.BytesIO()
        good_frame(rng).to_parquet(buffer)
        path.write_bytes(buffer.getvalue())
    else:
        content = csv_bytes(good_rows(rng))
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path
