"""The study of deep kernel machines: an exact solution, diamonds, and wide networks that are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from torch import Tensor

from paperback.bayes.baselines import QuantileBoosting
from paperback.bayes.deep_kernel_machine import (
    DeepKernelMachine,
    FullMachine,
    GramKernel,
    deep_linear_grams,
    sample_finite_grams,
)
from paperback.bayes.deep_kernel_machine.deep_gp import DeepGaussianProcess
from paperback.bayes.deep_kernel_machine.estimators import maximise
from paperback.bayes.deep_kernel_machine.finite import relative_distance
from paperback.bayes.deep_kernel_machine.machine import LEAST_NOISE
from paperback.bayes.interface import BayesianRegressor
from paperback.data import tables
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, REFERENCE, WIDE, direct_labels, style
from paperback.study.measure import Stopwatch
from paperback.training import generator

if TYPE_CHECKING:
    import pandas as pd

SEEDS = (0, 1, 2)
INDUCING, DEPTH = 50, 2
DOFS = (math.inf, 1000.0, 100.0, 10.0)
GRADES = {
    "cut": ("Fair", "Good", "Very Good", "Premium", "Ideal"),
    "color": tuple("JIHGFED"),
    "clarity": ("I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"),
}
NNGP = "NNGP, nu = infinity"
SVGP = "SVGP (no layer)"


@dataclass
class Table:
    """A regression task as matrices."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    x_test: NDArray[np.float64]
    y_test: NDArray[np.float64]


@dataclass
class Score:
    """What one model says of a test part, in the units of its target."""

    nll: float
    rmse: float
    median: float  # of the absolute errors
    top: float  # share of the squares that the largest hundredth of the errors makes
    seconds: float
    elbo: float | None = None


@dataclass
class Finite:
    """Distances of sampled Gram matrices, relative, width by width, largest of the layers."""

    widths: tuple[int, ...]
    to_machine: list[float] = field(default_factory=list)
    to_nngp: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)


def study(run: Run) -> None:
    """Does learning the Gram matrices of an infinitely wide network predict better than fixing them, and are
    the learned ones those of wide networks?

    Three parts: the deep linear machine against its exact solution; the prices of diamonds by sparse machines
    whose degrees of freedom nu go from infinity (NNGP, no learning) to 10, beside sparse and deep Gaussian
    processes and boosted trees; and a deep Gaussian process of finite width, sampled, whose Gram matrices
    should come to the machine's. The claims are false if nu = infinity does as well as nu = 10, or if wide
    networks come to the NNGP instead.
    """
    _exact(run)
    scores, machines = [], []
    for seed in run.track(run.seeds, "diamonds, seeds"):
        table = _table(run, seed)
        models: dict[str, BayesianRegressor] = dict(_machines(run, seed))
        models |= _others(run) if seed == run.seed else {}
        scores.append({name: _score(model, table) for name, model in models.items()})
        machines.append(models)
    _claim_diamonds(run, scores)
    _draw_kernels(run, _table(run, run.seed), machines[0])
    _draw_dof(run, scores, _small(run))
    _other_tables(run)
    _finite_networks(run)
    machines[0][_name(10.0)].save_pretrained(run.out / "model")


# -- an exact solution ---------------------------------------------------------------------------------------


def _exact(run: Run, points: int = 8, outputs: int = 12, depth: int = 3) -> None:
    """Largest relative error of a Gram matrix of the deep linear machine."""
    errors = []
    for seed in run.seeds:
        draw = generator(seed, "deep linear")
        x, y = (torch.randn(points, n, generator=draw, dtype=torch.float64) for n in (16, outputs))
        machine = FullMachine(
            x, y, ["linear"] * (depth + 1), [float(outputs)] * depth, noise=0, jitter=0.0, ard=False
        )
        for name, parameter in machine.named_parameters():
            parameter.requires_grad_(name.endswith(".v"))
        maximise(machine, run.size(smoke=100, standard=500))
        truth = deep_linear_grams(x @ x.mT / 16, y @ y.mT / outputs, depth)
        with torch.no_grad():
            found = [machine.gram(layer, x[:0]).ii for layer in range(1, depth + 1)]
        errors.append(max(map(relative_distance, found, truth)))
    run.claim(
        "The learned Gram matrices of a deep linear machine are the exact ones",
        paper="a closed form, the geometric path from the input's to the target's Gram matrix",
        measured=errors,
        at_most=1e-5,
        note=f"Largest relative error of {depth} layers, {points} points.",
    )


# -- tables --------------------------------------------------------------------------------------------------


def diamonds(seed: int, rows: int, tests: int) -> Table:
    """Grades as ranks, log price; rows without measurements (a length of 0) are left out."""
    data = tables.diamonds(seed, log_target=True)
    parts = []
    for part, n in ((data.train, rows), (data.test, tests)):
        measured = (part.x[["x", "y", "z"]] > 0).all(axis=1)
        x = part.x[measured].copy()
        for column, grades in GRADES.items():
            x[column] = x[column].map({grade: rank for rank, grade in enumerate(grades)})
        parts += [x.to_numpy(np.float64)[:n], part.y[measured].to_numpy(np.float64)[:n]]
    return Table("diamonds", *parts)


def _table(run: Run, seed: int) -> Table:
    """Diamonds, or the user's own."""
    rows, tests = run.size(smoke=150, quick=1500, standard=3000), run.size(smoke=50, standard=2000)
    if run.data is None:
        return diamonds(seed, rows, tests)
    data = tables.read(run.data, run.target, seed, target_is="number", labels="required")
    train, test = _one_hot(data.train.x), _one_hot(data.test.x)
    y, y_test = (part.y.to_numpy(np.float64) for part in (data.train, data.test))
    return Table(data.name, train[:rows], y[:rows], test[:tests], y_test[:tests])


def _one_hot(frame: pd.DataFrame) -> NDArray[np.float64]:
    import pandas as pd

    return pd.get_dummies(frame).to_numpy(np.float64)


def _name(dof: float) -> str:
    return NNGP if math.isinf(dof) else f"DKM, nu = {dof:g}"


def _machines(run: Run, seed: int, epochs: int | None = None) -> dict[str, DeepKernelMachine]:
    """Sparse machines; the learning rate, the same for all, was chosen on the validation part."""
    common: dict[str, Any] = {
        "n_inducing": run.size(smoke=10, standard=INDUCING),
        "epochs": run.size(smoke=4, standard=epochs),
        "random_state": seed,
    }
    dofs = run.size(smoke=(math.inf, 10.0), standard=DOFS)
    machines = {_name(dof): DeepKernelMachine(DEPTH, dof, **common) for dof in dofs}
    return {SVGP: DeepKernelMachine(0, **common), **machines}


def _others(run: Run) -> dict[str, BayesianRegressor]:
    """Deep Gaussian processes of gpytorch with as many inducing points and rows a step; boosted trees."""
    if run.budget == "quick":
        return {}
    settings: dict[str, Any] = {
        "n_inducing": run.size(smoke=10, standard=INDUCING),
        "steps": run.size(smoke=4, standard=1200, full=3000),
        "random_state": run.seed,
    }
    return {
        "deep GP, sampled": DeepGaussianProcess("sampled", **settings),
        "deep GP, sigma points": DeepGaussianProcess("sigma-points", **settings),
        "boosted quantiles": QuantileBoosting(run.size(smoke=10, standard=300), random_state=run.seed),
    }


@torch.no_grad()
def _score(model: BayesianRegressor, table: Table) -> Score:
    with Stopwatch() as watch:
        model.fit(table.x, table.y)
    law = model.predict_distribution(table.x_test)
    target = torch.tensor(table.y_test)  # a copy: pandas gives arrays that are read-only
    error, nll = (law.mean - target).abs(), -law.log_prob(target).mean()
    return Score(
        nll=float(nll),
        rmse=float(error.square().mean().sqrt()),
        median=float(error.median()),
        top=float(error.square().topk(max(1, len(error) // 100)).values.sum() / error.square().sum()),
        seconds=watch.seconds,
        elbo=getattr(model, "elbo_", None),
    )


def _claim_diamonds(run: Run, scores: list[dict[str, Score]]) -> None:
    learned, fixed = _name(10.0), NNGP

    def values(name: str, what: str) -> list[float]:
        return [getattr(score[name], what) for score in scores if name in score]

    rows = [
        {
            "model": name,
            "seeds": len(values(name, "nll")),
            "negative log likelihood": float(np.mean(values(name, "nll"))),
            "root mean square error": float(np.mean(values(name, "rmse"))),
            "median absolute error": float(np.mean(values(name, "median"))),
            "bound per row": None if first.elbo is None else float(np.mean(values(name, "elbo"))),
            "seconds to fit": float(np.mean(values(name, "seconds"))),
        }
        for name, first in scores[0].items()
    ]
    run.table("diamonds", rows, "Log price of diamonds: test part, mean over seeds, nats per row.")
    paper = "DKM better than NNGP on most UCI sets, in the bound and in error"
    run.claim(
        "Learned Gram matrices predict diamonds with a lower negative log likelihood than fixed ones",
        paper=paper, measured=values(learned, "nll"), baseline=values(fixed, "nll"), at_most=-0.02,
        unit="nats", note=f"nu = 10 and infinity, {INDUCING} inducing points, {DEPTH} layers.",
    )  # fmt: skip
    ratio, medians = (
        [a / b for a, b in zip(values(learned, what), values(fixed, what), strict=True)]
        for what in ("rmse", "median")
    )
    run.claim(
        "Their root mean square error is at most 0.98 times that of fixed ones",
        paper=paper, measured=ratio, at_most=0.98,
        note=f"The largest hundredth of errors makes {np.mean(values(learned, 'top')):.0%} of the squares; "
        f"the medians of absolute errors have the ratios {', '.join(f'{m:.3f}' for m in medians)}.",
    )  # fmt: skip
    run.claim(
        "Their bound is higher by at least 0.03 nats a row",
        paper=paper, measured=values(learned, "elbo"), baseline=values(fixed, "elbo"), at_least=0.03,
        unit="nats",
    )  # fmt: skip
    dofs = [dof for dof in DOFS if _name(dof) in scores[0]]
    bounds = np.array([values(_name(dof), "elbo") for dof in dofs])
    run.claim(
        "The bound rises with each step of nu from infinity to 1000, 100 and 10",
        paper="nu sets the trade-off between the data and the fixed kernel",
        measured=np.diff(bounds, axis=0).min(0).tolist(), at_least=0.0, unit="nats",
        note="The smallest of the steps, per row.",
    )  # fmt: skip


def _draw_kernels(run: Run, table: Table, models: dict[str, Any], points: int = 100) -> None:
    """Input, NNGP and DKM: the correlations of test points ordered by their target."""
    order = np.argsort(table.y_test[:points])
    x = table.x_test[:points][order]
    learned = models[_name(10.0)]
    panels = {
        "Inputs": learned.gram_(0, x),
        "NNGP": models[NNGP].effective_kernel(x),
        "DKM, nu = 10": learned.effective_kernel(x),
    }
    with style():
        figure = Figure(figsize=(WIDE[0], 3.0))
        for place, (title, kernel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            scale = np.sqrt(np.diag(kernel))
            correlation = kernel / np.outer(scale, scale)
            place.imshow(correlation, vmin=np.quantile(correlation, 0.05), vmax=1, cmap="Blues")
            place.set_title(title)
            place.set_xticks([])
            place.set_yticks([])
            place.grid(False)
            place.set_xlabel("cheap → dear")
    run.figure(
        "kernels",
        figure,
        caption=f"Correlations of {len(x)} test diamonds, ordered by price, by three kernels, each on its "
        "own scale: dark is alike. A kernel that has learned the task finds diamonds of like price alike, "
        "along the diagonal.",
        alt="Three square heat maps of 100 by 100 diamonds; dark squares stand along the diagonal.",
    )


# -- little data, other tables -------------------------------------------------------------------------------


def _small(run: Run) -> dict[float, Score]:
    """The full machine on few rows of the diabetes data, where low nu overfits."""
    data = _diabetes(run.seed, run.size(smoke=30, standard=100))
    many = (math.inf, 3000.0, 1000.0, 300.0, 100.0, 10.0)
    dofs = run.size(smoke=(math.inf, 10.0), quick=DOFS, standard=many)
    epochs = run.size(smoke=5, standard=100)
    return {dof: _score(DeepKernelMachine(DEPTH, dof, epochs=epochs), data) for dof in dofs}


def _diabetes(seed: int, rows: int) -> Table:
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[:rows], order[rows:]
    return Table(f"diabetes, {rows} rows", x[train], y[train], x[test], y[test])


def _draw_dof(run: Run, scores: list[dict[str, Score]], small: dict[float, Score]) -> None:
    def places(dofs: list[float]) -> list[float]:
        """Infinity stands at 10,000, right of all others."""
        return [1e4 if math.isinf(dof) else dof for dof in dofs]

    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2)
        dofs = [dof for dof in DOFS if _name(dof) in scores[0]]
        for score in scores:
            left.plot(places(dofs), [score[_name(dof)].nll for dof in dofs], "o-", color=METHOD)
            left.axhline(score[SVGP].nll, color=BASELINE, linestyle=":", linewidth=1)
        right.plot(places(list(small)), [score.nll for score in small.values()], "o-", color=METHOD)
        left.set_title("Diamonds, sparse machine")
        right.set_title("Diabetes, full machine")
        right.set_yscale("log")
        right.yaxis.set_minor_formatter("{x:.0f}")
        left.set_ylabel("test negative log likelihood, nats")
        decades = [dof for dof in small if math.isinf(dof) or math.log10(dof).is_integer()]
        for axes, values in ((left, dofs), (right, decades)):
            axes.set_xscale("log")
            axes.set_xticks(places(values), ["∞" if math.isinf(dof) else f"{dof:g}" for dof in values])
            axes.minorticks_off()
            axes.set_xlabel("degrees of freedom nu")
    run.figure(
        "degrees-of-freedom",
        figure,
        caption="Test negative log likelihood against nu (lower is better; infinity learns no Gram matrix). "
        "Left: one line per seed, dotted the sparse Gaussian process without layers. Right: the full "
        "machine, which has a Gram matrix of all its rows to fit noise with, needs a large nu.",
        alt="Left, lines that fall as nu gets smaller. Right, a line that is flat for large nu and rises "
        "steeply for small nu.",
    )


def _other_tables(run: Run) -> None:
    """The same comparison, without bars, on tables with other shapes."""
    if run.budget == "quick":
        return
    rows = []
    data = tables.housing(run.seed, log_target=True)
    joined = [(part.x.select_dtypes("number").to_numpy(np.float64), part.y.to_numpy(np.float64))
              for part in (data.train, data.test)]  # fmt: skip
    n = run.size(smoke=60, standard=3000)
    housing = Table("Ames housing", joined[0][0][:n], joined[0][1][:n], *joined[1])
    for table in (housing, _diabetes(run.seed, run.size(smoke=60, standard=300))):
        for name, model in _machines(run, run.seed).items():
            if name in (SVGP, NNGP, _name(100.0), _name(10.0)):
                score = _score(model, table)
                rows.append({"table": table.name, "model": name, "negative log likelihood": score.nll,
                             "root mean square error": score.rmse,
                             "median absolute error": score.median, "bound per row": score.elbo})  # fmt: skip
    run.table("other-tables", rows, "Other tables, first seed, test part; no bar was set for them.")


# -- wide networks -------------------------------------------------------------------------------------------


def _finite_networks(run: Run) -> None:
    """Sampled Gram matrices of finite width against the machine's and the NNGP's."""
    widths = run.size(smoke=(5, 20), quick=(10, 100), standard=(10, 100, 1000))
    found = [_sample_widths(run, seed, widths) for seed in run.track(run.seeds, "finite networks, seeds")]
    slopes = [float(np.polyfit(np.log(f.widths), np.log(f.to_machine), 1)[0]) for f in found]
    run.claim(
        "Gram matrices of finite networks approach the machine's as the width grows",
        paper="the limit's posterior is confirmed in wide finite deep Gaussian processes",
        measured=slopes, at_most=-0.4,
        note=f"Slope of log distance against log width, widths {', '.join(map(str, widths))}.",
    )  # fmt: skip
    run.claim(
        f"At width {widths[-1]} the Gram matrix of the NNGP is at least 3 times farther than the machine's",
        paper="the limit's posterior is confirmed in wide finite deep Gaussian processes",
        measured=[f.to_nngp[-1] / f.to_machine[-1] for f in found], at_least=3.0,
    )  # fmt: skip
    rows = [
        {"seed": seed, "width": width, "distance to the machine": near, "distance to the NNGP": far,
         "acceptance": accepted}
        for seed, f in zip(run.seeds, found, strict=True)
        for width, near, far, accepted in zip(f.widths, f.to_machine, f.to_nngp, f.acceptance, strict=True)
    ]  # fmt: skip
    run.table("finite-networks", rows, "Relative Frobenius distance of sampled mean Gram matrices.")
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for i, f in enumerate(found):
            axes.loglog(f.widths, f.to_nngp, "o-", color=BASELINE, label="" if i else "to the NNGP")
            axes.loglog(f.widths, f.to_machine, "o-", color=METHOD, label="" if i else "to the machine")
        first = found[0]
        guide = [first.to_machine[0] * widths[0] / w for w in widths]
        axes.loglog(widths, guide, "--", color=REFERENCE, label="1 / width", linewidth=1)
        axes.set_xlabel("width of the sampled network")
        axes.set_ylabel("distance of its mean Gram matrices")
        direct_labels(axes)
    run.figure(
        "finite-networks",
        figure,
        caption="Relative distance of the mean Gram matrices of a sampled deep Gaussian process of finite "
        "width, with replicated outputs, to those of the machine and of the NNGP; one line per seed.",
        alt="Lines of the distance to the machine fall with the width; those of the distance to the NNGP "
        "stay high.",
    )


def _sample_widths(run: Run, seed: int, widths: tuple[int, ...], noise: float = 0.1) -> Finite:
    """Two layers of features and a linear readout, with kernels that are fixed."""
    points = run.size(smoke=5, standard=20)
    draw = generator(seed, "finite network")
    x = torch.randn(points, 4, generator=draw, dtype=torch.float64)
    y = (2 * x[:, :1]).sin() + 0.1 * torch.randn(points, 1, generator=draw, dtype=torch.float64)
    limits = [_limit(x, y / y.std(), dof, noise) for dof in (1.0, math.inf)]
    machine, nngp = limits
    result = Finite(widths)
    kernels = [part.matrix for part in machine.layers if isinstance(part, GramKernel)]
    with torch.no_grad():
        truths = [_grams(limit) for limit in limits]
    for width in widths:
        sampled = sample_finite_grams(
            nngp.gram(0, x).ii, y / y.std(), kernels, width, noise=noise,
            samples=run.size(smoke=5, quick=60, standard=100),
            burn_in=run.size(smoke=5, quick=60, standard=100),
            generator=generator(seed, "finite network", width),
        )  # fmt: skip
        distances = [max(map(relative_distance, sampled.mean, truth)) for truth in truths]
        result.to_machine.append(distances[0])
        result.to_nngp.append(distances[1])
        result.acceptance.append(sampled.acceptance)
    return result


def _limit(x: Tensor, y: Tensor, dof: float, noise: float) -> FullMachine:
    """The machine with the kernels of the network, trained in its Gram matrices alone."""
    machine = FullMachine(
        x, y, ["sqexp", "sqexp", "linear"], [dof] * 2, noise=noise - LEAST_NOISE, ard=False, jitter=1e-8
    )
    for name, parameter in machine.named_parameters():
        parameter.requires_grad_(name.endswith(".v"))
    if not math.isinf(dof):
        maximise(machine, 2000)
    return machine


def _grams(machine: FullMachine) -> list[Tensor]:
    return [machine.gram(layer, machine.inputs.inducing[:0]).ii for layer in (1, 2)]
