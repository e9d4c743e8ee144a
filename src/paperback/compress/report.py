"""What a compression cost and kept: sizes really written, operations, latency, quality, layer by layer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paperback.compress.data import Batch, evaluating, run
from paperback.compress.storage.module import StoredLayer
from paperback.study.measure import flops, size_on_disk
from paperback.study.wording import number, size

DENSE_ZEROS = "no size or speed gain in dense storage"


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after.

    Attributes:
        name: of the layer.
        weights: numbers of its weight before.
        nonzeros: numbers that are not zero in the weight that it now computes with.
        bytes_before: of its tensors before.
        bytes_after: of the tensors that are stored now, packed where they are packed.
        what: what became of it: "dense", "dense, zeros", or the kind of storage; "left: ..." for a layer
            that was left, with the reason.
    """

    name: str
    weights: int
    nonzeros: int
    bytes_before: int
    bytes_after: int
    what: str


@dataclass(frozen=True)
class Size:
    """How large and how fast a model is on this machine.

    Attributes:
        parameters: parameters, shared ones once; packed weights count as the numbers they stand for.
        nonzeros: those that are not zero.
        bytes_in_memory: of all its tensors.
        bytes_on_disk: of the files that were really written.
        flops: of one pass over the example; None without an example.
        latency: seconds of one pass over one row of the example, the median; None where not measured.
        latency_p90: the ninth decile of the same runs.
        latency_batch: the median over 8 rows.
    """

    parameters: int
    nonzeros: int
    bytes_in_memory: int
    bytes_on_disk: int
    flops: int | None = None
    latency: float | None = None
    latency_p90: float | None = None
    latency_batch: float | None = None


@dataclass(frozen=True)
class Report:
    """What a compression did.

    Attributes:
        method: name and settings.
        budget: in words; empty if none was given.
        before: the model as it came.
        after: the model that came out.
        quality_before: by name, on the same batches; empty without a test or validation part.
        quality_after: likewise, with the agreement of the most likely classes.
        layers: one row a layer.
        seconds: of the compression itself.
        peak_memory: bytes of this process at most during the compression.
        calibration_rows: rows of batches that it was calibrated or trained on in one pass; 0 without.
        threads: of torch while latency was measured.
        notes: what else there is to say, one sentence each.
    """

    method: str
    budget: str
    before: Size
    after: Size
    quality_before: dict[str, float]
    quality_after: dict[str, float]
    layers: tuple[LayerRow, ...]
    seconds: float
    peak_memory: int
    calibration_rows: int = 0
    threads: int = 1
    notes: tuple[str, ...] = field(default=())

    @property
    def ratio(self) -> float:
        """Bytes on disk after over before."""
        return self.after.bytes_on_disk / self.before.bytes_on_disk

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        values = json.loads(text)
        values["before"], values["after"] = Size(**values["before"]), Size(**values["after"])
        values["layers"] = tuple(LayerRow(**row) for row in values["layers"])
        values["notes"] = tuple(values["notes"])
        return cls(**values)

    def to_markdown(self) -> str:
        """The report as two tables and its notes."""
        rows: list[tuple[str, ...]] = [("", "before", "after"), ("---", "---:", "---:")]
        rows += [
            ("parameters", f"{self.before.parameters:,}", f"{self.after.parameters:,}"),
            ("non-zero", f"{self.before.nonzeros:,}", f"{self.after.nonzeros:,}"),
            ("in memory", size(self.before.bytes_in_memory), size(self.after.bytes_in_memory)),
            ("on disk", size(self.before.bytes_on_disk), size(self.after.bytes_on_disk)),
        ]
        if self.before.flops is not None and self.after.flops is not None:
            rows.append(("operations of a pass", f"{self.before.flops:,}", f"{self.after.flops:,}"))
        for label, name in (
            ("latency, one row", "latency"),
            ("90 % of runs within", "latency_p90"),
            ("latency, 8 rows", "latency_batch"),
        ):
            pair = getattr(self.before, name), getattr(self.after, name)
            if None not in pair:
                rows.append((label, *(f"{value * 1000:.3g} ms" for value in pair)))
        for name, value in self.quality_after.items():
            old = self.quality_before.get(name)
            rows.append((name, "" if old is None else number(old, 4), number(value, 4)))
        lines = [f"**{self.method}**" + (f", budget {self.budget}" if self.budget else ""), ""]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [
            "",
            "| layer | weights | non-zero | bytes before | after | |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
        ]
        lines += [
            f"| {row.name} | {row.weights:,} | {row.nonzeros:,} | {row.bytes_before:,} | {row.bytes_after:,} "
            f"| {row.what} |"
            for row in self.layers
        ]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]) + "\n"


# -- measuring -----------------------------------------------------------------------------------------------


def measure(model: nn.Module, example: Batch | None, write: Callable[[Path], Any], latency_runs: int) -> Size:
    """How large and how fast a model is.

    Args:
        model: any module, in evaluation mode.
        example: one batch; None for no operations and no latency.
        write: writes the model into a folder.
        latency_runs: runs that latency is the median of; 0 for none.
    """
    with tempfile.TemporaryDirectory(prefix="paperback-size-") as folder:
        write(Path(folder) / "model")
        on_disk = size_on_disk(Path(folder) / "model")
    total, nonzeros = counts(model)
    timed: dict[str, Any] = {}
    if example is not None:
        with evaluating(model):
            timed["flops"] = flops(run, model, example)
            if latency_runs:
                one = latencies(model, _rows(example, 1), latency_runs)
                several = latencies(model, _rows(example, 8), latency_runs)
                timed |= {"latency": float(np.median(one)), "latency_p90": float(np.quantile(one, 0.9))}
                timed["latency_batch"] = float(np.median(several))
    return Size(total, nonzeros, bytes_in_memory(model), on_disk, **timed)


def counts(model: nn.Module) -> tuple[int, int]:
    """Numbers of a model's weights and how many are not zero.

    Packed weights count as the numbers they stand for, packed factors as the numbers of the factors.
    """
    total = nonzeros = 0
    seen: set[int] = set()
    for module in model.modules():
        numbers: list[Tensor] = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in numbers}
        if isinstance(module, StoredLayer):
            numbers += [module.bias] if module.bias is not None else []  # a buffer there
            numbers += [] if module.trainable else module.numbers_stored()
        total += sum(n.numel() for n in numbers)
        nonzeros += sum(int(n.count_nonzero()) for n in numbers)
    return total, nonzeros


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all tensors of a model, shared ones once."""
    tensors = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@torch.no_grad()
def latencies(model: nn.Module, batch: Batch, runs: int, warm_up: int = 3) -> list[float]:
    """Seconds of single passes, after a few that do not count."""
    seconds = []
    for i in range(warm_up + runs):
        start = time.perf_counter()
        run(model, batch)
        if i >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


def _rows(example: Batch, rows: int) -> Batch:
    """So many rows of a batch, repeated where it has fewer."""
    if isinstance(example, dict):
        return {k: _rows(v, rows) if isinstance(v, Tensor) and v.ndim else v for k, v in example.items()}
    if isinstance(example, tuple | list):
        return tuple(_rows(part, rows) for part in example)
    assert isinstance(example, Tensor)
    return example.repeat(-(-rows // len(example)), *[1] * (example.ndim - 1))[:rows]
