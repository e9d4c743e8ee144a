"""Change a mask by an exact number of weights, and keep a training inside it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from paperback.compress.masks.choose import topk_mask
from paperback.errors import DataError


def prune(mask: Bool[Tensor, "..."], scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Take the `count` kept weights with the smallest scores out of a mask.

    Args:
        mask: True is kept.
        scores: of its shape; only those of kept weights are looked at.
        count: 0..number of kept weights.

    Returns:
        A new mask.

    Raises:
        DataError: if there are not so many kept weights, or their scores are not finite.
    """
    return mask & ~_chosen(mask, -scores, count, "kept")


def grow(mask: Bool[Tensor, "..."], scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Put the `count` pruned weights with the largest scores back into a mask.

    Args and Returns are those of `prune`.

    Raises:
        DataError: if there are not so many pruned weights, or their scores are not finite.
    """
    return mask | _chosen(~mask, scores, count, "pruned")


def swap(
    mask: Bool[Tensor, "..."],
    kept_scores: Float[Tensor, "..."],
    pruned_scores: Float[Tensor, "..."],
    count: int,
) -> Bool[Tensor, "..."]:
    """Prune `count` weights and grow as many of those that were pruned before; the budget stays as it is.

    Args:
        mask: True is kept.
        kept_scores: the smallest of these go.
        pruned_scores: the largest of these come.
        count: 0..the smaller of the numbers of kept and of pruned weights.

    Returns:
        A new mask with as many kept weights. A weight that goes does not come back at once.

    Raises:
        DataError: as `prune` and `grow`.
    """
    goes = _chosen(mask, -kept_scores, count, "kept")
    comes = _chosen(~mask, pruned_scores, count, "pruned")
    return (mask & ~goes) | comes


def _chosen(among: Tensor, scores: Tensor, count: int, what: str) -> Tensor:
    """A mask of the `count` largest scores among some."""
    if among.dtype != torch.bool or among.shape != scores.shape:
        raise DataError(
            f"the mask is {tuple(among.shape)} {among.dtype} and the scores are {tuple(scores.shape)}."
        )
    if not 0 <= count <= int(among.sum()):
        raise DataError(f"{count} {what} weights are asked for; the mask has {int(among.sum())}.")
    result = torch.zeros_like(among)
    result[among] = topk_mask(scores[among], count)
    return result


@torch.no_grad()
def mask_optimizer_state(optimizer: Optimizer, masks: Mapping[Tensor, Tensor]) -> None:
    """Set the state that an optimizer keeps per weight (momentum, second moments) to 0 where a mask is 0.

    Otherwise a pruned weight's momentum would move it off zero, and a grown one would begin with old moments.

    Args:
        optimizer: any of torch; state of another shape than its parameter (step counts) is left alone.
        masks: parameter to its mask.
    """
    for parameter, mask in masks.items():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.mul_(mask)


@torch.no_grad()
def hold_masks(optimizer: Optimizer, masks: Mapping[Tensor, Tensor]) -> RemovableHandle:
    """Keep pruned weights at 0 through a training: after every step weights and state are masked again.

    Args:
        optimizer: of the training.
        masks: parameter to its mask, of the same shape; they are read at each step, so they may be changed in
            place. Each parameter must be the optimizer's.

    Returns:
        A handle; ``handle.remove()`` ends it.

    Raises:
        DataError: if a mask does not fit its parameter, or the optimizer does not have it.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter, mask in masks.items():
        if id(parameter) not in known:
            raise DataError(
                "a masked parameter is not among the optimizer's; give the optimizer that trains it."
            )
        if mask.shape != parameter.shape:
            raise DataError(
                f"a mask of shape {tuple(mask.shape)} does not fit a parameter of {tuple(parameter.shape)}."
            )

    def again(optimizer: Optimizer, *_: object) -> None:
        with torch.no_grad():
            for parameter, mask in masks.items():
                parameter.mul_(mask)
        mask_optimizer_state(optimizer, masks)

    again(optimizer)
    return optimizer.register_step_post_hook(again)
