"""Losses that make a student network imitate a teacher, and the teacher's answers kept for many epochs.

The loss on logits is T² KL(softmax(z_t / T) || softmax(z_s / T)), the mean over the rows of a batch: with the
factor T² its gradient stays in proportion to that of the cross-entropy, whatever the temperature (Hinton,
Vinyals and Dean 2015, section 2). Torch's default reduction, a mean over all elements, would weaken it by the
number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError

Reduction = Literal["batchmean", "mean", "sum"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 2.0,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """How far the student's law over classes is from the teacher's, T² KL(teacher || student), in nats.

    Args:
        student: logits, ``(..., classes)``.
        teacher: logits of the same shape; no gradient flows into them.
        temperature: T > 0; logits are divided by it.
        mask: ``(...)``, true for the rows (tokens) that count; all if not given.
        reduction: "batchmean" divides the sum by the number of rows that count, "mean" also by the number of
            classes (as some published code does), "sum" by nothing.

    Returns:
        A scalar, at least 0 up to rounding.

    Raises:
        DataError: if the shapes differ, the temperature is not positive, or no row counts.
    """
    if student.shape != teacher.shape:
        raise DataError(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "both need the same rows and classes."
        )
    if not temperature > 0:
        raise DataError(f"temperature is {temperature}; it must be positive.")
    classes = student.shape[-1]
    rows_student, rows_teacher = student.reshape(-1, classes), teacher.detach().reshape(-1, classes)
    if mask is not None:
        kept = mask.reshape(-1).bool()
        rows_student, rows_teacher = rows_student[kept], rows_teacher[kept]
    if len(rows_student) == 0:
        raise DataError("no row counts in the distillation loss; the mask leaves none.")
    log_student = F.log_softmax(rows_student / temperature, dim=-1)
    log_teacher = F.log_softmax(rows_teacher.to(log_student) / temperature, dim=-1)
    total = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
    if reduction == "sum":
        return total
    return total / (rows_student.numel() if reduction == "mean" else len(rows_student))


def distilled_cross_entropy(
    student: Tensor, teacher: Tensor, labels: Tensor, weight: float = 0.7, temperature: float = 2.0
) -> Tensor:
    """(1 - weight) cross-entropy with the labels + weight T² KL from the teacher, means over the rows.

    Args:
        student: logits, ``(rows, classes)``.
        teacher: logits, ``(rows, classes)``.
        labels: class indices, ``(rows,)``.
        weight: of the teacher, in [0, 1].
        temperature: T > 0.

    Returns:
        A scalar.

    Raises:
        DataError: if the weight lies outside [0, 1], or as `distillation_loss`.
    """
    if not 0 <= weight <= 1:
        raise DataError(f"the teacher's weight is {weight}; it must lie in [0, 1].")
    hard = F.cross_entropy(student, labels)
    return (1 - weight) * hard + weight * distillation_loss(student, teacher, temperature)


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    projections: Sequence[nn.Module] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean squared distance of hidden states, each pair in units of the teacher's mean square.

    Args:
        student: hidden states, each ``(..., width)``.
        teacher: as many, each ``(..., teacher's width)``.
        projections: maps of the student's states to the teacher's width, one a pair; none where the widths
            agree.
        mask: ``(...)``, true for the positions that count.

    Returns:
        A scalar: 0 for equal states, about 1 for a student that says nothing.

    Raises:
        DataError: if the numbers of states or their shapes do not agree.
    """
    if len(student) != len(teacher) or (projections is not None and len(projections) != len(student)):
        raise DataError(f"{len(student)} states of the student stand beside {len(teacher)} of the teacher.")
    losses = []
    for i, (state, wanted) in enumerate(zip(student, teacher, strict=True)):
        mapped = projections[i](state) if projections is not None else state
        if mapped.shape != wanted.shape:
            raise DataError(
                f"hidden state {i} has shape {tuple(mapped.shape)}, the teacher's {tuple(wanted.shape)}; "
                "give projections to the teacher's width."
            )
        target = wanted.detach()
        if mask is not None:
            mapped, target = mapped[mask.bool()], target[mask.bool()]
        losses.append(F.mse_loss(mapped, target) / target.square().mean().clamp(min=1e-12))
    return torch.stack(losses).mean()


@torch.no_grad()
def teacher_logits(
    teacher: Callable[[Tensor], Tensor],
    inputs: Tensor,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The teacher's logits for every row, computed once, so that no epoch has to run the teacher again.

    Args:
        teacher: from a batch of inputs to logits; a module is run as it is, put it into evaluation mode.
        inputs: ``(rows, ...)``.
        batch_size: rows of one pass.
        dtype: of the result, for instance float16 to halve the memory; that of the logits if not given.

    Returns:
        Logits, ``(rows, ...)``.
    """
    parts = [
        teacher(batch).to(dtype=dtype) if dtype else teacher(batch) for batch in inputs.split(batch_size)
    ]
    return torch.cat(parts)
