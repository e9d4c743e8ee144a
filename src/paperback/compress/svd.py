"""Low rank: each weight becomes a product of two thin matrices, by a truncated SVD.

    min ||W - B^T A||^2,   or, in the metric of the layer's inputs,   min E ||W x - B^T A x||^2

with A ``(rank, in)`` and B ``(rank, out)``. The second is the first for W L with H = E x x^T = L L^T, and
L^-1 multiplied back onto A. The baseline of `paperback.compress.compactifai`, with the same budgets, healing
and packing.

Source: Eckart and Young (1936); Jaderberg et al. (2014), arXiv 1405.3866; in the inputs' metric Chen et al.
(2021), DRONE, NeurIPS, and Wang et al. (2024), SVD-LLM, arXiv 2403.07378.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn

from paperback.compress.factors import FactorCompressor, LowRankLinear
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS


class SVD(FactorCompressor):
    """Truncated singular value decomposition of every layer.

    Args:
        rank: of every layer, or by name; layers that are not named then stay dense.
        ratio: share of each layer's parameters that stays; 0.4 if neither it nor rank is given.
        metric: "frobenius" looks at the weights alone; "activation" at what the layers give out on the
            calibration data, and needs some.
        allocate: "uniform", one ratio for all; "sensitivity", measured on the training data.
        heal_steps: steps in which the factors are trained; 0 for none.
        heal_loss: "lm", the loss of the job; "distill", the original's logits.
        heal_lr: peak learning rate.
        heal_batch_size: rows of a step.
        quantize: "int8" or "int4" packs the factors.
        targets: see `Compressor`.
        ignore: see `Compressor`.
        seed: of the order of the training rows.

    Raises:
        DataError: if a setting is out of range, or rank is given beside ratio.
    """

    def __init__(
        self,
        rank: int | Mapping[str, int] | None = None,
        ratio: float | None = None,
        *,
        metric: Literal["frobenius", "activation"] = "frobenius",
        allocate: Literal["uniform", "sensitivity"] = "uniform",
        heal_steps: int = 0,
        heal_loss: Literal["lm", "distill"] = "lm",
        heal_lr: float = 1e-3,
        heal_batch_size: int = 8,
        quantize: Literal["int8", "int4"] | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(
            size=rank, size_name="rank", ratio=0.4 if rank is None and ratio is None else ratio,
            metric=metric, allocation=allocate, heal_steps=heal_steps, heal_loss=heal_loss, heal_lr=heal_lr,
            heal_batch_size=heal_batch_size, quantize=quantize, targets=targets, ignore=ignore, seed=seed,
        )  # fmt: skip
        self.rank = rank

    def sizes_of_factors(self, shape: tuple[int, int], size: int) -> list[int]:
        """Rank times columns, and rank times rows."""
        return LowRankLinear.sizes(shape, size)

    def largest_size(self, shape: tuple[int, int]) -> int:
        """The smaller side."""
        return min(shape)

    def factorize(
        self, name: str, layer: nn.Module, size: int | None, gram: Tensor | None = None
    ) -> LowRankLinear:
        """The two factors of one layer."""
        assert size is not None  # a rank or a ratio is always set
        return LowRankLinear.from_dense(layer, size, gram, name=name)
