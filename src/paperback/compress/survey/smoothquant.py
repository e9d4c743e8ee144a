"""SmoothQuant: weights and activations in 8 bits, after part of the activations' spread has moved to the
weights.

For each pair of a norm and the layers behind it, s_j = max|x_j|^a / max|w_j|^(1-a) is divided out of the
norm and multiplied into the columns. Then weights are rounded to 8 bits per row, and each token's
activation to 8 bits when it comes, x ≈ d q with d = max|x| / 127; the product is one of integers, scaled
afterwards. Without smoothing, and with grids per group of inputs, this is ZeroQuant's form.

Source: Xiao et al. (2023), SmoothQuant, ICML, equation 4; Yao et al. (2022), ZeroQuant, NeurIPS, section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import run
from paperback.compress.interface import Family, Job, Streamed
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage import PackedLinear, storage_module
from paperback.compress.survey.fitting import largest_that_fits
from paperback.compress.survey.smoothing import Pair, fold, small_batch, smoothing_pairs
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, Found, find_layers, swap, weight_matrix
from paperback.numerics.quantized import unpack_bits

LEVELS = 127  # of a symmetric grid of 8 bits, on each side of zero


@storage_module
class Int8Linear(PackedLinear):
    """A linear layer with 8-bit weights that rounds each token of its input to 8 bits, too.

    Within a group of inputs the product is one of integers, computed exactly in floating point: in float32 up
    to 1,040 inputs, in float64 for wider groups. It shows the quality of 8-bit arithmetic, not its speed.
    """

    kind = "int8-dynamic"

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer would give, from 8-bit weights and 8-bit activations."""
        tokens = x.reshape(-1, self.in_features)
        codes, step = quantize_tokens(tokens.float())
        out = self.out_features
        weight = unpack_bits(self.codes, 8, out * self.in_features).view(out, -1).to(torch.int16) - LEVELS
        scale = self.scale.float().view(out, -1)  # type: ignore[union-attr]
        width = self._tensor_spec["size"] or self.in_features
        total = tokens.new_zeros(len(tokens), out, dtype=torch.float32)
        for group, start in enumerate(range(0, self.in_features, width)):
            ours, theirs = codes[:, start : start + width], weight[:, start : start + width]
            total += _integer_product(ours, theirs) * scale[:, group]
        result = (total * step).to(x.dtype).view(*x.shape[:-1], out)
        return result if self.bias is None else result + self.bias


def quantize_tokens(
    x: Float[Tensor, "tokens in"],
) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    """Each row as whole numbers from -127 to 127 and the step that they count.

    Args:
        x: any rows; a row of zeros has the step 1.

    Returns:
        The numbers, in float32, and the steps.
    """
    largest = x.abs().amax(1, keepdim=True)
    step = torch.where(largest > 0, largest / LEVELS, 1.0)
    return (x / step).round(), step


def _integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """codes @ weightᵀ without rounding, as float32."""
    if codes.shape[1] * LEVELS**2 < 2**24:
        return codes @ weight.to(codes.dtype).T
    return (codes.double() @ weight.double().T).float()


class SmoothQuant(Streamed):
    """Weights and activations in 8 bits, with or without moving scales from the activations to the weights.

    Args:
        alpha: share of the spread that goes to the weights, in [0, 1]; None for no smoothing (ZeroQuant).
        group: neighbouring inputs of a row that share a grid; None for the whole row.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: not used.

    Raises:
        DataError: if a setting is out of range.
    """

    family: ClassVar[Family] = "quantize"
    budgets: ClassVar[tuple[str, ...]] = ("bits", "bytes", "ratio")
    needs: ClassVar[frozenset[str]] = frozenset({"calibration"})
    statistics = frozenset({"abs_max"})

    def __init__(
        self,
        alpha: float | None = 0.5,
        group: int | None = None,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if alpha is not None and not 0 <= alpha <= 1:
            raise DataError(f"alpha is {alpha}; it must lie in [0, 1], or be None for no smoothing.")
        if group is not None and (type(group) is not int or group < 1):
            raise DataError(f"group is {group!r}; it must be a number of inputs, or None for whole rows.")
        self.alpha, self.group = alpha, group

    def _find(self, model: nn.Module) -> Found:
        return find_layers(model, self.targets, self.ignore, kinds=(nn.Linear,))

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """Its only size, if that meets the budget."""
        if budget.unit == "bits":
            if budget.value < 8:
                raise BudgetError(f"SmoothQuant has 8 bits; the budget is {budget.value}.")
        elif budget.unit in ("bytes", "ratio"):
            largest_that_fits(budget, model, (8,), lambda trial, _: self._pack(trial, layers), "SmoothQuant")
        else:
            raise budget.refuse("SmoothQuant", *self.budgets)
        return copy.copy(self)

    def _pack(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        for name in layers:
            swap(model, name, self._packed(model.get_submodule(name)))

    def _packed(self, layer: nn.Module) -> nn.Module:
        return Int8Linear.from_dense(layer, 8, self.group, "absmax")

    def _compress(self, job: Job) -> None:
        assert job.data is not None
        self._pairs: list[Pair] = []
        if self.alpha is not None:
            batch = small_batch(next(job.data.batches("train")))
            self._pairs = smoothing_pairs(job.model, lambda: run(job.model, batch), job.layers)
            if not self._pairs:
                job.note("No norm feeds these layers alone, so nothing was smoothed.")
        super()._compress(job)
        del self._pairs

    def visit_block(self, name: str, block: nn.Module, stats: Mapping[str, LayerStatistics]) -> None:
        """Fold the scales of a block's pairs."""
        for pair in self._pairs:
            known = [stats[layer] for layer in pair.layers if layer in stats]
            if known:
                assert self.alpha is not None
                weights = [weight_matrix(self.job.model.get_submodule(layer)) for layer in pair.layers]
                largest = torch.cat(weights).float().abs().amax(0).clamp(min=1e-5)
                spread = known[0].abs_max.clamp(min=1e-5)
                fold(self.job.model, pair, spread**self.alpha / largest ** (1 - self.alpha))

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module:
        """The packed layer in place of the dense one."""
        return self._packed(layer)
