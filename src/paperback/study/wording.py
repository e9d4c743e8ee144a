"""Numbers and verdicts in words, the same in the terminal and in the report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paperback.errors import PaperbackError
from paperback.study.claim import Claim
from paperback.study.finding import Cell

_SIGNIFICANT = 4
_NO_BREAK = "\u00a0"


def decimals(values: Sequence[float]) -> int:
    """Decimals that some numbers are all written with, so that they line up.

    The largest gets four significant digits; zeros that all of them would end with are left off.
    """
    finite = [abs(float(v)) for v in values if math.isfinite(v)]
    largest = max(finite, default=0.0)
    if largest == 0:
        return 0
    places = min(9, max(0, _SIGNIFICANT - 1 - math.floor(math.log10(largest))))
    while places > 0 and all(f"{v:.{places}f}".endswith("0") for v in finite):
        places -= 1
    return places


def number(value: float, places: int | None = None, unit: str = "") -> str:
    """A number for people.

    Args:
        value: any float or integer.
        places: decimals; four significant digits if not given. A number too small for them falls back to
            significant digits.
        unit: written after the number.
    """
    if math.isnan(value):
        text = "not a number"
    elif math.isinf(value):
        text = "∞" if value > 0 else "−∞"
    elif isinstance(value, int):
        text = f"{value:,}"
    else:
        places = decimals([value]) if places is None else places
        vanishes = value != 0 and abs(value) < 0.5 * 10.0**-places
        text = f"{value:.2e}" if vanishes or 0 < abs(value) < 1e-4 else f"{value:,.{places}f}"
    text = text.replace("-", "−")
    return f"{text}{_NO_BREAK}{unit}" if unit else text


def column(cells: Sequence[Cell]) -> list[str]:
    """The cells of a table's column for people.

    Its floats get equal decimals unless they differ by orders of magnitude.
    """
    floats = [abs(c) for c in cells if isinstance(c, float) and math.isfinite(c) and c != 0]
    places: int | None = decimals(floats)
    if floats and min(floats) < 10.0 ** -(places or 0):
        places = None
    return [_cell(c, places) for c in cells]


def _cell(value: Cell, places: int | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value, places if isinstance(value, float) else None)


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3 min 05 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(n: int) -> str:
    """Bytes as "812 bytes", "1.2 MB" or "3.4 GB" (powers of ten)."""
    if n < 1000:
        return f"{n} bytes"
    power = min(3, int(math.log10(n)) // 3)
    return f"{n / 1000**power:.1f} {('kB', 'MB', 'GB')[power - 1]}"


def count(n: int, noun: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def claim_numbers(claim: Claim) -> dict[str, str]:
    """The numbers of a claim, all with the same decimals: measured, baseline, value, interval, bar.

    Empty where there is none.
    """
    low, high = claim.interval if claim.interval is not None else (math.nan, math.nan)
    means = [
        claim.measured_mean,
        claim.value,
        *(() if claim.baseline_mean is None else (claim.baseline_mean,)),
    ]
    places = decimals([*means, *(claim.interval or ())])

    def show(value: float) -> str:
        return number(float(value), places, claim.unit)

    return {
        "measured": show(claim.measured_mean),
        "baseline": "" if claim.baseline_mean is None else show(claim.baseline_mean),
        "value": show(claim.value),
        "interval": "" if claim.interval is None else f"{number(low, places)} to {show(high)}",
        "bar": f"{claim.direction} {_plain(claim.bar, claim.unit)}",
    }


def interval_words(claim: Claim, n_seeds: int) -> str:
    """Where the interval of a claim comes from."""
    n = max(len(claim.measured), len(claim.baseline or ()))
    repetitions = count(n, "seed") if n == n_seeds else count(n, "value")
    if claim.interval_kind == "given":
        return "interval given by the study"
    if claim.interval_kind == "t interval":
        return f"95 % t interval over {repetitions}"
    return f"range over {repetitions}" if claim.interval_kind == "range" else "one value, no interval"


def claim_sentence(claim: Claim, n_seeds: int) -> str:
    """What was measured, what was asked, and why the verdict is what it is, in plain words.

    Args:
        claim: with its verdict.
        n_seeds: how many seeds the run had.
    """
    said = claim_numbers(claim)
    measured = f"Measured {said['measured']}"
    if claim.baseline is not None:
        measured += f", baseline {said['baseline']}: the difference is {said['value']}"
    interval = f"{said['interval']}, " if claim.interval else ""
    asked = f"({interval}{interval_words(claim, n_seeds)}); it had to be {said['bar']}."
    return f"{measured} {asked} {_reason(claim)}"


def _reason(claim: Claim) -> str:
    if claim.verdict == "not judged":
        reached = "was reached" if claim.bar_reached else "was not reached"
        return f"The bar {reached} here, but a run like this one does not judge."
    if not math.isfinite(claim.value):
        return "A measurement without a finite value does not hold."
    if claim.interval is None:
        return "There is no interval, so the value alone decides."
    return {
        "held": "The whole interval reaches the bar.",
        "did not hold": "No part of the interval reaches the bar.",
        "undecided": "The interval lies on both sides of the bar, so this is undecided at this scale.",
    }[claim.verdict]


def _plain(value: float, unit: str) -> str:
    """A bar as its author wrote it: no padding with zeros."""
    text = f"{value:,.10g}".replace("-", "−") if abs(value) >= 1e-4 or value == 0 else number(value)
    return f"{text}{_NO_BREAK}{unit}" if unit else text


def one_sentence(error: BaseException) -> str:
    """What an exception says, on one line; the class is named unless the message was written for a user."""
    message = " ".join(str(error).split())
    if not isinstance(error, PaperbackError) or not message:
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return message if len(message) <= 300 else f"{message[:299]}…"
