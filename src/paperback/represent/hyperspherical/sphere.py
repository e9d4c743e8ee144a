"""The normalised softmax: the layer, its constraint, its scale."""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.training import generator

Constraint = Literal["project", "reparam", "fixed", "none"]
CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)

REPULSION_STEPS, REPULSION_RATE, SHARPNESS = 400, 0.05, 20.0


class NormalizedLinear(nn.Module):
    """Embeddings to scaled cosines with class vectors: s w_k . z/|z|, without a bias.

    Args:
        in_dim: length d of the embeddings.
        n_classes: number K of class vectors, >= 2.
        scale: s > 0; with unit vectors logits lie in [-s, s].
        constraint: "project" puts class vectors back to length one by `project_`, to be called after every
            step; "reparam" divides by their length in the forward pass, so that the gradient is tangential;
            "fixed" takes `separated_directions` and does not train them; "none" leaves their length free.
        seed: of the initial vectors, which are random directions.

    Attributes:
        weight: the class vectors ``(n_classes, in_dim)``.

    Raises:
        DataError: if an argument is out of range.
    """

    weight: Tensor

    def __init__(
        self,
        in_dim: int,
        n_classes: int,
        scale: float = 10.0,
        constraint: Constraint = "project",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_classes(n_classes)
        if in_dim < 1:
            raise DataError(f"in_dim is {in_dim}; it must be at least 1.")
        if not (math.isfinite(scale) and scale > 0):
            raise DataError(f"scale is {scale}; it must be a positive number.")
        if constraint not in CONSTRAINTS:
            raise DataError(f"constraint is {constraint!r}; take one of {', '.join(CONSTRAINTS)}.")
        self.scale, self.constraint = float(scale), constraint
        if constraint == "fixed":
            self.register_buffer("weight", separated_directions(n_classes, in_dim, seed))
        else:
            draws = torch.randn(n_classes, in_dim, generator=generator(seed, "class vectors"))
            self.weight = nn.Parameter(F.normalize(draws, dim=1))

    def directions(self) -> Float[Tensor, "classes dim"]:
        """The class vectors as they enter the scores."""
        return F.normalize(self.weight, dim=1) if self.constraint == "reparam" else self.weight

    def forward(self, embeddings: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return self.scale * F.normalize(embeddings, dim=1) @ self.directions().T

    @torch.no_grad()
    def project_(self) -> None:
        """Put the class vectors back to length one, where the constraint asks for it."""
        if self.constraint == "project":
            self.weight.copy_(F.normalize(self.weight, dim=1))


def normalized_softmax(
    embeddings: Float[Tensor, "batch dim"],
    class_vectors: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " batch"],
    scale: float = 10.0,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of scaled cosines; embeddings and class vectors are normalised here."""
    cosines = F.normalize(embeddings, dim=1) @ F.normalize(class_vectors, dim=1).T
    return F.cross_entropy(scale * cosines, labels)


def loss_floor(n_classes: int, scale: float) -> float:
    """The least mean loss of a normalised softmax over balanced classes: log(1 + (K-1) exp(-sK/(K-1))).

    It is reached when features lie on their class vectors and these form a simplex (NormFace, proposition 2).

    Args:
        n_classes: K >= 2.
        scale: s > 0.

    Returns:
        Nats.
    """
    _check_classes(n_classes)
    if not scale > 0:
        raise DataError(f"scale is {scale}; it must be above 0.")
    return math.log1p((n_classes - 1) * math.exp(-scale * n_classes / (n_classes - 1)))


def scale_for_probability(n_classes: int, probability: float) -> float:
    """The smallest scale at which the right class can get a probability: (K-1)/K log((K-1) p / (1-p)).

    Args:
        n_classes: K >= 2.
        probability: p, above chance 1/K and below 1.

    Returns:
        s.

    Raises:
        DataError: if an argument is out of range.
    """
    _check_classes(n_classes)
    if not 1 / n_classes < probability < 1:
        raise DataError(f"probability is {probability}; it must lie between 1/{n_classes} and 1.")
    odds = (n_classes - 1) * probability / (1 - probability)
    return (n_classes - 1) / n_classes * math.log(odds)


def separated_directions(n_classes: int, dim: int, seed: int = 0) -> Float[Tensor, "classes dim"]:
    """Unit vectors as far from each other as they go.

    For K <= d + 1 they are a simplex, all cosines -1/(K-1), in a random orientation. For more there is no
    simplex: a warning says so, and the largest cosines are pushed down by gradient descent.

    Args:
        n_classes: K >= 2.
        dim: d >= 1.
        seed: of the orientation or of the start.

    Returns:
        float32.
    """
    _check_classes(n_classes)
    draws = generator(seed, "separated directions")
    if n_classes <= dim + 1:
        # Columns of an orthonormal basis of R^K without the direction of ones: corners of a simplex.
        centred = torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes
        corners = F.normalize(torch.linalg.svd(centred).U[:, : n_classes - 1], dim=1)
        frame = torch.linalg.qr(torch.randn(dim, dim, generator=draws, dtype=torch.float64)).Q
        return (corners @ frame[: n_classes - 1]).float()
    warnings.warn(
        f"{n_classes} vectors in {dim} dimensions cannot form a simplex; they are placed by repulsion. "
        f"dim={n_classes - 1} would do.",
        stacklevel=2,
    )
    points = torch.randn(n_classes, dim, generator=draws, dtype=torch.float64).requires_grad_(True)
    optimizer = torch.optim.Adam([points], lr=REPULSION_RATE)
    itself = torch.eye(n_classes, dtype=torch.bool)
    with torch.enable_grad():
        for _ in range(REPULSION_STEPS):
            unit = F.normalize(points, dim=1)
            energy = torch.logsumexp((SHARPNESS * unit @ unit.T)[~itself], 0)
            optimizer.zero_grad()
            energy.backward()
            optimizer.step()
    return F.normalize(points.detach(), dim=1).float()


def _check_classes(n_classes: int) -> None:
    if n_classes < 2:
        raise DataError(f"there are {n_classes} classes; a softmax needs at least 2.")
