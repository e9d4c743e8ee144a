"""The shipped files are whole, listed, and licensed."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from pathlib import Path

import pytest

from paperback.data import npz, shipped
from paperback.errors import DataError


@pytest.mark.parametrize("name", sorted(shipped.manifest()))
def test_file_is_the_one_of_the_manifest(name: str) -> None:
    assert (
        hashlib.sha256(shipped.shipped(name).read_bytes()).hexdigest() == shipped.manifest()[name]["sha256"]
    )


def test_manifest_and_folder_agree() -> None:
    present = {path.name for path in shipped.FOLDER.iterdir() if path.suffix in (".gz", ".npz")}
    assert present == set(shipped.manifest())


def test_every_file_has_its_licence_text() -> None:
    texts = "\n".join(path.read_text("utf-8") for path in (shipped.FOLDER / "LICENSES").iterdir())
    names = {path.stem for path in (shipped.FOLDER / "LICENSES").iterdir()}
    for file in shipped.manifest():
        assert file.split(".")[0] in names or file in texts


@pytest.mark.parametrize("name", ["austen.txt.gz", "kjv.txt.gz"])
def test_parts_of_a_book_cover_it(name: str) -> None:
    entry = shipped.manifest()[name]
    bounds = [bound for part in entry["parts"] for bound in (part["start"], part["end"])]
    assert bounds[0] == 0
    assert bounds[1:-1:2] == bounds[2::2]
    assert bounds[-1] == entry["bytes"] == len(gzip.decompress(shipped.shipped(name).read_bytes()))


def test_shapes_of_the_archive_are_those_of_the_manifest() -> None:
    entry = shipped.manifest()["fashion_mnist.npz"]
    path = shipped.shipped("fashion_mnist.npz")
    arrays = npz.read_arrays(path, npz.names(path))
    for name, array in arrays.items():
        assert [str(array.dtype), list(array.shape)] == entry[name]


@pytest.mark.parametrize(
    ("spoil", "message"), [("cut", "has 100 bytes instead of 55,034"), ("remove", "is missing")]
)
def test_an_installation_cut_short_is_noticed(
    spoil: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spoil == "cut":
        shutil.copy(shipped.FOLDER / "credit.csv.gz", tmp_path)
        (tmp_path / "credit.csv.gz").write_bytes((tmp_path / "credit.csv.gz").read_bytes()[:100])
    shipped.manifest()  # read, and cached, before its folder moves
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        shipped.shipped("credit.csv.gz")
    assert "install paperback again" in str(caught.value)
