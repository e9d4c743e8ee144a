"""Scales that move from what a layer takes in to its weight: found by looking at tensors, tested, folded.

A layer W x that follows a norm with gain g equals (W diag(s)) (x / s) with the gain g / s. Layers that take
in the very same tensor are scaled together. The source of that tensor is the norm that gave it out, or an
earlier layer all of whose output reaches it channel by channel (up to down in a gated feed-forward, value
to output in attention, any two layers about a ReLU). Nothing is known about architectures: a pair counts if
the model's output is the same after folding scales of 1/2, 1 and 2, which are exact in floating point. That
finds, too, where a fold is wrong: a norm whose output also goes round the layer, as in BERT.

Source: Lin et al. (2024), AWQ, MLSys, section 3.2; Xiao et al. (2023), SmoothQuant, ICML, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.compress.data import Batch
from paperback.networks.surgery import find_layers, set_weight_matrix, weight_matrix

NEAR = 8  # so many layers before the one in question may be its source
UNCHANGED = 1e-5  # relative change of the model's output that still counts as none


@dataclass(frozen=True)
class Pair:
    """A source whose output channels can be divided, and the layers whose columns are then multiplied.

    Attributes:
        source: name of the norm or layer.
        layers: names of the layers that take in its output, in the order in which they are called.
        parent: name of the module whose output shows what quantizing those layers does: the smallest one that
            holds them all, the layer itself if it is alone.
    """

    source: str
    layers: tuple[str, ...]
    parent: str


def smoothing_pairs(
    model: nn.Module, forward: Callable[[], Tensor], targets: Mapping[str, nn.Module]
) -> list[Pair]:
    """All pairs of a model that can be folded without changing its output, in the order of the layers.

    Args:
        model: in evaluation mode; its weights are changed for a test and put back bit by bit.
        forward: runs the model on a small batch and gives its output.
        targets: layers that are to be quantized, by name; pairs without one are left out.

    Returns:
        The pairs; each layer is in at most one, each source in at most one.
    """
    linears = {
        name: layer
        for name, layer in find_layers(model, ignore=()).layers.items()
        if weight_matrix(layer).ndim == 2 and not isinstance(layer, nn.Conv1d | nn.Conv2d)
    }
    inputs, outputs, before = _watch(model, forward, linears)
    pairs: list[Pair] = []
    used: set[str] = set()
    order = list(inputs)
    for names in _groups(inputs):
        if not any(name in targets for name in names):
            continue
        width = weight_matrix(linears[names[0]]).shape[1]
        sources = [n for n, out in outputs.items() if out is inputs[names[0]] and _gain(model, n) == width]
        near = reversed(order[: order.index(names[0])][-NEAR:])
        sources += [n for n in near if weight_matrix(linears[n]).shape[0] == width]
        for source in sources:
            pair = Pair(source, names, _common_parent(names))
            if source not in used and _is_exact(model, pair, width, forward, before):
                pairs.append(pair)
                used.add(source)
                break
    return pairs


@torch.no_grad()
def fold(model: nn.Module, pair: Pair, scale: Float[Tensor, " channels"]) -> None:
    """Divide the source's output channels by a scale and multiply the layers' columns by it, in place.

    Args:
        model: the model.
        pair: as found by `smoothing_pairs`.
        scale: positive, one number a channel.
    """
    source = model.get_submodule(pair.source)
    _divide_outputs(source, scale)
    for name in pair.layers:
        layer = model.get_submodule(name)
        set_weight_matrix(layer, weight_matrix(layer) * scale.to(weight_matrix(layer).dtype))


def small_batch(batch: Batch, rows: int = 2) -> Batch:
    """The first rows of a batch: enough to see which tensors go where."""
    if isinstance(batch, Mapping):
        return {k: v[:rows] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(small_batch(part, rows) for part in batch)
    return batch[:rows]


def _divide_outputs(source: nn.Module, scale: Tensor) -> None:
    weight, bias = source.weight, getattr(source, "bias", None)
    assert isinstance(weight, Tensor)
    if weight.ndim == 1:  # the gain of a norm
        weight.div_(scale.to(weight.dtype))
    else:
        set_weight_matrix(source, weight_matrix(source) / scale.to(weight.dtype)[:, None])
    if isinstance(bias, Tensor):
        bias.div_(scale.to(bias.dtype))


def _watch(
    model: nn.Module, forward: Callable[[], Tensor], linears: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What each layer took in and each norm gave out, the tensors themselves, and the model's output.

    Modules that are called twice are left out: a fold would have to suit both calls.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    twice: set[str] = set()
    handles = []

    def watch_input(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if name in inputs:
                twice.add(name)
            inputs[name] = args[0]

        return hook

    def watch_output(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in outputs:
                twice.add(name)
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name in linears:
            handles.append(module.register_forward_pre_hook(watch_input(name)))
        elif isinstance(weight, Tensor) and weight.ndim == 1:
            handles.append(module.register_forward_hook(watch_output(name)))
    try:
        with torch.no_grad():
            output = forward().clone()
    finally:
        for handle in handles:
            handle.remove()
    for name in twice:
        inputs.pop(name, None)
        outputs.pop(name, None)
    return inputs, outputs, output


def _gain(model: nn.Module, name: str) -> int:
    return int(model.get_submodule(name).weight.numel())  # type: ignore[operator]


def _groups(inputs: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Layers that took in the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, x in inputs.items():
        groups.setdefault(id(x), []).append(name)
    return [tuple(names) for names in groups.values()]


def _common_parent(names: tuple[str, ...]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".")[:-1] for name in names]
    same = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        same.append(level[0])
    return ".".join(same)


@torch.no_grad()
def _is_exact(
    model: nn.Module, pair: Pair, width: int, forward: Callable[[], Tensor], before: Tensor
) -> bool:
    """Whether folding powers of two leaves the output as it was; the weights are put back."""
    modules = [model.get_submodule(name) for name in (pair.source, *pair.layers)]
    old = [(p, p.detach().clone()) for module in modules for p in module.parameters(recurse=False)]
    powers = torch.tensor([1.0, 0.5, 2.0], device=old[0][0].device)
    fold(model, pair, powers[torch.arange(width, device=powers.device) * 7 % 3])
    try:
        after = forward()
    finally:
        for parameter, value in old:
            parameter.copy_(value)
    return bool((after - before).abs().max() <= UNCHANGED * before.abs().max())
