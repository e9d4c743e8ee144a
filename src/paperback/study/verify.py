"""Runs studies again and puts side by side what the paper claims, what was recorded, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from paperback import catalogue
from paperback.errors import PaperbackError
from paperback.study import record as records
from paperback.study import wording
from paperback.study.budget import Budget, check_budget
from paperback.study.claim import Claim, Verdict
from paperback.study.execute import execute
from paperback.study.finding import Finding
from paperback.study.terminal import bar_text, measured_text, verdict_text

_RANK: dict[Verdict, int] = {"held": 0, "undecided": 1, "did not hold": 2}


@dataclass(frozen=True)
class Check:
    """One line of the comparison.

    Attributes:
        slug: of the method.
        statement: of the claim; empty where the whole run is meant.
        recorded: the claim as recorded, if it is.
        measured: the claim as measured now, if it was.
        passed: whether this line is in order.
        remark: what a reader must know: why it is not, or that it is known.
    """

    slug: str
    statement: str
    recorded: Claim | None
    measured: Claim | None
    passed: bool
    remark: str


def verify(
    slugs: Sequence[str] | None = None,
    *,
    budget: Budget = "standard",
    record: bool = False,
    out: str | Path | None = None,
    progress: bool = True,
) -> int:
    """Run the studies of some methods again and compare with the paper and the record; the table is printed.

    A claim is in order when it does no worse than its record: one that is recorded as undecided or as not
    holding is known. Without a record it must not fail to hold. Smoke and quick runs judge nothing; there
    only a run that fails is out of order.

    Args:
        slugs: of the methods; all that have a study if not given.
        budget: of the runs.
        record: make each finding the record of its method; takes standard runs only.
        out: folder for the runs, one folder each; ``runs/verify-<time>`` if not given.
        progress: show progress bars.

    Returns:
        The exit code: 0 if all is in order, otherwise 1.

    Raises:
        PaperbackError: if a method or its study is not there, or record is asked for with another budget.
    """
    check_budget(budget)
    if record and budget != "standard":
        raise PaperbackError(
            f"a {budget} run cannot be recorded; leave out --budget, or give --budget standard."
        )
    if record and records.results_folder() is None:
        raise PaperbackError("results are recorded in a checkout of paperback; run this inside one.")
    chosen = (
        [catalogue.find(s) for s in dict.fromkeys(slugs)]
        if slugs
        else [m for m in catalogue.methods() if m.study]
    )
    if missing := [method.slug for method in chosen if not method.study]:
        raise PaperbackError(
            f"{', '.join(missing)} has no study yet; `paperback list` shows the methods that work."
        )
    folder = Path(out) if out is not None else Path("runs") / f"verify-{datetime.now():%Y%m%d-%H%M%S}"
    checks: list[Check] = []
    for method in chosen:
        checks += _verify_one(method.slug, budget, record, folder / method.slug, progress)
    _print(checks, folder)
    return 0 if all(check.passed for check in checks) else 1


def compare_with_record(finding: Finding, recorded: Finding | None) -> list[Check]:
    """One check per claim of a run that came to its end.

    Args:
        finding: of the run.
        recorded: the record of the same method, if there is one.

    Returns:
        The claims that were measured, then those that were recorded and were not made again.
    """
    before = {claim.statement: claim for claim in recorded.claims} if recorded is not None else {}
    checks = [_check(finding.slug, claim, before.pop(claim.statement, None)) for claim in finding.claims]
    if finding.judged:
        checks += [
            Check(finding.slug, s, c, None, False, "fails: recorded, but not measured")
            for s, c in before.items()
        ]
        if not finding.claims and not checks:
            checks.append(Check(finding.slug, "", None, None, False, "the study made no claim"))
    return checks or [Check(finding.slug, "", None, None, True, "the run came to its end")]


def _check(slug: str, measured: Claim, recorded: Claim | None) -> Check:
    passed, remark = True, ""
    if measured.verdict != "not judged":
        before = recorded.verdict if recorded is not None else None
        passed = _RANK[measured.verdict] <= _RANK[before or "undecided"]
        if not passed:
            remark = f"fails: recorded as {before}" if before else "fails: not on record"
        elif measured.verdict != "held":
            remark = "on record" if before else "not on record"
    return Check(slug, measured.statement, recorded, measured, passed, remark)


def _verify_one(slug: str, budget: Budget, record: bool, folder: Path, progress: bool) -> list[Check]:
    recorded = records.read(slug)
    try:
        finding = execute(slug, budget=budget, out=folder, progress=progress)
    except (
        Exception
    ) as error:  # must not keep the other studies from being verified; its folder has the traceback
        return [Check(slug, "", None, None, False, f"the run failed: {type(error).__name__}: {error}")]
    checks = compare_with_record(finding, recorded)
    if record:
        records.write(slug, finding)
    return checks


def _print(checks: Sequence[Check], folder: Path) -> None:
    console = Console()
    for slug, group in groupby(checks, key=lambda check: check.slug):
        console.print(f"\n[bold]{slug}[/]", highlight=False)
        grid = Grid(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        for name, ratio in (("Claim", 5), ("Paper", 3), ("Recorded", 3), ("Measured", 3), ("Verdict", 3)):
            grid.add_column(name, ratio=ratio)
        for check in group:
            if check.measured is None and check.recorded is None:
                console.print(_remark(check), highlight=False)
            else:
                grid.add_row(*_row(check))
        if grid.rows:
            console.print(grid, highlight=False)
    failed = sum(not check.passed for check in checks)
    total = wording.count(len(checks), "check")
    console.print(f"\n{failed} of {total} failed. The runs are in {folder}", soft_wrap=True, highlight=False)


def _row(check: Check) -> tuple[str, ...]:
    claim = check.measured or check.recorded
    assert claim is not None
    verdict = verdict_text(check.measured) if check.measured else ""
    return (
        f"{escape(claim.statement)}\n[dim]bar: {escape(bar_text(claim))}[/]",
        escape(claim.paper),
        escape(measured_text(check.recorded)) if check.recorded else "–",
        escape(measured_text(check.measured)) if check.measured else "–",
        "\n".join(part for part in (verdict, _remark(check)) if part),
    )


def _remark(check: Check) -> str:
    return f"[{'dim' if check.passed else 'bold red'}]{escape(check.remark)}[/]" if check.remark else ""
