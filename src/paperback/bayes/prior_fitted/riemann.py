"""The Riemann distribution: a density of bars with half-normal tails, for the output of a network.

The line is cut by borders b_0 < ... < b_K. Bar k has the probability p_k = softmax(logits)_k, spread evenly:
the density there is p_k / (b_{k+1} - b_k). The first and the last bar are half-normal laws that begin at
their inner border and point outwards; the median of each lies at the bar's width, so its scale is

    s = width / HalfNormal(1).icdf(0.5).

With borders at the quantiles of the targets all bars are equally likely before any data is seen; the two
outermost borders are put at the medians of the outer bars' targets, so that the tails' medians are theirs.
Source: Müller et al., Transformers Can Do Bayesian Inference (2022), section 3 and appendix; the expected
improvement is written out here, since the authors' code takes a bar that the incumbent cuts at its middle.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints

from paperback.errors import DataError

HALF_NORMAL_MEDIAN = 0.6744897501960817  # of HalfNormal(1): where the tails have half of their mass
HALF_NORMAL_MEAN = math.sqrt(2 / math.pi)
SQRT_HALF = math.sqrt(0.5)


class RiemannDistribution(Distribution):
    """The law of loc + scale * Y, where Y has a density of bars with half-normal tails.

    Args:
        logits: of the bars, ``(*batch, K)``, K >= 3; their softmax is taken.
        borders: of the bars of Y, ``(K + 1,)``, rising.
        loc: broadcasts with the batch.
        scale: > 0, broadcasts with the batch.

    Raises:
        DataError: if borders do not rise or do not fit the logits, or a scale is not positive.
    """

    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        logits: Float[Tensor, "*batch bars"],
        borders: Float[Tensor, " borders"],
        loc: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
    ) -> None:
        self.borders = check_borders(borders, logits.shape[-1]).to(logits)
        self.loc, self.scale = torch.as_tensor(loc).to(logits), torch.as_tensor(scale).to(logits)
        if not bool((self.scale > 0).all()):
            raise DataError("the scale of a Riemann distribution must be positive.")
        batch = torch.broadcast_shapes(logits.shape[:-1], self.loc.shape, self.scale.shape)
        self.log_probs = logits.log_softmax(-1).expand(*batch, logits.shape[-1])
        super().__init__(batch, validate_args=False)

    # -- the bars of Y -----------------------------------------------------------------------------------

    @property
    def probs(self) -> Tensor:
        """Probabilities of the bars, ``(*batch, K)``."""
        return self.log_probs.exp()

    @property
    def widths(self) -> Tensor:
        """Widths of the bars of Y, ``(K,)``."""
        return self.borders.diff()

    @property
    def _tails(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the tails of Y begin, and their scales: lower start and scale, upper start and scale."""
        scales = self.widths[[0, -1]] / HALF_NORMAL_MEDIAN
        return self.borders[1], scales[0], self.borders[-2], scales[1]

    # -- moments -----------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        """sum_k p_k m_k, with the means m_k of the single bars."""
        return self.loc + self.scale * (self.probs * self._bar_means()).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Variance within the bars, and of their means."""
        within = self.widths.square() / 12
        _, low_scale, _, high_scale = self._tails
        ends = torch.stack([low_scale, high_scale]).square() * (1 - HALF_NORMAL_MEAN**2)
        within = torch.cat([ends[:1], within[1:-1], ends[1:]])
        means = self._bar_means()
        centred = means - (self.probs * means).sum(-1, keepdim=True)
        return self.scale.square() * (self.probs * (within + centred.square())).sum(-1)

    def _bar_means(self) -> Tensor:
        low, low_scale, high, high_scale = self._tails
        middles = (self.borders[1:] + self.borders[:-1]) / 2
        first = (low - low_scale * HALF_NORMAL_MEAN)[None]
        last = (high + high_scale * HALF_NORMAL_MEAN)[None]
        return torch.cat([first, middles[1:-1], last])

    # -- density and quantiles ---------------------------------------------------------------------------

    def log_prob(self, value: Tensor | float) -> Tensor:
        """Log density; finite everywhere."""
        y = self._standard(value)
        bar = self._bar(y)
        low, low_scale, high, high_scale = self._tails
        inside = -self.widths.log()[bar]
        below, above = _half_normal_log_prob(low - y, low_scale), _half_normal_log_prob(y - high, high_scale)
        density = torch.where(y < low, below, torch.where(y >= high, above, inside))
        return _pick(self.log_probs, bar) + density - self.scale.log()

    def cdf(self, value: Tensor | float) -> Tensor:
        """P(loc + scale Y <= value)."""
        y = self._standard(value)
        bar = self._bar(y)
        low, low_scale, high, high_scale = self._tails
        share = (y - self.borders[bar]) / self.widths[bar]
        below = torch.erfc((low - y).clamp_min(0) / low_scale * SQRT_HALF)
        above = torch.erf((y - high).clamp_min(0) / high_scale * SQRT_HALF)
        share = torch.where(y < low, below, torch.where(y >= high, above, share))
        return _pick(self._probs_before(), bar) + _pick(self.probs, bar) * share

    def icdf(self, value: Tensor | float) -> Tensor:
        """The quantile at probability `value`: linear inside bars, half-normal in the tails."""
        u = torch.as_tensor(value).to(self.log_probs)
        u = u.expand(torch.broadcast_shapes(u.shape, self.batch_shape))
        before, probs = self._probs_before(), self.probs
        bar = _last_not_above(before, u, len(self.batch_shape))
        tiny = torch.finfo(probs.dtype).tiny
        share = ((u - _pick(before, bar)) / _pick(probs, bar).clamp_min(tiny)).clamp(0, 1)
        low, low_scale, high, high_scale = self._tails
        inside = self.borders[bar] + self.widths[bar] * share
        first, last = bar == 0, bar == probs.shape[-1] - 1
        # The unused branches get a harmless argument: infinity times a gradient of zero would be NaN.
        below = low - low_scale * _half_normal_icdf(torch.where(first, 1 - share, 0.5))
        above = high + high_scale * _half_normal_icdf(torch.where(last, share, 0.5))
        return self.loc + self.scale * torch.where(first, below, torch.where(last, above, inside))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch)`` by inverse cdf, differentiable in logits, loc and scale."""
        shape = self._extended_shape(torch.Size(sample_shape))
        edge = torch.finfo(self.log_probs.dtype).eps
        uniform = torch.rand(shape, dtype=self.log_probs.dtype, device=self.log_probs.device)
        return self.icdf(uniform.clamp(edge, 1 - edge))

    def expand(self, batch_shape: Any, _instance: Any = None) -> RiemannDistribution:
        """The same law with its batch dimensions broadcast to `batch_shape`."""
        logits = self.log_probs.expand(*batch_shape, self.log_probs.shape[-1])
        return RiemannDistribution(logits, self.borders, self.loc, self.scale)

    # -- decisions ---------------------------------------------------------------------------------------

    def ei(self, best: Tensor | float, *, maximize: bool = True) -> Tensor:
        """Expected improvement over the incumbent, in closed form.

        Args:
            best: the incumbent's value, broadcasts with the batch.
            maximize: improvement is to be larger than `best`; otherwise smaller.

        Returns:
            E max(Y - best, 0), or E max(best - Y, 0), of shape ``batch``.
        """
        f = self._standard(best)[..., None]
        low, low_scale, high, high_scale = self._tails
        left, right = self.borders[:-1], self.borders[1:]
        cut = f.clamp(min=left, max=right)
        gain = (right - cut).square() / (2 * self.widths) + (cut - f).clamp_min(0) * (
            right - cut
        ) / self.widths
        first = low_scale * _gain_below((low - f) / low_scale)
        last = high_scale * _gain_above((f - high) / high_scale)
        gain = torch.cat([first, gain[..., 1:-1], last], -1)
        improvement = self.scale * (self.probs * gain).sum(-1)
        # E max(f - Y, 0) = E max(Y - f, 0) + f - E Y.
        return improvement if maximize else improvement + torch.as_tensor(best).to(self.scale) - self.mean

    # -- helpers -----------------------------------------------------------------------------------------

    def _standard(self, value: Tensor | float) -> Tensor:
        """The value of Y, in the shape of the result."""
        y = (torch.as_tensor(value).to(self.log_probs) - self.loc) / self.scale
        return y.expand(torch.broadcast_shapes(y.shape, self.batch_shape))

    def _bar(self, y: Tensor) -> Tensor:
        """Index of the bar that a value falls into; the outer bars have no end."""
        return torch.bucketize(y.detach().contiguous(), self.borders[1:-1], right=True)

    def _probs_before(self) -> Tensor:
        """Probability below the beginning of each bar, ``(*batch, K)``."""
        probs = self.probs
        return probs.cumsum(-1) - probs


def quantile_borders(targets: Float[Tensor, " n"], bars: int) -> Float[Tensor, " borders"]:
    """Borders between which equally many of the targets fall.

    Args:
        targets: a large sample of the prior's targets, at least ten for each bar.
        bars: K >= 3.

    Returns:
        ``(K + 1,)`` in float64. The inner ones are the k/K-quantiles, the outermost those of 0.5/K and
        1 - 0.5/K, since half of a tail lies beyond its border.

    Raises:
        DataError: if there are too few targets, or so many equal ones that a bar has no width.
    """
    if bars < 3 or targets.numel() < 10 * bars:
        raise DataError(
            f"{targets.numel()} targets make no {bars} bars; give at least 3 bars and 10 targets for each."
        )
    ordered = targets.detach().flatten().double().sort().values
    quantile = torch.linspace(0, 1, bars + 1, dtype=torch.float64)
    quantile[0], quantile[-1] = 0.5 / bars, 1 - 0.5 / bars
    position = quantile * (len(ordered) - 1)
    below = position.long().clamp(max=len(ordered) - 2)
    borders = torch.lerp(ordered[below], ordered[below + 1], position - below)
    if not bool((borders.diff() > 0).all()):
        raise DataError(
            f"the prior's targets hold too many equal values for {bars} bars; take fewer bars, or the head "
            '"categorical" for targets that are classes.'
        )
    return borders


def check_borders(borders: Tensor, bars: int) -> Tensor:
    """The borders themselves.

    Raises:
        DataError: if they are not ``(bars + 1,)``, finite and rising, or there are fewer than three bars.
    """
    if borders.shape != (bars + 1,) or bars < 3:
        raise DataError(
            f"borders have shape {tuple(borders.shape)} for {bars} bars; give at least 3 bars and "
            "one border more."
        )
    if not bool(borders.isfinite().all() and (borders.diff() > 0).all()):
        raise DataError(
            "the borders of the bars must be finite and rise; take quantile_borders of the targets."
        )
    return borders


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index] along the last dimension, the batch broadcast with the index."""
    return values.expand(*index.shape, values.shape[-1]).gather(-1, index[..., None])[..., 0]


def _last_not_above(table: Tensor, u: Tensor, batch_dims: int) -> Tensor:
    """In each row of a table of rising numbers, the index of the last that is not above u."""
    batch, n = u.shape[u.ndim - batch_dims :], table.shape[-1]
    rows = table.expand(*batch, n).reshape(-1, n).contiguous()
    columns = u.reshape(-1, len(rows)).mT.contiguous()  # one row of queries for each row of the table
    found = torch.searchsorted(rows.detach(), columns.detach(), right=True) - 1
    return found.mT.reshape(u.shape).clamp(0, n - 1)


def _half_normal_log_prob(distance: Tensor, scale: Tensor) -> Tensor:
    z = distance.clamp_min(0) / scale
    return math.log(2) - 0.5 * math.log(2 * math.pi) - scale.log() - z.square() / 2


def _half_normal_icdf(probability: Tensor) -> Tensor:
    edge = torch.finfo(probability.dtype).eps
    return torch.special.ndtri((1 + probability.clamp(0, 1 - edge)) / 2)


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _gain_above(t: Tensor) -> Tensor:
    """E max(|Z| - t, 0) of a standard normal Z."""
    positive = t.clamp_min(0)
    beyond = 2 * (_phi(positive) - positive * torch.special.ndtr(-positive))
    return torch.where(t < 0, HALF_NORMAL_MEAN - t, beyond)


def _gain_below(t: Tensor) -> Tensor:
    """E max(t - |Z|, 0) of a standard normal Z."""
    t = t.clamp_min(0)
    return 2 * (t * (torch.special.ndtr(t) - 0.5) - (_phi(torch.zeros_like(t)) - _phi(t)))
