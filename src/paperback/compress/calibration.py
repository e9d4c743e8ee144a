"""What the layers of a network take in, one block at a time, in bounded memory.

A network of repeated blocks is gone through once. The input of the first block is caught for every
calibration batch; then, block after block, the batches are pushed through the block, statistics of what its
layers take in are gathered in one pass, the layers are compressed, and what the compressed block gives out is
the input of the next. Beside the model, memory holds the hidden states of the calibration batches (on disk,
where they are large) and the statistics of the layers that share one input. Nothing is traced: blocks are
found by name, inputs by hooks.

Other networks are one block. Layers outside the blocks come last, on the whole network.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paperback.compress.data import Batch, Data, run
from paperback.compress.resume import Finished
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError
from paperback.networks.surgery import blocks_of, input_matrix, swap
from paperback.study.progress import Bars
from paperback.training import generator

Order = Literal["sequential", "together"]
Visit = Callable[[str, nn.Module, LayerStatistics], "nn.Module | None"]
VisitBlock = Callable[[str, nn.Module, Mapping[str, LayerStatistics]], None]
Layers = Mapping[str, nn.Module]

CACHE_LIMIT = 2**30  # bytes of hidden states in memory; what is beyond lies on disk


class _Stop(Exception):
    """Ends a forward pass that has shown all it was run for."""


@dataclass(frozen=True)
class Calibration:
    """How a model is gone through.

    Attributes:
        visit: called once a layer with its name, the layer and the statistics of its input; it writes the
            weight in place, or gives the module that takes the layer's place.
        statistics: which are gathered, see `LayerStatistics`; may be empty.
        visit_block: called before the visits of a block with its name, the block, and the statistics of all
            its layers, which are then gathered in a pass of their own.
        order: "sequential" goes through the layers of a block as they are called, those with one input
            together (query, key and value; then the output; then the feed-forward ones), each seeing what
            the compressed ones before it give out; "together" gathers a whole block in one pass.
        propagate: the compressed blocks feed the next; False keeps the inputs of the original model.
        seed: of the tokens that are kept as a sample.
        cache_limit: bytes of hidden states that stay in memory.
        skip: told the name of a layer that is left, and why.
        note: told sentences for the report.
    """

    visit: Visit
    statistics: frozenset[str]
    visit_block: VisitBlock | None = None
    order: Order = "sequential"
    propagate: bool = True
    seed: int = 0
    cache_limit: int = CACHE_LIMIT
    skip: Callable[[str, str], None] = field(default=lambda name, why: None)
    note: Callable[[str], None] = field(default=lambda text: None)


@torch.no_grad()
def stream(
    model: nn.Module,
    layers: Layers,
    data: Data,
    how: Calibration,
    *,
    folder: Path | None = None,
    method: str = "",
    progress: bool = True,
) -> None:
    """Compress the layers of a model block by block, each from what it takes in.

    Args:
        model: changed in place; in evaluation mode.
        layers: the layers to visit, by name.
        data: its training part calibrates.
        how: what is gathered, and what is done with it.
        folder: where finished blocks are kept, so that an interrupted call goes on from there; nowhere if not
            given. It is emptied at the end.
        method: name and settings of the method; a folder that was begun with others is refused.
        progress: show a bar, if the output is a terminal.

    Raises:
        DataError: if the data have no batch, or a statistic is not finite (the layer is named).
        ArtefactError: if the folder belongs to another model, method or data.
    """
    blocks = _chained_blocks(model, data, how)
    inside = [(name, block, _layers_within(layers, name)) for name, block in blocks]
    outside = {name: layer for name, layer in layers.items() if all(name not in mine for *_, mine in inside)}
    finished = Finished(folder, model, data, method)
    bars = Bars(progress)
    with ExitStack() as stack:
        if inside:
            hidden = stack.enter_context(_HiddenStates(model, inside[0][1], data, how.cache_limit))
        for name, block, mine in bars.track(inside, "compressing block"):
            original = block if how.propagate else copy.deepcopy(block)
            if mine and not finished.restore(name, block):
                _compress_block(model, name, block, mine, partial(hidden.passes, block), how)
                finished.keep(name, block)
            hidden.replace(block if how.propagate else original)
    if outside and not finished.restore("", model):
        for _ in bars.track([None], "compressing the layers outside the blocks" if inside else "compressing"):
            _compress_block(model, "", model, outside, partial(_whole_passes, model, data), how)
    finished.discard()


# -- one block -----------------------------------------------------------------------------------------------

Pass = tuple[Callable[[], object], "Tensor | None"]  # runs one batch; its attention mask
Passes = Callable[[], Iterator[Pass]]


def _compress_block(
    model: nn.Module, name: str, block: nn.Module, layers: Layers, passes: Passes, how: Calibration
) -> None:
    """Gather and visit the layers of one block, group after group."""
    groups = _groups_by_input(layers, passes, how)
    if how.visit_block is not None:
        how.visit_block(name, block, _gather(groups, passes, how))
    steps = [[group] for group in groups] if how.order == "sequential" else [groups]
    for step in steps:
        statistics = _gather(step, passes, how) if how.statistics else {}
        for layer_name in (layer_name for group in step for layer_name in group.layers):
            given = statistics.get(layer_name, LayerStatistics(frozenset()))
            replacement = how.visit(layer_name, layers[layer_name], given)
            if replacement is not None:
                swap(model, layer_name, replacement)


@dataclass(frozen=True)
class _Group:
    """Layers that take in one tensor; `once` if each is called a single time in a pass."""

    layers: tuple[str, ...]
    first: nn.Module
    once: bool


def _groups_by_input(layers: Layers, passes: Passes, how: Calibration) -> list[_Group]:
    """The layers in the order of their calls, those with the same input together; from one pass."""
    calls: dict[str, list[Tensor]] = {name: [] for name in layers}  # tensors are held, so that ids stay true
    order: list[str] = []

    def note_call(name: str, x: Tensor) -> None:
        calls[name].append(x)
        order.append(name)

    with _hooked(layers, note_call):
        next(passes())[0]()
    groups: dict[int, list[str]] = {}
    for name in dict.fromkeys(order):
        groups.setdefault(id(calls[name][0]) if len(calls[name]) == 1 else -len(groups) - 1, []).append(name)
    for name, layer in layers.items():
        if not calls[name]:
            how.skip(name, "no calibration token reached it")
        elif getattr(layer, "groups", 1) != 1 and how.statistics:
            how.skip(name, "the inputs of a convolution in groups are not gathered")
    result = []
    for names in groups.values():
        usable = [n for n in names if getattr(layers[n], "groups", 1) == 1 or not how.statistics]
        # Convolutions with one input may see it through different kernels.
        shared = [n for n in usable if not isinstance(layers[n], nn.Conv1d | nn.Conv2d)]
        parts = [shared] * bool(shared) + [[n] for n in usable if n not in shared]
        result += [_Group(tuple(part), layers[part[0]], len(calls[part[0]]) == 1) for part in parts]
    return result


def _gather(groups: list[_Group], passes: Passes, how: Calibration) -> dict[str, LayerStatistics]:
    """Statistics of each group's input, over all batches."""
    statistics = {
        group.layers[0]: LayerStatistics(how.statistics, generator(how.seed, group.layers[0]))
        for group in groups
    }
    mask: Tensor | None = None
    waiting = 0
    stops = all(group.once for group in groups)  # a pass may end when every group was seen

    def update(name: str, x: Tensor) -> None:
        nonlocal waiting
        statistics[name].update(input_matrix(watched[name], x), mask)
        waiting -= 1
        if waiting == 0 and stops:
            raise _Stop

    watched = {group.layers[0]: group.first for group in groups}
    with _hooked(watched, update):
        for forward, of_batch in passes():
            mask, waiting = of_batch, len(watched)
            with suppress(_Stop):
                forward()
    for name, gathered in statistics.items():
        gathered.check_finite(name)
    return {name: statistics[group.layers[0]] for group in groups for name in group.layers}


class _hooked:
    """Inside this context a function is told the first tensor that each layer takes in."""

    def __init__(self, layers: Layers, tell: Callable[[str, Tensor], None]) -> None:
        def hook(name: str) -> Callable[..., None]:
            return lambda _, args, kwargs: tell(name, _first_tensor(args, kwargs))

        self._handles = [
            layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor))


# -- the blocks of a model -----------------------------------------------------------------------------------


def _chained_blocks(model: nn.Module, data: Data, how: Calibration) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a model whose hidden states go from each to the next; none otherwise."""
    blocks = blocks_of(model)
    if len(blocks) == 1:
        return []
    seen: list[tuple[int, Tensor, list[Any]]] = []  # block, hidden state, the other arguments
    given: list[Tensor] = []

    def before(index: int) -> Callable[..., None]:
        return lambda _, args, kwargs: seen.append((index, *_split(args, kwargs)))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        given.append(_hidden_of(output))

    handles = [
        block.register_forward_pre_hook(before(i), with_kwargs=True) for i, (_, block) in enumerate(blocks)
    ]
    handles += [block.register_forward_hook(after) for _, block in blocks]
    try:
        run(model, next(data.batches("train")))
    finally:
        for handle in handles:
            handle.remove()
    in_order = [index for index, *_ in seen] == list(range(len(blocks)))
    chained = in_order and all(seen[i + 1][1] is given[i] for i in range(len(blocks) - 1))
    if chained and all(_equal(entry[2], seen[0][2]) for entry in seen):
        return blocks
    how.note(
        "Its blocks do not simply feed one another, so the whole model was calibrated at once and memory "
        "holds more than one block."
    )
    return []


def _layers_within(layers: Layers, block: str) -> dict[str, nn.Module]:
    return {name: layer for name, layer in layers.items() if name == block or name.startswith(f"{block}.")}


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
    """The hidden state, which comes first, and everything else."""
    hidden = _first_tensor(args, kwargs)
    return hidden, [leaf for leaf in tree_leaves((args, dict(kwargs))) if leaf is not hidden]


def _hidden_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _equal(ours: list[Any], theirs: list[Any]) -> bool:
    if len(ours) != len(theirs):
        return False
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def _mask_of(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _whole_passes(model: nn.Module, data: Data) -> Iterator[Pass]:
    for batch in data.batches("train"):
        yield lambda batch=batch: run(model, batch), _mask_of(batch)  # type: ignore[misc]


class _HiddenStates:
    """The calibration batches as they enter a block; a context, whose files go at its end.

    Args:
        model: the whole model.
        first: its first block.
        data: whose training part is run up to that block.
        limit: bytes in memory.
    """

    def __init__(self, model: nn.Module, first: nn.Module, data: Data, limit: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paperback-hidden-")
        self._limit = limit
        self._bytes = 0
        self._states: list[Tensor] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], str | None]] = []
        self._masks: list[Tensor | None] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._catch(args, kwargs)
            raise _Stop

        handle = first.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in data.batches("train"):
                try:
                    run(model, batch)
                except _Stop:
                    self._masks.append(_mask_of(batch))
        finally:
            handle.remove()

    def __enter__(self) -> _HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        self._states.clear()  # their files are mapped into memory
        self._folder.cleanup()

    def _catch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, others = _split(args, kwargs)
        if args and args[0] is hidden:
            call: tuple[tuple[Any, ...], dict[str, Any], str | None] = (args[1:], kwargs, None)
        else:
            name = next((k for k, v in kwargs.items() if v is hidden), None)
            if name is None:
                raise DataError("the hidden state of the blocks is neither their first argument nor named.")
            call = args, {k: v for k, v in kwargs.items() if k != name}, name
        if self._calls and _equal(others, tree_leaves((self._calls[-1][0], self._calls[-1][1]))):
            call = self._calls[-1]  # masks and rotary tables are kept once
        self._calls.append(call)
        self._states.append(self._placed(hidden))

    def _placed(self, hidden: Tensor) -> Tensor:
        """A copy in memory, or in a file once memory holds as much as it may."""
        size = hidden.numel() * hidden.element_size()
        if self._bytes + size <= self._limit:
            self._bytes += size
            return hidden.clone()
        path = f"{self._folder.name}/{len(self._states)}.bin"
        mapped = torch.from_file(path, shared=True, size=hidden.numel(), dtype=hidden.dtype)
        return mapped.view(hidden.shape).copy_(hidden)

    def _run(self, block: nn.Module, index: int) -> Tensor:
        args, kwargs, name = self._calls[index]
        device = next((p.device for p in block.parameters()), torch.device("cpu"))
        state = self._states[index].to(device)
        return _hidden_of(
            block(state, *args, **kwargs) if name is None else block(*args, **kwargs, **{name: state})
        )

    def passes(self, block: nn.Module) -> Iterator[Pass]:
        """One pass of the block over each batch."""
        for index, mask in enumerate(self._masks):
            yield lambda index=index: self._run(block, index), mask  # type: ignore[misc]

    def replace(self, block: nn.Module) -> None:
        """What the block gives out takes the place of what it takes in."""
        for index, state in enumerate(self._states):
            state.copy_(self._run(block, index))
