"""Where jobs run: on this machine, or on a Ray cluster.

A thread per running job waits for it; the work itself is in a process (here) or in a Ray task (there), so
threads cost nothing. Ray schedules its own tasks. Its joblib backend is not used: one worker that dies aborts
everything that joblib had handed out, results arrive only when all are in, and with one job it runs in this
process. A plain task with no retries costs that job only.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from joblib import cpu_count

from paperback.compare.job import Job, Result, write_json
from paperback.compare.runner import POLL_SECONDS, Limits, Stopped, run_job
from paperback.errors import PaperbackError
from paperback.study.ray_cluster import ray_cluster
from paperback.study.wording import one_sentence

Execute = Callable[[Job, Path, threading.Event], Result]


@dataclass(frozen=True)
class Engine:
    """How one job is run, and how many at once.

    Attributes:
        execute: ``(job, folder, stop) -> Result``; leaves the job's files in the folder, raises `Stopped`
            once `stop` is set.
        jobs: how many at once.
    """

    execute: Execute
    jobs: int


@contextmanager
def open_engine(name: str, jobs: int | None, limits: Limits) -> Iterator[Engine]:
    """Open an engine, and close what was opened.

    Args:
        name: "local", "ray" (the cluster that Ray finds, or one that it starts here) or "ray:ADDRESS".
        jobs: how many at once; None for one here, and as many as there are CPUs on Ray.
        limits: of each job. Here, `side_by_side` and `threads` are filled in: jobs share the cores. On Ray a
            job has one CPU.

    Yields:
        The engine.

    Raises:
        PaperbackError: if there is no such engine, or the cluster cannot be reached.
        MissingExtraError: if Ray is not installed.
    """
    kind, _, address = name.partition(":")
    if name == "local":
        jobs = jobs or 1
        shared = replace(limits, side_by_side=jobs, threads=max(1, cpu_count() // jobs))
        yield Engine(lambda job, folder, stop: run_job(job, folder, shared, stop), jobs)
    elif kind == "ray":
        with ray_cluster(address) as ray:
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            jobs = jobs or cpus
            task = ray.remote(num_cpus=1, max_retries=0)(run_job_by_value)
            shared = replace(limits, side_by_side=jobs)
            yield Engine(lambda job, folder, stop: _run_on_ray(ray, task, job, folder, shared, stop), jobs)
    else:
        raise PaperbackError(f"there is no engine {name!r}; use local, ray or ray:ADDRESS.")


def run_all(
    jobs: Sequence[Job], folder: Path, engine: Engine, on_start: Callable[[Job], None]
) -> Generator[tuple[Job, Result]]:
    """Run jobs and yield each with its result as it ends.

    Leaving the loop early, by an exception or Ctrl-C, ends the jobs that run and drops those that wait.

    Args:
        jobs: what to run.
        folder: under which each job has its folder.
        engine: where.
        on_start: called from another thread when a job is handed to the engine.

    Yields:
        Job and result, in the order in which they end.
    """
    stop = threading.Event()

    def execute(job: Job) -> tuple[Job, Result]:
        on_start(job)
        return job, engine.execute(job, folder / job.name, stop)

    with ThreadPoolExecutor(engine.jobs) as pool:
        futures = [pool.submit(execute, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def run_job_by_value(job: Job, limits: Limits, search_path: Sequence[str]) -> tuple[Result, dict[str, bytes]]:
    """Run a job in a scratch folder and return its files with its result: nodes need not share a file system.

    Args:
        job: what to run. The user's data must be at the same path on every node.
        limits: of the job; memory that is left open is shared by the jobs that fit on this node.
        search_path: where the modules of the one who asks come from; what of it exists here is added to ours.

    Returns:
        The result, and relative path to contents of every file that the job left.
    """
    for path in (job.data, job.model):
        if path is not None and Path(path).is_absolute() and not Path(path).exists():
            reason = f"{path} is not on the node that ran the job; put it where every node sees it."
            return Result(job.fingerprint, "failed", reason), {}
    sys.path += [path for path in search_path if path not in sys.path and Path(path).is_dir()]
    here = replace(limits, side_by_side=max(1, min(limits.side_by_side, cpu_count() // limits.threads)))
    with tempfile.TemporaryDirectory(prefix="paperback-") as scratch:
        folder = Path(scratch, job.name)
        result = run_job(job, folder, here)
        (folder / "result.json").unlink()  # it is returned as it is
        left = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in left}
    return result, files


def _run_on_ray(
    ray: ModuleType, task: Any, job: Job, folder: Path, limits: Limits, stop: threading.Event
) -> Result:
    """Run a job as a Ray task and bring its files home; a worker or node that dies costs this job only."""
    reference = task.remote(job, limits, sys.path)
    while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
        if stop.is_set():
            ray.cancel(reference, force=True)
            raise Stopped
    try:
        result, files = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        reason = f"the node could not run it ({one_sentence(error.cause)})."
        result, files = Result(job.fingerprint, "failed", reason), {}
    except ray.exceptions.RayError as error:
        reason = f"the Ray worker that ran it was lost ({type(error).__name__}); run again to repeat it."
        result, files = Result(job.fingerprint, "failed", reason), {}
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    write_json(folder / "result.json", result)  # last: a folder without it has not been finished
    return result
