"""The critical points of an activation: where neither the size of a signal nor an angle grows or shrinks.

A layer is z' = gamma z + b + W s(z) with b ~ N(0, C_b), W ~ N(0, C_W / n). With g(K) = E s(z)^2 and
p(K) = E s'(z)^2, z ~ N(0, K), the point is critical when

    K = gamma^2 K + C_b + C_W g(K),   gamma^2 + C_W g'(K) = 1,   gamma^2 + C_W p(K) = 1,

so that g'(K) = p(K) is the one equation to be solved; the rest follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor

from paperback.numerics.kernels import ScalarFunction, expectation

Kind = Literal["scale-invariant", "K*=0", "K*>0", "none"]
Stability = Literal["neutral", "from above", "from below", "unstable"]

GRID = 400  # variances at which a sign change of g' / p - 1 is looked for
NOISE = 1e-10  # of that ratio


@dataclass(frozen=True)
class FixedPoint:
    """A critical initialisation, or the best compromise where there is none.

    Attributes:
        kind: the universality class. "scale-invariant": every K is fixed. "K*=0": small signals are fixed.
            "K*>0": one size of signal is fixed. "none": there is no critical point; this is the compromise
            with the least |chi_par - 1| + |chi_perp - 1|.
        K: variance of the preactivations at the fixed point; 1 stands for any in a scale-invariant network.
        C_b: variance of the biases.
        C_W: variance of the weights times fan-in.
        a1: near K = 0, g(K) = A2 K (1 + a1 K^exponent + ...); NaN elsewhere.
        b1: near K = 0, chi_perp = 1 + b1 K^exponent + ...; NaN elsewhere.
        exponent: 1 for a function that is smooth at zero, 1/2 for one with a kink in s or s' there; NaN
            where the corrections vanish faster than any power, and elsewhere.
        stability: from where the flow of K comes to the point: from every side it stays where it is
            ("neutral"), from above, from below, or not at all ("unstable").
        chi_par: susceptibility of the size of a signal, there.
        chi_perp: susceptibility of the angle between two signals, there.
    """

    kind: Kind
    K: float
    C_b: float
    C_W: float
    a1: float = math.nan
    b1: float = math.nan
    exponent: float = math.nan
    stability: Stability = "neutral"
    chi_par: float = 1.0
    chi_perp: float = 1.0

    @property
    def stable(self) -> bool:
        """Whether a signal near the point stays near it, at least on one side."""
        return self.stability != "unstable"

    @property
    def correlation_depths(self) -> tuple[float, float]:
        """Layers in which a change of size, and of angle, falls or grows by a factor e: 1 / |log chi|."""
        return tuple(  # type: ignore[return-value]
            math.inf if abs(chi - 1) < 1e-9 else 1 / abs(math.log(chi)) if chi > 0 else 0.0
            for chi in (self.chi_par, self.chi_perp)
        )


class Moments(NamedTuple):
    """Gaussian expectations of an activation at some variances, each of their shape.

    Attributes:
        g: <s^2>.
        g1: g' = <s^2 (z^2 - K)> / 2K^2.
        g2: g'' = <s^2 (z^4 - 6 K z^2 + 3 K^2)> / 4K^4.
        fourth: <s^4>.
        mixed: <z^2 s^2>.
        p: <s'^2>.
        p1: p' = <s'^2 (z^2 - K)> / 2K^2.
    """

    g: NDArray[np.float64]
    g1: NDArray[np.float64]
    g2: NDArray[np.float64]
    fourth: NDArray[np.float64]
    mixed: NDArray[np.float64]
    p: NDArray[np.float64]
    p1: NDArray[np.float64]


def moments(s: ScalarFunction, K: float | NDArray[np.float64]) -> Moments:
    """All expectations that the recursions need; NaN where they do not exist.

    Args:
        s: the activation.
        K: variances, > 0, any shape.
    """
    variance = torch.as_tensor(K, dtype=torch.float64)
    k = variance[..., None]

    def at(function: object) -> NDArray[np.float64]:
        return expectation(function, variance, s.kinks).numpy()  # type: ignore[arg-type]

    def hermite(z: Tensor) -> Tensor:
        return z**4 - 6 * k * z**2 + 3 * k**2

    return Moments(
        g=at(s.square),
        g1=at(lambda z: s.square(z) * (z**2 - k) / (2 * k**2)),
        g2=at(lambda z: s.square(z) * hermite(z) / (4 * k**4)),
        fourth=at(lambda z: s.square(z) ** 2),
        mixed=at(lambda z: z**2 * s.square(z)),
        p=at(s.squared_slope),
        p1=at(lambda z: s.squared_slope(z) * (z**2 - k) / (2 * k**2)),
    )


def find_fixed_points(s: ScalarFunction, residual: float, K_range: tuple[float, float]) -> list[FixedPoint]:
    """All critical points, the one to be recommended first; the compromise where there is none.

    Args:
        s: the activation.
        residual: gamma, in [0, 1).
        K_range: variances between which a point with K* > 0 is looked for.
    """
    slopes = scale_invariant_slopes(s)
    if slopes is not None:
        c_w = 2 * (1 - residual**2) / (slopes[0] ** 2 + slopes[1] ** 2)
        return [FixedPoint("scale-invariant", 1.0, 0.0, c_w)]
    at_zero = _at_zero(s, residual)
    found = [*([at_zero] if at_zero else []), *_above_zero(s, residual, K_range)]
    order = {"from above": 0, "from below": 0, "neutral": 0, "unstable": 1}
    found.sort(key=lambda point: (order[point.stability], point.kind != "K*=0"))
    return found or [_compromise(s, residual, K_range)]


def scale_invariant_slopes(s: ScalarFunction) -> tuple[float, float] | None:
    """(a-, a+) if s(z) is a- z for negative and a+ z for positive z, else None."""
    z = torch.logspace(-6, 2, 33, dtype=torch.float64)
    sides = torch.stack([s(-z) / -z, s(z) / z])
    middle = sides[:, 16:17]
    if bool(((sides - middle).abs() <= 1e-9 * middle.abs().max()).all()) and float(s(z.new_zeros(1))) == 0:
        return float(middle[0]), float(middle[1])
    return None


# -- K* = 0 --------------------------------------------------------------------------------------------------


def _at_zero(s: ScalarFunction, residual: float) -> FixedPoint | None:
    """The point where small signals are fixed: it needs s(0) = 0 and a slope there."""
    z = torch.tensor([-1e-13, 1e-13], dtype=torch.float64)
    slopes = s.derivative(z)
    mean_square = float(slopes.square().mean())
    if abs(float(s(z.new_zeros(1)))) > 1e-12 or mean_square < 1e-12:
        return None
    if _is_smooth_at_zero(s, slopes):
        s1, s2, s3 = _derivatives_at_zero(s)
        exponent, a1, b1 = 1.0, s3 / s1 + 0.75 * (s2 / s1) ** 2, s3 / s1 + (s2 / s1) ** 2
    else:
        exponent, a1, b1 = 0.5, *_root_expansion(s, mean_square)
    sign = a1
    if abs(a1) < 1e-7:  # piecewise linear about zero, such as hardtanh: what happens further out decides
        exponent, a1, b1 = math.nan, 0.0, 0.0
        K = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
        ratio = (expectation(s.square, K, s.kinks) / (mean_square * K)).log().nan_to_num(0.0)
        far = ratio[ratio.abs() > NOISE]
        sign = float(far[0]) if len(far) else 0.0
    stability: Stability = "from above" if sign < 0 else "unstable" if sign > 0 else "neutral"
    c_w = (1 - residual**2) / mean_square
    return FixedPoint("K*=0", 0.0, 0.0, c_w, a1, b1, exponent, stability)


def _is_smooth_at_zero(s: ScalarFunction, slopes: Tensor) -> bool:
    """Whether s' and s'' are continuous at zero: their jumps shrink with the distance."""
    if 0.0 in s.kinks:
        return False
    jumps = []
    for step in (1e-4, 1e-5):
        z = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64) * step
        d = s.derivative(z)
        jumps.append(abs(float((d[3] - d[2]) - (d[1] - d[0]))) / step)
    return jumps[1] < 0.5 * jumps[0] or jumps[1] < 1e-6 * float(slopes.abs().max())


def _derivatives_at_zero(s: ScalarFunction) -> tuple[float, float, float]:
    """s', s'', s''' at zero by differences of s' of fourth order, at steps that fit the function's scale."""
    step, result = 1e-3, (0.0, 0.0, 0.0)
    for _ in range(3):
        f = s.derivative(step * torch.arange(-2.0, 3.0, dtype=torch.float64)).tolist()
        second = (8 * (f[3] - f[1]) - (f[4] - f[0])) / (12 * step)
        third = (-f[4] + 16 * f[3] - 30 * f[2] + 16 * f[1] - f[0]) / (12 * step**2)
        result = (f[2], second, third)
        size = max(abs(second / f[2]), math.sqrt(abs(third / f[2])))
        step = 0.01 / max(size, 0.1)
    return result


def _root_expansion(s: ScalarFunction, mean_square: float) -> tuple[float, float]:
    """a1 and b1 of g = A2 K (1 + a1 sqrt K), p = A2 (1 + b1 sqrt K), extrapolated to K = 0."""
    K = torch.tensor([1e-6, 0.25e-6], dtype=torch.float64)
    coefficients = []
    for value in (expectation(s.square, K, s.kinks) / K, expectation(s.squared_slope, K, s.kinks)):
        slope = (value / mean_square - 1) / K.sqrt()
        coefficients.append(float(2 * slope[1] - slope[0]))
    return coefficients[0], coefficients[1]


# -- K* > 0, and none ----------------------------------------------------------------------------------------


def _above_zero(s: ScalarFunction, residual: float, K_range: tuple[float, float]) -> list[FixedPoint]:
    grid = np.geomspace(*K_range, GRID)

    def mismatch(log_K: float | NDArray[np.float64]) -> NDArray[np.float64]:
        m = moments_of_criticality(s, np.exp(log_K))
        with np.errstate(invalid="ignore", divide="ignore"):
            return m[1] / m[2] - 1

    values = mismatch(np.log(grid))
    signs = np.where(np.abs(values) < NOISE, 0.0, np.sign(values))
    found = []
    for i in np.flatnonzero(signs[1:] * signs[:-1] < 0):  # NaN is no sign change
        K = math.exp(optimize.brentq(mismatch, *np.log(grid[i : i + 2]), xtol=1e-14, rtol=1e-14))
        m = moments(s, K)
        c_w = (1 - residual**2) / float(m.p)
        c_b = (1 - residual**2) * K - c_w * float(m.g)
        if c_b >= 0:
            stability: Stability = "from above" if m.g2 < 0 else "from below"
            found.append(FixedPoint("K*>0", K, c_b, c_w, stability=stability))
    return found


def moments_of_criticality(s: ScalarFunction, K: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """g, g' and p alone, ``(3, ...)``."""
    variance = torch.as_tensor(K, dtype=torch.float64)
    k = variance[..., None]
    return torch.stack(
        [
            expectation(s.square, variance, s.kinks),
            expectation(lambda z: s.square(z) * (z**2 - k) / (2 * k**2), variance, s.kinks),
            expectation(s.squared_slope, variance, s.kinks),
        ]
    ).numpy()


def _compromise(s: ScalarFunction, residual: float, K_range: tuple[float, float]) -> FixedPoint:
    """The fixed point nearest to criticality.

    At a given K the biases take up what is missing, C_b = (1 - gamma^2) K - C_W g >= 0. The distance is
    piecewise linear in C_W, so its least value is at 1 / g', 1 / p (times 1 - gamma^2) or at the largest C_W.
    """
    budget = 1 - residual**2

    def best(log_K: float) -> tuple[float, float, float, float]:
        g, g1, p = moments_of_criticality(s, math.exp(log_K))
        largest = budget * math.exp(log_K) / g
        candidates = [largest, *(budget / slope for slope in (g1, p) if slope > 0)]
        options = [min(c_w, largest) for c_w in candidates]
        rated = [
            (float(abs(c * g1 - budget) + abs(c * p - budget)), float(c), float(c * g1), float(c * p))
            for c in options
        ]
        return min(rated, key=lambda rating: rating[0] if math.isfinite(rating[0]) else math.inf)

    grid = np.log(np.geomspace(*K_range, GRID // 4))
    ratings = [best(log_K)[0] for log_K in grid]
    i = int(np.nanargmin(ratings))
    around = grid[[max(i - 1, 0), min(i + 1, len(grid) - 1)]]
    refined = optimize.minimize_scalar(lambda k: best(k)[0], bounds=tuple(around), method="bounded").x
    log_K = min((float(grid[i]), float(refined)), key=lambda k: best(k)[0])
    _, c_w, par, perp = best(log_K)
    K = math.exp(log_K)
    c_b = max(0.0, budget * K - c_w * float(expectation(s.square, K, s.kinks)))
    return FixedPoint(
        "none", K, c_b, c_w, stability="from above", chi_par=residual**2 + par, chi_perp=residual**2 + perp
    )
