"""Entropies of discrete states from counts: plug-in, with the Miller-Madow correction where wanted.

A state is a number; a vector of bin numbers becomes one by `number_states`. The plug-in entropy

    H = -sum_s n_s / N log2(n_s / N)

is too small by about (K - 1) / 2N nats for K states seen (Miller 1955), and cannot exceed log2 N.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray

from paperback.errors import DataError

Correction = Literal["none", "miller_madow"]
CORRECTIONS: tuple[Correction, ...] = ("none", "miller_madow")

_LARGEST_CODE = 2**62


def entropy(states: ArrayLike, correction: Correction = "none") -> float:
    """Entropy of a sample of states, in bits.

    Args:
        states: ``(n,)``, any values that can be told apart; or ``(n, d)`` whole numbers, a row being a state.
        correction: "miller_madow" adds (K - 1) / 2n nats for K states seen.

    Returns:
        Bits, >= 0.

    Raises:
        DataError: if there are no states, or no such correction.

    Source:
        Miller, Note on the bias of information estimates (1955).
    """
    if correction not in CORRECTIONS:
        raise DataError(f"correction is {correction!r}; choose one of {', '.join(CORRECTIONS)}.")
    counts = np.bincount(_as_states(states, "states"))
    n = counts.sum()
    p = counts / n
    plug_in = max(0.0, -float(np.sum(p * np.log2(p))))
    return plug_in + ((len(counts) - 1) / (2 * n * np.log(2)) if correction == "miller_madow" else 0.0)


def discrete_mutual_information(a: ArrayLike, b: ArrayLike, correction: Correction = "none") -> float:
    """I(A;B) = H(A) + H(B) - H(A,B) of paired states, in bits.

    Args:
        a: ``(n,)`` or ``(n, d)``, see `entropy`.
        b: the same of the other variable, row by row.
        correction: of each of the three entropies.

    Returns:
        Bits; without correction >= 0 and at most the smaller of the two entropies.

    Raises:
        DataError: if the numbers of rows differ or are 0, or there is no such correction.
    """
    first, second = _as_states(a, "a"), _as_states(b, "b")
    if len(first) != len(second):
        raise DataError(f"a has {len(first)} rows and b {len(second)}; give one of each per case.")
    information = (
        entropy(first, correction)
        + entropy(second, correction)
        - entropy(join_states(first, second), correction)
    )
    return max(0.0, information) if correction == "none" else information


def number_states(columns: Iterable[Int[np.ndarray, " n"]]) -> Int[np.ndarray, " n"]:
    """Number the distinct rows of a table that comes column by column.

    The rows are read as digits of one number. Before that number would overflow, it is replaced by its rank
    among those seen, of which there are at most n: exact for any number of columns, in the memory of one.

    Args:
        columns: non-negative integers, ``(n,)`` each; at least one column.

    Returns:
        ``(n,)`` int64 in 0 .. K - 1, equal exactly where the rows are.
    """
    code: NDArray[np.int64] | None = None
    codes = 1  # how many values `code` can have
    for column in columns:
        base = int(column.max()) + 1
        if code is None:
            code, codes = column.astype(np.int64), base
            continue
        if codes * base >= _LARGEST_CODE:
            code = _rank(code)
            codes = int(code.max()) + 1
            if codes == len(code):
                return code  # rows that are all different stay so
        code = code * base + column
        codes *= base
    if code is None:
        raise DataError("there are no columns to number the states of.")
    return _rank(code)


def join_states(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The states of a pair of variables, each numbered from 0."""
    return number_states((a, b))


def _as_states(values: ArrayLike, name: str) -> NDArray[np.int64]:
    """States numbered from 0 without gaps."""
    array = np.asarray(values)
    if array.ndim not in (1, 2) or array.size == 0:
        raise DataError(f"{name} has shape {array.shape}; give (n,) states or (n, d) whole numbers.")
    if array.ndim == 1:
        return _rank(array)
    return number_states(_rank(column) for column in array.T)


def _rank(values: NDArray) -> NDArray[np.int64]:
    return np.unique(values, return_inverse=True)[1].astype(np.int64, copy=False)
