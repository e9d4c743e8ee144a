"""SparseGPT: pruning with the optimal brain surgeon, all rows at once (Frantar and Alistarh 2023).

With H = X X^T of a layer's inputs and U the upper Cholesky factor of (H + damping)^-1, the weights of a block
of columns with the smallest

    W_ij^2 / U_jj^2                                                                   (equation 4)

become zero. Then, column after column, the columns to the right take over what a removed weight did:

    W_i,j: -= (W_ij / U_jj) U_j,j:   for pruned ij                                     (algorithm 1).

The block is chosen anew after the columns before it have been dealt with; N:M patterns are chosen inside
their M columns. The columns of a block of 128 are updated lazily, in sub-blocks, which changes nothing but
the speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.compress.masks import nm_mask, row_mask, topk_mask
from paperback.compress.masks.choose import whole
from paperback.compress.pruning.interface import MaskPruner
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError
from paperback.networks.surgery import HEADS_AND_EMBEDDINGS

Per = Literal["layer", "row"]

BLOCK, SUB_BLOCK = 128, 16  # columns
_ATTEMPTS = 4  # at a Cholesky factor, each with ten times the damping


class SparseGPT(MaskPruner):
    """Prune by what the loss of a weight costs the layer's output, and let the other weights make up for it.

    Needs calibration data; keeps one matrix of inputs times inputs per group of layers.

    Args:
        sparsity: share of the weights that become zero, in [0, 1).
        nm: (n, m) to keep n of every m neighbouring weights instead.
        update: False chooses the mask only, from the weights as they are.
        per: "layer" shares the zeros out over all rows of a block of columns, as published; "row" gives each
            row of a block the same number.
        damping: added to the diagonal of H, as a share of its mean, > 0.
        pack: keep the pruned layers as `SparseLinear`.
        targets: as of `Compressor`.
        ignore: as of `Compressor`.
        seed: as of `Compressor`; nothing here is random.

    Raises:
        DataError: if a setting is out of range.
    """

    needs = frozenset({"calibration"})
    statistics = frozenset({"gram"})

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        nm: tuple[int, int] | None = None,
        update: bool = True,
        per: Per = "layer",
        damping: float = 0.01,
        pack: bool = False,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(sparsity, nm=nm, pack=pack, targets=targets, ignore=ignore, seed=seed)
        if per not in ("layer", "row"):
            raise DataError(f"per is {per!r}; choose 'layer' or 'row'.")
        if not damping > 0:
            raise DataError(f"damping is {damping}; it must be positive.")
        self.update = update
        self.per = per
        self.damping = damping

    def choose(
        self, name: str, weight: Float[Tensor, "out in"], stats: LayerStatistics
    ) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
        """Mask, and updated weight; see `MaskPruner.choose`."""
        if self.update:
            return prune_matrix(
                weight, stats.gram, self.density, nm=self.nm, per=self.per, damping=self.damping, name=name
            )
        scores = sparsegpt_scores(weight, stats.gram, self.damping, name=name)
        if self.nm is not None:
            return weight, nm_mask(scores, *self.nm, name=name)
        if self.per == "row":
            return weight, row_mask(scores, self.kept(weight.shape[1], name), name=name)
        return weight, topk_mask(scores, whole(self.density * weight.numel()), name=name)


def sparsegpt_scores(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    damping: float = 0.01,
    *,
    name: str = "the layer",
) -> Float[Tensor, "out in"]:
    """SparseGPT's importance of each weight before anything is pruned: W_ij^2 / U_jj^2.

    Args:
        weight: of the layer.
        gram: X X^T, in any scale.
        damping: as of `SparseGPT`.
        name: of the layer, for messages.

    Returns:
        The scores; those of an input that is always 0 are 0.

    Raises:
        DataError: if H has no Cholesky factor even with a thousand times the damping.
    """
    factor, dead = inverse_factor(gram, damping, name)
    return (weight / factor.diagonal()).square().masked_fill(dead, 0.0)


def prune_matrix(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    density: float,
    *,
    nm: tuple[int, int] | None = None,
    per: Per = "layer",
    damping: float = 0.01,
    name: str = "the layer",
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Prune one weight matrix and update what is kept; SparseGPT's algorithm 1.

    Args:
        weight: of the layer, float32; left as it is.
        gram: X X^T, in any scale.
        density: share that stays, in (0, 1]; not used with nm.
        nm: (n, m) to keep n of every m neighbours.
        per: see `SparseGPT`.
        damping: see `SparseGPT`.
        name: of the layer, for messages.

    Returns:
        The updated weight, 0 where pruned, and the mask. After every block of columns the number kept so far
        is the whole part of density times the weights so far.

    Raises:
        DataError: if H has no Cholesky factor, or m does not divide the columns.
    """
    rows = len(weight)

    def choose(scores: Tensor, start: int, end: int) -> Tensor:
        if nm is not None:
            return nm_mask(scores, *nm, name=name)
        unit = 1 if per == "row" else rows
        kept = whole(density * end * unit) - whole(density * start * unit)
        return row_mask(scores, kept, name=name) if per == "row" else topk_mask(scores, kept, name=name)

    return _sweep(weight, gram, choose, damping, name, m=nm[1] if nm is not None else None)


def update_matrix(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    mask: Bool[Tensor, "out in"],
    damping: float = 0.01,
    *,
    name: str = "the layer",
) -> Float[Tensor, "out in"]:
    """Let the kept weights of a given mask make up for the pruned ones, as `prune_matrix` does.

    Args:
        weight: of the layer, float32; left as it is.
        gram: X X^T, in any scale.
        mask: what is kept.
        damping: see `SparseGPT`.
        name: of the layer, for messages.

    Returns:
        The updated weight, 0 where pruned.
    """
    return _sweep(weight, gram, lambda scores, start, end: mask[:, start:end], damping, name)[0]


def _sweep(weight, gram, choose, damping, name, m=None):  # type: ignore[no-untyped-def]
    """Go through the columns: `choose(scores, start, end)` gives the mask of a block from its scores."""
    factor, dead = inverse_factor(gram, damping, name)
    w = weight.T.contiguous().clone()  # (in, out): what is a column of the weight is contiguous
    w[dead] = 0
    mask = torch.zeros_like(w, dtype=torch.bool)
    columns = len(w)
    sub = SUB_BLOCK if m is None else max(1, SUB_BLOCK // m) * m
    for start in range(0, columns, BLOCK // sub * sub):
        end = min(start + BLOCK // sub * sub, columns)
        if m is None:
            scores = (w[start:end] / factor.diagonal()[start:end, None]).square()
            mask[start:end] = choose(scores.T, start, end).T
        errors = torch.zeros_like(w[start:end])
        for low in range(start, end, sub):
            high = min(low + sub, end)
            for j in range(low, high):
                if m is not None and (j - low) % m == 0:
                    scores = (w[j : j + m] / factor.diagonal()[j : j + m, None]).square()
                    mask[j : j + m] = choose(scores.T.contiguous(), j, j + m).T
                error = w[j].masked_fill(mask[j], 0.0) / factor[j, j]
                errors[j - start] = error
                w[j:high].addr_(factor[j, j:high], error, alpha=-1)
            w[high:end].addmm_(factor[low:high, high:end].T, errors[low - start : high - start], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return w.masked_fill(~mask, 0.0).T, mask.T


def inverse_factor(
    gram: Float[Tensor, "in in"], damping: float, name: str
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, " in"]]:
    """Upper Cholesky factor U of the damped inverse, (H + damping)^-1 = U^T U, and which inputs are always 0.

    Raises:
        DataError: if there is none even with a thousand times the damping.
    """
    hessian = gram.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    step = damping * diagonal.mean()
    for attempt in range(_ATTEMPTS):
        diagonal += step * 10**attempt
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if failed == 0:
                return upper, dead
    raise DataError(
        f"the inputs of {name} have a matrix that cannot be inverted, even damped; give more rows."
    )
