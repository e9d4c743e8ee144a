"""Radii within which a decision cannot change, computed so that nothing underflows.

A move of length eps changes each distance by at most eps (triangle inequality). With kappa the kernel, d_k
stays within [kappa(delta_k + eps), kappa(max(delta_k - eps, 0))]. For the exponential kernel with one sigma
both are within factors 1/z and z, z = exp(eps / sigma), and the gap of a vector y to a rival c stays above
a/z + b - q z with

    a = sum_k (r+_ky + r-_kc) d_k,   b = offset_y - offset_c,   q = sum_k (r-_ky + r+_kc) d_k,

which is positive up to eps* = sigma ln z*, ln z* = (ln a - ln q)/2 + asinh(b / (2 sqrt(a q))): the positive
root of the quadratic, without a difference that cancels, and with a and q as logarithms. `tight_radii`
bisects the bounds themselves; `relative.relative_radii` has better ones for Euclidean distances.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

BISECTIONS = 60
ROUNDING = 1e-10  # of the terms of a gap: a smaller gap does not count as one
LARGE = 15.0  # ln |t| above which asinh(t) is sign(t) ln |2 t| to the last digit
NOTHING = 64.0  # -ln of a detection that no longer counts
MOST = 700.0  # its exponential is still a float64


def log_kernel(
    distances: Float[Tensor, "... K"], sigma: Float[Tensor, "..."], kernel: str
) -> Float[Tensor, "... K"]:
    """ln d: -delta/sigma for "exp", -delta^2/sigma for "gaussian"."""
    return -(distances if kernel == "exp" else distances.square()) / sigma


def closed_form(
    log_d: Float[Tensor, "B K"],
    log_positive: Float[Tensor, "K V"],
    log_negative: Float[Tensor, "K V"] | None,
    offset: Float[Tensor, " V"],
    own: Int[Tensor, " B"],
    sigma: Float[Tensor, ""],
) -> Float[Tensor, "B V"]:
    """Signed radii of each row's vector `own` against every vector, for the exponential kernel.

    Args:
        log_d: logarithms of the detections.
        log_positive: ln r+.
        log_negative: ln r-; None without negative reasoning.
        offset: scores without any detection.
        own: for each row the vector that is to stay ahead.
        sigma: of the kernel; the least one where components have their own (valid, not tight).

    Returns:
        eps* against each vector, positive where `own` is ahead; what it holds against itself means nothing.
    """
    presence = _log_product(log_d, log_positive)  # ln sum_k r+_kv d_k, (B, V)
    a, q = presence.gather(1, own[:, None]), presence
    if log_negative is not None:
        absence = _log_product(log_d, log_negative)
        a = torch.logaddexp(a, absence)
        q = torch.logaddexp(q, absence.gather(1, own[:, None]))
    mine = offset[own][:, None]
    b = mine - offset - ROUNDING * (mine.abs() + offset.abs()).detach()
    return sigma * ((a - q) / 2 + _asinh_of_quotient(b, (a + q) / 2 + math.log(2)) - ROUNDING)


def tight_radii(
    distances: Float[Tensor, "B K"],
    weights: Float[Tensor, "K V"],
    offset: Float[Tensor, " V"],
    own: Int[Tensor, " B"],
    sigma: Float[Tensor, "..."],
    kernel: str,
) -> Float[Tensor, "B V"]:
    """Signed radii by bisection, with each component's own sigma and either kernel.

    Only the difference of what a component does for a vector and for its rival can change the decision, and
    a detection never exceeds 1. The closed form uses neither, so that this radius is at least as far from 0.
    Differentiable: one Newton step at the root carries the gradient.

    Args:
        distances: to the components.
        weights: r+ - r-.
        offset: scores without any detection.
        own: for each row the vector that is to stay ahead.
        sigma: one, or one for each component.
        kernel: "exp" or "gaussian".

    Returns:
        eps* as in `closed_form`, the safe end of the last interval. At most the largest distance and the
        length on which a detection falls to e^-64, beyond which nothing
        changes any more; at least minus that.
    """
    rise = weights.T[own][:, None, :] - weights.T  # (B, V, K): what each component does for the gap
    constant = offset[own][:, None] - offset
    size = offset[own].abs()[:, None] + offset.abs()
    with torch.no_grad():
        reach = NOTHING * sigma.max() if kernel == "exp" else (NOTHING * sigma.max()).sqrt()
        high = (distances.amax(1, keepdim=True) + reach).expand_as(constant)
        low = -high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            safe = _is_ahead(distances, middle, rise, constant, size, sigma, kernel)
            low, high = torch.where(safe, middle, low), torch.where(safe, high, middle)
    if not torch.is_grad_enabled():
        return low
    root = low.detach().requires_grad_()
    terms, one = _terms(distances, root, rise, constant, sigma, kernel)
    gap = terms.sum(-1) + constant * one
    (slope,) = torch.autograd.grad(gap.sum(), root, retain_graph=True)
    # root is held fixed: d root = - d gap / slope
    return low - (gap - gap.detach()) / slope.detach().clamp_max(-torch.finfo(slope.dtype).tiny)


def against_rivals(
    radii: Float[Tensor, "B V"], y: Int[Tensor, " B"], vectors_per_class: int
) -> Float[Tensor, " B"]:
    """The least radius over vectors of other classes."""
    classes = torch.arange(radii.shape[1], device=radii.device) // vectors_per_class
    return radii.masked_fill(classes == y[:, None], torch.inf).amin(1)


# -- helpers -------------------------------------------------------------------------------------------------


def _terms(
    distances: Float[Tensor, "B K"],
    eps: Float[Tensor, "B V"],
    rise: Float[Tensor, "B V K"],
    constant: Float[Tensor, "B V"],
    sigma: Float[Tensor, "..."],
    kernel: str,
) -> tuple[Float[Tensor, "B V K"], Float[Tensor, "B V"]]:
    """The least gap after a move of at most eps, term by term; where eps < 0 the greatest after one of |eps|.

    What speaks for the vector moves away, what speaks for its rival comes near.

    Returns:
        What each component does for the gap, and 1, both over the largest detection or the constant, so that
        tiny detections keep their digits.
    """
    moved = (distances[:, None] + eps[..., None] * rise.detach().sign()).clamp_min(0)
    log_d = log_kernel(moved, sigma, kernel)
    counts = rise.detach() != 0
    top = torch.where(counts, log_d, log_d.amin(-1, keepdim=True)).amax(-1)
    log_constant = constant.abs().clamp_min(torch.finfo(constant.dtype).tiny).log()
    # where nothing is constant, detections alone are compared
    scale = torch.where(constant == 0, top, torch.maximum(top, log_constant)).detach()
    return rise * (log_d - scale[..., None]).clamp_max(0).exp(), (-scale).clamp_max(MOST).exp()


def _is_ahead(
    distances: Tensor, eps: Tensor, rise: Tensor, constant: Tensor, size: Tensor, sigma: Tensor, kernel: str
) -> Tensor:
    """Whether the gap of `_terms` is positive, and not by rounding only."""
    terms, one = _terms(distances, eps, rise, constant, sigma, kernel)
    return terms.sum(-1) + constant * one > ROUNDING * (terms.abs().sum(-1) + size * one)


def _log_product(log_d: Float[Tensor, "B K"], log_r: Float[Tensor, "K V"]) -> Float[Tensor, "B V"]:
    """ln sum_k exp(log_d + log_r) as one product of matrices, the largest factors taken out."""
    top, weight = log_d.detach().amax(1, keepdim=True), log_r.detach().amax(0)
    product = (log_d - top).exp() @ (log_r - weight).exp()
    smallest = torch.finfo(product.dtype).tiny
    plain = product.clamp_min(smallest).log() + top + weight
    lost = product < smallest**0.75  # the product lost digits, or all of itself
    if not bool(lost.any()):
        return plain
    return torch.where(lost, (log_d[:, :, None] + log_r).logsumexp(1), plain)


def _asinh_of_quotient(b: Tensor, log_scale: Tensor) -> Tensor:
    """asinh(b / exp(log_scale)), where the quotient may be greater than any float."""
    size = b.abs().clamp_min(torch.finfo(b.dtype).tiny).log() - log_scale
    value = torch.where(size > LARGE, size + math.log(2), torch.asinh(size.clamp_max(LARGE).exp()))
    return torch.where(b == 0, 0.0, b.sign() * value)
