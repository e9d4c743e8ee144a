"""The run of a study: what a study function is given, asks for its sizes and seeds, and tells what it found.

Everything told is written at once, each file under a temporary name first. ``findings.json`` says "running"
until the last moment, so that a run that was killed is never mistaken for a whole one, yet keeps what it had.
"""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paperback.errors import DataError
from paperback.study import measure
from paperback.study.budget import Budget, check_budget, for_budget
from paperback.study.claim import Claim, make_claim
from paperback.study.encoding import write_atomically
from paperback.study.environment import describe_environment
from paperback.study.finding import (
    FIGURES,
    FINDINGS,
    LOG,
    TABLES,
    Cell,
    Failure,
    FigureFile,
    Finding,
    Model,
    Status,
    Table,
    check_name,
    is_judged,
)
from paperback.study.progress import Bars
from paperback.study.wording import claim_sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

Value = TypeVar("Value")
Item = TypeVar("Item")

DOTS_PER_INCH = 144


class Run:
    """One run of one study.

    Args:
        slug: of the method.
        budget: how much of the experiment is done; see `paperback.study.budget`.
        seeds: distinct non-negative integers, at least one. A study repeats its experiment with each.
        out: folder to write to; it is made if it does not exist.
        data: the user's data in place of what ships, or None.
        target: the target column of the user's data.
        progress: show progress bars and log lines on stderr.
        question: what the study asks, for the report.
        command: what repeats this run, for the report.

    Attributes:
        slug, budget, seeds, out, target, progress: as given.
        seed: the first of the seeds.

    Raises:
        DataError: if the budget or the seeds cannot be used.
    """

    def __init__(
        self,
        slug: str,
        *,
        budget: Budget = "quick",
        seeds: Sequence[int] = (0,),
        out: str | Path,
        data: str | Path | None = None,
        target: str | None = None,
        progress: bool = True,
        question: str = "",
        command: str = "",
    ) -> None:
        self.slug = slug
        self.budget = check_budget(budget)
        self.seeds = check_seeds(seeds)
        self.seed = self.seeds[0]
        self.out = Path(out)
        self.target = target
        self.progress = progress
        self.data_was_read = False
        self._data = None if data is None else Path(data)
        self._question, self._command = question, command
        self._bars = Bars(progress)
        self._environment = describe_environment()
        self._started = datetime.now(UTC).astimezone().isoformat(timespec="seconds")
        self._clock = time.perf_counter()
        self._claims: list[Claim] = []
        self._tables: list[Table] = []
        self._figures: list[FigureFile] = []
        self._models: list[Model] = []
        self._notes: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)
        self.save("running")

    # -- what a study asks for -----------------------------------------------------------------------------

    @property
    def data(self) -> Path | None:
        """The user's data; None when the study runs on what ships. Asking for it sets `data_was_read`."""
        self.data_was_read = True
        return self._data

    def size(
        self,
        *,
        standard: Value,
        smoke: Value | None = None,
        quick: Value | None = None,
        full: Value | None = None,
    ) -> Value:
        """The value for this run's budget.

        One that is not given is that of the next larger budget, and `full` that of `standard`.
        """
        return for_budget(self.budget, standard=standard, smoke=smoke, quick=quick, full=full)

    def track(self, iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Go through an iterable under a progress bar; one inside another stands below it.

        Args:
            iterable: what to go through.
            description: what is being done, a few words.
            total: how many items, where the iterable does not know.

        Returns:
            An iterator over the same items.
        """
        return self._bars.track(iterable, description, total)

    # -- what a study tells --------------------------------------------------------------------------------

    def claim(
        self,
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
    ) -> Claim:
        """Record a claim and judge it.

        Args:
            statement: what is claimed, a sentence without its full stop; it identifies the claim from run to
                run.
            paper: what the paper reports, in words.
            measured: one number per seed, in the order of the seeds, or a single one.
            at_least: the bar that the judged quantity must reach; exactly one of the two bars is given.
            at_most: the bar that it must not exceed.
            baseline: the same for the baseline. The bar then applies to measured minus baseline, seed by
                seed.
            interval: of the judged quantity, for instance from `statistics.paired_bootstrap`; it takes the
                place of that over seeds.
            unit: of all numbers; empty for plain ones.
            note: anything a reader must know to read the numbers rightly.

        Returns:
            The claim with its verdict; "not judged" in smoke and quick runs and on a user's data.

        Raises:
            DataError: if the bar or the numbers do not fit, or the statement was claimed before.
        """
        if any(claim.statement == statement for claim in self._claims):
            raise DataError(f"the claim {statement!r} was made before in this run; give each its own words.")
        claim = make_claim(
            statement,
            paper=paper,
            measured=measured,
            at_least=at_least,
            at_most=at_most,
            baseline=baseline,
            interval=interval,
            unit=unit,
            note=note,
            judged=is_judged(self.budget, self._data),
        )
        self._claims.append(claim)
        self.write_log(f"{statement}: {claim.verdict}. {claim_sentence(claim, len(self.seeds))}")
        self.save("running")
        return claim

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], caption: str = "") -> None:
        """Record a table: for people in the report, exact in ``tables/<name>.csv`` and findings.json.

        Args:
            name: of the file; letters, digits, - and _.
            rows: one mapping per row from column to value: text, number, truth value or None. The columns are
                those of all rows, in the order of their first appearance.
            caption: what the table shows.

        Raises:
            DataError: if there are no rows, a value is of another type, or the name is taken or unfit.
        """
        self._check_new(name, "a table", self._tables)
        columns = tuple(dict.fromkeys(str(column) for row in rows for column in row))
        if not columns:
            raise DataError(f"table {name!r} has no rows; record it once there is something in it.")
        cells = tuple(tuple(_cell(row.get(c), name, c) for c in columns) for row in rows)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([columns, *cells])
        (self.out / TABLES).mkdir(exist_ok=True)
        write_atomically(self.out / TABLES / f"{name}.csv", text.getvalue())
        self._tables.append(Table(name, caption, columns, cells))
        self.save("running")

    def figure(self, name: str, figure: Figure, caption: str, alt: str) -> None:
        """Record a matplotlib figure as ``figures/<name>.png`` and close it.

        Args:
            name: of the file; letters, digits, - and _.
            figure: drawn, preferably inside `paperback.study.figures.style`.
            caption: what it shows and what to look at.
            alt: what is to be seen, for those who cannot see it.

        Raises:
            DataError: if caption or alt is empty, or the name is taken or unfit.
        """
        self._check_new(name, "a figure", self._figures)
        if not caption.strip() or not alt.strip():
            raise DataError(f"figure {name!r} needs a caption and an alt text; say what it shows.")
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
        (self.out / FIGURES).mkdir(exist_ok=True)
        write_atomically(self.out / FIGURES / f"{name}.png", png.getvalue())
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:  # a figure made through pyplot stays in memory until pyplot lets go of it
            pyplot.close(figure)
        figure.clear()
        self._figures.append(FigureFile(name, caption, alt))
        self.save("running")

    def model(self, name: str, module: nn.Module) -> None:
        """Save a fitted model in the folder ``<name>`` of the run, for `paperback.load`.

        Args:
            name: of the folder; letters, digits, - and _.
            module: with ``save_pretrained``, as every module of paperback has.

        Raises:
            DataError: if the module cannot be saved so, or the name is taken or unfit.
        """
        self._check_new(name, "a model", self._models)
        save = getattr(module, "save_pretrained", None)
        if not callable(save):
            raise DataError(
                f"model {name!r} is a {type(module).__name__} without save_pretrained; "
                "derive it from paperback.saving.Saved."
            )
        save(self.out / name)
        self._models.append(Model(name, measure.parameters(module), measure.size_on_disk(self.out / name)))
        self.save("running")

    def note(self, text: str) -> None:
        """Record a sentence or two for the reader of the report: a limit, a surprise, what was left out."""
        self._notes.append(text)
        self.save("running")

    def log(self, text: str) -> None:
        """Write a line to log.txt, with the seconds since the start, and show it when progress is shown."""
        self.write_log(text)
        self._bars.say(text)

    # -- what the harness asks for -------------------------------------------------------------------------

    def write_log(self, text: str) -> None:
        """Write to log.txt without showing it."""
        with (self.out / LOG).open("a", encoding="utf-8") as file:
            file.write(f"[{time.perf_counter() - self._clock:8.1f} s] {text}\n")

    def finding(self, status: Status, failure: Failure | None = None) -> Finding:
        """What was recorded until now, under the given status."""
        return Finding(
            slug=self.slug,
            question=self._question,
            status=status,
            failure=failure,
            budget=self.budget,
            seeds=self.seeds,
            data=None if self._data is None else str(self._data),
            command=self._command,
            started=self._started,
            seconds=time.perf_counter() - self._clock,
            peak_memory_bytes=measure.peak_memory(),
            environment=self._environment,
            claims=tuple(self._claims),
            tables=tuple(self._tables),
            figures=tuple(self._figures),
            models=tuple(self._models),
            notes=tuple(self._notes),
            folder=self.out,
        )

    def save(self, status: Status, failure: Failure | None = None) -> Finding:
        """Write findings.json as of now, and return what it says."""
        finding = self.finding(status, failure)
        write_atomically(self.out / FINDINGS, finding.to_json())
        return finding

    def _check_new(self, name: str, what: str, recorded: Sequence[Table | FigureFile | Model]) -> None:
        check_name(name, what)
        if any(item.name == name for item in recorded):
            raise DataError(f"this run has {what} named {name!r} already; choose another name.")


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds as a tuple.

    Raises:
        DataError: if there are none, two are equal, or one is not a non-negative integer.
    """
    result = tuple(seeds)
    if not result or len(set(result)) < len(result) or any(type(s) is not int or s < 0 for s in result):
        raise DataError(f"the seeds are {list(seeds)}; give one or more different integers, 0 or larger.")
    return result


def _cell(value: Any, table: str, column: str) -> Cell:
    """A plain Python scalar; those of numpy and torch are unwrapped."""
    if not isinstance(value, str) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise DataError(
        f"table {table!r} has a {type(value).__name__} in column {column!r}; "
        "give text, a number, a truth value or None."
    )
