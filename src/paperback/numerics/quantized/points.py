"""Codebooks: where the points of a non-uniform grid lie."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.numerics.quantized.grid import checked, width_or_one


def uniform_points(count: int) -> Float[Tensor, " count"]:
    """Points from 0 to 1 at equal distances."""
    return torch.linspace(0, 1, count)


def quantile_points(tensor: Float[Tensor, "..."], count: int) -> Float[Tensor, " count"]:
    """Points with equally many values around each: quantiles of (v - min) / (max - min), first 0, last 1."""
    values = checked(tensor, "the tensor").reshape(-1).sort().values
    low, high = values[0], values[-1]
    # torch.quantile takes at most 2^24 values; of sorted ones it is an index.
    index = torch.linspace(0, 1, count, dtype=torch.float64, device=values.device) * (len(values) - 1)
    return (values[index.round().long()] - low) / width_or_one(high - low)


def kmeans_points(tensor: Float[Tensor, "..."], count: int, rounds: int = 30) -> Float[Tensor, " count"]:
    """Points with the smallest squared error, by Lloyd's algorithm from the quantiles, for scaling "none"."""
    values = checked(tensor, "the tensor").reshape(-1).sort().values.double()
    index = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count * len(values)
    points = values[index.long()]
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(rounds):
        edges = torch.searchsorted(values, ((points[1:] + points[:-1]) / 2).contiguous(), right=True)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(values))])
        sizes = edges.diff()
        means = (sums[edges[1:]] - sums[edges[:-1]]) / sizes.clamp(min=1)
        moved = torch.where(sizes > 0, means, points)
        if torch.equal(moved, points):
            break
        points = moved
    return points.sort().values.float()


def normal_float_points(bits: int = 4) -> Float[Tensor, " points"]:
    """Points in -1 to 1 that are quantiles of the normal distribution, with 0 among them (NF4 for 4 bits).

    2^(b-1) of them are positive, one fewer negative (QLoRA, arXiv 2305.14314, section 3).
    """
    half = 2 ** (bits - 1)
    offset = 1 - (1 / 2**bits + 1 / (2**bits - 1)) / 4
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, half + 1)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, half)[:-1])
    points = torch.cat([negative, torch.zeros(1), positive]).sort().values
    return points / points.abs().max()
