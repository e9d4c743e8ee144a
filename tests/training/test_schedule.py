"""The schedules against torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR

from paperback.errors import DataError
from paperback.training.schedule import SCHEDULES, factor


def torchs(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("steps", [2, 7, 100])
def test_the_shapes_are_torchs(steps: int) -> None:
    cosine = torchs(lambda o: CosineAnnealingLR(o, T_max=steps), steps)
    linear = torchs(lambda o: LinearLR(o, 1.0, 0.0, total_iters=steps), steps)
    assert [factor("cosine", i, steps) for i in range(steps)] == pytest.approx(cosine)
    assert [factor("linear", i, steps) for i in range(steps)] == pytest.approx(linear)
    assert [factor("constant", i, steps) for i in range(steps)] == [1.0] * steps


@pytest.mark.parametrize(("steps", "rise"), [(10, 0.3), (100, 0.3), (64, 0.1), (50, 0.5)])
def test_one_cycle_is_torchs(steps: int, rise: float) -> None:
    expected = torchs(lambda o: OneCycleLR(o, max_lr=1.0, total_steps=steps, pct_start=rise), steps - 1)
    assert [factor("one-cycle", i, steps, rise) for i in range(steps - 1)] == pytest.approx(expected)
    assert factor("one-cycle", steps - 1, steps, rise) == pytest.approx(4e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.01, 0.25, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_factors_lie_in_the_unit_interval_and_rise_before_they_fall(
    schedule: Any, warmup: float, steps: int
) -> None:
    factors = [factor(schedule, i, steps, warmup) for i in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    factors = [factor("cosine", i, 20, 0.2) for i in range(6)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] < 1.0


def test_an_unknown_schedule_is_an_error() -> None:
    with pytest.raises(DataError, match="'staircase'; it must be one of constant, cosine"):
        factor("staircase", 0, 1)  # type: ignore[arg-type]
