"""The leaderboard as one HTML file: no scripts, no other files, readable in the dark and on a phone."""

from __future__ import annotations

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined

from paperback.compare.figure import alternative_text
from paperback.compare.leaderboard import Leaderboard
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
from paperback.study.encoding import write_atomically
from paperback.study.wording import count, size

FILE_NAME = "leaderboard.html"


def render(leaderboard: Leaderboard, figure: bytes | None) -> str:
    """The report of a leaderboard.

    Args:
        leaderboard: what to show.
        figure: quality against cost, a PNG; None where there is nothing to draw.

    Returns:
        A whole HTML document.
    """
    environment = Environment(
        loader=PackageLoader("paperback.compare"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("leaderboard.html").render(
        board=leaderboard,
        metrics=leaderboard.measured,
        writers=writers(leaderboard),
        heading=heading,
        mean_text=mean_text,
        interval_text=interval_text,
        rank_text=rank_text,
        duration=short_duration,
        size=size,
        count=count,
        explained=rest_of(leaderboard),
        unranked=without_rank_text(leaderboard),
        indistinct=any(row.like_best and (row.rank or 0) > 1 for row in leaderboard.rows),
        best=next((row for row in leaderboard.rows if row.holds_model(leaderboard.folder)), None),
        readings=[row for row in leaderboard.rows if row.reading],
        figure=base64.b64encode(figure).decode() if figure is not None else None,
        alternative=alternative_text(leaderboard) if figure is not None else "",
    )


def write_report(leaderboard: Leaderboard, figure: bytes | None) -> None:
    """Write ``leaderboard.html`` into the leaderboard's folder."""
    write_atomically(leaderboard.folder / FILE_NAME, render(leaderboard, figure))
