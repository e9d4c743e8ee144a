"""The leaderboard: what the jobs of a comparison measured, summed up per contender and put in order.

For every metric a contender has one value per seed. They are summed up as their mean and an interval
(Student's t from five seeds on, the range for two to four, none for one;
`paperback.study.statistics.mean_interval`). Rows are sorted by the mean of the primary metric. A row whose
interval overlaps that of the best cannot be told from it at this number of seeds, and is marked so.
Contenders that failed or do not apply stand at the end with their reason.

``leaderboard.json`` is a `Leaderboard` field by field; ``leaderboard.csv`` has a line per contender.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from paperback.compare.bench import Bench, Contender, Kind, Metric
from paperback.compare.job import Result, write_json
from paperback.data.dataset import Dataset
from paperback.study.encoding import write_atomically
from paperback.study.finding import Environment
from paperback.study.statistics import MINIMUM_FOR_T, mean_interval

SCHEMA_VERSION = 1
RowStatus = Literal["done", "partly failed", "failed", "does not apply", "not run"]


@dataclass(frozen=True)
class Spread:
    """One quantity over the seeds.

    Attributes:
        values: one per seed that has it, in the order of the seeds.
        mean: their mean.
        low: lower end of the interval; None with one seed.
        high: upper end.
    """

    values: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None

    def overlaps(self, other: Spread) -> bool | None:
        """Whether the two intervals have a point in common; None where one of them does not exist."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        contender: its name.
        label: what a person reads.
        kind: "method" or "baseline".
        status: "partly failed" when some seeds failed; what is measured is then over the others.
        reason: why it failed, does not apply, why some seeds failed, or why it has no rank.
        rank: 1 for the best in the primary metric; None where it has no value.
        like_best: True if the interval of the primary metric overlaps the best's; None with one seed.
        seeds: the seeds that were done.
        metrics: metric name to what was measured; None where the contender does not have the quantity.
        seconds: of a whole job: loading, building, fitting, measuring.
        peak_memory: the most that a job held, in bytes.
        artefact: folder of what the first seed left, relative to the comparison's; for `paperback.load` where
            it holds a model of ours.
        reading: what the bench says of the first seed, in sentences.
    """

    contender: str
    label: str
    kind: Kind
    status: RowStatus
    reason: str = ""
    rank: int | None = None
    like_best: bool | None = None
    seeds: tuple[int, ...] = ()
    metrics: dict[str, Spread | None] = field(default_factory=dict)
    seconds: Spread | None = None
    peak_memory: int | None = None
    artefact: str | None = None
    reading: tuple[str, ...] = ()

    def holds_model(self, folder: Path) -> bool:
        """Whether `paperback.load` takes the artefact: not where it is seen to lack the config of a model."""
        if self.artefact is None:
            return False
        place = folder / self.artefact
        return not place.is_dir() or (place / "config.json").is_file()


@dataclass(frozen=True)
class DataNote:
    """What was compared on: name, source, licence and a description in a few lines."""

    name: str
    source: str
    licence: str
    description: str


@dataclass(frozen=True)
class Leaderboard:
    """The result of a comparison.

    Attributes:
        task: what was compared.
        budget: "smoke", "quick", "standard" or "full".
        seeds: of the fits.
        complete: whether every job has run, to its end or to a failure.
        data: what it was compared on.
        metrics: what was measured.
        rows: best first, then what has no rank.
        environment: versions, commit and machine that the comparison was started on.
        finished: date and time, ISO 8601, UTC.
        schema_version: of ``leaderboard.json``.
        folder: where everything lies.
    """

    task: str
    budget: str
    seeds: tuple[int, ...]
    complete: bool
    data: DataNote
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    environment: Environment
    finished: str
    schema_version: int = SCHEMA_VERSION
    folder: Path = field(default=Path(), metadata={"local": True})

    @property
    def primary(self) -> Metric:
        """The metric that the rows are sorted by."""
        return next(metric for metric in self.metrics if metric.primary)

    @property
    def cost(self) -> Metric | None:
        """The metric that quality is drawn against; None means the seconds of the whole job."""
        return next((metric for metric in self.metrics if metric.cost), None)

    @property
    def without_rank(self) -> tuple[Row, ...]:
        """The rows that were measured, but not in the metric that decides."""
        return tuple(row for row in self.rows if row.status == "done" and row.rank is None)

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics that at least one contender has, the primary first."""
        measured = [
            metric for metric in self.metrics if any(row.metrics.get(metric.name) for row in self.rows)
        ]
        return (self.primary, *(metric for metric in measured if not metric.primary))

    @property
    def of_unranked(self) -> tuple[Metric, ...]:
        """The metrics of quality that contenders without a rank have."""
        return tuple(
            metric
            for metric in self.measured
            if not metric.cost and any(row.metrics.get(metric.name) for row in self.without_rank)
        )

    def cost_of(self, row: Row) -> Spread | None:
        """What a row costs, in the terms of `cost`."""
        return row.metrics.get(self.cost.name) if self.cost else row.seconds

    @property
    def interval_rule(self) -> str:
        """How the intervals were made, in words."""
        if len(self.seeds) == 1:
            return "One seed: there are no intervals, and a small difference may be chance."
        if len(self.seeds) < MINIMUM_FOR_T:
            return f"Intervals are the range over {len(self.seeds)} seeds."
        return f"Intervals are 95 % t intervals of the mean over {len(self.seeds)} seeds."


def note_on(data: Any, path: Path | None) -> DataNote:
    """What a leaderboard says about the data that a bench loaded: a `Dataset`, or something that has one as
    its `dataset`.
    """
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, Dataset):
        return DataNote(dataset.name, dataset.source, dataset.licence, dataset.describe())
    if path is not None:
        return DataNote(path.name, str(path), "the user's own", "")
    return DataNote(
        "the shipped data", "see paperback/data/files/README.md", "see paperback/data/files/LICENSES", ""
    )


def summarise(
    contender: Contender, results: Mapping[int, Result], n_seeds: int, metrics: Sequence[Metric]
) -> Row:
    """Sum up the results of one contender.

    Args:
        contender: whose.
        results: seed to result, for the seeds that have run.
        n_seeds: how many seeds there are to run.
        metrics: of the bench.

    Returns:
        Its row, without a rank.
    """
    done = {seed: results[seed] for seed in sorted(results) if results[seed].status == "done"}
    failed = {seed: results[seed] for seed in sorted(results) if results[seed].status == "failed"}
    status: RowStatus = "done"
    if len(results) < n_seeds and not done:
        status = "not run" if not failed else "failed"
    elif failed:
        status = "partly failed" if done else "failed"
    first = next(iter(done), None)
    artefact = done[first].artefact if first is not None else None
    return Row(
        contender.name,
        contender.label,
        contender.kind,
        status,
        reason=_reason(failed, n_seeds),
        seeds=tuple(done),
        metrics={
            metric.name: _spread([result.metrics.get(metric.name) for result in done.values()])
            for metric in metrics
        },
        seconds=_spread([result.seconds for result in done.values()]),
        peak_memory=max((result.peak_memory or 0 for result in results.values()), default=0) or None,
        artefact=f"jobs/{contender.name}-{first}/{artefact}" if artefact else None,
        reading=done[first].reading if first is not None else (),
    )


def _reason(failed: Mapping[int, Result], n_seeds: int) -> str:
    """Why jobs failed: each different reason once, with the number of seeds where not all failed alike."""
    reasons = [result.reason for result in failed.values()]
    if len(set(reasons)) == 1 and len(reasons) == n_seeds:
        return reasons[0]
    return " ".join(
        f"{reasons.count(reason)} of {n_seeds} seeds: {reason}" for reason in dict.fromkeys(reasons)
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    present = tuple(value for value in values if value is not None)
    if not present:
        return None
    mean, low, high = mean_interval(present)
    return Spread(present, mean, low, high) if len(present) > 1 else Spread(present, mean, None, None)


def rank(rows: Sequence[Row], primary: Metric) -> tuple[Row, ...]:
    """Sort rows by the mean of the primary metric, best first, and mark those that cannot be told from the
    best.

    Rows of equal mean share a rank. Rows without a value follow in their order: done ones, whose reason says
    that they have no rank, failed ones, those that do not apply.

    Args:
        rows: in the order of the bench.
        primary: the metric to sort by.

    Returns:
        The rows with `rank` and `like_best` filled in.
    """
    sign = 1.0 if primary.better == "lower" else -1.0
    measured = [(spread, row) for row in rows if (spread := row.metrics.get(primary.name)) is not None]
    measured.sort(key=lambda pair: sign * pair[0].mean)
    means = [spread.mean for spread, _ in measured]
    ranked = [
        replace(row, rank=means.index(spread.mean) + 1, like_best=measured[0][0].overlaps(spread))
        for spread, row in measured
    ]
    order: list[RowStatus] = ["done", "partly failed", "not run", "failed", "does not apply"]
    rest = [
        replace(row, reason=f'no rank: "{primary.label}" is not measured.') if row.status == "done" else row
        for row in rows
        if row.metrics.get(primary.name) is None
    ]
    return (*ranked, *sorted(rest, key=lambda row: order.index(row.status)))


def build_rows(
    bench: Bench,
    contenders: Sequence[Contender],
    seeds: Sequence[int],
    refused: Mapping[str, Row],
    results: Mapping[str, Mapping[int, Result]],
) -> tuple[Row, ...]:
    """The rows of a comparison, in order.

    Args:
        bench: of the task.
        contenders: who takes part.
        seeds: of the comparison.
        refused: rows of the contenders that had no job, by name.
        results: contender name to seed to result.

    Returns:
        One row per contender.
    """
    rows = [
        refused.get(contender.name)
        or summarise(contender, results.get(contender.name, {}), len(seeds), bench.metrics)
        for contender in contenders
    ]
    return rank(rows, bench.primary)


def write_tables(leaderboard: Leaderboard) -> None:
    """Write ``leaderboard.json`` and ``leaderboard.csv`` into the leaderboard's folder."""
    write_json(leaderboard.folder / "leaderboard.json", leaderboard)
    write_atomically(leaderboard.folder / "leaderboard.csv", to_csv(leaderboard))


def to_csv(leaderboard: Leaderboard) -> str:
    """One line per contender: rank, names, status, every metric with mean and interval, seconds, memory,
    artefact; numbers in full.
    """
    buffer = io.StringIO()
    quantities = [*(metric.name for metric in leaderboard.metrics), "job_seconds"]
    header = ["rank", "contender", "label", "kind", "status", "reason", "like_best", "seeds_done"]
    header += [f"{name}{end}" for name in quantities for end in ("", "_low", "_high")]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*header, "peak_memory_bytes", "artefact"])
    for row in leaderboard.rows:
        spreads = [*(row.metrics.get(metric.name) for metric in leaderboard.metrics), row.seconds]
        cells: list[Any] = [
            row.rank,
            row.contender,
            row.label,
            row.kind,
            row.status,
            row.reason,
            row.like_best,
            len(row.seeds),
        ]
        for spread in spreads:
            cells += [spread.mean, spread.low, spread.high] if spread else [None] * 3
        writer.writerow([*cells, row.peak_memory, row.artefact])
    return buffer.getvalue()
