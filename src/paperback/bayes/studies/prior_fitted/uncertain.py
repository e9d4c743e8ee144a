"""Part two: hyper-parameters with a prior; quadrature is the truth, MLE-II and HMC are the rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch.distributions import Distribution

from paperback.bayes.samplers import Chains, effective_sample_size
from paperback.bayes.studies.prior_fitted.fixed import (
    MOST_ROWS,
    QUERIES,
    Task,
    fitted,
    loss_of,
    network_law,
    task_of,
)
from paperback.bayes.studies.prior_fitted.rivals import LogNormalGP, fit_mle2
from paperback.study import Run
from paperback.study.figures import PALETTE, WIDE, style
from paperback.training import generator

UNCERTAIN = LogNormalGP()


@dataclass
class Uncertain:
    """What one seed gave. Times are of the processor, for one data set.

    Attributes:
        loss: nats per query at five rows, for each model, over all test data sets.
        loss_of_few: the same over those that MLE-II was fitted to.
        together: seconds with all data sets in one batch, for each model and number of queries.
        alone: seconds of one data set by itself, 20 queries.
        effective: effective number of HMC's draws in the median data set.
    """

    loss: dict[str, float]
    loss_of_few: dict[str, float]
    together: dict[tuple[str, int], float]
    alone: dict[str, float]
    effective: float


def uncertain_gp(run: Run, seed: int, n: int = 5) -> Uncertain:
    """Fit a network, half as wide as in part one, and let all models predict after n rows."""
    prior = UNCERTAIN.prior()
    steps = run.size(smoke=10, quick=700, standard=4000)
    network = fitted(prior, steps, seed, lr=4e-3, d_model=32)
    models: dict[str, Callable[[Task], Distribution]] = {
        "network": network_law(network),
        "HMC": lambda task: UNCERTAIN.predict_from(_chains(run, seed, task).samples, *task),
        "quadrature": lambda task: UNCERTAIN.exact(*task),
    }
    many, few = run.size(smoke=(6, 3), quick=(200, 40), standard=(1000, 100))
    x, y = prior(many, MOST_ROWS + QUERIES, generator(seed, "test tasks"))
    task, truth = task_of(x, y, n), y[:, MOST_ROWS:].double()
    single = (task[0][:1], task[1][:1], task[2][:1])
    together: dict[tuple[str, int], float] = {}
    alone: dict[str, float] = {}
    loss: dict[str, float] = {}
    loss_of_few: dict[str, float] = {}
    for name, model in models.items():
        repeats = 10 if name == "network" else 1
        law, seconds = _timed(partial(model, task), repeats)
        together[name, QUERIES] = seconds / many
        _, seconds = _timed(partial(model, (task[0], task[1], task[2][:, :1])), repeats)
        together[name, 1] = seconds / many
        _, alone[name] = _timed(partial(model, single), 5 * repeats)
        losses = -law.log_prob(truth)
        loss[name], loss_of_few[name] = float(losses.mean()), float(losses[:few].mean())
    for name, with_priors in (("MLE-II", False), ("MAP", True)):  # gpytorch: one data set after the other
        start = time.process_time()
        fits = [
            fit_mle2(task[0][i], task[1][i], task[2][i], UNCERTAIN, with_priors=with_priors, seed=i)
            for i in range(few)
        ]
        alone[name] = (time.process_time() - start) / few
        loss_of_few[name] = float(np.mean([loss_of(fit, truth[i]) for i, fit in enumerate(fits)]))
    return Uncertain(loss, loss_of_few, together, alone, _effective(run, seed, task))


def _chains(run: Run, seed: int, task: Task) -> Chains:
    draws = {"samples": run.size(smoke=20, standard=500), "burn_in": run.size(smoke=20, standard=200)}
    return UNCERTAIN.sample_posterior(task[0], task[1], **draws, generator=generator(seed, "hmc"))


def _effective(run: Run, seed: int, task: Task) -> float:
    """Of the draws in a few data sets: the lesser of both hyper-parameters, in the median one."""
    some = (task[0][:50], task[1][:50], task[2][:50])
    samples = _chains(run, seed, some).samples
    each = effective_sample_size(samples.flatten(1)[:, None]).view(-1, 2)
    return float(each.amin(1).median())


def _timed(work: Callable[[], Distribution], repeats: int) -> tuple[Distribution, float]:
    """The law, and the least seconds of the processor over a few runs."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()  # wall time would measure what else the machine does
        law = work()
        seconds.append(time.process_time() - start)
    return law, min(seconds)


def report_uncertain(run: Run, seeds: Sequence[Uncertain]) -> None:
    """Table, claims and figure of part two."""

    def mean(values: Sequence[Mapping[Any, float]], name: Any) -> float | None:
        return float(np.mean([value[name] for value in values])) if name in values[0] else None

    names = list(seeds[0].loss_of_few)
    run.table(
        "hyper-priors",
        [
            {
                "model": name,
                "loss": mean([one.loss for one in seeds], name),
                "loss, data sets of MLE-II": mean([one.loss_of_few for one in seeds], name),
                f"ms in a batch, {QUERIES} queries": _ms(
                    mean([one.together for one in seeds], (name, QUERIES))
                ),
                "ms in a batch, 1 query": _ms(mean([one.together for one in seeds], (name, 1))),
                f"ms alone, {QUERIES} queries": _ms(mean([one.alone for one in seeds], name)),
            }
            for name in names
        ],
        "Five rows, a Gaussian process with log-normal hyper-priors: nats per query, and milliseconds of the "
        "processor for one data set, mean over seeds. MLE-II and MAP are three runs of "
        "L-BFGS by gpytorch, one data set after the other.",
    )
    effective = float(np.mean([one.effective for one in seeds]))
    run.note(
        f"HMC keeps 500 draws per data set; the median data set has {effective:.0f} effective ones. It draws "
        "both hyper-parameters only, the function is integrated exactly, which is its fastest form."
    )
    few = [one.loss_of_few for one in seeds]
    run.claim(
        "on five rows the network predicts at least as well as MLE-II",
        paper="better than MLE-II, equal to NUTS",
        measured=[loss["network"] for loss in few], baseline=[loss["MLE-II"] for loss in few],
        at_most=0.0, unit="nats",
    )  # fmt: skip
    run.claim(
        "on five rows the network is near the exact posterior under hyper-priors",
        paper="equal to NUTS",
        measured=[one.loss["network"] for one in seeds],
        baseline=[one.loss["quadrature"] for one in seeds],
        at_most=0.12, unit="nats",
    )  # fmt: skip
    times: dict[str, list[float]] = {
        "one data set by itself, 20 queries": [one.alone["HMC"] / one.alone["network"] for one in seeds],
        "many data sets in one batch, a query each": [_ratio(one, 1) for one in seeds],
        "many data sets in one batch, 20 queries each": [_ratio(one, QUERIES) for one in seeds],
    }
    for where, ratios in times.items():
        run.claim(
            f"a prediction is at least 200 times as fast as HMC: {where}",
            paper="more than 200 times as fast as NUTS, up to thousands",
            measured=ratios, at_least=200.0, unit="times",
            note="Both on one processor; the training of the network, done once for a prior, is not counted. "
            "In a batch HMC runs the chains of all data sets side by side, which the paper's NUTS does not.",
        )  # fmt: skip
    _draw_cost(run, seeds)


def _ratio(one: Uncertain, queries: int) -> float:
    return one.together["HMC", queries] / one.together["network", queries]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _draw_cost(run: Run, seeds: Sequence[Uncertain]) -> None:
    colours = dict(zip(("network", "HMC", "MLE-II", "MAP", "quadrature"), PALETTE, strict=False))
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for name, colour in colours.items():
            loss = np.mean([one.loss_of_few[name] for one in seeds])
            for marker, costs in (
                ("o", [one.together[name, QUERIES] for one in seeds if (name, QUERIES) in one.together]),
                ("s", [one.alone[name] for one in seeds]),
            ):
                if not costs:  # gpytorch fits one data set after the other
                    continue
                label = name if marker == "s" else "_"
                axes.plot(1e3 * np.mean(costs), loss, marker, color=colour, markersize=8, label=label)
        axes.margins(y=0.1)
        figure.legend(loc="outside right upper")
        axes.set(
            xscale="log", xlabel="milliseconds of the processor for one data set", ylabel="nats per query"
        )
        axes.set_title("Loss against time on five rows")
    run.figure(
        "cost",
        figure,
        "Loss against the time of one data set, the same data sets for all. Circles: in a batch of many; "
        "squares: one by itself. Lower left is better.",
        "Scatter of nats against milliseconds on a logarithmic axis: the network lies far to the left of HMC "
        "and MLE-II.",
    )
