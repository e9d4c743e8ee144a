"""The proximal operator of f(z) = sum z log z - 1/2 |z|^2 on the simplex (paper, section 3.2), for every step
size alpha in (0, 1].

prox^alpha_f(v) = argmin_z 1/2 |z - v|^2 + alpha f(z), z on the simplex. With the multiplier nu of sum z = 1
its conditions are

    (1 - alpha) z_j + alpha log z_j = v_j + nu - alpha        for every j,        sum_j z_j = 1.

The authors solve them by Newton steps on nu, with Halley's iteration on log z_j inside each. Both loops are
one here: Newton's method on (log z, nu) together. Its linear system is diagonal but for one row and column,
so a step costs one exponential; both equations are convex in (log z, nu), so that after the first step the
iterates come down to the solution from one side.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

MAX_NEWTON_STEPS = 60
# Elements of a chunk: its half dozen temporaries stay in the second-level cache of one core.
CHUNK_ELEMENTS = 1 << 16


def prox_entropy(v: Float[Tensor, "*shape"], alpha: float, dim: int = -1) -> Float[Tensor, "*shape"]:
    """Proximal operator of the convex part f of the mean-field free energy; differentiable, softmax at alpha
    = 1.

    Args:
        v: points, any shape; the categories of one variable lie along `dim`.
        alpha: step size in (0, 1].
        dim: dimension of the categories.

    Returns:
        Points on the simplex, of v's shape: positive (down to underflow), summing to one along `dim`.

    Raises:
        DataError: if alpha is outside (0, 1].

    Source: paper, section 3.2 and appendix; the derivative by the implicit function theorem.
    """
    if not 0.0 < alpha <= 1.0:
        raise DataError(f"alpha is {alpha}; the proximal operator is defined for 0 < alpha <= 1.")
    if alpha == 1.0:
        return v.softmax(dim)
    return _ProxEntropy.apply(v, alpha, dim)


class _ProxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, alpha: float, dim: int) -> Tensor:
        z = solve_prox(v, alpha, dim)
        ctx.save_for_backward(z)
        ctx.alpha, ctx.dim = alpha, dim
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # dz = w (dv + dnu) with w = z / ((1 - alpha) z + alpha), and sum dz = 0 fixes dnu.
        (z,) = ctx.saved_tensors
        w = z / ((1.0 - ctx.alpha) * z + ctx.alpha)
        weighted = w * gradient
        mean = weighted.sum(ctx.dim, keepdim=True) / w.sum(ctx.dim, keepdim=True)
        return weighted - w * mean, None, None


@torch.compiler.disable  # a loop that ends when its values say so; compiled code calls it as it is
@torch.no_grad()
def solve_prox(v: Tensor, alpha: float, dim: int, start: Tensor | None = None) -> Tensor:
    """The values of `prox_entropy`, without a graph; on the CPU in chunks along the first dimension that fit
    the cache.

    Args:
        v: points, any shape.
        alpha: step size in (0, 1).
        dim: dimension of the categories.
        start: positive values near the solution, of v's shape, from which Newton's method starts; it then
            needs two or three steps instead of eight. They need not sum to one.

    Returns:
        Points on the simplex, of v's shape.
    """
    dim = dim % v.ndim
    rows = max(1, CHUNK_ELEMENTS // max(v[:1].numel(), 1))
    if v.device.type != "cpu" or dim == 0 or rows >= len(v):
        return _newton(v, alpha, dim, start)
    z = torch.empty_like(v)
    for first in range(0, len(v), rows):
        part = slice(first, first + rows)
        z[part] = _newton(v[part], alpha, dim, None if start is None else start[part])
    return z


def _newton(v: Tensor, alpha: float, dim: int, start: Tensor | None) -> Tensor:
    tolerance = 8.0 * torch.finfo(v.dtype).eps
    beta = 1.0 - alpha
    target = v - (
        v.amax(dim, keepdim=True) + (alpha - 1.0)
    )  # v + nu - alpha, with nu = 1 after v's largest entry is moved to 0
    log_z = (target / alpha if start is None else start.log()).clamp_(max=0.0)
    for step in range(MAX_NEWTON_STEPS):
        z = log_z.exp()
        excess = z.sum(dim, keepdim=True).sub_(1.0)  # of the second condition
        # After a step the excess is a sum of squares, of that step in log z: once it is rounding error, so is
        # the first condition.
        if step and bool(excess.amax() <= tolerance):
            break
        growth = beta * z
        slope = growth + alpha
        # Newton's step of the first condition at fixed nu, (growth (log z - 1) + target) / slope, then the
        # change of nu for the second.
        at_fixed_nu = torch.addcmul(target - growth, growth, log_z).div_(slope)
        fall = log_z.sub_(at_fixed_nu).mul_(z).sum(dim, keepdim=True)
        shift = (fall - excess) / (z / slope).sum(dim, keepdim=True)
        target.add_(shift)
        log_z = at_fixed_nu.add_(shift / slope).clamp_(max=0.0)
    return z / z.sum(dim, keepdim=True)
