"""Wider radii for Euclidean distances: how far detections can move against each other.

No step brings a row nearer to one component and away from another by its whole length, unless the row lies
between them. For a step v of length at most eps, and any two components i and k,

    |x + v - w_i|^2 - |x + v - w_k|^2  <=  n_ik = delta_i^2 - delta_k^2 + 2 eps |w_i - w_k|,

and the difference of the new distances is at most n_ik over their sum. Over d_k, with k the component that
speaks most for the class, the gap of `certificate` becomes a sum of ratios d_i / d_k with these bounds. For
one prototype per class this is the distance to the plane between them, which cannot be improved.

This bound is ours, not the paper's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.explain.prototype_rbf.certificate import BISECTIONS, MOST, ROUNDING, log_kernel


def strongest(
    log_d: Float[Tensor, "B K"], weights: Float[Tensor, "K V"], own: Int[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The component k that speaks most for each row's vector."""
    return (log_d + weights.T[own].clamp_min(torch.finfo(weights.dtype).tiny).log()).argmax(1)


@torch.no_grad()
def relative_radii(
    distances: Float[Tensor, "B K"],
    chosen: Int[Tensor, " B"],
    apart: Float[Tensor, "B K"],
    weights: Float[Tensor, "K V"],
    offset: Float[Tensor, " V"],
    own: Int[Tensor, " B"],
    sigma: Float[Tensor, ""],
    kernel: str,
    least: Float[Tensor, "B V"],
) -> Float[Tensor, "B V"]:
    """Radii in L2 that are safe by bounded ratios of detections.

    Args:
        distances: Euclidean, to the components.
        chosen: the component k of each row, any; `strongest` is a good one.
        apart: its distances to the components.
        weights: r+ - r-.
        offset: scores without any detection.
        own: for each row the vector that is to stay ahead.
        sigma: one for all components.
        kernel: "exp" or "gaussian".
        least: radii that are known, negative where the rival is ahead.

    Returns:
        Safe radii, at least `least`; where that is not positive, itself.
    """
    rise = weights.T[own][:, None, :] - weights.T
    constant = offset[own][:, None] - offset
    size = offset[own].abs()[:, None] + offset.abs()
    delta_k = distances.gather(1, chosen[:, None])
    bounds = _Bounds(distances, delta_k, apart, rise.sign(), sigma, kernel)
    low = least.clamp_min(0)
    high = torch.maximum(low, distances.amax(1, keepdim=True))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        log_ratio, log_one = bounds(middle, constant)
        top = log_ratio.amax(-1)
        scale = torch.where(constant == 0, top, torch.maximum(top, log_one))
        terms = rise * (log_ratio - scale[..., None]).exp()
        one = (log_one - scale).clamp_max(MOST).exp()
        safe = terms.sum(-1) + constant * one > ROUNDING * (terms.abs().sum(-1) + size * one)
        low, high = torch.where(safe, middle, low), torch.where(safe, high, middle)
    return torch.where(least > 0, low, least)


class _Bounds:
    """What is least of d_i / d_k where it speaks for the vector, and greatest where it does not."""

    def __init__(
        self,
        distances: Float[Tensor, "B K"],
        delta_k: Float[Tensor, "B 1"],
        apart: Float[Tensor, "B K"],
        sign: Float[Tensor, "B V K"],
        sigma: Float[Tensor, ""],
        kernel: str,
    ) -> None:
        self.delta_k, self.sign, self.sigma, self.kernel = delta_k, sign, sigma, kernel
        self.apart = apart[:, None]
        self.sum = (distances + delta_k)[:, None]
        self.lead = sign * (distances.square() - delta_k.square())[:, None]

    def __call__(self, eps: Float[Tensor, "B V"], constant: Float[Tensor, "B V"]) -> tuple[Tensor, Tensor]:
        """After a step of eps: logarithms of the ratios, and of 1 / d_k by the sign of what it multiplies."""
        reach = 2 * eps[..., None]
        change = self.lead + reach * self.apart  # n_ik, or n_ki
        if self.kernel == "exp":
            nearest = torch.maximum(self.apart, self.sum - reach).clamp_min(torch.finfo(eps.dtype).eps)
            change = torch.where(change > 0, change / nearest, change / (self.sum + reach))
        delta_k = torch.where(constant > 0, (self.delta_k - eps).clamp_min(0), self.delta_k + eps)
        return -self.sign * change / self.sigma, -log_kernel(delta_k, self.sigma, self.kernel)
