"""Part one: a Gaussian process with known hyper-parameters, whose posterior is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Distribution

from paperback.bayes.prior_fitted import PriorFittedTransformer, fit_prior, priors
from paperback.bayes.prior_fitted.exact import gp_posterior
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, direct_labels, style
from paperback.training import generator, seeded

SIZES = (2, 5, 10, 20)  # rows of the contexts that the network is judged at
MOST_ROWS, QUERIES = 20, 20
PRIOR = priors.GP(1, lengthscale=0.2, noise=0.01)

Task = tuple[Tensor, Tensor, Tensor]


@dataclass
class Fixed:
    """What one seed gave.

    Attributes:
        network: fully trained.
        loss: for each model, nats per query for each size of context.
    """

    network: PriorFittedTransformer
    loss: dict[str, list[float]]

    def gap(self, name: str) -> NDArray[np.float64]:
        """Nats above the exact posterior for each size of context."""
        return np.subtract(self.loss[name], self.loss["exact"])


def fixed_gp(run: Run, seed: int) -> Fixed:
    """Fit networks and measure all models on the same data sets, at each size of context."""
    few, steps = run.size(smoke=5, quick=200, standard=500), run.size(smoke=10, quick=700, standard=3000)
    network = fitted(PRIOR, steps, seed)
    models: dict[str, Callable[[Task], Distribution]] = {
        "network": network_law(network),
        "network, few steps": network_law(fitted(PRIOR, few, seed)),
        "exact": _exact_law(1.0),
        "lengthscale halved": _exact_law(0.5),
        "lengthscale doubled": _exact_law(2.0),
    }
    if seed == run.seed and run.budget != "quick":  # what is not claimed is measured once
        models["normal law"] = network_law(fitted(PRIOR, steps, seed, head="gaussian"))
        models["no attention to itself"] = network_law(fitted(PRIOR, steps, seed, query_attends_self=False))
    x, y = PRIOR(run.size(smoke=20, standard=2000), MOST_ROWS + QUERIES, generator(seed, "test tasks"))
    truth = y[:, MOST_ROWS:].double()
    loss = {name: [loss_of(law(task_of(x, y, n)), truth) for n in SIZES] for name, law in models.items()}
    return Fixed(network, loss)


def fitted(
    prior: priors.Prior, steps: int, seed: int, lr: float = 2e-3, **settings: Any
) -> PriorFittedTransformer:
    """A network for one feature, fitted to a prior: four blocks, 100 bars, up to 20 rows of context."""
    with seeded(seed, "network"):
        network = PriorFittedTransformer(
            1, **({"d_model": 64, "heads": 4} | settings), layers=4, max_context=MOST_ROWS, n_bars=100
        )
    fit_prior(network, prior, steps=steps, batch_size=24, lr=lr, queries=QUERIES, seed=seed, progress=False)
    return network


def network_law(network: PriorFittedTransformer) -> Callable[[Task], Distribution]:
    """The network as a function from a batch of tasks to laws."""

    def law(task: Task) -> Distribution:
        with torch.no_grad():
            return network.law(network(*task))

    return law


def _exact_law(factor: float) -> Callable[[Task], Distribution]:
    """The exact posterior of a process whose lengthscale is this many times the true one."""
    return lambda task: (
        gp_posterior(
            *task, lengthscale=factor * PRIOR.lengthscale, outputscale=PRIOR.outputscale, noise=PRIOR.noise
        ).law
    )


def task_of(x: Tensor, y: Tensor, n: int) -> Task:
    """The first n rows as the context, and the queries, which are the same for every n."""
    return x[:, :n], y[:, :n], x[:, MOST_ROWS:]


def loss_of(law: Distribution, truth: Tensor) -> float:
    return float(-law.log_prob(truth).mean())


def report_fixed(run: Run, seeds: Sequence[Fixed]) -> None:
    """Table, claims and figures of part one."""
    rows = []
    for name in seeds[0].loss:
        losses = np.array([one.loss[name] for one in seeds if name in one.loss])
        gaps = np.array([one.gap(name) for one in seeds if name in one.loss])
        row: dict[str, Any] = {"model": name, "seeds": len(losses)}
        row |= {f"loss, {n} rows": loss for n, loss in zip(SIZES, losses.mean(0), strict=True)}
        rows.append(row | {"mean gap": float(gaps.mean()), "largest gap": float(gaps.mean(0).max())})
    run.table(
        "known-hyper-parameters",
        rows,
        "Nats per query (lower is better) on data sets of a Gaussian process with lengthscale 0.2, and the "
        "distance to the exact posterior.",
    )
    gaps = np.array([one.gap("network") for one in seeds])
    few = np.array([one.gap("network, few steps") for one in seeds])
    paper = "negative log-likelihood within a hair of the exact Gaussian process"
    run.claim(
        "the mean distance to the exact posterior, over contexts of 2, 5, 10 and 20 rows, is small",
        paper=paper, measured=gaps.mean(1).tolist(), at_most=0.12, unit="nats",
    )  # fmt: skip
    run.claim(
        "no size of context is far from the exact posterior",
        paper=paper, measured=gaps.max(1).tolist(), at_most=0.18, unit="nats",
    )  # fmt: skip
    run.claim(
        "six times as many steps leave at most 0.6 of the distance",
        paper="more training is better throughout",
        measured=(gaps.mean(1) / few.mean(1)).tolist(), at_most=0.6,
        note="500 and 3,000 steps, each with its own schedule of the learning rate.",
    )  # fmt: skip
    wrong = [min(one.loss[f"lengthscale {how}"][2] for how in ("halved", "doubled")) for one in seeds]
    run.claim(
        "with ten rows the network is better than the process with a lengthscale wrong by a factor of 2",
        paper="not reported; it shows what a distance in nats means",
        measured=[one.loss["network"][2] for one in seeds], baseline=wrong, at_most=0.0, unit="nats",
        note="The better one of the lengthscale halved and doubled.",
    )  # fmt: skip
    _draw_gaps(run, seeds)
    _draw_bands(run, seeds[0].network)


def _draw_gaps(run: Run, seeds: Sequence[Fixed]) -> None:
    labels = {
        "network": ("network", METHOD, "-"),
        "network, few steps": ("network, a sixth of the steps", PALETTE[4], "-"),
        "normal law": ("network with a normal law", PALETTE[2], "-"),
        "no attention to itself": ("network, no attention to itself", PALETTE[3], "-"),
        "lengthscale halved": ("exact, lengthscale halved", BASELINE, "--"),
    }
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for name, (label, colour, line) in labels.items():
            gaps = [one.gap(name) for one in seeds if name in one.loss]
            if gaps:
                axes.plot(SIZES, np.mean(gaps, 0), line, marker="o", color=colour, label=label)
        axes.axhline(0, color=REFERENCE, linewidth=1)
        axes.set(xlabel="rows of the context", ylabel="nats above the exact posterior", xticks=SIZES)
        axes.set_xlim(1, 34)
        axes.set_title("Distance to the exact posterior")
        direct_labels(axes)
    run.figure(
        "gaps",
        figure,
        "Distance to the exact posterior predictive against the rows seen, mean over seeds. The bar of "
        "the claims is 0.12 nats in the mean and 0.18 at each size. A network that predicts a normal law "
        "is nearer still, since the exact posterior is normal here.",
        "Lines of the distance in nats against the rows of the context: the networks with all steps are "
        "lowest, below 0.07; the process with a wrong lengthscale and the one with few steps lie far above.",
    )


def _draw_bands(run: Run, network: PriorFittedTransformer) -> None:
    x, y = PRIOR(1, MOST_ROWS, generator(run.seed, "figure"))
    grid = torch.linspace(0, 1, 200)[None, :, None]
    line = grid[0, :, 0]
    with style():
        figure = Figure(figsize=(7.2, 5.2))
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, n in zip(panels.flat, (0, 2, 5, 12), strict=True):
            task = (x[:, :n], y[:, :n], grid)
            ours, exact = network_law(network)(task), _exact_law(1.0)(task)
            ends = [ours.icdf(torch.tensor(p))[0] for p in (0.025, 0.975)]
            axes.fill_between(line, *ends, color=METHOD, alpha=0.25, linewidth=0, label="network, 95 %")
            axes.plot(line, ours.mean[0], color=METHOD, label="network, mean")
            for place, p in enumerate((0.025, 0.5, 0.975)):
                label = "exact, mean and 95 %" if place == 0 else "_"
                quantile = exact.icdf(torch.tensor(p, dtype=torch.float64))[0]
                axes.plot(line, quantile, "--", color=BASELINE, linewidth=1.2, label=label)
            axes.plot(x[0, :n, 0], y[0, :n], "o", color="black", markersize=4, label="_")
            axes.set_title(f"{n} rows")
        panels[1, 0].set_xlabel("x")
        panels[1, 1].set_xlabel("x")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    run.figure(
        "bands",
        figure,
        "One function of the prior, seen at 0, 2, 5 and 12 points: the network's predictive mean and "
        "95 % band beside those of the exact posterior.",
        "Four panels with points, a shaded band of the network and dashed lines of the exact posterior "
        "close to its edges.",
    )
