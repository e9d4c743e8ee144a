from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import paperback
from paperback.errors import DataError, PaperbackError
from paperback.study import read_run, run_study
from paperback.study.execute import choose_seeds, own_seeds

Register = Callable[..., None]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sleeping(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """A function that starts the sleeping study in a process of its own and returns once it sleeps."""
    started: list[subprocess.Popen[str]] = []
    source = str(Path(paperback.__file__).parents[1])

    def start(out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "fake_studies.py"), "sleeps", str(out)],
            env={"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PATH": ""},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        limit = time.monotonic() + 60
        while not (out / "asleep").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.05)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_complete_run_leaves_everything(
    register: Register, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register("complete")
    with pytest.warns(RuntimeWarning, match="did not converge"):
        finding = run_study("fake-complete", budget="standard", out=tmp_path / "run")
    files = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert files >= {
        "report.html",
        "findings.json",
        "log.txt",
        "figures/residual.png",
        "tables/accuracy.csv",
        "model/model.safetensors",
    }
    assert not [name for name in files if name.endswith(".tmp")]
    assert read_run(tmp_path / "run") == finding or any(c.value != c.value for c in finding.claims)
    assert (finding.status, finding.seeds) == ("complete", (0, 1, 2))
    assert [c.verdict for c in finding.claims] == [
        "held",
        "held",
        "did not hold",
        "undecided",
        "did not hold",
    ]
    assert "RuntimeWarning: 3 of 100" in (tmp_path / "run" / "log.txt").read_text()
    printed = capsys.readouterr().out
    for word in ("undecided", "did not hold", "report.html", "figures", "model"):
        assert word in printed


def test_a_quiet_run_prints_nothing_and_a_quick_one_takes_the_first_seed(
    register: Register, capfd: pytest.CaptureFixture[str]
) -> None:
    register("holds")
    finding = run_study("fake-holds", progress=False)
    assert capfd.readouterr() == ("", "")
    assert (finding.budget, finding.seeds, finding.claims[0].verdict) == ("quick", (0,), "not judged")
    assert finding.folder is not None
    assert finding.folder.parent == Path("runs")


def test_a_failing_run_says_so_and_keeps_what_it_had(register: Register, tmp_path: Path) -> None:
    register("fails")
    with pytest.raises(DataError, match="second half"):
        run_study("fake-fails", budget="standard", out=tmp_path / "run", progress=False)
    finding = read_run(tmp_path / "run")
    assert (finding.status, finding.failure.kind if finding.failure else None) == ("failed", "DataError")
    assert (len(finding.claims), len(finding.tables)) == (1, 1)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "This run failed" in report
    assert "the second half of the file &lt;data.csv&gt; is missing" in report
    assert "Traceback" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_what_it_had(
    number: signal.Signals, sleeping: Callable[[Path], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = sleeping(tmp_path / "run")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "The run was interrupted; what it had is in" in errors
    finding = read_run(tmp_path / "run")
    assert (finding.status, len(finding.claims), finding.seeds) == ("interrupted", 1, (7, 8))
    assert "This run was interrupted" in (tmp_path / "run" / "report.html").read_text()


def test_a_killed_run_is_not_mistaken_for_a_whole_one(
    sleeping: Callable[[Path], subprocess.Popen[str]], tmp_path: Path, register: Register
) -> None:
    register("holds")
    out = tmp_path / "run"
    process = sleeping(out)
    with pytest.raises(PaperbackError, match="another run is writing"):
        run_study("fake-holds", out=out, progress=False)
    process.kill()
    process.communicate()
    finding = read_run(out)
    assert (finding.status, finding.outcome, len(finding.claims)) == ("running", "did not finish", 1)
    assert not (out / "report.html").exists()
    assert (
        run_study("fake-holds", out=out, progress=False).status == "complete"
    )  # the lock died with the process


def test_an_earlier_run_is_replaced_and_nothing_else(register: Register, tmp_path: Path) -> None:
    register("complete", "holds")
    out = tmp_path / "run"
    with pytest.warns(RuntimeWarning):
        run_study("fake-complete", out=out, progress=False)
    (out / "mine.txt").write_text("my notes")
    (out / "figures" / "mine.png").write_text("my figure")
    run_study("fake-holds", out=out, progress=False)
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - {".lock"}
    assert files == {
        "report.html",
        "findings.json",
        "log.txt",
        "figures/sum.png",
        "mine.txt",
        "figures/mine.png",
    }


@pytest.mark.parametrize("name", ["thesis.tex", "findings.json"])
def test_a_folder_of_other_files_is_left_alone(name: str, register: Register, tmp_path: Path) -> None:
    register("holds")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).write_text("{}")
    with pytest.raises(DataError, match="holds other files"):
        run_study("fake-holds", out=tmp_path / "other", progress=False)
    assert [p.name for p in (tmp_path / "other").iterdir()] == [name]
    with pytest.raises(DataError, match="is a file"):
        run_study("fake-holds", out=tmp_path / "other" / name, progress=False)


def test_runs_at_once_have_folders_of_their_own(register: Register) -> None:
    register("holds")
    with ThreadPoolExecutor(4) as pool:
        findings = list(pool.map(lambda _: run_study("fake-holds", progress=False), range(4)))
    folders = {finding.folder for finding in findings}
    assert len(folders) == 4
    assert all(folder is not None and read_run(folder).status == "complete" for folder in folders)


def test_own_data_is_used_or_refused(register: Register, tmp_path: Path) -> None:
    register("uses_data", "holds")
    data = tmp_path / "my data.csv"
    data.write_text("abc")
    finding = run_study("fake-uses-data", budget="standard", data=data, target="y", progress=False)
    assert (finding.claims[0].measured, finding.claims[0].verdict) == ((3.0,), "not judged")
    assert finding.command == f"paperback run fake-uses-data --budget standard --data '{data}' --target y"
    with pytest.raises(PaperbackError, match="has its own data and did not read"):
        run_study("fake-holds", data=data, out=tmp_path / "unread", progress=False)
    assert read_run(tmp_path / "unread").status == "failed"
    with pytest.raises(DataError, match="does not exist"):
        run_study("fake-uses-data", data=tmp_path / "absent.csv", out=tmp_path / "none", progress=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("budget", "wanted", "expected"),
    [
        ("smoke", None, (5,)),
        ("quick", None, (5,)),
        ("standard", None, (5, 1)),
        ("full", None, (5, 1)),
        ("quick", 2, (5, 1)),
        ("standard", 1, (5,)),
        ("standard", 5, (5, 1, 0, 2, 3)),
        ("standard", (9, 4), (9, 4)),
    ],
)
def test_seeds(budget: str, wanted: object, expected: tuple[int, ...]) -> None:
    assert choose_seeds((5, 1), budget, wanted) == expected  # type: ignore[arg-type]


def test_seeds_of_a_study_stand_on_it_or_in_its_module() -> None:
    import fake_studies

    assert own_seeds(fake_studies.sleeps) == (7, 8)
    assert own_seeds(fake_studies.holds) == (0, 1, 2)
    assert own_seeds(test_seeds) == (0,)
    with pytest.raises(DataError, match="at least one"):
        choose_seeds((0,), "quick", 0)


@pytest.mark.parametrize(
    ("seeds", "command"),
    [
        (None, "paperback run fake-holds --budget quick"),
        (2, "paperback run fake-holds --budget quick --seeds 2"),
        ((0, 1), "paperback run fake-holds --budget quick --seeds 2"),
        ((0,), "paperback run fake-holds --budget quick"),
        ((3, 1), "run_study('fake-holds', budget='quick', seeds=(3, 1))"),
    ],
)
def test_the_command_repeats_the_run(seeds: object, command: str, register: Register) -> None:
    register("holds")
    finding = run_study("fake-holds", seeds=seeds, progress=False)  # type: ignore[arg-type]
    assert finding.command.endswith(command)
    assert finding.question == "Does one and one make two?"


def test_a_method_without_a_study_is_refused(tmp_path: Path) -> None:
    unbuilt = next(m for m in paperback.catalogue.methods() if not m.available)
    with pytest.raises(PaperbackError, match="no study yet"):
        run_study(unbuilt.slug, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
