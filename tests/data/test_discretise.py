"""States of images and tables, and the way back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paperback.data import GreyBins, TableBins, images, tables
from paperback.errors import ArtefactError, DataError

# -- GreyBins ----------------------------------------------------------------------------------------------


def test_digits_in_four_bins_share_the_seventeen_levels() -> None:
    levels = torch.arange(17, dtype=torch.uint8)
    bins = GreyBins(4).fit(levels)
    assert bins.transform(levels).tolist() == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 4
    assert bins.inverse_transform(torch.arange(4)).tolist() == [2, 6.5, 10.5, 14.5]


def test_bytes_in_four_bins_are_quarters() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    states = GreyBins(4).fit(levels).transform(levels)
    assert states.dtype == torch.int64
    assert states.shape == (16, 16)
    assert states.flatten().bincount().tolist() == [64] * 4


@given(
    levels=arrays.arrays(np.uint8, 60, elements=st.integers(0, 255)).filter(lambda x: np.ptp(x) > 20),
    n=st.integers(2, 20),
)
def test_whole_levels_come_back_within_half_a_bin(levels: np.ndarray, n: int) -> None:
    bins = GreyBins(n).fit(levels)
    back = bins.inverse_transform(bins.transform(levels)).numpy()
    width = (int(np.ptp(levels)) + 1) / n
    assert np.abs(back - levels).max() <= width / 2 + 0.5
    states = bins.transform(levels).numpy()
    assert (np.diff(states[np.argsort(levels, kind="stable")]) >= 0).all()
    np.testing.assert_array_equal(bins.transform(back), states)


@given(
    levels=arrays.arrays(np.float64, 40, elements=st.floats(-5, 5)).filter(lambda x: np.ptp(x) > 0.1),
    n=st.integers(2, 20),
)
def test_fractions_come_back_within_half_a_bin(levels: np.ndarray, n: int) -> None:
    bins = GreyBins(n).fit(levels)
    states = bins.transform(levels)
    assert int(states.min()) == 0
    assert int(states.max()) == n - 1
    assert np.abs(bins.inverse_transform(states).numpy() - levels).max() <= np.ptp(levels) / n / 2 + 1e-6


def test_levels_beyond_the_range_fall_into_the_outer_bins() -> None:
    bins = GreyBins(3).fit(torch.tensor([10, 20, 30]))
    assert bins.transform(torch.tensor([-100, 9, 31, 999])).tolist() == [0, 0, 2, 2]


def test_whole_and_fractional_levels_agree() -> None:
    x = images.digits().train.x
    bins = GreyBins(4).fit(x)
    assert torch.equal(bins.transform(x), bins.transform(x.float()))
    assert torch.equal(bins.transform(x), bins.transform(x.numpy()))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.bool])
def test_integers_of_any_width_are_levels(dtype: torch.dtype) -> None:
    x = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert GreyBins(2).fit(x).transform(x).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("x", [torch.arange(9), torch.linspace(-1, 1, 9)])
def test_grey_bins_survive_json(x: torch.Tensor) -> None:
    bins = GreyBins(3).fit(x)
    restored = GreyBins.from_dict(json.loads(json.dumps(bins.to_dict())))
    assert torch.equal(restored.transform(x), bins.transform(x))
    assert torch.equal(restored.inverse_transform(torch.arange(3)), bins.inverse_transform(torch.arange(3)))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: GreyBins(1), "at least 2"),
        (lambda: GreyBins(4).transform(torch.zeros(2)), "not fitted yet"),
        (lambda: GreyBins(4).to_dict(), "not fitted yet"),
        (lambda: GreyBins(4).fit(torch.zeros(0)), "at least one image"),
        (lambda: GreyBins(4).fit(torch.full((2, 2), 7)), "every pixel is 7"),
        (lambda: GreyBins(4).fit(torch.tensor([0, 1])), r"use GreyBins\(2\)"),
        (lambda: GreyBins(4).fit(torch.tensor([0.0, float("nan")])), "NaN"),
        (lambda: GreyBins(2).fit(torch.arange(4)).inverse_transform(torch.tensor([2])), "0..1"),
        (lambda: GreyBins(2).fit(torch.arange(4)).inverse_transform(torch.tensor([0.5])), "integers"),
    ],
)
def test_grey_bins_refuse_clearly(use: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        use()


# -- TableBins ---------------------------------------------------------------------------------------------

FRAME = pd.DataFrame(
    {
        "amount": np.arange(100) ** 2,
        "rate": np.linspace(-1, 1, 100),
        "rooms": [1, 2, 4, 4] * 25,
        "paid": [True, False] * 50,
        "town": ["Rome", "Oslo", "Bern", "Oslo"] * 25,
        "grade": pd.Categorical(["low", "mid", "high", "high"] * 25, ["low", "mid", "high"], ordered=True),
        "country": ["same"] * 100,
    }
)


def test_each_kind_of_column_gets_its_states() -> None:
    bins = TableBins(8, reserve=False).fit(FRAME)
    assert bins.columns == ("amount", "rate", "rooms", "paid", "town", "grade")
    assert bins.n_states == (8, 8, 3, 2, 3, 3)
    assert bins.dropped == {"country": "constant (same)"}
    states = bins.transform(FRAME)
    assert states.shape == (100, 6)
    assert states.dtype == torch.int64
    assert states[:, 0].bincount().tolist() == pytest.approx([12.5] * 8, abs=0.5)
    assert states[:4, 2].tolist() == [0, 1, 2, 2]
    assert states[:4, 4].tolist() == [2, 1, 0, 1]  # by name
    assert states[:4, 5].tolist() == [0, 1, 2, 2]  # in the order of the categories


def test_way_back_gives_values_of_the_training_part_in_their_types() -> None:
    bins = TableBins(8).fit(FRAME)
    back = bins.inverse_transform(bins.transform(FRAME))
    assert back["amount"].dtype == np.int64
    assert set(back["amount"]) <= set(FRAME["amount"])
    assert back["paid"].dtype == bool
    pd.testing.assert_frame_equal(
        back[["rooms", "paid", "town"]], FRAME[["rooms", "paid", "town"]], check_dtype=False
    )
    assert (back["rate"] - FRAME["rate"]).abs().max() < 2 / 8
    assert torch.equal(bins.transform(back.assign(country="same")), bins.transform(FRAME))


@pytest.mark.parametrize("load", [tables.credit, tables.diamonds, tables.housing])
def test_real_tables_go_there_and_back(load: Any) -> None:
    table = load(target=None)
    bins = TableBins().fit(table.train.x)
    for part in (table.train, table.test):
        states = bins.transform(part.x)
        assert (states >= 0).all()
        assert (states < torch.tensor(bins.n_states)).all()
        back = bins.inverse_transform(states)
        assert (
            torch.equal(bins.transform(back), states)
            or back.isna().any(axis=None)
            or "(other)" in back.to_numpy()
        )
    assert min(bins.n_states) >= 2
    restored = TableBins.from_dict(json.loads(json.dumps(bins.to_dict())))
    assert restored.specs == bins.specs
    assert restored.dropped == bins.dropped
    assert torch.equal(restored.transform(table.test.x), bins.transform(table.test.x))


def test_columns_without_text_names_are_named_by_their_numbers() -> None:
    frame = pd.DataFrame(np.arange(20).reshape(10, 2) % 4)
    bins = TableBins.from_dict(json.loads(json.dumps(TableBins(reserve=False).fit(frame).to_dict())))
    assert bins.columns == ("0", "1")
    assert bins.transform(frame)[:2].tolist() == [[0, 0], [1, 1]]


def test_missing_cells_are_a_state() -> None:
    frame = pd.DataFrame(
        {"a": [1.0, np.nan, 2.0] * 9, "b": ["x", None, "y"] * 9, "c": [True, None, False] * 9}
    )
    bins = TableBins(reserve=False).fit(frame)
    states = bins.transform(frame)
    assert bins.n_states == (3, 3, 3)
    assert states[1].tolist() == [2, 2, 2]
    assert bins.inverse_transform(states).iloc[1].isna().all()


def test_a_column_of_missing_cells_and_one_value_is_not_constant() -> None:
    bins = TableBins(reserve=False).fit(pd.DataFrame({"a": [None, 5.0] * 9, "b": [None, None] * 9}))
    assert bins.columns == ("a",)
    assert bins.n_states == (2,)
    assert set(bins.dropped) == {"b"}


def test_rare_categories_share_a_state() -> None:
    frame = pd.DataFrame({"a": ["x"] * 30 + ["y"] * 20 + list("abcdefgh")})
    bins = TableBins(max_categories=2, reserve=False).fit(frame)
    assert bins.n_states == (3,)
    states = bins.transform(frame)[:, 0]
    assert states.bincount().tolist() == [30, 20, 8]
    assert bins.inverse_transform(states[:, None])["a"].iloc[-1] == "(other)"


def test_what_was_not_seen_has_a_state_unless_told_otherwise() -> None:
    train = pd.DataFrame({"a": [1.0, 2.0] * 9, "b": ["x", "y"] * 9})
    new = pd.DataFrame({"a": [np.nan, 1.4, 99.0], "b": ["z", None, "y"]})
    assert TableBins().fit(train).transform(new).tolist() == [[2, 2], [0, 2], [1, 1]]
    strict = TableBins(reserve=False).fit(train)
    with pytest.raises(DataError, match=r"column a, row 0 is .*nan.*reserve=True"):
        strict.transform(new)
    with pytest.raises(DataError, match="column b, row 0 is 'z'"):
        strict.transform(new.iloc[[1, 2, 0]].assign(a=1.0).iloc[::-1])


@pytest.mark.parametrize(
    "values", [[0] * 95 + list(range(1, 21)), [100] * 95 + list(range(20)), list(range(20)) + [7] * 95]
)
def test_a_frequent_value_leaves_no_empty_bin(values: list[int]) -> None:
    frame = pd.DataFrame({"a": values})
    bins = TableBins(8, reserve=False).fit(frame)
    counts = bins.transform(frame)[:, 0].bincount(minlength=bins.n_states[0])
    assert 2 <= bins.n_states[0] <= 8
    assert (counts > 0).all()


@given(
    values=st.lists(st.one_of(st.floats(-1e9, 1e9), st.none()), min_size=2, max_size=80), n=st.integers(2, 9)
)
def test_any_numbers_give_full_bins_that_keep_their_order(values: list[float | None], n: int) -> None:
    frame = pd.DataFrame({"a": pd.Series(values, dtype=float), "b": np.arange(len(values)) % 2})
    bins = TableBins(n, reserve=False).fit(frame)
    states = bins.transform(frame)
    for i, spec in enumerate(bins.specs):
        assert 2 <= spec.n_states <= n + 1
        assert (states[:, i].bincount(minlength=spec.n_states) > 0).all()
    if "a" in bins.columns:
        known = frame["a"].notna().to_numpy()
        order = np.argsort(frame["a"].to_numpy()[known], kind="stable")
        assert (np.diff(states[:, 0].numpy()[known][order]) >= 0).all()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: TableBins(1), "n_bins is 1"),
        (lambda: TableBins().fit(FRAME.iloc[:0]), "0 rows"),
        (lambda: TableBins().fit(FRAME[["country"]]), "every column of the table is constant"),
        (
            lambda: TableBins().fit(pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"])),
            "'a' appears more than once",
        ),
        (lambda: TableBins().fit(pd.DataFrame({"a": [1.0, np.inf]})), "row 1 is infinite"),
        (lambda: TableBins().transform(FRAME), "not fitted yet"),
        (lambda: TableBins().fit(FRAME).transform(FRAME.drop(columns="town")), "no column 'town'"),
        (lambda: TableBins().fit(FRAME).transform(FRAME.assign(rate="high")), "numbers in the training part"),
        (lambda: TableBins().fit(FRAME).inverse_transform(np.zeros((2, 3), int)), r"\(rows, 6\)"),
        (
            lambda: TableBins().fit(FRAME).inverse_transform(np.full((2, 6), 99)),
            "row 0, column amount has state 99",
        ),
    ],
)
def test_table_bins_refuse_clearly(use: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        use()


@pytest.mark.parametrize("cls", [GreyBins, TableBins])
@pytest.mark.parametrize(
    "saved", [{}, [], {"kind": "GreyBins"}, {"kind": "TableBins"}, {"kind": "TableBins", "n_bins": "x"}]
)
def test_damaged_savings_are_refused(cls: Any, saved: Any) -> None:
    with pytest.raises(ArtefactError):
        cls.from_dict(saved)
