"""How much real images count and how strong the augmentation is, chosen from the data.

The paper's AdaInf is two fixed settings for one data size. The rules that carry them to other sizes are ours:
"paper" interpolates between the paper's two settings, "graph" asks the augmentation graph. Both place the
augmentation on the line from the standard one (0) to AdaInf's (1). The "grid" rule, which trains, is in
`method`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from paperback.data.augment import Augment, Views
from paperback.errors import DataError
from paperback.represent.adaptive_inflation.gap import real_share, replication
from paperback.represent.adaptive_inflation.graph import (
    AugmentationGraph,
    augmentation_graph,
    graph_of,
    nearest_distance,
    view_overlap,
)
from paperback.represent.adaptive_inflation.inflated import whole_replication

BETA = 1 / 3  # the paper's share of real images: 10 * 50,000 of 10 * 50,000 + 1,000,000
INFLATION = 20  # how many generated images for each real one the paper has
LADDER = (1.0, 0.75, 0.5, 0.25, 0.0)  # augmentations that are tried, the weakest first
GRAPH_IMAGES = 1000  # that a graph is made of


@dataclass(frozen=True)
class Choice:
    """What a rule chose.

    Attributes:
        rule: its name.
        replicate: how often each real image counts.
        views: the augmentation; None for an encoder that has its own.
        share: its place between the standard one (0) and AdaInf's (1), where it has one.
        scores: what the rule compared, by candidate.
    """

    rule: str
    replicate: int
    views: Views | None
    share: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


def paper_replication(n_real: int, n_generated: int) -> int:
    """The whole replication nearest to the paper's share of real images, at least 1."""
    return max(1, round(replication(n_real, n_generated, BETA)))


def paper_rule(n_real: int, n_generated: int, presets: tuple[str, str]) -> Choice:
    """The paper's share of real images, and its two augmentations interpolated in log data size.

    The standard augmentation stands for as many images as real ones, AdaInf's for 20 times as many and more.
    """
    growth = math.log((n_real + n_generated) / n_real) / math.log(INFLATION)
    share = min(growth, 1.0)
    return Choice("paper", paper_replication(n_real, n_generated), between(presets, share), share)


def graph_rule(
    real: Tensor,
    generated: Tensor,
    sizes: tuple[int, int],
    presets: tuple[str, str],
    k: int,
    seed: int,
) -> Choice:
    """The weakest augmentation with which the mixture hangs together as the real images do with the standard.

    Inflation raises lambda_{k+1} and leaves the labelling error alone; a weaker augmentation lowers both. So
    the augmentation is weakened until lambda_{k+1} is back where it was without generated images. It is
    measured on half of a sample and on all of it, and carried on to all data in the logarithm of their
    number.

    Args:
        real: a sample of real images, float32 in 0..1.
        generated: a sample of generated ones.
        sizes: numbers of all real and of all generated images.
        presets: of the learner.
        k: number of classes.
        seed: of the views.

    Raises:
        DataError: if half of the real images are too few for k classes.
    """
    if len(real) < 2 * (k + 1):
        raise DataError(
            f"the rule 'graph' needs {2 * (k + 1)} real images for {k} classes; there are {len(real)}."
        )
    replicate = paper_replication(*sizes)
    beta = real_share(*sizes, replicate)
    both = torch.cat([real, generated])
    weight = np.repeat([beta / len(real), (1 - beta) / len(generated)], [len(real), len(generated)])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed)).numpy()
    bandwidth = nearest_distance(real) / 4

    def extrapolated(share: float, rows: NDArray[np.int64], n_total: int) -> float:
        augment = between(presets, share).first
        overlap = view_overlap(both[rows], augment, bandwidth=bandwidth, seed=seed)
        values = []
        for n in (len(rows) // 2, len(rows)):  # the graph of a part of the images is a part of the matrix
            p = weight[rows[:n]]
            values.append(graph_of(overlap[:n, :n], p / p.sum(), k).lambda_after(k))
        growth = math.log(max(n_total / len(rows), 1.0)) / math.log(2)
        return min(values[1] + max(values[1] - values[0], 0.0) * growth, 1.0)

    needed = extrapolated(LADDER[-1], order[order < len(real)], sizes[0])
    scores = {"needed: real images, augmentation 0": needed}
    chosen = LADDER[-1]
    for share in LADDER:
        scores[f"augmentation {share:g}"] = extrapolated(share, order, sum(sizes))
        if scores[f"augmentation {share:g}"] >= needed:
            chosen = share
            break
    return Choice("graph", replicate, between(presets, chosen), chosen, scores)


def given_rule(rule: Mapping[str, Any], n_real: int, n_generated: int, presets: tuple[str, str]) -> Choice:
    """What the user set: "replicate" or "beta", and "augment", a preset, settings, or a share in 0..1.

    Raises:
        DataError: if there is another key.
    """
    unknown = set(rule) - {"replicate", "beta", "augment"}
    if unknown:
        raise DataError(f"the rule has a key {min(unknown)!r}; it takes replicate or beta, and augment.")
    if "replicate" in rule and "beta" in rule:
        raise DataError("the rule gives replicate and beta; give one of them.")
    if "beta" in rule:
        replicate = whole_replication(n_real, n_generated, rule["beta"])
    else:
        replicate = rule.get("replicate", paper_replication(n_real, n_generated))
    augment = rule.get("augment", 1.0)
    if isinstance(augment, int | float):
        return Choice("given", replicate, between(presets, float(augment)), float(augment))
    return Choice("given", replicate, Views.of(augment))


def between(presets: tuple[str, str], share: float) -> Views:
    """The augmentation at a place on the line from the standard one (0) to AdaInf's (1)."""
    standard, weak = (Views.of(name) for name in presets)
    return standard.towards(weak, share)


def mixed_graph(
    real: Tensor, generated: Tensor, beta: float, augment: Augment, k: int, seed: int
) -> AugmentationGraph:
    """The augmentation graph of a sample of the mixture: the real images weigh beta together."""
    if len(generated) == 0:
        return augmentation_graph(real, augment=augment, k=k, seed=seed)
    weights = np.repeat([beta / len(real), (1 - beta) / len(generated)], [len(real), len(generated)])
    both = torch.cat([real, generated])
    return augmentation_graph(both, augment=augment, probabilities=weights / weights.sum(), k=k, seed=seed)


def some(images: Any, n: int, seed: int) -> Any:
    """At most n of the images, drawn without replacement."""
    if len(images) <= n:
        return images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    return pick(images, rows.sort().values)


def pick(images: Any, rows: Tensor) -> Any:
    """Some rows of an array, a memory map or a tensor."""
    return images[rows] if isinstance(images, Tensor) else images[rows.numpy()]
