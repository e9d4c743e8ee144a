"""What both methods share: their settings' checks, the loss with a teacher, and the way to a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paperback.compress.budget import Budget
from paperback.compress.data import Batch, evaluating, run
from paperback.compress.distill_quantize.rounding import bucket_layout
from paperback.compress.interface import Job
from paperback.compress.storage import PackedLinear
from paperback.compress.survey.fitting import bytes_on_disk, largest_that_fits
from paperback.compress.survey.healing import outputs_of, to_batch, training_rows
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import swap, weight_matrix
from paperback.numerics.quantized import code_counts, huffman_bits, quantize_uniform
from paperback.training import train
from paperback.training.distillation import Reduction, distillation_loss

ALL_ROWS = 2**62


def check_settings(
    bits: int, bucket: int | None, temperature: float, weight: float, epochs: int, lr: float, batch_size: int
) -> None:
    """Refuse settings that are out of range.

    Raises:
        DataError: naming the setting.
    """
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise DataError(f"bits is {bits!r}; it must be a whole number from 1 to 8.")
    if bucket is not None and (isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1):
        raise DataError(f"bucket is {bucket!r}; it must be a whole number above 0, or None.")
    if not temperature > 0:
        raise DataError(f"temperature is {temperature}; it must be positive.")
    if not 0 <= weight <= 1:
        raise DataError(f"weight is {weight}; the teacher's share must lie in [0, 1].")
    if epochs < 0 or batch_size < 1 or not lr > 0:
        raise DataError(
            f"epochs is {epochs}, lr {lr}, batch_size {batch_size}; they must be at least 0, above 0, and "
            "at least 1."
        )


def imitate(
    job: Job,
    teacher: nn.Module,
    *,
    weight: float,
    temperature: float,
    reduction: Reduction,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    description: str,
    after_step: Callable[[], None] | None = None,
) -> list[float]:
    """Train what asks for gradients in a job's model, on labels and a teacher's logits.

    Returns:
        The mean loss of each epoch.

    Raises:
        DataError: if the teacher has other classes than the student.
    """
    if not epochs:
        return []
    assert job.data is not None  # both methods need training data
    rows, keys = training_rows(job.data, ALL_ROWS, seed)
    if weight > 0:
        _check_classes(job.model, teacher, to_batch(tuple(part[:1] for part in rows), keys))

    def loss(model: nn.Module, parts: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
        batch = to_batch(parts, keys)
        if weight == 0:
            return job.loss(model, batch)
        hard: Tensor | float = 0.0
        if weight == 1:
            logits = run(model, batch)
        else:  # one pass gives both the loss and the logits
            with outputs_of(model, [""]) as seen:
                hard = job.loss(model, batch)
            logits = seen[""]
        with torch.no_grad():
            wanted = run(teacher, batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        soft = distillation_loss(logits, wanted, temperature, mask=mask, reduction=reduction)
        return (1 - weight) * hard + weight * soft

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters, lr=lr)
        if after_step is not None:
            adam.register_step_post_hook(lambda *_: after_step())
        return adam

    with evaluating(teacher):
        history = train(
            job.model, loss, rows, epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer,
            seed=seed, progress=job.progress, description=description,
        )  # fmt: skip
    job.model.eval()
    return history.train_loss


@torch.no_grad()
def _check_classes(student: nn.Module, teacher: nn.Module, batch: Batch) -> None:
    with evaluating(student), evaluating(teacher):
        ours, theirs = (run(model, batch).shape[-1] for model in (student, teacher))
    if ours != theirs:
        raise DataError(f"the student has {ours} classes, the teacher {theirs}; give one with as many.")


def store(job: Job, layers: Mapping[str, nn.Module], kind: Any, roundings: Mapping[str, Any]) -> None:
    """Put packed layers in the places of dense ones, and say what an entropy code would take."""
    quantized = {name: roundings[name].quantized(weight_matrix(layer)) for name, layer in layers.items()}
    for name, tensor in quantized.items():
        swap(job.model, name, kind.from_quantized(layers[name], tensor))
    total = sum(tensor.codes.numel() for tensor in quantized.values())
    fixed = sum(tensor.codes.numel() * tensor.grid.bits for tensor in quantized.values()) / total
    huffman = huffman_bits(code_counts(*quantized.values()))
    job.extras |= {"bits": fixed, "huffman_bits": huffman}
    job.note(
        f"Codes take {fixed:.2f} bits a weight as they are stored, {huffman:.2f} in a Huffman code, "
        "scales not counted."
    )


def bits_for(
    budget: Budget, model: nn.Module, student: nn.Module, layers: Mapping[str, nn.Module], bucket: int | None,
    method: str, points: bool = False,
) -> int:  # fmt: skip
    """The most bits with which the student meets a budget.

    Args:
        budget: in bits, bytes or ratio, the last of the model's bytes.
        model: the original.
        student: what is stored.
        layers: which of its layers are packed.
        bucket: weights that share a scale.
        method: for the error.
        points: whether each layer also stores its points.

    Raises:
        BudgetError: with the range that can be reached.
    """
    if budget.unit == "bits":
        if not 1 <= budget.value <= 8:
            raise BudgetError(f"{method} reaches 1 to 8 bits; the budget is {budget.value}.")
        return math.floor(budget.value)
    limit = budget.value * bytes_on_disk(model) if budget.unit == "ratio" else budget.value

    def shrink(trial: nn.Module, bits: int) -> None:
        for name in layers:
            layer = trial.get_submodule(name)
            layout = bucket_layout(tuple(weight_matrix(layer).shape), bucket)
            packed = PackedLinear.from_quantized(
                layer, quantize_uniform(weight_matrix(layer), bits, layout.per, layout.size)
            )
            if points:
                packed.register_buffer("points_of_this_size", torch.zeros(2**bits))
            swap(trial, name, packed)

    return largest_that_fits(Budget(bytes=max(1, int(limit))), student, range(8, 0, -1), shrink, method)
