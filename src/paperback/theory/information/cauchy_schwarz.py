"""Cauchy-Schwarz quadratic mutual information: dependence from kernels, without densities, differentiable.

With Gram matrices K of x and Q of t under Gaussian kernels, the Cauchy-Schwarz divergence between the joint
density and the product of the marginals is estimated by

    I_CS = log(tr(K Q) / N^2) + log(1'K 1 1'Q 1 / N^4) - 2 log(1'K Q 1 / N^3).

It is 0 for independent variables and not a Shannon information: compare its values with each other only.
Source: Yu et al. (2024), section 3; Principe, Information Theoretic Learning (2010).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError

_ENTRIES_AT_A_TIME = 2**18  # of a Gram matrix: what a cache holds
_ROWS_FOR_MEDIAN = 1000


def cs_qmi(
    x: Float[Tensor, "n dx"],
    t: Float[Tensor, "n dt"],
    sigma_x: float = 1.0,
    sigma_t: float = 1.0,
    normalised: bool = True,
) -> Float[Tensor, ""]:
    """Cauchy-Schwarz quadratic mutual information of paired rows, in nats; it has gradients.

    Args:
        x: ``(n, dx)``, n >= 2.
        t: ``(n, dt)``, row by row.
        sigma_x: width of the Gaussian kernel on x, > 0.
        sigma_t: the same on t.
        normalised: divide by sqrt(I(x;x) I(t;t)); then it is 1 for t = x and 0 if one of the two is constant.
            Nothing bounds it by 1: a t in tight clusters that are the classes of x can exceed it.

    Returns:
        A scalar of x's precision.

    Raises:
        DataError: if a width is not positive, or the rows do not pair up.

    Source:
        Yu et al., Cauchy-Schwarz Divergence Information Bottleneck for Regression (2024), section 3.
    """
    for name, sigma in (("sigma_x", sigma_x), ("sigma_t", sigma_t)):
        if not (math.isfinite(sigma) and sigma > 0):
            raise DataError(f"{name} is {sigma}; it must be a positive number.")
    if x.ndim != 2 or t.ndim != 2 or len(x) != len(t) or len(x) < 2:
        raise DataError(
            f"x has shape {tuple(x.shape)} and t {tuple(t.shape)}; give (n, d) both, n equal and at least 2."
        )
    xt, xx, tt, x_rows, t_rows = _sums(x, t, sigma_x, sigma_t)
    value = _divergence(xt, x_rows, t_rows)
    if not normalised:
        return value
    self_x, self_t = _divergence(xx, x_rows, x_rows), _divergence(tt, t_rows, t_rows)
    scale = self_x * self_t
    if (
        float(scale.detach()) <= (100 * torch.finfo(x.dtype).eps) ** 2
    ):  # a constant variable depends on nothing
        return 0.0 * value
    return value / scale.sqrt()


def median_bandwidth(x: Float[Tensor, "n d"]) -> float:
    """Median distance between different rows, the usual width of a Gaussian kernel.

    Args:
        x: ``(n, d)``; of more than 1,000 rows that many, evenly spaced, are used.

    Returns:
        The median over pairs of rows that differ; 1 if none do.
    """
    rows = x.detach()[:: max(1, len(x) // _ROWS_FOR_MEDIAN)].double()
    distances = torch.pdist(rows)
    distances = distances[distances > 0]
    return float(distances.median()) if len(distances) else 1.0


def _sums(
    x: Tensor, t: Tensor, sigma_x: float, sigma_t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tr(KQ), tr(KK), tr(QQ) and the row sums of K and Q, some rows of the Gram matrices at a time."""
    x, t = x - x.detach().mean(0), t - t.detach().mean(0)  # less cancellation in the squared distances
    traces = [x.new_zeros(()) for _ in range(3)]
    x_rows, t_rows = [], []
    step = max(1, _ENTRIES_AT_A_TIME // len(x))
    for start in range(0, len(x), step):
        K = _gram(x[start : start + step], x, sigma_x)
        Q = _gram(t[start : start + step], t, sigma_t)
        traces = [total + (a * b).sum() for total, a, b in zip(traces, (K, K, Q), (Q, K, Q), strict=True)]
        x_rows.append(K.sum(1))
        t_rows.append(Q.sum(1))
    return traces[0], traces[1], traces[2], torch.cat(x_rows), torch.cat(t_rows)


def _gram(a: Tensor, b: Tensor, sigma: float) -> Tensor:
    a, b = a / (sigma * math.sqrt(2)), b / (sigma * math.sqrt(2))
    squares = torch.addmm((b * b).sum(1), a, b.T, alpha=-2) + (a * a).sum(1)[:, None]
    return torch.exp(-squares.clamp_min(0))


def _divergence(trace: Tensor, a_rows: Tensor, b_rows: Tensor) -> Tensor:
    """The powers of N cancel: 2 + 4 - 2 * 3 = 0."""
    return trace.log() + a_rows.sum().log() + b_rows.sum().log() - 2 * (a_rows * b_rows).sum().log()
