"""From a dense network to its sparse twin and back: other classes around the same weights.

`dense_to_sparse` walks the modules and gives each layer a class that knows masks; parameters, buffers,
settings and state-dict names stay those of the dense network, and are shared with it: training one trains
the other. A class derived from one of torch's layers keeps its own forward pass inside the twin.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import NotSupportedError
from paperback.networks.pyramid import LayerNorm2d
from paperback.represent.spark import layers
from paperback.represent.spark.context import Slot, SparseContext
from paperback.represent.spark.masking import random_mask

Network = TypeVar("Network", bound=nn.Module)

TWINS: dict[type[nn.Module], type[layers.Sparse]] = {
    nn.Conv2d: layers.SparseConv2d,
    nn.MaxPool2d: layers.SparseMaxPool2d,
    nn.AvgPool2d: layers.SparseAvgPool2d,
    nn.AdaptiveAvgPool2d: layers.SparseAdaptiveAvgPool2d,
    nn.BatchNorm2d: layers.SparseBatchNorm2d,
    nn.SyncBatchNorm: layers.SparseSyncBatchNorm,
    nn.LayerNorm: layers.SparseLayerNorm,
    LayerNorm2d: layers.SparseLayerNorm2d,
    nn.GroupNorm: layers.SparseGroupNorm,
    nn.InstanceNorm2d: layers.SparseInstanceNorm2d,
    nn.Linear: layers.SparseLinear,
}
DERIVED: dict[type[nn.Module], type[nn.Module]] = {}  # made when a subclass is first met
POSITIVE_AT_ZERO = (nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)  # functions of single values with f(0) != 0
ZERO_AT_ZERO = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Tanh, nn.Tanhshrink, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten,
    nn.LocalResponseNorm,
)  # fmt: skip
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# These take the mean of a map in their own forward pass, where no walk over modules sees it.
POOLING_INSIDE = (
    "SqueezeExcite",
    "SEModule",
    "EffectiveSEModule",
    "EcaModule",
    "CecaModule",
    "GlobalContext",
)


def dense_to_sparse(module: Network) -> Network:
    """The sparse twin of a network, around the same parameters and buffers.

    Args:
        module: a convolutional network; it stays as it is.

    Returns:
        A network of the same structure, which runs inside ``with SparseContext(mask).on(network)``.

    Raises:
        NotSupportedError: naming every layer that has no sparse twin.
    """
    names = unsupported(module)
    if names:
        raise NotSupportedError(
            f"these layers have no sparse twin: {', '.join(names)}; replace or remove them, or train with "
            "sparse=False."
        )

    def twin(m: nn.Module) -> type[nn.Module] | None:
        return None if isinstance(m, layers.Sparse) else _twin_class(type(m))

    made = _rebuilt(module, twin, {})
    for norm in _norms_after_convolutions(made):
        norm.owns_input = True
    return made


def _norms_after_convolutions(network: nn.Module) -> list[layers.ActiveNorm]:
    """Batch norms that alone read what a convolution gives: its successors in a `Sequential`, and those that
    a block names in ``norm_after``, convolution to norm.
    """
    found = []
    for block in network.modules():
        children = dict(block.named_children())
        names = list(children)
        pairs = dict(getattr(block, "norm_after", {}))
        if type(block) is nn.Sequential:
            pairs |= dict(itertools.pairwise(names))
        for first, second in pairs.items():
            norm = children.get(second)
            if isinstance(children.get(first), layers.SparseConv2d) and isinstance(norm, layers.ActiveNorm):
                found.append(norm)
    return found


def sparse_to_dense(module: Network) -> Network:
    """The dense network of a sparse twin, around the same parameters and buffers.

    Args:
        module: what `dense_to_sparse` made; it stays as it is.

    Returns:
        An ordinary network without masks.
    """
    return _rebuilt(module, lambda m: _dense_class(type(m)) if isinstance(m, layers.Sparse) else None, {})


def unsupported(module: nn.Module) -> list[str]:
    """Layers without a sparse twin, each as "name (class)"."""
    found = []
    for name, m in module.named_modules():
        kind = type(m)
        inside = kind.__name__ in POOLING_INSIDE or isinstance(m, nn.MultiheadAttention)
        foreign = kind.__module__.startswith("torch.nn.modules") and not isinstance(
            m, (*TWINS, *POSITIVE_AT_ZERO, *ZERO_AT_ZERO, *CONTAINERS)
        )
        several = isinstance(m, nn.MaxPool2d) and m.return_indices
        local = isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size not in (1, (1, 1))
        tracked = isinstance(m, nn.InstanceNorm2d) and m.track_running_stats
        if inside or foreign or several or local or tracked:
            found.append(f"{name or 'the network'} ({kind.__name__})")
    return found


@torch.no_grad()
def check_active_set(
    sparse: nn.Module,
    maps_of: Callable[[Tensor], list[Tensor]],
    images: Float[Tensor, "n c h w"],
    stride: int,
) -> None:
    """Run a sparse network once and see that its maps are zero at inactive positions.

    What happens outside of modules (a bias added by hand, `F.avg_pool2d`) has no twin; this finds it out.

    Args:
        sparse: the network.
        maps_of: images to feature maps, by that network.
        images: two images or more, of the size that will be used.
        stride: pixels of a cell of the mask.

    Raises:
        NotSupportedError: if something reached a masked position.
    """
    grid = (images.shape[-2] // stride, images.shape[-1] // stride)
    if grid == (1, 1):
        return  # one cell, which is never masked
    mask = random_mask(len(images), grid, 0.5, torch.Generator().manual_seed(0)).to(images.device)
    context = SparseContext(mask)
    with context.on(sparse):
        maps = maps_of(context.hide(images))
    for i, found in enumerate(maps):
        outside = 1 - context.at(*found.shape[-2:])
        if (found * outside).any():
            raise NotSupportedError(
                f"feature map {i + 1} of the backbone is not zero at masked positions: its forward "
                "pass does something outside of modules (a function of torch.nn.functional, a bias added by "
                "hand); write it as modules, or train with sparse=False."
            )


# -- classes and copies --------------------------------------------------------------------------------------


def _twin_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The sparse class for a dense one: ready-made, derived for a subclass, or None where none is needed."""
    if cls in TWINS:
        return TWINS[cls]
    behaviour: type[layers.Sparse] | None = None
    if issubclass(cls, POSITIVE_AT_ZERO):
        behaviour = layers.MaskedActivation
    for dense, sparse in TWINS.items():
        if issubclass(cls, dense):
            behaviour = sparse.__bases__[0]
    if behaviour is None:
        return None
    return DERIVED.setdefault(cls, type(f"Sparse{cls.__name__}", (behaviour, cls), {}))


def _dense_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a twin was made from: its bases are a behaviour and that."""
    return cls.__bases__[1]


def _rebuilt(
    module: Network, change: Callable[[nn.Module], type[nn.Module] | None], done: dict[int, nn.Module]
) -> Network:
    """A copy of the tree of modules, some in another class, around the same tensors."""
    if id(module) in done:
        return done[id(module)]  # type: ignore[return-value]
    cls = change(module) or type(module)
    made = object.__new__(cls)
    done[id(module)] = made
    state = {key: copy.copy(value) if key.startswith("_") and isinstance(value, dict) else value
             for key, value in vars(module).items()}  # fmt: skip
    vars(made).update(state)
    vars(made).pop("slot", None)
    vars(made).pop("owns_input", None)
    if issubclass(cls, layers.Sparse):
        vars(made)["slot"] = Slot()
    made._modules = {
        name: None if child is None else _rebuilt(child, change, done)
        for name, child in module._modules.items()
    }
    return made  # type: ignore[return-value]
