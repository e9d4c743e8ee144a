"""One claim of a paper, what was measured, and the verdict.

A claim has a bar that was set beforehand: the judged quantity must be at least, or at most, so much. The
judged quantity is the mean of what was measured, or of its difference from the baseline, seed by seed. Its
interval decides: all of it on the right side of the bar, the claim held; all of it on the wrong side, it did
not hold; both sides, it is undecided at this scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from paperback.errors import DataError
from paperback.study.statistics import MINIMUM_FOR_T, mean_interval

Verdict = Literal["held", "did not hold", "undecided", "not judged"]
Direction = Literal["at least", "at most"]
IntervalKind = Literal["given", "t interval", "range"]


@dataclass(frozen=True)
class Claim:
    """A claim with its numbers and its verdict.

    Attributes:
        statement: what is claimed, a sentence without its full stop.
        paper: what the paper reports, in words.
        unit: of all numbers here; empty for plain numbers.
        note: anything a reader must know to read the numbers rightly.
        measured: one number per seed, or a single one.
        baseline: the same for the baseline; None if the claim is about the measured number itself.
        direction: whether the judged quantity must be at least or at most the bar.
        bar: the bar.
        value: the judged quantity: the mean of measured, or of measured minus baseline.
        interval: of the judged quantity; None for a single measurement without an interval of its own.
        interval_kind: "given" by the study (such as a paired bootstrap over test cases), "t interval" (95 %)
            or "range" of the seeds.
        bar_reached: whether `value` is on the right side of the bar, whatever the interval says.
        verdict: "not judged" in smoke and quick runs and on a user's data.
    """

    statement: str
    paper: str
    unit: str
    note: str
    measured: tuple[float, ...]
    baseline: tuple[float, ...] | None
    direction: Direction
    bar: float
    value: float
    interval: tuple[float, float] | None
    interval_kind: IntervalKind | None
    bar_reached: bool
    verdict: Verdict

    @property
    def measured_mean(self) -> float:
        """Mean of what was measured."""
        return math.fsum(self.measured) / len(self.measured)

    @property
    def baseline_mean(self) -> float | None:
        """Mean of the baseline, if there is one."""
        return None if self.baseline is None else math.fsum(self.baseline) / len(self.baseline)


def make_claim(
    statement: str,
    *,
    paper: str,
    measured: float | Sequence[float],
    at_least: float | None = None,
    at_most: float | None = None,
    baseline: float | Sequence[float] | None = None,
    interval: tuple[float, float] | None = None,
    unit: str = "",
    note: str = "",
    judged: bool = True,
) -> Claim:
    """Judge a claim; see `Run.claim` for the arguments.

    Args:
        judged: False to leave the verdict open ("not judged") and only say whether the bar was reached.

    Returns:
        The claim with its verdict.

    Raises:
        DataError: if there is not exactly one bar, or the numbers do not fit each other.
    """
    bar, direction = _bar(statement, at_least, at_most)
    values = _numbers(measured, "measured", statement)
    against = None if baseline is None else _numbers(baseline, "baseline", statement)
    quantity = values if against is None else _differences(values, against, statement)
    value, low, high = mean_interval(quantity)
    kind: IntervalKind | None = None
    if interval is not None:
        ends = _numbers(interval, "interval", statement)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise DataError(
                f"the interval of the claim {statement!r} is {ends}; give two numbers, the lower end first."
            )
        low, high = ends
        kind = "given"
    elif len(quantity) > 1:
        kind = "t interval" if len(quantity) >= MINIMUM_FOR_T else "range"
    return Claim(
        statement=statement,
        paper=paper,
        unit=unit,
        note=note,
        measured=values,
        baseline=against,
        direction=direction,
        bar=bar,
        value=value,
        interval=None if kind is None else (low, high),
        interval_kind=kind,
        bar_reached=reaches(value, bar, direction),
        verdict=judge(value, low, high, bar, direction) if judged else "not judged",
    )


def reaches(value: float, bar: float, direction: Direction) -> bool:
    """Whether a value is on the right side of the bar, or on it. NaN reaches no bar.

    On the bar means up to rounding: .84 - .81 is a hair less than .03 in floating point, and must not fail a
    bar of .03 for it.
    """
    if math.isnan(value):
        return False
    on_the_bar = math.isclose(value, bar, rel_tol=1e-9, abs_tol=1e-12)
    return on_the_bar or (value > bar if direction == "at least" else value < bar)


def judge(value: float, low: float, high: float, bar: float, direction: Direction) -> Verdict:
    """The verdict on a judged quantity with its interval.

    Args:
        value: the judged quantity.
        low: lower end of its interval; the value itself where there is none.
        high: upper end.
        bar: the bar; a value on it has reached it.
        direction: which side of the bar is the right one.

    Returns:
        "held" if the whole interval reaches the bar, "did not hold" if none of it does or a number is NaN or
        the value is infinite, otherwise "undecided".
    """
    if not math.isfinite(value) or math.isnan(low) or math.isnan(high):
        return "did not hold"
    reached = {reaches(end, bar, direction) for end in (low, high)}
    if reached == {True}:
        return "held"
    return "did not hold" if reached == {False} else "undecided"


def _bar(statement: str, at_least: float | None, at_most: float | None) -> tuple[float, Direction]:
    bar, direction = (at_least, "at least") if at_least is not None else (at_most, "at most")
    if bar is None or (at_least is not None and at_most is not None):
        raise DataError(f"the claim {statement!r} needs exactly one of at_least and at_most.")
    if not math.isfinite(bar):
        raise DataError(f"the bar of the claim {statement!r} is {bar}; a bar is a finite number.")
    return float(bar), "at least" if direction == "at least" else "at most"


def _numbers(value: float | Iterable[float], name: str, statement: str) -> tuple[float, ...]:
    """Plain floats of a number, a sequence, an array or a tensor.

    A zero-dimensional array is iterable only by name.
    """
    single = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    try:
        numbers = (float(value),) if single else tuple(float(v) for v in value)  # type: ignore[arg-type, union-attr]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name} of the claim {statement!r} is {value!r}; give a number, or one number per seed."
        ) from error
    if not numbers:
        raise DataError(f"{name} of the claim {statement!r} is empty; give a number, or one number per seed.")
    return numbers


def _differences(
    measured: tuple[float, ...], baseline: tuple[float, ...], statement: str
) -> tuple[float, ...]:
    """Measured minus baseline, seed by seed; a single number stands for every seed."""
    n = max(len(measured), len(baseline))
    if {len(measured), len(baseline)} - {1, n}:
        raise DataError(
            f"the claim {statement!r} has {len(measured)} measured and {len(baseline)} baseline numbers; "
            "give one for each seed, in the same order."
        )
    pairs = zip(measured * (n // len(measured)), baseline * (n // len(baseline)), strict=True)
    return tuple(a - b for a, b in pairs)
