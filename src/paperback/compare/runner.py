"""Run one job in a process of its own, under a time limit and a memory limit.

The process is started afresh, never forked: a forked torch inherits locks of threads that no longer exist. It
leads a process group, so that all it started can be killed together. Memory is watched by polling the
resident set of the process tree. RLIMIT_AS, the kernel's own limit, counts reserved addresses, and torch
reserves many times what it uses; a limit that bites would also refuse jobs that fit well. Polling may be late
by one interval, so a job can pass the limit for a moment before it is ended; pages that processes of a job
share are counted for each of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from paperback.compare.job import Job, Result, read_result, write_json
from paperback.study.wording import size

POLL_SECONDS = 0.1
MEMORY_FRACTION = 0.8  # of what is available when the job starts, shared by the jobs that run side by side
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Limits:
    """What one job may use.

    Attributes:
        seconds: wall time before the job is killed.
        memory: resident bytes of its process tree before it is killed; None for 80 % of what is available,
            divided by `side_by_side`.
        side_by_side: how many jobs run at once on the machine.
        threads: of the numerical libraries, per job.
    """

    seconds: float
    memory: int | None = None
    side_by_side: int = 1
    threads: int = 1

    def memory_here(self) -> int:
        """The memory limit on this machine at this moment, in bytes."""
        return (
            self.memory
            if self.memory is not None
            else int(available_memory() * MEMORY_FRACTION / self.side_by_side)
        )


def available_memory() -> int:
    """Bytes that can be used here without swapping: what the system has left, or what the container's limit
    leaves.
    """
    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return available
    return available if limit == "max" else min(available, int(limit) - int(used))


class Stopped(Exception):
    """The comparison was interrupted while this job ran."""


def run_job(job: Job, folder: Path, limits: Limits, stop: threading.Event | None = None) -> Result:
    """Run a job to its end, whatever that is, and leave its result, artefact and log in its folder.

    Args:
        job: what to run.
        folder: the job's folder; anything that an earlier attempt left there is removed.
        limits: time, memory and threads.
        stop: set from another thread to end the job; it then has no result and will run anew.

    Returns:
        The result: done, or failed with one sentence why.

    Raises:
        Stopped: if `stop` was set.
    """
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(folder / "job.json", job)
    started = time.perf_counter()
    verdict, peak, code = _watch(folder, limits, stop)
    result = read_result(folder, job.fingerprint)
    if result is None:
        reason = verdict or _why_it_ended(code)
        result = Result(job.fingerprint, "failed", reason, seconds=time.perf_counter() - started)
    result = replace(result, peak_memory=max(peak, result.peak_memory or 0))
    write_json(folder / "result.json", result)
    return result


def _watch(folder: Path, limits: Limits, stop: threading.Event | None) -> tuple[str, int, int]:
    """Start the worker and wait for its end or a limit: why it was killed ("" if it was not), peak memory in
    bytes, return code.
    """
    memory_limit = limits.memory_here()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "paperback.compare.worker", str(folder / "job.json")],
            stdin=subprocess.PIPE,  # it closes when this process goes, which ends the worker; nothing is sent
            stdout=log,
            stderr=log,
            env=_environment(limits.threads),
            start_new_session=True,
        )
    deadline = time.monotonic() + limits.seconds
    verdict, peak = "", 0
    try:
        while not _ended(process):
            resident = _resident(process.pid)
            peak = max(peak, resident)
            if stop is not None and stop.is_set():
                raise Stopped
            if resident > memory_limit:
                verdict = f"it used more than {size(memory_limit)} of memory, the limit for one job."
            elif time.monotonic() > deadline:
                verdict = f"it was not done after {limits.seconds:g} s, the limit for one job."
            if verdict:
                break
    finally:
        _kill(process)
    return verdict, peak, process.returncode


def _environment(threads: int) -> dict[str, str]:
    """The environment of a worker: this one's, with its import path and the number of threads (unless the
    user has set it).
    """
    environment = dict.fromkeys(THREAD_VARIABLES, str(threads)) | dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return environment


def _ended(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return True


def _resident(pid: int) -> int:
    """Resident bytes of a process and all its descendants; those that end meanwhile count nothing."""
    total = 0
    for process in _tree(pid):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and everything that it started, in its group or not; one that has ended leaves its group
    to be swept.
    """
    for member in _tree(process.pid):
        try:
            member.kill()
        except psutil.Error:
            continue
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _why_it_ended(code: int) -> str:
    """One sentence on a worker that ended without a result."""
    if code == -signal.SIGKILL:
        return "the system killed it (SIGKILL), which it mostly does for want of memory."
    if code < 0:
        return f"it crashed ({signal.Signals(-code).name}); its last words are in log.txt."
    return f"it ended with exit code {code} before it had a result; its last words are in log.txt."
