"""Fewer blocks: the residual blocks of a network that are kept, and how much each of them does.

A residual block that is taken out leaves a network that still runs, since blocks give out what they take in
plus a change. A `transformers` model stays one: its configuration says the new number of layers, and the
places of its key and value cache are counted anew.

Source: Fan, Grave and Joulin (2020), LayerDrop, ICLR, section 4; Men et al. (2024), ShortGPT, for the
    influence
of a block, 1 - cos(input, output).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperback.compress.data import Batch, run
from paperback.errors import NotSupportedError
from paperback.networks.surgery import blocks_of

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def residual_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a model that may be taken out.

    Raises:
        NotSupportedError: if it has no list of two or more blocks of one class.
    """
    blocks = blocks_of(model)
    if len(blocks) < 2:
        raise NotSupportedError(
            f"{type(model).__name__} has no list of equal blocks, so none can be taken out; "
            "prune or factorise its layers instead."
        )
    return blocks


def keep_blocks(model: nn.Module, kept: Sequence[int]) -> None:
    """Take all but some blocks out of a model, in place.

    Args:
        model: with blocks as `residual_blocks` finds them.
        kept: indices of those that stay, increasing, at least one.
    """
    blocks = residual_blocks(model)
    path = blocks[0][0].rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[i][1] for i in kept))
    for module in model.modules():
        config = getattr(module, "config", None)
        for count in LAYER_COUNTS:
            if getattr(config, count, None) == len(blocks):
                setattr(config, count, len(kept))
        types = getattr(config, "layer_types", None)
        if isinstance(types, list) and len(types) == len(blocks):
            config.layer_types = [types[i] for i in kept]  # type: ignore[union-attr]
    for place, index in enumerate(kept):
        for module in blocks[index][1].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = place  # type: ignore[assignment]


def evenly_spaced(total: int, kept: int) -> list[int]:
    """Indices of blocks to keep: the first, the last, and the others evenly between."""
    if kept == 1:
        return [0]
    return [round(i * (total - 1) / (kept - 1)) for i in range(kept)]


@torch.no_grad()
def block_influence(model: nn.Module, batches: Iterable[Batch]) -> list[float]:
    """How much each block turns its input: the mean over tokens of 1 - cos(input, output).

    Args:
        model: in evaluation mode.
        batches: as of `paperback.compress.data.Data.batches`.

    Returns:
        One number in [0, 2] a block.
    """
    blocks = residual_blocks(model)
    sums, counts = [0.0] * len(blocks), [0] * len(blocks)

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            after = output if isinstance(output, Tensor) else output[0]
            turned = 1 - torch.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += float(turned.sum())
            counts[index] += turned.numel()

        return hook

    handles = [
        block.register_forward_hook(measure(i), with_kwargs=True) for i, (_, block) in enumerate(blocks)
    ]
    try:
        for batch in batches:
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
