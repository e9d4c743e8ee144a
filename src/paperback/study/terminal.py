"""What a run and `verify` print: short tables, and where to find the rest."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from paperback.study import wording
from paperback.study.claim import Claim, Verdict
from paperback.study.finding import FIGURES, REPORT, Finding

COLOURS: dict[Verdict, str] = {
    "held": "green",
    "did not hold": "red",
    "undecided": "yellow",
    "not judged": "dim",
}


def verdict_text(claim: Claim) -> str:
    """The verdict with its colour; for a claim that is not judged, whether its bar was reached."""
    words: str = claim.verdict
    if claim.verdict == "not judged":
        words = "bar reached" if claim.bar_reached else "bar not reached"
    return f"[{COLOURS[claim.verdict]}]{words}[/]"


def measured_text(claim: Claim) -> str:
    """What was measured in short, "0.79 against 0.71" where there is a baseline."""
    said = wording.claim_numbers(claim)
    return said["measured"] if claim.baseline is None else f"{said['measured']} against {said['baseline']}"


def bar_text(claim: Claim) -> str:
    """What was asked in short: "at most 0.01", "difference at least 0.04" where there is a baseline."""
    bar = wording.claim_numbers(claim)["bar"]
    return bar if claim.baseline is None else f"difference {bar}"


def print_finding(finding: Finding, console: Console | None = None) -> None:
    """Print the verdicts of a run, and where its report, figures and models are.

    Args:
        finding: of a run, with its folder.
        console: where to print; stdout if not given.
    """
    console = console if console is not None else Console()
    seeds = wording.count(len(finding.seeds), "seed")
    time = wording.duration(finding.seconds)
    console.print(f"\n[bold]{finding.slug}[/], budget {finding.budget}, {seeds}, {time}\n", highlight=False)
    grid = Grid(box=None, padding=(0, 2, 0, 0), show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column()
    for claim in finding.claims:
        numbers = f"{measured_text(claim)}; bar: {bar_text(claim)}; paper: {claim.paper}"
        grid.add_row(verdict_text(claim), f"{escape(claim.statement)}\n[dim]{escape(numbers)}[/]")
    console.print(grid if finding.claims else "This run made no claim.", highlight=False)
    if finding.claims and not finding.judged:
        console.print("\n" + _why_not_judged(finding), highlight=False)
    console.print()
    for label, path in _places(finding):
        console.print(f"{label:<8} {path}", soft_wrap=True, markup=False, highlight=False)


def print_kept(folder: Path, status: str) -> None:
    """Say on stderr how a run ended that did not complete, and where what it had is kept."""
    Console(stderr=True).print(
        f"The run {'was ' if status == 'interrupted' else ''}{status}; what it had is in {folder / REPORT}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _why_not_judged(finding: Finding) -> str:
    if finding.data is not None:
        return "No verdicts: the claims are about other data."
    return f"No verdicts: a {finding.budget} run is too small to judge; --budget standard does."


def _places(finding: Finding) -> list[tuple[str, Path]]:
    if finding.folder is None:
        return []
    places = [("Report", finding.folder / REPORT)]
    if finding.figures:
        places.append(("Figures", finding.folder / FIGURES))
    return places + [("Model", finding.folder / model.name) for model in finding.models]
