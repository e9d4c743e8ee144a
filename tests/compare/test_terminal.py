import io
from dataclasses import replace

import pytest
from fake_bench import METRICS
from rich.console import Console

from paperback.compare.bench import Metric
from paperback.compare.job import Job, Result
from paperback.compare.terminal import Display, print_leaderboard


def printed(board, width=100):
    stream = io.StringIO()
    print_leaderboard(board, Console(file=stream, width=width, color_system=None, highlight=False))
    return stream.getvalue()


@pytest.fixture
def wide_board(make_board, make_row):
    rows = [
        make_row(f"a contender with a rather long name, number {i}", 0.5 + i, 0.6 + i, 0.7 + i)
        for i in range(3)
    ]
    rows.append(make_row("broken", *["it was not done after 300 s, the limit for one job."] * 3))
    many = tuple(Metric(f"m{i}", f"another quite long metric {i}", "nats", better="lower") for i in range(6))
    spreads = {metric.name: rows[0].metrics["loss"] for metric in many}
    rows = [replace(row, metrics=row.metrics | spreads) for row in rows[:3]] + rows[3:]
    return replace(make_board(rows), metrics=(*METRICS[:3], *many, METRICS[3]))


@pytest.mark.parametrize(("width", "limit"), [(100, 100), (80, 80), (120, 120)])
def test_the_table_fits_and_says_what_is_left_out(wide_board, width, limit):
    text = printed(wide_board, width)
    table = text.split("report ")[0]
    assert max(len(line) for line in table.splitlines()) <= limit
    assert "seconds to" in table, "the cost is always shown"
    assert "0.5 to 0.7" in table
    assert "more metric" in text


def test_failures_are_told_and_the_best_model_can_be_loaded(make_board, make_row):
    board = make_board(
        [make_row("good", 0.5, 0.6, 0.7), make_row("lame", "it [hung].", "it [hung].", "it [hung].")]
    )
    text = printed(board)
    assert "lame failed: it [hung]." in text
    assert f'paperback.load("{board.folder}/jobs/good-0/artefact/model"), good' in text
    assert "loss [nats]" in text


def test_nothing_is_printed_when_progress_is_off(capsys):
    job = Job("m:B", "plain", 0, "quick", None, None, None, "f")
    with Display(False, 2, 1, METRICS[0]) as display:
        display.start(job)
        display.end(job, Result("f", "failed", "it broke."))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_without_a_terminal_progress_is_a_line_per_job(capsys):
    job = Job("m:B", "plain", 0, "quick", None, None, None, "f")
    with Display(True, 3, 1, METRICS[0]) as display:
        for result in (
            Result("f", "done", metrics={"loss": 0.5}, seconds=2.0),
            Result("f", "failed", "it [broke]."),
        ):
            display.start(job)
            display.end(job, result)
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(0) == "1 job done before; going on from there"
    assert lines == ["done   plain, seed 0: loss 0.5, 2.0 s", "failed plain, seed 0: it [broke]."]
