"""How much each layer of a network minds being factorised, and the sizes that follow from it.

Each layer is replaced alone, at several sizes, and the loss is measured; the increase over the dense network
is the layer's sensitivity. `allocate` then starts from the dense network and takes, again and again, the step
with the largest saving of parameters for its increase of the loss, until what is left fits.

Source: arXiv 2401.14109, section 3 (the profile); the greedy rule is ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paperback.compress.data import evaluating
from paperback.compress.factors.layers import FactorLayer, MPOLinear
from paperback.errors import DataError
from paperback.networks.surgery import find_layers, swap, weight_matrix
from paperback.study.progress import Bars

Factorize = Callable[[str, nn.Module, int], FactorLayer]
LEAST_INCREASE = 1e-6  # nats; a step that costs less counts as this


@dataclass(frozen=True)
class Sensitivity:
    """One layer at one size, all others dense.

    Attributes:
        name: of the layer.
        depth: number of its block, 0 for the first; None outside blocks.
        type: last part of its name: "q_proj", "down_proj".
        size: bond dimension or rank.
        numbers: parameters of its factors.
        weights: parameters of the dense weight.
        loss: of the network with this one layer factorised.
        increase: over the dense network.
    """

    name: str
    depth: int | None
    type: str
    size: int
    numbers: int
    weights: int
    loss: float
    increase: float


@torch.no_grad()
def sensitivity_profile(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sizes: Mapping[str, Sequence[int]] | Sequence[int],
    factorize: Factorize | None = None,
    *,
    progress: bool = False,
) -> list[Sensitivity]:
    """The loss of a network with one layer factorised, for each layer and size.

    Args:
        model: left as it is.
        evaluate: the loss of a network, lower is better; called once a layer and size.
        sizes: bond dimensions or ranks, for all layers, or by the name of the layer.
        factorize: ``(name, layer, size)`` to the module that takes its place; an `MPOLinear` with two cores
            if not given.
        progress: show a bar, if the output is a terminal.

    Returns:
        One entry a layer and size, in the order of the layers.

    Raises:
        DataError: if a named layer is not there.
    """
    layers = find_layers(model).layers
    wanted = sizes if isinstance(sizes, Mapping) else dict.fromkeys(layers, sizes)
    for name in wanted:
        if name not in layers:
            raise DataError(
                f"the model has no layer {name!r} to factorise; it has {', '.join(list(layers)[:6])}."
            )
    make = factorize or (lambda name, layer, size: MPOLinear.from_dense(layer, size, name=name))
    rows = []
    with evaluating(model):
        dense = evaluate(model)
        pairs = [(name, size) for name, some in wanted.items() for size in some]
        for name, size in Bars(progress).track(pairs, "profile of layers"):
            layer = layers[name]
            factors = make(name, layer, size).eval()
            swap(model, name, factors)
            try:
                loss = evaluate(model)
            finally:
                swap(model, name, layer)
            weights, kind = weight_matrix(layer).numel(), name.rpartition(".")[2]
            rows.append(
                Sensitivity(name, _depth(name), kind, size, factors.numbers, weights, loss, loss - dense)
            )
    return rows


def allocate(profile: Iterable[Sensitivity], budget: int) -> dict[str, Sensitivity | None]:
    """A size for each layer, so that all layers together have at most `budget` parameters.

    Args:
        profile: as of `sensitivity_profile`, each layer at several sizes.
        budget: parameters of all these layers together.

    Returns:
        Name to the entry of the profile that is chosen, None for a layer that stays dense.

    Raises:
        DataError: if the smallest sizes of the profile are still too large.
    """
    rungs: dict[str, list[Sensitivity]] = {}
    for row in profile:
        rungs.setdefault(row.name, []).append(row)
    chosen: dict[str, Sensitivity | None] = dict.fromkeys(rungs)
    total = sum(rows[0].weights for rows in rungs.values())

    def step(name: str, to: Sensitivity) -> tuple[float, int]:
        """Loss per parameter that the step saves (smallest first), and the saving."""
        now = chosen[name]
        saved = (to.weights if now is None else now.numbers) - to.numbers
        cost = max(to.increase - (0.0 if now is None else now.increase), LEAST_INCREASE)
        return cost / saved if saved > 0 else float("inf"), saved

    while total > budget:
        steps = [(*step(name, row), name, row) for name, rows in rungs.items() for row in rows]
        price, saved, name, row = min(steps, key=lambda entry: entry[:3])
        if price == float("inf"):
            raise DataError(
                f"the smallest sizes of the profile have {total:,} parameters, {budget:,} are wanted; "
                "profile smaller sizes."
            )
        chosen[name] = row
        total -= saved
    return chosen


def _depth(name: str) -> int | None:
    """The first number in a dotted name."""
    found: Any = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found[1]) if found else None
