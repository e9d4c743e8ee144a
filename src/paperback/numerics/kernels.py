"""Gaussian expectations of activation functions, and the kernels of infinitely wide networks.

A network whose weights are N(0, C_W / fan_in) and whose biases are N(0, C_b) is a Gaussian process when its
layers are wide. Its covariance goes from layer to layer by K' = C_b + C_W E[s(z) s(z')] with (z, z') ~ N(0,
K), its neural tangent kernel by Theta' = lambda_b + lambda_W E[s s'] + C_W E[ds ds'] Theta. The expectations
are in closed form for piecewise linear functions (arc-cosine kernel) and erf (arcsine kernel), for all others
by quadrature.

The quadrature is Gauss-Legendre on panels that end where the function has a kink, so that ReLU costs no
accuracy: a uniform grid or Gauss-Hermite errs by 1e-4 in E[s'^2].

Sources: Cho and Saul, Kernel methods for deep learning (2009); Williams, Computing with infinite networks
(1997); Lee et al., Deep neural networks as Gaussian processes (2018); Jacot et al., Neural tangent kernel
(2018).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError

Function = Callable[[Tensor], Tensor]
Dual = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

REACH = 10.0  # the Gaussian is cut off at so many standard deviations: 1e-23 of it is lost
FEATURES = (0.0, 1.0, 2.0, 4.0, 8.0)  # where panels end, in z: functions of scale one bend there
TINY = 1e-150
SERIES_UP_TO, SERIES_TERMS = 0.9, 160  # correlations that Mehler's series is used for: 0.9^160 = 5e-8
TAIL = 1e-9  # an expectation with more than this share in its last panels is not covered by the quadrature


class ScalarFunction:
    """A function of one number as mathematics: its values and its derivative in float64, and its kinks.

    Args:
        function: elementwise, from a tensor to a tensor of the same shape; a module is copied and used in
            evaluation mode. Its derivative is taken by autograd.
        reach: kinks are looked for in [-reach, reach].

    Attributes:
        kinks: where the derivative jumps, to 1e-12.

    Raises:
        DataError: if the function changes the shape, is not elementwise, gives a number that is not finite,
            is zero everywhere, has no derivative, or jumps.
    """

    def __init__(self, function: Function, reach: float = 150.0) -> None:
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).double().eval()
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._check(reach)
        jumps = _jumps(self.__call__, reach)
        if jumps:
            raise DataError(
                f"activation {self.name} jumps at {jumps[0]:.4g}; the theory needs a continuous function."
            )
        self.kinks = _jumps(self.derivative, reach)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Values, float64, of the shape of z."""
        return self._function(z.to(torch.float64))

    def derivative(self, z: Tensor) -> Tensor:
        """First derivative, float64, of the shape of z."""
        with torch.enable_grad():
            z = z.to(torch.float64).detach().requires_grad_()
            value = self._function(z)
            if not value.requires_grad:
                raise DataError(
                    f"activation {self.name} has no derivative by autograd; write it in torch operations."
                )
            return torch.autograd.grad(value.sum(), z)[0]

    def square(self, z: Tensor) -> Tensor:
        """s(z)^2."""
        return self(z).square()

    def squared_slope(self, z: Tensor) -> Tensor:
        """s'(z)^2."""
        return self.derivative(z).square()

    def _check(self, reach: float) -> None:
        z = torch.linspace(-5.05, 5.05, 102, dtype=torch.float64)
        value = self(z)
        if not isinstance(value, Tensor) or value.shape != z.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise DataError(
                f"activation {self.name} gives {shape} for shape {tuple(z.shape)}; it must keep it."
            )
        if not value.isfinite().all():
            bad = float(z[~value.isfinite()][0])
            raise DataError(f"activation {self.name} is NaN or infinite at z = {bad:.3g}; give a finite one.")
        if not torch.allclose(self(z[::3]), value[::3], rtol=1e-9, atol=1e-12):
            raise DataError(
                f"activation {self.name} is not elementwise: its value depends on other entries or on chance."
            )
        if not self(torch.linspace(-reach, reach, 1000)).any():
            raise DataError(f"activation {self.name} is zero everywhere; no signal passes it.")


def _jumps(function: Function, reach: float, step: float = 0.01) -> tuple[float, ...]:
    """Where a function jumps: halve every interval with a difference until only a jump can explain it."""
    ends = torch.arange(-reach - step / 2, reach + step, step, dtype=torch.float64)  # zero is not among them
    values = function(ends)
    scale = 1e-7 * (1.0 + float(values.nan_to_num(0, 0, 0).abs().median()))
    steps = (values[1:] - values[:-1]).abs()
    chosen = (steps > scale) & steps.isfinite()
    low, high = ends[:-1][chosen], ends[1:][chosen]
    for _ in range(44):
        middle = (low + high) / 2
        left, centre, right = (function(points) for points in (low, middle, high))
        lower = (centre - left).abs() > (right - centre).abs()
        low, high = torch.where(lower, low, middle), torch.where(lower, middle, high)
    jump = (function(high) - function(low)).abs() > scale * (1 + function(low).abs())
    places = ((low + high) / 2)[jump]
    return tuple(round(place, 12) + 0.0 for place in places.tolist())


# -- one Gaussian variable -----------------------------------------------------------------------------------


def gaussian_nodes(variance: Tensor, breaks: Sequence[float] = (), order: int = 12) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a quadrature for E f(z), z ~ N(0, variance).

    Args:
        variance: ``(...)`` float64, >= 0.
        breaks: where f has kinks.
        order: nodes of a panel.

    Returns:
        z and weights, each ``(..., nodes)``; the weights sum to one.
    """
    scale = variance.sqrt()[..., None].clamp_min(TINY)  # at zero variance: the limit, from both sides
    edges = torch.cat([_panels(variance, 0.25), _marks(breaks, variance) / scale], -1)
    u, weights = _legendre(edges, order)
    return scale * u, weights


def expectation(function: Function, variance: Tensor | float, breaks: Sequence[float] = ()) -> Tensor:
    """E f(z), z ~ N(0, variance).

    Args:
        function: elementwise; it may also depend on the variance, if that broadcasts as ``(..., 1)``.
        variance: ``(...)``, >= 0.
        breaks: where the function or its derivative jumps.

    Returns:
        ``(...)`` float64. NaN where the function grows so fast that the expectation is not settled within ten
        standard deviations, or overflows.
    """
    variance = torch.as_tensor(variance, dtype=torch.float64)
    z, weights = gaussian_nodes(variance, breaks)
    terms = weights * function(z)
    total = terms.sum(-1)
    outside = (z.abs() > 0.95 * REACH * variance.sqrt()[..., None]) & (variance[..., None] > 0)
    share = (terms.abs() * outside).sum(-1)
    return total.where(share <= TAIL * terms.abs().sum(-1) + 1e-300, torch.nan)


@cache
def _legendre_rule(order: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(order)


def _legendre(edges: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, with the normal density, on the panels between the edges ``(..., edges)``."""
    edges = edges.clamp(-REACH, REACH).sort(-1).values
    points, weights = (torch.from_numpy(array) for array in _legendre_rule(order))
    half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
    u = (edges[..., 1:] + edges[..., :-1])[..., None] / 2 + half * points
    density = half * weights * torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)
    return u.flatten(-2), density.flatten(-2)


def _panels(like: Tensor, width: float) -> Tensor:
    edges = torch.linspace(-REACH, REACH, round(2 * REACH / width) + 1, dtype=torch.float64)
    return edges.expand(*like.shape, -1)


def _marks(breaks: Sequence[float], like: Tensor) -> Tensor:
    """Places in z where panels end, ``(..., marks)``."""
    marks = sorted({*FEATURES, *(-place for place in FEATURES), *breaks})
    return torch.tensor(marks, dtype=torch.float64).expand(*like.shape, -1)


# -- two Gaussian variables: the dual of an activation -------------------------------------------------------


def arc_cosine(negative_slope: float = 0.0, positive_slope: float = 1.0) -> Dual:
    """The dual of s(z) = positive_slope z for z > 0, negative_slope z for z < 0, in closed form.

    Args:
        negative_slope: a-.
        positive_slope: a+; (0, 1) is ReLU, (1, 1) linear.

    Returns:
        From the covariances (Var z, Cov, Var z') of pairs, tensors of equal shape, to E[s(z) s(z')] and
        E[ds(z) ds(z')]. Gradients pass through it.
    """
    even, odd = positive_slope**2 + negative_slope**2, 2 * positive_slope * negative_slope

    def dual(kxx: Tensor, kxy: Tensor, kyy: Tensor) -> tuple[Tensor, Tensor]:
        scale = (kxx * kyy).clamp_min(0).sqrt()
        ratio = torch.where(scale > 0, kxy / scale.clamp_min(1e-300), 0.0)
        # At +-1 the root and the angle have infinite slopes that cancel in the value: keep a hair away there.
        hair = 4 * torch.finfo(ratio.dtype).eps
        inside = ratio.abs() < 1 - hair
        cosine = torch.where(inside, ratio, (1 - hair) * ratio / ratio.detach().abs().clamp_min(0.5))
        angle, sine = cosine.arccos(), ((1 - cosine) * (1 + cosine)).sqrt()  # without cancellation
        same = scale * (sine + (math.pi - angle) * cosine) / (2 * math.pi)  # both on one side of zero
        other = scale * (sine - angle * cosine) / (2 * math.pi)
        angle = torch.where(inside, angle, math.pi * (ratio < 0))
        return even * same - odd * other, (even * (math.pi - angle) + odd * angle) / (2 * math.pi)

    return dual


def arc_sine(kxx: Tensor, kxy: Tensor, kyy: Tensor) -> tuple[Tensor, Tensor]:
    """The dual of erf in closed form.

    Args:
        kxx: variances of z, any shape.
        kxy: covariances, of that shape.
        kyy: variances of z', of that shape.

    Returns:
        E[erf(z) erf(z')] and E[erf'(z) erf'(z')].
    """
    product = (1 + 2 * kxx) * (1 + 2 * kyy)
    value = 2 / math.pi * torch.asin((2 * kxy / product.sqrt()).clamp(-1, 1))
    return value, 4 / math.pi / (product - 4 * kxy.square()).sqrt()


def quadrature(function: Function | ScalarFunction, chunk: int = 8) -> Dual:
    """The dual of any activation, by quadrature.

    Where the correlation of a pair is not close to one the dual is summed as Mehler's series, E[s(z) s(z')] =
    sum_k a_k(kxx) a_k(kyy) rho^k with the Hermite coefficients a_k of s. The other pairs are integrated in
    two dimensions, with panels that end at the kinks.

    Args:
        function: as for `ScalarFunction`.
        chunk: pairs that are integrated at once; each takes some 40,000 nodes.

    Returns:
        As `arc_cosine`, to about 1e-9, without gradients.
    """
    s = function if isinstance(function, ScalarFunction) else ScalarFunction(function)

    def dual(kxx: Tensor, kxy: Tensor, kyy: Tensor) -> tuple[Tensor, Tensor]:
        shape = kxx.shape
        kxx, kxy, kyy = (k.detach().to(torch.float64).reshape(-1) for k in (kxx, kxy, kyy))
        rho = kxy / (kxx * kyy).sqrt().clamp_min(TINY)
        near = rho.abs() > SERIES_UP_TO
        result = torch.stack(_series(s, kxx, rho, kyy))
        pairs = (k[near].split(chunk) for k in (kxx, kxy, kyy))
        parts = [torch.stack(_dual_of_pairs(s, *part)) for part in zip(*pairs, strict=True) if len(part[0])]
        result[:, near] = torch.cat([result[:, :0], *parts], 1)
        return result[0].reshape(shape), result[1].reshape(shape)

    return dual


def _series(s: ScalarFunction, kxx: Tensor, rho: Tensor, kyy: Tensor) -> tuple[Tensor, Tensor]:
    """Mehler's series for E[s s'] and E[ds ds']; each variance has its coefficients computed once."""
    variances, place = torch.cat([kxx, kyy]).unique(return_inverse=True)
    z, weights = gaussian_nodes(variances, s.kinks)
    u = z / variances.sqrt()[:, None].clamp_min(TINY)
    values, slopes = weights * s(z), weights * s.derivative(z)
    first, second = place.split(len(kxx))
    totals = [torch.zeros_like(rho), torch.zeros_like(rho)]
    previous, polynomial, power = torch.zeros_like(u), torch.ones_like(u), torch.ones_like(rho)
    for k in range(SERIES_TERMS):  # normalised Hermite polynomials by their recursion
        for total, terms in zip(totals, (values, slopes), strict=True):
            coefficient = (terms * polynomial).sum(1)
            total += coefficient[first] * coefficient[second] * power
        previous, polynomial = polynomial, (u * polynomial - math.sqrt(k) * previous) / math.sqrt(k + 1)
        power = power * rho
    return totals[0], totals[1]


def _dual_of_pairs(s: ScalarFunction, kxx: Tensor, kxy: Tensor, kyy: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate over z = sqrt(kxx) u and z' = c u + sigma v, where c = kxy / sqrt(kxx).

    The inner integral over v ends its panels at the kinks of s(z'); what it leaves in u bends within
    sigma / c of kink / c, and the outer panels are graded towards that place.
    """
    scale = kxx.sqrt().clamp_min(TINY)
    c = torch.where(kxx > 0, kxy / scale, 0.0)
    sigma = (kyy - c.square()).clamp_min(0).sqrt()[:, None]
    steep = torch.where(c.abs() < TINY, TINY, c)[:, None]  # of z' as a function of u
    marks = _marks(s.kinks, kxx)
    kinks = torch.tensor(s.kinks, dtype=torch.float64).expand(len(kxx), -1)
    graded = [(kinks + sigma * step) / steep for step in (-6.0, -3.0, -1.5, 1.5, 3.0, 6.0)]
    edges = torch.cat([_panels(kxx, 2.0), marks / scale[:, None], marks / steep, *graded], -1)
    u, outer = _legendre(edges, 8)
    z = scale[:, None] * u
    centre = c[:, None] * u
    inner_edges = (_marks(s.kinks, u) - centre[..., None]) / sigma[..., None].clamp_min(TINY)
    v, inner = _legendre(torch.cat([_panels(u, 2.0), inner_edges], -1), 8)
    other = centre[..., None] + sigma[..., None] * v
    value = (outer * s(z) * (inner * s(other)).sum(-1)).sum(-1)
    slope = (outer * s.derivative(z) * (inner * s.derivative(other)).sum(-1)).sum(-1)
    return value, slope


# -- from layer to layer -------------------------------------------------------------------------------------


def input_gram(x: Float[Tensor, "inputs features"]) -> Float[Tensor, "inputs inputs"]:
    """x x^T / features: what the first layer sees of the data."""
    return x @ x.mT / x.shape[-1]


def gram_dual(dual: Dual, gram: Float[Tensor, "inputs inputs"]) -> tuple[Tensor, Tensor]:
    """E[s s'] and E[ds ds'] for all pairs of inputs; each pair is computed once.

    Args:
        dual: of the activation.
        gram: covariance of the preactivations, ``(inputs, inputs)``, symmetric.

    Returns:
        Two symmetric matrices ``(inputs, inputs)``.
    """
    row, column = torch.triu_indices(len(gram), len(gram))
    diagonal = gram.diagonal()
    pairs = dual(diagonal[row], gram[row, column], diagonal[column])
    square = []
    for values in pairs:
        matrix = gram.new_zeros(gram.shape).index_put((row, column), values.to(gram.dtype))
        square.append(matrix + matrix.triu(1).mT)
    return square[0], square[1]


def kernel_step(
    dual: Dual, gram: Float[Tensor, "inputs inputs"], C_b: float, C_W: float
) -> Float[Tensor, "inputs inputs"]:
    """One layer of the kernel recursion: C_b + C_W E[s s'].

    Args:
        dual: of the activation.
        gram: of the preactivations before it.
        C_b: variance of the biases, >= 0.
        C_W: variance of the weights times fan-in, > 0.

    Returns:
        The Gram matrix of the preactivations behind it.
    """
    return C_b + C_W * gram_dual(dual, gram)[0]


def nngp_and_ntk(
    x: Float[Tensor, "inputs features"],
    dual: Dual,
    depth: int,
    C_b: float,
    C_W: float,
    lambda_b: float | None = None,
    lambda_W: float | None = None,
) -> tuple[Float[Tensor, "inputs inputs"], Float[Tensor, "inputs inputs"]]:
    """The two kernels of a fully connected network of infinite width.

    Args:
        x: inputs, ``(inputs, features)``; float64 for accuracy.
        dual: of the activation.
        depth: layers of weights, >= 1; the last one is the readout.
        C_b: variance of the biases, >= 0.
        C_W: variance of the weights times fan-in, > 0.
        lambda_b: learning rate of the biases; C_b if not given, which is what the NTK parameterisation has.
        lambda_W: learning rate of the weights times fan-in; C_W if not given.

    Returns:
        The covariance of the outputs (NNGP kernel) and the neural tangent kernel.

    Raises:
        DataError: if depth < 1, C_b < 0, C_W <= 0, or x is not a matrix.
    """
    if x.ndim != 2 or depth < 1:
        raise DataError(f"x has shape {tuple(x.shape)} and depth is {depth}; give a matrix and a depth >= 1.")
    if not (C_b >= 0 and C_W > 0):
        raise DataError(f"C_b is {C_b} and C_W {C_W}; they must be >= 0 and > 0.")
    lambda_b, lambda_W = C_b if lambda_b is None else lambda_b, C_W if lambda_W is None else lambda_W
    gram = input_gram(x)
    kernel, tangent = C_b + C_W * gram, lambda_b + lambda_W * gram
    for _ in range(depth - 1):
        values, slopes = gram_dual(dual, kernel)
        kernel, tangent = C_b + C_W * values, lambda_b + lambda_W * values + C_W * slopes * tangent
    return kernel, tangent
