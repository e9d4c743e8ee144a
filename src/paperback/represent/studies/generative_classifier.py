"""The study of the naive Bayes probe: how many labels it and logistic regression need.

Two remarks on the paper's simulation. Its "hard" covariance, the off-diagonal of A^T A with a diagonal of its
own, has negative eigenvalues, so it is no covariance; the authors' sampler takes the absolute values of the
eigenvalues without a word, and so does `_law`, in words. And its means are a fixed distance apart in each
feature, so that classes separate as features are added. That is what makes O(log n) true, and part two takes
it away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor, nn

from paperback.data import images
from paperback.networks.resnet import ResNet
from paperback.represent.contrastive import SimCLR
from paperback.represent.evaluate import features
from paperback.represent.generative_classifier import (
    Curve,
    Diagnosis,
    LogisticProbe,
    NaiveBayesProbe,
    sample_curve,
    samples_to_converge,
)
from paperback.represent.interface import as_images
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, REFERENCE, direct_labels, style
from paperback.study.measure import Stopwatch
from paperback.training import derive, seeded, train

SEEDS = (0, 1, 2)
DIMENSIONS = (25, 50, 100, 200, 400)
SIZES = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # of a simulation
LABELS = (20, 50, 100, 200, 500, 1000, 2000, 5000)  # of the probe pool
FIT_IMAGES = 4000  # that encoders are trained on; the other 5,000 are the probe pool
TOLERANCE, REPEATS = 0.01, 5
DISTANCE = 4.0  # Mahalanobis, of the classes of part two
WORLDS = ("easy", "hard", "fixed separation")
BACKBONES = ("supervised", "supervised, maps", "SimCLR", "pixels")

Array = NDArray[np.float64]


def study(run: Run) -> None:
    """How many labels do naive Bayes and logistic regression need on frozen features, and which is ahead?

    Gaussian classes of the paper's simulation in 25 to 400 dimensions, the same at a fixed separation, and
    features of Fashion-MNIST from a supervised network, a contrastive one and none. It is false if logistic
    regression needs no more rows than naive Bayes where the model of naive Bayes is true.
    """
    simulations = [_simulate(run, seed) for seed in run.track(run.seeds, "simulations")]
    measured = [_probe_features(run, seed) for seed in run.track(run.seeds, "encoders")]
    _report_simulations(run, simulations)
    _report_features(run, measured)
    _claim(run, simulations, measured)
    _draw_convergence(run, simulations)
    _draw_regimes(run, measured)


# -- Gaussian classes ----------------------------------------------------------------------------------------


@dataclass
class Simulated:
    """One world in one dimension: rows to within a point of the asymptote, and the asymptotes."""

    needed: dict[str, int | None]
    last: dict[str, float]


def _law(world: str, n: int, classes: int) -> tuple[Array, Array]:
    """Mean of every feature in each class, and a root of the covariance."""
    if world == "fixed separation":
        return np.array([-0.5, 0.5]) * DISTANCE / np.sqrt(n), np.eye(n)
    means = np.array([-1.0, *(2.0 ** np.arange(classes - 1))])
    variances = np.repeat([float(n), 1.0], [n // 2, n - n // 2])
    if world == "easy":
        return means, np.diag(np.sqrt(variances))
    a = np.random.default_rng(0).uniform(-1, 1, (n, n))
    matrix = a.T @ a
    np.fill_diagonal(matrix, variances)
    values, vectors = np.linalg.eigh(matrix)
    return means, vectors * np.sqrt(np.abs(values))


def _draw(world: str, n: int, classes: int, rows: int, rng: np.random.Generator) -> tuple[Array, Any]:
    means, root = _law(world, n, classes)
    y = np.arange(rows) % classes
    x = rng.standard_normal((rows, n)) @ root.T + means[y][:, None]
    if classes > 2:
        x = x / 2.0 ** (classes - 3) - 1
    return x, y


def _simulate(run: Run, seed: int) -> dict[tuple[str, int, int], Simulated]:
    """Every world, number of classes and dimension."""
    found = {}
    sizes = [m for m in SIZES if m <= run.size(smoke=64, standard=max(SIZES))]
    for classes in run.size(smoke=(2,), standard=(2, 3)):
        for world in WORLDS[: 3 if classes == 2 else 2]:
            for n in run.size(smoke=(25, 50), standard=DIMENSIONS):
                rng = np.random.default_rng(derive(seed, world, classes, n))
                pool = _draw(world, n, classes, 2 * max(SIZES), rng)
                test = _draw(world, n, classes, run.size(smoke=1000, standard=10_000), rng)
                needed, last = {}, {}
                for name, probe in _probes(scale=None).items():
                    curve = sample_curve(
                        probe, *pool, *test, sizes, run.size(smoke=2, standard=REPEATS), seed
                    )
                    needed[name] = samples_to_converge(curve, TOLERANCE, _asymptote(world, curve, name))
                    last[name] = float(curve.mean[-1])
                found[world, classes, n] = Simulated(needed, last)
    return found


def _asymptote(world: str, curve: Curve, name: str) -> float:
    """The error in the limit: Bayes', but in the hard world naive Bayes levels off at its own."""
    if world == "fixed separation":
        return float(stats.norm.cdf(-DISTANCE / 2))
    if world == "hard" and name == "naive Bayes":
        return float(curve.mean[-1])
    return 0.0


def _probes(scale: str | None = "minmax") -> dict[str, Any]:
    return {
        "naive Bayes": NaiveBayesProbe(scale=scale),
        "logistic regression": LogisticProbe(scale=scale),
    }


# -- frozen features -----------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One backbone with one seed."""

    curves: dict[str, Curve]
    diagnosis: Diagnosis
    dim: int
    baselines: dict[tuple[str, int], float] = field(default_factory=dict)  # of one draw of labels
    seconds: dict[str, float] = field(default_factory=dict)  # of a fit to the largest size


def _probe_features(run: Run, seed: int) -> dict[str, Measured]:
    """Encoders trained on one part, probes on the other."""
    data = images.fashion_mnist(seed=seed)
    x, y = as_images(data.train.x), data.train.y
    n_fit, n_test = run.size(smoke=256, standard=FIT_IMAGES), run.size(smoke=200, standard=len(data.test.x))
    fit, pool = slice(n_fit), slice(n_fit, n_fit + run.size(smoke=400, standard=max(LABELS)))
    test, y_test = as_images(data.test.x[:n_test]), data.test.y[:n_test]
    found = {}
    for name, encode in _encoders(run, x[fit], y[fit], seed).items():
        big = name in ("supervised, maps", "pixels")
        repeats = run.size(smoke=1, standard=2 if big else REPEATS)
        top = run.size(smoke=100, standard=1000 if name == "supervised, maps" else max(LABELS))
        sizes = [m for m in LABELS if m <= top]
        part = features(encode, x[pool]), y[pool].numpy(), features(encode, test), y_test.numpy()
        curves = {key: sample_curve(probe, *part, sizes, repeats, seed) for key, probe in _probes().items()}
        diagnosis = NaiveBayesProbe().fit(*part[:2]).diagnose(*part[:2])
        found[name] = Measured(curves, diagnosis, part[0].shape[1])
        if name == "supervised":
            _measure_baselines(run, found[name], part, sizes, seed)
        run.log(f"seed {seed}, {name}: {_errors_in_words(curves)}")
    return found


def _encoders(run: Run, x: Tensor, y: Tensor, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    mean, std = x.mean(), x.std()
    with seeded(seed, "supervised network"):
        network = ResNet(classes=None, width=16)
        model = nn.Sequential(network, nn.Linear(network.dim, 10))
    train(
        model, _cross_entropy, ((x - mean) / std, y), epochs=run.size(smoke=1, standard=6), batch_size=128,
        lr=2e-3, schedule="cosine", seed=seed, progress=run.progress, description="supervised",
    )  # fmt: skip
    contrastive = SimCLR(steps=run.size(smoke=2, standard=200), batch_size=128, seed=seed)
    contrastive.fit(x, progress=run.progress)

    def maps(images_: Tensor) -> Tensor:
        """Every map averaged to 4 x 4: 1,792 features."""
        found = network.feature_maps((images_ - mean) / std)
        return torch.cat([nn.functional.adaptive_avg_pool2d(m, 4).flatten(1) for m in found], 1)

    encoders: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda images_: network((images_ - mean) / std),
        maps,
        contrastive,
        lambda images_: images_.flatten(1),
    )
    return dict(zip(BACKBONES, encoders, strict=True))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _measure_baselines(run: Run, measured: Measured, part: Any, sizes: list[int], seed: int) -> None:
    """Other probes on the same features, and what the two of the comparison cost."""
    others: dict[str, Any] = {
        "naive Bayes, floor": NaiveBayesProbe(floor="auto"),
        "logistic regression, C by CV": LogisticProbe(C="cv"),
        "logistic regression, SGD": LogisticProbe(solver="sgd"),
        "LDA, Ledoit-Wolf": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        "nearest class mean": NearestCentroid(),
        "5 nearest neighbours": KNeighborsClassifier(5),
    }
    x, y, x_test, y_test = part
    for m in {50, 500, 5000} & set(sizes):
        for name, probe in others.items():
            if m < 500 and probe.get_params().get("C") == "cv":
                continue  # some class may have a single label, which cannot be cross-validated
            curve = sample_curve(probe, x, y, x_test, y_test, (m,), 1, seed)
            measured.baselines[name, m] = 1 - float(curve.mean[0])
    for name, probe in _probes().items():
        with Stopwatch() as watch:
            probe.fit(x, y)
        measured.seconds[name] = watch.seconds


# -- report --------------------------------------------------------------------------------------------------


def _errors_in_words(curves: Mapping[str, Curve]) -> str:
    return "; ".join(
        f"{name} {', '.join(f'{m}: {e:.3f}' for m, e in zip(curve.sizes, curve.mean, strict=True))}"
        for name, curve in curves.items()
    )


def _report_simulations(run: Run, simulations: list[dict[tuple[str, int, int], Simulated]]) -> None:
    rows = []
    for world, classes, n in simulations[0]:
        row: dict[str, Any] = {"world": world, "classes": classes, "features": n}
        for name in _probes():
            each = [found[world, classes, n] for found in simulations]
            reached = [f"> {max(SIZES)}" if s.needed[name] is None else str(s.needed[name]) for s in each]
            row[f"rows, {name}"] = ", ".join(reached)
            row[f"last error, {name}"] = float(np.mean([s.last[name] for s in each]))
        rows.append(row)
    run.table(
        "simulations",
        rows,
        "Rows until the mean test error of five subsets is within .01 of its asymptote, one number per seed, "
        f"and the error at {max(SIZES)} rows. In the hard world naive Bayes is measured against its own.",
    )


def _report_features(run: Run, measured: list[dict[str, Measured]]) -> None:
    rows = []
    for name in measured[0]:
        sizes = measured[0][name].curves["naive Bayes"].sizes
        for i, m in enumerate(sizes):
            row: dict[str, Any] = {"features": name, "labels": m}
            for probe in _probes():
                row[probe] = 1 - float(np.mean([found[name].curves[probe].mean[i] for found in measured]))
            rows.append(row)
    run.table("features", rows, "Test accuracy against the number of labels, mean over subsets and seeds.")
    first = [found["supervised"] for found in measured]
    others = sorted({key for found in first for key in found.baselines}, key=lambda key: (key[1], key[0]))
    if others:
        run.table(
            "baselines",
            [
                {
                    "labels": m,
                    "probe": name,
                    "accuracy": float(np.mean([f.baselines[name, m] for f in first])),
                }
                for name, m in others
            ],
            "Other probes on the pooled features of the supervised network, one draw of labels per seed.",
        )
    run.table(
        "diagnosis",
        [
            {
                "features": name,
                "number": measured[0][name].dim,
                "divergence per feature": float(np.mean([f[name].diagnosis.divergence for f in measured])),
                "dependence": float(np.mean([f[name].diagnosis.dependence for f in measured])),
                "median sigma": float(np.mean([np.median(f[name].diagnosis.sigma) for f in measured])),
            }
            for name in measured[0]
        ],
        "What the theory assumes. Dependence is 1 where features are independent within the classes.",
    )
    cost = {name: np.median([found.seconds[name] for found in first]) for name in _probes()}
    run.note(
        f"Fitting {max(LABELS) if run.budget != 'smoke' else 400} rows of 64 features took naive Bayes "
        f"{1e3 * cost['naive Bayes']:.1f} ms and logistic regression {1e3 * cost['logistic regression']:.0f} "
        "ms. Fashion-MNIST as it ships has 10,000 training images, so encoders are trained on 4,000 (6 "
        "passes) and probes draw from 5,000."
    )


def _needed(
    simulations: list[dict[tuple[str, int, int], Simulated]], world: str, n: int, name: str
) -> list[int]:
    """Rows that were needed, one number per seed; the largest size where it was not enough."""
    return [found[world, 2, n].needed[name] or max(SIZES) for found in simulations]


def _claim(run: Run, simulations: list[Any], measured: list[dict[str, Measured]]) -> None:
    low, wide, top = run.size(smoke=(25, 50, 50), standard=(25, 200, 400))

    def ratio(world: str, name: str, n: int) -> list[float]:
        pairs = zip(_needed(simulations, world, n, name), _needed(simulations, world, low, name), strict=True)
        return [a / b for a, b in pairs]

    run.claim(
        "with 16 times the features naive Bayes needs at most twice the rows where its model is true",
        paper="O(log n) rows (theorem); flat in the simulation up to n = 1,000",
        measured=ratio("easy", "naive Bayes", top),
        at_most=2.0,
        note=f"Rows for n = {top} over rows for n = {low}; sizes go up in steps of a third to a half.",
    )
    run.claim(
        "with 8 times the features logistic regression needs at least 3 times the rows",
        paper="O(n) rows (theorem); linear in the simulation",
        measured=ratio("easy", "logistic regression", wide),
        at_least=3.0,
        note=f"Rows for n = {wide} over rows for n = {low}.",
    )
    run.claim(
        "at a fixed separation naive Bayes too needs rows in proportion to the features",
        paper="the theorem assumes that the divergence of the classes grows with n; this is its boundary",
        measured=ratio("fixed separation", "naive Bayes", top),
        at_least=4.0,
        note=f"Rows for n = {top} over rows for n = {low}; in proportion would be 16.",
    )
    _claim_regimes(run, measured)


def _claim_regimes(run: Run, measured: list[dict[str, Measured]]) -> None:
    def accuracy(backbone: str, name: str, m: int) -> list[float]:
        curves = [found[backbone].curves[name] for found in measured]
        return [1 - float(curve.mean[curve.sizes.index(m)]) for curve in curves]

    few, some, many = run.size(smoke=(50, 50, 100), standard=(50, 500, 5000))
    nb, lr = "naive Bayes", "logistic regression"
    run.claim(
        "on supervised features naive Bayes is ahead while labels are few",
        paper="two regimes for supervised ViT and ResNet on CIFAR",
        measured=accuracy("supervised", nb, few),
        baseline=accuracy("supervised", lr, few),
        at_least=0.0,
        unit="accuracy",
        note=f"At {few} labels, C = 1.",
    )
    run.claim(
        "on supervised features logistic regression is ahead by 2 points once labels are many",
        paper="two regimes for supervised ViT and ResNet on CIFAR",
        measured=accuracy("supervised", lr, many),
        baseline=accuracy("supervised", nb, many),
        at_least=0.02,
        unit="accuracy",
        note=f"At {many} labels, C = 1.",
    )

    def left(name: str) -> list[float]:
        ends = zip(accuracy("supervised", name, many), accuracy("supervised", name, some), strict=True)
        return [b - a for b, a in ends]

    run.claim(
        "naive Bayes is within a point of its final accuracy at 500 labels",
        paper="naive Bayes converges faster on all backbones",
        measured=left(nb),
        at_most=0.01,
        unit="accuracy",
    )
    run.claim(
        "logistic regression is more than a point below its final accuracy at 500 labels",
        paper="naive Bayes converges faster on all backbones",
        measured=left(lr),
        at_least=0.01,
        unit="accuracy",
    )
    sizes = [m for m in measured[0]["pixels"].curves[nb].sizes if m >= 50]
    gaps = np.array([accuracy("pixels", lr, m) for m in sizes]) - [accuracy("pixels", nb, m) for m in sizes]
    run.claim(
        "on pixels logistic regression is ahead at every number of labels from 50",
        paper="where features are far from the model, logistic regression may be ahead from the start",
        measured=gaps.min(0),
        at_least=0.0,
        unit="accuracy",
        note="The least lead over all numbers of labels.",
    )


# -- figures -------------------------------------------------------------------------------------------------


def _draw_convergence(run: Run, simulations: list[Any]) -> None:
    dimensions = sorted({n for _, _, n in simulations[0]})
    lines = {
        "logistic regression": ("easy", "logistic regression", BASELINE, "-"),
        "naive Bayes": ("easy", "naive Bayes", METHOD, "-"),
        "naive Bayes, fixed separation": ("fixed separation", "naive Bayes", METHOD, "--"),
    }
    with style():
        figure = Figure(figsize=(6.4, 3.8))
        axes = figure.subplots()
        for label, (world, name, colour, dashes) in lines.items():
            rows = np.array([_needed(simulations, world, n, name) for n in dimensions])
            axes.plot(dimensions, np.exp(np.log(rows).mean(1)), dashes, color=colour, marker="o", label=label)
            axes.fill_between(dimensions, rows.min(1), rows.max(1), color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(dimensions, [str(n) for n in dimensions])
        axes.minorticks_off()
        axes.set_yticks((4, 16, 64, 256, 1024), ("4", "16", "64", "256", "1,024"))
        axes.set_xlabel("features")
        axes.set_title("Rows to come within .01 of the best error")
        direct_labels(axes)
    run.figure(
        "convergence",
        figure,
        caption="Labelled rows until the test error is within .01 of its asymptote, two Gaussian classes. "
        "Where each feature adds information (solid), naive Bayes needs the same few rows in any dimension. "
        "At a fixed distance of the classes (dashed) that is over. Bands: the seeds.",
        alt="On log axes, logistic regression and naive Bayes at a fixed separation rise with the features; "
        "naive Bayes in the easy world stays level near 8 rows.",
    )


def _draw_regimes(run: Run, measured: list[dict[str, Measured]]) -> None:
    shown = ("supervised", "SimCLR", "pixels")
    with style():
        figure = Figure(figsize=(9.0, 3.6))
        panels = figure.subplots(1, len(shown))
        for axes, name in zip(panels, shown, strict=True):
            _draw_panel(axes, name, [found[name].curves for found in measured])
        panels[0].set_ylabel("test error")
        panels[-1].legend(loc="upper right")
    run.figure(
        "regimes",
        figure,
        caption="Test error on Fashion-MNIST against the number of labels, on frozen features and on pixels. "
        "Bands hold the middle 80 % of subsets and seeds. The dotted line is where the means cross.",
        alt="Supervised features: naive Bayes lower at few labels, logistic regression lower from some "
        "hundred. Pixels: logistic regression lower throughout.",
    )


def _draw_panel(axes: Axes, name: str, curves: list[dict[str, Curve]]) -> None:
    means = {}
    for probe, colour in (("naive Bayes", METHOD), ("logistic regression", BASELINE)):
        sizes = curves[0][probe].sizes
        errors = np.concatenate([each[probe].errors for each in curves], axis=1)
        low, high = np.quantile(errors, (0.1, 0.9), axis=1)
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        means[probe] = errors.mean(1)
        axes.plot(sizes, means[probe], marker="o", markersize=4, color=colour, label=probe)
    gap = means["naive Bayes"] - means["logistic regression"]
    turns = np.flatnonzero((gap[:-1] < 0) & (gap[1:] >= 0))
    if len(turns):
        i = int(turns[-1])
        at = np.exp(np.interp(0, gap[i : i + 2], np.log(sizes[i : i + 2])))
        axes.axvline(at, color=REFERENCE, linestyle=":", linewidth=1.2)
        axes.annotate(f" {at:.0f} labels", (at, axes.get_ylim()[1]), va="top", color=REFERENCE)
    axes.set_xscale("log")
    axes.set_xticks((20, 100, 1000, 5000) if max(sizes) > 1000 else (20, 100), minor=False)
    axes.set_xticklabels([f"{int(t):,}" for t in axes.get_xticks()])
    axes.minorticks_off()
    axes.set_xlabel("labels")
    axes.set_title(name)
