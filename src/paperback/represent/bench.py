"""How encoders are compared: accuracy against the number of labels, and what an encoder costs.

By default on Fashion-MNIST, else on the user's folder of images or ``.npz`` archive with labels. Methods
without labels learn from all training images, those of a class called "unlabelled" or "-1" among them; then
a linear probe and nearest neighbours are fitted on 10 and on 50 labelled images of each class and on all,
several draws each, and measured on the test images. Methods that learn from labels are trained afresh on just
those labelled images. Settings are chosen by the linear probe on the validation part, of methods with labels
with all of them; strengths of probes by the labelled images themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paperback.compare.bench import READING, Bench, Contender, Kind, Metric
from paperback.data import Dataset, Split, images
from paperback.errors import DataError
from paperback.represent.evaluate import features, knn, linear_probe, naive_bayes_probe
from paperback.represent.interface import Encoder, as_images
from paperback.study.budget import Budget, for_budget
from paperback.study.encoding import write_atomically
from paperback.study.measure import Stopwatch, flops, size_on_disk

PER_CLASS = (10, 50, None)  # labelled images of each class; None for all there are
LONGEST_SIDE = 32  # pixels
BATCH = 128
UNLABELLED = ("unlabelled", "unlabeled", "-1")  # names of classes of images that have none

METRICS = (
    Metric("accuracy_10", "accuracy, 10 labels a class", better="higher", primary=True),
    Metric("accuracy_50", "accuracy, 50 labels a class", better="higher"),
    Metric("accuracy_all", "accuracy, all labels", better="higher"),
    Metric("knn_10", "k-NN, 10 labels a class", better="higher"),
    Metric("knn_50", "k-NN, 50 labels a class", better="higher"),
    Metric("knn_all", "k-NN, all labels", better="higher"),
    Metric("fit_seconds", "fit, choice of settings included", "s", better="lower", cost=True),
    Metric("flops", "FLOPs of an image", better="lower", cost=True),
    Metric("bytes", "encoder on disk", "B", better="lower", cost=True),
    Metric("dim", "features", better="neither"),
)

Settings = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RepresentData:
    """What the contenders are given; images are float32 ``(n, c, side, side)`` in 0..1.

    Attributes:
        dataset: where the images come from.
        pool: all training images, with labels and without.
        train: those with labels, and the labels ``(n,)``.
        val: the same, for choosing.
        test: the same, for measuring.
    """

    dataset: Dataset
    pool: Tensor
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def shape(self) -> dict[str, int]:
        """What the constructors of encoders ask for."""
        return {"in_channels": self.train[0].shape[1], "image_size": self.train[0].shape[2]}


@dataclass(frozen=True)
class Candidates:
    """A contender with the settings that it may be fitted with.

    Attributes:
        make: ``(number of images, settings) -> Encoder``, not fitted.
        settings: at least one.
        probe: "linear", or "nb" for naive Bayes, in place of the linear probe.
    """

    make: Callable[[int, Settings], Encoder]
    settings: tuple[Settings, ...] = ({},)
    probe: str = "linear"


# -- data ----------------------------------------------------------------------------------------------------


def load(path: Path | None, target: str | None, budget: Budget, seed: int) -> RepresentData:
    """Fashion-MNIST, or the user's images with labels.

    Args:
        path: a folder of images or an ``.npz`` archive; None for Fashion-MNIST.
        target: must be None; images have no columns.
        budget: larger budgets use more images.
        seed: of the split.

    Returns:
        The data; images of other sizes are brought to 32x32.

    Raises:
        DataError: naming the file, the place and the remedy.
    """
    if target is not None:
        raise DataError(f"images have no column {target!r}; leave the target out.")
    if path is None:
        dataset = images.fashion_mnist(seed=seed)
    else:
        try:
            dataset = images.read(path, None, seed, labels="required")
        except DataError:  # images of several sizes, or what is wrong whatever the size
            dataset = images.read(path, LONGEST_SIDE, seed, labels="required")
        sides = dataset.train.x.shape[-2:]
        if sides[0] != sides[1] or sides[0] > LONGEST_SIDE:
            dataset = images.read(path, LONGEST_SIDE, seed, labels="required")
    limits = {
        "train": for_budget(budget, smoke=300, quick=2000, standard=9000, full=10**9),
        "val": for_budget(budget, smoke=100, quick=500, standard=1000, full=10**9),
        "test": for_budget(budget, smoke=100, quick=1000, standard=2000, full=10**9),
    }
    heads = {
        name: Split(part.x[:limit], part.y[:limit])
        for name, limit in limits.items()
        for part in (getattr(dataset, name),)
    }
    dataset = replace(dataset, train=heads["train"], val=heads["val"], test=heads["test"])
    pool = as_images(heads["train"].x)
    parts = {name: _with_labels(part, dataset.classes) for name, part in heads.items()}
    if len(parts["train"][1].unique()) < 2 or not len(parts["val"][0]) or not len(parts["test"][0]):
        raise DataError(f"{path}: give at least two classes and images for validation and test.")
    return RepresentData(dataset, pool, **parts)


def _with_labels(part: Split, classes: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The images whose class is one, in 0..1, with their labels."""
    none = [code for code, name in enumerate(classes) if name in UNLABELLED]
    kept = ~torch.isin(part.y, torch.tensor(none, dtype=part.y.dtype))
    return as_images(part.x[kept]), part.y[kept]


# -- contenders ----------------------------------------------------------------------------------------------


def _resnet(budget: Budget) -> dict[str, Any]:
    return {"name": "resnet", "width": for_budget(budget, smoke=8, standard=16, full=32)}


def _epochs(n: int, steps: int) -> int:
    """Passes over n images that make about so many steps, however few the images are."""
    return max(1, round(steps / max(n // BATCH, 1)))


def _steps(budget: Budget) -> int:
    return for_budget(budget, smoke=3, quick=300, standard=1200, full=10_000)


def _encoder(
    address: str,
    arguments: Callable[[RepresentData, Budget, int], dict[str, Any]],
    *variants: Settings,
    probe: str = "linear",
) -> Callable[[RepresentData, Budget, int], Candidates]:
    """Candidates of a class that is imported when they are built.

    Args:
        address: "module:Class" under paperback.represent.
        arguments: ``(data, budget, number of images)`` to the constructor's arguments.
        *variants: settings that are tried beside each other from the standard budget on.
        probe: see `Candidates`.
    """

    def build(data: RepresentData, budget: Budget, seed: int) -> Candidates:
        module, _, name = address.partition(":")
        cls = getattr(importlib.import_module(f"paperback.represent.{module}"), name)

        def make(n: int, settings: Settings) -> Encoder:
            encoder: Encoder = cls(**data.shape, **{**arguments(data, budget, n), **settings}, seed=seed)
            return encoder

        tried = for_budget(budget, quick=variants[:1], standard=variants) or ({},)
        return Candidates(make, tried, probe)

    return build


def _trained(data: RepresentData, budget: Budget, n: int) -> dict[str, Any]:
    return {"backbone": _resnet(budget), "epochs": _epochs(n, _steps(budget)), "batch_size": BATCH}


def _contrastive(data: RepresentData, budget: Budget, n: int) -> dict[str, Any]:
    return {"backbone": _resnet(budget), "steps": _steps(budget), "batch_size": BATCH}


def _mae(data: RepresentData, budget: Budget, n: int) -> dict[str, Any]:
    depth = for_budget(budget, smoke=1, standard=4)
    side = data.shape["image_size"]
    patch = next(p for p in (4, 7, 5, 3, 2, 1) if side % p == 0)
    backbone = {"name": "vit", "depth": depth, "patch": patch}
    return {"backbone": backbone, "epochs": _epochs(n, _steps(budget)), "batch_size": BATCH}


def _inflation(data: RepresentData, budget: Budget, n: int) -> dict[str, Any]:
    learner = {"name": "simclr", "backbone": _resnet(budget), "batch_size": BATCH}
    generated = for_budget(budget, smoke=n, standard=None)
    return {"learner": learner, "steps": _steps(budget), "n_generated": generated, "diagnose": False}


def _pca(data: RepresentData, budget: Budget, n: int) -> dict[str, Any]:
    pixels = data.train[0][0].numel()
    return {"n_components": min(64, pixels, n - 1)}


def _contender(
    name: str, label: str, build: Callable[[RepresentData, Budget, int], Candidates], kind: Kind = "baseline"
) -> Contender:
    return Contender(name, label, kind, lambda data: None, build)


VIEWS = ({"augment": "adainf"}, {"augment": "simclr"})  # weak and strong augmentation

CONTENDERS = (
    _contender("spark", "SparK", _encoder("spark:SparK", _trained, {"lr": 2e-3}, {"lr": 5e-4}), "method"),
    _contender(
        "adaptive-inflation",
        "SimCLR with adaptive inflation",
        _encoder("adaptive_inflation:AdaptiveInflation", _inflation),
        "method",
    ),
    _contender(
        "hyperspherical",
        "hyperspherical embedding",
        _encoder("hyperspherical:HypersphericalClassifier", _trained, {"lr": 1e-3}, {"lr": 3e-3}),
        "method",
    ),
    _contender(
        "generative-classifier",
        "SimCLR, naive Bayes",
        _encoder("contrastive:SimCLR", _contrastive, *VIEWS, probe="nb"),
        "method",
    ),
    _contender(
        "supervised",
        "supervised, on the labelled images",
        _encoder("baselines:Supervised", _trained, {"lr": 2e-3}, {"lr": 5e-4}),
    ),
    _contender(
        "random",
        "untrained network",
        _encoder("baselines:RandomFeatures", lambda d, b, n: {"backbone": _resnet(b)}),
    ),
    _contender(
        "pca", "principal components", _encoder("baselines:PCA", _pca, {"whiten": False}, {"whiten": True})
    ),
    _contender(
        "denoising",
        "denoising autoencoder",
        _encoder("baselines:DenoisingAutoencoder", _trained, {"noise": 0.2}, {"noise": 0.5}),
    ),
    _contender(
        "simclr",
        "SimCLR",
        _encoder("contrastive:SimCLR", _contrastive, *VIEWS),
    ),
    _contender(
        "mae",
        "masked autoencoder",
        _encoder("baselines:MaskedAutoencoder", _mae, {"mask_ratio": 0.67}, {"mask_ratio": 0.75}),
    ),
)


# -- measurement ---------------------------------------------------------------------------------------------


def evaluate(
    contender: Contender, data: RepresentData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Fit one contender, choose its settings on the validation part, measure it on the test part.

    Args:
        contender: who.
        data: from `load`.
        budget: how long encoders are trained, and how many draws of labels.
        seed: of encoders and draws.
        out: folder for the encoder and the sentences of the report.

    Returns:
        Metric name to number, None where there are fewer labels.
    """
    candidates = contender.build(data, budget, seed)
    with Stopwatch() as fitting:
        encoder, settings, sentence = _chosen(candidates, data, seed)
    measured: dict[str, float | None] = dict.fromkeys(metric.name for metric in METRICS)
    draws = for_budget(budget, smoke=1, quick=2, standard=3)
    for per_class in PER_CLASS:
        found = [
            _measure(encoder, candidates, settings, data, rows)
            for rows in _labelled(data, per_class, seed, draws)
        ]
        if found:
            name = "all" if per_class is None else str(per_class)
            mean = np.mean(found, axis=0)
            measured |= {f"accuracy_{name}": float(mean[0]), f"knn_{name}": float(mean[1])}
    measured["fit_seconds"] = fitting.seconds
    measured["flops"] = float(flops(encoder, data.test[0][:1]))
    measured["dim"] = float(encoder.dim)
    out.mkdir(parents=True, exist_ok=True)
    encoder.save_pretrained(out / "encoder")
    measured["bytes"] = float(size_on_disk(out / "encoder"))
    write_atomically(out / READING, sentence + "\n")
    return measured


def _chosen(candidates: Candidates, data: RepresentData, seed: int) -> tuple[Encoder, Settings, str]:
    """The encoder, fitted on all training images, that is best on the validation part, and a sentence."""
    best: tuple[float, Encoder, Settings] | None = None
    middle = next(_labelled(data, n, seed, 1) for n in (50, 10, None) if _labelled(data, n, seed, 1))[0]
    for settings in candidates.settings:
        encoder = _fitted(candidates, settings, data)
        x, y = data.train[0][middle], data.train[1][middle]
        labels = data.val[1].numpy()
        accuracy = _probe(
            candidates.probe, features(encoder, x), y.numpy(), features(encoder, data.val[0]), labels
        )
        if best is None or accuracy > best[0]:
            best = accuracy, encoder, settings
    assert best is not None
    words = ", ".join(f"{name}={value}" for name, value in best[2].items()) or "the usual ones"
    how = f"best of {len(candidates.settings)}" if len(candidates.settings) > 1 else "none else tried"
    trained = (
        "with all labels, and afresh for fewer" if best[1].supervised else "on all images, without labels"
    )
    return (
        best[1],
        best[2],
        f"Settings: {words} ({how}); fitted {trained}; {best[0]:.1%} on the validation part.",
    )


def _fitted(candidates: Candidates, settings: Settings, data: RepresentData) -> Encoder:
    encoder = candidates.make(len(data.pool), settings)
    if encoder.supervised:
        return candidates.make(len(data.train[0]), settings).fit(*data.train, progress=False)
    return encoder.fit(data.pool, progress=False)


def _measure(
    encoder: Encoder, candidates: Candidates, settings: Settings, data: RepresentData, rows: NDArray[np.int64]
) -> tuple[float, float]:
    """Accuracy of the probe and of nearest neighbours on the test part, from the labelled rows."""
    x, y = data.train[0][rows], data.train[1][rows]
    if encoder.supervised and len(rows) < len(data.train[0]):
        encoder = candidates.make(len(rows), settings).fit(x, y, progress=False)
    labelled, asked = features(encoder, x), features(encoder, data.test[0])
    labels, truth = y.numpy(), data.test[1].numpy()
    near = knn(labelled, labels, asked, truth).accuracy
    return _probe(candidates.probe, labelled, labels, asked, truth), near


def _probe(kind: str, x: Any, y: Any, x_test: Any, y_test: Any) -> float:
    probe = naive_bayes_probe if kind == "nb" else linear_probe
    return float(probe(x, y, x_test, y_test).accuracy)


def _labelled(data: RepresentData, per_class: int | None, seed: int, draws: int) -> list[NDArray[np.int64]]:
    """Rows of the labelled training images, a set for each draw; none where a class has too few."""
    y = data.train[1].numpy()
    everything = np.arange(len(y))
    if per_class is None:
        return [everything]
    sizes = np.unique(y, return_counts=True)[1]
    if sizes.min() < per_class or per_class * len(sizes) >= len(y):
        return []
    firsts = (sizes.cumsum() - sizes)[:, None] + np.arange(per_class)
    drawn = []
    for draw in range(draws):
        order = np.random.default_rng([seed, draw]).permutation(len(y))
        by_class = order[np.argsort(y[order], kind="stable")]
        drawn.append(np.sort(by_class[firsts.ravel()]))
    return drawn


BENCH = Bench(
    task="represent",
    metrics=METRICS,
    contenders=CONTENDERS,
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 4, "quick": 45, "standard": 300, "full": 3600},
)
