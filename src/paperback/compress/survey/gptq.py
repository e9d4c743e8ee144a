"""GPTQ: round one column of the weight after the other, and let the columns that are left make up for the
error.

With H = X Xᵀ over the calibration inputs and U the upper Cholesky factor of H⁻¹, the error of column i,
e = (w_i - q_i) / U_ii, is taken out of the columns after it, W_j -= e U_ij for j > i. For a fixed order
this is the exact minimiser of the layer's squared output error over the weights that are not rounded yet.
Columns that no input reaches (H_ii = 0) are set to zero. Updates beyond the current 128 columns are made
once per 128.

Source: Frantar, Ashkboos, Hoefler and Alistarh (2023), GPTQ, ICLR, algorithm 1; `act_order` rounds the
    columns of
the largest H_ii first, with the grids of the original weight, so that what is stored has the usual order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.interface import Streamed
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import PackedLinear
from paperback.compress.survey.rtn import Clip, UniformQuantizer, checked_clip
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, weight_matrix
from paperback.numerics.quantized import Grid, Layout, QuantizedTensor, Scheme, uniform_grid

BLOCK = 128  # columns between two updates of all that is left
STRONGEST_DAMPING = 1.0  # times the mean diagonal; beyond it the rounding falls back to the nearest


class GPTQ(UniformQuantizer, Streamed):
    """Rounds weights so that the outputs of each layer stay as they were on calibration data.

    Args:
        bits: of a weight, 2 to 8.
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        symmetric: a grid about zero without a zero point.
        clip: share of each group's range that its grid covers; "mse" searches for the best.
        act_order: round the columns with the largest inputs first.
        damp: added to the diagonal of H, times its mean.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: not used.

    Raises:
        DataError: if a setting is out of range.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    statistics = frozenset({"gram"})

    def __init__(
        self,
        bits: int = 4,
        group: int | None = 32,
        *,
        symmetric: bool = False,
        clip: Clip = 1.0,
        act_order: bool = False,
        damp: float = 0.01,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(bits, group, symmetric=symmetric, targets=targets, ignore=ignore, seed=seed)
        if not 0 < damp <= STRONGEST_DAMPING:
            raise DataError(f"damp is {damp}; it must be above 0 and at most {STRONGEST_DAMPING}.")
        self.clip, self.act_order, self.damp = checked_clip(clip), act_order, damp

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module:
        """The packed layer in place of the dense one."""
        weight = weight_matrix(layer)
        result = gptq(
            weight, stats.gram, self.bits, self.group, self.scheme,
            clip=self.clip, act_order=self.act_order, damp=self.damp,
        )  # fmt: skip
        if result.damping is None:
            self.job.note(f"{name} was rounded to the nearest: its inputs are too alike to be factorised.")
        elif result.damping > self.damp:
            self.job.note(f"{name} needed {result.damping:g} of the mean diagonal as damping.")
        return PackedLinear.from_quantized(layer, result.quantized)


class Rounded(NamedTuple):
    """What `gptq` gives.

    Attributes:
        quantized: codes and grids, ``(out, in)``.
        damping: what it took to factorise, times the mean diagonal; None where it could not be, and the
            weight was rounded to the nearest.
    """

    quantized: QuantizedTensor
    damping: float | None


@torch.no_grad()
def gptq(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    bits: int = 4,
    group: int | None = None,
    scheme: Scheme = "affine",
    *,
    clip: Clip = 1.0,
    act_order: bool = False,
    damp: float = 0.01,
    block: int = BLOCK,
) -> Rounded:
    """Round a weight so that W X changes least, ||(W - Q) X||² column by column.

    Args:
        weight: the dense weight.
        gram: X Xᵀ of its inputs; its scale does not matter.
        bits: 2 to 8.
        group: inputs that share a grid; None for whole rows.
        scheme: of the grids, see `paperback.numerics.quantized`.
        clip: as of `GPTQ`.
        act_order: as of `GPTQ`.
        damp: as of `GPTQ`.
        block: columns between two updates of all that is left; it changes nothing but the speed.

    Returns:
        The rounded weight and the damping.

    Raises:
        DataError: if an argument is out of range or a weight is not finite.
    """
    layout = Layout(tuple(weight.shape), "channel" if group is None else "group", group)
    remaining, gram = weight.float().clone(), gram.float().clone()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1.0
    remaining[:, dead] = 0.0
    width, columns = layout.width, weight.shape[1]
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    factor, damping = _inverse_factor(gram[order][:, order], damp)
    grid = uniform_grid(layout.split(remaining), bits, scheme, clip=clip, scale_dtype=torch.float16)
    if factor is None:
        codes = layout.merge(grid.encode(layout.split(remaining)))
        return Rounded(QuantizedTensor(codes, grid, layout, weight.dtype), None)

    # A row's grids stand side by side, so that a column's can be taken: (out, groups of a row).
    scale = grid.scale.view(len(weight), -1).clone()  # type: ignore[union-attr]
    zero = None if grid.zero is None else grid.zero.view(len(weight), -1).clone()
    codes = torch.zeros_like(remaining, dtype=torch.uint8)
    remaining = remaining[:, order]
    for start in range(0, columns, block := _whole_groups(block, width)):
        end = min(start + block, columns)
        errors = remaining.new_zeros(len(weight), end - start)
        for i in range(start, end):
            column = int(order[i])
            place = column // width
            if i % width == 0 and not act_order:  # the grid of a group suits what its weights have become
                fresh = uniform_grid(
                    remaining[:, i : i + width], bits, scheme, clip=clip, scale_dtype=torch.float16
                )
                scale[:, place] = fresh.scale  # type: ignore[assignment]
                if zero is not None:
                    zero[:, place] = fresh.zero  # type: ignore[assignment]
            lines = Grid(bits, scheme, scale[:, place], None if zero is None else zero[:, place])
            code = lines.encode(remaining[:, i : i + 1])
            codes[:, column] = code[:, 0]
            error = (remaining[:, i] - lines.decode(code)[:, 0]) / factor[i, i]
            remaining[:, i + 1 : end] -= torch.outer(error, factor[i, i + 1 : end])
            errors[:, i - start] = error
        remaining[:, end:] -= errors @ factor[start:end, end:]
    zeros = None if zero is None else zero.reshape(-1)
    final = Grid(bits, scheme, scale.reshape(-1), zeros)
    return Rounded(QuantizedTensor(codes, final, layout, weight.dtype), damping)


def _inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor | None, float | None]:
    """U, upper triangular with Uᵀ U = (H + damping)⁻¹, and the damping; ten times as much while it fails."""
    wide = gram.double()
    mean = wide.diagonal().mean()
    while damp <= STRONGEST_DAMPING:
        damped = wide.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()):
                return upper.float(), damp
        damp *= 10
    return None, None


def _whole_groups(block: int, width: int) -> int:
    """At least `block` columns that no group crosses the end of; groups wider than that stand alone."""
    return math.ceil(block / width) * width
