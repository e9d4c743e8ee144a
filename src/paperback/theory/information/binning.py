"""Bins that make states of a layer's activations: entropy-based adaptive edges, and fixed ones.

Entropy-based adaptive binning (EBAB) puts the edges at equal steps in the *rank of the distinct values* that
a layer shows, over all its units and inputs:

    edges = [low] + [u_floor(k |u| / n_bins), k = 0 .. n_bins - 1] + [u_max],

where u are the sorted distinct values other than the lower bound `low` of the activation. Every bin holds
equally many of them, exact zeros of a ReLU keep bin 0 for themselves, and a value that occurs often moves no
edge. The bins depend on the order of the values alone, so that no increasing map of the activations changes
them. Source: Chelombiev, Houghton and O'Donnell (2019), section 2.

The authors' code gives the single largest value a bin of its own (`numpy.digitize` with all edges); here the
last bin is closed, as that of `numpy.histogram`, so that the bins hold equally many levels as the paper says.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paperback.errors import DataError
from paperback.theory.information.discrete import number_states

Low = float | Literal["auto"]


def ebab_edges(T: Float[np.ndarray, "..."], n_bins: int = 30, low: Low = "auto") -> NDArray[np.floating]:
    """Edges of entropy-based adaptive binning.

    Args:
        T: activations of one layer at one epoch, any shape: all units and inputs are pooled.
        n_bins: bins beside that of the lower bound, >= 2.
        low: lower bound of the activation, whose exact value gets bin 0: 0 for ReLU and softplus, anything
            below -1 for tanh and ELU, which never reach it. "auto" is 0 if no value is negative, and
            otherwise a hair below the least value.

    Returns:
        ``(n_bins + 2,)`` ascending, of T's precision: `low`, the n_bins lower edges, the largest value.
        ``(1,)``, only `low`, if nothing but the lower bound occurs: there is one bin then. With fewer
        distinct values than bins edges repeat and the bins between them stay empty.

    Raises:
        DataError: if n_bins < 2, T is empty or not finite, or a value lies below `low`.
    """
    check_bins(n_bins)
    values = as_floats(T, "T")
    levels = np.unique(values)
    if low == "auto":
        bound = (
            levels.dtype.type(0) if levels[0] >= 0 else np.nextafter(levels[0], levels.dtype.type(-np.inf))
        )
    else:
        bound = levels.dtype.type(low)
        if levels[0] < bound:
            raise DataError(
                f'low is {low}, but T goes down to {levels[0]:.6g}; give a bound that it respects, or "auto".'
            )
    levels = levels[levels != bound]
    if len(levels) == 0:
        return np.array([bound])
    starts = levels[np.arange(n_bins) * len(levels) // n_bins]
    return np.concatenate([[bound], starts, levels[-1:]])


def fixed_edges(
    T: Float[np.ndarray, "..."], n_bins: int = 30, bin_range: tuple[float, float] | None = None
) -> NDArray[np.floating]:
    """Equal bins over a range that the values do not decide: the baseline.

    Args:
        T: activations, any shape.
        n_bins: >= 2.
        bin_range: lowest and highest edge. If not given: [-1, 1] where negative values occur and all lie in
            it, [0, max T] where none is negative, otherwise [min T, max T].

    Returns:
        ``(n_bins + 1,)`` ascending; ``(1,)`` if the range is a single point.

    Raises:
        DataError: if n_bins < 2, T is empty or not finite, or the range is upside down.
    """
    check_bins(n_bins)
    if bin_range is None:
        bin_range = natural_range(T)
    low, high = bin_range
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise DataError(f"bin_range is {bin_range}; give two finite numbers, the lower end first.")
    return np.linspace(low, high, n_bins + 1) if low < high else np.array([float(low)])


def natural_range(T: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """The range that `fixed_edges` takes for some activations."""
    values = as_floats(T, "T")
    low, high = float(values.min()), float(values.max())
    if low >= 0:
        return 0.0, high
    return (-1.0, 1.0) if max(-low, high) <= 1 else (low, high)


def bin_states(T: Float[np.ndarray, "n d"], edges: NDArray[np.floating]) -> Int[np.ndarray, " n"]:
    """The state of a layer for each input: which bin each unit is in, numbered over distinct rows.

    Args:
        T: ``(n, d)``.
        edges: ascending; a bin holds its lower edge, the last one also its upper edge. Values outside fall
            into the first and the last bin.

    Returns:
        ``(n,)`` int64 in 0 .. K - 1.
    """
    inner = edges[1:-1]
    return number_states(np.searchsorted(inner, column, side="right") for column in np.asarray(T).T)


def check_bins(n_bins: int) -> None:
    """Refuse fewer than two bins.

    Raises:
        DataError: if n_bins < 2.
    """
    if n_bins < 2:
        raise DataError(f"n_bins is {n_bins}; information needs at least 2 bins.")


def as_floats(values: ArrayLike | Tensor, name: str) -> NDArray[np.floating]:
    """Numbers as a float32 or float64 array, tensors of any device and precision included.

    Raises:
        DataError: if there are none, or one is not a finite number.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # numpy has no bfloat16
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{name} has dtype {array.dtype}; give numbers.")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    if array.size == 0:
        raise DataError(f"{name} is empty; give at least one value.")
    if not np.isfinite(array).all():
        where = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
        raise DataError(f"{name} is not finite at {tuple(int(i) for i in where)}; find out what overflowed.")
    return array
