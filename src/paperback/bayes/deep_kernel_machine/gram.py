"""What passes between the layers of a deep kernel machine: Gram matrices in three pieces.

A machine never holds features behind its input. It holds inner products: of the inducing points with each
other (ii), of other points with the inducing points (ti), and of the other points (tt), of which mostly the
diagonal is enough. `Features2Gram` makes the first one from data, `GramNorm` keeps their scale.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError

Normalisation = Literal["no", "inducing", "batch"]


class StructGram(NamedTuple):
    """A Gram or kernel matrix of inducing points i and other points t.

    Attributes:
        ii: ``(inducing, inducing)``.
        ti: ``(*batch, points, inducing)``.
        tt: its diagonal, ``(*batch, points)``, or the whole block, ``(*batch, points, points)``.
    """

    ii: Float[Tensor, "inducing inducing"]
    ti: Float[Tensor, "*batch points inducing"]
    tt: Tensor

    @property
    def whole(self) -> bool:
        """Whether tt is the whole block."""
        return self.tt.ndim == self.ti.ndim

    @property
    def diagonal(self) -> Float[Tensor, "*batch points"]:
        """The diagonal of tt."""
        return self.tt.diagonal(dim1=-2, dim2=-1) if self.whole else self.tt


class Features2Gram(nn.Module):
    """The Gram matrix of the inputs, G_0 = X diag(s^2) X^T / features.

    The scales s are trained, one for each feature: automatic relevance determination. Only here can a machine
    tell features apart; the layers behind see inner products.

    Args:
        inducing: inputs of the inducing points, ``(inducing, features)``.
        learn_inducing: train them; otherwise they are data that stay.
        ard: train the scales; otherwise they are one.
    """

    inducing: Tensor
    log_scale: Tensor

    def __init__(
        self, inducing: Float[Tensor, "inducing features"], *, learn_inducing: bool = True, ard: bool = True
    ) -> None:
        super().__init__()
        log_scale = inducing.new_zeros(inducing.shape[1])
        if learn_inducing:
            self.inducing = nn.Parameter(inducing.clone())
        else:
            self.register_buffer("inducing", inducing.clone())
        if ard:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, x: Float[Tensor, "*batch points features"], whole: bool = False) -> StructGram:
        """The three pieces.

        Args:
            x: the other points.
            whole: compute all of tt, not its diagonal only.
        """
        scale = self.log_scale.exp() / math.sqrt(x.shape[-1])
        i, t = self.inducing * scale, x * scale
        return StructGram(i @ i.mT, t @ i.mT, t @ t.mT if whole else t.square().sum(-1))


class GramNorm(nn.Module):
    """Gram matrices brought to a common scale, which is learned; more than three layers need it.

    "inducing" divides all pieces by the mean diagonal of ii. "batch" divides the points t by the mean
    diagonal of their own batch, as batch normalisation does, and by its running mean in evaluation mode. Both
    leave a positive semi-definite matrix so.

    Args:
        kind: which of the two.
        momentum: of the running mean.

    Raises:
        DataError: if there is no such kind.
    """

    running: Tensor

    def __init__(self, kind: Normalisation, momentum: float = 0.1) -> None:
        super().__init__()
        if kind not in ("inducing", "batch"):
            raise DataError(f'gram_norm is {kind!r}; it is "no", "inducing" or "batch".')
        self.kind, self.momentum = kind, momentum
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("running", torch.ones((), dtype=torch.float64))

    def forward(self, gram: StructGram) -> StructGram:
        """The pieces, scaled."""
        inducing = gram.ii.diagonal().mean()
        points = inducing
        if self.kind == "batch":
            points = self.running
            if self.training and gram.ti.shape[-2]:
                points = gram.diagonal.mean()
                self.running.lerp_(points.detach(), self.momentum)
        scale = self.log_scale.exp()
        cross = scale / (inducing * points).sqrt()
        return StructGram(gram.ii * scale / inducing, gram.ti * cross, gram.tt * scale / points)
