"""Part 3: contrastive learners on images with and without generated ones, at equal steps. No bar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from paperback.data import images
from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.adaptive_inflation import AdaptiveInflation, MixtureGenerator, classifier_tv
from paperback.represent.adaptive_inflation.method import make_learner
from paperback.represent.evaluate import linear_probe
from paperback.represent.interface import Encoder
from paperback.study import Run
from paperback.study.figures import PALETTE, REFERENCE, style

LEARNER_NAMES = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "barlow_twins": "Barlow Twins"}
GENERATOR_NAMES = {
    "none": "no inflation",
    "poor": "poor generator",
    "good": "better generator",
    "real": "other real images",
}


@dataclass(frozen=True)
class Arm:
    """One training: what is added to the real images, how they count, and how strong the augmentation is."""

    learner: str
    generator: str = "none"
    share: str = "plain"  # "plain" or "1/3"
    augmentation: str = "standard"  # or "weak"


def pictures(run: Run) -> None:
    """Accuracy of a linear probe for generators, shares of real images, augmentations and learners."""
    n_real = run.size(smoke=80, quick=500, standard=1000)
    dataset = images.read(run.data, labels="required") if run.data is not None else images.fashion_mnist()
    if dataset.train.y is None or dataset.test.y is None:
        raise DataError("the images have no labels; a probe needs some.")
    real, more = dataset.train.x[:n_real], dataset.train.x[n_real:]
    n_made = run.size(smoke=160, quick=2000, standard=10_000)
    generators: dict[str, Any] = {
        "poor": MixtureGenerator(1, dims=10).fit(real).sample(n_made),
        "good": MixtureGenerator(run.size(smoke=2, standard=40), dims=40).fit(real).sample(n_made),
    }
    if len(more) >= 2 * n_real:  # fewer cannot be two thirds of the mixture
        generators["real"] = more[:n_made]
    rows = []
    for arm in run.track(_arms(run, list(generators)), "images"):
        found = [
            _train_and_probe(run, arm, real, generators, dataset, seed)
            for seed in run.seeds[: run.size(smoke=1, quick=1, standard=1, full=3)]
        ]
        rows.append(vars(arm) | {"beta": found[0][1], "accuracy": float(np.mean([f[0] for f in found]))})
        run.log(f"{arm}: {rows[-1]['accuracy']:.3f}")
    run.table(
        "images",
        rows,
        f"{n_real:,} real images and up to {n_made:,} others, the same number of steps in every arm; linear "
        "probe on frozen features. The generator 'real' is other true images, the upper bound.",
    )
    pixels = _pixels(run, dataset)
    _draw_images(run, rows, pixels)
    gaps = {kind: classifier_tv(real, generators[kind]).estimate for kind in generators}
    told = ", ".join(f"{kind} {gap:.2f}" for kind, gap in gaps.items())
    run.note(
        f"Images: {_steps(run):,} steps of 128 images are a small part of the paper's 100,000 of 512. "
        "Differences of a point or two between arms are within what another seed gives; an effect of the "
        f"paper's size cannot be resolved here. A two-sample classifier's gap from the real images: {told}. "
        f"A linear probe on the pixels themselves reaches {pixels:.3f}; so short a training seldom beats it."
    )


def _arms(run: Run, generators: list[str]) -> list[Arm]:
    if run.budget in ("smoke", "quick"):
        return [Arm("simclr"), Arm("simclr", "good"), Arm("simclr", "good", "1/3", "weak")]
    strengths = ("standard", "weak")
    arms = [Arm("simclr", augmentation=strength) for strength in strengths]
    arms += [
        Arm("simclr", generator, share, strength)
        for generator in generators
        for share in ("plain", "1/3")
        for strength in strengths
    ]
    for learner in ("moco", "byol", "barlow_twins"):
        arms += [Arm(learner), Arm(learner, "good"), Arm(learner, "good", "1/3", "weak")]
    return arms


def _train_and_probe(
    run: Run, arm: Arm, real: Tensor, generators: dict[str, Any], dataset: Any, seed: int
) -> tuple[float, float]:
    """Accuracy of a linear probe on the encoder's features, and the share of real images."""
    settings = {"name": arm.learner, "backbone": {"name": "resnet", "width": 12}, "batch_size": 128}
    weak, steps = arm.augmentation == "weak", _steps(run)
    channels, side = (1 if real.ndim == 3 else real.shape[1]), real.shape[-1]
    encoder: Encoder
    if arm.generator == "none":
        learner = make_learner(settings | {"steps": steps}, channels, side, seed)
        learner.views = Views.of(learner.presets[weak])
        encoder, beta = learner.fit(real, progress=False), 1.0
    else:
        rule = {"augment": float(weak)} | ({"replicate": 1} if arm.share == "plain" else {"beta": 1 / 3})
        encoder = AdaptiveInflation(
            settings, rule=rule, steps=steps, diagnose=False, in_channels=channels, image_size=side, seed=seed
        )
        encoder.fit(real, generated=generators[arm.generator], progress=False)
        beta = float(encoder.report_["beta"])
    train, test, n = dataset.train, dataset.test, _labels(run)
    x, x_test = (encoder.transform(part) for part in (train.x[:n], test.x))
    return linear_probe(x, train.y[:n], x_test, test.y).accuracy, beta


def _pixels(run: Run, dataset: Any) -> float:
    """Accuracy of the same probe on the pixels."""
    train, test, n = dataset.train, dataset.test, _labels(run)
    x, x_test = (part.flatten(1).numpy() / 255 for part in (train.x[:n], test.x))
    return linear_probe(x, train.y[:n], x_test, test.y).accuracy


def _labels(run: Run) -> int:
    return run.size(smoke=200, quick=1000, standard=3000)


def _steps(run: Run) -> int:
    return run.size(smoke=2, quick=30, standard=300, full=10_000)


def _draw_images(run: Run, rows: list[dict[str, Any]], pixels: float) -> None:
    names = [
        f"{LEARNER_NAMES[row['learner']]}: {GENERATOR_NAMES[row['generator']]}"
        + ("" if row["generator"] == "none" else f", {row['share']}")
        for row in rows
    ]
    order = list(dict.fromkeys(names))
    with style():
        figure = Figure(figsize=(7.2, 1.2 + 0.26 * len(order)))
        axes = figure.subplots()
        for strength, colour in (("standard", PALETTE[1]), ("weak", PALETTE[0])):
            found = [
                (row["accuracy"], order.index(name))
                for row, name in zip(rows, names, strict=True)
                if row["augmentation"] == strength
            ]
            axes.plot(*zip(*found, strict=True), "o", color=colour, label=f"{strength} augmentation")
        axes.axvline(pixels, color=REFERENCE, linewidth=0.8, linestyle="--", label="pixels")
        axes.set_yticks(range(len(order)), order)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set(title="Images at equal steps", xlabel="accuracy of a linear probe")
        figure.legend(loc="outside lower center", ncols=3)
    run.figure(
        "images",
        figure,
        caption="Accuracy of a linear probe for each learner, generator and weight of the real images "
        "(plain: as much as a generated one; 1/3: together a third), with the standard and the weak "
        "augmentation; dashed: the probe on pixels.",
        alt="A dot plot of accuracies, one line for each learner, generator and weight, two colours for the "
        "augmentations.",
    )
