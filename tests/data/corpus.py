"""Bad files, made by a seeded generator: every way in which data go wrong that we have met or can think of.

A `Case` makes one file or folder and says what the message about it must contain: the place and the remedy.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

SEED = 20240607

Maker = Callable[[Path, np.random.Generator], Path]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: what is wrong, as the test's id.
        make: writes the files below a folder and returns the path that a user would give.
        place: strings that locate the fault; all must be in the message.
        remedy: a string that says what to do.
        arguments: of `paperback.data.read`, beside the path.
    """

    name: str
    make: Maker
    place: tuple[str, ...]
    remedy: str
    arguments: dict[str, Any] = field(default_factory=dict)


def good_rows(rng: np.random.Generator, n: int = 30) -> list[list[str]]:
    """Rows of a healthy table: a number, a colour, a whole number, a class."""
    colours, classes = ("red", "green", "blue"), ("yes", "no")
    return [
        [f"{rng.normal():.3f}", colours[rng.integers(3)], str(rng.integers(100)), classes[row % 2]]
        for row in range(n)
    ]


HEADER = ["width", "colour", "count", "label"]


def csv_bytes(rows: list[list[str]], header: list[str] | None = None, separator: str = ",") -> bytes:
    """A table as CSV, in UTF-8."""
    return "".join(separator.join(row) + "\n" for row in [header or HEADER, *rows]).encode()


def good_frame(rng: np.random.Generator, n: int = 30) -> pd.DataFrame:
    """The same table as a DataFrame."""
    return pd.read_csv(io.BytesIO(csv_bytes(good_rows(rng, n))))


def grey_images(rng: np.random.Generator, n: int = 20, size: int = 8) -> np.ndarray:
    """Noise, ``(n, size, size)`` uint8."""
    return rng.integers(0, 256, (n, size, size), dtype=np.uint8)


def save_images(folder: Path, images: np.ndarray, suffix: str = ".png") -> list[Path]:
    """Write each image to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{row:03d}{suffix}" for row in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path, lossless=True)  # which WebP needs to be told
    return paths


def _file(name: str, content: Callable[[np.random.Generator], bytes]) -> Maker:
    def make(folder: Path, rng: np.random.Generator) -> Path:
        path = folder / name
        path.write_bytes(content(rng))
        return path

    return make


def _csv(edit: Callable[[list[list[str]]], object], name: str = "cars.csv") -> Maker:
    """A healthy table, header included, with some cells or rows edited in place."""

    def content(rng: np.random.Generator) -> bytes:
        rows = [list(HEADER), *good_rows(rng)]
        edit(rows)
        return "".join(",".join(row) + "\n" for row in rows).encode()

    return _file(name, content)


def _set(row: int, column: int, value: str) -> Callable[[list[list[str]]], object]:
    return lambda rows: rows[row].__setitem__(column, value)


def _column(column: int, value: Callable[[int], str]) -> Callable[[list[list[str]]], object]:
    return lambda rows: [cells.__setitem__(column, value(i)) for i, cells in enumerate(rows) if i > 0]


def _png(rng: np.random.Generator, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey_images(rng, 1, size)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def _npz_bytes(compressed: bool = True, **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def _npz(arrays: Callable[[np.random.Generator], dict[str, Any]]) -> Maker:
    return _file("pictures.npz", lambda rng: _npz_bytes(**arrays(rng)))


def _parquet(frame: Callable[[np.random.Generator], pd.DataFrame]) -> Callable[[np.random.Generator], bytes]:
    def content(rng: np.random.Generator) -> bytes:
        buffer = io.BytesIO()
        frame(rng).to_parquet(buffer)
        return buffer.getvalue()

    return content


def _folder(spoil: Callable[[Path, np.random.Generator], object], classes: tuple[str, ...] = ()) -> Maker:
    """A folder of healthy images (one sub-folder per class), then spoiled."""

    def make(folder: Path, rng: np.random.Generator) -> Path:
        root = folder / "pictures"
        for name in classes or ("",):
            save_images(root / name, grey_images(rng, 6))
        spoil(root, rng)
        return root

    return make


def _forged_npz(shape: tuple[int, ...], rng: np.random.Generator, announced: int | None = None) -> bytes:
    """An archive whose one array claims a shape far beyond what is in it."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + rng.bytes(64))
    raw = bytearray(buffer.getvalue())
    if announced is not None:  # the directory of the archive lies about the size as well
        place = raw.rindex(b"PK\x01\x02") + 24
        raw[place : place + 4] = announced.to_bytes(4, "little")
    return bytes(raw)


def _flip_data(data: bytes) -> bytes:
    """One bit flipped in the middle of the compressed data of a PNG or an archive."""
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 0x10
    return bytes(spoiled)


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _named_pipe(folder: Path, rng: np.random.Generator) -> Path:
    os.mkfifo(folder / "cars.csv")
    return folder / "cars.csv"


def _empty_folder(folder: Path, rng: np.random.Generator) -> Path:
    (folder / "pictures").mkdir()
    return folder / "pictures"


def _only_links_out(folder: Path, rng: np.random.Generator) -> Path:
    outside = save_images(folder / "outside", grey_images(rng, 3))
    root = folder / "pictures"
    root.mkdir()
    for path in outside:
        (root / path.name).symlink_to(path)
    return root


def _nested_frame(rng: np.random.Generator) -> pd.DataFrame:
    return good_frame(rng).assign(tags=[[1, 2]] * 30)


def _tables() -> Iterator[Case]:
    target = {"target": "label"}
    yield Case("missing file", lambda folder, rng: folder / "cars.csv", ("cars.csv",), "give the path")
    yield Case(
        "misspelt file name",
        lambda folder, rng: _csv(lambda rows: None)(folder, rng).with_name("car.csv"),
        ("car.csv does not exist",),
        "but cars.csv does",
    )
    yield Case("missing folder", lambda folder, rng: folder / "no" / "cars.csv", ("no",), "give the path")
    yield Case("named pipe", _named_pipe, ("cars.csv",), "copy its content to a file")
    yield Case("empty file", _file("cars.csv", lambda rng: b""), ("cars.csv", "0 bytes"), "export or copy")
    yield Case(
        "blank file", _file("cars.csv", lambda rng: b"\n \n\n"), ("nothing but blanks",), "export it again"
    )
    yield Case(
        "header only",
        _file("cars.csv", lambda rng: csv_bytes([])),
        ("header but no rows",),
        "export it again",
    )
    yield Case(
        "missing target", _csv(lambda rows: None), ("'price'",), "choose one of width", {"target": "price"}
    )
    yield Case(
        "misspelt target", _csv(lambda rows: None), ("'lable'",), "did you mean label?", {"target": "lable"}
    )
    yield Case(
        "target in other case",
        _csv(lambda rows: None),
        ("'LABEL'",),
        "did you mean label?",
        {"target": "LABEL"},
    )
    yield Case(
        "short row", _csv(lambda rows: rows[16].pop()), ("line 17", "3 fields", "has 4"), "mend the line"
    )
    yield Case(
        "long row", _csv(lambda rows: rows[5].append("x")), ("line 6", "5 fields", "has 4"), "mend the line"
    )
    yield Case(
        "unquoted separator in a text",
        _csv(_set(3, 1, "red, or so")),
        ("line 4", "5 fields"),
        "needs quotes",
    )
    yield Case(
        "trailing separator in every row",
        _csv(lambda rows: [row.append("") for row in rows[1:]]),
        ("line 2", "5 fields"),
        "mend the line",
    )
    yield Case("quote never closed", _csv(_set(4, 1, '"red')), ("line",), "check the quotes")
    yield Case("text after a closing quote", _csv(_set(4, 1, '"red"dish')), ("line 5",), "check the quotes")
    yield Case(
        "NaN in target",
        _csv(_set(8, 3, "")),
        ("column label", "1 row(s)", "first row 7"),
        "fill them in",
        target,
    )
    yield Case(
        "NA in a numeric target",
        _csv(_set(8, 0, "NA")),
        ("column width", "first row 7"),
        "fill them in",
        {"target": "width"},
    )
    yield Case("infinite number", _csv(_set(8, 0, "inf")), ("column width", "row 7"), "replace it")
    yield Case(
        "infinite target",
        _csv(_set(8, 2, "-inf")),
        ("column count", "row 7"),
        "replace it",
        {"target": "count"},
    )
    yield Case(
        "text in a numeric target",
        _csv(_column(0, lambda i: f"{i}.5 cm")),
        ("column width", "1.5 cm"),
        "clean the column",
        {"target": "width"},
    )
    yield Case(
        "text target taken as a number",
        _csv(lambda rows: None),
        ("column label", "not a number"),
        "take it as a class",
        {"target": "label", "target_is": "number"},
    )
    yield Case(
        "an identifier as target",
        _csv(_column(3, lambda i: f"id-{i:04d}")),
        ("column label", "30 different values"),
        "choose another",
        target,
    )
    yield Case(
        "one class only",
        _csv(_column(3, lambda i: "yes")),
        ("column label", "one value only (yes)"),
        "at least two",
        {**target, "labels": "required"},
    )
    yield Case(
        "one number only",
        _csv(_column(2, lambda i: "7")),
        ("column count", "one value only"),
        "at least two",
        {"target": "count", "labels": "required"},
    )
    yield Case(
        "no target where one is needed",
        _csv(lambda rows: None),
        ("a target is needed",),
        "width, colour",
        {"labels": "required"},
    )
    yield Case(
        "target is the only column",
        _file("cars.csv", lambda rng: b"label\n" + b"yes\nno\n" * 10),
        ("no column beside",),
        "add some",
        target,
    )
    yield Case(
        "repeated column name", _csv(_set(0, 1, "width")), ("line 1", "'width' appears 2 times"), "rename"
    )
    yield Case("column without a name", _csv(_set(0, 2, "")), ("line 1", "column 3"), "give every column one")
    yield Case("first column without a name", _csv(_set(0, 0, "")), ("line 1", "column 1"), "give it one")
    yield Case(
        "no header",
        _file("cars.csv", lambda rng: csv_bytes([["1", "2.5"], ["3", "4"]], ["0.5", "7"])),
        ("line 1", "all numbers"),
        "names of the columns",
    )
    yield Case("one row", _file("cars.csv", lambda rng: csv_bytes(good_rows(rng, 1))), ("cars.csv",), "rows")
    yield Case(
        "two rows", _file("cars.csv", lambda rng: csv_bytes(good_rows(rng, 2))), ("cars.csv",), "3 are needed"
    )
    yield Case(
        "as many classes as rows",
        _file("cars.csv", lambda rng: csv_bytes([[*r[:3], str(i)] for i, r in enumerate(good_rows(rng, 9))])),
        ("cars.csv", "9 classes"),
        "add rows",
        {**target, "target_is": "class"},
    )
    yield Case(
        "a cell without end", _csv(_set(2, 1, "x" * 200_000)), ("line 3", "field limit"), "check the quotes"
    )
    yield Case(
        "Latin-1",
        _file("cars.csv", lambda rng: csv_bytes(good_rows(rng)) + "1,grün,2,yes\n".encode("latin1")),
        ("line 32", "0xfc"),
        "save the file as UTF-8",
    )
    yield Case(
        "UTF-16",
        _file("cars.csv", lambda rng: csv_bytes(good_rows(rng)).decode().encode("utf-16")),
        ("text in UTF-16",),
        "UTF-8",
    )
    yield Case(
        "NUL bytes",
        _file("cars.csv", lambda rng: csv_bytes(good_rows(rng)) + b"\x001,2,3\n"),
        ("binary data",),
        "export",
    )
    yield Case(
        "NUL byte far down",
        _file("cars.csv", lambda rng: csv_bytes(good_rows(rng, 400)) + b"\x001,2,3\n"),
        ("line 402", "NUL"),
        "export it again",
    )
    yield Case("a PNG named csv", _file("cars.csv", _png), ("a PNG image",), "rename it")
    yield Case(
        "a gzip named csv",
        _file("cars.csv", lambda rng: gzip.compress(csv_bytes(good_rows(rng)))),
        ("gzip",),
        "rename it",
    )
    yield Case(
        "a csv named csv.gz",
        _file("cars.csv.gz", lambda rng: csv_bytes(good_rows(rng))),
        ("is text",),
        "rename it",
    )
    yield Case(
        "a PDF named csv",
        _file("cars.csv", lambda rng: b"%PDF-1.7\n" + rng.bytes(99)),
        ("a PDF document",),
        "rename it",
    )
    yield Case(
        "a web page named csv",
        _file("cars.csv", lambda rng: b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n"),
        ("a web page",),
        "export it again",
    )
    yield Case(
        "a Git LFS pointer",
        _file("cars.csv", lambda rng: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("Git LFS",),
        "git lfs pull",
    )
    yield Case(
        "a spreadsheet",
        _file("cars.csv", lambda rng: b"PK\x03\x04" + b"\x00" * 26 + b"[Content_Types].xml"),
        ("an Office document",),
        "save the sheet as CSV",
    )
    yield Case(
        "a pickle named csv",
        _file("cars.csv", lambda rng: pickle.dumps({"a": 1})),
        ("pickle",),
        "export the data as CSV",
    )
    yield Case(
        "truncated gzip",
        _file("cars.csv.gz", lambda rng: gzip.compress(csv_bytes(good_rows(rng, 300)))[:-400]),
        ("cut short or damaged",),
        "copy or compress it again",
    )
    yield Case(
        "bit flip in a gzip",
        _file("cars.csv.gz", lambda rng: _flip_data(gzip.compress(csv_bytes(good_rows(rng, 300))))),
        ("cut short or damaged",),
        "copy or compress it again",
    )
    yield Case(
        "unknown suffix",
        _file("cars.docx", lambda rng: b"PK\x03\x04" + rng.bytes(50)),
        ("a zip archive",),
        ".csv",
    )
    yield Case(
        "plain text file",
        _file("cars.txt", lambda rng: b"red\ngreen\n"),
        ("is text",),
        "give a folder of images",
    )
    yield Case("size for a table", _csv(lambda rows: None), ("is a table",), "leave them out", {"size": 8})
    yield Case(
        "unknown kind of target",
        _csv(lambda rows: None),
        ("target_is",),
        "auto",
        {**target, "target_is": "colour"},
    )


def _parquets() -> Iterator[Case]:
    good = _parquet(good_frame)
    yield Case(
        "truncated parquet",
        _file("cars.parquet", lambda rng: good(rng)[:-30]),
        ("cut short",),
        "copy or export",
    )
    yield Case(
        "parquet header only", _file("cars.parquet", lambda rng: b"PAR1"), ("is text",), "export it again"
    )
    yield Case(
        "text named parquet",
        _file("cars.parquet", lambda rng: csv_bytes(good_rows(rng))),
        ("is text",),
        "rename",
    )
    yield Case(
        "parquet without rows",
        _file("cars.pq", _parquet(lambda rng: good_frame(rng).iloc[:0])),
        ("no rows",),
        "export it",
    )
    yield Case(
        "parquet without columns",
        _file("cars.parquet", _parquet(lambda rng: pd.DataFrame())),
        ("no columns",),
        "export it",
    )
    yield Case(
        "parquet with lists",
        _file("cars.parquet", _parquet(_nested_frame)),
        ("column tags", "list"),
        "convert",
    )
    yield Case(
        "parquet with dates",
        _file("cars.parquet", _parquet(lambda rng: good_frame(rng).assign(day=pd.Timestamp("2024-01-01")))),
        ("column day", "timestamp"),
        "convert or remove",
    )
    yield Case(
        "parquet with a missing target",
        _file(
            "cars.parquet",
            _parquet(lambda rng: good_frame(rng).assign(label=[None] * 3 + ["a", "b", "c"] * 9)),
        ),
        ("column label", "3 row(s)", "first row 0"),
        "fill them in",
        {"target": "label"},
    )
    yield Case(
        "parquet with infinity",
        _file("cars.parquet", _parquet(lambda rng: good_frame(rng).assign(width=np.inf))),
        ("column width", "row 0"),
        "replace it",
    )
    yield Case(
        "damaged parquet",
        _file("cars.parquet", lambda rng: b"PAR1" + rng.bytes(200) + b"PAR1"),
        ("cut short",),
        "copy",
    )


def _archives() -> Iterator[Case]:
    labels = np.arange(20) % 2
    yield Case(
        "text named npz", _file("pictures.npz", lambda rng: b"not an archive"), ("is text",), "rename it"
    )
    yield Case("empty archive", _npz(lambda rng: {}), ("pictures.npz holds nothing",), "images")
    yield Case(
        "truncated archive",
        _file("pictures.npz", lambda rng: _npz_bytes(images=grey_images(rng))[:-100]),
        ("cut short",),
        "copy or export",
    )
    yield Case(
        "bit flip in an archive",
        _file("pictures.npz", lambda rng: _flip_data(_npz_bytes(images=grey_images(rng)))),
        ("array images", "damaged"),
        "copy or export",
    )
    yield Case(
        "unknown names", _npz(lambda rng: {"a": grey_images(rng), "b": labels}), ("holds a, b",), "'images'"
    )
    yield Case(
        "object array",
        _npz(lambda rng: {"images": np.array([np.zeros((2, 2)), np.zeros((3, 3))], dtype=object)}),
        ("array images", "Python objects"),
        "store numbers",
    )
    yield Case(
        "object labels",
        _npz(lambda rng: {"images": grey_images(rng), "labels": np.array(["a", None] * 10, dtype=object)}),
        ("array labels", "Python objects"),
        "store numbers",
    )
    yield Case(
        "strings for images",
        _npz(lambda rng: {"images": np.array(["a", "b"])}),
        ("array images", "<U1"),
        "integers",
    )
    yield Case(
        "complex images",
        _npz(lambda rng: {"images": grey_images(rng).astype(complex)}),
        ("complex128",),
        "store integers",
    )
    yield Case(
        "structured array",
        _npz(lambda rng: {"images": np.zeros((3, 2, 2), dtype=[("a", "u1")])}),
        ("array images", "dtype"),
        "store integers",
    )
    yield Case(
        "rows of a table", _npz(lambda rng: {"X": rng.normal(size=(9, 4))}), ("array X", "(9, 4)"), "CSV"
    )
    yield Case(
        "five dimensions",
        _npz(lambda rng: {"images": np.zeros((2, 2, 2, 2, 3))}),
        ("(2, 2, 2, 2, 3)",),
        "reshape",
    )
    yield Case(
        "four channels", _npz(lambda rng: {"images": np.zeros((9, 8, 8, 4))}), ("(9, 8, 8, 4)",), "reshape"
    )
    yield Case(
        "no images",
        _npz(lambda rng: {"images": np.zeros((0, 8, 8))}),
        ("(0, 8, 8)", "empty"),
        "export it again",
    )
    yield Case(
        "NaN in images",
        _npz(
            lambda rng: {
                "images": np.where(np.arange(20)[:, None, None] == 7, np.nan, 0.5) * np.ones((20, 4, 4))
            }
        ),
        ("array images", "image 7", "NaN"),
        "replace or remove",
    )
    yield Case(
        "standardised images",
        _npz(lambda rng: {"images": rng.normal(size=(9, 4, 4))}),
        ("values from -",),
        "scale floats",
    )
    yield Case(
        "16-bit images",
        _npz(lambda rng: {"images": grey_images(rng).astype(np.uint16) * 200}),
        ("array images",),
        "0..255",
    )
    yield Case(
        "negative integers",
        _npz(lambda rng: {"images": grey_images(rng).astype(int) - 128}),
        ("values from -128",),
        "0..255",
    )
    yield Case(
        "too few labels",
        _npz(lambda rng: {"images": grey_images(rng), "labels": labels[:-1]}),
        ("array labels", "(19,)"),
        "one label",
    )
    yield Case(
        "one-hot labels",
        _npz(lambda rng: {"images": grey_images(rng), "labels": np.eye(2)[labels]}),
        ("array labels", "(20, 2)"),
        "argmax",
    )
    yield Case(
        "NaN label",
        _npz(lambda rng: {"images": grey_images(rng), "labels": np.where(np.arange(20) == 3, np.nan, 1.0)}),
        ("array labels", "row 3"),
        "give every image a label",
    )
    yield Case(
        "fractional labels",
        _npz(lambda rng: {"images": grey_images(rng), "labels": labels + 0.5}),
        ("array labels", "fractions"),
        "whole numbers",
    )
    yield Case(
        "label beyond the names",
        _npz(lambda rng: {"images": grey_images(rng), "labels": labels, "classes": np.array(["a"])}),
        ("row 1", "label 1", "names 1 only"),
        "add it or remove the row",
    )
    yield Case(
        "test class that was not trained",
        _npz(
            lambda rng: {
                "x_train": grey_images(rng),
                "y_train": labels,
                "x_test": grey_images(rng),
                "y_test": labels * 5,
            }
        ),
        ("test part, row 1", "label 5"),
        "add it or remove the row",
    )
    yield Case(
        "labels for one part only",
        _npz(lambda rng: {"x_train": grey_images(rng), "y_train": labels, "x_test": grey_images(rng)}),
        ("none for its test part",),
        "add them or leave all out",
    )
    yield Case(
        "train and test of different sizes",
        _npz(lambda rng: {"x_train": grey_images(rng), "x_test": grey_images(rng, size=9)}),
        ("different shapes",),
        "give a size",
    )
    yield Case(
        "no labels where they are needed",
        _npz(lambda rng: {"images": grey_images(rng)}),
        ("no labels",),
        "add an array 'labels'",
        {"labels": "required"},
    )
    yield Case(
        "one class of images",
        _npz(lambda rng: {"images": grey_images(rng), "labels": labels * 0}),
        ("one class only (0)",),
        "at least two",
        {"labels": "required"},
    )
    yield Case("two images", _npz(lambda rng: {"images": grey_images(rng, 2)}), ("pictures.npz",), "add more")
    yield Case(
        "forged shape",
        _file("pictures.npz", lambda rng: _forged_npz((10**6, 10**4, 10), rng)),
        ("claims shape",),
        "export it",
    )
    yield Case(
        "forged shape and size",
        _file("pictures.npz", lambda rng: _forged_npz((2**31 - 128, 1, 1), rng, announced=2**31)),
        ("claims 2,147,483,648 bytes",),
        "export it again",
    )
    yield Case(
        "negative shape",
        _file("pictures.npz", lambda rng: _forged_npz((-1, 8, 8), rng)),
        ("claims shape",),
        "export it",
    )
    yield Case(
        "member that is no array",
        _file("pictures.npz", lambda rng: _zip({"images.npy": b"hello" * 9})),
        ("array images", "damaged"),
        "copy or export",
    )
    yield Case(
        "npz in place of a folder's target",
        _npz(lambda rng: {"images": grey_images(rng)}),
        ("'label'",),
        "leave",
        {"target": "label"},
    )
    yield Case(
        "zero size", _npz(lambda rng: {"images": grey_images(rng)}), ("size is 0",), "1..4096", {"size": 0}
    )
    yield Case(
        "unknown channels",
        _npz(lambda rng: {"images": grey_images(rng)}),
        ("channels is 'red'",),
        '"grey"',
        {"channels": "red"},
    )


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _folders() -> Iterator[Case]:
    yield Case("empty folder", _empty_folder, ("pictures contains no image",), "give the folder")
    yield Case(
        "folder without images",
        lambda folder, rng: _write(folder / "pictures" / "notes.txt", b"hello").parent,
        ("pictures contains no image",),
        "give the folder",
    )
    yield Case(
        "hidden images only",
        lambda folder, rng: _write(folder / "pictures" / ".a.png", _png(rng)).parent,
        ("no image",),
        "give the folder",
    )
    yield Case("links out of the folder only", _only_links_out, ("no image",), "give the folder")
    yield Case(
        "text named png",
        _folder(lambda root, rng: _write(root / "a.png", b"hello")),
        ("a.png is text",),
        "remove it",
    )
    yield Case(
        "empty image",
        _folder(lambda root, rng: _write(root / "a.png", b"")),
        ("a.png is empty",),
        "copy it again",
    )
    yield Case(
        "truncated PNG",
        _folder(lambda root, rng: _write(root / "a.png", _png(rng)[:60])),
        ("a.png is cut short",),
        "remove it",
    )
    yield Case(
        "PNG signature only",
        _folder(lambda root, rng: _write(root / "a.png", _png(rng)[:9])),
        ("a.png is cut short",),
        "remove it",
    )
    yield Case(
        "bit flip in a PNG",
        _folder(lambda root, rng: _write(root / "a.png", _flip_data(_png(rng)))),
        ("a.png",),
        "remove it or export it again",
    )
    yield Case(
        "truncated JPEG",
        _folder(lambda root, rng: _write(root / "a.jpg", _jpeg(rng)[:-120])),
        ("a.jpg is cut short",),
        "remove it",
        {"size": 8},
    )
    yield Case(
        "images of two sizes",
        _folder(lambda root, rng: _write(root / "zzz.png", _png(rng, 9))),
        ("zzz.png has 9x9", "000.png has 8x8"),
        "size=8",
    )
    yield Case(
        "images beside class folders",
        _folder(lambda root, rng: _write(root / "stray.png", _png(rng)), ("cat", "dog")),
        ("stray.png", "cat"),
        "one per class",
    )
    yield Case(
        "one class folder",
        _folder(lambda root, rng: None, ("cat",)),
        ("one class only (cat)",),
        "at least two",
        {"labels": "required"},
    )
    yield Case(
        "flat folder where labels are needed",
        _folder(lambda root, rng: None),
        ("no labels",),
        "sub-folder",
        {"labels": "required"},
    )
    yield Case(
        "class missing from train",
        _folder(
            lambda root, rng: save_images(root / "test" / "bird", grey_images(rng, 2)),
            ("train/cat", "train/dog", "test/cat"),
        ),
        ("test part", "label bird"),
        "add it or remove",
    )
    yield Case(
        "test without labels",
        _folder(
            lambda root, rng: save_images(root / "test", grey_images(rng, 2)), ("train/cat", "train/dog")
        ),
        ("none for its test part",),
        "add them",
    )
    yield Case(
        "image that claims a huge size",
        _folder(lambda root, rng: _write(root / "a.png", _huge_png(rng))),
        ("a.png claims more than",),
        "shrink or remove",
        {"size": 8},
    )
    yield Case(
        "TIFF of negative floats",
        _folder(
            lambda root, rng: Image.fromarray(rng.normal(size=(8, 8)).astype("float32")).save(root / "a.tif")
        ),
        ("a.tif has values from -",),
        "8 bits",
    )
    yield Case(
        "a single image",
        lambda folder, rng: _write(folder / "a.png", _png(rng)),
        ("a.png is a single image",),
        "give the folder",
    )
    yield Case(
        "a target for images",
        _folder(lambda root, rng: None),
        ("'label'",),
        "leave the target out",
        {"target": "label"},
    )
    yield Case(
        "two images in a folder",
        lambda folder, rng: save_images(folder / "pictures", grey_images(rng, 2))[0].parent,
        ("pictures",),
        "add more",
    )


def _jpeg(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey_images(rng, 1, 32)[0]).save(buffer, "JPEG")
    return buffer.getvalue()


def _huge_png(rng: np.random.Generator) -> bytes:
    """A small PNG whose header says 60,000 x 60,000 pixels, with the right checksum."""
    import zlib

    raw = bytearray(_png(rng))
    raw[16:24] = (60_000).to_bytes(4, "big") * 2
    raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
    return bytes(raw)


CASES = (*_tables(), *_parquets(), *_archives(), *_folders())
