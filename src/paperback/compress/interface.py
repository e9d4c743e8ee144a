"""What every compressor does: a trained network in, a smaller one out, and a report of what it cost.

``Method(**settings).compress(model, data, budget)`` copies the model, changes the copy layer by layer, and
measures both on the same batches. A method writes `_compress`, which changes ``job.model`` in place, or, if
it needs no training, only `Streamed.visit`, which is shown one layer at a time with the statistics of what it
takes in.
"""

from __future__ import annotations

import copy
import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.calibration import CACHE_LIMIT, Calibration, Order, stream
from paperback.compress.data import Batches, Data, Loss, Metric, default_loss, evaluate, evaluating
from paperback.compress.report import DENSE_ZEROS, LayerRow, Report, measure
from paperback.compress.statistics import LayerStatistics
from paperback.compress.storage.module import StoredLayer, stored_layers
from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.networks.surgery import (
    HEADS_AND_EMBEDDINGS,
    Found,
    blocks_of,
    find_layers,
    swap,
    weight_matrix,
)
from paperback.study.measure import Stopwatch, peak_memory, reset_peak_memory

Family = Literal["prune", "quantize", "factorize", "distill", "compact", "dynamic"]
NEEDS = ("calibration", "labels", "loss", "training", "validation", "teacher")
REPORT = "report.json"


@dataclass
class Job:
    """One compression while it runs.

    Attributes:
        model: the copy that is changed, in evaluation mode.
        layers: the layers to handle, by name.
        data: batches; None where the method needs none and none were given.
        budget: as the user gave it; None for the method's own settings.
        teacher: a network to imitate; None if not given.
        loss: ``(model, batch) -> scalar``.
        progress: whether bars are shown.
        folder: where an interrupted compression is kept; None for nowhere.
        seed: of everything random.
        extras: what the method hands over beside the model: masks, learned points, histories.
        skipped: layers that are left, and why.
        notes: sentences for the report.
    """

    model: nn.Module
    layers: dict[str, nn.Module]
    data: Data | None
    budget: Budget | None
    teacher: nn.Module | None
    loss: Loss
    progress: bool
    folder: Path | None
    seed: int
    extras: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a sentence to the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def skip(self, name: str, why: str) -> None:
        """Say that a layer is left as it is."""
        self.skipped[name] = why


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed network with its report.

    Attributes:
        model: an ordinary module; a `transformers` model stays one.
        report: sizes, latency and quality, before and after.
        extras: what the method hands over beside the model.
    """

    model: nn.Module
    report: Report
    extras: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Save model and report to a folder; packed weights stay packed.

        A `transformers` model is opened by ``AutoModel...from_pretrained(folder)`` after ``import
        paperback``, and by `load`.

        Args:
            folder: missing, empty, or with an earlier saved model.

        Raises:
            ArtefactError: if the folder holds something else.
        """
        from paperback.compress.storage import save_model

        save_model(self.model, Path(folder), report=self.report.to_json())

    @staticmethod
    def load(folder: str | Path, model: nn.Module | None = None) -> Compressed:
        """Load what `save` wrote. Nothing in the folder is run.

        Args:
            folder: the folder.
            model: a network of the original architecture, whose weights are replaced; not needed for
                `transformers` models and for those that paperback saves itself.

        Returns:
            Model and report; extras are not saved.

        Raises:
            ArtefactError: if the folder is damaged or foreign, or a model is needed and not given.
        """
        return load(folder, model)

    def at(self, budget: Budget) -> nn.Module:
        """The network at another size, for methods whose one training gives many.

        Raises:
            NotSupportedError: if this result has one size only.
        """
        sizes = self.extras.get("at")
        if sizes is None:
            raise NotSupportedError(
                f"this result has one size; call compress again with the budget {budget}."
            )
        network: nn.Module = sizes(budget)
        return network

    def export(self, folder: str | Path) -> int:
        """Save the smallest form: layers whose zeros are worth it become packed sparse ones.

        Args:
            folder: as of `save`.

        Returns:
            Bytes on disk.
        """
        from paperback.compress.storage import pack_zeros, save_model
        from paperback.study.measure import size_on_disk

        packed = pack_zeros(copy.deepcopy(self.model))
        save_model(packed, Path(folder), report=self.report.to_json())
        return size_on_disk(folder)


def load(folder: str | Path, model: nn.Module | None = None) -> Compressed:
    """Load a compressed model and its report; see `Compressed.load`."""
    from paperback.compress.storage import load_model

    path = Path(folder)
    loaded = load_model(path, model)
    try:
        report = Report.from_json((path / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{path / REPORT} is not the report of a compression ({error}).") from error
    return Compressed(loaded, report)


@dataclass(frozen=True)
class Estimate:
    """What a compression will take.

    Attributes:
        memory: bytes at most, beside the original model.
        seconds: about how long on this machine.
        layers: how many layers are handled.
    """

    memory: int
    seconds: float
    layers: int


class Compressor(ABC):
    """A method that makes a trained network smaller or faster.

    A subclass stores its settings in ``__init__`` under their own names, calls ``super().__init__`` and
    writes `_compress`.

    Args:
        targets: parts of names, or patterns, of the layers to handle; all if not given.
        ignore: parts of names, or patterns, of layers that are left; heads and embeddings by default.
        seed: of everything random.

    Attributes:
        family: the class of the method.
        needs: what it needs beside the model.
        tuning_free: whether it works without training.
    """

    family: ClassVar[Family]
    needs: ClassVar[frozenset[str]] = frozenset()
    tuning_free: ClassVar[bool] = True
    budgets: ClassVar[tuple[str, ...]] = ()  # units that `_settle` understands

    def __init__(
        self,
        *,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = HEADS_AND_EMBEDDINGS,
        seed: int = 0,
    ) -> None:
        for name, patterns in (("targets", targets), ("ignore", ignore)):
            if isinstance(patterns, str):
                raise DataError(f"{name} is the text {patterns!r}; give a list of patterns.")
        self.targets = None if targets is None else tuple(targets)
        self.ignore = tuple(ignore)
        self.seed = seed

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self).__init__).parameters
        settings = [
            f"{name}={value!r}"
            for name, parameter in parameters.items()
            if hasattr(self, name) and (value := getattr(self, name)) != parameter.default
        ]
        return f"{type(self).__name__}({', '.join(settings)})"

    # -- what a method writes --------------------------------------------------------------------------------

    @abstractmethod
    def _compress(self, job: Job) -> None:
        """Change ``job.model`` in place."""

    def _settle(self, budget: Budget, layers: Mapping[str, nn.Module], model: nn.Module) -> Self:
        """The method with settings that meet a budget.

        Args:
            budget: one of the units in `budgets`.
            layers: the layers that will be handled.
            model: the model.

        Returns:
            Itself, or a copy with other settings.

        Raises:
            BudgetError: with the range that can be reached.
        """
        raise budget.refuse(type(self).__name__, *self.budgets)

    def _find(self, model: nn.Module) -> Found:
        """Which layers are handled; for methods that handle other kinds."""
        return find_layers(model, self.targets, self.ignore)

    # -- what a user calls -----------------------------------------------------------------------------------

    def compress(
        self,
        model: nn.Module,
        data: Data | Batches | None = None,
        budget: Budget | None = None,
        *,
        teacher: nn.Module | None = None,
        loss: Loss | None = None,
        metric: Metric | None = None,
        inplace: bool = False,
        folder: str | Path | None = None,
        latency_runs: int = 20,
        progress: bool = True,
    ) -> Compressed:
        """Compress a trained network.

        Args:
            model: any module; left as it is unless `inplace`.
            data: batches, see `Data`; bare batches are its training part.
            budget: how small; the method's own settings if not given.
            teacher: a network to imitate, for methods that have one; the original if not given.
            loss: ``(model, batch) -> scalar``; see `data.default_loss`.
            metric: ``(model, batches) -> {name: number}`` to judge by, in place of accuracy or perplexity.
            inplace: change the model itself, which saves the memory of a copy; the agreement with the
                original is then not measured.
            folder: where finished parts are kept while it runs, so that the same call after an interruption
                goes on; nowhere if not given.
            latency_runs: runs of which latency is the median; 0 measures none.
            progress: show bars, if the output is a terminal.

        Returns:
            The compressed network, in evaluation mode, with its report.

        Raises:
            DataError: if the model or the data cannot be used; the layer or the part is named.
            BudgetError: if the budget cannot be met; the range that can is named.
        """
        found = self._checked(model)
        data = self._checked_data(data)
        method = self if budget is None else self._settle(budget, found.layers, model)
        judged = data.judged if data is not None else None
        example = data.example() if data is not None else None
        with evaluating(model):
            rows_before = {
                name: (weight_matrix(layer).numel(), _bytes(layer)) for name, layer in found.layers.items()
            }
            before = measure(model, example, _writer(model), latency_runs)
            quality_before = evaluate(model, data.batches(judged), metric) if data and judged else {}
            changed = model if inplace else copy.deepcopy(model)
        changed.eval()
        layers = {name: changed.get_submodule(name) for name in found.layers}
        job = Job(
            changed, layers, data, budget, teacher, loss or default_loss, progress,
            Path(folder) if folder is not None else None, self.seed, skipped=dict(found.skipped),
        )  # fmt: skip
        reset_peak_memory()
        with Stopwatch() as watch:
            method._compress(job)
            _follow_ties(changed, found)
        peak = peak_memory()
        job.model.eval()
        quality_after = {}
        if data and judged:
            original = None if inplace else model
            quality_after = evaluate(job.model, data.batches(judged), metric, original)
        after = measure(job.model, example, _writer(job.model), latency_runs)
        report = Report(
            method=repr(method),
            budget=str(budget) if budget is not None else "",
            before=before,
            after=after,
            quality_before=quality_before,
            quality_after=quality_after,
            layers=_rows(job, found, rows_before),
            seconds=watch.seconds,
            peak_memory=peak,
            calibration_rows=_count_rows(data),
            threads=torch.get_num_threads(),
            notes=(*job.notes, *_notes_on_size(before, after, job.model)),
        )
        return Compressed(job.model, report, job.extras)

    def check(self, model: nn.Module) -> dict[str, str]:
        """Which layers would be handled, and which not and why, without computing anything.

        Args:
            model: any module.

        Returns:
            Name of each layer with a weight to "handled" or the reason why not.
        """
        found = self._find(model)
        return dict.fromkeys(found.layers, "handled") | found.skipped

    def estimate(self, model: nn.Module, data: Data | Batches | None = None) -> Estimate:
        """About how much memory and time a compression takes; nothing of it is allocated.

        Args:
            model: any module.
            data: as of `compress`.

        Returns:
            Bytes beside the original model, and seconds by the speed of a small product on this machine.
        """
        found = self._find(model)
        given = Data.of(data) if data is not None else None
        tokens = _count_tokens(given)
        memory = _model_bytes(model) + self._working_memory(model, found.layers, tokens)
        return Estimate(memory, self._operations(model, found.layers, tokens) / _speed(), len(found.layers))

    def _working_memory(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> int:
        """Bytes beside a copy of the model; of methods that train, gradients and two moments."""
        return 0 if self.tuning_free else 3 * _model_bytes(model)

    def _operations(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> float:
        """Floating-point operations; by default three passes forward, or as many with gradients."""
        weights = sum(p.numel() for p in model.parameters())
        return (6.0 if self.tuning_free else 18.0) * weights * tokens

    # -- checks ----------------------------------------------------------------------------------------------

    def _checked(self, model: nn.Module) -> Found:
        if not isinstance(model, nn.Module):
            raise DataError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise DataError(f"{name} is on the meta device and has no values; load the weights first.")
            if not bool(torch.isfinite(parameter).all()):
                raise DataError(f"{name} has values that are not finite; mend the model first.")
        found = self._find(model)
        if not found.layers and (stored := stored_layers(model)):
            raise DataError(
                f"the model is compressed already: {len(stored)} layers are packed; bring it back with "
                "compress.storage.to_dense, or compress the original."
            )
        if not found.layers:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(found.skipped.items())[:4])
            raise DataError(
                f"the model has no layer that {type(self).__name__} handles ({reasons or 'no layer at all'})."
            )
        return found

    def _checked_data(self, data: Data | Batches | None) -> Data | None:
        given = Data.of(data) if data is not None else None
        wanted = {"calibration": "train", "training": "train", "labels": "train", "validation": "val"}
        for need in sorted(self.needs & wanted.keys()):
            if given is None or getattr(given, wanted[need]) is None:
                raise DataError(
                    f"{type(self).__name__} needs data for {need}; pass Data({wanted[need]}=...) of batches."
                )
        return given


class Streamed(Compressor):
    """A compressor without training, which is shown one layer at a time.

    A subclass writes `visit`. `statistics` says what it wants to know of a layer's input; empty for methods
    that look at the weights alone, which then need no data.
    """

    statistics: frozenset[str] = frozenset()
    order: Order = "sequential"
    propagate: bool = True
    cache_limit: int = CACHE_LIMIT

    @abstractmethod
    def visit(self, name: str, layer: nn.Module, stats: LayerStatistics) -> nn.Module | None:
        """Compress one layer.

        Args:
            name: of the layer.
            layer: write its weight with `networks.surgery.set_weight_matrix`,
            stats: of its input.

        Returns:
            or give the module that takes its place; None otherwise.
        """

    def visit_block(self, name: str, block: nn.Module, stats: Mapping[str, LayerStatistics]) -> None:
        """Change a block before its layers are visited; for methods that fold scales into norms."""

    def _compress(self, job: Job) -> None:
        self.job = job
        try:
            if not self.statistics:
                for name, layer in job.layers.items():
                    replacement = self.visit(name, layer, LayerStatistics(frozenset()))
                    if replacement is not None:
                        swap(job.model, name, replacement)
                return
            if job.data is None or job.data.train is None:
                raise DataError(f"{type(self).__name__} needs calibration data; pass Data(train=...).")
            folds = type(self).visit_block is not Streamed.visit_block
            how = Calibration(
                self.visit, self.statistics, self.visit_block if folds else None, self.order, self.propagate,
                self.seed, self.cache_limit, job.skip, job.note,
            )  # fmt: skip
            stream(
                job.model, job.layers, job.data, how,
                folder=job.folder, method=repr(self), progress=job.progress,
            )  # fmt: skip
        finally:
            del self.job

    def _working_memory(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> int:
        """One block, the hidden states in memory, and the Gram matrices of one block."""
        widths = [weight_matrix(layer).shape[1] for layer in layers.values()]
        hidden = min(4 * tokens * min(widths, default=0), self.cache_limit)
        block = max((_model_bytes(block) for _, block in blocks_of(model)), default=0)
        grams = 4 * 3 * max(widths, default=0) ** 2 if "gram" in self.statistics else 0
        return hidden + block + grams

    def _operations(self, model: nn.Module, layers: Mapping[str, nn.Module], tokens: int) -> float:
        if not self.statistics:
            return float(sum(100 * weight_matrix(layer).numel() for layer in layers.values()))
        forward = super()._operations(model, layers, tokens)
        if "gram" not in self.statistics:
            return forward
        shapes = [weight_matrix(layer).shape for layer in layers.values()]
        return forward + sum(2.0 * tokens * i**2 + 2.0 * i**3 + 2.0 * o * i**2 for o, i in shapes)


# -- helpers -------------------------------------------------------------------------------------------------


def _writer(model: nn.Module) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from paperback.compress.storage import save_model

        save_model(model, folder, loadable=False)

    return write


def _follow_ties(model: nn.Module, found: Found) -> None:
    """Layers that shared the weight of a layer that was replaced are replaced by the same module."""
    for name, owner in found.tied.items():
        ours, theirs = model.get_submodule(name), model.get_submodule(owner)
        if ours is not theirs and getattr(ours, "weight", None) is not getattr(theirs, "weight", None):
            swap(model, name, theirs)


def _bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() * t.element_size() for t in tensors)


def _model_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _rows(job: Job, found: Found, before: Mapping[str, tuple[int, int]]) -> tuple[LayerRow, ...]:
    rows = []
    present = dict(job.model.named_modules(remove_duplicate=False))
    for name in found.layers:
        weights, bytes_before = before[name]
        layer = present.get(name)
        if layer is None or not (isinstance(layer, StoredLayer) or hasattr(layer, "weight")):
            rows.append(LayerRow(name, weights, 0, bytes_before, 0, "removed"))
            continue
        if isinstance(layer, StoredLayer):
            matrix, what = layer.dense(), layer.kind
        else:
            matrix = weight_matrix(layer)
            what = "dense" if bool(matrix.all()) else "dense, zeros"
        if name in job.skipped:
            what = f"left: {job.skipped[name]}"
        rows.append(LayerRow(name, weights, int(matrix.count_nonzero()), bytes_before, _bytes(layer), what))
    for name, why in job.skipped.items():
        layer = present.get(name)
        if name not in found.layers and isinstance(getattr(layer, "weight", None), Tensor):
            assert layer is not None
            matrix = weight_matrix(layer)
            size = _bytes(layer)
            rows.append(
                LayerRow(name, matrix.numel(), int(matrix.count_nonzero()), size, size, f"left: {why}")
            )
    return tuple(rows)


def _notes_on_size(before: Any, after: Any, model: nn.Module) -> list[str]:
    notes = []
    if after.nonzeros < 0.99 * before.nonzeros and after.bytes_on_disk > 0.99 * before.bytes_on_disk:
        share = 1 - after.nonzeros / after.parameters
        notes.append(f"{share:.0%} of the weights are zeros: {DENSE_ZEROS}; export() writes the packed form.")
    slower = after.latency is not None and before.latency is not None and after.latency > 1.1 * before.latency
    if slower and stored_layers(model):  # packed layers are unpacked in each pass
        notes.append(
            f"A pass takes {after.latency / before.latency:.1f} times as long as before on this machine."
        )
    return notes


def _count_rows(data: Data | None) -> int:
    if data is None or data.train is None:
        return 0
    return sum(len(_first(batch)) for batch in data.batches("train"))


def _count_tokens(data: Data | None) -> int:
    """Rows times positions of the training part."""
    if data is None or data.train is None:
        return 0
    total = 0
    for batch in data.batches("train"):
        first = _first(batch)
        is_ids = first.ndim == 2 and not first.is_floating_point()
        total += first.numel() if is_ids else len(first)
    return total


def _first(batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        return next(value for value in batch.values() if isinstance(value, Tensor))
    first = batch[0] if isinstance(batch, tuple | list) else batch
    assert isinstance(first, Tensor)
    return first


def _speed() -> float:
    """Floating-point operations a second of a small matrix product on this machine."""
    x = torch.ones(256, 256)
    x @ x
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < 0.02:
        x @ x
        runs += 1
    return 2 * 256**3 * runs / (time.perf_counter() - start)
