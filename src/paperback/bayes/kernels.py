"""The kernels of infinitely wide networks for gpytorch: NNGP and neural tangent kernel (extra ``bayes``).

A network with inputs of d features, weights N(0, vw / fan-in) and biases N(0, vb) has, when it is wide, the
covariance k_0 = vb + vw x.x' / d of its first preactivations and k_l = vb + vw E[s(z) s(z')], (z, z') ~ N(0,
k_{l-1}), of the following ones. The expectations are those of `paperback.numerics.kernels`.

Sources: Lee et al., Deep neural networks as Gaussian processes (2018), equations 4 to 8; Jacot et al., Neural
tangent kernel (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
        residual: hidden layers behind the first add to what they get, h + W s(h) + b.
        **kwargs: `batch_shape` and `active_dims` of gpytorch.

    Raises:
        DataError: if depth < 1 or a variance is not positive.
    """

    has_lengthscale = False
    _block = BLOCK

    def __init__(
        self,
        depth: int = 3,
        activation: Activation = "relu",
        *,
        weight_variance: float = 2.0,
        bias_variance: float = 0.1,
        readout: Literal["same", "unit"] = "same",
        residual: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if depth < 1:
            raise DataError(f"depth is {depth}; a network needs at least one hidden layer.")
        for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
            if not value > 0:
                raise DataError(f"{name} is {value}; it must be positive.")
        _dual(activation)
        self.depth, self.activation, self.readout, self.residual = depth, activation, readout, residual
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
        if diag or trained or not matrices or len(x1) * len(x2) <= self._block:
            return self._kernels(x1, x2, diag)[which]
        symmetric = x1.shape == x2.shape and torch.equal(x1, x2)  # then half of it is enough
        result = x1.new_empty(len(x1), len(x2))
        rows = max(1, self._block // len(x2))
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
            last = layer == self.depth - 1
            if last and self.readout == "unit":
                vw, vb = torch.ones_like(vw), torch.zeros_like(vb)
            kept = float(self.residual and not last)  # of what a layer gets, in what it gives
            shape = cross.shape
            values, slopes = dual(first.expand(shape), cross, second.expand(shape))
            step = vb + vw * values
            first, second = (kept * own + vb + vw * dual(own, own, own)[0] for own in (first, second))
            tangent = kept * tangent + step + vw * slopes * tangent
            cross = kept * cross + step
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


class ConvNNGPKernel(NNGPKernel):
    """Covariance of the outputs of a convolutional network with many channels, without pooling.

    Convolutions are 3 x 3 with zeros around the image, and a dense readout sees every position of every
    channel. Then only the covariances of equal positions matter: they go through the dual of the activation
    and are averaged over the window, K'(p) = vb + vw mean_d E[s s'](p + d).

    Args:
        image_shape: (height, width), or (channels, height, width), of the rows.
        depth: convolutions, >= 1.
        activation: "relu", "erf", or any elementwise function.
        **kwargs: as for `NNGPKernel`; blocks are not residual, and the readout has weights of variance 1 /
            fan-in and no bias.

    Raises:
        DataError: if an argument is out of range.

    Source: Novak et al., Bayesian deep convolutional networks with many channels are Gaussian processes
    (2019), section 3.1 ("vectorize").
    """

    def __init__(
        self, image_shape: Sequence[int], depth: int = 3, activation: Activation = "relu", **kwargs: Any
    ) -> None:
        super().__init__(depth, activation, readout="unit", **kwargs)
        if len(image_shape) not in (2, 3) or min(image_shape) < 1:
            raise DataError(f"image_shape is {tuple(image_shape)}; give (height, width) or (channels, ...).")
        self.image_shape = (1,) * (3 - len(image_shape)) + tuple(image_shape)
        self._block = max(1, BLOCK // (self.image_shape[1] * self.image_shape[2]))

    def _kernels(self, x1: Tensor, x2: Tensor, diag: bool) -> tuple[Tensor, Tensor]:
        channels, height, width = self.image_shape
        if x1.shape[-1] != channels * height * width:
            raise DataError(
                f"rows have {x1.shape[-1]} numbers; images of shape {self.image_shape} have "
                f"{channels * height * width}."
            )
        vw, vb = self.weight_variance[..., None, None], self.bias_variance[..., None, None]
        if diag:
            vw, vb = vw[..., 0, :, :], vb[..., 0, :, :]
        one, two = (x.unflatten(-1, self.image_shape) for x in (x1, x2))
        first, second = one.square().mean(-3), two.square().mean(-3)  # (..., n, height, width)
        if diag:
            cross = (one * two).mean(-3)
        else:
            cross = torch.einsum("...nchw,...mchw->...nmhw", one, two) / channels
            first, second = first.unsqueeze(-3), second.unsqueeze(-4)
        dual = _dual(self.activation)
        for layer in range(self.depth):
            first, cross, second = (vb + vw * _window_mean(part) for part in (first, cross, second))
            shape = cross.shape
            cross = dual(first.expand(shape), cross, second.expand(shape))[0]
            if layer < self.depth - 1:
                first, second = (dual(own, own, own)[0] for own in (first, second))
        kernel = cross.mean((-1, -2))
        return kernel, kernel.new_tensor(torch.nan).expand_as(kernel)  # no tangent kernel is made of it


def _window_mean(positions: Tensor) -> Tensor:
    """Mean over 3 x 3 windows, zeros outside: ``(..., height, width)``."""
    flat = positions.reshape(-1, 1, *positions.shape[-2:])
    return torch.nn.functional.avg_pool2d(flat, 3, stride=1, padding=1).reshape(positions.shape)


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
