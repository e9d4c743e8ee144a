"""Few-shot classification, episode by episode."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from paperback.errors import DataError
from paperback.represent.evaluate.checks import checked, unit
from paperback.study.statistics import MeanInterval, mean_interval

Metric = Literal["cosine", "euclidean"]

AT_A_TIME = 100  # episodes


def few_shot(
    features: Any,
    labels: Any,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    metric: Metric = "cosine",
    seed: int = 0,
) -> MeanInterval:
    """Mean accuracy over episodes, with its 95 % interval.

    An episode draws some classes, a few examples of each and other rows of them as queries. A query gets the
    class whose mean example is nearest (Snell et al. 2017, arXiv 1703.05175).

    Args:
        features: ``(n, dim)``, best of classes or images that the encoder has not seen.
        labels: ``(n,)``.
        ways: classes of an episode.
        shots: examples of each class.
        queries: other rows of each class.
        episodes: how many.
        metric: "cosine" (features and means of length one) or "euclidean".
        seed: of the draws.

    Returns:
        Mean accuracy over episodes, lower and upper end of its interval.

    Raises:
        DataError: if there are fewer than `ways` classes with ``shots + queries`` rows.
    """
    x, y = checked(features, labels)
    for name, value, least in (
        ("ways", ways, 2),
        ("shots", shots, 1),
        ("queries", queries, 1),
        ("episodes", episodes, 1),
    ):
        if value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}.")
    if metric not in ("cosine", "euclidean"):
        raise DataError(f'metric is {metric!r}; it must be "cosine" or "euclidean".')
    if metric == "cosine":
        x = unit(x)
    classes, counts = np.unique(y, return_counts=True)
    large = classes[counts >= shots + queries]
    if len(large) < ways:
        raise DataError(
            f"{len(large)} classes have the {shots + queries} rows that shots and queries take, and ways is "
            f"{ways}; ask for less of one of them."
        )
    members = [np.flatnonzero(y == label) for label in large]
    rng = np.random.default_rng(seed)
    accuracies: list[float] = []
    while len(accuracies) < episodes:
        n = min(AT_A_TIME, episodes - len(accuracies))
        rows = _draw(members, n, ways, shots + queries, rng)
        means = x[rows[:, :, :shots]].mean(2)  # (episodes, ways, dim)
        asked = x[rows[:, :, shots:]].reshape(n, ways * queries, -1)
        if metric == "cosine":
            means /= np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)
        # The nearest mean has the greatest  q.m - |m|^2 / 2.
        scores = asked @ means.transpose(0, 2, 1) - (means**2).sum(-1)[:, None] / 2
        truth = np.repeat(np.arange(ways), queries)
        accuracies += (scores.argmax(-1) == truth).mean(1).tolist()
    return mean_interval(accuracies)


def _draw(members: list[Any], n: int, ways: int, rows: int, rng: np.random.Generator) -> Any:
    """Row numbers ``(n, ways, rows)``, all of an episode different."""
    picked = rng.permuted(np.tile(np.arange(len(members)), (n, 1)), axis=1)[:, :ways]
    result = np.empty((n, ways, rows), dtype=np.int64)
    for c, own in enumerate(members):
        places = np.argwhere(picked == c)
        # The smallest of random keys: draws without repetition, for all episodes at once.
        keys = rng.random((len(places), len(own)))
        result[places[:, 0], places[:, 1]] = own[np.argsort(keys, axis=1)[:, :rows]]
    return result
