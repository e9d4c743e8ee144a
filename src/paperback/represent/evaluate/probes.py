"""Classifiers on frozen features: ridge and logistic regression, naive Bayes, nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from paperback.errors import DataError
from paperback.represent.evaluate.checks import Array, Labels, check_width, checked, unit

Kind = Literal["ridge", "logistic"]

PENALTIES = tuple(10.0**e for e in range(-6, 3))  # of a ridge, for each row and unit of variance
COSTS = tuple(10.0**e for e in range(-3, 4))  # C of a logistic regression
SMALLEST_SPREAD = 1e-9
ROWS = 2048  # of similarities at a time


@dataclass(frozen=True, eq=False)
class Probed:
    """What a probe reached.

    Attributes:
        accuracy: on the test rows, in [0, 1].
        predictions: labels ``(test rows,)``.
        choice: the strength that was chosen: the ridge's penalty, the C of a logistic regression; NaN where
            nothing is chosen.
        tried: each strength with the accuracy that it was chosen by.
    """

    accuracy: float
    predictions: Labels
    choice: float = float("nan")
    tried: tuple[tuple[float, float], ...] = ()


def linear_probe(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    val: Any = None,
    val_labels: Any = None,
    kind: Kind = "ridge",
) -> Probed:
    """Accuracy of a linear classifier, its strength chosen without the test rows.

    The ridge regresses one-hot labels on standardised features. All penalties come from one
    eigendecomposition; without a validation part they are judged by leaving out each training row in turn,
    which has a closed form. The logistic regression is fitted once for each C; without a validation part
    they are judged by cross-validation.

    Args:
        train: features ``(n, dim)``.
        train_labels: ``(n,)``.
        test: features.
        test_labels: their labels.
        val: features that the strength is chosen by.
        val_labels: their labels.
        kind: "ridge" or "logistic".

    Returns:
        Accuracy, predictions, and the choice.

    Raises:
        DataError: if features and labels do not fit, or there is one class only.
    """
    x, y = checked(train, train_labels, "train")
    x_test, y_test = checked(test, test_labels, "test")
    check_width(x, x_test, ("train", "test"))
    held = None
    if val is not None:
        held = checked(val, val_labels, "val")
        check_width(x, held[0], ("train", "val"))
    if len(np.unique(y)) < 2:
        raise DataError("train has one class only; a probe needs two or more.")
    if kind == "ridge":
        return _ridge(x, y, x_test, y_test, held)
    if kind == "logistic":
        return _logistic(x, y, x_test, y_test, held)
    raise DataError(f'kind is {kind!r}; it must be "ridge" or "logistic".')


def naive_bayes_probe(train: Any, train_labels: Any, test: Any, test_labels: Any) -> Probed:
    """Accuracy of Gaussian naive Bayes with shared variances and the automatic floor; nothing is chosen.

    Args and errors are those of `linear_probe`.
    """
    from paperback.represent.generative_classifier import NaiveBayesProbe

    x, y = checked(train, train_labels, "train")
    x_test, y_test = checked(test, test_labels, "test")
    check_width(x, x_test, ("train", "test"))
    predictions = NaiveBayesProbe(floor="auto").fit(x, y).predict(x_test)
    return Probed(float(np.mean(predictions == y_test)), predictions)


def knn(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Probed:
    """Accuracy of the k nearest neighbours by cosine.

    Each votes with weight exp(cosine / temperature) (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    Args:
        train: features ``(n, dim)``.
        train_labels: ``(n,)``.
        test: features.
        test_labels: their labels.
        k: neighbours; all training rows if there are fewer.
        temperature: of the weights, > 0.

    Returns:
        Accuracy and predictions.

    Raises:
        DataError: if features and labels do not fit, or a feature vector is zero.
    """
    if k < 1 or temperature <= 0:
        raise DataError(f"k is {k} and temperature {temperature}; k must be at least 1, temperature above 0.")
    x, y = checked(train, train_labels, "train")
    x_test, y_test = checked(test, test_labels, "test")
    check_width(x, x_test, ("train", "test"))
    x, x_test = unit(x, "train"), unit(x_test, "test")
    classes, codes = np.unique(y, return_inverse=True)
    k = min(k, len(x))
    votes = np.zeros((len(x_test), len(classes)))
    for start in range(0, len(x_test), ROWS):
        cosines = x_test[start : start + ROWS] @ x.T
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp((np.take_along_axis(cosines, nearest, 1) - 1) / temperature)
        rows = np.repeat(np.arange(start, start + len(cosines)), k)
        np.add.at(votes, (rows, codes[nearest].ravel()), weights.ravel())
    predictions = classes[votes.argmax(1)]
    return Probed(float(np.mean(predictions == y_test)), predictions)


# -- helpers -------------------------------------------------------------------------------------------------


def _ridge(x: Array, y: Labels, x_test: Array, y_test: Labels, held: tuple[Array, Labels] | None) -> Probed:
    """min ||Y - XW||^2 + n * penalty * ||W||^2 on centred features of unit variance."""
    classes, codes = np.unique(y, return_inverse=True)
    n, mean = len(x), x.mean(0)
    scale = np.maximum(x.std(0), SMALLEST_SPREAD)
    x = (x - mean) / scale
    prior = np.bincount(codes) / n
    targets = np.eye(len(classes))[codes] - prior
    left, squares, right = _thin_svd(x)
    projected = left.T @ targets
    roots = np.sqrt(squares)[:, None]
    on_held = None if held is None else ((held[0] - mean) / scale) @ right
    tried = []
    for penalty in PENALTIES:
        shrunk = squares / (squares + n * penalty)
        if on_held is not None and held is not None:
            scores, truth = on_held @ (shrunk[:, None] / roots * projected), held[1]
        else:
            # Left out, row i is predicted by y_i - (y_i - fit_i) / (1 - h_ii).
            fit = left @ (shrunk[:, None] * projected)
            leverage = np.minimum(left**2 @ shrunk + 1 / n, 1 - 1e-9)[:, None]
            scores, truth = targets - (targets - fit) / (1 - leverage), y
        accuracy = float(np.mean(classes[(scores + prior).argmax(1)] == truth))
        tried.append((penalty, accuracy))
    best = max(tried, key=lambda pair: (pair[1], pair[0]))[0]  # of equals the stronger
    weights = right @ ((squares / (squares + n * best))[:, None] / roots * projected)
    predictions = classes[(((x_test - mean) / scale) @ weights + prior).argmax(1)]
    return Probed(float(np.mean(predictions == y_test)), predictions, best, tuple(tried))


def _thin_svd(x: Array) -> tuple[Array, Array, Array]:
    """x = U diag(sqrt(s)) V^T from the eigenvalues s of the smaller Gram matrix: U, s, V."""
    tall = len(x) >= x.shape[1]
    values, vectors = np.linalg.eigh(x.T @ x if tall else x @ x.T)
    kept = values > values.max(initial=0.0) * 1e-12
    if not kept.any():
        raise DataError("all training features are constant; there is nothing to classify by.")
    values, vectors = values[kept], vectors[:, kept]
    if tall:
        return x @ vectors / np.sqrt(values), values, vectors
    return vectors, values, x.T @ vectors / np.sqrt(values)


def _logistic(
    x: Array, y: Labels, x_test: Array, y_test: Labels, held: tuple[Array, Labels] | None
) -> Probed:
    from paperback.represent.generative_classifier import LogisticProbe

    if held is None:
        probe = LogisticProbe(C="cv", scale="standard").fit(x, y)
        tried = tuple(zip(probe.tried_, probe.cv_accuracy_, strict=True))
    else:
        probes = [LogisticProbe(C=cost, scale="standard").fit(x, y) for cost in COSTS]
        scores = [float(np.mean(each.predict(held[0]) == held[1])) for each in probes]
        tried = tuple(zip(COSTS, scores, strict=True))
        probe = probes[int(np.argmax(scores))]  # of equals the stronger penalty
    predictions = probe.predict(x_test)
    return Probed(float(np.mean(predictions == y_test)), predictions, float(probe.C_), tried)
