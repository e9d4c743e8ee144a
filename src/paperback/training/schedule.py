"""Learning-rate schedules as pure functions of the step.

torch's schedulers are objects with state; a function of the step needs nothing in a checkpoint, and costs
nothing. The shapes agree with torch's LinearLR, CosineAnnealingLR and OneCycleLR.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

from paperback.errors import DataError

Schedule = Literal["constant", "cosine", "one-cycle", "linear"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)

ONE_CYCLE_RISE = 0.3  # the defaults of torch's OneCycleLR: part of the steps that rise,
ONE_CYCLE_START = 1 / 25  # where they start, relative to the peak,
ONE_CYCLE_END = 1 / 25e4  # and where the fall ends


def factor(schedule: Schedule, step: int, steps: int, warmup_fraction: float = 0.0) -> float:
    """What the learning rate is multiplied by at a step.

    Args:
        schedule: "constant"; "cosine" and "linear" fall from 1 to 0 over what follows the warm-up;
            "one-cycle" rises from 1/25 to 1 and falls to 4e-6, both along a cosine.
        step: the step, 0 .. steps - 1.
        steps: number of steps of the whole training, >= 1.
        warmup_fraction: part of the steps, in [0, 1), over which the rate rises linearly from near 0 to 1;
            for "one-cycle" the part that rises, 0.3 if 0.

    Returns:
        The factor, in [0, 1].

    Raises:
        DataError: if there is no such schedule.
    """
    if schedule == "one-cycle":
        peak = (warmup_fraction or ONE_CYCLE_RISE) * steps - 1
        if step <= peak:
            return _cosine(ONE_CYCLE_START, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine(1.0, ONE_CYCLE_END, (step - peak) / max(steps - 1 - peak, 1e-9))
    warmup = round(warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return _cosine(1.0, 0.0, progress)
    if schedule == "linear":
        return 1.0 - progress
    raise DataError(f"the schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}.")


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0
