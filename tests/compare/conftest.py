"""Makes the fake bench importable, here and in the processes of jobs, and builds leaderboards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_bench import METRICS, contender

from paperback.compare.job import Result
from paperback.compare.leaderboard import DataNote, Leaderboard, Row, rank, summarise
from paperback.study.finding import Environment

ENVIRONMENT = Environment({"python": "3.11", "paperback": "0.1.0"}, None, "Linux", 2, 8_000_000_000)


def results(*losses: float | str, cost: float = 1.0) -> dict[int, Result]:
    """One result per seed: a number is the loss of a job that was done, a text why one failed."""
    made = {}
    for seed, loss in enumerate(losses):
        if isinstance(loss, str):
            made[seed] = Result("f", "failed", reason=loss, seconds=5.0, peak_memory=7)
        else:
            metrics = {"loss": loss, "accuracy": None, "size": 1000.0, "fit_seconds": cost}
            made[seed] = Result("f", "done", "", metrics, seconds=2.0, artefact="artefact/model")
    return made


@pytest.fixture
def make_row() -> Callable[..., Row]:
    """A row from the losses (or failures) of a contender."""

    def build(name: str, *losses: float | str, cost: float = 1.0, n_seeds: int | None = None) -> Row:
        return summarise(contender(name, None), results(*losses, cost=cost), n_seeds or len(losses), METRICS)

    return build


@pytest.fixture
def make_board(tmp_path: Path) -> Callable[..., Leaderboard]:
    """A leaderboard of rows, in a folder of its own."""

    def build(rows: Sequence[Row], n_seeds: int = 3) -> Leaderboard:
        return Leaderboard(
            task="density",
            budget="quick",
            seeds=tuple(range(n_seeds)),
            complete=True,
            data=DataNote("digits", "somewhere", "CC0", ""),
            metrics=METRICS,
            rows=rank(rows, METRICS[0]),
            environment=ENVIRONMENT,
            finished="2026-11-24T10:00:00+00:00",
            folder=tmp_path,
        )

    return build
