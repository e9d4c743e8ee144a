"""The shallow network: components in the space of the inputs, their kernel, and a head."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.explain.prototype_rbf import certificate, relative
from paperback.explain.prototype_rbf.heads import make_head

METRICS = {"euclidean": 2.0, "manhattan": 1.0, "chebyshev": float("inf")}  # metric -> p of its norm
OTHER_METRICS = ("sqeuclidean", "cosine")  # no triangle inequality: no certificate
KERNELS, SIGMAS = ("exp", "gaussian"), ("shared", "per-component")


class NoRadiusError(NotSupportedError, DataError):
    """A radius was asked for, and the metric that was chosen gives none."""


class PrototypeNetwork(nn.Module):
    """Detections of K components and the agreement of each class with them, in float64.

    Args:
        n_features: columns of an input.
        n_components: K, at least one for each class.
        n_classes: C.
        metric, kernel, sigma, negative, vectors_per_class, head: see `RBFPrototypeClassifier`.

    Raises:
        DataError: if there are fewer components than classes.
    """

    def __init__(
        self,
        n_features: int,
        n_components: int,
        n_classes: int,
        *,
        metric: str = "euclidean",
        kernel: str = "exp",
        sigma: str = "shared",
        negative: bool = True,
        vectors_per_class: int = 1,
        head: str = "cbc",
    ) -> None:
        super().__init__()
        if n_components < n_classes:
            raise DataError(
                f"there are {n_components} components for {n_classes} classes; give at least one for each."
            )
        self.metric, self.kernel, self.n_classes = metric, kernel, n_classes
        self.components = nn.Parameter(torch.zeros(n_components, n_features, dtype=torch.float64))
        sigmas = 1 if sigma == "shared" else n_components
        self.log_sigma = nn.Parameter(torch.zeros(sigmas, dtype=torch.float64))
        self.head = make_head(
            head, n_components, n_classes, negative=negative, vectors_per_class=vectors_per_class
        ).double()

    @property
    def rows_at_once(self) -> int:
        """Rows of a certificate that fit into about 100 MB."""
        return max(1, 1_000_000 // (self.head.n_components * self.head.n_vectors))

    def distances(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """delta(x, w_k)."""
        if self.metric in METRICS:
            exact = "donot_use_mm_for_euclid_dist"  # also where x is a component
            return torch.cdist(x, self.components, METRICS[self.metric], compute_mode=exact)
        if self.metric == "sqeuclidean":
            return torch.cdist(x, self.components, compute_mode="donot_use_mm_for_euclid_dist").square()
        return 1 - nn.functional.normalize(x, dim=1) @ nn.functional.normalize(self.components, dim=1).T

    def log_detections(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """ln d_k(x), which does not underflow."""
        return certificate.log_kernel(self.distances(x), self.log_sigma.exp(), self.kernel)

    def detections(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """d_k(x) in [0, 1]."""
        return self.log_detections(x).exp()

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B C"]:
        """Class agreements."""
        scores: Tensor = self.head(self.detections(x))
        return scores

    def radii(self, x: Float[Tensor, "B D"], y: Int[Tensor, " B"], *, tight: bool) -> Float[Tensor, " B"]:
        """The signed certificate eps*(x, y), in the norm of the metric; positive where y is predicted.

        Args:
            x: inputs.
            y: class indices.
            tight: by bisection (`certificate.tight_radii`). Otherwise the paper's closed form, which takes
                the least of several sigmas; the Gaussian kernel has none and is always bisected.

        Returns:
            Differentiable radii. Where a class has several vectors, that of its best one on the row.

        Raises:
            NoRadiusError: if the metric has no triangle inequality.
        """
        return certificate.against_rivals(
            self._against_each(x, y, tight=tight), y, self.head.vectors_per_class
        )

    @torch.no_grad()
    def widest_radii(self, x: Float[Tensor, "B D"], y: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The widest radii that are known to be safe: tight ones, and for Euclidean distances with one sigma
        those of `relative`.

        Args:
            x: inputs.
            y: class indices.

        Returns:
            Signed radii; without gradient.

        Raises:
            NoRadiusError: if the metric has no triangle inequality.
        """
        radii = self._against_each(x, y, tight=True)
        if self.metric == "euclidean" and len(self.log_sigma) == 1:
            distances, sigma = self.distances(x), self.log_sigma.exp()[0]
            log_d = certificate.log_kernel(distances, sigma, self.kernel)
            positive, negative = self.head.reasoning()
            weights, own = positive - negative, self._best_vector(log_d, y)
            chosen = relative.strongest(log_d, weights, own)
            radii = relative.relative_radii(
                distances, chosen, self.distances(self.components[chosen]), weights, self.head.offset(), own,
                sigma, self.kernel, radii,
            )  # fmt: skip
        return certificate.against_rivals(radii, y, self.head.vectors_per_class)

    def _against_each(
        self, x: Float[Tensor, "B D"], y: Int[Tensor, " B"], *, tight: bool
    ) -> Float[Tensor, "B V"]:
        """Radii of the best vector of class y against every vector."""
        if self.metric not in METRICS:
            raise NoRadiusError(
                f"metric {self.metric!r} has no triangle inequality and gives no radius; use one of "
                f"{', '.join(METRICS)} (kernel='gaussian' with metric='euclidean' squares the distance)."
            )
        distances, sigma, head = self.distances(x), self.log_sigma.exp(), self.head
        log_d = certificate.log_kernel(distances, sigma, self.kernel)
        own = self._best_vector(log_d, y)
        if tight or self.kernel == "gaussian":
            positive, negative = head.reasoning()
            return certificate.tight_radii(
                distances, positive - negative, head.offset(), own, sigma, self.kernel
            )
        # the least sigma bounds the factors of all detections, which themselves stay what they are
        return certificate.closed_form(log_d, *head.log_reasoning(), head.offset(), own, sigma.min())

    @torch.no_grad()
    def _best_vector(self, log_d: Float[Tensor, "B K"], y: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        """Index of the vector of class y that agrees most with each row."""
        each = self.head.vectors_per_class
        if each == 1:
            return y
        # over the largest detection the order of vectors shows even where all detections underflow
        top = log_d.amax(1, keepdim=True)
        top = torch.where(self.head.offset().eq(0).all(), top, torch.zeros_like(top))
        positive, negative = self.head.reasoning()
        scores = (log_d - top).exp() @ (positive - negative) + self.head.offset()
        mine = scores.unflatten(1, (self.n_classes, each))[torch.arange(len(y)), y]
        return y * each + mine.argmax(1)
