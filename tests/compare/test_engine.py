import os
import subprocess
import sys

import pytest

from paperback.compare import compare
from paperback.compare.engine import Engine, open_engine, run_all, run_job_by_value
from paperback.compare.job import Job, Result
from paperback.compare.runner import Limits, Stopped
from paperback.errors import MissingExtraError, PaperbackError

LIMITS = Limits(60.0)
JOBS = [Job("m:B", "plain", seed, "quick", None, None, None, f"f{seed}") for seed in range(6)]


def test_here_jobs_share_the_cores_and_the_memory(monkeypatch):
    monkeypatch.setattr("paperback.compare.engine.cpu_count", lambda: 8)
    seen = []
    monkeypatch.setattr(
        "paperback.compare.engine.run_job", lambda job, folder, limits, stop: seen.append(limits)
    )
    for jobs in (None, 2, 16):
        with open_engine("local", jobs, LIMITS) as engine:
            engine.execute(JOBS[0], None, None)
    assert [(limits.side_by_side, limits.threads) for limits in seen] == [(1, 8), (2, 4), (16, 1)]


def test_leaving_the_loop_stops_what_runs_and_drops_what_waits(tmp_path):
    started, stopped = [], []

    def execute(job, folder, stop):
        if job.seed == 0:
            return Result(job.fingerprint, "done")
        stop.wait(30)
        stopped.append(job.seed)
        raise Stopped

    for _, result in run_all(JOBS, tmp_path, Engine(execute, 2), lambda job: started.append(job.seed)):
        assert result.fingerprint == "f0"
        break
    assert sorted(stopped) == sorted(started)[1:]
    assert len(started) < len(JOBS)


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MissingExtraError, match=r"install paperback\[ray\]"),
        open_engine("ray", None, LIMITS),
    ):
        pass


def test_data_that_a_node_does_not_have_are_named():
    job = Job("m:B", "plain", 0, "quick", "/nowhere/data.csv", None, None, "f")
    result, files = run_job_by_value(job, LIMITS, [])
    assert (
        result.reason
        == "/nowhere/data.csv is not on the node that ran the job; put it where every node sees it."
    )
    assert files == {}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_cluster_that_does_not_answer_is_an_error_in_words(address):
    pytest.importorskip("ray")
    message = f"there is no Ray cluster at {address} .*refused.*; check the address"
    with pytest.raises(PaperbackError, match=message), open_engine(f"ray:{address}", None, LIMITS):
        pass


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of two CPUs on this machine; its address. Its workers inherit the environment of this moment."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERBACK_TEST_MARK", str(tmp_path_factory.mktemp("ray") / "mark"))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_leaderboard_and_brings_everything_home(cluster, tmp_path):
    arguments = {"bench": "fake_bench:HEALTHY", "seeds": 2, "progress": False}
    here = compare("density", out=tmp_path / "here", **arguments)
    there = compare("density", out=tmp_path / "there", engine="ray", **arguments)

    def essence(board):
        return [(row.contender, row.rank, row.status, row.metrics, row.artefact) for row in board.rows]

    def files(board):
        paths = (path.relative_to(board.folder) for path in board.folder.rglob("*"))
        return sorted(path for path in paths if not path.name.startswith("."))

    assert essence(there) == essence(here)
    assert files(there) == files(here)
    assert "fitting with seed 0" in (there.folder / "jobs" / "sharp-0" / "log.txt").read_text()


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_costs_its_job_only(cluster, tmp_path):
    out = str(tmp_path / "out")
    arguments = {"bench": "fake_bench:LOST", "seeds": 1, "out": out, "progress": False}
    # From a process of its own, which reaches the cluster by its address.
    call = f"compare('density', engine='ray:{cluster}', **{arguments})"
    code = f"from paperback.compare import compare; {call}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = compare("density", estimate=True, **arguments)
    assert {row.contender: row.status for row in first.rows} == {
        "plain": "done",
        "kept": "done",
        "lost": "failed",
    }
    assert "the Ray worker that ran it was lost (WorkerCrashedError)" in first.rows[-1].reason
    again = compare("density", engine="ray", **arguments)
    assert {row.contender: row.status for row in again.rows} == {
        "plain": "done",
        "kept": "done",
        "lost": "done",
    }
