"""The public class: everything the theory says about an activation, computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from paperback.errors import DataError
from paperback.numerics.kernels import Function, ScalarFunction, expectation, gram_dual, quadrature
from paperback.theory.criticality.fixed_points import (
    FixedPoint,
    find_fixed_points,
    moments,
    scale_invariant_slopes,
)
from paperback.theory.criticality.flow import Flow, recursion, vertex_growth


@dataclass(frozen=True, eq=False)
class LearningRates:
    """Factors on the learning rate by which all layers contribute equally to the tangent kernel.

    The update of a layer's biases takes lr * bias[l], that of its weights lr * weight[l] / fan_in.

    Attributes:
        bias: ``(depth,)``, first layer first.
        weight: ``(depth,)``.
    """

    bias: NDArray[np.float64]
    weight: NDArray[np.float64]


class Criticality:
    """The effective theory of deep networks with one activation.

    Args:
        activation: any elementwise function of torch, or a module, kinks included; it must be continuous.
        residual: gamma of z' = gamma z + b + W s(z), in [0, 1); 0 is a network without skips.
        K_range: variances between which a fixed point K* > 0 is looked for.

    Raises:
        DataError: if the activation is not elementwise, not continuous, not finite or zero everywhere, or an
            argument is out of range.
    """

    def __init__(
        self, activation: Function, *, residual: float = 0.0, K_range: tuple[float, float] = (1e-4, 200.0)
    ) -> None:
        if not 0 <= residual < 1:
            raise DataError(f"residual is {residual}; gamma must lie in [0, 1).")
        if not 0 < K_range[0] < K_range[1] < math.inf:
            raise DataError(f"K_range is {K_range}; give two finite variances > 0, the smaller one first.")
        self.residual = residual
        self.K_range = K_range
        self.activation = ScalarFunction(activation, reach=10 * math.sqrt(K_range[1]))

    def analyse(self) -> list[FixedPoint]:
        """All fixed points, the recommended one first; the search runs once."""
        return self.classes

    @cached_property
    def classes(self) -> list[FixedPoint]:
        """All fixed points, the recommended one first; one of kind "none" where nothing is critical."""
        return find_fixed_points(self.activation, self.residual, self.K_range)

    @property
    def recommended(self) -> FixedPoint:
        """The fixed point to initialise at."""
        return self.classes[0]

    def susceptibilities(self, K: float, C_b: float, C_W: float) -> tuple[float, float, float]:
        """What becomes of small changes on the way through one layer.

        Args:
            K: variance of the preactivations, > 0.
            C_b: variance of the biases, >= 0; the susceptibilities do not depend on it.
            C_W: variance of the weights times fan-in, > 0.

        Returns:
            chi_par, the factor on a change of K; chi_perp, that on the squared distance of two signals of
            equal size; h = chi_perp'(K) / 2.

        Raises:
            DataError: if an argument is out of range.
        """
        if not (K > 0 and C_W > 0 and C_b >= 0):
            raise DataError(f"K is {K}, C_W {C_W}, C_b {C_b}; they must be > 0, > 0 and >= 0.")
        m = moments(self.activation, K)
        skip = self.residual**2
        return skip + C_W * float(m.g1), skip + C_W * float(m.p), C_W * float(m.p1) / 2

    def step(self, K: float, C_b: float, C_W: float) -> float:
        """One layer of the kernel recursion for a single input.

        Args:
            K: variance of the preactivations before it, > 0.
            C_b: variance of its biases.
            C_W: variance of its weights times fan-in.

        Returns:
            The variance behind it.
        """
        return self.residual**2 * K + C_b + C_W * self.expected_square(K)

    def expected_square(self, K: float) -> float:
        """g(K) = E s(z)^2, z ~ N(0, K)."""
        return float(expectation(self.activation.square, K, self.activation.kinks))

    def flow(self, K1: float, C_b: float, C_W: float, depth: int, widths: int | Sequence[int]) -> Flow:
        """Predict the kernel, the four-point vertex and the next order, layer by layer.

        Args:
            K1: variance of the preactivations of the first layer, C_b + C_W |x|^2 / n_0, > 0.
            C_b: variance of the biases, >= 0.
            C_W: variance of the weights times fan-in, > 0.
            depth: layers of preactivations, >= 1.
            widths: neurons of every layer, >= 1; or one number per layer.

        Returns:
            The predictions, one entry per layer.

        Raises:
            DataError: if an argument is out of range.
        """
        return recursion(self.activation, K1, C_b, C_W, depth, widths, self.residual)

    def gram_flow(
        self, gram: Float[Tensor, "inputs inputs"], C_b: float, C_W: float, depth: int
    ) -> Float[Tensor, "depth inputs inputs"]:
        """The kernel recursion for several inputs.

        Args:
            gram: covariance of the first layer's preactivations, C_b + C_W x x^T / n_0.
            C_b: variance of the biases, >= 0.
            C_W: variance of the weights times fan-in, > 0.
            depth: layers of preactivations, >= 1.

        Returns:
            Their covariance in each layer, float64, that of the first layer first.

        Raises:
            DataError: if the matrix is not symmetric with a positive diagonal, or an argument is out of
                range.
        """
        kernel = gram.to(torch.float64)
        if kernel.ndim != 2 or not torch.allclose(kernel, kernel.mT) or not (kernel.diagonal() > 0).all():
            raise DataError(f"gram has shape {tuple(gram.shape)}; give a covariance matrix of the inputs.")
        if not (C_b >= 0 and C_W > 0 and depth >= 1):
            raise DataError(f"C_b is {C_b}, C_W {C_W}, depth {depth}; they must be >= 0, > 0 and >= 1.")
        dual, layers = quadrature(self.activation), [kernel]
        for _ in range(depth - 1):
            values, _ = gram_dual(dual, kernel)
            kernel = self.residual**2 * kernel + C_b + C_W * values
            layers.append(kernel)
        return torch.stack(layers)

    # -- how deep, how fast ---------------------------------------------------------------------------------

    @cached_property
    def nu(self) -> float:
        """The slope of fluctuations: V / (n K^2) is close to nu * depth / width at the recommended point.

        A scale-invariant activation has 3 A4 / A2^2 - 1 without residual: 5 for ReLU, 2 for linear. Next to
        K* = 0 the decay of K divides that by three: 2/3 for tanh. With skips and an s^2 that is not even, it
        is that of the first step.
        """
        point = self.recommended
        if point.kind != "K*=0":
            K = point.K
            return vertex_growth(self.activation, K, point.C_W, self.residual)
        # At the limit K -> 0, and K falls as a power, so that u = V / (n K^2) obeys u' = u (1 - 2/l) + first.
        first = vertex_growth(self.activation, 1e-6, point.C_W, self.residual)
        return first if math.isnan(point.exponent) else first / 3

    def aspect_ratio(self, n_out: int) -> float:
        """The depth over width at which two groups of output neurons share most information.

        r* = 4 / ((20 + 3 n_out) nu): well below it a network is nearly Gaussian, well above it one network
        differs from the next by more than its mean.

        Args:
            n_out: neurons of the output, >= 1.

        Returns:
            r* = depth / width.

        Raises:
            DataError: if n_out < 1.
        """
        if n_out < 1:
            raise DataError(f"n_out is {n_out}; a network has at least one output.")
        return 4 / ((20 + 3 * n_out) * self.nu)

    def optimal_depth(self, width: int, n_out: int) -> float:
        """The depth that goes with a width: r* times the width.

        Args:
            width: neurons of the hidden layers, >= 1.
            n_out: neurons of the output, >= 1.

        Returns:
            The depth, not rounded.

        Raises:
            DataError: if an argument is out of range.
        """
        if width < 1:
            raise DataError(f"width is {width}; it must be at least 1.")
        return self.aspect_ratio(n_out) * width

    def regime(self, depth: int, width: int, n_out: int = 1) -> str:
        """In words, what the depth over width of a network means.

        Args:
            depth: layers, >= 1.
            width: neurons of the hidden layers, >= 1.
            n_out: neurons of the output, >= 1.

        Returns:
            "kernel-like", "effectively deep" or "chaotic".
        """
        ratio = depth / width / self.aspect_ratio(n_out)
        return "kernel-like" if ratio < 0.1 else "effectively deep" if ratio <= 3 else "chaotic"

    def lr_factors(self, depth: int) -> LearningRates:
        """Learning rates by which every layer contributes equally to the tangent kernel at the output.

        A layer's part is lambda(l) times the product of chi_perp behind it, (l / depth)^p with p = b1 / (a1
        exponent) next to K* = 0, where <s s> falls as l^(-1 / exponent); elsewhere both are constant.

        Args:
            depth: layers of weights, >= 1.

        Returns:
            Factors for biases and weights.

        Raises:
            DataError: if depth < 1.
        """
        if depth < 1:
            raise DataError(f"depth is {depth}; it must be at least 1.")
        layer, point = np.arange(1.0, depth + 1), self.recommended
        if point.kind != "K*=0" or math.isnan(point.exponent) or not point.stable:
            return LearningRates(np.full(depth, 1 / depth), np.full(depth, 1 / depth))
        p = point.b1 / (point.a1 * point.exponent)
        bias = layer**-p * depth ** (p - 1)
        return LearningRates(bias, bias * layer ** (1 / point.exponent))

    def describe(self) -> str:
        """The recommended initialisation in a sentence."""
        point, name = self.recommended, self.activation.name
        numbers = f"C_b = {point.C_b:.5g}, C_W = {point.C_W:.5g}"
        if point.kind == "none":
            par, perp = point.correlation_depths
            return (
                f"{name} has no critical initialisation; the nearest is {numbers} at K = {point.K:.4g}, "
                f"where sizes are remembered for {par:.2g} layers and angles for {perp:.2g}."
            )
        where = "every K is fixed" if scale_invariant_slopes(self.activation) else f"K* = {point.K:.5g}"
        way = {
            "neutral": "", "from above": ", reached from above", "from below": ", reached from below",
            "unstable": ", unstable: signals grow away from it",
        }[point.stability]  # fmt: skip
        return f"{name} is critical at {numbers} ({where}{way})."
