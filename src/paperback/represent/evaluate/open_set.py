"""Rows of classes that were never trained: how well they are told apart from the known ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from paperback.errors import DataError
from paperback.represent.evaluate.checks import Array, check_width, checked, numbers, unit
from paperback.represent.evaluate.novel import class_means


@dataclass(frozen=True)
class OpenSet:
    """How known and unknown rows were told apart.

    Attributes:
        accuracy: on the known rows, nothing refused.
        auroc: probability that a known row scores above an unknown one.
        oscr: area under the curve of correct classification rate against false positive rate.
    """

    accuracy: float
    auroc: float
    oscr: float


def auroc(known: Any, unknown: Any) -> float:
    """Probability that a known row scores higher than an unknown one, ties counting half.

    Args:
        known: scores of rows of known classes ``(n,)``, higher for more familiar.
        unknown: scores of the others ``(m,)``.

    Raises:
        DataError: if scores are missing or not finite.
    """
    a, b = _scores(known, "known"), _scores(unknown, "unknown")
    truth = np.concatenate([np.ones(len(a)), np.zeros(len(b))])
    return float(roc_auc_score(truth, np.concatenate([a, b])))


def oscr(known: Any, correct: Any, unknown: Any) -> float:
    """Area under the open-set classification rate curve (Dhamija et al. 2018, arXiv 1811.04110).

    For a threshold, the correct classification rate is the part of known rows that score at least so much
    and are classified correctly; the false positive rate is the part of unknown rows that score as much. The
    area is the probability that a known row is correct and scores above an unknown one, ties counting half.
    It is at most the accuracy.

    Args:
        known: scores of rows of known classes ``(n,)``.
        correct: whether each is classified correctly ``(n,)``.
        unknown: scores of rows of other classes ``(m,)``.

    Raises:
        DataError: if the arrays do not fit.
    """
    a, b = _scores(known, "known"), _scores(unknown, "unknown")
    right = np.asarray(correct, dtype=bool)
    if right.shape != a.shape:
        raise DataError(f"correct has shape {right.shape} and known {a.shape}; give one for each known row.")
    if not right.any():
        return 0.0
    return float(right.mean()) * auroc(a[right], b)


def open_set(train: Any, train_labels: Any, test: Any, test_labels: Any) -> OpenSet:
    """Accuracy, AUROC and OSCR of the cosine to class means.

    Args:
        train: features ``(n, dim)`` of the known classes.
        train_labels: ``(n,)``.
        test: features of known and unknown classes.
        test_labels: their labels; one that is not among train_labels is unknown.

    Raises:
        DataError: if features and labels do not fit, or the test rows are all known or all unknown.
    """
    x, y = checked(train, train_labels, "train")
    x_test, y_test = checked(test, test_labels, "test")
    check_width(x, x_test, ("train", "test"))
    classes, means = class_means(x, y)
    known = np.isin(y_test, classes)
    if known.all() or not known.any():
        raise DataError("test must have rows of classes that are in train and rows of others.")
    cosines = unit(x_test, "test") @ means.T
    best = cosines.max(1)
    correct = (classes[cosines.argmax(1)] == y_test)[known]
    return OpenSet(
        float(correct.mean()), auroc(best[known], best[~known]), oscr(best[known], correct, best[~known])
    )


def _scores(values: Any, name: str) -> Array:
    scores = np.asarray(values, dtype=np.float64)
    return numbers(scores.reshape(-1, 1), name)[:, 0]
