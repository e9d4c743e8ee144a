"""The distillation losses against formulas and against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperback.errors import DataError
from paperback.training.distillation import (
    distillation_loss,
    distilled_cross_entropy,
    hidden_state_loss,
    teacher_logits,
)


def logits(rows: int = 6, classes: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_loss_is_the_divergence_written_out():
    student, teacher, temperature = logits(), logits(seed=1), 3.0
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    by_hand = temperature**2 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), by_hand)


def test_reductions_differ_by_the_counts():
    student, teacher = logits(), logits(seed=1)
    whole = distillation_loss(student, teacher, reduction="sum")
    torch.testing.assert_close(distillation_loss(student, teacher) * 6, whole)
    torch.testing.assert_close(distillation_loss(student, teacher, reduction="mean") * 30, whole)


def test_the_gradient_hardly_depends_on_a_high_temperature():
    """T² keeps it in proportion: it tends to the difference of centred logits over the classes."""
    student = logits().requires_grad_()
    teacher = logits(seed=1)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, 1e4), student)
    difference = student - teacher
    limit = (difference - difference.mean(1, keepdim=True)) / (5 * 6)
    torch.testing.assert_close(gradient, limit.detach(), atol=1e-4, rtol=1e-3)


def test_equal_logits_cost_nothing_and_shifts_do_not_matter():
    teacher = logits()
    assert abs(float(distillation_loss(teacher + 7.0, teacher))) < 1e-12


def test_masked_rows_do_not_count():
    student, teacher = logits().view(2, 3, 5), logits(seed=1).view(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = mask.view(-1).bool()
    expected = distillation_loss(student.view(6, 5)[kept], teacher.view(6, 5)[kept])
    torch.testing.assert_close(distillation_loss(student, teacher, mask=mask), expected)


def test_weights_mix_labels_and_teacher():
    student, teacher, labels = logits(), logits(seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    torch.testing.assert_close(
        distilled_cross_entropy(student, teacher, labels, weight=0.0), F.cross_entropy(student, labels)
    )
    torch.testing.assert_close(
        distilled_cross_entropy(student, teacher, labels, weight=1.0, temperature=4.0),
        distillation_loss(student, teacher, 4.0),
    )


def test_hidden_states_are_compared_in_units_of_the_teacher():
    teacher = [logits(), 100 * logits(seed=1)]
    assert float(hidden_state_loss(teacher, teacher)) == 0.0
    silent = [torch.zeros_like(state) for state in teacher]
    torch.testing.assert_close(hidden_state_loss(silent, teacher), torch.tensor(1.0, dtype=torch.float64))
    narrow = [state[:, :3] for state in teacher]
    maps = [nn.Linear(3, 5).double() for _ in teacher]
    assert hidden_state_loss(narrow, teacher, maps).isfinite()


def test_the_teacher_is_asked_once_for_all_rows():
    net = nn.Linear(4, 3)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    kept = teacher_logits(net, x, batch_size=3, dtype=torch.float16)
    assert kept.dtype == torch.float16
    assert not kept.requires_grad
    torch.testing.assert_close(kept.float(), net(x), atol=1e-3, rtol=1e-2)


def test_mistakes_are_named():
    with pytest.raises(DataError, match="same rows and classes"):
        distillation_loss(logits(), logits(classes=4))
    with pytest.raises(DataError, match="temperature"):
        distillation_loss(logits(), logits(), 0.0)
    with pytest.raises(DataError, match="no row counts"):
        distillation_loss(logits(), logits(), mask=torch.zeros(6))
    with pytest.raises(DataError, match="weight"):
        distilled_cross_entropy(logits(), logits(), torch.zeros(6, dtype=torch.long), weight=1.5)
    with pytest.raises(DataError, match="projections"):
        hidden_state_loss([logits(classes=3)], [logits()])
