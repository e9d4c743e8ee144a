"""Splits: complete, disjoint, stratified, fixed by the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperback.data import splits
from paperback.errors import DataError


@given(n=st.integers(3, 500), seed=st.integers(0, 9))
def test_parts_are_disjoint_and_complete(n: int, seed: int) -> None:
    parts = splits.three_parts(n, seed)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert all(len(part) > 0 for part in parts)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6).filter(lambda c: sum(c) >= 2 * len(c) + 8),
    seed=st.integers(0, 9),
)
def test_every_class_is_trained_and_in_proportion(counts: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    train, val, test = splits.three_parts(len(labels), seed, labels)
    assert set(labels[train]) == set(labels)
    for count, in_test in zip(counts, np.bincount(labels[test], minlength=len(counts)), strict=True):
        assert abs(in_test - (count - 1) * len(test) / (len(labels) - len(counts))) < 1.0 + 1e-9
    assert sorted(np.concatenate([train, val, test])) == list(range(len(labels)))


def test_same_seed_same_parts_other_seed_others() -> None:
    first, again, other = (splits.three_parts(100, seed)[2] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)


def test_rows_are_shuffled_within_each_part() -> None:
    train, _, test = splits.three_parts(1000, 0, np.repeat([0, 1], 500))
    for part in (train, test):
        assert abs(np.corrcoef(np.arange(len(part)), part)[0, 1]) < 0.2


def test_nothing_for_validation_when_asked() -> None:
    train, val, test = splits.three_parts(10, 0, n_val=0, n_test=4)
    assert (len(train), len(val), len(test)) == (6, 0, 4)


@pytest.mark.parametrize("sizes", [{"n_val": 5, "n_test": 5}, {"n_val": -1}, {"n_test": 11}])
def test_impossible_sizes_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="10 row"):
        splits.three_parts(10, 0, **sizes)
