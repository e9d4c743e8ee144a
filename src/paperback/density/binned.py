"""A density model as a generator of tables: the bridge between the two kinds of method of this wing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from paperback.data import TableBins
from paperback.density.interface import DensityModel
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class BinnedGenerator:
    """A density model on the states of binned columns. A `TabularGenerator`.

    A cell that is drawn is one of the training cells of its state, so that rows are not told from real ones
    by their few values alone. Within a state, columns are independent.

    Args:
        build: from the numbers of states of the columns to a model that is not fitted.
        n_bins: bins of a column of numbers that has more values than that.

    Attributes:
        bins: the bins; None before `fit`.
        model: the fitted model; None before `fit`.
    """

    def __init__(self, build: Callable[[Sequence[int]], DensityModel], n_bins: int = 8) -> None:
        self.build, self.n_bins = build, n_bins
        self.bins: TableBins | None = None
        self.model: DensityModel | None = None

    @classmethod
    def around(cls, model: DensityModel, bins: TableBins, frame: pd.DataFrame) -> Self:
        """A generator from a model that is fitted already.

        Args:
            model: fitted on states of the bins.
            bins: fitted on the table.
            frame: the training rows, which cells are drawn from.

        Returns:
            The generator, ready to draw.
        """
        generator = cls(lambda states: model, bins.n_bins)
        generator._keep(model, bins, frame)
        return generator

    def fit(self, frame: pd.DataFrame, *, seed: int = 0, progress: bool = True, **training: Any) -> Self:
        """Bin the columns and fit the model to their states; see `TabularGenerator.fit`.

        Args:
            frame: the training rows.
            seed: of the model's fit.
            progress: show a progress bar.
            **training: settings of the model's fit.

        Returns:
            The generator itself.

        Raises:
            DataError: if the table cannot be used.
        """
        bins = TableBins(self.n_bins).fit(frame)
        model = self.build(bins.n_states)
        self._keep(model.fit(bins.transform(frame), seed=seed, progress=progress, **training), bins, frame)
        return self

    def _keep(self, model: DensityModel, bins: TableBins, frame: pd.DataFrame) -> None:
        self.model, self.bins = model, bins
        self._frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        columns = bins.transform(frame).numpy().T
        self._cells = {
            name: _Cells(states, n)
            for name, states, n in zip(bins.columns, columns, bins.n_states, strict=True)
        }

    @property
    def device(self) -> torch.device:
        """Where the model is, and where the generator of `sample` has to be."""
        return torch.device("cpu") if self.model is None else self.model.valid.device

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw rows.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            A table with the training rows' columns. A state that no training cell has (an empty cell, another
            category) comes as `TableBins.inverse_transform` writes it.

        Raises:
            DataError: if n < 1 or the generator is not fitted.
        """
        import pandas as pd

        if self.bins is None or self.model is None:
            raise DataError("the generator is not fitted yet; call fit with the training rows first.")
        generator = generator if generator is not None else torch.Generator(self.device).manual_seed(0)
        states = self.model.sample(n, generator).cpu()
        written = self.bins.inverse_transform(states)
        uniform = torch.rand(states.shape, generator=generator, device=generator.device).cpu().numpy()
        # A constant column has no states; its cells are those of the first row.
        columns = self._frame.iloc[np.zeros(n, int)].reset_index(drop=True).to_dict("series")
        for i, (name, cells) in enumerate(self._cells.items()):
            rows, found = cells.draw(states[:, i].numpy(), uniform[:, i])
            drawn = self._frame[name].iloc[rows].reset_index(drop=True)
            if not found.all():
                drawn = drawn.astype(object).where(found, written[name]).infer_objects()
            columns[name] = drawn
        return pd.DataFrame(columns)


class _Cells:
    """Where the training cells of each state of one column stand."""

    def __init__(self, states: NDArray[np.int64], n_states: int) -> None:
        self.rows = states.argsort(kind="stable")
        self.counts = np.bincount(states, minlength=n_states)
        self.starts = self.counts.cumsum() - self.counts

    def draw(
        self, states: NDArray[np.int64], uniform: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """A training row for each state, each cell of it equally probable; and whether there is one (row 0
        stands where there is none).
        """
        counts = self.counts[states]
        # A float32 below one times a count can round up to the count.
        within = np.minimum((uniform * counts).astype(np.int64), np.maximum(counts - 1, 0))
        found = counts > 0
        return np.where(
            found, self.rows[np.minimum(self.starts[states] + within, len(self.rows) - 1)], 0
        ), found
