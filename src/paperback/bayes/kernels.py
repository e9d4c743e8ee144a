"""The kernels of infinitely wide networks for gpytorch: NNGP and neural tangent kernel (extra ``bayes``).

A network with inputs of d features, weights N(0, vw / fan-in) and biases N(0, vb) has, when it is wide, the
covariance k_0 = vb + vw x.x' / d of its first preactivations and k_l = vb + vw E[s(z) s(z')], (z, z') ~ N(0,
k_{l-1}), of the following ones. The expectations are those of `paperback.numerics.kernels`.

Sources: Lee et al., Deep neural networks as Gaussian processes (2018), equations 4 to 8; Jacot et al., Neural
tangent kernel (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from paperback.errors import DataError, MissingExtraError
from paperback.numerics.kernels import Dual, ScalarFunction, arc_cosine, arc_sine, quadrature

try:
    import gpytorch
    from gpytorch.constraints import Positive
except ModuleNotFoundError as error:
    raise MissingExtraError('these kernels need gpytorch: pip install "paperback[bayes]"') from error

BLOCK = 2**17  # entries of a kernel matrix that are computed at once: 1 MB, which stays in the cache

Activation = Literal["relu", "erf"] | Callable[[Tensor], Tensor]


class NNGPKernel(gpytorch.kernels.Kernel):
    """Covariance of the outputs of a wide fully connected network.

    Args:
        depth: hidden layers, >= 1.
        activation: "relu", "erf", or any elementwise function. The expectations of a function are computed by
            quadrature: they are exact to about 1e-9, have no gradients and are slow.
        weight_variance: vw > 0, a parameter that is trained.
        bias_variance: vb > 0, a parameter that is trained.
        readout: "same" gives the last layer weights and biases of the same variances; "unit" gives it
            weights of variance 1 / fan-in and no bias.
        **kwargs: `batch_shape` and `active_dims` of gpytorch.

    Raises:
        DataError: if depth < 1 or a variance is not positive.
    """

    has_lengthscale = False

    def __init__(
        self,
        depth: int = 3,
        activation: Activation = "relu",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.1,
        readout: Literal["same", "unit"] = "same",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if depth < 1:
            raise DataError(f"depth is {depth}; a network needs at least one hidden layer.")
        for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
            if not value > 0:
                raise DataError(f"{name} is {value}; it must be positive.")
        _dual(activation)
        self.depth, self.activation, self.readout = depth, activation, readout
        for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
            start = torch.zeros(*self.batch_shape, 1, 1)
            self.register_parameter(f"raw_{name}", torch.nn.Parameter(start))
            self.register_constraint(f"raw_{name}", Positive())
            self._set(name, value)

    @property
    def weight_variance(self) -> Tensor:
        """vw, ``(*batch_shape, 1, 1)``."""
        return self.raw_weight_variance_constraint.transform(self.raw_weight_variance)

    @weight_variance.setter
    def weight_variance(self, value: float | Tensor) -> None:
        self._set("weight_variance", value)

    @property
    def bias_variance(self) -> Tensor:
        """vb, ``(*batch_shape, 1, 1)``."""
        return self.raw_bias_variance_constraint.transform(self.raw_bias_variance)

    @bias_variance.setter
    def bias_variance(self, value: float | Tensor) -> None:
        self._set("bias_variance", value)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """The kernel between points ``(..., n, features)`` and ``(..., m, features)``."""
        return self._evaluate(x1, x2, diag, 0)

    def _evaluate(self, x1: Tensor, x2: Tensor, diag: bool, which: int) -> Tensor:
        """One of the two kernels; without gradients, of large matrices, in blocks that fit the cache."""
        parameters = [x1, x2, self.raw_weight_variance, self.raw_bias_variance]
        trained = torch.is_grad_enabled() and any(part.requires_grad for part in parameters)
        matrices = x1.ndim == x2.ndim == 2 and not self.batch_shape
        if diag or trained or not matrices or len(x1) * len(x2) <= BLOCK:
            return self._kernels(x1, x2, diag)[which]
        symmetric = x1.shape == x2.shape and torch.equal(x1, x2)  # then half of it is enough
        result = x1.new_empty(len(x1), len(x2))
        rows = max(1, BLOCK // len(x2))
        for start in range(0, len(x1), rows):
            stop, first = start + rows, start if symmetric else 0
            block = self._kernels(x1[start:stop], x2[first:], diag)[which]
            result[start:stop, first:] = block
            if symmetric:
                result[first:, start:stop] = block.mT
        return result

    def _kernels(self, x1: Tensor, x2: Tensor, diag: bool) -> tuple[Tensor, Tensor]:
        """NNGP and neural tangent kernel, ``(..., n, m)``, or ``(..., n)`` with diag."""
        vw, vb = self.weight_variance, self.bias_variance
        if diag:
            vw, vb = vw[..., 0], vb[..., 0]
        dual = _dual(self.activation)
        first, cross, second = (vb + vw * gram for gram in _inner_products(x1, x2, diag))
        tangent = cross
        for layer in range(self.depth):
            if layer == self.depth - 1 and self.readout == "unit":
                vw, vb = torch.ones_like(vw), torch.zeros_like(vb)
            shape = cross.shape
            values, slopes = dual(first.expand(shape), cross, second.expand(shape))
            first, second = (vb + vw * dual(own, own, own)[0] for own in (first, second))
            cross = vb + vw * values
            tangent = cross + vw * slopes * tangent
        return cross, tangent

    def _set(self, name: str, value: float | Tensor) -> None:
        raw = getattr(self, f"raw_{name}")
        constraint = getattr(self, f"raw_{name}_constraint")
        value = torch.as_tensor(value, dtype=raw.dtype, device=raw.device).expand_as(raw)
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(value)})


class NTKKernel(NNGPKernel):
    """The neural tangent kernel of the same network, in the NTK parameterisation.

    It tells how far a step of gradient descent at one input moves the output at another. Arguments as
    `NNGPKernel`.
    """

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        """The kernel between points ``(..., n, features)`` and ``(..., m, features)``."""
        return self._evaluate(x1, x2, diag, 1)


def _inner_products(x1: Tensor, x2: Tensor, diag: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x1.x1 / d, x1.x2 / d, x2.x2 / d, so shaped that they broadcast to the kernel."""
    features = x1.shape[-1]
    first, second = x1.square().sum(-1) / features, x2.square().sum(-1) / features
    if diag:
        return first, (x1 * x2).sum(-1) / features, second
    return first[..., None], x1 @ x2.mT / features, second[..., None, :]


@functools.lru_cache(maxsize=16)
def _dual(activation: Activation) -> Dual:
    if activation == "relu":
        return arc_cosine()
    if activation == "erf":
        return arc_sine
    if callable(activation):
        return quadrature(ScalarFunction(activation))
    raise DataError(f'activation is {activation!r}; it is "relu", "erf" or a function of a tensor.')
