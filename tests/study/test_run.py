from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from paperback.errors import DataError
from paperback.study import Run, read_run
from paperback.study.budget import BUDGETS, check_budget, for_budget
from paperback.study.progress import Bars


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run("fake", budget="standard", seeds=(3, 4), out=tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"standard": 3}, (3, 3, 3, 3)),
        ({"standard": 3, "quick": 2}, (2, 2, 3, 3)),
        ({"standard": 3, "smoke": 1}, (1, 3, 3, 3)),
        ({"standard": 3, "smoke": 0, "quick": 2, "full": 4}, (0, 2, 3, 4)),
    ],
)
def test_sizes_fall_back_to_the_next_larger_budget(given: dict[str, int], expected: tuple[int, ...]) -> None:
    assert tuple(for_budget(budget, **given) for budget in BUDGETS) == expected


def test_a_budget_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DataError, match="smoke, quick, standard, full"):
        check_budget("huge")


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (0.5,), (True,), ("0",)])
def test_seeds_that_cannot_be_used_are_refused(seeds: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="different integers"):
        Run("fake", seeds=seeds, out=tmp_path)


def test_the_folder_says_running_and_keeps_up(run: Run) -> None:
    assert read_run(run.out).status == "running"
    run.claim("first", paper="", measured=1.0, at_least=0.0)
    run.note("a note")
    finding = read_run(run.out)
    assert (finding.status, finding.notes, len(finding.claims)) == ("running", ("a note",), 1)
    assert (finding.seeds, run.seed) == ((3, 4), 3)


@pytest.mark.parametrize(
    ("budget", "data", "verdict"),
    [
        ("smoke", None, "not judged"),
        ("quick", None, "not judged"),
        ("standard", None, "held"),
        ("full", None, "held"),
        ("standard", "own.csv", "not judged"),
    ],
)
def test_who_judges(budget: Any, data: str | None, verdict: str, tmp_path: Path) -> None:
    run = Run("fake", budget=budget, out=tmp_path, data=data, progress=False)
    claim = run.claim("holds", paper="", measured=1.0, at_least=0.5)
    assert (claim.verdict, claim.bar_reached) == (verdict, True)


def test_a_table_is_exact_on_disk(run: Run) -> None:
    third = np.float32(1) / np.float32(3)
    run.table(
        "t", [{"a": third, "b": "x, y"}, {"c": torch.tensor(2), "a": 0.1}, {"b": None, "c": True}], "All."
    )
    with (run.out / "tables" / "t.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["a", "b", "c"], [repr(float(third)), "x, y", ""], ["0.1", "", "2"], ["", "", "True"]]
    table = read_run(run.out).tables[0]
    assert table.columns == ("a", "b", "c")
    assert table.rows == ((float(third), "x, y", None), (0.1, None, 2), (None, None, True))


@pytest.mark.parametrize("rows", [[], [{}], [{"a": [1]}], [{"a": np.ones(2)}]])
def test_tables_that_hold_nothing_or_no_scalars_are_refused(run: Run, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="table 't'"):
        run.table("t", rows)


def test_a_figure_becomes_a_png_without_touching_the_users_backend(run: Run) -> None:
    before = dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)
    figure = Figure()
    figure.subplots().plot([1, 2])
    run.figure("f", figure, "A line.", "It rises.")
    assert (run.out / "figures" / "f.png").read_bytes().startswith(b"\x89PNG")
    assert not figure.axes
    assert (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)) == before


def test_a_pyplot_figure_is_let_go(run: Run) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, _ = pyplot.subplots()
    run.figure("f", figure, "Nothing.", "Empty axes.")
    assert not pyplot.fignum_exists(figure.number)


@pytest.mark.parametrize(("caption", "alt"), [("", "alt"), ("caption", " ")])
def test_a_figure_needs_words(run: Run, caption: str, alt: str) -> None:
    with pytest.raises(DataError, match="caption and an alt text"):
        run.figure("f", Figure(), caption, alt)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "figures", "Tables", ".hidden", "ä", "a b"])
def test_names_that_are_no_file_names_are_refused(run: Run, name: str) -> None:
    with pytest.raises(DataError, match="cannot be named"):
        run.table(name, [{"a": 1}])
    with pytest.raises(DataError, match="cannot be named"):
        run.model(name, nn.Linear(1, 1))


def test_nothing_is_recorded_twice(run: Run) -> None:
    run.table("t", [{"a": 1}])
    run.claim("c", paper="", measured=1.0, at_least=0.0)
    with pytest.raises(DataError, match="already"):
        run.table("t", [{"a": 2}])
    with pytest.raises(DataError, match="made before"):
        run.claim("c", paper="", measured=2.0, at_least=0.0)


def test_a_model_is_saved_counted_and_weighed(run: Run) -> None:
    from fake_studies import Net

    net = Net(width=5)
    run.model("net", net)
    model = read_run(run.out).models[0]
    assert (model.name, model.parameters) == ("net", 12)
    assert model.bytes == sum(p.stat().st_size for p in (run.out / "net").iterdir())
    again = Net.from_pretrained(run.out / "net")
    assert torch.equal(again.linear.weight, net.linear.weight)
    with pytest.raises(DataError, match="Linear without save_pretrained"):
        run.model("other", nn.Linear(1, 1))


def test_asking_for_the_data_is_remembered(tmp_path: Path) -> None:
    run = Run("fake", out=tmp_path, data="x.csv", progress=False)
    assert not run.data_was_read
    assert run.data == Path("x.csv")
    assert run.data_was_read


def test_log_lines_have_their_time(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    run.log("one\ntwo")
    assert (run.out / "log.txt").read_text().endswith("s] one\ntwo\n")
    assert capfd.readouterr() == ("", "")


def test_findings_are_json_while_running(run: Run) -> None:
    run.claim("c", paper="", measured=float("nan"), at_least=0.0)
    json.loads((run.out / "findings.json").read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_pass_everything_through(terminal: bool) -> None:
    output = io.StringIO()
    bars = Bars(True, Console(file=output, force_terminal=terminal, width=80))
    pairs = [(a, b) for a in bars.track(range(3), "outer") for b in bars.track(iter("xy"), "inner", total=2)]
    assert pairs == [(a, b) for a in range(3) for b in "xy"]
    assert bool(output.getvalue()) == terminal  # no escape codes in a log file
    assert ("outer" in output.getvalue()) == terminal


def test_bars_end_when_a_loop_is_left() -> None:
    bars = Bars(True, Console(file=io.StringIO(), force_terminal=True))
    for _ in bars.track(range(3), "left early"):
        break
    with pytest.raises(ZeroDivisionError):
        max(1 // item for item in bars.track(range(3), "raises"))
    assert list(bars.track(range(2), "again")) == [0, 1]
    assert bars._display is None


def test_silent_bars_write_nothing() -> None:
    output = io.StringIO()
    bars = Bars(False, Console(file=output, force_terminal=True))
    assert list(bars.track(range(2), "work")) == [0, 1]
    bars.say("a line")
    assert output.getvalue() == ""
