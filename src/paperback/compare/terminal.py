"""What a comparison prints: the estimate before, progress during, the table after. The table fits 100
columns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from paperback.compare.bench import Metric
from paperback.compare.job import Job, Result
from paperback.compare.leaderboard import Leaderboard, Row
from paperback.compare.runner import Limits
from paperback.compare.words import (
    heading,
    interval_text,
    mean_text,
    rank_text,
    rest_of,
    short_duration,
    without_rank_text,
    writers,
)
from paperback.study.wording import count, size

WIDTH = 100  # of what is printed at the end, also where the output is no terminal


class Display:
    """Progress of a comparison on stderr: a bar with what runs on a terminal, one line per ended job
    everywhere.

    Args:
        enabled: False for no output at all.
        total: number of jobs.
        done_before: how many of them an earlier start of this comparison has done.
        primary: the metric shown for a job that is done.
    """

    def __init__(self, enabled: bool, total: int, done_before: int, primary: Metric) -> None:
        self.console = Console(stderr=True, quiet=not enabled, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[running]}", style="dim"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=3600.0,  # a job may take minutes
        )
        self._task = self._progress.add_task("comparing", total=total, completed=done_before, running="")
        self._primary = primary
        self._done_before = done_before
        self._failed = 0
        self._running: dict[str, None] = {}  # in the order of starting
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._done_before:
            self.console.print(f"{count(self._done_before, 'job')} done before; going on from there")
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def interrupted(self, folder: Path) -> None:
        """The user has ended the comparison."""
        self.console.print(
            f"interrupted; go on with --out {escape(str(folder))} and otherwise the same arguments"
        )

    def start(self, job: Job) -> None:
        """A job has been handed to the engine; called from the engine's threads."""
        with self._lock:
            self._running[job.name] = None
            self._show()

    def end(self, job: Job, result: Result) -> None:
        """A job has ended."""
        with self._lock:
            self._running.pop(job.name, None)
            self._failed += result.status == "failed"
            self._show()
        self._progress.advance(self._task)
        self.console.print(self._line(job, result), soft_wrap=True)

    def _show(self) -> None:
        names = list(self._running)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        description = f"comparing, {self._failed} failed" if self._failed else "comparing"
        self._progress.update(
            self._task, description=description, running=escape(", ".join(names[:3]) + more)
        )

    def _line(self, job: Job, result: Result) -> str:
        took = short_duration(result.seconds) if result.seconds is not None else ""
        name = f"{escape(job.contender)}, seed {job.seed}"
        if result.status == "failed":
            return f"[red]failed[/red] {name}: {escape(result.reason)}"
        value = result.metrics.get(self._primary.name)
        measured = f"{self._primary.name} {value:.4g}, " if value is not None else ""
        return f"[green]done[/green]   {name}: {measured}{took}"


def leaderboard_table(leaderboard: Leaderboard, others: Sequence[Metric]) -> Table:
    """The leaderboard as a table for a terminal.

    Args:
        leaderboard: what to show.
        others: the metrics to show beside the primary.

    Returns:
        A rich table.
    """
    write = writers(leaderboard)
    primary = leaderboard.primary
    several = len(leaderboard.seeds) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("contender", min_width=12, max_width=26, overflow="fold")
    table.add_column(escape(heading(leaderboard, primary.name)), justify="right", max_width=16)
    if several:
        table.add_column("interval", style="dim", no_wrap=True)
    for metric in others:
        table.add_column(escape(heading(leaderboard, metric.name)), justify="right", max_width=12)
    for row in leaderboard.rows:
        spread = row.metrics.get(primary.name)
        first = (
            mean_text(spread, write[primary.name]) if row.status in ("done", "partly failed") else row.status
        )
        interval = [interval_text(spread, write[primary.name])] if several else []
        cells = [mean_text(row.metrics.get(metric.name), write[metric.name]) for metric in others]
        table.add_row(rank_text(row), _name(row), first, *interval, *cells, style="" if row.seeds else "dim")
    return table


def unranked_table(leaderboard: Leaderboard, metrics: Sequence[Metric]) -> Table:
    """What contenders without a rank can be judged by, and everybody else with them.

    Args:
        leaderboard: what to show.
        metrics: the columns.

    Returns:
        A rich table.
    """
    write = writers(leaderboard)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("contender", min_width=12, max_width=36, overflow="fold")
    for metric in metrics:
        table.add_column(escape(heading(leaderboard, metric.name)), justify="right", max_width=14)
    for row in leaderboard.rows:
        if any(row.metrics.get(metric.name) for metric in metrics):
            cells = [mean_text(row.metrics.get(metric.name), write[metric.name]) for metric in metrics]
            table.add_row(_name(row), *cells)
    return table


def _name(row: Row) -> str:
    return escape(row.label) + (" [dim](baseline)[/dim]" if row.kind == "baseline" else "")


def fitting_metrics(
    leaderboard: Leaderboard,
    console: Console,
    others: Sequence[Metric],
    table_of: Callable[[Leaderboard, Sequence[Metric]], Table],
) -> list[Metric]:
    """The metrics with which a table fits the width of a console, in their order; the cost is the last to be
    left out.
    """
    for kept in range(len(others), 0, -1):
        by_weight = sorted(others, key=lambda metric: metric is not leaderboard.cost)[:kept]
        shown = [metric for metric in others if metric in by_weight]
        table = table_of(leaderboard, shown)
        if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
            return shown
    return []


def print_leaderboard(leaderboard: Leaderboard, console: Console | None = None) -> None:
    """Print the table, why contenders are missing from it, and where the files are.

    Args:
        leaderboard: what to print.
        console: where; stdout if not given.
    """
    console = console if console is not None else _console()
    console.print(f"{_title(leaderboard)}, {count(len(leaderboard.seeds), 'seed')}")
    shown = fitting_metrics(leaderboard, console, leaderboard.measured[1:], leaderboard_table)
    console.print(leaderboard_table(leaderboard, shown))
    if any(row.like_best and (row.rank or 0) > 1 for row in leaderboard.rows):
        console.print(
            "[dim]≈ its interval overlaps that of the best: these seeds cannot tell the two apart.[/dim]"
        )
    console.print(f"[dim]{leaderboard.interval_rule}[/dim]")
    if unranked := without_rank_text(leaderboard):
        console.print(f"[dim]{escape(unranked)}[/dim]")
        rest = [metric for metric in leaderboard.of_unranked if metric not in shown]
        if theirs := fitting_metrics(leaderboard, console, rest, unranked_table):
            console.print(unranked_table(leaderboard, theirs))
            shown += theirs
    explained = rest_of(leaderboard)
    if explained:
        console.print()
    for row in explained:
        console.print(f"[bold]{escape(row.label)}[/bold] {row.status}: {escape(row.reason)}")
    hidden = len(leaderboard.measured) - 1 - len(shown)
    also = f", with {count(hidden, 'more metric')}" if hidden else ""
    console.print(f"\nreport   {escape(str(leaderboard.folder / 'leaderboard.html'))}{also}", soft_wrap=True)
    console.print(
        f"tables   {escape(str(leaderboard.folder / 'leaderboard.csv'))}, leaderboard.json", soft_wrap=True
    )
    best = next((row for row in leaderboard.rows if row.artefact), None)
    if best is not None:
        path = escape(str(leaderboard.folder / (best.artefact or "")))
        if best.holds_model(leaderboard.folder):
            console.print(f'model    paperback.load("{path}"), {escape(best.label)}', soft_wrap=True)
        else:
            console.print(f"left     {path}, {escape(best.label)}", soft_wrap=True)


def print_estimate(
    leaderboard: Leaderboard,
    expected: dict[str, float | None],
    n_jobs: int,
    limits: Limits,
    at_once: int | None,
) -> None:
    """Print what a comparison would run, under which limits, and about how long it would take.

    Args:
        leaderboard: as it stands, with the results that there are.
        expected: seconds that the waiting jobs of a contender take; None where nobody knows.
        n_jobs: number of jobs, done ones included.
        limits: of each job.
        at_once: how many run at once; None for as many as a cluster has CPUs.
    """
    console = _console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("contender")
    table.add_column("jobs to run", justify="right")
    table.add_column("expected", justify="right")
    waiting = 0
    for row in leaderboard.rows:
        if row.contender not in expected:
            table.add_row(escape(row.label), "0", f"{row.status}: {escape(row.reason)}")
            continue
        left = len(leaderboard.seeds) - len(row.seeds)
        seconds = expected[row.contender]
        waiting += left
        table.add_row(
            escape(row.label), str(left), "unknown" if seconds is None else f"about {short_duration(seconds)}"
        )
    console.print(_title(leaderboard))
    console.print(table)
    known = [seconds for seconds in expected.values() if seconds is not None]
    about = (
        f"about {short_duration(sum(known) / (at_once or 1))}" if len(known) == len(expected) else "unknown"
    )
    most = short_duration(waiting * limits.seconds / (at_once or 1))
    how = f"{at_once} at once" if at_once else "as many at once as the cluster has CPUs; one after another"
    console.print(f"{waiting} of {count(n_jobs, 'job')} to run, {how}: {about}, at most {most}.")
    limit = f"{short_duration(limits.seconds)} or beyond {size(limits.memory_here())} of memory"
    console.print(f"Each job is ended after {limit}. Nothing has been run.")


def _title(leaderboard: Leaderboard) -> str:
    return (
        f"\n[bold]{leaderboard.task}[/bold] on {escape(leaderboard.data.name)}, budget {leaderboard.budget}"
    )


def _console() -> Console:
    """Standard output, at most 100 columns wide, and 100 where it is no terminal."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console
