"""The augmentation graph: which data share views, and what can be learned from that.

The weight of two data is the probability density that both have the same view, w_ij = int A(x|i) A(x|j) dx.
With the probability p_i of each datum and degrees d_i = sum_j w_ij p_j, the normalised adjacency

    K_ij = sqrt(p_i p_j) w_ij / sqrt(d_i d_j),        L = 1 - K,

has the eigenvalues that decide what contrastive learning can do: lambda_{k+1}, the (k+1)-th smallest of L, is
0 while the graph falls into more than k parts, and grows as views overlap more; the labelling error alpha is
the share of shared views that join different classes. The paper bounds the error of a linear probe on real
data by terms of the order of alpha / lambda_{k+1}, alpha, and (1 - beta) TV(P_g, P_d).

The features F = U_k Lambda_k^(1/2) are the minimiser of the spectral contrastive loss
-2 tr(F' K F) + |F F'|^2; Nystroem's formula carries them to new data.

Source: Wang, Zhang and Wang 2024, section 4; HaoChen et al. 2021 (the graph and its loss).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paperback.data.augment import Augment, check_images
from paperback.errors import DataError

MOST_POINTS = 4000  # eigenpairs of dense matrices: 4,000 take 128 MB and some ten seconds
ZERO = 1e-9  # an eigenvalue of K, or a degree, below this counts as none

Overlap = Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float64]]


@dataclass(frozen=True)
class AugmentationGraph:
    """A graph of n data and the smallest eigenvalues of its Laplacian.

    Attributes:
        weights: w, ``(n, n)``.
        probabilities: p, ``(n,)``.
        eigenvalues: of L, ascending, in 0..2; as many as were asked for.
        vectors: of K and L, ``(n, as many)``.
    """

    weights: Float[np.ndarray, "n n"]
    probabilities: Float[np.ndarray, " n"]
    eigenvalues: Float[np.ndarray, " m"]
    vectors: Float[np.ndarray, "n m"]
    _points: NDArray[Any] | None = field(default=None, repr=False)
    _overlap: Overlap | None = field(default=None, repr=False)

    def lambda_after(self, k: int) -> float:
        """lambda_{k+1}: the (k+1)-th smallest eigenvalue of the Laplacian, for k classes.

        Raises:
            DataError: if fewer were computed.
        """
        if not 1 <= k < len(self.eigenvalues):
            raise DataError(f"k is {k}, with {len(self.eigenvalues)} eigenvalues; it must be below that.")
        return float(self.eigenvalues[k])

    def labelling_error(self, labels: ArrayLike) -> float:
        """alpha: the probability that two data which have the same view have different labels.

        Args:
            labels: ``(n,)``; those of generated data are not known, use the graph of real ones.

        Raises:
            DataError: if there is not one label for each datum.
        """
        y = np.asarray(labels)
        if y.shape != (len(self.weights),):
            raise DataError(f"labels have shape {y.shape}; give one for each of {len(self.weights)} data.")
        joint = self.weights * np.outer(self.probabilities, self.probabilities)
        return float(joint[y[:, None] != y[None]].sum() / joint.sum())

    def features(self, k: int) -> Float[np.ndarray, "n k"]:
        """The k leading spectral features of the data themselves: sqrt(mu_l) u_il / sqrt(p_i)."""
        values, vectors = self._leading(k)
        return vectors * np.sqrt(values) / np.sqrt(self.probabilities)[:, None]

    def transform(self, points: NDArray[Any], k: int) -> Float[np.ndarray, "m k"]:
        """The features of new data by Nystroem's formula; those of the graph's own data are `features`.

        A point that shares no view with the data has the features 0.

        Args:
            points: data of the kind the graph was made of.
            k: number of features.

        Raises:
            DataError: if k does not fit, or the graph was made of weights alone.
        """
        if self._overlap is None or self._points is None:
            raise DataError("the graph was made of weights alone; make it of points to carry it to new ones.")
        values, vectors = self._leading(k)
        weights = self._overlap(np.asarray(points), self._points)
        new_degree, degree = weights @ self.probabilities, self.weights @ self.probabilities
        new_degree = np.where(new_degree > ZERO * degree.max(), new_degree, np.inf)
        rows = weights * np.sqrt(self.probabilities / degree) / np.sqrt(new_degree)[:, None]
        kept = values > ZERO
        return rows @ vectors * np.where(kept, 1 / np.sqrt(np.where(kept, values, 1)), 0.0)

    def _leading(self, k: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if not 1 <= k <= len(self.eigenvalues):
            raise DataError(f"k is {k}; it must lie in 1..{len(self.eigenvalues)}.")
        return (1 - self.eigenvalues[:k]).clip(0), self.vectors[:, :k]


def augmentation_graph(
    data: Any,
    radius: float | None = None,
    *,
    augment: Augment | None = None,
    probabilities: ArrayLike | None = None,
    k: int = 10,
    views: int = 4,
    bandwidth: float | None = None,
    seed: int = 0,
) -> AugmentationGraph:
    """The augmentation graph of points under uniform noise in a disc, or of images under an augmentation.

    Args:
        data: points in the plane ``(n, 2)`` with a radius, or images ``(n, c, h, w)`` in 0..1 with an
            augmentation; at most 4,000.
        radius: of the disc, > 0: exact weights, see `disc_overlap`.
        augment: of images: weights from random views, see `view_overlap`.
        probabilities: p_i > 0, summing to 1; equal if not given.
        k: number of classes; k + 1 eigenvalues are computed (all, if there are fewer data).
        views: random views of each image.
        bandwidth: see `view_overlap`.
        seed: of the views, and of the choice among equal eigenvalues 0.

    Returns:
        The graph.

    Raises:
        DataError: if an argument does not fit.
    """
    if (radius is None) == (augment is None):
        raise DataError("augmentation_graph needs exactly one of radius and augment.")
    if not 2 <= len(data) <= MOST_POINTS:
        raise DataError(f"there are {len(data)} data; give 2 to {MOST_POINTS:,}, a random part of more.")
    if augment is not None:
        images = torch.as_tensor(data)
        weights = view_overlap(images, augment, views, bandwidth, seed)
        return graph_of(weights, probabilities, k, seed=seed)
    assert radius is not None
    points = np.asarray(data, dtype=float)
    if points.ndim != 2 or points.shape[1] != 2 or not radius > 0:
        raise DataError(f"discs need points (n, 2) and a radius > 0, not {points.shape} and {radius}.")

    def overlap(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        from scipy.spatial.distance import cdist

        return disc_overlap(cdist(first, second), radius)

    return graph_of(overlap(points, points), probabilities, k, points, overlap, seed)


def graph_of(
    weights: Float[np.ndarray, "n n"],
    probabilities: ArrayLike | None = None,
    k: int = 10,
    points: NDArray[Any] | None = None,
    overlap: Overlap | None = None,
    seed: int = 0,
) -> AugmentationGraph:
    """The graph of given weights; see `augmentation_graph`.

    The eigenvalue 0 belongs to the parts of the graph, each with the vector sqrt(p_i d_i) on it; it is exact.
    Where there are more parts than vectors asked for, every choice among them minimises the loss; one is
    drawn.

    Raises:
        DataError: if the probabilities do not fit.
    """
    from scipy.linalg import eigh
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    n = len(weights)
    p = np.full(n, 1 / n) if probabilities is None else np.asarray(probabilities, dtype=float)
    if p.shape != (n,) or not (p > 0).all() or abs(p.sum() - 1) > 1e-9:
        raise DataError(f"probabilities must be {n} positive numbers that sum to 1.")
    # A datum that shares no view with any, nor two views of its own, is a part of the graph by itself.
    weights = weights + np.diag(np.where(weights @ p == 0, 1.0, 0.0))
    degree = weights @ p
    m = min(k + 1, n)
    n_parts, part = connected_components(csr_array(weights), directed=False)
    constant = np.zeros((n, n_parts))
    constant[np.arange(n), part] = np.sqrt(p * degree)
    constant /= np.linalg.norm(constant, axis=0)
    if n_parts >= m:
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(n_parts, m)))[0]
        return AugmentationGraph(weights, p, np.zeros(m), constant @ rotation, points, overlap)
    scale = np.sqrt(p / degree)
    rest = scale[:, None] * weights * scale[None] - constant @ constant.T
    values, vectors = eigh(rest, subset_by_index=(n - m + n_parts, n - 1))
    eigenvalues = np.concatenate([np.zeros(n_parts), (1 - values[::-1]).clip(0, 2)])
    together = np.concatenate([constant, vectors[:, ::-1]], 1)
    return AugmentationGraph(weights, p, eigenvalues, together, points, overlap)


def disc_overlap(distance: ArrayLike, radius: float) -> NDArray[np.float64]:
    """The weight of two points whose views are uniform in a disc: the area that the discs share / (pi r^2)^2.

    Args:
        distance: of the points, any shape.
        radius: r > 0.
    """
    half = np.clip(np.asarray(distance, dtype=float) / (2 * radius), 0, 1)
    shared = 2 * radius**2 * (np.arccos(half) - half * np.sqrt(1 - half**2))
    return shared / (np.pi * radius**2) ** 2


@torch.no_grad()
def view_overlap(
    images: Float[Tensor, "n c h w"],
    augment: Augment,
    views: int = 4,
    bandwidth: float | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Weights of images from random views.

    Two random views are never equal, so that each view stands for a Gaussian about it: the weight is the mean
    over pairs of views of exp(-|x - x'|^2 / (4 h^2)). Views are compared without their mean and contrast, as
    a network with normalisation sees them; dark views would all be neighbours otherwise.

    Args:
        images: in 0..1.
        augment: makes the views.
        views: of each image, >= 2.
        bandwidth: h > 0; a quarter of `nearest_distance` if not given. It must be the same for graphs that
            are compared.
        seed: of the views.

    Returns:
        ``(n, n)``, symmetric.

    Raises:
        DataError: if an argument does not fit.
    """
    check_images(images)
    if views < 2 or (bandwidth is not None and not bandwidth > 0):
        raise DataError(f"views is {views} and bandwidth {bandwidth}; views must be >= 2, bandwidth > 0.")
    h = nearest_distance(images) / 4 if bandwidth is None else bandwidth
    draws = torch.Generator(images.device).manual_seed(seed)
    sets = [_standardised(augment(images, draws)) for _ in range(views)]
    total = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
    for i, first in enumerate(sets):
        for j in range(i + 1):
            pairs = torch.exp(-(torch.cdist(first, sets[j]) / (2 * h)).square()).double()
            # A view with itself does not count: an image's weight with itself is that of two draws.
            total += pairs.fill_diagonal_(0) if i == j else pairs + pairs.T
    weights = total / views**2
    weights.diagonal().mul_(views / (views - 1))
    return weights.cpu().numpy()


def nearest_distance(images: Float[Tensor, "n c h w"]) -> float:
    """Median distance of an image to its nearest neighbour, both without mean and contrast.

    Raises:
        DataError: if it is 0: half of the images have a double.
    """
    flat = _standardised(images)
    nearest = float(torch.cdist(flat, flat).fill_diagonal_(torch.inf).min(1).values.median())
    if nearest < 1e-6:
        raise DataError("half of the images are equal to another one; leave the doubles out.")
    return nearest


def _standardised(images: Tensor) -> Tensor:
    """Each image as a vector of mean 0 and length 1; one without any contrast is 0."""
    flat = images.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-3)
