"""Masks beside the weights: a network computes with W ⊙ B while W stays as it is.

The masks are parametrizations of torch, so that any number of masks can take turns on one set of weights
without a copy of it, and `remove_masks` gives the dense network back bit for bit. The methods that learn a
mask train through them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from paperback.errors import DataError
from paperback.networks.surgery import is_transposed, set_weight_matrix, weight_matrix


class MaskedWeight(nn.Module):
    """A weight with a mask in front of it.

    Args:
        transposed: whether the weight is stored as (in, out).

    Attributes:
        mask: ``(out, in)``, bool, or real numbers that are trained; None lets the weight through as it is.
    """

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.mask: Tensor | None = None

    def forward(self, weight: Tensor) -> Tensor:
        """W ⊙ B in the weight's own shape and precision."""
        if self.mask is None:
            return weight
        mask = self.mask.T if self.transposed else self.mask.view(weight.shape)
        return weight * mask.to(weight)


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Let layers compute with masked weights; the weights are neither changed nor copied.

    Args:
        model: its layers are changed in place; masks that they had before are replaced.
        masks: name of a layer to its mask, ``(out, in)``, bool (a convolution's unfolded, see
            `networks.surgery.weight_matrix`).

    Returns:
        The model.

    Raises:
        DataError: if there is no such layer, or a mask does not fit its weight.
    """
    modules = dict(model.named_modules())
    fitting: list[tuple[nn.Module, Tensor]] = []
    for name, mask in masks.items():
        layer = modules.get(name)
        if layer is None or not isinstance(getattr(layer, "weight", None), Tensor):
            raise DataError(f"the model has no layer {name!r} with a weight; these masks are of another one.")
        shape = _original_matrix(layer).shape
        if mask.dtype != torch.bool or mask.shape != shape:
            raise DataError(
                f"the mask of {name} is {tuple(mask.shape)} {mask.dtype}; its weight needs "
                f"{tuple(shape)} bool."
            )
        fitting.append((layer, mask))
    for layer, mask in fitting:  # only now, so that an error leaves the model as it was
        _masked_weight(layer).mask = mask.to(layer.weight.device)  # type: ignore[arg-type]
    return model


def remove_masks(model: nn.Module, *, fold: bool = False) -> nn.Module:
    """Take all masks off.

    Args:
        model: changed in place.
        fold: write zeros into the weights where a mask is 0; otherwise the dense weights are back.

    Returns:
        The model, with ordinary layers.
    """
    masks = {}
    for layer in model.modules():
        found = _found(layer)
        if found is not None:
            masks[layer] = found.mask
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    if fold:
        for layer, mask in masks.items():
            if mask is not None:
                write_masked(layer, mask)
    return model


@contextmanager
def masking(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, MaskedWeight]]:
    """Inside this context each layer has a mask in front of its weight; afterwards it has its weight again.

    Args:
        layers: by name. Layers that share one weight share its mask.

    Yields:
        The place of each layer's mask, by name.
    """
    by_weight: dict[int, MaskedWeight] = {}
    places: dict[str, MaskedWeight] = {}
    try:
        for name, layer in layers.items():
            shared = by_weight.get(id(layer.weight))
            key = id(layer.weight)
            places[name] = by_weight[key] = _masked_weight(layer, shared)
        yield places
    finally:
        for name in places:
            parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=False)


@contextmanager
def asking(parameters: Iterable[Tensor], wanted: bool = True) -> Iterator[None]:
    """Inside this context parameters ask for gradients, or do not; afterwards as before."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def write_masked(layer: nn.Module, mask: Tensor) -> None:
    """Set a layer's weights to 0 where the mask, ``(out, in)``, is 0; the others stay bit for bit."""
    matrix = weight_matrix(layer)
    set_weight_matrix(layer, torch.where(mask.bool().to(matrix.device), matrix, torch.zeros_like(matrix)))


def _found(layer: nn.Module) -> MaskedWeight | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    first = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]
    return first if isinstance(first, MaskedWeight) else None


def _masked_weight(layer: nn.Module, shared: MaskedWeight | None = None) -> MaskedWeight:
    """The place of a layer's mask; it is made if there is none."""
    found = _found(layer)
    if found is None:
        found = shared or MaskedWeight(is_transposed(layer))
        parametrize.register_parametrization(layer, "weight", found, unsafe=True)
    return found


def _original_matrix(layer: nn.Module) -> Tensor:
    """The dense weight behind a mask, ``(out, in)``."""
    found = _found(layer)
    if found is None:
        return weight_matrix(layer)
    weight: Tensor = layer.parametrizations.weight.original.detach()  # type: ignore[union-attr, operator]
    return weight.T if found.transposed else weight.flatten(1)
