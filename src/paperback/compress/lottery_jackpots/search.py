"""The search of one layer's mask, and the rule by which weights take each other's place."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from paperback.compress.masks import swap, topk_mask
from paperback.errors import DataError
from paperback.numerics.relaxation import straight_through

Restriction = Literal["power4", "cosine"]
RESTRICTIONS: tuple[Restriction, ...] = get_args(Restriction)
SCORE_KEPT, SCORE_PRUNED = 1.0, 0.99  # a gap so small that the first steps already exchange weights


class MaskSearch(nn.Module):
    """Scores and mask of one layer.

    Args:
        mask: to start from, bool, ``(out, in)``.
        scores: to start from, of that shape; 1 where the mask keeps and 0.99 elsewhere if not given.

    Attributes:
        scores: S, trained.
        mask: B, bool; its number of ones never changes.
    """

    def __init__(self, mask: Bool[Tensor, "out in"], scores: Tensor | None = None) -> None:
        super().__init__()
        if scores is None:
            scores = torch.full(mask.shape, SCORE_PRUNED, device=mask.device).masked_fill(mask, SCORE_KEPT)
        self.scores = nn.Parameter(scores.float().clone())
        self.kept = int(mask.sum())
        self.mask: Tensor
        self.register_buffer("mask", mask.clone())

    def forward(self) -> Float[Tensor, "out in"]:
        """B as numbers, with the gradient of S."""
        return straight_through(self.mask, self.scores)

    @torch.no_grad()
    def refresh(self, share: float) -> int:
        """Exchange weights, see `exchange`; returns how many came in."""
        mask, count = exchange(self.mask, self.scores, share)
        self.mask.copy_(mask)
        return count


def exchange(
    mask: Bool[Tensor, "..."], scores: Float[Tensor, "..."], share: float = 1.0
) -> tuple[Bool[Tensor, "..."], int]:
    """Bring a mask nearer to the top of its scores, without changing how many it keeps.

    With k weights kept, In are the pruned ones among the k best scores and Out the kept ones that are not;
    there are as many of both. ceil(share |In|) exchanges are made: the best of In for the worst of Out.

    Args:
        mask: B.
        scores: S, finite.
        share: beta in [0, 1]; 1 gives the k best, 0 leaves the mask.

    Returns:
        The new mask, and the number of exchanges.

    Raises:
        DataError: if the share lies outside [0, 1] or a score is not finite.
    """
    if not 0 <= share <= 1:
        raise DataError(f"share is {share}; it must lie in [0, 1].")
    wanted = topk_mask(scores, int(mask.sum()))
    candidates = int((wanted & ~mask).sum())
    count = math.ceil(share * candidates)
    if count == candidates:
        return wanted, count
    # The best of all pruned weights are the best of In, the worst of all kept ones the worst of Out.
    return swap(mask, scores, scores, count), count


def restriction_at(restriction: Restriction | None, progress: float) -> float:
    """beta at a part of the search.

    Args:
        restriction: "power4" is (1 - u)^4, "cosine" (1 + cos(pi u)) / 2, None is 1.
        progress: u = t / T in [0, 1].

    Returns:
        The share of the exchanges that is made, in [0, 1].
    """
    if restriction is None:
        return 1.0
    if restriction == "power4":
        return float((1 - progress) ** 4)
    return (1 + math.cos(math.pi * progress)) / 2
