"""Rounding to the nearest: each weight goes to the nearest of 2^b values between the extremes of its group.

    s = (max - min) / (2^b - 1),   z = round(-min / s),   q = clip(round(w / s) + z, 0, 2^b - 1)

with min <= 0 <= max, so that zero stays zero; or symmetric about zero. It needs no data, and is what every
other quantizer is measured against. `UniformQuantizer` holds the settings and the budgets that they share.

Source: the survey, arXiv 2402.09748, section 3.1; Dettmers and Zettlemoyer (2023) for groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

from torch import nn

from paperback.compress.budget import Budget
from paperback.compress.interface import Compressor, Family, Streamed
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import PackedLinear
from paperback.compress.survey.fitting import largest_that_fits
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, swap
from paperback.numerics.quantized import Per, Scheme

Clip = float | Literal["mse"]
BITS = (8, 7, 6, 5, 4, 3, 2)


class UniformQuantizer(Compressor):
    """Settings that quantizers on uniform grids share.

    Args:
        bits: of a weight, 2 to 8.
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        symmetric: a grid about zero without a zero point, of 2^b - 1 values.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: see `Compressor`.

    Raises:
        DataError: if bits or group is out of range.
    """

    family: ClassVar[Family] = "quantize"
    budgets: ClassVar[tuple[str, ...]] = ("bits", "bytes", "ratio")

    def __init__(
        self,
        bits: int = 4,
        group: int | None = 32,
        *,
        symmetric: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if type(bits) is not int or bits not in BITS:
            raise DataError(f"bits is {bits!r}; it must be a whole number from 2 to 8.")
        if group is not None and (type(group) is not int or group < 1):
            raise DataError(f"group is {group!r}; it must be a number of inputs, or None for whole rows.")
        self.bits, self.group, self.symmetric = bits, group, symmetric

    @property
    def scheme(self) -> Scheme:
        """The kind of grid, see `paperback.numerics.quantized`."""
        return "absmax" if self.symmetric else "affine"

    @property
    def per(self) -> Per:
        """What shares a grid."""
        return "channel" if self.group is None else "group"

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The most bits that meet the budget, with these groups."""
        if budget.unit == "bits":
            bits = int(budget.value)
            if bits not in BITS:
                raise BudgetError(f"{type(self).__name__} has 2 to 8 bits; the budget is {budget.value}.")
        elif budget.unit in ("bytes", "ratio"):
            bits = largest_that_fits(budget, model, BITS, self._shrinker(layers), type(self).__name__)
        else:
            raise budget.refuse(type(self).__name__, *self.budgets)
        settled = copy.copy(self)
        settled.bits = bits
        return settled

    def _shrinker(self, layers: Mapping[str, nn.Module]):  # type: ignore[no-untyped-def]
        def shrink(trial: nn.Module, bits: int) -> None:
            for name in layers:
                layer = trial.get_submodule(name)
                swap(trial, name, PackedLinear.from_dense(layer, bits, self.group, self.scheme))

        return shrink


class RTN(UniformQuantizer, Streamed):
    """Rounds the weights of a network to the nearest values of uniform grids; needs no data.

    Args:
        bits: of a weight, 2 to 8.
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        symmetric: a grid about zero without a zero point.
        clip: share of each group's range that its grid covers; "mse" searches 1.0 to 0.3 for the smallest
            squared error of the weights.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: not used.

    Raises:
        DataError: if a setting is out of range.
    """

    def __init__(
        self,
        bits: int = 4,
        group: int | None = 32,
        *,
        symmetric: bool = False,
        clip: Clip = 1.0,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(bits, group, symmetric=symmetric, targets=targets, ignore=ignore, seed=seed)
        self.clip = checked_clip(clip)

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module:
        """The packed layer in place of the dense one."""
        return PackedLinear.from_dense(layer, self.bits, self.group, self.scheme, clip=self.clip)


def checked_clip(clip: Clip) -> Clip:
    """A share of the range, or "mse".

    Raises:
        DataError: if it is neither.
    """
    if clip != "mse" and (isinstance(clip, str) or not 0 < clip <= 1):
        raise DataError(f"clip is {clip!r}; it must be above 0 and at most 1, or 'mse'.")
    return clip
