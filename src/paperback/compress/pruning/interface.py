"""What pruners of single weights have in common: sparsity, N:M, budgets, masks, packed layers.

A pruner writes `choose`: from a weight matrix and the statistics of its input, the mask, and the weight that
goes with it. The result is a model of the old shapes with zeros in it, which any reader of the old model
reads. With ``pack=True`` the pruned layers keep only their non-zero values and a bitmap (or N:M patterns).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.interface import Family, Job, Streamed
from paperback.compress.masks import row_kept
from paperback.compress.masks.choose import check_nm_fits, check_pattern
from paperback.compress.statistics import LayerStatistics
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS, set_weight_matrix, weight_matrix

# What a file holds beside numbers: names, shapes and settings of each tensor, the configuration.
_BYTES_OF_HEADS, _BYTES_OF_A_TENSOR = 8192, 400


class MaskPruner(Streamed):
    """A pruner that gives each layer a mask.

    Args:
        sparsity: share of each layer's weights that become zero, in [0, 1); a half if neither it nor nm is
            given. The number of weights that stay is rounded down.
        nm: (n, m) to keep n of every m neighbouring weights instead.
        pack: keep the pruned layers as `SparseLinear`, really smaller, in memory and on disk.
        targets: as of `Compressor`.
        ignore: as of `Compressor`.
        seed: as of `Compressor`; nothing here is random.

    Raises:
        DataError: if both sparsity and nm are given, or one is out of range.
    """

    family: ClassVar[Family] = "prune"
    budgets = ("density", "nm", "bytes", "ratio")
    order = "together"  # as published: a block's layers are all measured before any is pruned

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        nm: tuple[int, int] | None = None,
        pack: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(targets=targets, ignore=ignore, seed=seed)
        if sparsity is not None and nm is not None:
            raise DataError(f"sparsity is {sparsity} and nm is {nm}; give one of them.")
        if nm is not None:
            if len(nm) != 2:
                raise DataError(f"nm is {nm}; it is a pair (n, m), n of m weights are kept.")
            check_pattern(*nm)
        elif sparsity is None:
            sparsity = 0.5
        if sparsity is not None and not 0 <= sparsity < 1:
            raise DataError(f"sparsity is {sparsity}; it is the share of weights set to zero, in [0, 1).")
        self.sparsity = sparsity
        self.nm: tuple[int, int] | None = None if nm is None else (nm[0], nm[1])
        self.pack = pack

    @abstractmethod
    def choose(
        self, name: str, weight: Float[Tensor, "out in"], stats: LayerStatistics
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The mask of one layer, and the weight that goes with it.

        Args:
            name: of the layer, for messages.
            weight: in float32; it may be changed.
            stats: of its input; what `statistics` asks for.

        Returns:
            The weight whose kept entries are used, and the mask.
        """

    @property
    def density(self) -> float:
        """Share of the weights that stay, in (0, 1]."""
        return 1 - self.sparsity if self.sparsity is not None else self.nm[0] / self.nm[1]  # type: ignore[index]

    def kept(self, columns: int, name: str) -> int:
        """How many weights of a row stay."""
        if self.nm is not None:
            check_nm_fits(columns, *self.nm, name=name)
            return columns // self.nm[1] * self.nm[0]
        return row_kept(columns, self.density, name=name)

    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module | None:
        """Choose the mask of one layer and write its weight."""
        weight, mask = self.choose(name, weight_matrix(layer).float().clone(), stats)
        set_weight_matrix(layer, weight.masked_fill(~mask, 0.0))
        self.job.extras.setdefault("masks", {})[name] = mask
        if not self.pack:
            return None
        from paperback.compress.storage.sparse import SparseLinear

        return SparseLinear.from_dense(layer, nm=self.nm)

    def _compress(self, job: Job) -> None:
        for name, layer in job.layers.items():
            self.kept(weight_matrix(layer).shape[1], name)  # refused before the first block is touched
        super()._compress(job)
        masks = job.extras.setdefault("masks", {})
        for name in job.layers.keys() - masks.keys() - job.skipped.keys():  # restored from an earlier call
            layer = job.model.get_submodule(name)
            masks[name] = (weight_matrix(layer) if hasattr(layer, "weight") else layer.dense()) != 0  # type: ignore[operator]

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """Density or N:M as they are; bytes by packing the layers at the density that fits."""
        settled = copy.copy(self)
        if budget.unit == "nm":
            settled.sparsity, settled.nm = None, budget.nm
            return settled
        if budget.unit == "density":
            density = float(budget.value)
        elif budget.unit in ("bytes", "ratio"):
            density, settled.pack = _density_for(budget, layers, model), True
        else:
            raise budget.refuse(type(self).__name__, *self.budgets)
        least = max(1 / weight_matrix(layer).shape[1] for layer in layers.values())
        if density < least:
            raise BudgetError(
                f"a density of {density:.3g} leaves a row of some layer without a weight; "
                f"{type(self).__name__} reaches densities from {least:.3g} to 1."
            )
        settled.sparsity, settled.nm = 1 - density, None
        return settled


def _density_for(budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> float:
    """The density at which bitmaps and values of the layers, and all else, fit into a file."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    whole = sum(t.numel() * t.element_size() for t in tensors)
    weights = [weight_matrix(layer) for layer in layers.values()]
    heads = _BYTES_OF_HEADS + _BYTES_OF_A_TENSOR * (len(tensors) + 2 * len(weights))
    bitmaps = sum(-(-w.numel() // 8) for w in weights)
    values = sum(w.numel() * w.element_size() for w in weights)
    least = whole - values + bitmaps + heads
    wanted = budget.bytes if budget.bytes is not None else int(float(budget.value) * whole)
    density = (wanted - least) / values
    if density <= 0:
        raise BudgetError(
            f"{wanted:,} bytes cannot be reached by pruning: what is not pruned and the bitmaps take "
            f"{least:,}; give more than that, up to {whole:,}."
        )
    return min(1.0, density)
