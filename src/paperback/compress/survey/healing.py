"""Training after, or as part of, compression: a fixed number of steps on a job's training part, with or
without a teacher. Every tuned baseline of the survey goes through here.

The loss is (1 - w) times the job's own loss (next-token cross-entropy for token ids) plus w times
T² KL(teacher || student) plus h times the distance of hidden states.

Source: Hinton, Vinyals and Dean (2015), section 2; for hidden states Jiao et al. (2020), TinyBERT, section
    3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paperback.compress.data import Batch, Data, evaluating, run
from paperback.errors import DataError
from paperback.training import generator, train
from paperback.training.distillation import distillation_loss, hidden_state_loss

if TYPE_CHECKING:
    from paperback.compress.interface import Job


@dataclass(frozen=True)
class Healing:
    """How a compressed model is trained.

    Attributes:
        steps: steps of AdamW, >= 1.
        batch_size: rows of a step.
        lr: peak learning rate; it rises over the first tenth and falls with a cosine.
        teacher_weight: w in [0, 1], of the teacher's logits; 1 leaves the labels unused.
        temperature: T > 0, of the logits.
        hidden_weight: h >= 0, of the hidden states.
        clip_norm: gradients are scaled down to this norm.
    """

    steps: int = 100
    batch_size: int = 8
    lr: float = 1e-3
    teacher_weight: float = 1.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    clip_norm: float = 1.0

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default
        ]
        return f"Healing({', '.join(changed)})"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise DataError(
                f"steps is {self.steps} and batch_size {self.batch_size}; both must be at least 1."
            )
        if not 0 <= self.teacher_weight <= 1:
            raise DataError(f"teacher_weight is {self.teacher_weight}; it must lie in [0, 1].")
        if not self.lr > 0 or not self.temperature > 0 or not self.hidden_weight >= 0:
            raise DataError(
                f"lr is {self.lr}, temperature {self.temperature}, hidden_weight {self.hidden_weight}; "
                "the first two must be positive, the last at least 0."
            )


def heal(
    job: Job,
    healing: Healing,
    *,
    teacher: nn.Module | None = None,
    states: Sequence[tuple[str, str]] = (),
    rows: Sequence[Tensor] | None = None,
    description: str = "healing",
) -> list[float]:
    """Train the parameters of a job's model that ask for gradients.

    Args:
        job: its model is trained in place, on the training part of its data.
        healing: how.
        teacher: whose answers are imitated; without one only the job's loss counts.
        states: pairs of names of modules (student, teacher) whose outputs are to agree.
        rows: token ids or inputs in place of the training part, one or two tensors.
        description: for the progress bar.

    Returns:
        The mean loss of each pass over the rows.

    Raises:
        DataError: if there is no training part, or it cannot be cut into rows.
    """
    if rows is None:
        if job.data is None:
            raise DataError("training needs data; give Data(train=...).")
        tensors, keys = training_rows(job.data, healing.steps * healing.batch_size, job.seed)
    else:
        tensors, keys = tuple(rows), None
    epochs = math.ceil(healing.steps * healing.batch_size / len(tensors[0]))
    size = min(healing.batch_size, len(tensors[0]))
    used = max(size, healing.steps * healing.batch_size // epochs // size * size)
    tensors = tuple(t[:used] for t in tensors)

    def loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        return _loss(job, healing, model, teacher, states, to_batch(batch, keys))

    with evaluating(teacher) if teacher is not None else _nothing():
        history = train(
            job.model, loss, tensors, epochs=epochs, batch_size=size, lr=healing.lr, optimizer="adamw",
            schedule="cosine", warmup_fraction=0.1, clip_norm=healing.clip_norm, seed=job.seed,
            progress=job.progress, description=description,
        )  # fmt: skip
    job.model.eval()
    return history.train_loss


def training_rows(data: Data, wanted: int, seed: int) -> tuple[tuple[Tensor, ...], tuple[str, ...] | None]:
    """Rows of the training part, shuffled, at most as many as are wanted.

    Args:
        data: with a training part.
        wanted: number of rows that will be used.
        seed: of the order. Rows beyond the first `wanted` of a stream of batches are never read; of a tensor
            they are drawn from the whole.

    Returns:
        Tensors with one row per sample, and their names if the batches are dicts.

    Raises:
        DataError: if batches differ in their names or in the lengths of their rows.
    """
    whole = data.train
    if isinstance(whole, Tensor):
        whole = (whole,)
    if isinstance(whole, tuple) and all(isinstance(part, Tensor) for part in whole):
        tensors, keys = whole, None
    else:
        batches: list[Batch] = []
        for batch in data.batches("train"):
            batches.append(batch)
            if sum(len(_first(b)) for b in batches) >= wanted:
                break
        tensors, keys = _joined(batches)
    order = torch.randperm(len(tensors[0]), generator=generator(seed, "training rows"))[:wanted]
    return tuple(t[order] for t in tensors), keys


def to_batch(parts: tuple[Tensor, ...], keys: tuple[str, ...] | None) -> Batch:
    """Slices of the rows of `training_rows`, as the batch that the model takes."""
    if keys is not None:
        return dict(zip(keys, parts, strict=True))
    return parts[0] if len(parts) == 1 else parts


def _first(batch: Batch) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next(v for v in values if isinstance(v, Tensor))


def _joined(batches: Sequence[Batch]) -> tuple[tuple[Tensor, ...], tuple[str, ...] | None]:
    keys = tuple(batches[0]) if isinstance(batches[0], Mapping) else None
    parts = []
    for batch in batches:
        values = list(batch.values()) if isinstance(batch, Mapping) else batch
        parts.append([values] if isinstance(values, Tensor) else list(values))
    try:
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True)), keys
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the training batches cannot be joined to rows ({error}); give rows of one length."
        ) from error


def _loss(
    job: Job, healing: Healing, model: nn.Module, teacher: nn.Module | None,
    states: Sequence[tuple[str, str]], batch: Batch,
) -> Tensor:  # fmt: skip
    if teacher is None:
        return job.loss(model, batch)
    ours = [name for name, _ in states] if healing.hidden_weight else []
    theirs = [name for _, name in states] if healing.hidden_weight else []
    with outputs_of(model, ours) as student_states:
        logits = run(model, batch)
    with torch.no_grad(), outputs_of(teacher, theirs) as teacher_states:
        wanted = run(teacher, batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    total = healing.teacher_weight * distillation_loss(logits, wanted, healing.temperature, mask=mask)
    if healing.teacher_weight < 1:
        total = total + (1 - healing.teacher_weight) * job.loss(model, batch)
    if ours:
        distance = hidden_state_loss(
            [student_states[n] for n in ours], [teacher_states[n] for n in theirs], mask=mask
        )
        total = total + healing.hidden_weight * distance
    return total


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside this context the first output tensor of each named module is put into the dict as it is
    called."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
