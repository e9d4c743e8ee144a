"""`DSnoT`: prune, then repair the mask without training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.compress.dsnot.refine import refine_mask
from paperback.compress.interface import Job
from paperback.compress.masks import nm_mask, row_mask
from paperback.compress.pruning import (
    Magnitude,
    MaskPruner,
    SparseGPT,
    sparsegpt_scores,
    update_matrix,
    wanda_scores,
)
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS

Start = Literal["wanda", "magnitude", "sparsegpt"]


class DSnoT(MaskPruner):
    """Prune each row in one shot, then swap pruned for kept weights until its expected output is back.

    Args:
        sparsity: share of each row's weights that become zero, in [0, 1); a half if neither it nor nm is
            given.
        nm: (n, m) to keep n of every m neighbouring weights instead.
        init: what chooses the first mask: "wanda", "magnitude", "sparsegpt", or another `MaskPruner`, whose
            `choose` is asked with the same sparsity or N:M, row by row.
        max_cycles: swaps of a row at most; None for 50 in 4,096 inputs (the paper's models have rows of 4,096
            and more, and 50 literal cycles wreck narrow ones), a number is taken literally.
        update_threshold: rows whose error is at most this are left.
        pow_of_var: how much inputs that vary are avoided when a weight comes back.
        same_sign: refuse swaps that turn the sign of a row's error.
        skip: parts of names of layers that keep their first mask; the released code skips the feed-forward
            layers.
        update: let the kept weights make up for the pruned ones at the end, as SparseGPT does ("SparseGPT +
            DSnoT"); kept weights then change.
        pack: keep the pruned layers as `SparseLinear`.
        targets: as of `Compressor`.
        ignore: as of `Compressor`.
        seed: as of `Compressor`; nothing here is random.

    Raises:
        DataError: if a setting is out of range.
    """

    needs = frozenset({"calibration"})

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        nm: tuple[int, int] | None = None,
        init: Start | MaskPruner = "wanda",
        max_cycles: int | None = None,
        update_threshold: float = 0.1,
        pow_of_var: float = 1.0,
        same_sign: bool = False,
        skip: Sequence[str] = ("mlp",),
        update: bool = False,
        pack: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(sparsity, nm=nm, pack=pack, targets=targets, ignore=ignore, seed=seed)
        if not isinstance(init, MaskPruner) and init not in get_args(Start):
            raise DataError(f"init is {init!r}; choose {', '.join(get_args(Start))}, or a pruner.")
        if isinstance(skip, str):
            raise DataError(f"skip is the text {skip!r}; give a list of parts of names.")
        if max_cycles is not None and max_cycles < 0:
            raise DataError(f"max_cycles is {max_cycles}; it must be at least 0, or None.")
        if not update_threshold >= 0:
            raise DataError(f"update_threshold is {update_threshold}; it must be at least 0.")
        self.init, self.max_cycles, self.update_threshold = init, max_cycles, update_threshold
        self.pow_of_var, self.same_sign, self.skip, self.update = pow_of_var, same_sign, tuple(skip), update

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        """Means, variances and sums of inputs; Gram matrices where SparseGPT takes part."""
        wanted = frozenset({"moments", "sequence_sums"})
        if self.init == "sparsegpt" or self.update:
            wanted |= {"gram"}
        return wanted | self.init.statistics if isinstance(self.init, MaskPruner) else wanted

    def choose(
        self, name: str, weight: Float[Tensor, "out in"], stats: LayerStatistics
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """The first mask, repaired; see `MaskPruner.choose`."""
        mask, scores = self._first_mask(name, weight, stats)
        if not any(part in name for part in self.skip):
            refined = refine_mask(
                weight, mask, stats, max_cycles=self.max_cycles, update_threshold=self.update_threshold,
                pow_of_var=self.pow_of_var, same_sign=self.same_sign, nm=self.nm, scores=scores,
            )  # fmt: skip
            mask = refined.mask
            self.job.extras.setdefault("repaired", {})[name] = {
                "swaps": float(refined.swaps.double().mean()),
                "error_before": float(refined.error_before.abs().mean()),
                "error_after": float(refined.error_after.abs().mean()),
            }
        if self.update:
            weight = update_matrix(weight, stats.gram, mask, name=name)
        return weight, mask

    def _first_mask(
        self, name: str, weight: Tensor, stats: LayerStatistics
    ) -> tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"] | None]:
        if isinstance(self.init, MaskPruner):
            start = copy.copy(self.init)
            start.sparsity, start.nm = self.sparsity, self.nm
            if isinstance(start, Magnitude):  # rows keep equally many, whoever chooses
                start.allocation = "row"
            elif isinstance(start, SparseGPT):
                start.per = "row"
            return start.choose(name, weight.clone(), stats)[1], None
        if self.init == "wanda":
            scores = wanda_scores(weight, stats.square_sum)
        elif self.init == "magnitude":
            scores = weight.abs()
        else:
            scores = sparsegpt_scores(weight, stats.gram, name=name)
        if self.nm is not None:
            return nm_mask(scores, *self.nm, name=name), scores
        return row_mask(scores, self.kept(weight.shape[1], name), name=name), scores

    def _compress(self, job: Job) -> None:
        for name, layer in job.layers.items():
            if isinstance(layer, nn.Conv1d | nn.Conv2d):
                raise DataError(
                    f"{name} is a convolution, which DSnoT does not repair; leave it out by ignore."
                )
        super()._compress(job)
        repaired = job.extras.get("repaired", {})
        if repaired:
            shares = [entry["error_after"] / max(entry["error_before"], 1e-30) for entry in repaired.values()]
            job.note(
                f"{len(repaired)} layers were repaired; the error of their rows' means is "
                f"{sum(shares) / len(shares):.0%} of what it was."
            )
