"""What a restricted Boltzmann machine believes about the unobserved part: Gibbs and two mean fields.

"gibbs" is exact in the limit of many sweeps. "meanfield" alternates between the visible side and the hidden
side; each half is an exact block minimisation of the variational free energy, so it converges, but to one of
possibly many minima. "parallel" updates both sides at once from the previous values, as textbooks write it:
two alternating sequences in one, and where they head for different minima it swaps them for ever. That is
reported, not hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.baselines.rbm.energy import Weights, bernoulli, draw_one_hot

Inference = Literal["gibbs", "meanfield", "parallel"]

Beliefs = tuple[
    Tensor, Tensor, Tensor
]  # visible (batch, variables, states), label (batch, classes), hidden (batch, hidden)


@dataclass(frozen=True)
class Posterior:
    """Marginals given the observed part.

    Attributes:
        visible: ``(batch, variables, states)``, one-hot where observed.
        label: ``(batch, classes)``; no columns without classes.
        hidden: ``(batch, hidden)``, the probability that a unit is on.
        iterations: updates (mean field) or sweeps (Gibbs) of each row, ``(batch,)``.
        residual: largest change of any marginal in the last update; for Gibbs the largest difference between
            the averages of the first and the second half of the sweeps. ``(batch,)``.
        converged: whether the residual of a row came below the tolerance, ``(batch,)``.
    """

    visible: Float[Tensor, "batch variables states"]
    label: Float[Tensor, "batch classes"]
    hidden: Float[Tensor, "batch hidden"]
    iterations: Int[Tensor, " batch"]
    residual: Float[Tensor, " batch"]
    converged: Bool[Tensor, " batch"]

    @staticmethod
    def join(parts: list[Posterior]) -> Posterior:
        """The rows of several posteriors, one after the other."""
        names = ("visible", "label", "hidden", "iterations", "residual", "converged")
        return Posterior(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def mean_field(
    weights: Weights,
    known: Float[Tensor, "batch variables states"],
    observed: Bool[Tensor, "batch variables"],
    *,
    parallel: bool,
    max_iterations: int,
    tolerance: float,
    start: Beliefs,
) -> Posterior:
    """Iterate the mean-field equations, each row until its largest change is at most the tolerance.

    Args:
        weights: the machine.
        known: one-hot states; read where observed.
        observed: mask of the known variables.
        parallel: update both sides from the previous values, instead of one after the other.
        max_iterations: at most so many updates.
        tolerance: of the largest change of any marginal.
        start: first values; read where not observed. The hidden ones play a role for parallel updates only.

    Returns:
        Marginals, with iterations, residuals and which rows converged.
    """
    n = len(known)
    beliefs: Beliefs = (torch.where(observed[..., None], known, start[0]), start[1].clone(), start[2].clone())
    iterations = torch.zeros(n, dtype=torch.int64, device=known.device)
    residual = known.new_full((n,), torch.inf)
    active = torch.arange(n, device=known.device)
    for _ in range(max_iterations):
        if len(active) == 0:
            break
        old: Beliefs = (beliefs[0][active], beliefs[1][active], beliefs[2][active])
        hidden = weights.hidden_input(old[0].flatten(1), old[1]).sigmoid()
        new: Beliefs = (
            *_visible_given(weights, old[2] if parallel else hidden, known[active], observed[active]),
            hidden,
        )
        change = torch.stack([_largest(a - b) for a, b in zip(new, old, strict=True)]).amax(0)
        for whole, part in zip(beliefs, new, strict=True):
            whole[active] = part
        iterations[active] += 1
        residual[active] = change
        active = active[change > tolerance]
    return Posterior(*beliefs, iterations, residual, residual <= tolerance)


def gibbs(
    weights: Weights,
    known: Float[Tensor, "batch variables states"],
    observed: Bool[Tensor, "batch variables"],
    *,
    n_sweeps: int,
    burn_in: int,
    n_chains: int,
    tolerance: float,
    generator: torch.Generator,
) -> Posterior:
    """Average p(v | h), p(y | h) and p(h | v, y) over Gibbs sweeps with the observed part held fixed.

    Averaging conditionals instead of draws (Rao-Blackwell) has the same mean and less variance.

    Args:
        weights: the machine.
        known: one-hot states; read where observed.
        observed: mask of the known variables.
        n_sweeps: sweeps of each chain that are averaged, >= 2.
        burn_in: sweeps before them.
        n_chains: independent chains for each row.
        tolerance: of the difference between the two halves, for the report only.
        generator: source of randomness.

    Returns:
        Marginals; the residual is the difference between the two halves.
    """
    n, n_hidden = len(known), len(weights.hidden_bias)
    known_all, observed_all = known.repeat(n_chains, 1, 1), observed.repeat(n_chains, 1)
    start = torch.rand(n * n_chains, n_hidden, generator=generator, dtype=known.dtype, device=known.device)
    hidden = bernoulli(start, generator)
    halves: list[list[Tensor]] = []
    for sweep in range(burn_in + n_sweeps):
        visible, label = _visible_given(weights, hidden, known_all, observed_all)
        v, y = draw_one_hot(visible, label, generator)
        belief = weights.hidden_input(v, y).sigmoid()
        hidden = bernoulli(belief, generator)
        if sweep in (burn_in, burn_in + n_sweeps // 2):
            halves.append([torch.zeros_like(t) for t in (visible, label, belief)])
        if sweep >= burn_in:
            for total, part in zip(halves[-1], (visible, label, belief), strict=True):
                total += part
    lengths = (n_sweeps // 2, n_sweeps - n_sweeps // 2)
    means = [
        [_over_chains(total, n_chains) / length for total in half]
        for half, length in zip(halves, lengths, strict=True)
    ]
    averages = [(lengths[0] * a + lengths[1] * b) / n_sweeps for a, b in zip(*means, strict=True)]
    residual = torch.stack([_largest(a - b) for a, b in zip(*means, strict=True)]).amax(0)
    iterations = torch.full((n,), burn_in + n_sweeps, device=known.device)
    return Posterior(averages[0], averages[1], averages[2], iterations, residual, residual <= tolerance)


def _visible_given(
    weights: Weights, hidden: Tensor, known: Tensor, observed: Tensor
) -> tuple[Tensor, Tensor]:
    """Visible marginals and class marginals given hidden values, the observed ones held fixed."""
    visible = torch.where(observed[..., None], known, weights.visible_logits(hidden).softmax(-1))
    return visible, weights.label_logits(hidden).softmax(-1)


def _largest(difference: Tensor) -> Tensor:
    """Largest absolute entry of each row; 0 for rows without entries."""
    flat = difference.flatten(1).abs()
    return flat.amax(1) if flat.shape[1] else flat.sum(1)


def _over_chains(total: Tensor, n_chains: int) -> Tensor:
    return total.unflatten(0, (n_chains, -1)).mean(0)
