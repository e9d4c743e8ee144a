"""Tables that ship and tables of the user: types, targets, splits, dialects of CSV."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.data.corpus import HEADER, csv_bytes, good_frame, good_rows

from paperback import data
from paperback.data import tables
from paperback.errors import DataError

ROWS = good_rows(np.random.default_rng(5), 50)


def write(folder: Path, content: bytes, name: str = "cars.csv") -> Path:
    """A file with this content."""
    (folder / name).write_bytes(content)
    return folder / name


def everything(dataset: data.Dataset) -> pd.DataFrame:
    """The inputs of the three parts in one table, sorted."""
    x = pd.concat([dataset.train.x, dataset.val.x, dataset.test.x])
    return x.sort_values(list(x.columns)).reset_index(drop=True)


@pytest.mark.parametrize(
    ("load", "rows", "columns"),
    [(tables.diamonds, 53_940, 9), (tables.housing, 2_930, 72), (tables.credit, 4_454, 13)],
)
def test_shipped_tables_are_whole(load: Any, rows: int, columns: int) -> None:
    table = load()
    assert len(table.train) + len(table.val) + len(table.test) == rows
    assert table.train.x.shape[1] == columns
    assert len(load(target=None).train.x.columns) == columns + 1
    assert load(target=None).train.y is None
    pd.testing.assert_frame_equal(load(seed=4).test.x, load(seed=4).test.x)
    assert not load(seed=4).test.x.equals(load(seed=5).test.x)


def test_diamonds_are_shuffled_and_their_price_may_be_logarithmic() -> None:
    plain, logarithmic = tables.diamonds(), tables.diamonds(log_target=True)
    np.testing.assert_allclose(np.log(plain.train.y), logarithmic.train.y)
    assert logarithmic.target == "log price"
    assert plain.train.y.dtype == np.float64
    assert abs(np.corrcoef(np.arange(len(plain.train)), plain.train.y)[0, 1]) < 0.02


def test_credit_is_stratified_and_has_missing_cells() -> None:
    credit = tables.credit()
    assert credit.classes == ("bad", "good")
    for part in (credit.train, credit.val, credit.test):
        assert part.y.mean() == pytest.approx(3200 / 4454, abs=0.003)
        assert part.y.dtype == np.int64
    assert sum(int(part.x["Income"].isna().sum()) for part in (credit.train, credit.val, credit.test)) == 381


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (tables.diamonds, {"target": "cut", "log_target": True}, "logarithm of 'cut' does not exist"),
        (tables.diamonds, {"target": "x", "log_target": True}, "positive numbers"),
        (tables.housing, {"target": "sale_price"}, "did you mean Sale_Price"),
    ],
)
def test_impossible_targets_are_refused(load: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(**arguments)


def quoted(rows: list[list[str]]) -> bytes:
    """Every cell in quotes, one with a separator, a quote and a line break in it."""
    cells = [[f'"{cell}"' for cell in row] for row in rows]
    cells[0][1] = '"red, ""dark""\nor so"'
    return csv_bytes(cells)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", csv_bytes(ROWS)),
        ("a.CSV", csv_bytes(ROWS)),
        ("a.csv.gz", gzip.compress(csv_bytes(ROWS))),
        ("a.tsv", csv_bytes(ROWS, separator="\t")),
        ("a.csv", csv_bytes(ROWS, separator=";")),
        ("a.csv", csv_bytes(ROWS, separator="|")),
        ("a.csv", csv_bytes(ROWS, separator=", ")),
        ("a.csv", csv_bytes([[cell.replace(".", ",") for cell in row] for row in ROWS], separator=";")),
        ("a.csv", b"\xef\xbb\xbf" + csv_bytes(ROWS)),
        ("a.csv", csv_bytes(ROWS).replace(b"\n", b"\r\n")),
        ("a.csv", csv_bytes(ROWS).replace(b"\n", b"\r")),
        ("a.csv", b"\n" + csv_bytes(ROWS) + b"\n\n"),
        ("a.csv", csv_bytes([[str(i), *row] for i, row in enumerate(ROWS)], ["", *HEADER])),
        ("a.csv", csv_bytes(ROWS)[:-1]),
    ],
)
def test_dialects_of_csv_read_alike(name: str, content: bytes, tmp_path: Path) -> None:
    expected = pd.DataFrame(ROWS, columns=HEADER).astype({"width": float, "count": int})
    expected = expected.sort_values(HEADER).reset_index(drop=True)
    found = data.read(write(tmp_path, content, name))
    pd.testing.assert_frame_equal(everything(found), expected, check_dtype=False)
    assert [len(part) for part in (found.train, found.val, found.test)] == [35, 5, 10]
    assert found.name == "a"


def test_quoted_cells_may_hold_separators_and_line_breaks(tmp_path: Path) -> None:
    found = everything(data.read(write(tmp_path, quoted(ROWS))))
    assert 'red, "dark"\nor so' in set(found["colour"])
    assert found["width"].dtype == np.float64


def test_parquet_reads_as_csv_does(tmp_path: Path) -> None:
    frame = good_frame(np.random.default_rng(5), 50)
    frame.astype({"colour": "category"}).to_parquet(tmp_path / "cars.parquet")
    found = data.read(tmp_path / "cars.parquet", "label")
    assert found.classes == ("no", "yes")
    assert isinstance(found.train.x["colour"].dtype, pd.CategoricalDtype)
    from_csv = data.read(write(tmp_path, frame.to_csv(index=False).encode()), "label")
    pd.testing.assert_frame_equal(
        found.train.x.astype({"colour": "str"}), from_csv.train.x.astype({"colour": "str"})
    )
    assert found.train.y.tolist() == from_csv.train.y.tolist()


@pytest.mark.parametrize(
    ("values", "target_is", "classes"),
    [
        (["b", "a"] * 30, "auto", ("a", "b")),
        (["true", "false"] * 30, "auto", ("False", "True")),
        ([0, 1, 2] * 20, "auto", ("0", "1", "2")),
        ([1.0, 2.0] * 30, "auto", ("1", "2")),
        (range(60), "auto", ()),
        (np.linspace(0, 1, 60), "auto", ()),
        ([0, 1, 2] * 20, "number", ()),
        ([0.5, 1.5] * 30, "auto", ()),
        ([0.5, 1.5] * 30, "class", ("0.5", "1.5")),
    ],
)
def test_target_is_a_class_or_a_number(
    values: Any, target_is: Any, classes: tuple[str, ...], tmp_path: Path
) -> None:
    frame = pd.DataFrame({"x": np.arange(60), "y": list(values)})
    found = data.read(write(tmp_path, frame.to_csv(index=False).encode()), "y", target_is=target_is)
    assert found.classes == classes
    assert found.train.y.dtype == (np.int64 if classes else np.float64)
    if classes:
        names = np.array(classes)[found.train.y]
        original = frame["y"].iloc[found.train.x["x"]]
        plain = [f"{value:g}" if isinstance(value, float) else str(value).capitalize() for value in original]
        assert [name.capitalize() for name in names] == plain


def test_what_was_decided_is_noted(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": np.arange(60), "y": [0, 1] * 30})
    found = data.read(write(tmp_path, frame.to_csv(index=False).encode()), "y")
    assert found.notes == ("y was taken for a class (target_is overrules).",)
    assert "note:       y was taken for a class" in found.describe()


def test_missing_cells_and_constant_columns_are_kept(tmp_path: Path) -> None:
    content = csv_bytes(
        [["", *row[1:3], "same"] if i % 5 == 0 else [*row[:3], "same"] for i, row in enumerate(ROWS)]
    )
    found = everything(data.read(write(tmp_path, content)))
    assert found["width"].isna().sum() == 10
    assert set(found["label"]) == {"same"}


def test_one_column_is_a_table(tmp_path: Path) -> None:
    found = data.read(write(tmp_path, b"word\n" + b"red\nblue\n" * 10))
    assert list(found.train.x.columns) == ["word"]
    assert len(found.train) == 14


def test_a_named_index_of_parquet_is_a_column(tmp_path: Path) -> None:
    good_frame(np.random.default_rng(5)).set_index("label").to_parquet(tmp_path / "cars.parquet")
    assert data.read(tmp_path / "cars.parquet", "label").classes == ("no", "yes")


def test_a_column_may_be_called_as_a_format_begins(tmp_path: Path) -> None:
    found = data.read(write(tmp_path, csv_bytes(ROWS, ["PAR1", "PAR2", "PAR3", "PAR4"])))
    assert list(found.train.x.columns) == ["PAR1", "PAR2", "PAR3", "PAR4"]
