"""Kernels that are functions of a Gram matrix: K(G), where G stands for the features that are not there.

An entry K_ij may depend on G_ii, G_ij and G_jj only. That covers kernels of inner products and of distances,
since |f_i - f_j|^2 = G_ii + G_jj - 2 G_ij. Every kernel is variance * k + bias, both trained in logs; the
bias is left out unless asked for.

Sources: Yang et al., A theory of representation learning gives a deep generalisation of kernel methods
(2023); Cho and Saul, Kernel methods for deep learning (2009) for the arc-cosine kernel.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.bayes.deep_kernel_machine.gram import StructGram
from paperback.errors import DataError
from paperback.numerics.kernels import arc_cosine

CLOSEST = 1e-20  # squared distances below it count as zero: the root has no slope there
_RELU = arc_cosine()


class GramKernel(nn.Module):
    """A kernel of Gram matrices.

    Args:
        variance: factor of the kernel, > 0, trained.
        bias: constant that is added, >= 0; trained if it is not 0.

    Raises:
        DataError: if one of them is out of range.
    """

    log_bias: Tensor | None

    def __init__(self, variance: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.log_variance = _log_parameter(variance, "variance")
        if bias == 0:
            self.log_bias = None
        else:
            self.log_bias = _log_parameter(bias, "bias")

    def forward(self, gram: StructGram) -> StructGram:
        """The kernel of each of the three pieces."""
        i, t = gram.ii.diagonal(), gram.diagonal
        tt = self.entries(t[..., :, None], gram.tt, t[..., None, :]) if gram.whole else self.entries(t, t, t)
        ii = self.entries(i[:, None], gram.ii, i[None, :])
        return StructGram(ii, self.entries(t[..., :, None], gram.ti, i), tt)

    def matrix(self, gram: Float[Tensor, "*batch points points"]) -> Float[Tensor, "*batch points points"]:
        """The kernel of an ordinary Gram matrix."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        return self.entries(diagonal[..., :, None], gram, diagonal[..., None, :])

    def entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        """K_ij from G_ii, G_ij and G_jj, which broadcast to the shape of G_ij."""
        values = self.log_variance.exp() * self._entries(first, cross, second)
        return values if self.log_bias is None else values + self.log_bias.exp()

    @abstractmethod
    def _entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        """Without variance and bias."""


class LinearKernel(GramKernel):
    """K = G: the machine is then a deep linear one."""

    def _entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        return cross


class ArcCosineKernel(GramKernel):
    """Covariance of ReLU features, twice, so that K_ii = G_ii: order 1 of Cho and Saul.

    K_ij = sqrt(G_ii G_jj) (sin t + (pi - t) cos t) / pi, with t the angle between i and j.
    """

    def _entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        return 2 * _RELU(first.expand(cross.shape), cross, second.expand(cross.shape))[0]


class _DistanceKernel(GramKernel):
    """A kernel of the squared distance, times an inverse squared length scale w.

    Args:
        variance: as for every kernel.
        bias: as for every kernel.
        inverse_length: w > 0, trained.
    """

    def __init__(self, variance: float = 1.0, bias: float = 0.0, inverse_length: float = 1.0) -> None:
        super().__init__(variance, bias)
        self.log_inverse_length = _log_parameter(inverse_length, "inverse_length")

    def _entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        squared = (first + second - 2 * cross).clamp_min(0)
        return self._of_squared_distance(self.log_inverse_length.exp() * squared)

    @abstractmethod
    def _of_squared_distance(self, squared: Tensor) -> Tensor: ...


class SquaredExponentialKernel(_DistanceKernel):
    """K_ij = exp(-w (G_ii + G_jj - 2 G_ij) / 2)."""

    def _of_squared_distance(self, squared: Tensor) -> Tensor:
        return torch.exp(-squared / 2)


class Matern32Kernel(_DistanceKernel):
    """(1 + r) exp(-r), r^2 = 3 w (G_ii + G_jj - 2 G_ij)."""

    def _of_squared_distance(self, squared: Tensor) -> Tensor:
        r = (3 * squared).clamp_min(CLOSEST).sqrt()
        return (1 + r) * torch.exp(-r)


class Matern52Kernel(_DistanceKernel):
    """(1 + r + r^2 / 3) exp(-r), r^2 = 5 w (G_ii + G_jj - 2 G_ij)."""

    def _of_squared_distance(self, squared: Tensor) -> Tensor:
        r = (5 * squared).clamp_min(CLOSEST).sqrt()
        return (1 + r + r.square() / 3) * torch.exp(-r)


class MixtureKernel(GramKernel):
    """A weighted mean of kernels; the weights are a softmax of parameters and start equal.

    Args:
        kernels: at least one.

    Raises:
        DataError: if there is none.
    """

    def __init__(self, kernels: Sequence[GramKernel]) -> None:
        super().__init__()
        if not kernels:
            raise DataError("a mixture of kernels needs at least one.")
        self.kernels = nn.ModuleList(kernels)
        self.logits = nn.Parameter(torch.zeros(len(kernels), dtype=torch.float64))

    def _entries(self, first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
        parts = [kernel.entries(first, cross, second) for kernel in self.kernels]  # type: ignore[operator]
        return (torch.stack(parts, -1) * self.logits.softmax(0)).sum(-1)


KERNELS: dict[str, type[GramKernel]] = {
    "sqexp": SquaredExponentialKernel,
    "arccos": ArcCosineKernel,
    "linear": LinearKernel,
    "matern32": Matern32Kernel,
    "matern52": Matern52Kernel,
}


def make_kernel(name: str) -> GramKernel:
    """A kernel by its name.

    Args:
        name: one of `KERNELS`, or several joined by "+", which are mixed.

    Returns:
        The kernel, float64, with variance one.

    Raises:
        DataError: if there is no such kernel, or it is not a function of a Gram matrix.
    """
    if not isinstance(name, str):
        raise DataError(
            f"kernel is a {type(name).__name__}; behind the input there are no coordinates, so that a kernel "
            f"must be a function of a Gram matrix: {', '.join(KERNELS)}, or several of them joined by '+'."
        )
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in KERNELS:
            raise DataError(
                f"kernel {part!r} is not known as a function of a Gram matrix; "
                f"choose {', '.join(KERNELS)}, or several of them joined by '+'."
            )
    kernels = [KERNELS[part]() for part in parts]
    return kernels[0] if len(kernels) == 1 else MixtureKernel(kernels)


def _log_parameter(value: float, name: str) -> nn.Parameter:
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{name} is {value}; it must be a positive number.")
    return nn.Parameter(torch.tensor(math.log(value), dtype=torch.float64))
