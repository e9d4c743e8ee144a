"""What a run found, as data: claims, tables, figures, models, and the circumstances.

``findings.json`` holds one `Finding`. Its format stands in ``findings.schema.json`` beside this file and
is checked strictly on reading. Nothing here imports torch, so a recorded result can be listed at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from paperback.errors import ArtefactError, DataError
from paperback.study.budget import JUDGED, Budget
from paperback.study.claim import Claim
from paperback.study.encoding import decode, encode, put_back_non_finite, take_out_non_finite

SCHEMA_VERSION = 1
FINDINGS, REPORT, LOG, FIGURES, TABLES = "findings.json", "report.html", "log.txt", "figures", "tables"

Status = Literal["running", "complete", "failed", "interrupted"]
Cell = str | int | float | bool | None

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED = {FIGURES, TABLES}


@dataclass(frozen=True)
class Table:
    """A table of a run, whose exact numbers are also in ``tables/<name>.csv``.

    Attributes:
        name: of the file, without extension.
        caption: what it shows.
        columns: the headings, in order.
        rows: one tuple per row, a cell per column; None where a row has no value.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class FigureFile:
    """A figure of a run, in ``figures/<name>.png``.

    Attributes:
        name: of the file, without extension.
        caption: what it shows.
        alt: what is to be seen, for those who cannot see it.
    """

    name: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Model:
    """A fitted model of a run, in a folder of that name; `paperback.load` reads it.

    Attributes:
        name: of the folder.
        parameters: how many it has.
        bytes: of its files.
    """

    name: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Environment:
    """Where a run took place.

    Attributes:
        versions: of python, paperback, torch, numpy and others.
        commit: git commit of the checkout that ran, followed by "+changes" if it had any; None outside a
            checkout.
        platform: operating system and architecture.
        cpus: logical processors that this process may use.
        memory_bytes: of the machine.
    """

    versions: dict[str, str]
    commit: str | None
    platform: str
    cpus: int
    memory_bytes: int


@dataclass(frozen=True)
class Failure:
    """Why a run did not complete: the type of the exception, and its message."""

    kind: str
    message: str


@dataclass(frozen=True)
class Finding:
    """Everything that a run found.

    Attributes:
        slug: of the method.
        question: what the study asks, from its docstring.
        status: "running" until the end; a file that says so without a running process is of a run that was
            killed.
        failure: why it failed or was interrupted.
        budget: of the run.
        seeds: every seed of the run.
        data: the user's data, as given; None for the shipped data.
        command: the command that repeats the run.
        started: when, ISO 8601 with time zone.
        seconds: how long it took, or had taken when this was written.
        peak_memory_bytes: the most resident memory that the process held.
        environment: versions and machine.
        claims, tables, figures, models, notes: what the study recorded, in order.
        folder: where this was read from or written to; not stored.
    """

    slug: str
    question: str
    status: Status
    failure: Failure | None
    budget: Budget
    seeds: tuple[int, ...]
    data: str | None
    command: str
    started: str
    seconds: float
    peak_memory_bytes: int
    environment: Environment
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[FigureFile, ...] = ()
    models: tuple[Model, ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path | None = field(default=None, compare=False, metadata={"local": True})

    @property
    def judged(self) -> bool:
        """Whether claims of this run get a verdict: a standard or full run on the shipped data."""
        return is_judged(self.budget, self.data)

    @property
    def outcome(self) -> str:
        """The status in words.

        A file that still says "running" is of a run that did not finish, unless it is under way.
        """
        words: dict[Status, str] = {
            "running": "did not finish",
            "complete": "complete",
            "failed": "failed",
            "interrupted": "was interrupted",
        }
        return words[self.status]

    def to_json(self) -> str:
        """The text of findings.json."""
        document, places = take_out_non_finite(encode(self))
        document = {"schema_version": SCHEMA_VERSION, **document, "not_finite": places}
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "findings.json") -> Finding:
        """Read what `to_json` wrote.

        Args:
            text: of the file.
            source: name of the file, for messages.

        Returns:
            The finding, without its folder.

        Raises:
            ArtefactError: if the text is truncated, not a finding, or of another version.
        """
        try:
            document = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ArtefactError(f"{source} is not whole JSON ({error}); run the study again.") from error
        version = document.pop("schema_version", None) if isinstance(document, dict) else None
        if type(version) is not int:
            raise ArtefactError(f"{source} is not a finding of paperback: it has no schema_version.")
        if version != SCHEMA_VERSION:
            remedy = "update paperback" if version > SCHEMA_VERSION else "run the study again"
            raise ArtefactError(
                f"{source} has schema version {version}, this paperback reads {SCHEMA_VERSION}; {remedy}."
            )
        try:
            places = decode(dict[str, str], document.pop("not_finite", {}), "not_finite")
            finding: Finding = decode(cls, put_back_non_finite(document, places), "the finding")
            _check(finding)
        except (ArtefactError, DataError) as error:
            raise ArtefactError(f"{source} is damaged or foreign: {error}") from error
        return finding


def is_judged(budget: Budget, data: object | None) -> bool:
    """Whether a run of this budget, on this data (None: what ships), judges its claims."""
    return budget in JUDGED and data is None


def check_name(name: str, what: str) -> str:
    """A name that is safe as a file name everywhere.

    Raises:
        DataError: if it is not.
    """
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise DataError(
            f"{what} cannot be named {name!r}; use letters, digits, - and _, but not {FIGURES} or {TABLES}."
        )
    return name


def read_run(folder: str | Path) -> Finding:
    """The finding of a run's folder, whatever its status.

    Args:
        folder: what a run wrote.

    Returns:
        The finding with its folder; `Finding.outcome` says whether the run came to its end.

    Raises:
        ArtefactError: if the folder has no findings.json, or a damaged one.
    """
    path = Path(folder) / FINDINGS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtefactError(
            f"{folder} is not the folder of a run, or its run did not finish: it has no {FINDINGS}."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} cannot be read ({error}).") from error
    return replace(Finding.from_json(text, source=str(path)), folder=Path(folder))


def _check(finding: Finding) -> None:
    """What types alone do not say: names are file names, rows are as wide as their table."""
    recorded: tuple[Table | FigureFile | Model, ...] = (*finding.tables, *finding.figures, *finding.models)
    for item in recorded:
        check_name(item.name, type(item).__name__)
    for table in finding.tables:
        for number, row in enumerate(table.rows):
            if len(row) != len(table.columns):
                raise ArtefactError(
                    f"row {number} of table {table.name} is not as wide as its {len(table.columns)} columns."
                )
