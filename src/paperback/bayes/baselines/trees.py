"""Trees that predict a law: gradient boosting of quantiles, and a random forest with its leaves' spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from torch import Tensor
from torch.distributions import Distribution, constraints

from paperback.bayes.distributions import NormalMixture
from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError, NotSupportedError
from paperback.training import derive

LEVELS = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.975)
RATES = (0.03, 0.1)  # learning rates of boosting that are tried
LEAVES = (7, 31)  # and leaves of a tree
LEAST_SPREAD = 1e-3  # of a leaf, in standard deviations of the target
NARROWEST = 0.01  # distance of two neighbouring quantiles at least, in standard deviations of the target


class QuantileLaw(Distribution):
    """A law given by quantiles: uniform between neighbours, exponential beyond the first and the last.

    Args:
        quantiles: ``(*batch, levels)``, increasing.
        levels: their probabilities, increasing, inside (0, 1), with 0.5 in the middle.
    """

    support = constraints.real
    has_rsample = True

    def __init__(self, quantiles: Tensor, levels: Tensor) -> None:
        self.quantiles, self.levels = quantiles, levels.to(quantiles)
        self.log_density = self.levels.diff().log() - quantiles.diff(dim=-1).log()
        # The scale of a tail is that of an exponential law with the outermost quantile and the median.
        middle = quantiles[..., len(levels) // 2]
        self.low_scale = (middle - quantiles[..., 0]) / (0.5 / self.levels[0]).log()
        self.high_scale = (quantiles[..., -1] - middle) / (0.5 / (1 - self.levels[-1])).log()
        super().__init__(quantiles.shape[:-1], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Of the pieces and both tails."""
        low, high, middle, mass = self._pieces()
        inside = (self.levels.diff() * middle).sum(-1)
        return inside + mass[0] * (low - self.low_scale) + mass[1] * (high + self.high_scale)

    @property
    def variance(self) -> Tensor:
        """Of the pieces and both tails."""
        low, high, middle, mass = self._pieces()
        widths = self.quantiles.diff(dim=-1)
        second = (self.levels.diff() * (middle.square() + widths.square() / 12)).sum(-1)
        second = second + mass[0] * ((low - self.low_scale).square() + self.low_scale.square())
        second = second + mass[1] * ((high + self.high_scale).square() + self.high_scale.square())
        return second - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density."""
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        piece, low, high = self._locate(value)
        inside = self.log_density.expand(*value.shape, -1).gather(-1, piece[..., None])[..., 0]
        below = (self.levels[0] / self.low_scale).log() - low / self.low_scale
        above = ((1 - self.levels[-1]) / self.high_scale).log() - high / self.high_scale
        return torch.where(low > 0, below, torch.where(high > 0, above, inside))

    def cdf(self, value: Tensor) -> Tensor:
        """P(Y <= value)."""
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        piece, low, high = self._locate(value)
        quantiles = self.quantiles.expand(*value.shape, -1)
        left = quantiles.gather(-1, piece[..., None])[..., 0]
        slope = self.log_density.expand(*value.shape, -1).gather(-1, piece[..., None])[..., 0].exp()
        inside = self.levels[piece] + slope * (value - left)
        below = self.levels[0] * (-low / self.low_scale).exp()
        above = 1 - (1 - self.levels[-1]) * (-high / self.high_scale).exp()
        return torch.where(low > 0, below, torch.where(high > 0, above, inside))

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at probability `value`."""
        p = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape))
        piece = (torch.searchsorted(self.levels, p.contiguous()) - 1).clamp(0, len(self.levels) - 2)
        left = self.quantiles.expand(*p.shape, -1).gather(-1, piece[..., None])[..., 0]
        slope = self.log_density.expand(*p.shape, -1).gather(-1, piece[..., None])[..., 0].exp()
        inside = left + (p - self.levels[piece]) / slope
        below = self.quantiles[..., 0] + self.low_scale * (p / self.levels[0]).log()
        above = self.quantiles[..., -1] - self.high_scale * ((1 - p) / (1 - self.levels[-1])).log()
        return torch.where(p < self.levels[0], below, torch.where(p > self.levels[-1], above, inside))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by inverse cdf."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.quantiles.dtype))

    def _pieces(self) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        middle = (self.quantiles[..., 1:] + self.quantiles[..., :-1]) / 2
        return self.quantiles[..., 0], self.quantiles[..., -1], middle, (self.levels[0], 1 - self.levels[-1])

    def _locate(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The piece of each value, and how far it lies below the first and above the last quantile."""
        quantiles = self.quantiles.expand(*value.shape, -1).contiguous()
        piece = torch.searchsorted(quantiles, value[..., None].contiguous())[..., 0] - 1
        low, high = (quantiles[..., 0] - value).clamp_min(0), (value - quantiles[..., -1]).clamp_min(0)
        return piece.clamp(0, quantiles.shape[-1] - 2), low, high


class _Trees(BayesianRegressor):
    """Trees have no gradients and no law of several points together."""

    _scaling = "none"

    def save_pretrained(self, folder: str | Path) -> None:
        """Not there: scikit-learn's trees are no plain data."""
        raise NotSupportedError(
            f"{type(self).__name__} is not saved, since scikit-learn's trees are no plain data; fit it again "
            "with the same random_state, or keep it with skops."
        )

    def _rows(self, x: Tensor) -> Any:
        if x.requires_grad:
            raise DataError(
                "trees are piecewise constant and have no gradients; detach X, or take a Gaussian process."
            )
        return x.reshape(-1, x.shape[-1]).numpy()


class QuantileBoosting(_Trees):
    """Gradient-boosted trees, one ensemble for each of thirteen quantiles.

    Learning rate and number of leaves are chosen on a held-out fifth of the rows by the pinball loss of the
    median, the number of trees by early stopping; with fewer than 50 rows the defaults are taken.

    Args:
        n_trees: of a quantile at most.
        random_state: of the held-out rows.
    """

    def __init__(self, n_trees: int = 300, random_state: int = 0) -> None:
        self.n_trees = n_trees
        self.random_state = random_state

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self.models_ = [self._fit_output(x.numpy(), target) for target in y.numpy().T]

    def _fit_output(self, x: Any, y: Any) -> list[HistGradientBoostingRegressor]:
        rate, leaves, trees = self._chosen(x, y)
        common = {"learning_rate": rate, "max_leaf_nodes": leaves, "max_iter": trees}
        smallest = max(1, min(20, len(x) // 10))
        return [
            HistGradientBoostingRegressor(
                loss="quantile", quantile=level, early_stopping=False, min_samples_leaf=smallest, **common
            ).fit(x, y)
            for level in LEVELS
        ]

    def _chosen(self, x: Any, y: Any) -> tuple[float, int, int]:
        """Learning rate, leaves and number of trees with the least pinball loss of the median."""
        if len(x) < 50:
            return RATES[-1], LEAVES[0], min(50, self.n_trees)
        order = np.random.default_rng(derive(self.random_state, "held out")).permutation(len(x))
        val, kept = order[: len(x) // 5], order[len(x) // 5 :]
        best = (np.inf, RATES[-1], LEAVES[0], 1)
        for rate in RATES:
            for leaves in LEAVES:
                model = HistGradientBoostingRegressor(
                    loss="absolute_error",
                    learning_rate=rate,
                    max_leaf_nodes=leaves,
                    max_iter=self.n_trees,
                    early_stopping=False,
                    min_samples_leaf=max(1, min(20, len(kept) // 10)),
                ).fit(x[kept], y[kept])
                errors = [np.abs(stage - y[val]).mean() for stage in model.staged_predict(x[val])]
                best = min(best, (min(errors), rate, leaves, int(np.argmin(errors)) + 1))
        return best[1:]

    def _law(self, x: Tensor) -> QuantileLaw:
        rows = self._rows(x)
        values = np.stack([[model.predict(rows) for model in models] for models in self.models_])
        values = np.sort(values, axis=1)  # quantiles that cross are put in order
        steps = np.maximum(np.diff(values, axis=1), NARROWEST)
        values = np.concatenate([values[:, :1], values[:, :1] + steps.cumsum(1)], axis=1)
        quantiles = torch.as_tensor(values).permute(2, 0, 1).reshape(*x.shape[:-1], -1, len(LEVELS))
        return QuantileLaw(quantiles, torch.tensor(LEVELS, dtype=torch.float64))


class ForestRegressor(_Trees):
    """A random forest whose law is the mixture of its leaves: their means, and the spread of their rows.

    Args:
        n_trees: trees.
        min_samples_leaf: rows of a leaf at least; the spread of fewer than a handful says little.
        random_state: of the bootstrap.
    """

    def __init__(self, n_trees: int = 200, min_samples_leaf: int = 5, random_state: int = 0) -> None:
        self.n_trees = n_trees
        self.min_samples_leaf = min_samples_leaf
        self.random_state = random_state

    def _fit(self, x: Tensor, y: Tensor) -> None:
        self.models_ = [
            RandomForestRegressor(
                self.n_trees,
                min_samples_leaf=self.min_samples_leaf,
                max_features=1 / 3 if x.shape[1] >= 3 else 1.0,
                random_state=derive(self.random_state, "forest") % 2**32,
            ).fit(x.numpy(), target)
            for target in y.numpy().T
        ]

    def _law(self, x: Tensor) -> NormalMixture:
        rows = self._rows(x)
        means, variances = [], []
        for forest in self.models_:
            trees = [tree.tree_ for tree in forest.estimators_]
            leaves = forest.apply(rows).T
            means.append([tree.value[leaf, 0, 0] for tree, leaf in zip(trees, leaves, strict=True)])
            variances.append([tree.impurity[leaf] for tree, leaf in zip(trees, leaves, strict=True)])
        shape = (self.n_trees, *x.shape[:-1], len(self.models_))
        mean, variance = (torch.as_tensor(np.stack(parts, -1)).reshape(shape) for parts in (means, variances))
        return NormalMixture(mean, (variance + LEAST_SPREAD**2).sqrt())
