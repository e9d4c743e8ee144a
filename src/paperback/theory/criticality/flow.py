"""How a network carries a signal from layer to layer: the kernel, the four-point vertex, the next order.

With v = V / n the variance that a preactivation's square has from network to network, and d = G1 / n the
first correction to its mean, one layer of width n does

    K' = gamma^2 K + C_b + C_W g(K)
    v' = (gamma^2 + C_W g')^2 v + C_W^2 (<s^4> - g^2) / n + 2 gamma^2 C_W (<z^2 s^2> - K g) / n
    d' = (gamma^2 + C_W g') d + C_W g'' v / 2

(Roberts, Yaida and Hanin, chapters 4 and 5; the terms with gamma are our derivation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from paperback.errors import DataError
from paperback.numerics.kernels import ScalarFunction
from paperback.theory.criticality.fixed_points import Moments, moments, scale_invariant_slopes

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Flow:
    """Predictions for every layer of preactivations, ``(depth,)`` each.

    Attributes:
        K: variance of a preactivation in an infinitely wide network.
        V: four-point vertex: the connected E[z_i^2 z_j^2] of two neurons is V / n, with n the width of the
            layer before.
        G1: next-to-leading metric: E z^2 = K + G1 / n.
        chi_par: susceptibility of the size of a signal, on its way from this layer to the next.
        chi_perp: the same for the distance of two signals of one size.
        widths: neurons of each layer.
        exact: False when gamma > 0 and s^2 is not even: a neuron's sign then persists through the skip, odd
            correlators feed V, and the recursion holds for the first step only. V and G1 are NaN behind it;
            `measure_flow` measures them.
        resummed: V / (n K^2) to all orders in 1/n, where that is known: C_b = 0, no residual, and a
            scale-invariant activation; else None.
    """

    K: Array
    V: Array
    G1: Array
    chi_par: Array
    chi_perp: Array
    widths: tuple[int, ...]
    exact: bool
    resummed: Array | None

    @property
    def relative_vertex(self) -> Array:
        """V / (n K^2), the squared spread of a layer's size from network to network."""
        return self.V / (self._width_before * self.K**2)

    @property
    def next_order(self) -> Array:
        """E z^2 to the next order, K + G1 / n."""
        return self.K + self.G1 / self._width_before

    @property
    def _width_before(self) -> Array:
        """n of the layer before; the first layer has V = 0 whatever the number of inputs."""
        return np.array([self.widths[0], *self.widths[:-1]], dtype=float)


def recursion(
    s: ScalarFunction,
    K1: float,
    C_b: float,
    C_W: float,
    depth: int,
    widths: int | Sequence[int],
    residual: float,
) -> Flow:
    """The flow of one input through a network; see `Criticality.flow` for the arguments."""
    neurons = _check(K1, C_b, C_W, depth, widths)
    even = _square_is_even(s)
    exact = residual == 0 or even
    K, v, d = K1, 0.0, 0.0
    rows, states = [], [(K, v, d)]
    for layer in range(depth):
        m = moments(s, K)
        rows.append((residual**2 + C_W * float(m.g1), residual**2 + C_W * float(m.p)))
        if layer + 1 < depth:
            K, v, d = _step(m, K, v, d, C_b, C_W, neurons[layer], residual)
            if not exact and layer > 0:
                v, d = np.nan, np.nan
            states.append((K, v, d))
    chi_par, chi_perp = np.array(rows).T
    kernels, vertices, corrections = np.array(states, dtype=float).T
    before = np.array([neurons[0], *neurons[:-1]], dtype=float)
    return Flow(
        K=kernels,
        V=vertices * before,
        G1=corrections * before,
        chi_par=chi_par,
        chi_perp=chi_perp,
        widths=neurons,
        exact=exact,
        resummed=_resummed(s, C_b, residual, neurons),
    )


def _step(
    m: Moments, K: float, v: float, d: float, C_b: float, C_W: float, n: int, residual: float
) -> tuple[float, float, float]:
    skip = residual**2
    chi = skip + C_W * float(m.g1)
    source = C_W**2 * float(m.fourth - m.g**2) + 2 * skip * C_W * float(m.mixed - K * m.g)
    return (
        skip * K + C_b + C_W * float(m.g),
        chi**2 * v + source / n,
        chi * d + C_W * float(m.g2) * v / 2,
    )


def vertex_growth(s: ScalarFunction, K: float, C_W: float, residual: float) -> float:
    """What one layer at a point with chi_par = 1 adds to V / K^2."""
    m = moments(s, K)
    skip = residual**2
    source = C_W**2 * float(m.fourth - m.g**2) + 2 * skip * C_W * float(m.mixed - K * m.g)
    return source / K**2


def _resummed(s: ScalarFunction, C_b: float, residual: float, widths: Sequence[int]) -> Array | None:
    """E K'^2 / K'^2 is multiplied by 1 + (3 A4 / A2^2 - 1) / n in each layer, exactly."""
    slopes = scale_invariant_slopes(s)
    if slopes is None or C_b != 0 or residual != 0:
        return None
    squares = np.array(slopes) ** 2
    growth = 3 * (squares**2).mean() / squares.mean() ** 2 - 1
    factors = 1 + growth / np.array(widths[:-1], dtype=float)
    return np.array([1.0, *np.cumprod(factors)]) - 1


def _square_is_even(s: ScalarFunction) -> bool:
    import torch

    z = torch.linspace(0, 10, 200, dtype=torch.float64)
    return bool(torch.allclose(s.square(z), s.square(-z), rtol=1e-9, atol=1e-12))


def _check(K1: float, C_b: float, C_W: float, depth: int, widths: int | Sequence[int]) -> tuple[int, ...]:
    for name, value, least in (("K1", K1, "> 0"), ("C_W", C_W, "> 0"), ("C_b", C_b, ">= 0")):
        if not (np.isfinite(value) and (value >= 0 if least == ">= 0" else value > 0)):
            raise DataError(f"{name} is {value}; it must be a number {least}.")
    if depth < 1:
        raise DataError(f"depth is {depth}; it must be at least 1.")
    neurons = (widths,) * depth if isinstance(widths, int) else tuple(widths)
    if len(neurons) != depth:
        raise DataError(f"there are {len(neurons)} widths for depth {depth}; give one for each layer.")
    if any(n < 1 for n in neurons):
        raise DataError(f"widths holds {min(neurons)}; every width must be at least 1.")
    return neurons
