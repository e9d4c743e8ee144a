import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from fake_bench import PAUSE

from paperback.compare.job import Job, read_result
from paperback.compare.runner import Limits, Stopped, available_memory, run_job

LIMITS = Limits(seconds=60.0)


def job(bench: str, contender: str) -> Job:
    return Job(f"fake_bench:{bench}", contender, 1, "quick", None, None, None, "f")


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_job_leaves_its_result_its_artefact_and_its_log(tmp_path):
    result = run_job(job("HEALTHY", "sharp"), tmp_path / "job", LIMITS)
    assert result.status == "done"
    assert result.metrics == {"loss": pytest.approx(0.21), "accuracy": 0.8, "size": None, "fit_seconds": 60.0}
    assert result.artefact == "artefact"
    assert (tmp_path / "job" / "artefact" / "config.json").is_file()
    assert "fitting with seed 1" in (tmp_path / "job" / "log.txt").read_text()
    assert read_result(tmp_path / "job", "f") == result
    assert 20e6 < result.peak_memory < 2e9
    assert 0 < result.seconds < 60


def test_a_job_that_hangs_is_ended_at_its_time_limit(tmp_path):
    started = time.monotonic()
    result = run_job(job("HANGS", "hangs"), tmp_path / "job", Limits(seconds=2.0))
    assert time.monotonic() - started < 10
    assert result.status == "failed"
    assert result.reason == "it was not done after 2 s, the limit for one job."


def test_a_job_that_eats_memory_is_ended_at_its_memory_limit(tmp_path):
    result = run_job(job("EATS", "eats-memory"), tmp_path / "job", Limits(seconds=60.0, memory=800_000_000))
    assert result.status == "failed"
    assert result.reason == "it used more than 800.0 MB of memory, the limit for one job."
    assert result.peak_memory > 800_000_000


def test_a_job_that_is_stopped_has_no_result_and_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setenv(PAUSE, "600")
    stop = threading.Event()
    child = tmp_path / "job" / "artefact" / "child.pid"
    threading.Thread(target=lambda: (wait_until(child.is_file), time.sleep(0.2), stop.set())).start()
    with pytest.raises(Stopped):
        run_job(job("SLOW", "slow-a"), tmp_path / "job", LIMITS, stop)
    assert not (tmp_path / "job" / "result.json").exists()
    wait_until(lambda: gone(int(child.read_text())), 5)


def test_an_earlier_attempt_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "stale.txt").write_text("from before")
    run_job(job("HEALTHY", "brisk"), folder, LIMITS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "artefact",
        "job.json",
        "log.txt",
        "result.json",
    ]


def test_a_worker_and_its_children_die_with_a_parent_that_is_killed(tmp_path):
    script = (
        "import json, sys; from pathlib import Path\n"
        "from paperback.compare.job import Job\n"
        "from paperback.compare.runner import Limits, run_job\n"
        "run_job(Job(**json.loads(sys.argv[1])), Path(sys.argv[2]), Limits(60.0))"
    )
    environment = os.environ | {PAUSE: "600", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [json.dumps(vars(job("SLOW", "slow-a"))), str(tmp_path / "job")]
    parent = subprocess.Popen([sys.executable, "-c", script, *arguments], env=environment)
    child = tmp_path / "job" / "artefact" / "child.pid"
    wait_until(lambda: child.is_file() and child.read_text())
    (worker,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: gone(worker.pid) and gone(int(child.read_text())), 10)


def test_memory_that_is_not_given_is_a_share_of_what_is_available():
    whole, half = (Limits(1.0, side_by_side=n).memory_here() for n in (1, 2))
    assert half == pytest.approx(whole / 2, rel=0.05)
    assert whole == pytest.approx(0.8 * available_memory(), rel=0.05)
    assert Limits(1.0, memory=5).memory_here() == 5


def test_a_container_limit_counts(monkeypatch):
    files = {"memory.max": "1000000\n", "memory.current": "400000\n"}
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: files.get(self.name) or read_text(self, *a, **k)
    )
    assert available_memory() == 600_000
