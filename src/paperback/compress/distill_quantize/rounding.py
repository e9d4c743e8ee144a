"""Weights that are rounded in the forward pass: on uniform grids, or to points that are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paperback.numerics.quantized import Layout, QuantizedTensor, quantize_codebook, quantize_uniform
from paperback.numerics.quantized.grid import width_or_one

Gradient = Literal["ste", "truncated", "exact"]
Rounding = Literal["nearest", "stochastic"]


def bucket_layout(shape: tuple[int, ...], bucket: int | None) -> Layout:
    """Runs of `bucket` consecutive weights share a scale; all of them if it is None."""
    return Layout(shape, "tensor") if bucket is None else Layout(shape, "bucket", bucket)


class RoundedWeight(nn.Module):
    """A weight on the uniform grid of its buckets; a parametrization.

    Args:
        bits: of a weight, 1 to 16.
        bucket: weights that share a scale; None for all.
        gradient: "ste" hands the gradient through; "truncated" as well, but not where |w| > 1; "exact" adds
            the derivative by a bucket's minimum and maximum.
        rounding: while it trains; "nearest" always in evaluation.
        generator: of stochastic rounding.
        transposed: whether the weight is stored as (in, out).
    """

    def __init__(
        self,
        bits: int,
        bucket: int | None = 256,
        gradient: Gradient = "ste",
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.bucket, self.gradient, self.rounding = bits, bucket, gradient, rounding
        self.generator, self.transposed = generator, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Q(w), in the weight's shape and precision."""
        matrix = weight.T if self.transposed else weight
        if self.gradient == "truncated":
            matrix = matrix.clamp(-1, 1)
        rounded = self._through_ends(matrix) if self.gradient == "exact" else self._straight(matrix)
        return rounded.T if self.transposed else rounded

    def quantized(self, matrix: Float[Tensor, "out in"]) -> QuantizedTensor:
        """The weight as it is stored, rounded to the nearest."""
        matrix = matrix.clamp(-1, 1) if self.gradient == "truncated" else matrix
        layout = bucket_layout(tuple(matrix.shape), self.bucket)
        return quantize_uniform(matrix, self.bits, layout.per, layout.size)

    def _straight(self, weight: Tensor) -> Tensor:
        layout = bucket_layout(tuple(weight.shape), self.bucket)
        rounding = self.rounding if self.training else "nearest"
        quantized = quantize_uniform(
            weight, self.bits, layout.per, layout.size, rounding=rounding, generator=self.generator
        )
        return quantized.dequantize() + (weight - weight.detach())  # Q(w) to the bit, the gradient of w

    def _through_ends(self, weight: Tensor) -> Tensor:
        """α q̂ + β with α and β as functions of w; only the rounding is taken for the identity."""
        layout = bucket_layout(tuple(weight.shape), self.bucket)
        groups = layout.split(weight)
        low = groups.amin(1, keepdim=True)
        scale = width_or_one(groups.amax(1, keepdim=True) - low)
        position = (groups - low) / scale * (2**self.bits - 1)
        if self.training and self.rounding == "stochastic":
            noise = torch.rand(position.shape, generator=self.generator).to(position)
            whole = (position.detach() + noise).floor().clamp(0, 2**self.bits - 1)
        else:
            whole = position.detach().round()
        position = position + (whole - position).detach()
        return layout.merge(scale * position / (2**self.bits - 1) + low)


class CodebookWeight(nn.Module):
    """A weight rounded to points that are learned; a parametrization.

    The gradient of a point is the sum over the weights at it of their gradients times their bucket's scale.
    Where the weight itself asks for gradients, it gets its own straight through.

    Args:
        points: sorted, in [0, 1].
        bucket: weights that share a scale; None for all.
        transposed: whether the weight is stored as (in, out).
    """

    def __init__(
        self, points: Float[Tensor, " points"], bucket: int | None = 256, transposed: bool = False
    ) -> None:
        super().__init__()
        self.points = nn.Parameter(points.clone())
        self.bucket, self.transposed = bucket, transposed

    def forward(self, weight: Tensor) -> Tensor:
        """Q(w), in the weight's shape and precision."""
        matrix = weight.T if self.transposed else weight
        layout = bucket_layout(tuple(matrix.shape), self.bucket)
        groups = layout.split(matrix.detach())
        low = groups.amin(1, keepdim=True)
        scale = width_or_one(groups.amax(1, keepdim=True) - low)
        middles = ((self.points[1:] + self.points[:-1]) / 2).detach()
        codes = torch.searchsorted(middles, ((groups - low) / scale).to(middles).contiguous())
        rounded = layout.merge(scale * self.points[codes].to(matrix.dtype) + low)
        rounded = rounded + (matrix - matrix.detach())  # 0, with the weight's straight-through gradient
        return rounded.T if self.transposed else rounded

    @torch.no_grad()
    def sort(self) -> None:
        """Points in order again, after a step."""
        self.points.copy_(self.points.sort().values)

    def quantized(self, matrix: Float[Tensor, "out in"]) -> QuantizedTensor:
        """The weight as it is stored."""
        layout = bucket_layout(tuple(matrix.shape), self.bucket)
        return quantize_codebook(matrix, self.points.detach(), layout.per, layout.size)


@contextmanager
def rounding_layers(layers: Mapping[str, nn.Module], roundings: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside this context each layer computes with its rounded weight; afterwards with its own."""
    done: list[nn.Module] = []
    try:
        for name, rounding in roundings.items():
            parametrize.register_parametrization(layers[name], "weight", rounding, unsafe=True)
            done.append(layers[name])
        yield
    finally:
        for layer in done:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
