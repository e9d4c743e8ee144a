"""Cholesky factors of matrices that are only nearly positive definite, and tails of quadratic forms.

`cholesky` adds as little to the diagonal as makes the factorisation succeed, and says how much that was.
`quadratic_form_logcdf` is the distribution function of a weighted sum of non-central chi-squares, also far in
the left tail, where the probability itself underflows. With the cumulant generating function

    K(s) = sum_k [ -(m_k / 2) log(1 - 2 s w_k) + w_k d_k^2 s / (1 - 2 s w_k) ]

and the saddlepoint K'(s) = q it is, by Barndorff-Nielsen's form of the Lugannani-Rice formula,

    log P(Q <= q) = log Phi(r + log(u / r) / r),   r = sign(s) sqrt(2 (s q - K(s))),   u = s sqrt(K''(s)).

Sources: Lugannani and Rice (1980), Advances in Applied Probability 12; Kuonen (1999), Biometrika 86, for
quadratic forms; Barndorff-Nielsen (1986), Biometrika 73.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

NEAR_MEAN = 1e-4  # below this |r|, log(u / r) / r is lost in rounding and its limit is taken
TABLE = 4_000_000  # entries of the largest table (values times terms) that is held at once


class Factor(NamedTuple):
    """A Cholesky factor, and what it took.

    Attributes:
        lower: L, lower triangular, with L L' = matrix + jitter I.
        jitter: what was added to each diagonal entry, ``(...)``; 0 where nothing was needed.
    """

    lower: Float[Tensor, "... n n"]
    jitter: Float[Tensor, "..."]


def cholesky(
    matrix: Float[Tensor, "... n n"],
    name: str = "matrix",
    *,
    jitter: float = 0.0,
    largest: float = 1e-2,
    remedy: str = "remove rows that are nearly equal, or add noise to its diagonal",
) -> Factor:
    """The Cholesky factor of a symmetric matrix, with the least jitter that lets it be factorised.

    Tried are `jitter`, and then ten times as much each time, up to `largest`; both are fractions of the mean
    diagonal entry. Of a batch, each matrix has its own. Gradients flow through the factor.

    Args:
        matrix: symmetric, any floating dtype; the lower triangle is read.
        name: what it is, for the error.
        jitter: where to begin, >= 0; after 0 comes 1e-8 (1e-6 in single precision or less).
        largest: where to give up.
        remedy: what a user can do about a matrix that cannot be factorised, for the error.

    Returns:
        The factor and the jitter of each matrix, in absolute terms.

    Raises:
        DataError: naming the matrix, its extreme eigenvalues and the remedy, if it is not square or not
            symmetric, has entries that are not finite, or is not positive definite even with the largest
            jitter.
    """
    _check_symmetric(matrix, name)
    scale = matrix.detach().diagonal(dim1=-2, dim2=-1).mean(-1).abs()
    fraction = torch.full_like(scale, jitter)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    first = 1e-8 if matrix.dtype == torch.float64 else 1e-6
    while True:
        added = fraction * scale
        lower, info = torch.linalg.cholesky_ex(matrix + added[..., None, None] * identity)
        failed = info > 0
        if not bool(failed.any()):
            return Factor(lower, added)
        more = torch.where(failed, (10 * fraction).clamp(min=first), fraction)
        if bool((more > largest * (1 + 1e-9)).any()):
            raise DataError(_not_positive_definite(matrix.detach(), failed, name, largest, remedy))
        fraction = more


def quadratic_form_logcdf(
    weights: Float[Tensor, " terms"],
    shifts: Float[Tensor, " terms"],
    value: Float[Tensor, "*values"] | float,
    *,
    degrees: Float[Tensor, " terms"] | None = None,
    constant: float = 0.0,
) -> Float[Tensor, "*values"]:
    """log P(Q <= value) for Q = constant + sum_k w_k chi'^2(m_k, d_k^2), by saddlepoint.

    With one degree of freedom each, Q = constant + sum_k w_k (z_k + d_k)^2 for independent standard normal
    z_k. The relative error of the probability stays bounded however small the probability: about 13 % for a
    single term of one degree of freedom (the worst case), 2 % for five equal terms, 0.01 % for forty.
    There is no simulation and no numerical integral.

    Args:
        weights: w_k >= 0; terms of weight 0 do not matter.
        shifts: d_k; only d_k^2 matters.
        value: where, any shape; infinity gives 0, and what lies at or below `constant` gives -infinity.
        degrees: m_k > 0, need not be whole; 1 if not given. A term of m degrees stands for m of equal weight
            whose shifts have d_k^2 as the sum of their squares.
        constant: the part of Q that is not random.

    Returns:
        Natural logarithms, float64, in the shape of `value`.

    Raises:
        DataError: if the shapes differ, a weight is negative, or a number is not finite.
    """
    w, nc, m = _terms(weights, shifts, degrees)
    q = torch.as_tensor(value, dtype=torch.float64, device=w.device)
    if bool(q.isnan().any()):
        raise DataError("value holds NaN; give the numbers at which the distribution function is wanted.")
    flat = q.reshape(-1) - constant
    if len(w) == 0:  # a step, and the value on the step is reached
        return torch.where(flat >= 0, 0.0, -math.inf).double().reshape(q.shape)
    result = torch.where(flat > 0, 0.0, -math.inf).double()
    inside = torch.isfinite(flat) & (flat > 0)
    for rows in inside.nonzero()[:, 0].split(max(1, TABLE // len(w))):
        result[rows] = _saddlepoint_logcdf(w, nc, m, flat[rows])
    return result.reshape(q.shape)


# -- helpers -------------------------------------------------------------------------------------------------


def _saddlepoint_logcdf(w: Tensor, nc: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """The formula of the module's docstring for positive finite q, ``(values,)``.

    With s = (1 - exp(t)) / (2 max w) and shares p = w / max w, 1 - 2 s w = 1 - p + p exp(t) has no
    cancellation, and s w / (1 - 2 s w) stays bounded however far the tail.
    """
    share, scaled = w / w.max(), q / w.max()
    t = _saddlepoint(share, nc, m, scaled)
    shrink = 1 - share + share * t[:, None].exp()  # (values, terms): 1 - 2 s w
    log_shrink = torch.where(t[:, None] < 1, torch.log1p(share * torch.expm1(t)[:, None]), shrink.log())
    tilt = -torch.expm1(t)[:, None] / 2 * share / shrink  # s w / (1 - 2 s w)
    generating = (-0.5 * m * log_shrink + nc * tilt).sum(1)
    r = t.sign().neg() * (2 * (-torch.expm1(t) / 2 * scaled - generating)).clamp(min=0).sqrt()
    u = t.sign().neg() * (2 * m * tilt**2 + 4 * nc * tilt**2 / shrink).sum(1).sqrt()
    near = r.abs() < NEAR_MEAN
    # The limit of log(u / r) / r at the mean is a sixth of the skewness.
    skewness = (8 * share**3 * (m + 3 * nc)).sum() / (2 * share**2 * (m + 2 * nc)).sum() ** 1.5
    r_or_1, ratio = torch.where(near, 1.0, r), torch.where(near, 1.0, u / r)
    return torch.special.log_ndtr(r + torch.where(near, skewness / 6, ratio.log() / r_or_1))


def _saddlepoint(share: Tensor, nc: Tensor, m: Tensor, scaled: Tensor) -> Tensor:
    """The t at which the tilted mean K'(s) is the value, all in units of the largest weight.

    The tilted mean falls from infinity to 0 as t rises, so that bisection cannot fail.
    """
    low, high = torch.full_like(scaled, -90.0), torch.full_like(scaled, 700.0)
    for _ in range(80):
        t = (low + high) / 2
        shrink = 1 - share + share * t[:, None].exp()
        too_high = (share * m / shrink + share * nc / shrink**2).sum(1) > scaled
        low, high = torch.where(too_high, t, low), torch.where(too_high, high, t)
    return (low + high) / 2


def _terms(weights: Tensor, shifts: Tensor, degrees: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, squared shifts and degrees of freedom as float64 vectors, without terms of weight 0."""
    w = torch.as_tensor(weights, dtype=torch.float64).detach()
    d = torch.as_tensor(shifts, dtype=torch.float64, device=w.device).detach()
    m = torch.ones_like(w) if degrees is None else torch.as_tensor(degrees, dtype=torch.float64).to(w.device)
    if w.ndim != 1 or d.shape != w.shape or m.shape != w.shape:
        raise DataError(
            f"weights, shifts and degrees have shapes {tuple(w.shape)}, {tuple(d.shape)} and "
            f"{tuple(m.shape)}; give vectors with one number per term."
        )
    kept = w != 0
    w, nc, m = w[kept], d[kept] ** 2, m[kept]
    finite = bool((w.isfinite() & nc.isfinite() & m.isfinite()).all())
    if not finite or bool((w < 0).any()) or bool((m <= 0).any()):
        raise DataError(
            "a quadratic form needs finite weights >= 0, finite shifts and degrees > 0; set weights that are "
            "negative by rounding to 0."
        )
    return w, nc, m


def _check_symmetric(matrix: Tensor, name: str) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise DataError(f"the {name} has shape {tuple(matrix.shape)}; a square matrix is needed.")
    values = matrix.detach()
    if values.numel() == 0:
        return
    if not bool(values.isfinite().all()):
        raise DataError(f"the {name} has entries that are not finite; look for them in what it is made from.")
    size = values.abs().amax().clamp(min=torch.finfo(values.dtype).tiny)
    difference = float((values - values.mT).abs().amax() / size)
    if difference > 100 * torch.finfo(values.dtype).eps * matrix.shape[-1]:
        raise DataError(
            f"the {name} is not symmetric (entries differ by {difference:.1e} of its largest); "
            "give (A + A') / 2 if that is what is meant."
        )


def _not_positive_definite(matrix: Tensor, failed: Tensor, name: str, largest: float, remedy: str) -> str:
    """The sentence for a matrix that cannot be factorised: the first one of a batch."""
    n = matrix.shape[-1]
    worst = matrix.reshape(-1, n, n)[int(failed.reshape(-1).nonzero()[0])]
    eigenvalues = torch.linalg.eigvalsh(worst.double())
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    condition = f"condition number {high / low:.1e}" if low > 0 else "so it is not positive definite"
    return (
        f"the {name} ({n} x {n}) has no Cholesky factor even with {largest:g} of its mean diagonal added: "
        f"its eigenvalues go from {low:.2e} to {high:.2e}, {condition}; {remedy}."
    )
