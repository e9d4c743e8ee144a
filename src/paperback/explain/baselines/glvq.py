"""Generalized learning vector quantization: the nearest prototype decides, and the gap to the next certifies.

With d+ and d- the Euclidean distances to the nearest prototype of the own and of any other class, training
lowers the mean of

    (d+^2 - d-^2) / (d+^2 + d-^2)     ("relative")     or     relu(margin - (d- - d+) / 2)     ("margin")

A move of length eps changes d- - d+ by at most 2 eps, so that (d- - d+)/2 is safe (Saralajew et al. 2020,
"fast adversarial robustness certification of nearest prototype classifiers"). The decision can only change
across the plane between two prototypes; the distance to it, (d-^2 - d+^2) / (2 |w- - w+|), is never smaller,
and that is the certificate here.

Source: Sato and Yamada, NIPS 1995.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.baselines.base import BATCH, Baseline
from paperback.explain.interface import Array, Explanation
from paperback.explain.prototype_rbf.fitting import usual_margin
from paperback.training import derive, train

LOSSES = ("relative", "margin")
SPREAD = 0.25  # root mean square deviation of the columns inside the training


class GLVQ(Baseline):
    """Nearest prototype, with prototypes trained for relative or absolute distance.

    Args:
        n_prototypes: of each class.
        loss: "relative", the usual GLVQ, or "margin".
        margin: of the loss "margin", in the units of X; half the usual distance between classes if None.
        epochs: passes over the rows.
        batch_size: rows of a step.
        lr: of Adam on rows of spread .25.
        image_shape: (height, width) or (height, width, 3) of rows that are images.
        seed: of everything drawn.

    Attributes:
        prototypes_: ``(classes * n_prototypes, features)``, by class.
    """

    prototypes_: Array

    def __init__(
        self,
        n_prototypes: int = 4,
        *,
        loss: str = "relative",
        margin: float | None = None,
        epochs: int = 80,
        batch_size: int = 128,
        lr: float = 0.01,
        image_shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> None:
        self.n_prototypes = n_prototypes
        self.loss = loss
        self.margin = margin
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.image_shape = image_shape
        self.seed = seed

    def _fit(self, X: Array, y: NDArray[Any]) -> None:
        if self.n_prototypes < 1:
            raise DataError(f"n_prototypes is {self.n_prototypes}; give each class at least one.")
        if self.loss not in LOSSES:
            raise DataError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}.")
        if self.margin is not None and not 0 < self.margin < np.inf:
            raise DataError(f"margin is {self.margin}; it must be a positive number.")
        scale = float(np.sqrt(X.var(0).mean())) / SPREAD or 1.0
        margin = self.margin
        if margin is None and self.loss == "margin":
            margin = usual_margin(X, y, "euclidean", self.seed)
        model = _Prototypes(torch.tensor(self._start(X / scale, y)), self.n_prototypes)

        def objective(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
            distances = model(batch[0])
            own = nn.functional.one_hot(batch[1], distances.shape[1]).bool()
            mine = distances.masked_fill(~own, torch.inf).amin(1)
            other = distances.masked_fill(own, torch.inf).amin(1)
            if margin is not None and self.loss == "margin":
                return (margin / scale - (other - mine) / 2).relu().mean()
            mine, other = mine.square(), other.square()
            return ((mine - other) / (mine + other).clamp_min(1e-12)).mean()

        train(
            model, objective, (torch.tensor(X / scale), torch.tensor(y)), epochs=self.epochs,
            batch_size=self.batch_size, lr=self.lr, seed=derive(self.seed, "training"), progress=False,
        )  # fmt: skip
        self.prototypes_ = scale * model.prototypes.detach().numpy()

    def scores(self, X: Tensor) -> Tensor:
        """Minus the squared distance to the nearest prototype of each class."""
        return -self._distances(X).square().unflatten(1, (len(self.classes_), -1)).amin(2)

    def explain(self, X: ArrayLike) -> Explanation:
        """Minus the squared distance to each class's nearest prototype; only that one counts."""
        rows = self._rows(X)
        n, n_classes = len(rows), len(self.classes_)
        with torch.no_grad():
            parts = [self._distances(part) for part in torch.tensor(rows).split(BATCH)]
        squared = torch.cat(parts).square().numpy().reshape(n, n_classes, -1)
        nearest = squared.argmin(2)
        row, class_ = np.arange(n)[:, None], np.arange(n_classes)
        contributions = np.zeros((n, n_classes, len(self.prototypes_)))
        contributions[row, class_, class_ * squared.shape[2] + nearest] = -squared.min(2)
        names = tuple(
            f"prototype {k} ({self.classes_[k // squared.shape[2]]})" for k in range(len(self.prototypes_))
        )
        return self._explanation(
            rows, contributions, np.zeros((n, n_classes)), names, certificates=self._certificates(rows),
            pictures=dict(zip(names, self.prototypes_, strict=True)),
        )  # fmt: skip

    def _distances(self, X: Tensor) -> Tensor:
        exact = "donot_use_mm_for_euclid_dist"  # also where a row is a prototype
        return torch.cdist(X, torch.from_numpy(self.prototypes_).to(X), compute_mode=exact)

    def _start(self, X: Array, y: NDArray[Any]) -> Array:
        """The k-means of each class; a class with fewer different rows repeats them."""
        means = []
        for label in range(len(self.classes_)):
            rows = X[y == label]
            n = min(self.n_prototypes, len(np.unique(rows, axis=0)))
            found = KMeans(n, n_init=1, random_state=derive(self.seed, "k-means", label)).fit(rows)
            means.append(found.cluster_centers_[np.arange(self.n_prototypes) % n])
        return np.concatenate(means)

    def _radii(self, X: Array, y: NDArray[Any]) -> Array:
        """Distance to the planes between the nearest own prototype and all others.

        The plane to w_j is (d_j^2 - d_+^2) / (2 |w_j - w_+|) away. As long as none is crossed, the nearest
        own prototype stays nearer than every other one.
        """
        rows, w = torch.tensor(X), torch.from_numpy(self.prototypes_)
        owner = torch.arange(len(w)) // self.n_prototypes
        apart = torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist")
        radii = []
        for x, label in zip(rows.split(BATCH), torch.from_numpy(y).split(BATCH), strict=True):
            distances = self._distances(x)
            rival = owner != label[:, None]
            mine, nearest = distances.masked_fill(rival, torch.inf).min(1)
            lead = distances.square() - mine.square()[:, None]
            # Two prototypes in one place cannot be told apart: no radius.
            far = apart[nearest].clamp_min(torch.finfo(w.dtype).tiny)
            plane = torch.where(lead == 0, 0.0, lead / (2 * far))
            radii.append(plane.masked_fill(~rival, torch.inf).amin(1))
        return torch.cat(radii).numpy()


class _Prototypes(nn.Module):
    """Distances ``(rows, classes)`` to the nearest prototype of each class."""

    def __init__(self, prototypes: Tensor, per_class: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(prototypes)
        self.per_class = per_class

    def forward(self, X: Tensor) -> Tensor:
        return torch.cdist(X, self.prototypes).unflatten(1, (-1, self.per_class)).amin(2)
