"""The Ising lattice: both models trained on the energy alone, everything compared with the truth."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure
from scipy.stats import pearsonr
from torch import Tensor

from paperback.density.marginalization import AnyOrderARM, IsingEnergy, MarginalizationModel
from paperback.density.marginalization.objectives import Objective
from paperback.density.studies.marginalization.answers import TrainingClock, log_prob
from paperback.numerics.enumeration import joint_states, kl_divergence
from paperback.numerics.spins import colour, gibbs_sweep, ising_to_potts
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, REFERENCE, WIDE, direct_labels, style
from paperback.training import History

ARM_STEPS_PER_ROUND = 10


@dataclass
class Truth:
    """A lattice, summed out."""

    energy: IsingEnergy
    states: Int[Tensor, " states variables"]
    log_p: Float[Tensor, " states"]
    log_z: float
    rows: Int[Tensor, " queries variables"]  # random subsets of random rows, and their log marginals
    observed: Bool[Tensor, " queries variables"]
    log_marginals: Float[Tensor, " queries"]
    by_product: Float[Tensor, " queries"]  # the same by the product of the true marginals of each spin


@dataclass
class Lattice:
    """What one seed gave on the lattice."""

    truth: Truth
    scores: dict[str, dict[str, float]]  # model -> measure -> value
    predicted: Float[Tensor, " queries"]
    curve: dict[str, tuple[list[float], list[float]]]  # model -> seconds, divergence
    mean_field: float
    log_z: float
    cost: list[dict[str, str | float]]  # of training either model, in seconds of the processor


def _sum_out(side: int, sigma: float, bias: float, n_queries: int, seed: int) -> Truth:
    energy = IsingEnergy.lattice(side, sigma, bias)
    n = side * side
    states = torch.cat(list(joint_states((2,) * n)))
    weight = energy(states).double()
    log_p = weight.log_softmax(0)
    draws = torch.Generator().manual_seed(seed)
    rows = states[torch.multinomial(log_p.exp(), n_queries, generator=draws, replacement=True)]
    size = torch.randint(1, n, (n_queries, 1), generator=draws)
    observed = torch.rand(n_queries, n, generator=draws).argsort(1) < size
    pairs = zip(rows, observed, strict=True)
    exact = [log_p[(states[:, mask] == row[mask]).all(1)].logsumexp(0) for row, mask in pairs]
    on = (log_p.exp()[:, None] * states).sum(0)
    single = torch.where(rows == 1, on, 1 - on).log()
    return Truth(
        energy=energy,
        states=states,
        log_p=log_p,
        log_z=float(weight.logsumexp(0)),
        rows=rows,
        observed=observed,
        log_marginals=torch.stack(exact),
        by_product=(single * observed).sum(1),
    )


def _head_divergence(model: Any, truth: Truth) -> tuple[float, float]:
    """KL(normalised head || p), and the log of the sum of the head's probabilities."""
    log_q = model.log_prob(truth.states).double()
    return float(kl_divergence(log_q.log_softmax(0), truth.log_p)), float(log_q.logsumexp(0))


def train_on_lattice(run: Run, seed: int) -> Lattice:
    side, n_queries = run.size(smoke=3, standard=4), run.size(smoke=40, standard=200)
    truth = _sum_out(side, 0.15, 0.0, n_queries, seed)
    divergence: list[float] = []
    clock = TrainingClock(lambda model, history: divergence.append(_head_divergence(model.eval(), truth)[0]))
    model = _lattice_model(run, truth, seed, "kl", clock)
    arm, arm_clock, arm_divergence = _rival(run, truth, seed, sum(clock.seconds))
    scores = {"KL objective": _lattice_scores(model, truth)}
    if seed == run.seed and run.size(smoke=True, quick=False, standard=True):
        scores["FM objective"] = _lattice_scores(_lattice_model(run, truth, seed, "fm"), truth)
        easy = _sum_out(side, 0.1, 0.2, n_queries, seed)
        scores["KL objective, sigma .1, bias .2"] = _lattice_scores(
            _lattice_model(run, easy, seed, "kl"), easy
        )
        scores["product of true marginals, sigma .1, bias .2"] = _marginal_errors(easy.by_product, easy)
    scores["any-order ARM, equal seconds"] = _rival_scores(arm, truth)
    scores["product of true marginals"] = _marginal_errors(truth.by_product, truth)
    scores["Gibbs sampler, equal seconds"] = _gibbs_moments(truth, sum(clock.seconds), seed)
    return Lattice(
        truth=truth,
        scores=scores,
        predicted=model.log_prob(truth.rows, truth.observed).double(),
        curve={
            "marginalization model": (list(np.cumsum(clock.seconds)), divergence),
            "any-order ARM": (list(np.cumsum(arm_clock.seconds)), arm_divergence),
        },
        mean_field=_mean_field_divergence(truth),
        log_z=model.log_partition(run.size(smoke=200, standard=2000)).value,
        cost=[
            _cost("marginalization model", clock, _steps_per_round(run)),
            _cost("any-order ARM", arm_clock, ARM_STEPS_PER_ROUND),
        ],
    )


def _steps_per_round(run: Run) -> int:
    return run.size(smoke=20, standard=100)


def _cost(name: str, clock: TrainingClock, steps_per_round: int) -> dict[str, str | float]:
    return {
        "model": name,
        "seconds per step": float(np.median(clock.seconds)) / steps_per_round,
        "steps": len(clock.seconds) * steps_per_round,
        "seconds": sum(clock.seconds),
    }


def _lattice_model(
    run: Run, truth: Truth, seed: int, objective: Objective, clock: TrainingClock | None = None
) -> MarginalizationModel:
    """Train on the energy."""
    model = MarginalizationModel(truth.states.shape[1], 2, hidden=192, n_blocks=2, seed=seed)
    return model.fit_energy(
        truth.energy,
        steps=run.size(smoke=40, quick=1200, standard=2400),
        objective=objective,
        alpha=4.0 if objective == "kl" else 1.0,
        batch_size=192,
        lr=1e-3,
        refill_every=_steps_per_round(run),
        seed=seed,
        progress=run.progress,
        callbacks=[] if clock is None else [clock],
    )


def _rival(
    run: Run, truth: Truth, seed: int, seconds: float
) -> tuple[AnyOrderARM, TrainingClock, list[float]]:
    """The autoregressive model with the same trunk, trained on the energy for as many seconds."""
    settings: dict[str, Any] = {
        "batch_size": 192,
        "lr": 1e-3,
        "seed": seed,
        "progress": run.progress,
        "steps_per_epoch": ARM_STEPS_PER_ROUND,
    }

    def build() -> AnyOrderARM:
        return AnyOrderARM(truth.states.shape[1], 2, hidden=192, n_blocks=2, n_orders=1, seed=seed)

    pilot = TrainingClock()
    build().fit_energy(truth.energy, steps=4 * ARM_STEPS_PER_ROUND, callbacks=[pilot], **settings)
    steps = max(1, round(seconds / float(np.median(pilot.seconds)))) * ARM_STEPS_PER_ROUND
    divergence: list[float] = []

    def note(model: torch.nn.Module, history: History) -> None:
        # The mean log ratio on the model's own samples is minus log Z plus the divergence, without bias.
        divergence.append(history.terms["log_ratio"][-1] + truth.log_z)

    clock = TrainingClock(note)
    arm = build().fit_energy(truth.energy, steps=steps, callbacks=[clock], **settings)
    return arm, clock, divergence


def _marginal_errors(predicted: Tensor, truth: Truth) -> dict[str, float]:
    return {
        "mean error of log marginals": float((predicted - truth.log_marginals).abs().mean()),
        "Pearson": float(pearsonr(predicted, truth.log_marginals).statistic),
    }


def _lattice_scores(model: MarginalizationModel, truth: Truth) -> dict[str, float]:
    divergence, total = _head_divergence(model, truth)
    by_conditionals = model.log_prob(truth.states, exact=True, n_orders=1).double()
    samples = model.sample(4000, torch.Generator().manual_seed(0))
    return {
        "KL": divergence,
        "log of the head's sum": total,
        "KL of the conditionals": float(kl_divergence(by_conditionals, truth.log_p)),
        **_marginal_errors(model.log_prob(truth.rows, truth.observed).double(), truth),
        "one-step residual": float(model.consistency),
        **_moment_errors(samples, truth),
    }


def _rival_scores(arm: AnyOrderARM, truth: Truth) -> dict[str, float]:
    log_q = log_prob(arm, truth.states).double()
    return {
        "KL of the conditionals": float(kl_divergence(log_q, truth.log_p)),
        **_marginal_errors(log_prob(arm, truth.rows, truth.observed).double(), truth),
        **_moment_errors(arm.sample(4000), truth),
    }


def _moment_errors(samples: Int[Tensor, " samples variables"], truth: Truth) -> dict[str, float]:
    """Largest |E s_i - exact|, and the mean error of the correlations along edges."""
    edges = truth.energy.couplings.nonzero(as_tuple=True)
    p = truth.log_p.exp()

    def moments(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        spins = 2.0 * states.double() - 1
        weighted = spins * weight[:, None]
        return weighted.sum(0), (weighted.T @ spins)[edges]

    exact, found = moments(truth.states, p), moments(samples, torch.full((len(samples),), 1.0 / len(samples)))
    return {
        "largest error of a mean spin": float((found[0] - exact[0]).abs().max()),
        "mean error of an edge": float((found[1] - exact[1]).abs().mean()),
    }


def _gibbs_moments(truth: Truth, seconds: float, seed: int) -> dict[str, float]:
    """4,000 chains of the exact Gibbs sampler, for at most as many seconds and 100 sweeps."""
    couplings, bias = ising_to_potts(truth.energy.couplings, truth.energy.field)
    draws = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 2, (4000, truth.states.shape[1]), generator=draws)
    colours = colour(truth.energy.couplings != 0)
    start = time.perf_counter()
    for _ in range(100):
        states = gibbs_sweep(states, couplings, bias, colours, draws)
        if time.perf_counter() - start > seconds:
            break
    return _moment_errors(states, truth)


def _mean_field_divergence(truth: Truth) -> float:
    """KL(q || p) of the best product distribution, by fixed-point iteration from several starts."""
    couplings, bias = truth.energy.couplings.double(), truth.energy.field.double()
    best = math.inf
    for start in (0.0, 0.5, -0.5):
        m = torch.full_like(bias, start)
        for _ in range(500):
            m = 0.5 * m + 0.5 * torch.tanh(couplings @ m + bias)
        on = ((1 + m) / 2).clamp(1e-12, 1 - 1e-12)
        entropy = -(on * on.log() + (1 - on) * (1 - on).log()).sum()
        best = min(best, float(truth.log_z - entropy - 0.5 * m @ couplings @ m - bias @ m))
    return best


def report_lattice(run: Run, lattices: list[Lattice]) -> None:
    first = lattices[0]
    rows = [{"model": name, **scores} for name, scores in first.scores.items()]
    run.table(
        "lattice",
        [{"model": "mean field", "KL": first.mean_field}, *rows],
        caption="Ising lattice, sigma .15 without field where nothing else is said; first seed. KL(q || p) "
        "and log marginals of random subsets in nats, against exact enumeration.",
    )
    run.table("steps", first.cost, caption="Training on the energy with equal batches, in seconds of the "
              "processor; first seed.")  # fmt: skip
    energy = "close to the any-order ARM in KL, D-fold cheaper"

    def each(measure: str) -> list[float]:
        return [lattice.scores["KL objective"][measure] for lattice in lattices]

    run.claim("the marginal head is close to the target of an energy", paper=energy,
              measured=each("KL"), at_most=0.35, unit="nats")  # fmt: skip
    run.claim("its divergence is at most a third of mean field's", paper="not reported",
              measured=[k / lattice.mean_field for k, lattice in zip(each("KL"), lattices, strict=True)],
              at_most=1 / 3)  # fmt: skip
    run.claim("log marginals of random subsets correlate with the exact ones", paper="0.99 and more",
              measured=each("Pearson"), at_least=0.97)  # fmt: skip
    run.claim("log marginals of random subsets are right", paper="not reported",
              measured=each("mean error of log marginals"), at_most=0.45, unit="nats")  # fmt: skip
    product = [o.scores["product of true marginals"]["mean error of log marginals"] for o in lattices]
    run.claim("random subsets have at most half the error of the product of the true marginals",
              paper="not reported", at_most=0.5,
              measured=[a / b for a, b in zip(each("mean error of log marginals"), product, strict=True)],
              note="If it were 1 or more, the marginals would be worth nothing.")  # fmt: skip
    run.claim("log Z is found", paper="not reported", at_most=0.4, unit="nats",
              measured=[abs(lattice.log_z - lattice.truth.log_z) for lattice in lattices])  # fmt: skip
    run.claim("both signs of the spins are found alike", paper="not reported", at_most=0.08,
              measured=each("largest error of a mean spin"))  # fmt: skip
    rival = [o.scores["any-order ARM, equal seconds"]["KL of the conditionals"] for o in lattices]
    run.claim("at equal seconds it diverges less than the any-order ARM", paper=energy,
              measured=each("KL"), baseline=rival, at_most=0.0, unit="nats",
              note="The ARM's KL is that of one order. At D = 16 its step costs four times as much, "
              "not many times.")  # fmt: skip
    run.claim("at equal seconds its conditionals, which draw the samples, diverge less than the any-order "
              "ARM's", paper=energy,
              measured=each("KL of the conditionals"), baseline=rival, at_most=0.0, unit="nats",
              note="Along one order each. The conditionals learn by self-consistency only.")  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2)
        ends = [float(first.truth.log_marginals.min()), 0.0]
        left.plot(ends, ends, color=REFERENCE, linewidth=1)
        left.plot(first.truth.log_marginals, first.truth.by_product, ".", color=BASELINE, alpha=0.6)
        left.plot(first.truth.log_marginals, first.predicted, ".", color=METHOD, alpha=0.8)
        left.locator_params(nbins=5)
        left.set(xlabel="exact log marginal", ylabel="predicted", title="Random subsets")
        for (name, (seconds, divergence)), shade in zip(first.curve.items(), (METHOD, BASELINE), strict=True):
            right.semilogy(seconds, np.maximum(divergence, 1e-3), color=shade, label=name)
        right.axhline(first.mean_field, color=REFERENCE, linewidth=1)
        right.set(xlabel="seconds of training (processor)", title="KL to the target, nats")
        direct_labels(right)
    run.figure(
        "lattice",
        figure,
        "Left: log marginals of random subsets by the head (blue) and by the product of the true one-spin "
        "marginals (orange). Right: divergence from the target; the grey line is mean field.",
        "Scatter of predicted against exact log marginals, the head's close to the diagonal; two falling "
        "curves of divergence against seconds.",
    )
