"""The swaps of DSnoT: which pruned weights come back, and which kept ones go in their place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.compress.masks import check_nm, check_rows
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError

PAPER_CYCLES, PAPER_WIDTH = 50, 4096  # of the reference code, and the narrowest rows of the paper's models
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True)
class Refined:
    """What `refine_mask` did.

    Attributes:
        mask: True where a weight is kept, ``(out, in)``.
        swaps: of each row, ``(out,)``.
        error_before: sum of s_j W_ij over the pruned weights of each row, ``(out,)``, float64.
        error_after: the same for the new mask.
    """

    mask: Bool[Tensor, "out in"]
    swaps: Int[Tensor, " out"]
    error_before: Float[Tensor, " out"]
    error_after: Float[Tensor, " out"]


def cycles_for(columns: int) -> int:
    """The cap on swaps in proportion to the width of a row: 50 for 4,096 inputs, rounded up."""
    return math.ceil(PAPER_CYCLES / PAPER_WIDTH * columns)


@torch.no_grad()
def refine_mask(
    weight: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    stats: LayerStatistics,
    *,
    max_cycles: int | None = None,
    update_threshold: float = 0.1,
    pow_of_var: float = 1.0,
    same_sign: bool = False,
    nm: tuple[int, int] | None = None,
    scores: Float[Tensor, "out in"] | None = None,
) -> Refined:
    """Swap pruned for kept weights, row by row, until the expected output of each row is back.

    Args:
        weight: of the dense layer.
        mask: what is kept; equally many in each row (n of every m with nm).
        stats: of the input, with "moments" and "sequence_sums", of at least two tokens.
        max_cycles: swaps of a row at most; in proportion to its width, see `cycles_for`, if None.
        update_threshold: rows whose error is at most this are left, eps of the paper.
        pow_of_var: p, how much inputs that vary are avoided when a weight comes back; 0 for not at all.
        same_sign: refuse a swap after which the error has another sign than at the start.
        nm: (n, m) keeps the pattern: the block of the weight that comes back gives one up.
        scores: importance by which such a block gives up its least; |W| sqrt(sum x^2) if None.

    Returns:
        The new mask, with the same number kept in each row (block), the swaps and the errors.

    Raises:
        DataError: if mask, statistics or a setting cannot be used.

    Source: Zhang et al. 2024, section 3 and algorithm 1.
    """
    _check(weight, mask, stats, max_cycles, update_threshold, nm)
    cycles = cycles_for(weight.shape[1]) if max_cycles is None else max_cycles
    contribution = weight.double() * stats.sequence_sum  # D_ij = W_ij s_j
    wanda = weight.double().abs() * stats.square_sum.sqrt()
    growth = contribution / stats.variance.clamp(min=LEAST_VARIANCE).pow(pow_of_var)
    growth = growth.masked_fill(
        mask, 0.0
    )  # kept weights stand in the middle of the order and never come back
    order = growth.argsort(dim=1, stable=True)
    state = _Rows(mask.clone(), (contribution * ~mask).sum(1))
    before = state.error.clone()
    givers = (
        _GiversOfBlocks(wanda if scores is None else scores, mask, nm[1])
        if nm
        else _Givers(wanda, contribution, mask)
    )
    taken = torch.zeros(2, len(weight), dtype=torch.long)  # from the lower and the upper end of the order
    rows = torch.arange(len(weight))
    for _ in range(cycles):
        positive = state.error > 0
        column = torch.where(positive, weight.shape[1] - 1 - taken[1], taken[0]).clamp(0, weight.shape[1] - 1)
        grow = order[rows, column]
        gain = growth[rows, grow]
        state.alive &= torch.where(positive, gain > 0, gain < 0) & (state.error.abs() > update_threshold)
        prune, there = givers.offer(rows, grow, positive)
        state.alive &= there
        error = state.error + contribution[rows, prune] - contribution[rows, grow]
        if same_sign:
            state.alive &= error.sign() == before.sign()
        if not bool(state.alive.any()):
            break
        swapped = rows[state.alive]
        state.mask[swapped, grow[swapped]] = True
        state.mask[swapped, prune[swapped]] = False
        state.error = torch.where(state.alive, error, state.error)
        state.swaps += state.alive
        taken += torch.stack([~positive, positive]) & state.alive
        givers.give(swapped, prune, positive)
    after = (contribution * ~state.mask).sum(1)
    return Refined(state.mask, state.swaps, before, after)


class _Rows:
    """Where each row stands; one that failed once is done."""

    def __init__(self, mask: Tensor, error: Tensor) -> None:
        self.mask, self.error = mask, error
        self.swaps = torch.zeros(len(mask), dtype=torch.long)
        self.alive = torch.ones(len(mask), dtype=torch.bool)


class _Givers:
    """Kept weights in the order in which they go: the least by Wanda's score that pushes the error back.

    Those with a negative contribution serve rows with a positive error, and the other way round; each list is
    sorted once, and a pointer walks along it.
    """

    def __init__(self, wanda: Tensor, contribution: Tensor, mask: Tensor) -> None:
        sides = (contribution > 0, contribution < 0)  # by whether the row's error is positive
        metric = [wanda.masked_fill(~(mask & side), math.inf) for side in sides]
        self._order = torch.stack([m.argsort(dim=1, stable=True) for m in metric])
        self._length = torch.stack([(mask & side).sum(1) for side in sides])
        self._taken = torch.zeros_like(self._length)

    def offer(self, rows: Tensor, grow: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the weight that would go, and whether there is one."""
        side = positive.long()
        next_one = self._taken[side, rows]
        there = next_one < self._length[side, rows]
        return self._order[side, rows, next_one.clamp(max=self._order.shape[2] - 1)], there

    def give(self, rows: Tensor, prune: Tensor, positive: Tensor) -> None:
        """The offers of these rows were taken."""
        self._taken[positive[rows].long(), rows] += 1


class _GiversOfBlocks:
    """N:M: the block of the weight that comes back gives up its least kept weight, whatever its sign."""

    def __init__(self, scores: Tensor, mask: Tensor, m: int) -> None:
        self._m = m
        self._scores = scores.double().masked_fill(~mask, math.inf)  # what comes back never goes again

    def offer(self, rows: Tensor, grow: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the weight that would go, and whether there is one."""
        first = grow // self._m * self._m
        block = first[:, None] + torch.arange(self._m)
        least, place = self._scores.gather(1, block).min(1)
        return first + place, least.isfinite()

    def give(self, rows: Tensor, prune: Tensor, positive: Tensor) -> None:
        """The offers of these rows were taken."""
        self._scores[rows, prune[rows]] = math.inf


def _check(
    weight: Tensor,
    mask: Tensor,
    stats: LayerStatistics,
    max_cycles: int | None,
    threshold: float,
    nm: tuple[int, int] | None,
) -> None:
    if mask.shape != weight.shape:
        raise DataError(f"the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}.")
    if nm is None:
        check_rows(mask)
    else:
        check_nm(mask, *nm)
    if stats.count < 2:
        raise DataError(f"the statistics are of {stats.count} tokens; a variance needs at least two.")
    if max_cycles is not None and max_cycles < 0:
        raise DataError(f"max_cycles is {max_cycles}; it must be at least 0, or None.")
    if not threshold >= 0:
        raise DataError(f"update_threshold is {threshold}; it must be at least 0.")


# -- the strong baseline -------------------------------------------------------------------------------------


@torch.no_grad()
def exact_swaps(
    weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], gram: Float[Tensor, "in in"], cycles: int
) -> Bool[Tensor, "out in"]:
    """Greedy swaps on the true squared error of the outputs, for comparison.

    Each cycle makes, in every row, the one swap that lowers ||(M W - W) X||^2 most, as long as one does. With
    the lost part d = (1 - M) W and g = G d, bringing back j changes the error by -2 W_j g_j + W_j^2 G_jj,
    losing k by +2 W_k g_k + W_k^2 G_kk, and both together by -2 W_j W_k G_jk more. All pairs are looked at:
    a cycle costs O(out in^2).

    Args:
        weight: of the dense layer.
        mask: what is kept.
        gram: X X^T.
        cycles: swaps of a row at most.

    Returns:
        The new mask.
    """
    w, g, mask = weight.double(), gram.double(), mask.clone()
    for row in range(len(w)):  # a baseline of small layers: pairs of one row at a time bound the memory
        kept = mask[row]
        for _ in range(cycles):
            lost = torch.where(kept, 0.0, w[row])
            pull = g @ lost
            back = (-2 * w[row] * pull + w[row].square() * g.diagonal()).masked_fill(kept, math.inf)
            away = (2 * w[row] * pull + w[row].square() * g.diagonal()).masked_fill(~kept, math.inf)
            change = back[:, None] + away[None, :] - 2 * torch.outer(w[row], w[row]) * g
            best = int(change.argmin())
            j, k = divmod(best, len(kept))
            if not float(change[j, k]) < 0:
                break
            kept[j], kept[k] = True, False  # a view: it writes into the mask
    return mask
