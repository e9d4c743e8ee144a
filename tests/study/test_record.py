from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paperback.errors import ArtefactError, PaperbackError
from paperback.study import record, run_study, verify
from paperback.study.claim import Claim, make_claim
from paperback.study.finding import Finding
from paperback.study.verify import compare_with_record

Register = Callable[..., None]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs are written to, and results recorded in, a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "results_folder", lambda: tmp_path / "results")
    return tmp_path / "results"


def complete(slug: str = "fake-holds", budget: str = "standard") -> Finding:
    return run_study(slug, budget=budget, progress=False)  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(register: Register, results: Path) -> None:
    register("holds")
    finding = complete()
    assert record.read("fake-holds") is None
    assert record.write("fake-holds", finding) == results / "fake-holds.json"
    assert record.read("fake-holds") == finding
    assert (results / "figures" / "fake-holds" / "sum.png").read_bytes().startswith(b"\x89PNG")


def test_a_new_record_replaces_the_old_with_its_figures(register: Register, results: Path) -> None:
    register("holds")
    finding = complete()
    record.write("fake-holds", finding)
    (results / "figures" / "fake-holds" / "old.png").touch()
    record.write("fake-holds", finding)
    assert [p.name for p in (results / "figures" / "fake-holds").iterdir()] == ["sum.png"]
    assert [p.name for p in (results / "figures").iterdir()] == ["fake-holds"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "failed"}, "the run failed"),
        ({"status": "interrupted"}, "the run was interrupted"),
        ({"status": "running"}, "the run did not finish"),
        ({"budget": "quick"}, "its budget is quick"),
        ({"budget": "full"}, "its budget is full"),
        ({"data": "my.csv"}, "it ran on my.csv"),
        ({"claims": ()}, "it made no claim"),
        ({"slug": "other"}, "finding of other"),
        ({"folder": None}, "no folder with figures"),
    ],
)
def test_what_is_no_complete_standard_run_is_not_recorded(
    change: dict[str, object], reason: str, register: Register, results: Path
) -> None:
    register("holds")
    with pytest.raises(PaperbackError, match=reason):
        record.write("fake-holds", replace(complete(), **change))  # type: ignore[arg-type]
    assert not (results / "fake-holds.json").exists()


def test_a_damaged_or_misplaced_record_is_an_error(register: Register, results: Path) -> None:
    register("holds")
    path = record.write("fake-holds", complete())
    path.rename(results / "fake-other.json")
    with pytest.raises(ArtefactError, match="holds the finding of fake-holds"):
        record.read("fake-other")
    (results / "fake-other.json").write_text("{")
    with pytest.raises(ArtefactError, match="not whole JSON"):
        record.read("fake-other")


def test_results_are_those_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    root = record.checkout()
    assert root is not None
    assert record.results_folder() == root / "results"
    # An installed package looks around the working directory.
    monkeypatch.setattr(record, "checkout", lambda: None)
    monkeypatch.chdir(root / "src" / "paperback")
    assert record.results_folder() == root / "results"
    monkeypatch.chdir(tmp_path)
    assert record.results_folder() is None
    assert record.read("monotone-dbm") is None


def test_reading_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'scipy', 'pandas', 'matplotlib', 'jinja2'}"
    code = (
        f"import sys; from paperback.study import record; record.read('x'); print({heavy} & set(sys.modules))"
    )
    source = Path(record.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_verify_is_content_when_everything_holds(
    register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    register("holds")
    assert verify(progress=False) == 0
    assert "0 of 1 check failed" in capsys.readouterr().out


def test_verify_tells_every_kind_of_failure(register: Register, capsys: pytest.CaptureFixture[str]) -> None:
    register("holds", "fails", "does_not_hold", "undecided", "no_claim")
    assert verify(progress=False) == 1
    printed = capsys.readouterr().out
    assert "the run failed: DataError" in printed
    assert "the study made no claim" in printed
    assert "3 of 5 checks failed" in printed  # undecided fails nothing


def test_what_is_on_record_as_not_holding_is_known(
    register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    register("does_not_hold")
    assert verify(record=True, progress=False) == 1  # the first time it is news
    assert verify(["fake-does-not-hold"], progress=False) == 0
    assert "on record" in capsys.readouterr().out


def test_a_small_budget_judges_nothing_and_records_nothing(register: Register, results: Path) -> None:
    register("does_not_hold")
    assert verify(budget="smoke", progress=False) == 0
    with pytest.raises(PaperbackError, match="a smoke run cannot be recorded"):
        verify(budget="smoke", record=True, progress=False)
    assert not results.exists()


def test_a_failing_run_is_not_recorded(register: Register, results: Path) -> None:
    register("fails")
    assert verify(record=True, progress=False) == 1
    assert not results.exists()


@pytest.mark.parametrize("now", ["held", "undecided", "did not hold", "absent"])
@pytest.mark.parametrize("before", ["held", "undecided", "did not hold", "absent"])
def test_a_claim_passes_when_it_does_no_worse_than_its_record(
    before: str, now: str, register: Register
) -> None:
    register("holds")
    finding = complete()
    bars = {"held": (1.0, 2.0), "undecided": (-1.0, 1.0), "did not hold": (-2.0, -1.0)}

    def claims(verdict: str) -> tuple[Claim, ...]:
        one = make_claim("one", paper="", measured=0.0, at_least=0.0, interval=bars.get(verdict))
        return () if verdict == "absent" else (one,)

    checks = compare_with_record(
        replace(finding, claims=claims(now)),
        None if before == "absent" else replace(finding, claims=claims(before)),
    )
    order = ["held", "undecided", "did not hold", "absent"]
    expected = now in ("held", "undecided") if before == "absent" else order.index(now) <= order.index(before)
    assert [check.passed for check in checks] == [expected]
