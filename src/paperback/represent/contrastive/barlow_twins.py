"""Barlow Twins: the features of two views agree, one by one, and say different things.

With projections a, b of the two views, standardised over the batch, and their cross-correlation C = a'b / n,

    L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2.

The first term makes features insensitive to the augmentation, the second removes redundancy; there are no
negatives and no second network.

Source: J. Zbontar, L. Jing, I. Misra, Y. LeCun and S. Deny, Barlow Twins, ICML 2021, equations 1 and 2.
lambda 0.0051 is the paper's, the factor 0.1 of the whole loss AdaInf's setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.contrastive.learner import ContrastiveLearner, projector
from paperback.represent.interface import Backbone
from paperback.training.contrastive import gather


def barlow_twins_loss(
    first: Float[Tensor, "batch dim"], second: Float[Tensor, "batch dim"], off_diagonal: float = 0.0051
) -> Float[Tensor, ""]:
    """How far the cross-correlation of two views is from the identity.

    Args:
        first: projections of the first views; they are standardised over the batch (of all processes) here.
        second: of the second views, in the same order.
        off_diagonal: lambda, the weight of the redundancy, >= 0.

    Returns:
        The loss.

    Raises:
        DataError: if the two do not have the same shape, or hold fewer than two images.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise DataError(
            f"the projections have shapes {tuple(first.shape)} and {tuple(second.shape)}; give two of the "
            "same shape (batch, dim) with at least 2 rows."
        )
    a, b = (_standardised(gather(x)[0]) for x in (first, second))
    squares = (a.T @ b / len(a) - torch.eye(a.shape[1], device=a.device, dtype=a.dtype)).square()
    return (1 - off_diagonal) * squares.diagonal().sum() + off_diagonal * squares.sum()


def _standardised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, 0, correction=0)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


class BarlowTwins(ContrastiveLearner):
    """Features whose cross-correlation between two views is the identity.

    Args:
        backbone: see `Encoder`.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        projection: widths of the projector's hidden layers and its output.
        off_diagonal: weight of the redundancy, >= 0.
        scale: factor of the whole loss, > 0.
        augment, epochs, steps, batch_size, lr, weight_decay, seed: see `ContrastiveLearner`.
    """

    presets = ("standard_asym", "adainf_asym")

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        augment: str | Mapping[str, Any] = "standard_asym",
        epochs: int = 50,
        steps: int | None = None,
        batch_size: int = 256,
        lr: float = 6e-3,
        weight_decay: float = 1e-4,
        projection: Sequence[int] = (512, 512, 512),
        off_diagonal: float = 0.0051,
        scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, in_channels, image_size, augment, epochs, steps, batch_size, lr, weight_decay, seed
        )
        self.projection, self.off_diagonal, self.scale = tuple(projection), off_diagonal, scale

    def pretext(self, total_steps: int) -> nn.Module:
        """Backbone, projector and the loss."""
        head = projector((self.dim, *self.projection), norm=True)
        return _Pretext(self.backbone, head, self.off_diagonal, self.scale)


class _Pretext(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module, off_diagonal: float, scale: float) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.off_diagonal, self.scale = off_diagonal, scale

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.head(self.backbone(torch.cat([first, second]))).chunk(2)
        return self.scale * barlow_twins_loss(a, b, self.off_diagonal)
