"""The report of a run: one HTML file that needs nothing beside it, for readers new to the paper."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from paperback.study import wording
from paperback.study.claim import Claim, Verdict
from paperback.study.encoding import write_atomically
from paperback.study.finding import FIGURES, LOG, REPORT, Finding, Table

if TYPE_CHECKING:
    from paperback.catalogue import Method

_LOG_LINES = 200  # the end of the log that the report shows; the whole of it is in log.txt


@dataclass(frozen=True)
class Strip:
    """Where interval, value and bar lie on a line from 0 to 100, for a small drawing."""

    low: float
    high: float
    value: float
    bar: float
    right_side: tuple[float, float]  # start and width of the part that reaches the bar


def render(finding: Finding, method: Method, folder: Path) -> str:
    """The report as HTML.

    Args:
        finding: what was found.
        method: the paper that it is about.
        folder: of the run, with its figures and its log.

    Returns:
        A whole document; figures, style and all are inside.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("paperback.study"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"duration": wording.duration, "size": wording.size, "number": wording.number}
    n_seeds = len(finding.seeds)
    return environment.get_template("report.html").render(
        finding=finding,
        method=method,
        bibtex=method.bibtex(),
        verdicts=tally(finding.claims),
        claims=[
            {
                "claim": claim,
                "numbers": wording.claim_numbers(claim),
                "sentence": wording.claim_sentence(claim, n_seeds),
                "strip": strip(claim),
            }
            for claim in finding.claims
        ],
        figures=[
            {"figure": f, "png": _data_url(folder / FIGURES / f"{f.name}.png")} for f in finding.figures
        ],
        tables=[{"table": t, "rows": _cells(t), "numeric": _numeric(t)} for t in finding.tables],
        log=_tail(folder / LOG),
        count=wording.count,
    )


def write(finding: Finding, method: Method, folder: Path) -> Path:
    """Write the report into the folder of the run and return its path."""
    path = folder / REPORT
    write_atomically(path, render(finding, method, folder))
    return path


def tally(claims: Sequence[Claim]) -> dict[Verdict, int]:
    """How many claims got which verdict, the good ones first; verdicts that none got are left out."""
    counts = Counter(claim.verdict for claim in claims)
    return {verdict: counts[verdict] for verdict in get_args(Verdict) if counts[verdict]}


def strip(claim: Claim) -> Strip | None:
    """The drawing of a claim's interval against its bar; None where a number is not finite."""
    low, high = claim.interval if claim.interval is not None else (claim.value, claim.value)
    points = [low, high, claim.value, claim.bar]
    if not all(math.isfinite(p) for p in points):
        return None
    start, end = min(points), max(points)
    margin = 0.15 * (end - start) or 1.0

    def place(x: float) -> float:
        return round(100 * (x - start + margin) / (end - start + 2 * margin), 2)

    bar = place(claim.bar)
    right_side = (bar, 100 - bar) if claim.direction == "at least" else (0.0, bar)
    return Strip(place(low), place(high), place(claim.value), bar, right_side)


def _cells(table: Table) -> list[list[str]]:
    columns = [wording.column([row[i] for row in table.rows]) for i in range(len(table.columns))]
    return [list(row) for row in zip(*columns, strict=True)]


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers, to be set flush right."""
    return [
        any(isinstance(row[i], int | float) for row in table.rows)
        and not any(isinstance(row[i], str | bool) for row in table.rows)
        for i in range(len(table.columns))
    ]


def _data_url(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode()


def _tail(log: Path) -> str:
    if not log.exists():
        return ""
    lines = log.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[-_LOG_LINES:])
