"""Studies that end in every way a study can end.

As a script, ``fake_studies.py STUDY FOLDER`` runs one in a process of its own.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from paperback import catalogue
from paperback.catalogue import Method
from paperback.errors import DataError
from paperback.saving import Saved
from paperback.study import Run, run_study
from paperback.study.figures import BASELINE, METHOD, NARROW, REFERENCE, direct_labels, style


class Net(Saved, nn.Module):
    """Something to save."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2)


def fake_method(study: str) -> Method:
    """A catalogue entry whose study is the function of that name in this module."""
    return Method(
        number=1,
        slug=f"fake-{study.replace('_', '-')}",
        title="Fixed Points of Imaginary Machines",
        authors=("A. Author", "B. Writer"),
        year=2024,
        venue="NeurIPS",
        arxiv="2400.00001",
        task="density",
        module="paperback.density.fake",
        summary="Completes images from the pixels that are known, with one answer wherever it starts.",
        keywords=("fake",),
        object="fake_studies:Net",
        study=f"fake_studies:{study}",
    )


def complete(run: Run) -> None:
    """Are images completed better from a unique fixed point than by a mean-field RBM?

    Both see 40 % of the pixels of each digit and must name its class. The search begins from several
    starts; it would be falsified if two of them ended in different places.
    """
    n = len(run.seeds)
    generator = np.random.default_rng(run.seed)
    for _ in run.track(range(2), "outer"):
        for _ in run.track(iter(range(3)), "inner", total=3):
            generator.random()
    run.table("accuracy", _rows(), caption="Accuracy from 40 % of the pixels, and how long one image takes.")
    run.figure(
        "residual",
        _figure(),
        "Residual against iteration.",
        "Two falling lines; Anderson reaches 1e-6 first.",
    )
    spread = list(0.001 * np.arange(1, n + 1))
    better = [0.794 + 0.002 * i for i in range(n)]
    run.claim(
        "classifies better than a mean-field RBM from the same pixels",
        paper="92 % against 84 % on MNIST",
        measured=better,
        baseline=[0.714 - 0.001 * i for i in range(n)],
        at_least=0.04,
    )
    run.claim("ends in the same place from every start", paper="proved", measured=spread, at_most=0.01)
    run.claim(
        "completes pixels better than the RBM",
        paper="not reported",
        measured=-0.03,
        baseline=0.0,
        interval=(-0.05, -0.01),
        at_least=0.0,
        unit="nats",
        note="Digits are a small set; the paper has no such number.",
    )
    run.claim("is faster", paper="2 times", measured=2.1, at_least=2.0, interval=(1.8, 2.4), unit="times")
    run.claim("has a finite likelihood", paper="yes", measured=math.nan, at_least=0.0)
    run.note("The RBM wins on completion; the paper does not compare that.")
    warnings.warn("3 of 100 samples did not converge", RuntimeWarning, stacklevel=1)
    run.model("model", Net())


def holds(run: Run) -> None:
    """Does one and one make two?"""
    run.figure("sum", _figure(), "A sum.", "A line.")
    run.claim("one and one make two", paper="2", measured=[2.0] * len(run.seeds), at_least=2.0)


def does_not_hold(run: Run) -> None:
    """Does one and one make three?"""
    run.claim("one and one make three", paper="3", measured=2.0, at_least=3.0)


def undecided(run: Run) -> None:
    """Is a coin fair?"""
    run.claim("the coin is not fair", paper="0.6", measured=0.52, at_least=0.5, interval=(0.4, 0.6))


def no_claim(run: Run) -> None:
    """Is there anything to say?"""
    run.note("Nothing.")


def uses_data(run: Run) -> None:
    """What is in the data of the user?"""
    assert run.data is not None
    run.claim("the file has letters", paper="yes", measured=float(len(run.data.read_text())), at_least=1)


def fails(run: Run) -> None:
    """Does it get to the end?"""
    run.claim("gets half way", paper="half way", measured=1.0, at_least=0.5)
    run.table("half", [{"step": 1}])
    raise DataError("the second half of the file <data.csv> is missing; copy it again.")


def sleeps(run: Run) -> None:
    """Does it wait to be stopped?"""
    run.claim("gets half way", paper="half way", measured=1.0, at_least=0.5)
    (run.out / "asleep").touch()
    for _ in run.track(range(600), "sleeping"):
        time.sleep(0.1)


sleeps.SEEDS = (7, 8)  # type: ignore[attr-defined]
SEEDS = (0, 1, 2)


def _rows() -> list[dict[str, object]]:
    return [
        {"model": "fixed point", "accuracy": 0.7943125, "ms per image": torch.tensor(1.25), "exact": True},
        {"model": "RBM, mean field", "accuracy": np.float64(0.7139), "ms per image": 0.8, "exact": False},
        {"model": "RBM, 1,000 Gibbs sweeps", "accuracy": 0.71725, "exact": True, "sweeps": 1000},
    ]


def _figure() -> Figure:
    iterations = np.arange(1, 61)
    with style():
        figure = Figure(figsize=NARROW)
        axes = figure.subplots()
        axes.semilogy(iterations, 0.5**iterations, label="Anderson", color=METHOD)
        axes.semilogy(iterations, 0.8**iterations, label="damped", color=BASELINE)
        axes.axhline(1e-6, color=REFERENCE, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(xlabel="iteration", title="Residual")
        direct_labels(axes)
    return figure


if __name__ == "__main__":
    name, folder = sys.argv[1:3]
    sys.modules["fake_studies"] = sys.modules["__main__"]
    catalogue.find = lambda slug: fake_method(name)
    run_study(f"fake-{name.replace('_', '-')}", budget="standard", out=Path(folder))
