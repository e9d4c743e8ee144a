"""Constraints around anything that makes tables, and for tables that are there already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from paperback.density.constrained_tabular.constraints import LinearConstraints
from paperback.density.constrained_tabular.layer import ConstraintLayer

if TYPE_CHECKING:
    import pandas as pd


def repair(
    frame: pd.DataFrame,
    constraints: LinearConstraints | Sequence[str] | str,
    order: Sequence[str] | None = None,
    *,
    decimals: Mapping[str, int] | None = None,
    eps: float = 1e-6,
) -> pd.DataFrame:
    """A table whose rows satisfy the constraints; rows that do are left as they are.

    Args:
        frame: any table with the constrained columns; it is not changed.
        constraints: what holds; text is read with the columns of the table.
        order: which column moves least, first to last; in the order of the table if not given.
        decimals: columns to keep at so many decimals. Columns of whole numbers stay whole in any case.
        eps: how far inside a strict constraint a row is put, relative to the column's standard deviation.

    Returns:
        A new table with the same columns, types, index and order. A warning says how many cells could not
        stay rounded; their column then holds fractions.

    Raises:
        DataError: if the constraints cannot be read, contradict each other, or do not fit the table.
    """
    rules = as_constraints(constraints, [str(name) for name in frame.columns])
    values = rules.values(frame)
    whole = {name: 0 for name in rules.columns if np.issubdtype(_numpy_type(frame[name]), np.integer)}
    known = np.where(np.isnan(values), np.nan, values)
    spread = {
        n: float(s) or 1.0
        for n, s in zip(rules.columns, np.nan_to_num(np.nanstd(known, axis=0)), strict=True)
    }
    layer = ConstraintLayer(
        rules,
        order=order,
        eps=eps,
        spread=spread,
        decimals=whole | {k: v for k, v in (decimals or {}).items() if k in rules.columns},
    )
    return replace_values(frame, layer, values)


def guard(
    sampler: Callable[[int], pd.DataFrame],
    constraints: LinearConstraints | Sequence[str] | str,
    order: Sequence[str] | None = None,
    **settings: Any,
) -> Callable[[int], pd.DataFrame]:
    """A sampler whose rows satisfy the constraints.

    Args:
        sampler: a function from a number of rows to a table, such as the ``sample`` method of a synthesiser
            of `ctgan` or `sdv`.
        constraints: as for `repair`.
        order: as for `repair`.
        **settings: further arguments of `repair`.

    Returns:
        A function like the sampler.
    """

    def guarded(n: int) -> pd.DataFrame:
        return repair(sampler(n), constraints, order, **settings)

    return guarded


def as_constraints(
    constraints: LinearConstraints | Sequence[str] | str, columns: Sequence[str] | None = None
) -> LinearConstraints:
    """Constraints, from their text if need be."""
    if isinstance(constraints, LinearConstraints):
        return constraints
    return LinearConstraints.parse(constraints, columns)


def replace_values(frame: pd.DataFrame, layer: ConstraintLayer, values: np.ndarray) -> pd.DataFrame:
    """The table with its constrained columns corrected by the layer, whose input they are."""
    with torch.no_grad():
        corrected = layer(torch.from_numpy(values)).numpy()
    if layer.unrounded_:
        warnings.warn(
            f"{layer.unrounded_} cell(s) have no rounded value that satisfies the constraints and were left "
            "unrounded; give an order in which other columns move, or fewer decimals.",
            stacklevel=3,
        )
    result = frame.copy()
    for i, name in enumerate(layer.columns):
        old, new = values[:, i], corrected[:, i]
        moved = ~((old == new) | (np.isnan(old) & np.isnan(new)))
        if not moved.any():
            continue
        if np.issubdtype(_numpy_type(frame[name]), np.integer) and (new[moved] == np.round(new[moved])).all():
            column = frame[name].copy()
            column[moved] = new[moved].astype(np.int64)
            result[name] = column
        else:
            result[name] = new
    return result


def _numpy_type(cells: pd.Series[Any]) -> np.dtype[Any]:
    """The type of a column of numbers; of pandas' nullable types the one inside."""
    inner: Any = getattr(cells.dtype, "numpy_dtype", cells.dtype)
    return np.dtype(inner)
