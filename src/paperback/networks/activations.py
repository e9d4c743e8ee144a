"""The activations of any module, by hooks, in chunks.

The model is run as it is, without gradients and without tracing it; what chosen layers take in or give out
is copied batch by batch into one tensor per layer. What would not fit into memory lies on disk in half
precision.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperback.errors import DataError

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Layers = Sequence[str] | type[nn.Module] | tuple[type[nn.Module], ...] | None

MEMORY_LIMIT = 2**30  # bytes of activations that are kept in memory


def collect_activations(
    model: nn.Module,
    x: Inputs,
    layers: Layers = None,
    *,
    batch_size: int = 256,
    pre: bool = False,
    training: bool = False,
    dtype: torch.dtype | None = None,
    memory_limit: int = MEMORY_LIMIT,
    folder: str | Path | None = None,
) -> dict[str, Tensor]:
    """What the layers of a model give out, or take in, for every row of the input.

    Args:
        model: any module; it is run without gradients, batch by batch, on the device it is on. Afterwards it
            is as before: the training flag of every part, and no hook left.
        x: the input, ``(rows, ...)``; or several, for a model of several arguments; or by keyword.
        layers: names as `model.named_modules` has them, ``""`` for the model itself; or module types, for all
            modules of these types; if not given, every module without children.
        batch_size: rows of one forward pass, >= 1.
        pre: take what goes into each layer, its first tensor, in place of what comes out. Of an activation
            module that is the pre-activation; of a Linear layer after a functional activation, the
            activation.
        training: run the model in training mode (dropout draws from torch's global random numbers; the
            running statistics of normalisation layers move) in place of evaluation mode.
        dtype: of the result; if not given, that of the activations in memory and float16 on disk.
        memory_limit: bytes; when all activations together need more, they lie on disk, memory-mapped, in a
            file without a name that vanishes with the tensors.
        folder: where that file lies; the system's folder for temporary files if not given.

    Returns:
        By name, in the order of the first calls: ``(rows, ...)`` on the CPU. A module that is called several
        times in one pass has the further calls as ``name#2``, ``name#3``.

    Raises:
        DataError: if the input has no rows or its parts differ in rows, a layer does not exist, is not
            called or does not keep the batch in its first dimension, or a value does not fit into `dtype`.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
    rows = _count_rows(x)
    chosen = _choose(model, layers)
    device = next((p.device for p in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    result: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    with _watched(model, chosen, pre, seen), _mode(model, training), torch.no_grad():
        for start in range(0, rows, batch_size):
            stop = min(start + batch_size, rows)
            seen.clear()
            _run(model, x, slice(start, stop), device)
            if start == 0:
                _check_called(chosen, seen, stop)
                result = _allocate(seen, rows, dtype, memory_limit, folder)
            _copy(seen, result, slice(start, stop))
    return result


# -- what goes in --------------------------------------------------------------------------------------------


def _count_rows(x: Inputs) -> int:
    parts = [x] if isinstance(x, Tensor) else list(x.values()) if isinstance(x, Mapping) else list(x)
    if not parts or not all(isinstance(part, Tensor) and part.ndim > 0 for part in parts):
        raise DataError(
            "x must be a tensor (rows, ...), several of them, or a mapping from argument to tensor."
        )
    rows = {len(part) for part in parts}
    if len(rows) > 1 or rows == {0}:
        raise DataError(f"the parts of x have {sorted(rows)} rows; give equally many, at least one.")
    return rows.pop()


def _choose(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if layers is None:
        chosen = {name: module for name, module in modules.items() if not any(module.children())}
    elif isinstance(layers, type) or (layers and all(isinstance(layer, type) for layer in layers)):
        kinds = (layers,) if isinstance(layers, type) else tuple(layers)
        chosen = {name: module for name, module in modules.items() if isinstance(module, kinds)}  # type: ignore[arg-type]
        if not chosen:
            raise DataError(f"layers asks for {layers}; the model has no module of such a type.")
    else:
        aliases = dict(model.named_modules(remove_duplicate=False))
        unknown = [name for name in layers if name not in aliases]
        if unknown:
            raise DataError(f"layers names {unknown[0]!r}; the model has {', '.join(map(repr, modules))}.")
        chosen = {name: aliases[name] for name in layers}
    if not chosen:
        raise DataError("layers is empty; name at least one layer.")
    return chosen


def _run(model: nn.Module, x: Inputs, rows: slice, device: torch.device) -> None:
    if isinstance(x, Tensor):
        model(x[rows].to(device))
    elif isinstance(x, Mapping):
        model(**{name: part[rows].to(device) for name, part in x.items()})
    else:
        model(*(part[rows].to(device) for part in x))


# -- what comes out ------------------------------------------------------------------------------------------


@contextmanager
def _watched(
    model: nn.Module, chosen: Mapping[str, nn.Module], pre: bool, seen: dict[str, Tensor]
) -> Iterator[None]:
    """Inside this context every call of a chosen layer leaves its tensor in `seen`."""

    def keep(name: str, carrier: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(carrier) if isinstance(leaf, Tensor)]
        calls = 1
        while (key := name if calls == 1 else f"{name}#{calls}") in seen:
            calls += 1
        if tensors:  # a copy: an in-place module, such as ReLU(inplace=True), may overwrite it later
            seen[key] = tensors[0].detach().clone()

    def before(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda _, args, kwargs: keep(name, (args, kwargs))

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda _, args, output: keep(name, output)

    handles = []
    try:
        for name, module in chosen.items():
            if pre:
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, flag in before:
            module.training = flag


def _check_called(chosen: Mapping[str, nn.Module], seen: Mapping[str, Tensor], rows: int) -> None:
    for name in chosen:
        if name not in seen:
            raise DataError(f"layer {name!r} was not called, or gave no tensor; leave it out of layers.")
    for name, tensor in seen.items():
        if tensor.ndim == 0 or len(tensor) != rows:
            raise DataError(
                f"layer {name!r} has shape {tuple(tensor.shape)} for {rows} rows; only layers with the batch "
                "in their first dimension can be collected."
            )


def _allocate(
    seen: Mapping[str, Tensor], rows: int, dtype: torch.dtype | None, limit: int, folder: str | Path | None
) -> dict[str, Tensor]:
    """Room for all rows: in memory, or one memory-mapped file for all layers."""

    def kind(tensor: Tensor, floating: torch.dtype | None) -> torch.dtype:
        return floating if floating is not None and tensor.is_floating_point() else tensor.dtype

    def size(floating: torch.dtype | None) -> dict[str, int]:
        return {name: rows * math.prod(t.shape[1:]) * kind(t, floating).itemsize for name, t in seen.items()}

    if sum(size(dtype).values()) <= limit:
        return {n: torch.empty(rows, *t.shape[1:], dtype=kind(t, dtype)) for n, t in seen.items()}
    dtype = torch.float16 if dtype is None else dtype
    result = {}
    for name, n_bytes in size(dtype).items():
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps the file, which has no name
            room = np.memmap(file, np.uint8, "w+", shape=(max(n_bytes, 1),))
        shape = (rows, *seen[name].shape[1:])
        result[name] = torch.from_numpy(room)[:n_bytes].view(kind(seen[name], dtype)).view(shape)
    return result


def _copy(seen: Mapping[str, Tensor], result: Mapping[str, Tensor], rows: slice) -> None:
    if seen.keys() != result.keys():
        changed = sorted(seen.keys() ^ result.keys())
        raise DataError(f"layer {changed[0]!r} is called in some batches only; leave it out of layers.")
    for name, tensor in seen.items():
        room = result[name][rows]
        if room.shape != tensor.shape:
            raise DataError(
                f"layer {name!r} has shape {tuple(tensor.shape)} in one batch and {tuple(room.shape)} in "
                "another; only layers of one shape can be collected."
            )
        room.copy_(tensor)
        if room.dtype != tensor.dtype and (room.isinf() & ~tensor.isinf().cpu()).any():
            raise DataError(
                f"layer {name!r} reaches {float(tensor.abs().max()):.3g}, too large for {room.dtype}; "
                "ask for dtype=torch.float32."
            )
