"""CompactifAI: the matrices of a language model as matrix product operators, healed by a short training.

Each weight W ``(O, I)`` is rearranged over O = o_1 .. o_n and I = i_1 .. i_n and decomposed by n - 1
truncated SVDs into a chain of cores,

    W = A_1 A_2 ... A_n,   A_k (chi_{k-1}, o_k, i_k, chi_k),   sum_k chi_{k-1} o_k i_k chi_k parameters.

The bond dimension chi is the only knob: one for all layers, by a budget, or by a profile of the layers'
sensitivities. The cores are then trained for a few steps ("healing"), and may be packed in 8 or 4 bits.

Source: Tomut et al. (2024), arXiv 2401.14109; the cores by Oseledets (2011). The paper heals with the
language model's own loss; ``heal_loss="distill"``, ``metric="activation"`` and the greedy allocation are not
in it.
The paper never sets the chain beside a truncated SVD of as many parameters: on the weights that ship, the
SVD's error is the lower one for every matrix, see the study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.factors import FactorCompressor, MPOLinear, balanced_factors, bond_limits
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS


class CompactifAI(FactorCompressor):
    """Replaces weights by matrix product operators and heals them.

    Args:
        cores: n, 2 or more.
        chi: bond dimension of every layer, or by name; layers that are not named then stay dense.
        ratio: share of each layer's parameters that stays; 0.4 if none of it, chi and eps is given.
        eps: relative error of each layer, in (0, 1), in place of chi and ratio.
        metric: "frobenius", as published, looks at the weights alone; "activation" refines the cores by
            alternating least squares on what the layers give out on the calibration data, and needs some.
        allocate: "uniform", one ratio for all; "sensitivity", measured on the training data.
        heal_steps: steps in which the cores are trained; 0 for none, and then no data are needed.
        heal_loss: "lm", the loss of the job; "distill", the original's logits.
        heal_lr: peak learning rate.
        heal_batch_size: rows of a step.
        quantize: "int8" or "int4" packs the cores.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: of the order of the training rows.

    Raises:
        DataError: if a setting is out of range, or more than one of chi, ratio and eps is given.
    """

    def __init__(
        self,
        cores: int = 2,
        chi: int | Mapping[str, int] | None = None,
        ratio: float | None = None,
        eps: float | None = None,
        *,
        metric: Literal["frobenius", "activation"] = "frobenius",
        allocate: Literal["uniform", "sensitivity"] = "uniform",
        heal_steps: int = 150,
        heal_loss: Literal["lm", "distill"] = "lm",
        heal_lr: float = 1e-3,
        heal_batch_size: int = 8,
        quantize: Literal["int8", "int4"] | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        if cores < 2:
            raise DataError(f"cores is {cores}; a chain that saves anything has at least 2.")
        if eps is not None and (not 0 < eps < 1 or chi is not None or ratio is not None):
            raise DataError(f"eps is {eps}; it must lie in (0, 1), without chi and ratio.")
        if eps is not None and allocate == "sensitivity":
            raise DataError("eps fixes the sizes; leave out allocate='sensitivity'.")
        none = chi is None and ratio is None and eps is None
        super().__init__(
            size=chi, size_name="chi", ratio=0.4 if none else ratio, metric=metric, allocation=allocate,
            heal_steps=heal_steps, heal_loss=heal_loss, heal_lr=heal_lr, heal_batch_size=heal_batch_size,
            quantize=quantize, targets=targets, ignore=ignore, seed=seed,
        )  # fmt: skip
        self.cores, self.chi, self.eps = cores, chi, eps

    def sizes_of_factors(self, shape: tuple[int, int], size: int) -> list[int]:
        """chi_{k-1} o_k i_k chi_k of each core."""
        return MPOLinear.sizes(shape, size, self.cores)

    def largest_size(self, shape: tuple[int, int]) -> int:
        """The largest of the bonds of an exact chain."""
        out_shape, in_shape = (balanced_factors(side, self.cores) for side in shape)
        return max(bond_limits(out_shape, in_shape))

    def factorize(
        self, name: str, layer: nn.Module, size: int | None, gram: Tensor | None = None
    ) -> MPOLinear:
        """The cores of one layer; without a size, those that eps asks for."""
        eps = self.eps if size is None else None
        return MPOLinear.from_dense(layer, size, self.cores, eps=eps, gram=gram, name=name)

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """A budget takes the place of eps too."""
        settled = super()._settle(budget, layers, model)
        settled.eps = None
        return settled
