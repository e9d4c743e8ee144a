"""Train, validation and test parts, fixed by a seed and stratified by class.

Rows are shuffled, sorted by class, and every k-th goes to the part that is drawn. Each class is then
represented in proportion to within one row, however rare it is. One row of each class always stays behind,
so that nothing is tested that was never trained on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from paperback.errors import DataError

Indices = NDArray[np.int64]

TEST_FRACTION = 0.2
VAL_FRACTION = 0.1


def draw(
    rows: Indices, n: int, rng: np.random.Generator, labels: NDArray[np.int64] | None = None
) -> tuple[Indices, Indices]:
    """Draw a part of the rows at random, stratified if labels are given.

    Args:
        rows: indices to draw from, ``(n_rows,)``.
        n: how many to draw, 0 <= n <= n_rows less the number of classes among them.
        rng: source of randomness.
        labels: class of every row of the whole data set, indexed by ``rows``.

    Returns:
        What was drawn and what is left, each in random order.

    Raises:
        DataError: if there are too few rows.
    """
    rows = rng.permutation(rows)
    if labels is None:
        kept, candidates = rows[:0], rows
    else:
        first = np.unique(labels[rows], return_index=True)[1]
        kept, candidates = rows[first], np.delete(rows, first)
        candidates = candidates[np.argsort(labels[candidates], kind="stable")]
    if not 0 <= n <= len(candidates):
        classes = f" of {len(kept)} classes, one of each staying behind" if len(kept) else ""
        raise DataError(f"cannot draw {n:,} rows from {len(rows):,}{classes}; add rows or ask for fewer.")
    every = np.floor((np.arange(n) + rng.uniform()) * len(candidates) / max(n, 1)).astype(np.int64)
    drawn = candidates[every]
    return rng.permutation(drawn), rng.permutation(np.concatenate([kept, np.delete(candidates, every)]))


def three_parts(
    n_rows: int,
    seed: int,
    labels: NDArray[np.int64] | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
) -> tuple[Indices, Indices, Indices]:
    """Row numbers of the train, validation and test part.

    Args:
        n_rows: number of rows.
        seed: of the shuffle; the same seed gives the same parts.
        labels: class of each row ``(n_rows,)``; the parts are stratified by it.
        n_val: rows for validation; a tenth if not given, at least one.
        n_test: rows for the test; a fifth if not given, at least one.

    Returns:
        Three arrays of row numbers that together are 0..n_rows-1, each in random order.

    Raises:
        DataError: if there are too few rows for three parts.
    """
    n_val = max(1, round(n_rows * VAL_FRACTION)) if n_val is None else n_val
    n_test = max(1, round(n_rows * TEST_FRACTION)) if n_test is None else n_test
    if n_val < 0 or n_test < 0 or n_rows <= n_val + n_test:
        needed = n_val + n_test + 1
        raise DataError(f"{n_rows} row(s) are too few to split in three; {needed} are needed, add rows.")
    rng = np.random.default_rng(seed)
    test, rest = draw(np.arange(n_rows), n_test, rng, labels)
    val, train = draw(rest, n_val, rng, labels)
    return train, val, test
