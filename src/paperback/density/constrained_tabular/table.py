"""Tables as tensors: mode-specific normalisation of numbers, one-hot states of the rest.

A column of numbers is a mixture of a few Gaussians. A cell x in mode c becomes a = (x - mu_c) / (4 sigma_c),
which a tanh can reach, beside the mode as a state; an empty cell is one more mode. A column of categories is
a state. A table of n rows is then ``amounts (n, numbers)`` and ``states (n, numbers + categories)``. Going
back, x = 4 sigma_c a + mu_c, is differentiable in a, and so is going forth again with the same modes: that is
what lets a constraint layer stand inside a training.

The normalisation is that of Xu et al., Modeling tabular data using conditional GAN (NeurIPS 2019).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from paperback.errors import ArtefactError, DataError

if TYPE_CHECKING:
    import pandas as pd

MAX_MODES = 10
MIN_WEIGHT = 0.005  # of a mode
REACH = 4.0  # standard deviations of a mode that |a| = 1 stands for
LIMIT = 0.99  # |a| of training cells, within tanh's range
MAX_DECIMALS = 4  # a column with more is taken for continuous
ROWS_FOR_MODES = 5_000  # rows that the modes of a column are fitted to


@dataclass(frozen=True)
class Column:
    """How one column is represented.

    Attributes:
        name: of the column.
        kind: "number" or "category".
        dtype: "int", "float", "bool" or "text": what generated cells are.
        means: of the modes of a number; the last one, of all rows, is that of an empty cell, if there are
            any.
        stds: standard deviations, likewise.
        weights: of the modes, likewise (0 for empty cells).
        decimals: that all known cells have; None for more than four.
        missing: whether cells may be empty.
        low: smallest known cell.
        high: largest known cell.
        values: the categories.
    """

    name: str
    kind: Literal["number", "category"]
    dtype: str
    means: tuple[float, ...] = ()
    stds: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    decimals: int | None = None
    missing: bool = False
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    @property
    def n_states(self) -> int:
        """Modes of a number, or categories and perhaps "empty"."""
        return len(self.means) if self.kind == "number" else len(self.values) + self.missing


class Encoding:
    """The representation of a table's columns; made by `fit`, or from a saved dictionary.

    Args:
        columns: of the table, in its order.

    Attributes:
        columns: as given.
        numbers: the columns of numbers.
        slots: the columns in the order of their states: numbers, then categories.
        sizes: number of states of each slot.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        self.numbers = tuple(column for column in columns if column.kind == "number")
        self.categories = tuple(column for column in columns if column.kind == "category")
        self.slots = self.numbers + self.categories
        self.sizes = tuple(column.n_states for column in self.slots)

    @classmethod
    def fit(cls, frame: pd.DataFrame, seed: int = 0) -> Self:
        """Find out how each column is represented.

        Args:
            frame: the training rows.
            seed: of the mixtures and of the rows that they are fitted to.

        Returns:
            The encoding.

        Raises:
            DataError: if there are fewer than two rows, no columns, or a column cannot be used.
        """
        from paperback.data.table_files import is_numeric

        if len(frame) < 2 or len(frame.columns) == 0:
            raise DataError(
                f"the table has {len(frame)} rows and {len(frame.columns)} columns; give at least two rows."
            )
        names = [str(name) for name in frame.columns]
        if len(set(names)) < len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise DataError(f"column {name!r} appears more than once; rename or remove all but one.")
        frame = frame.set_axis(names, axis=1)
        rng = np.random.default_rng(seed)
        return cls([_number(frame[n], rng) if is_numeric(frame[n]) else _category(frame[n]) for n in names])

    def to_list(self) -> list[dict[str, Any]]:
        """Everything that `from_list` needs, as plain JSON values."""
        return [asdict(column) for column in self.columns]

    @classmethod
    def from_list(cls, saved: Sequence[Mapping[str, Any]]) -> Self:
        """Restore what `to_list` gave.

        Raises:
            ArtefactError: if it is something else.
        """
        try:
            tuples = {field.name for field in fields(Column) if str(field.type).startswith("tuple")}
            columns: list[Any] = [
                {key: tuple(value) if key in tuples else value for key, value in column.items()}
                for column in saved
            ]
            return cls([Column(**column) for column in columns])
        except (TypeError, AttributeError) as error:
            raise ArtefactError(f"the saved columns are damaged ({error}); fit the model again.") from error

    # -- to tensors ----------------------------------------------------------------------------------------

    def encode(
        self, frame: pd.DataFrame, seed: int = 0
    ) -> tuple[Float[Tensor, "rows numbers"], Int[Tensor, "rows slots"]]:
        """A table as tensors. The mode of a cell is drawn from its posterior.

        Args:
            frame: with the columns of the training rows.
            seed: of the modes.

        Returns:
            Amounts, float32 in [-0.99, 0.99], 0 for an empty cell; states, int64.

        Raises:
            DataError: if a column is missing or holds a cell that the training rows do not know.
        """
        frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        absent = [column.name for column in self.columns if column.name not in frame.columns]
        if absent:
            raise DataError(f"the table has no column {absent[0]!r}, which the training rows had; add it.")
        rng = np.random.default_rng(seed)
        amounts = np.zeros((len(frame), len(self.numbers)), np.float32)
        states = np.zeros((len(frame), len(self.slots)), np.int64)
        for i, column in enumerate(self.numbers):
            amounts[:, i], states[:, i] = _encode_number(column, frame[column.name], rng)
        for i, column in enumerate(self.categories, len(self.numbers)):
            states[:, i] = _encode_category(column, frame[column.name])
        return torch.from_numpy(amounts), torch.from_numpy(states)

    def decode(self, values: NDArray[np.float64], states: NDArray[np.int64]) -> pd.DataFrame:
        """A table from values in original units and states.

        Args:
            values: of the numbers, ``(rows, numbers)``.
            states: ``(rows, slots)``.

        Returns:
            A DataFrame with the columns and types of the training rows. Whole numbers are int64 unless a
            cell is empty or fractional.
        """
        import pandas as pd

        cells: dict[str, Any] = {}
        for i, column in enumerate(self.numbers):
            cell = values[:, i]
            if column.missing:
                cell = np.where(states[:, i] == column.n_states - 1, np.nan, cell)
            whole = column.dtype == "int" and bool((np.isfinite(cell) & (cell == np.round(cell))).all())
            cells[column.name] = cell.astype(np.int64) if whole else cell
        for i, column in enumerate(self.categories, len(self.numbers)):
            table = np.array([*column.values, *[None] * column.missing], dtype=object)
            cell = table[states[:, i]]
            cells[column.name] = cell.astype(bool) if column.dtype == "bool" and not column.missing else cell
        frame = pd.DataFrame({column.name: cells[column.name] for column in self.columns})
        texts = [column.name for column in self.categories if column.dtype == "text"]
        return frame.astype(dict.fromkeys(texts, "str")) if texts else frame

    @cached_property
    def spread(self) -> dict[str, float]:
        """A size of each column of numbers: its range, or 1 where that is zero."""
        return {column.name: (column.high - column.low) or 1.0 for column in self.numbers}

    @cached_property
    def decimals(self) -> dict[str, int]:
        """Decimals of the columns of numbers that have few."""
        return {c.name: c.decimals for c in self.numbers if c.decimals is not None}


class Modes(nn.Module):
    """The modes of an encoding as tensors: amounts to values and back, states to one-hot blocks and back."""

    means: Tensor
    scales: Tensor
    slot_of: Tensor
    state_of: Tensor
    valid: Tensor

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        sizes = encoding.sizes
        widest = max(sizes)
        self.width = sum(sizes)
        self.n_numbers = len(encoding.numbers)
        self.sizes = sizes
        means = torch.zeros(self.n_numbers, widest)
        scales = torch.ones(self.n_numbers, widest)
        for i, column in enumerate(encoding.numbers):
            means[i, : column.n_states] = torch.tensor(column.means)
            scales[i, : column.n_states] = REACH * torch.tensor(column.stds)
        slot_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        starts = torch.tensor([0, *np.cumsum(sizes)[:-1].tolist()])
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("slot_of", slot_of, persistent=False)
        self.register_buffer("state_of", torch.arange(self.width) - starts[slot_of], persistent=False)
        self.register_buffer("valid", torch.arange(widest) < torch.tensor(sizes)[:, None], persistent=False)

    starts: Tensor

    def values(self, amounts: Tensor, states: Tensor) -> Tensor:
        """Original units, x = 4 sigma_c a + mu_c, ``(batch, numbers)``."""
        modes = states[:, : self.n_numbers, None]
        means = self.means.expand(len(states), -1, -1).gather(2, modes)[..., 0]
        return means + amounts * self._scale(modes)

    def amounts(self, values: Tensor, states: Tensor) -> Tensor:
        """Back again in the same modes, a = (x - mu_c) / (4 sigma_c)."""
        modes = states[:, : self.n_numbers, None]
        means = self.means.expand(len(states), -1, -1).gather(2, modes)[..., 0]
        return (values - means) / self._scale(modes)

    def _scale(self, modes: Tensor) -> Tensor:
        return self.scales.expand(len(modes), -1, -1).gather(2, modes)[..., 0]

    def one_hot(self, states: Tensor) -> Tensor:
        """States ``(batch, slots)`` as blocks of ones and zeros, ``(batch, width)``."""
        blocks = torch.zeros(len(states), self.width, device=states.device)
        return blocks.scatter_(1, states + self.starts, 1.0)

    def padded(self, logits: Tensor) -> Tensor:
        """Logits ``(batch, width)`` as ``(batch, slots, most states)``; -inf where there is no state."""
        padded = logits.new_full((len(logits), *self.valid.shape), -torch.inf)
        padded[:, self.slot_of, self.state_of] = logits
        return padded

    def flat(self, padded: Tensor) -> Tensor:
        """The inverse of `padded`."""
        return padded[:, self.slot_of, self.state_of]


# -- columns -------------------------------------------------------------------------------------------------


def _number(cells: pd.Series[Any], rng: np.random.Generator) -> Column:
    from pandas.api import types

    values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        raise DataError(f"column {cells.name}, row {int(np.isinf(values).argmax())} is infinite; replace it.")
    empty = np.isnan(values)
    known = values[~empty]
    if len(known) == 0:
        raise DataError(f"column {cells.name} is empty; leave it out.")
    means, stds, weights = _fit_modes(known, rng)
    if empty.any():
        means, stds, weights = (
            [*means, float(known.mean())],
            [*stds, float(known.std()) or 1.0],
            [*weights, 0.0],
        )
    return Column(
        str(cells.name),
        "number",
        "int" if types.is_integer_dtype(cells) else "float",
        tuple(means),
        tuple(stds),
        tuple(weights),
        _decimals(known),
        bool(empty.any()),
        float(known.min()),
        float(known.max()),
    )


def _fit_modes(
    known: NDArray[np.float64], rng: np.random.Generator
) -> tuple[list[float], list[float], list[float]]:
    """Means, standard deviations and weights of the modes that a variational mixture of at most ten keeps."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import BayesianGaussianMixture

    sample = known if len(known) <= ROWS_FOR_MODES else rng.choice(known, ROWS_FOR_MODES, replace=False)
    center, size = float(sample.mean()), float(sample.std())
    n_modes = min(MAX_MODES, len(np.unique(sample)), len(sample) - 1)
    if n_modes < 2:
        return [center], [size or 1.0], [1.0]
    mixture = BayesianGaussianMixture(
        n_components=n_modes,
        weight_concentration_prior_type="dirichlet_process",
        weight_concentration_prior=0.001,
        random_state=int(rng.integers(2**31)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a mode more or less does not matter
        mixture.fit(((sample - center) / size)[:, None])
    kept = mixture.weights_ > MIN_WEIGHT
    means = center + size * mixture.means_[kept, 0]
    stds = size * np.sqrt(mixture.covariances_[kept, 0, 0])
    return means.tolist(), np.maximum(stds, 1e-6 * size).tolist(), mixture.weights_[kept].tolist()


def _decimals(known: NDArray[np.float64]) -> int | None:
    for places in range(MAX_DECIMALS + 1):
        if np.abs(known - np.round(known, places)).max() <= 1e-9 * max(1.0, np.abs(known).max()):
            return places
    return None


def _category(cells: pd.Series[Any]) -> Column:
    from pandas.api import types

    missing = bool(cells.isna().any())
    known = cells.dropna()
    if types.is_bool_dtype(known):
        return Column(str(cells.name), "category", "bool", missing=missing, values=(False, True))
    if isinstance(cells.dtype, types.CategoricalDtype):
        values = tuple(str(value) for value in cells.cat.remove_unused_categories().cat.categories)
    else:
        values = tuple(sorted({str(value) for value in known}))
    if not values:
        raise DataError(f"column {cells.name} is empty; leave it out.")
    if len(values) > 20 and len(values) > len(known) / 2:
        raise DataError(
            f"column {cells.name} has {len(values):,} different texts in {len(known):,} rows, so there is "
            "nothing to learn about it; leave it out or put its texts into groups."
        )
    return Column(str(cells.name), "category", "text", missing=missing, values=values)


def _encode_number(
    column: Column, cells: pd.Series[Any], rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    try:
        values = cells.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        raise DataError(
            f"column {column.name} holds {cells.dtype}, but numbers in the training rows; convert it."
        ) from None
    empty = np.isnan(values)
    if empty.any() and not column.missing:
        raise DataError(
            f"column {column.name}, row {int(empty.argmax())} is empty, which no cell of the training rows "
            "was; fill it in."
        )
    n_modes = column.n_states - column.missing
    means, stds, weights = (np.array(v[:n_modes]) for v in (column.means, column.stds, column.weights))
    scores = (values[:, None] - means) / stds
    with np.errstate(invalid="ignore"):
        logits = np.log(weights / stds) - 0.5 * scores**2
    states = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    amounts = np.clip(scores[np.arange(len(values)), states] / REACH, -LIMIT, LIMIT)
    return np.where(empty, 0.0, amounts), np.where(empty, column.n_states - 1, states)


def _encode_category(column: Column, cells: pd.Series[Any]) -> NDArray[np.int64]:
    index: dict[Any, int] = {str(value): state for state, value in enumerate(column.values)}
    empty = cells.isna().to_numpy()
    names = cells.astype(object).where(~empty, None)
    states = np.array([index.get(str(name), -1) for name in names], dtype=np.int64)
    if column.missing:
        states[empty] = len(column.values)
    if (states < 0).any():
        row = int((states < 0).argmax())
        raise DataError(
            f"column {column.name}, row {row} is {cells.iloc[row]!r}, which the training rows do not have; "
            "remove it."
        )
    return states
