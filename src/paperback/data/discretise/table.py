"""Tables as discrete states: numbers by quantile, the rest by category, missing cells by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from paperback.data.discretise.saved import check_kind
from paperback.data.table_files import is_numeric
from paperback.errors import ArtefactError, DataError

if TYPE_CHECKING:
    import pandas as pd

OTHER = "(other)"

ColumnKind = Literal["bins", "levels", "categories"]


@dataclass(frozen=True)
class Column:
    """How one column becomes states: first its values, then "other" (categories only), then "missing".

    Attributes:
        name: of the column.
        kind: "bins" for numbers cut at `edges`, "levels" for numbers with few distinct values, "categories"
            for the rest.
        dtype: "int", "float", "bool" or "text": what `TableBins.inverse_transform` gives back.
        values: what each state stands for: the median of a bin, a level, or a category.
        edges: upper bounds of all bins but the last.
        other: whether there is a state for categories that are rare or were not seen.
        missing: whether there is a state for missing cells.
    """

    name: str
    kind: ColumnKind
    dtype: Literal["int", "float", "bool", "text"]
    values: tuple[float, ...] | tuple[str, ...]
    edges: tuple[float, ...] = ()
    other: bool = False
    missing: bool = False

    @property
    def n_states(self) -> int:
        """Number of states, at least 2."""
        return len(self.values) + self.other + self.missing


class TableBins:
    """Columns of a table as discrete states.

    A numeric column with at most n_bins distinct values has one state for each; another is cut at its
    quantiles into at most n_bins bins (fewer where one value is frequent). Text, booleans and categories
    have one state for each of the max_categories most frequent values. Constant columns are dropped.

    Args:
        n_bins: most states of a numeric column, >= 2.
        max_categories: most values of another column that have a state of their own, >= 2.
        reserve: keep a state for what the training part does not show: "missing" for numbers, "other" for
            categories. Without it a value of this sort is an error in transform.

    Attributes:
        columns: names of the columns that have states, in order.
        n_states: their numbers of states, each at least 2.
        dropped: name of each dropped column to the reason.
        specs: a `Column` for each.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(self, n_bins: int = 8, max_categories: int = 20, *, reserve: bool = True) -> None:
        if n_bins < 2 or max_categories < 2:
            raise DataError(
                f"TableBins: n_bins is {n_bins} and max_categories {max_categories}; both must be at least 2."
            )
        self.n_bins = n_bins
        self.max_categories = max_categories
        self.reserve = reserve
        self.specs: tuple[Column, ...] = ()
        self.dropped: dict[str, str] = {}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that have states."""
        return tuple(spec.name for spec in self.specs)

    @property
    def n_states(self) -> tuple[int, ...]:
        """Number of states of each column."""
        return tuple(spec.n_states for spec in self.specs)

    def fit(self, frame: pd.DataFrame) -> Self:
        """Choose the states from the training part.

        Args:
            frame: rows of the training part.

        Returns:
            Itself.

        Raises:
            DataError: if the table is empty, repeats a column name, has infinite cells, or every column is
                constant.
        """
        if len(frame) == 0 or frame.shape[1] == 0:
            raise DataError(
                f"the table has {len(frame)} rows and {frame.shape[1]} columns; it needs at least one of "
                "each."
            )
        frame = _with_text_names(frame)
        if not frame.columns.is_unique:
            name = frame.columns[frame.columns.duplicated()][0]
            raise DataError(f"column {name!r} appears more than once; rename or remove all but one.")
        specs, dropped = [], {}
        for name in frame.columns:
            values = frame[name]
            if values.nunique(dropna=False) < 2:
                dropped[name] = f"constant ({values.iloc[0]})"
            else:
                fit = self._fit_numeric if is_numeric(values) else self._fit_categories
                specs.append(fit(values))
        if not specs:
            raise DataError(
                "every column of the table is constant, so there is nothing to model; check the file."
            )
        self.specs, self.dropped = tuple(specs), dropped
        return self

    def transform(self, frame: pd.DataFrame) -> Int[Tensor, "rows columns"]:
        """States of the cells.

        Numbers outside the range of the training part fall into the outermost bins; a number between two
        levels takes the nearer.

        Args:
            frame: has at least the columns of the training part; others are ignored.

        Returns:
            States ``(rows, columns)`` int64, in the order of `columns`.

        Raises:
            DataError: if it is not fitted, a column is missing or of another type, or a cell has no state.
        """
        self._check_fitted()
        frame = _with_text_names(frame)
        absent = [name for name in self.columns if name not in frame.columns]
        if absent:
            raise DataError(f"the table has no column {absent[0]!r}, which the training part had; add it.")
        states = [_encode(spec, frame[spec.name]) for spec in self.specs]
        return torch.from_numpy(np.stack(states, axis=1))

    def inverse_transform(self, states: Int[Tensor, "rows columns"] | NDArray[Any]) -> pd.DataFrame:
        """A table with the value that each state stands for.

        That is the median of a bin (a value of the training part), a level, or a category.

        Args:
            states: ``(rows, columns)`` integer.

        Returns:
            A DataFrame with the columns of `columns`; missing cells are NaN or None, other categories
            "(other)". Dropped columns stay away.

        Raises:
            DataError: if it is not fitted or the states do not fit.
        """
        import pandas as pd

        self._check_fitted()
        cells = np.asarray(states)
        if cells.ndim != 2 or cells.shape[1] != len(self.specs) or cells.dtype.kind not in "iu":
            raise DataError(
                f"states are {cells.dtype} {cells.shape}; expected integers of shape (rows, "
                f"{len(self.specs)})."
            )
        outside = (cells < 0) | (cells >= np.array(self.n_states))
        if outside.any():
            row, column = (int(i) for i in np.argwhere(outside)[0])
            spec = self.specs[column]
            raise DataError(
                f"row {row}, column {spec.name} has state {cells[row, column]}; it must lie in "
                f"0..{spec.n_states - 1}."
            )
        return pd.DataFrame({spec.name: _decode(spec, cells[:, i]) for i, spec in enumerate(self.specs)})

    def to_dict(self) -> dict[str, Any]:
        """Everything that `from_dict` needs, as plain JSON values."""
        self._check_fitted()
        return {
            "kind": "TableBins",
            "n_bins": self.n_bins,
            "max_categories": self.max_categories,
            "reserve": self.reserve,
            "dropped": dict(self.dropped),
            "columns": [asdict(spec) for spec in self.specs],
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Self:
        """Restore what `to_dict` gave.

        Raises:
            ArtefactError: if it is something else.
        """
        check_kind(saved, "TableBins")
        try:
            bins = cls(saved["n_bins"], saved["max_categories"], reserve=saved["reserve"])
            bins.dropped = dict(saved["dropped"])
            bins.specs = tuple(
                Column(**{**column, "values": tuple(column["values"]), "edges": tuple(column["edges"])})
                for column in saved["columns"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"saved TableBins are damaged ({error!r}); fit them again.") from error
        return bins

    def _check_fitted(self) -> None:
        if not self.specs:
            raise DataError("TableBins is not fitted yet; call fit with the rows of the training part first.")

    def _fit_numeric(self, values: pd.Series[Any]) -> Column:
        from pandas.api import types

        numbers = _numbers(values)
        missing = np.isnan(numbers)
        if np.isinf(numbers).any():
            raise DataError(
                f"column {values.name}, row {int(np.isinf(numbers).argmax())} is infinite; replace it or "
                "leave it empty."
            )
        known = np.sort(numbers[~missing])
        distinct = np.unique(known)
        dtype: Literal["int", "float"] = "int" if types.is_integer_dtype(values) else "float"
        has_missing = self.reserve or bool(missing.any())
        if len(distinct) <= self.n_bins:
            return Column(str(values.name), "levels", dtype, tuple(distinct.tolist()), missing=has_missing)
        edges = np.quantile(known, np.arange(1, self.n_bins) / self.n_bins, method="inverted_cdf")
        # An edge at the maximum would leave the bin beyond it empty.
        edges = np.unique(np.minimum(edges, distinct[-2]))
        bins = np.split(known, np.searchsorted(known, edges, side="right"))
        medians = tuple(float(part[(len(part) - 1) // 2]) for part in bins)
        return Column(str(values.name), "bins", dtype, medians, tuple(edges.tolist()), missing=has_missing)

    def _fit_categories(self, values: pd.Series[Any]) -> Column:
        from pandas.api import types

        names = _names(values)
        counts = names.value_counts()  # missing cells are not counted
        if isinstance(values.dtype, types.CategoricalDtype):
            order = [str(name) for name in values.cat.categories]
        else:
            order = sorted(counts.index)
        frequent = set(sorted(counts.index, key=lambda name: (-counts[name], name))[: self.max_categories])
        return Column(
            str(values.name),
            "categories",
            "bool" if types.is_bool_dtype(values) else "text",
            tuple(name for name in order if name in frequent),
            other=self.reserve or len(counts) > len(frequent),
            missing=bool(values.isna().any()),
        )


def _with_text_names(frame: pd.DataFrame) -> pd.DataFrame:
    """Names of columns survive JSON as text only."""
    return frame.set_axis([str(name) for name in frame.columns], axis=1)


def _numbers(values: pd.Series[Any]) -> NDArray[np.float64]:
    return values.to_numpy(dtype=np.float64, na_value=np.nan)


def _names(values: pd.Series[Any]) -> pd.Series[Any]:
    """Cells as strings, missing ones as None."""
    return values.astype(object).where(values.notna(), None).map(str, na_action="ignore")


def _encode(spec: Column, values: pd.Series[Any]) -> NDArray[np.int64]:
    """States of one column."""
    missing = values.isna().to_numpy()
    if spec.kind == "categories":
        index = {name: state for state, name in enumerate(spec.values)}
        unknown = len(spec.values) if spec.other else -1
        states = np.array([index.get(name, unknown) for name in _names(values)], dtype=np.int64)
    else:
        if not is_numeric(values) and not missing.all():
            raise DataError(
                f"column {spec.name} holds {values.dtype}, but numbers in the training part; convert it."
            )
        numbers = np.where(missing, spec.values[0], _numbers(values))  # missing cells are overwritten below
        edges = spec.edges if spec.kind == "bins" else _midpoints(spec.values)
        states = np.searchsorted(np.asarray(edges, dtype=np.float64), numbers, side="left").astype(np.int64)
    # A cell without a state of its own goes to the last one, "missing" or else "other", where there is one.
    states[missing] = -1
    if spec.missing or spec.other:
        states[states == -1] = spec.n_states - 1
    if (states == -1).any():
        row = int((states == -1).argmax())
        raise DataError(
            f"column {spec.name}, row {row} is {values.iloc[row]!r}, which the training part does not have; "
            "remove the row or use reserve=True."
        )
    return states


def _midpoints(levels: tuple[Any, ...]) -> NDArray[np.float64]:
    values = np.asarray(levels, dtype=np.float64)
    return (values[:-1] + values[1:]) / 2


def _decode(spec: Column, states: NDArray[Any]) -> Any:
    """Values of one column's states, as an array or Series of the column's type."""
    import pandas as pd

    extra = [OTHER] * spec.other + [None] * spec.missing
    if spec.kind == "categories":
        table: list[Any] = (
            [name == "True" for name in spec.values] if spec.dtype == "bool" else list(spec.values)
        )
        cells = pd.Series([(table + extra)[state] for state in states], dtype=object)
        return cells.infer_objects()
    numbers = np.array([*spec.values, *[np.nan] * spec.missing])[states]
    return numbers.astype(np.int64) if spec.dtype == "int" and not np.isnan(numbers).any() else numbers
