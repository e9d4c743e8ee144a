"""What a monotone deep Boltzmann machine is trained on: completion and classification from a random part
(paper, section 4), or likelihood.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.density.monotone_dbm import likelihood
from paperback.density.monotone_dbm.hollow import Coupling
from paperback.density.monotone_dbm.mean_field import ImplicitMeanField, solve
from paperback.numerics.fixed_point import FixedPoint

if TYPE_CHECKING:
    from paperback.density.monotone_dbm.model import MonotoneDBM

FOCAL_GAMMA = 2.0
BALANCE_BETA = 0.9999
BACKWARD_TOL = 1e-4
BACKWARD_STEPS = 60  # 10 to 20 are needed; couplings that are not monotone may need more, or never end


def balanced_weights(targets: Int[Tensor, " count"], n_states: int) -> Float[Tensor, " states"]:
    """Class-balanced weights (1 - beta) / (1 - beta^count) from the counts in this batch; a state that is
    absent counts as one.
    """
    counts = torch.bincount(targets, minlength=n_states).clamp(min=1)
    return (1.0 - BALANCE_BETA) / (1.0 - BALANCE_BETA ** counts.double())


def balanced_focal_loss(
    logits: Float[Tensor, "count states"], targets: Int[Tensor, " count"]
) -> Float[Tensor, ""]:
    """Focal cross-entropy -(1 - p)^gamma log p, weighted so that rare states count as much as frequent ones;
    weighted mean.

    Source: Cui et al., Class-balanced loss (2019), as the paper's section 4 uses it.
    """
    log_p = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    weights = balanced_weights(targets, logits.shape[-1]).to(logits)[targets]
    return -(weights * (1.0 - log_p.exp()) ** FOCAL_GAMMA * log_p).sum() / weights.sum()


def imputation_loss(
    model: MonotoneDBM, batch: tuple[Tensor, ...], generator: torch.Generator
) -> Float[Tensor, ""]:
    """Draw a mask, solve, score the read-out on what was hidden: (1 - w) completion + w classification."""
    states, labels = batch[0], batch[1] if len(batch) > 1 else None
    draw = torch.rand(states.shape, generator=generator, device=generator.device)
    observed = draw.to(states.device) < model.obs_level
    logits = equilibrium_logits(model, states, observed)
    completion = completion_loss(model, logits, states, observed)
    if labels is None or model.structure.class_tier is None:
        return completion
    index = model.structure.slices[model.structure.class_tier]
    classification = F.cross_entropy(logits[:, index], labels)
    return torch.lerp(completion, classification, model.class_weight)


def equilibrium_logits(
    model: MonotoneDBM, states: Int[Tensor, "batch variables"], observed: Bool[Tensor, "batch variables"]
) -> Float[Tensor, "batch N"]:
    """Read-out logits tau^2 (Phi q* + b) at the mean-field solution, differentiable by the implicit function
    theorem.
    """
    coupling = model.hollow.coupling()
    fixed = coupling.detach()
    smallest = model.hollow.smallest_eigenvalue(fixed)
    known, flat = model._evidence(states, observed)
    problem = model.problem(fixed, smallest, known, flat)
    with torch.no_grad():
        q = solve(problem, model.solver, alpha=model.alpha, tol=model.tol, max_steps=model.max_steps).x
    if model.backward_solver == "cg":
        q = ImplicitMeanField.apply(coupling(q) + model.bias, q, problem, BACKWARD_TOL, BACKWARD_STEPS)
    else:
        layer = FixedPoint(
            lambda x: problem.clamp(model.structure.softmax(coupling(x) + model.bias)),
            tol=model.tol,
            backward_tol=BACKWARD_TOL,
            max_steps=model.max_steps,
        )
        q = layer(q)[0]
    return model._temper(coupling(q) + model.bias)


def completion_loss(
    model: MonotoneDBM, logits: Tensor, states: Tensor, observed: Tensor
) -> Float[Tensor, ""]:
    """Cross-entropy, plain or focal, of the read-out on the variables that were not observed; mean over
    them.
    """
    hidden = ~observed[:, model.order]
    targets = states[:, model.order]
    total, count, start = logits.new_zeros(()), 0, 0
    for tier, part in zip(model.structure.tiers, model.structure.split(logits), strict=True):
        if tier.role != "visible":
            continue
        columns = slice(start, start + tier.n_variables)
        start += tier.n_variables
        where = hidden[:, columns]
        own, aims = part.movedim(2, -1).flatten(1, 2)[where], targets[:, columns][where]
        if not len(aims):
            continue
        loss = balanced_focal_loss(own, aims) if model.loss == "focal" else F.cross_entropy(own, aims)
        total, count = total + loss * len(aims), count + len(aims)
    return total / max(count, 1)


class ContrastiveLoss:
    """Persistent contrastive divergence: the gradient of the likelihood, with Gibbs chains that live on
    between steps.

    The loss is E_data[-w] - E_chains[-w] with the log weight w(x) = 1/2 x'Phi x + b'x; hidden variables of
    the data are drawn from their mean field and one Gibbs sweep. Its value means nothing, its gradient is
    what counts.

    Args:
        n_chains: persistent chains.
        n_sweeps: Gibbs sweeps of the chains at each step.
    """

    def __init__(self, n_chains: int = 100, n_sweeps: int = 1) -> None:
        self.colouring: list[tuple[int, Tensor]] | None = None
        self.chains: Tensor | None = None
        self.n_chains, self.n_sweeps = n_chains, n_sweeps

    def __call__(self, model: MonotoneDBM, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        states, labels = batch[0], batch[1] if len(batch) > 1 else None
        coupling = model.hollow.coupling()
        fixed = coupling.detach()
        smallest = model.hollow.smallest_eigenvalue(fixed)
        known, flat = model._evidence(states, None, labels)
        data = model.problem(fixed, smallest, known, flat)
        nothing = torch.zeros(self.n_chains, model.structure.size, device=known.device)
        free = model.problem(fixed, smallest, nothing, nothing.bool())
        with torch.no_grad():
            if self.colouring is None:
                self.colouring = likelihood.colours(model.structure, fixed)
            q = solve(data, model.solver, alpha=model.alpha, tol=model.tol, max_steps=model.max_steps).x
            positive = likelihood.draw_independent(data, q, generator)
            positive = likelihood.gibbs_sweep(data, self.colouring)(positive, 1.0, generator)
            if self.chains is None:
                self.chains = likelihood.draw_independent(free, free.start(), generator)
            sweep = likelihood.gibbs_sweep(free, self.colouring)
            for _ in range(self.n_sweeps):
                self.chains = sweep(self.chains, 1.0, generator)
        return _mean_energy(coupling, model.bias, positive) - _mean_energy(coupling, model.bias, self.chains)


def _mean_energy(coupling: Coupling, bias: Tensor, x: Tensor) -> Tensor:
    return -(0.5 * (x * coupling(x)).sum(1) + x @ bias).mean()
