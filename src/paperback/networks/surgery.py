"""The layers of any module: found by name, read and written as matrices, swapped for other modules.

Nothing is traced. A layer is a `Linear`, a convolution or `transformers`' `Conv1D` (a Linear whose weight is
stored transposed, as in GPT-2); its weight is one matrix with a row per output, whatever the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from paperback.errors import DataError

HEADS_AND_EMBEDDINGS = ("lm_head", "embed")  # what language models keep whole, unless told otherwise
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Found:
    """Layers of a model.

    Attributes:
        layers: by name, in the order of `named_modules`; each module and each weight once.
        skipped: name to why a layer with a weight is not among them.
        tied: name of a layer to the name of the one in `layers` whose weight it shares.
    """

    layers: dict[str, nn.Module]
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


def find_layers(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
    kinds: tuple[type[nn.Module], ...] = KINDS,
) -> Found:
    """The layers of a model that a method can act upon.

    Args:
        model: any module.
        targets: parts of names, or patterns such as ``model.layers.*.mlp.*``; all layers if not given.
        ignore: parts of names, or patterns, of layers that are left out.
        kinds: types of layers; `transformers`' Conv1D goes with Linear.

    Returns:
        The layers, and what was left out and why.

    Raises:
        DataError: if a pattern of `targets` (or of `ignore`, but for the usual ones) matches no module.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern in (*(targets or ()), *(p for p in ignore if p not in HEADS_AND_EMBEDDINGS)):
        if not any(_matches(name, pattern) for name in names):
            raise DataError(f"no module of the model matches {pattern!r}; it has {_some(names)}.")
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    owners: dict[int, str] = {}  # weight to the first module that has it
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")  # not one that is computed, such as a packed one
        if weight is None or weight.ndim < 2:
            continue
        owner = owners.setdefault(id(weight), name)
        if not (isinstance(module, kinds) or (nn.Linear in kinds and is_transposed(module))):
            skipped[name] = f"{type(module).__name__} is not a layer of this kind"
        elif any(_matches(name, pattern) for pattern in ignore):
            skipped[name] = "it is on the list of ignored layers"
        elif targets is not None and not any(_matches(name, pattern) for pattern in targets):
            skipped[name] = "it is not among the targets"
        elif owner != name:
            skipped[name] = f"it shares its weight with {owner}"
            if owner in layers:
                tied[name] = owner
        else:
            layers[name] = module
    return Found(layers, skipped, tied)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer is `transformers`' Conv1D, whose weight is (in, out)."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers")


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a layer as a matrix, one row per output.

    Args:
        layer: one that `find_layers` finds.

    Returns:
        ``(out, in)``, without gradient, a view where torch can; of a convolution, ``in`` counts the channels
        of one group times the positions of the kernel, as `torch.nn.functional.unfold` orders them.

    Raises:
        DataError: if the layer has no weight.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise DataError(f"{type(layer).__name__} has no weight with rows and columns.")
    matrix = weight.detach()
    return matrix.T if is_transposed(layer) else matrix.flatten(1)


@torch.no_grad()
def set_weight_matrix(layer: nn.Module, matrix: Tensor) -> None:
    """Write a layer's weight in place, in its own precision.

    Args:
        layer: as of `weight_matrix`.
        matrix: ``(out, in)``.

    Raises:
        DataError: if the shape is another.
    """
    old = weight_matrix(layer)
    if old.shape != matrix.shape:
        raise DataError(f"the weight is {tuple(old.shape)}; it cannot take {tuple(matrix.shape)}.")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_(matrix.T if is_transposed(layer) else matrix.reshape(weight.shape))


def input_matrix(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer takes in, as the columns that its weight matrix meets.

    Args:
        layer: one that `find_layers` finds; a convolution must have one group.
        x: its input, ``(batch, ..., in)``, or ``(batch, channels, ...)`` for a convolution.

    Returns:
        ``(batch, positions, in)``.

    Raises:
        DataError: if it is a grouped convolution, each group of which meets columns of its own.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        if layer.groups != 1:
            raise DataError("a convolution in groups has no single matrix of inputs.")
        return _unfolded(layer, x)
    if x.ndim == 1:
        return x.view(1, 1, -1)
    return x.reshape(len(x), -1, x.shape[-1])


def _unfolded(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution sees, ``(batch, positions, channels * kernel)``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = layer._reversed_padding_repeated_twice  # torch's own order, also for padding="same"
    x = nn.functional.pad(x, padding, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        x = x.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    patches = nn.functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2)


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, wherever the model holds that one.

    Args:
        model: the model, changed in place.
        name: of the module that goes.
        module: the one that comes.

    Raises:
        DataError: if there is no module of that name.
    """
    old = dict(model.named_modules(remove_duplicate=False)).get(name)
    if old is None or not name:
        raise DataError(f"the model has no module {name!r}.")
    for place, found in list(model.named_modules(remove_duplicate=False)):
        if found is old:
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, module)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model: the longest `ModuleList` of modules of one class.

    Args:
        model: any module.

    Returns:
        Names and blocks in order; the model itself, named "", if it has no such list of two or more.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) > 1 and _one_class(module)
        if is_list and (best is None or len(module) > len(best[1])):
            best = name, module
    if best is None:
        return [("", model)]
    prefix = f"{best[0]}." if best[0] else ""
    return [(f"{prefix}{i}", block) for i, block in enumerate(best[1])]


def _one_class(modules: nn.ModuleList) -> bool:
    return len(Counter(type(module) for module in modules)) == 1


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatch(name, pattern)


def _some(names: Sequence[str]) -> str:
    shown = [name for name in names if name][:8]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) + 1 else "")
