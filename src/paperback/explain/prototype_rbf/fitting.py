"""How the shallow network starts and how it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor

from paperback.explain.prototype_rbf.heads import OriginalCBCHead, margin_loss
from paperback.explain.prototype_rbf.network import METRICS, PrototypeNetwork
from paperback.training import derive, generator, train

OWN_CLASS = (
    5.0  # start of the logits of a class's own components; with 3 digits ended at .928 instead of .954
)
SPREAD = 0.25  # root mean square deviation of the columns inside the training, that of pixels in 0..1
SAMPLE = 1000  # rows that the default margin is estimated on
PULL = 5.0  # learning rate of the reasoning over that of the prototypes

Rows = NDArray[np.float64]
Codes = NDArray[Any]


def fit(
    network: PrototypeNetwork,
    x: Rows,
    y: Codes,
    *,
    per_class: int,
    loss: str,
    margin: float,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> None:
    """Start the network on the rows and train it: Adam on prototypes, ln sigma and reasoning.

    The rows are brought to a spread of `SPREAD` and the network is brought back to their units, so that
    learning rates mean the same for all data and radii scale with it.

    Args:
        network: with ``per_class`` components of each class; trained in place.
        x: ``(rows, features)``.
        y: class indices.
        per_class: components of each class.
        loss: "robust", mean relu(margin - eps*), or "margin", on the gap of agreements.
        margin: of the loss, in the units of x ("robust") or of agreements ("margin").
        epochs, batch_size, lr, seed, progress: see `RBFPrototypeClassifier`.
    """
    scale = float(np.sqrt(x.var(0).mean())) / SPREAD or 1.0
    rows = x / scale
    start(network, rows, y, per_class, seed)

    def objective(model: PrototypeNetwork, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        if loss == "margin":
            return margin_loss(model(batch[0]), batch[1], margin)
        return (margin / scale - model.radii(*batch, tight=False)).relu().mean()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        head = {id(p) for p in network.head.parameters()}
        groups = [
            {"params": [p for p in parameters if id(p) not in head], "lr": lr},
            {"params": [p for p in parameters if id(p) in head], "lr": PULL * lr},
        ]
        return torch.optim.Adam(groups)

    train(
        network, objective, (torch.tensor(rows), torch.tensor(y)), epochs=epochs, batch_size=batch_size,
        lr=lr, optimizer=optimizer, seed=derive(seed, "training"), progress=progress,
        description="prototypes",
    )  # fmt: skip
    power = {"sqeuclidean": 2, "cosine": 0}.get(network.metric, 1) * (
        2 if network.kernel == "gaussian" else 1
    )
    with torch.no_grad():
        network.components.mul_(scale)
        network.log_sigma.add_(power * float(np.log(scale)))


def start(network: PrototypeNetwork, x: Rows, y: Codes, per_class: int, seed: int) -> None:
    """Components by k-means in each class, sigma by the usual distance to the nearest, reasoning by class."""
    centres = []
    for label in range(network.n_classes):
        rows = x[y == label]
        n = min(per_class, len(np.unique(rows, axis=0)))
        means = KMeans(n, n_init=1, random_state=derive(seed, "k-means", label))
        again = np.arange(per_class) % n  # a class with fewer different rows repeats them
        centres.append(means.fit(rows).cluster_centers_[again])
    own = torch.eye(network.n_classes, dtype=torch.float64).repeat_interleave(per_class, 0)
    own = own.repeat_interleave(network.head.vectors_per_class, 1)
    with torch.no_grad():
        network.components.copy_(torch.tensor(np.concatenate(centres)))
        nearest = network.distances(torch.tensor(x)).amin(1)
        typical = nearest if network.kernel == "exp" else nearest.square()
        usual = typical[typical > 1e-6]  # rows that are components say nothing
        network.log_sigma.fill_(float(usual.median().log()) if len(usual) else 0.0)
        logits = network.head.logits
        source = generator(seed, "reasoning")
        logits.copy_(0.2 * torch.randn(logits.shape, generator=source, dtype=logits.dtype))
        present = logits[0] if isinstance(network.head, OriginalCBCHead) else logits[: len(own)]
        present += OWN_CLASS * own


def usual_margin(x: Rows, y: Codes, metric: str, seed: int) -> float:
    """Half the median distance from a row to the nearest of another class: what a radius can be, at most.

    Args:
        x: ``(rows, features)``.
        y: class indices.
        metric: one of `METRICS`.
        seed: of the draw of `SAMPLE` rows.

    Returns:
        The margin, positive.
    """
    some = np.random.default_rng(derive(seed, "margin")).permutation(len(x))[:SAMPLE]
    rows, labels = torch.tensor(x[some]), torch.tensor(y[some])
    distances = torch.cdist(rows, rows, METRICS[metric])
    nearest = distances.masked_fill(labels[:, None] == labels, torch.inf).amin(1)
    usual = nearest[nearest.isfinite() & (nearest > 0)]
    return float(usual.median()) / 2 if len(usual) else 1.0
