"""A density model as a generator of tables: the bridge between the two kinds of method of this wing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from paperback.data import TableBins
from paperback.density.interface import DensityModel
from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class BinnedGenerator:
    """A density model on the states of binned columns. A `TabularGenerator`.

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
        self.bins = TableBins(self.n_bins).fit(frame)
        model = self.build(self.bins.n_states)
        self.model = model.fit(self.bins.transform(frame), seed=seed, progress=progress, **training)
        return self

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw rows; a cell of a bin is the median of the training cells in it.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            A table with the training rows' columns, but for those that were constant.

        Raises:
            DataError: if n < 1 or the generator is not fitted.
        """
        if self.bins is None or self.model is None:
            raise DataError("the generator is not fitted yet; call fit with the training rows first.")
        return self.bins.inverse_transform(self.model.sample(n, generator).cpu())
