"""A Gaussian copula: every column its own empirical distribution, all of them tied by one correlation matrix.

The classical model of mixed tables (Patki et al., The Synthetic Data Vault, 2016), and the one that a deep
generator has to beat. Numbers are turned into normal scores by their ranks, categories by the middle of their
share of the unit interval, most frequent first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class GaussianCopula:
    """Columns of any kind, tied by the correlations of their normal scores. A `TabularGenerator`."""

    def __init__(self) -> None:
        self._columns: list[
            tuple[str, bool, Any]
        ] = []  # name, whether numeric, sorted cells or categories in order

    def fit(self, frame: pd.DataFrame, *, seed: int = 0, progress: bool = True, **training: Any) -> Self:
        """Keep the cells of each column, and the correlations.

        Args:
            frame: the training rows; empty cells are allowed.
            seed: of the normal scores of categories and of equal numbers.
            progress: ignored; this takes no time worth showing.
            **training: there is no setting.

        Returns:
            The model itself.

        Raises:
            DataError: if there are fewer than two rows, or a setting is given.
        """
        from paperback.data.table_files import is_numeric

        if training:
            raise DataError(f"GaussianCopula.fit has no setting {next(iter(training))!r}; leave it out.")
        if len(frame) < 2:
            raise DataError(f"the table has {len(frame)} rows; give at least two.")
        rng = np.random.default_rng(seed)
        self._columns, scores = [], []
        for name in frame.columns:
            cells, numeric = frame[name], is_numeric(frame[name])
            ordered = cells.sort_values(ignore_index=True) if numeric else cells.value_counts(dropna=False)
            self._columns.append((str(name), numeric, ordered))
            scores.append(_scores(cells, numeric, ordered, rng))
        self._correlation = np.atleast_2d(np.nan_to_num(np.corrcoef(np.stack(scores))))
        np.fill_diagonal(self._correlation, 1.0)
        return self

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw rows; cells are cells of the training rows.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            A table with the columns and types of the training rows.

        Raises:
            DataError: if n < 1 or the model is not fitted.
        """
        import pandas as pd
        from scipy.stats import norm

        if n < 1 or not self._columns:
            raise DataError(f"n is {n}; ask for at least one row, of a model that fit was called for.")
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        values, vectors = np.linalg.eigh(self._correlation)
        root = vectors * np.sqrt(np.clip(values, 0.0, None))  # rounding can leave a hair below zero
        normal = torch.randn(n, len(self._columns), generator=generator, dtype=torch.float64).numpy() @ root.T
        uniform = norm.cdf(normal)
        cells = {}
        for i, (name, numeric, ordered) in enumerate(self._columns):
            if numeric:
                place = np.minimum((uniform[:, i] * len(ordered)).astype(int), len(ordered) - 1)
                cells[name] = ordered.iloc[place].to_numpy()
            else:
                edges = np.cumsum(ordered.to_numpy()) / ordered.sum()
                place = np.minimum(np.searchsorted(edges, uniform[:, i], side="right"), len(ordered) - 1)
                cells[name] = ordered.index[place]
        return pd.DataFrame(cells)


def _scores(
    cells: pd.Series[Any], numeric: bool, ordered: Any, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Normal scores of the cells, equal ones in random order."""
    from scipy.stats import norm

    if numeric:
        keys = cells.to_numpy(
            dtype=np.float64, na_value=np.inf
        )  # empty cells come last, as sort_values has them
    else:
        keys = ordered.index.get_indexer(cells).astype(np.float64)
    ranks = np.empty(len(keys))
    ranks[np.lexsort((rng.random(len(keys)), keys))] = np.arange(len(keys))
    return np.asarray(norm.ppf((ranks + 0.5) / len(keys)))
