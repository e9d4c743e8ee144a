import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fake_bench import PAUSE
from filelock import FileLock

from paperback.compare import compare
from paperback.errors import DataError, PaperbackError


def run(bench, out, **settings):
    return compare(
        "density", bench=f"fake_bench:{bench}", out=out, **{"seeds": 1, "progress": False} | settings
    )


def essence(board):
    """What must be the same whether or not a comparison was disturbed: all but times, memory and places."""
    measured = [
        {name: spread and spread.values for name, spread in row.metrics.items()} for row in board.rows
    ]
    told = [(row.contender, row.rank, row.status, row.seeds, row.artefact) for row in board.rows]
    return told, measured, board.complete


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    return run("HEALTHY", tmp_path_factory.mktemp("compare") / "healthy", seeds=2, jobs=2)


def test_a_comparison_ranks_and_writes_all_its_files(healthy):
    assert [(row.contender, row.rank, row.like_best) for row in healthy.rows] == [
        ("sharp", 1, True),
        ("brisk", 2, True),
        ("plain", 3, False),
    ]
    assert healthy.complete
    files = {path.name for path in healthy.folder.iterdir() if not path.name.startswith(".")}
    tables = {"leaderboard.json", "leaderboard.csv", "leaderboard.html"}
    assert files == tables | {"quality-against-cost.png", "comparison.json", "jobs"}
    assert (healthy.folder / healthy.rows[0].artefact / "config.json").is_file()
    assert healthy.data.name == "the shipped data"


def test_done_jobs_are_not_run_again_and_more_seeds_may_be_added(healthy):
    before = {path: path.stat().st_mtime_ns for path in healthy.folder.glob("jobs/*/result.json")}
    again = run("HEALTHY", healthy.folder, seeds=3, methods=["sharp"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [(row.contender, row.seeds) for row in again.rows] == [("sharp", (0, 1, 2)), ("plain", (0, 1, 2))]


def test_another_specification_in_the_same_folder_is_refused(healthy):
    with pytest.raises(PaperbackError, match="differs in budget; give another folder"):
        run("HEALTHY", healthy.folder, budget="smoke")
    with pytest.raises(PaperbackError, match="differs in bench"):
        run("SICK", healthy.folder)


def test_changed_data_are_another_specification(tmp_path):
    data = tmp_path / "numbers.csv"
    data.write_text("x\n1\n2\n")
    run("HEALTHY", tmp_path / "out", data=data, methods=[])
    data.write_text("x\n1\n3\n")
    with pytest.raises(PaperbackError, match="differs in data"):
        run("HEALTHY", tmp_path / "out", data=data, methods=[])


def test_what_goes_wrong_is_a_row_with_its_reason(tmp_path):
    board = run("SICK", tmp_path / "sick", jobs=2)
    status = {row.contender: (row.status, row.reason) for row in board.rows}
    crashed = "its last words are in log.txt."
    assert status == {
        "plain": ("done", ""),
        "no-primary": ("done", 'no rank: "loss" is not measured.'),
        "raises": ("failed", "ValueError: the matrix is singular"),
        "kills-itself": (
            "failed",
            "the system killed it (SIGKILL), which it mostly does for want of memory.",
        ),
        "crashes": ("failed", f"it crashed (SIGSEGV); {crashed}"),
        "exits": ("failed", f"it ended with exit code 3 before it had a result; {crashed}"),
        "nan": ("failed", "loss came out as nan."),
        "wrong-keys": ("failed", "what was measured lacks loss and has undeclared los."),
        "no-number": ("failed", "ValueError: could not convert string to float: 'a lot'"),
        "broken-applies": ("failed", "RuntimeError: applies is broken"),
        "images-only": ("does not apply", "it takes images only"),
    }
    assert not (board.folder / "jobs" / "images-only-0").exists()
    assert "the matrix is\nsingular" in (board.folder / "jobs" / "raises-0" / "log.txt").read_text()
    assert board.complete


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ["shrap"]}, "did you mean sharp"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"budget": "huge"}, "no budget 'huge'"),
        ({"engine": "slurm"}, "no engine 'slurm'"),
        ({"time_limit": -1}, "time_limit is -1"),
        ({"memory_limit": float("nan")}, "memory_limit is nan"),
        ({"jobs": 0}, "jobs is 0"),
        ({"model": "somewhere"}, "takes no model"),
        ({"data": "nowhere.csv"}, "no file or folder .*nowhere.csv"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(PaperbackError, match=message):
        run("HEALTHY", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_are_refused_before_a_job_starts(tmp_path):
    (tmp_path / "data.xls").write_text("no table")
    with pytest.raises(DataError, match="not a CSV file"):
        run("HEALTHY", tmp_path / "out", data=tmp_path / "data.xls")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(PaperbackError, match="holds something that is not a comparison"):
        run("HEALTHY", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_only_looks_like_a_comparison_is_left_alone(tmp_path):
    (tmp_path / "comparison.json").write_text("[]")
    with pytest.raises(PaperbackError, match="not a comparison"):
        run("HEALTHY", tmp_path)


def test_two_comparisons_in_one_folder_do_not_meet(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(PaperbackError, match="another comparison is running"):
        run("HEALTHY", tmp_path)


def test_an_estimate_runs_and_writes_nothing(tmp_path, capsys):
    board = run("HEALTHY", tmp_path / "out", seeds=2, estimate=True, progress=True, time_limit=60)
    assert not (tmp_path / "out").exists()
    assert {row.status for row in board.rows} == {"not run"}
    assert not board.complete
    text = " ".join(capsys.readouterr().out.split())
    assert "6 of 6 jobs to run, 1 at once: about 30 s, at most 6 min 00 s." in text
    assert "Nothing has been run." in text


def test_an_estimate_knows_what_is_done_and_how_long_it_took(healthy, capsys):
    for result in healthy.folder.glob("jobs/*/result.json"):
        result.write_text(json.dumps(json.loads(result.read_text()) | {"seconds": 20.0}))
    run("HEALTHY", healthy.folder, seeds=4, methods=["brisk"], estimate=True, progress=True)
    text = " ".join(capsys.readouterr().out.split())
    assert "brisk 2 about 40 s" in text


def test_an_estimate_for_a_cluster_does_not_guess_its_size(tmp_path, capsys):
    run("HEALTHY", tmp_path / "out", estimate=True, progress=True, engine="ray")
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "as many at once as the cluster has CPUs; one after another: about 15 s, at most 15 min 00 s." in text
    )


def test_an_error_while_jobs_run_ends_them(tmp_path, monkeypatch):
    monkeypatch.setenv(PAUSE, "600")
    ended = []

    def fails(self, job, result):
        ended.append(job.name)
        raise KeyboardInterrupt

    monkeypatch.setattr("paperback.compare.terminal.Display.end", fails)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run("SLOW", tmp_path / "out", jobs=2)
    assert time.monotonic() - started < 20
    assert ended == ["plain-0"]
    mine = psutil.Process().children(recursive=True)
    assert not [process for process in mine if "paperback.compare.worker" in process.cmdline()]


def start(out, pause):
    """A comparison in a process of its own, as a user would start it."""
    code = (
        "import sys; from paperback.compare import compare\n"
        "compare('density', bench='fake_bench:SLOW', out=sys.argv[1], seeds=2)"
    )
    environment = os.environ | {PAUSE: pause, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(out)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run("SLOW", tmp_path_factory.mktemp("compare") / "undisturbed", seeds=2, jobs=2)


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_comparison_that_is_cut_short_resumes_to_the_same_leaderboard(tmp_path, undisturbed, blow):
    out = tmp_path / "out"
    process = start(out, "600")
    deadline = time.monotonic() + 60
    while not (out / "jobs" / "slow-a-0" / "artefact" / "child.pid").is_file():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(blow)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    finished = out / "jobs" / "plain-0" / "result.json"
    before = finished.stat().st_mtime_ns
    assert not (out / "jobs" / "slow-a-0" / "result.json").exists()
    if blow == signal.SIGINT:
        assert f"go on with --out {out}" in " ".join(output.split())
        assert json.loads((out / "leaderboard.json").read_text())["complete"] is False
        assert "not finished" in (out / "leaderboard.html").read_text()
    assert essence(run("SLOW", out, seeds=2, jobs=2)) == essence(undisturbed)
    assert finished.stat().st_mtime_ns == before


def test_the_process_of_a_job_does_not_load_what_only_reports_need():
    code = (
        "import sys, paperback.compare.worker\n"
        "print({'matplotlib', 'jinja2', 'torch', 'scipy'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_without_out_a_new_folder_is_made_under_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = run("HEALTHY", None, methods=[], estimate=True)
    assert board.folder.parent == Path("runs")
    assert board.folder.name.startswith("compare-density-quick-")
