"""`evaluate`: all protocols over numbers of labels and seeds, for any encoder, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paperback.data import splits
from paperback.errors import DataError
from paperback.represent.evaluate.checks import Array, Labels, checked
from paperback.represent.evaluate.episodes import few_shot
from paperback.represent.evaluate.features import features
from paperback.represent.evaluate.novel import novel_classes
from paperback.represent.evaluate.probes import knn, linear_probe, naive_bayes_probe
from paperback.represent.evaluate.tuning import Part, fine_tune

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

PROBES = ("linear", "logistic", "nb", "knn")  # on features of the labelled training images
SHOTS = ("few_shot", "novel_joint", "novel_disjoint")
PROTOCOLS = (*PROBES, "fine_tune", *SHOTS)


@dataclass(frozen=True)
class Score:
    """One accuracy.

    Attributes:
        protocol: one of `PROTOCOLS`.
        labels: labelled training images, or examples of each class for protocols with shots; None for all.
        seed: of the draw of labels or episodes.
        accuracy: in [0, 1].
    """

    protocol: str
    labels: int | None
    seed: int
    accuracy: float


@dataclass(frozen=True)
class Report:
    """What `evaluate` found.

    Attributes:
        name: of the encoder.
        dim: number of features.
        scores: one for each protocol, number of labels and seed.
    """

    name: str
    dim: int
    scores: tuple[Score, ...]

    def table(self) -> pd.DataFrame:
        """A row for each protocol and number of labels: mean, standard deviation and number of seeds."""
        import pandas as pd

        groups: dict[tuple[str, int | None], list[float]] = {}
        for score in self.scores:
            groups.setdefault((score.protocol, score.labels), []).append(score.accuracy)
        return pd.DataFrame(
            {
                "protocol": protocol,
                "labels": "all" if labels is None else str(labels),
                "accuracy": float(np.mean(values)),
                "sd": float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"),
                "seeds": len(values),
            }
            for (protocol, labels), values in groups.items()
        )

    def accuracy(self, protocol: str, labels: int | None = None) -> float:
        """Mean accuracy over seeds.

        Raises:
            DataError: if it was not measured.
        """
        values = [s.accuracy for s in self.scores if (s.protocol, s.labels) == (protocol, labels)]
        if not values:
            raise DataError(f"the report has no {protocol} with labels={labels}; see its table().")
        return float(np.mean(values))

    def to_markdown(self) -> str:
        """The table in Markdown."""
        frame = self.table()
        lines = [
            "| " + " | ".join(frame.columns) + " |",
            "| " + " | ".join("---" for _ in frame.columns) + " |",
        ]
        for row in frame.itertuples(index=False):
            cells = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Accuracy against the number of labels, a line for each protocol that has several."""
        from matplotlib.figure import Figure

        from paperback.study.figures import WIDE, direct_labels, style

        with style():
            figure = Figure(figsize=WIDE)
            axes = figure.subplots()
            for protocol in dict.fromkeys(score.protocol for score in self.scores):
                counts = sorted({s.labels for s in self.scores if s.protocol == protocol and s.labels})
                means = [self.accuracy(protocol, count) for count in counts]
                if counts:
                    axes.plot(counts, means, marker="o", label=protocol)
            axes.set_xscale("log")
            axes.set_xlabel("labels, or examples of each class")
            axes.set_ylabel("accuracy")
            axes.set_title(self.name)
            direct_labels(axes)
        return figure

    def __str__(self) -> str:
        frame = self.table().to_string(index=False, float_format=lambda value: f"{value:.3f}")
        return f"{self.name}, {self.dim} features\n{frame}"


def evaluate(
    source: Any,
    *,
    train: Part,
    test: Part,
    val: Part | None = None,
    protocols: Sequence[str] = ("linear", "knn", "few_shot"),
    label_counts: Sequence[int | None] = (100, 500),
    shots: Sequence[int | None] = (1, 5, 20),
    novel: Sequence[int] = (),
    seeds: int | Sequence[int] = 3,
    batch_size: int = 512,
) -> Report:
    """Measure what an encoder's features are worth.

    Probes are fitted on so many labelled training images, drawn in proportion to the classes, and tested on
    all test images. Few-shot episodes are drawn from the test images.

    Args:
        source: an `Encoder`, a vision model of `transformers`, a module or a function from images
            ``(n, c, h, w)`` in 0..1 to features.
        train: images and integer labels, a pair or a split of `paperback.data`.
        test: images and labels.
        val: images and labels that a linear probe's strength and the epoch of fine-tuning are chosen by.
            Without them a probe uses its own training rows (`linear_probe`), and fine-tuning its last epoch.
        protocols: among "linear" (ridge), "logistic", "nb" (naive Bayes), "knn", "fine_tune", "few_shot",
            "novel_joint" and "novel_disjoint".
        label_counts: labelled training images; None for all of them.
        shots: examples of each class in an episode, or of each novel class; for novel classes None is all.
        novel: labels of the classes that the encoder was not trained on, for the two novel protocols.
        seeds: how many draws of labels, or their seeds.
        batch_size: images at a time.

    Returns:
        The report; print it, or use its `table`, `to_markdown` and `plot`.

    Raises:
        DataError: if an argument or the data cannot be used.
    """
    unknown = [protocol for protocol in protocols if protocol not in PROTOCOLS]
    if unknown or not protocols:
        raise DataError(f"protocols has {unknown[:1] or 'nothing'}; take some of {', '.join(PROTOCOLS)}.")
    train, test = tuple(train), tuple(test)  # a `paperback.data.Split` is a pair, too
    x, y = checked(features(source, train[0], batch_size), train[1], "train")
    x_test, y_test = checked(features(source, test[0], batch_size), test[1], "test")
    held = None
    if val is not None:
        val = tuple(val)
        held = checked(features(source, val[0], batch_size), val[1], "val")
    scores: list[Score] = []
    for seed in range(seeds) if isinstance(seeds, int) else seeds:
        for protocol in protocols:
            if protocol in SHOTS:
                measured = [(n, _shot(protocol, x, y, x_test, y_test, n, novel, seed)) for n in shots]
            else:
                measured = []
                for n in label_counts:
                    rows = _labelled(y, n, seed)
                    if protocol == "fine_tune":
                        part = (train[0][rows], y[rows])
                        accuracy = fine_tune(source, part, test, val_part=val, seed=seed).accuracy
                    else:
                        accuracy = _probe(protocol, x[rows], y[rows], x_test, y_test, held)
                    measured.append((n, accuracy))
            scores += [Score(protocol, n, seed, accuracy) for n, accuracy in measured]
    name = getattr(source, "__name__", type(source).__name__)
    return Report(name, x.shape[1], tuple(scores))


def _labelled(y: Labels, n: int | None, seed: int) -> Any:
    """Row numbers of n training rows, at least one of each class."""
    codes = np.unique(y, return_inverse=True)[1].astype(np.int64)
    classes = int(codes.max()) + 1
    if n is None:
        return np.arange(len(y))
    if not classes <= n <= len(y):
        raise DataError(
            f"label_counts has {n}; train has {len(y)} labels of {classes} classes, ask for between."
        )
    # `draw` leaves one row of each class behind: those are taken first, the rest from what it draws.
    drawn, _ = splits.draw(np.arange(len(y)), len(y) - n, np.random.default_rng(seed), codes)
    return np.setdiff1d(np.arange(len(y)), drawn)


def _probe(
    protocol: str, x: Array, y: Labels, x_test: Array, y_test: Labels, held: tuple[Array, Labels] | None
) -> float:
    if protocol == "knn":
        return knn(x, y, x_test, y_test).accuracy
    if protocol == "nb":
        return naive_bayes_probe(x, y, x_test, y_test).accuracy
    val, val_labels = (None, None) if held is None else held
    kind: Any = "ridge" if protocol == "linear" else "logistic"
    return linear_probe(x, y, x_test, y_test, val=val, val_labels=val_labels, kind=kind).accuracy


def _shot(
    protocol: str, x: Array, y: Labels, x_test: Array, y_test: Labels, n: int | None, novel: Any, seed: int
) -> float:
    if protocol == "few_shot":
        if n is None:
            raise DataError("shots has None, which is for novel classes; an episode needs a number.")
        ways = min(5, len(np.unique(y_test)))
        return few_shot(x_test, y_test, ways=ways, shots=n, seed=seed).mean
    found = novel_classes(x, y, x_test, y_test, novel=novel, shots=n, seed=seed)
    return found.joint if protocol == "novel_joint" else found.disjoint
