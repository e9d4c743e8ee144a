"""The numbers of a leaderboard as a person reads them: equal decimals in a column, seconds and bytes in the
size that suits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paperback.compare.leaderboard import Leaderboard, Row, Spread
from paperback.study.wording import decimals, duration, number, size

NOTHING = "–"
Writer = Callable[[float], str]


def short_duration(seconds: float) -> str:
    """Seconds as `duration` writes them, and those below one as "34 ms"."""
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else duration(seconds)


def writer(unit: str, values: Sequence[float]) -> Writer:
    """How the numbers of one column are written.

    Args:
        unit: "s" and "B" are written in the size that suits, each number with its unit; other columns get
            equal decimals.
        values: what stands in the column; they decide how many decimals.

    Returns:
        A function from number to text.
    """
    if unit == "s":
        return short_duration
    if unit == "B":
        return lambda value: size(round(value))
    places = decimals(values)
    return lambda value: number(value, places)


def writers(leaderboard: Leaderboard) -> dict[str, Writer]:
    """Metric name to how its column is written, in the order of the bench."""
    return {
        metric.name: writer(
            metric.unit,
            [
                value
                for row in leaderboard.rows
                if (spread := row.metrics.get(metric.name)) is not None
                for value in (spread.mean, spread.low, spread.high)
                if value is not None
            ],
        )
        for metric in leaderboard.metrics
    }


def mean_text(spread: Spread | None, write: Writer) -> str:
    """A mean, or a dash where there is none."""
    return write(spread.mean) if spread else NOTHING


def interval_text(spread: Spread | None, write: Writer) -> str:
    """An interval, "0.61 to 0.66"; empty where there is none."""
    if spread is None or spread.low is None or spread.high is None:
        return ""
    return f"{write(spread.low)} to {write(spread.high)}"


def rank_text(row: Row) -> str:
    """The rank, with "≈" where the row cannot be told from the best; a dash for a row without one."""
    if row.rank is None:
        return NOTHING
    return f"{row.rank} ≈" if row.like_best and row.rank > 1 else str(row.rank)


def heading(leaderboard: Leaderboard, name: str) -> str:
    """The label of a metric, with its unit (but seconds and bytes, which stand at the numbers) and an arrow
    towards better, where one side is.
    """
    metric = next(metric for metric in leaderboard.metrics if metric.name == name)
    unit = f" [{metric.unit}]" if metric.unit not in ("", "s", "B") else ""
    arrow = {"higher": "↑\u00a0", "lower": "↓\u00a0", "neither": ""}[metric.better]
    return f"{arrow}{metric.label}{unit}"


def without_rank_text(leaderboard: Leaderboard) -> str:
    """Which contenders have no rank, and why; empty where all that ran have one."""
    names = [row.label for row in leaderboard.without_rank]
    if not names:
        return ""
    return f'Not measured in "{leaderboard.primary.label}", and so without a rank: {"; ".join(names)}.'


def rest_of(leaderboard: Leaderboard) -> list[Row]:
    """Rows with something to explain: failures, partial failures, contenders that do not apply or have not
    run.
    """
    return [row for row in leaderboard.rows if row.status != "done"]
