"""Classes that the encoder was not trained on, classified by the mean directions of a few examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paperback.errors import DataError
from paperback.represent.evaluate.checks import Array, Labels, check_width, checked, unit


@dataclass(frozen=True)
class NovelClasses:
    """Accuracies in [0, 1].

    Attributes:
        joint: of all test rows, over all classes.
        disjoint: of test rows of novel classes, over the novel classes.
        seen: of test rows of seen classes, over all classes.
        novel: of test rows of novel classes, over all classes.
    """

    joint: float
    disjoint: float
    seen: float
    novel: float


def class_means(features: Any, labels: Any) -> tuple[Labels, Array]:
    """Classes and their mean directions ``(classes, dim)``: the mean of unit features, of length one.

    Raises:
        DataError: if a feature vector or a mean is zero.
    """
    x, y = checked(features, labels)
    classes, codes = np.unique(y, return_inverse=True)
    sums = np.zeros((len(classes), x.shape[1]))
    np.add.at(sums, codes, unit(x))
    return classes, unit(sums, "the mean of a class")


def novel_classes(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    novel: Any,
    shots: int | None = None,
    seed: int = 0,
) -> NovelClasses:
    """Accuracy of class means where some classes are new to the encoder.

    Args:
        train: features ``(n, dim)`` of seen and novel classes; the novel ones are the examples.
        train_labels: ``(n,)``.
        test: features of both.
        test_labels: their labels.
        novel: labels of the novel classes.
        shots: examples of each novel class, drawn from train; all of them if None. Seen classes always have
            all.
        seed: of the draw.

    Returns:
        The accuracies of both scenarios.

    Raises:
        DataError: if features and labels do not fit, or a class has too few rows.
    """
    x, y = checked(train, train_labels, "train")
    x_test, y_test = checked(test, test_labels, "test")
    check_width(x, x_test, ("train", "test"))
    new = np.unique(np.asarray(novel))
    absent = [label for label in new if not (y == label).any() or not (y_test == label).any()]
    if len(new) < 2 or absent:
        reason = f"class {absent[0]} has no rows" if absent else f"there are {len(new)} of them"
        raise DataError(f"novel must name two classes or more that train and test have; {reason}.")
    if shots is not None:
        kept = _few(y, new, shots, np.random.default_rng(seed))
        x, y = x[kept], y[kept]
    classes, means = class_means(x, y)
    cosines = unit(x_test, "test") @ means.T
    among = np.isin(classes, new)
    is_new = np.isin(y_test, new)
    if is_new.all():
        raise DataError("test has rows of novel classes only; the joint scenario needs seen ones too.")
    right = classes[cosines.argmax(1)] == y_test
    disjoint = classes[among][cosines[np.ix_(is_new, among)].argmax(1)] == y_test[is_new]
    return NovelClasses(
        float(right.mean()), float(disjoint.mean()), float(right[~is_new].mean()), float(right[is_new].mean())
    )


def _few(y: Labels, new: Labels, shots: int, rng: np.random.Generator) -> Array:
    """Row numbers: all of the seen classes, `shots` of each novel one."""
    kept = [np.flatnonzero(~np.isin(y, new))]
    for label in new:
        rows = np.flatnonzero(y == label)
        if not 1 <= shots <= len(rows):
            raise DataError(
                f"class {label} has {len(rows)} rows in train and shots is {shots}; ask for 1 to that."
            )
        kept.append(rng.permutation(rows)[:shots])
    return np.concatenate(kept)
