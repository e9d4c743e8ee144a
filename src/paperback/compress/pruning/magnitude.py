"""Magnitude pruning: the weights with the smallest absolute value become zero.

A layer, each of its rows, or all layers together keep their largest weights. No data are needed. It is the
baseline of every other pruner (Han et al. 2015, "Learning both weights and connections").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from jaxtyping import Bool, Float
from torch import Tensor

from paperback.compress.interface import Job
from paperback.compress.masks import Allocation, allocate, nm_mask, row_mask, topk_mask
from paperback.compress.pruning.interface import MaskPruner
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, weight_matrix


class Magnitude(MaskPruner):
    """Keep the weights with the largest absolute value.

    Args:
        sparsity: share of the weights that become zero, in [0, 1).
        nm: (n, m) to keep n of every m neighbouring weights instead.
        allocation: "uniform" (each layer its share), "global" (the largest of all layers), "erk", or "row"
            (each row of each layer its share); see `paperback.compress.masks.allocate`.
        pack: keep the pruned layers as `SparseLinear`.
        targets: as of `Compressor`.
        ignore: as of `Compressor`.
        seed: as of `Compressor`; nothing here is random.

    Raises:
        DataError: if a setting is out of range.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        nm: tuple[int, int] | None = None,
        allocation: Allocation = "uniform",
        pack: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(sparsity, nm=nm, pack=pack, targets=targets, ignore=ignore, seed=seed)
        if allocation not in get_args(Allocation):
            raise DataError(
                f"there is no allocation {allocation!r}; choose one of {', '.join(get_args(Allocation))}."
            )
        self.allocation = allocation
        self._counts: dict[str, int] = {}

    def _compress(self, job: Job) -> None:
        if self.nm is None and self.allocation != "row":
            matrices = {name: weight_matrix(layer) for name, layer in job.layers.items()}
            self._counts = allocate(matrices, self.density, self.allocation)
        super()._compress(job)

    def choose(
        self, name: str, weight: Float[Tensor, "out in"], stats: LayerStatistics
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The largest of each block, row, or of the layer; see `MaskPruner.choose`."""
        scores = weight.abs()
        if self.nm is not None:
            return weight, nm_mask(scores, *self.nm, name=name)
        if self.allocation == "row":
            return weight, row_mask(scores, self.kept(weight.shape[1], name), name=name)
        return weight, topk_mask(scores, self._counts[name], name=name)
