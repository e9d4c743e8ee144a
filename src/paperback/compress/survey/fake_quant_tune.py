"""Quantization-aware tuning: the weights are trained while they are rounded, with step sizes that are
learned.

In the forward pass a weight is ŵ = s (clip(round(w / s + z), 0, 2^b - 1) - z); the backward pass takes the
rounding for the identity (straight-through). The gradient of the step s is then that of LSQ, round(w/s) - w/s
inside the grid and the end of the grid outside, scaled by 1 / sqrt(weights of the group · 2^(b-1)). The
loss is the distance from the dense model's answers (distillation), so that no labels are needed. Zero
points stay.

Source: Esser et al. (2020), LSQ, ICLR, equations 1 to 3; Liu et al. (2024), LLM-QAT, for the distillation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from paperback.compress.interface import Job
from paperback.compress.storage import LayerForm, PackedLinear
from paperback.compress.survey.healing import Healing, heal
from paperback.compress.survey.rtn import UniformQuantizer
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, swap, weight_matrix
from paperback.numerics.quantized import Grid, Layout, QuantizedTensor, uniform_grid


class FakeQuantTune(UniformQuantizer):
    """Trains a network with rounded weights to answer as the dense one does; any network.

    Args:
        bits: of a weight, 2 to 8.
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        symmetric: a grid about zero without a zero point.
        healing: steps, batch size, learning rate; the teacher is the dense model, or the one that is given.
        targets: see `Compressor`.
        ignore: see `Compressor`; embeddings and heads are not trained either.
        seed: of the order of the rows.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"training"})
    tuning_free: ClassVar[bool] = False

    def __init__(
        self,
        bits: int = 4,
        group: int | None = 32,
        *,
        symmetric: bool = False,
        healing: Healing | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(bits, group, symmetric=symmetric, targets=targets, ignore=ignore, seed=seed)
        self.healing = healing or Healing()

    def _compress(self, job: Job) -> None:
        teacher = job.teacher if job.teacher is not None else copy.deepcopy(job.model)
        flags = [(p, p.requires_grad) for p in job.model.parameters()]
        skipped = {id(job.model.get_submodule(n).weight) for n in job.skipped}  # embeddings and heads
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) not in skipped)
        fakes = {}
        for name, layer in job.layers.items():
            fakes[name] = FakeQuantized(layer, self.bits, self.group, self.scheme)
            swap(job.model, name, fakes[name])
        job.extras["losses"] = heal(job, self.healing, teacher=teacher, description="tuning")
        for name, fake in fakes.items():
            swap(job.model, name, PackedLinear.from_quantized(job.layers[name], fake.quantized()))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class FakeQuantized(nn.Module):
    """A layer that computes with its weight rounded, and can be trained.

    Args:
        layer: the dense layer; the weight begins as its own, the grids as those with the least squared error.
        bits: 2 to 8.
        group: inputs that share a grid; None for whole rows.
        scheme: "affine" or "absmax".
    """

    def __init__(self, layer: nn.Module, bits: int, group: int | None, scheme: str) -> None:
        super().__init__()
        matrix = weight_matrix(layer)
        self.form = LayerForm.of(layer)
        self.bias = getattr(layer, "bias", None)
        self.layout = Layout(tuple(matrix.shape), "channel" if group is None else "group", group)
        groups = self.layout.split(matrix.float())
        self.grid = uniform_grid(groups, bits, scheme, clip="mse")  # type: ignore[arg-type]
        self.latent = nn.Parameter(matrix.clone())
        assert self.grid.scale is not None
        self.step = nn.Parameter(self.grid.scale.to(matrix.dtype))
        zero = self.grid.zero if self.grid.zero is not None else torch.tensor(2 ** (bits - 1) - 1)
        self.register_buffer("zero", zero.to(matrix.dtype).reshape(-1, 1))

    def weight_rounded(self) -> Tensor:
        """The weight on its grids, with the gradients of the docstring."""
        share = 1 / math.sqrt(self.layout.width * 2 ** (self.grid.bits - 1))
        step = (self.step * share + (self.step * (1 - share)).detach()).abs().clamp(min=1e-8)[:, None]
        zero = self.zero
        assert isinstance(zero, Tensor)
        position = (self.layout.split(self.latent) / step + zero).clamp(0, self.grid.levels - 1)
        position = position + (position.round() - position).detach()
        return self.layout.merge((position - zero) * step)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, with the rounded weight."""
        return self.form.apply(x, self.weight_rounded(), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored."""
        scale = self.step.detach().abs().clamp(min=1e-7).to(torch.float16)
        grid = Grid(self.grid.bits, self.grid.scheme, scale, self.grid.zero)
        codes = self.layout.merge(grid.encode(self.layout.split(self.latent.detach())))
        return QuantizedTensor(codes, grid, self.layout, self.latent.dtype)
