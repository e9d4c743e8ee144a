"""Where the work of a search is done: in this process, in processes beside it, or on a Ray cluster.

An engine takes a function with its arguments and gives back an `Outcome`: the value, or the reason why there
is none. Whatever a call does, it costs that call and nothing else: an exception is caught where it is raised,
and a process that dies is found out and replaced. The same call has the same outcome on every engine, since
each runs it with the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import torch
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor  # cloudpickle: functions of a notebook work
from joblib.externals.loky.process_executor import BrokenProcessPool

from paperback.errors import PaperbackError
from paperback.study.ray_cluster import ray_cluster
from paperback.study.wording import one_sentence

LOST = "the process that ran it died"


@dataclass(frozen=True)
class Outcome:
    """What came of a call.

    Attributes:
        value: what the function returned; None if it failed.
        error: why it failed, None if it did not.
        kind: name of the exception's class, empty if there is none.
        seconds: that the call took.
    """

    value: Any = None
    error: str | None = None
    kind: str = ""
    seconds: float = 0.0


class Task:
    """A call that an engine was given."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.outcome: Outcome | None = None
        self.handle: Any = None  # the engine's own
        self.kept: Any = None  # what stands for a result that stays where it was made


class Engine(Protocol):
    """Runs calls.

    Attributes:
        workers: how many at once.
    """

    workers: int

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Begin a call; here it may be over when this returns."""

    def wait(self, tasks: Sequence[Task]) -> Task:
        """The first of some tasks that is over; its `outcome` is set."""


@contextmanager
def open_engine(name: str | Engine, workers: int | None = None, *, threads: int = 1) -> Iterator[Engine]:
    """Open an engine, and close it at the end.

    Args:
        name: "local" (in this process, one at a time), "process" (processes on this machine), "ray" (the
            cluster that Ray finds, or one that it starts here), "ray:ADDRESS", or an engine, which is used
            and left open.
        workers: how many calls at once; all CPUs if not given. "local" has one.
        threads: of torch in each call.

    Yields:
        The engine.

    Raises:
        PaperbackError: if there is no such engine, the cluster cannot be reached, or workers or threads < 1.
        MissingExtraError: if Ray is not installed.
    """
    if (workers is not None and workers < 1) or threads < 1:
        raise PaperbackError(f"workers is {workers} and threads {threads}; both are at least 1.")
    if not isinstance(name, str):
        yield name
        return
    kind, _, address = name.partition(":")
    if name == "local":
        yield LocalEngine(threads)
    elif name == "process":
        with ProcessEngine(workers or cpu_count(), threads) as engine:
            yield engine
    elif kind == "ray":
        with ray_cluster(address) as ray:
            yield RayEngine(ray, workers or max(1, int(ray.cluster_resources().get("CPU", 1))), threads)
    else:
        raise PaperbackError(f"there is no engine {name!r}; use local, process, ray or ray:ADDRESS.")


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> Outcome:
    """Call, and catch what it raises: a user's exception need not survive the way between processes."""
    before = torch.get_num_threads()
    start = time.perf_counter()
    torch.set_num_threads(threads)
    try:
        return Outcome(function(*arguments), seconds=time.perf_counter() - start)
    except Exception as error:  # the user's, whatever it is: it becomes the reason of a failed trial
        seconds = time.perf_counter() - start
        return Outcome(None, one_sentence(error), type(error).__name__, seconds)
    finally:
        torch.set_num_threads(before)


def _attempt_keeping(function: Callable[..., Any], threads: int, *arguments: Any) -> tuple[Outcome, Any]:
    """`_attempt` for a function that returns (value, kept); None is kept of a failure."""
    outcome = _attempt(function, arguments, threads)
    value, kept = (None, None) if outcome.error is not None else outcome.value
    return replace(outcome, value=value), kept


class LocalEngine:
    """Calls in this process, one after the other."""

    workers = 1

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Make the call."""
        task = Task(function, arguments)
        task.outcome = _attempt(function, arguments, self._threads)
        return task

    def wait(self, tasks: Sequence[Task]) -> Task:
        """The first task."""
        return tasks[0]


class ProcessEngine:
    """Calls in processes of this machine.

    Args:
        workers: how many processes.
        threads: of torch in each.
    """

    def __init__(self, workers: int, threads: int = 1) -> None:
        self.workers = workers
        self._threads = threads
        self._pool = self._open(workers)

    def _open(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, env={"OMP_NUM_THREADS": str(self._threads)})

    def __enter__(self) -> ProcessEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, kill_workers=True)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Hand the call to a process."""
        task = Task(function, arguments)
        try:
            task.handle = self._begin(self._pool, task)
        except BrokenProcessPool:  # it broke since the last call was waited for
            task.handle = Future()
            task.handle.set_exception(BrokenProcessPool(LOST))
        return task

    def _begin(self, pool: ProcessPoolExecutor, task: Task) -> Future[Outcome]:
        return pool.submit(_attempt, task.function, task.arguments, self._threads)

    def wait(self, tasks: Sequence[Task]) -> Task:
        """The first task that is over."""
        over = next((task for task in tasks if task.outcome is not None), None)
        if over is not None:
            return over
        wait_for([task.handle for task in tasks], return_when=FIRST_COMPLETED)
        task = next(task for task in tasks if task.handle.done())
        try:
            task.outcome = task.handle.result()
        except BrokenProcessPool:
            self._repair(tasks)
        return task

    def _repair(self, tasks: Sequence[Task]) -> None:
        """A process died and took the pool with it. Which call was in it is not known, so that each is made
        again by itself, and those that are lost again are the ones."""
        self._pool.shutdown(wait=True, kill_workers=True)
        alone = self._open(1)
        for task in tasks:
            if task.outcome is not None:
                continue
            try:
                task.outcome = self._begin(alone, task).result()
            except BrokenProcessPool:
                task.outcome = Outcome(None, LOST, "BrokenProcessPool")
                alone.shutdown(wait=True, kill_workers=True)
                alone = self._open(1)
        alone.shutdown(wait=True)
        self._pool = self._open(self.workers)


class RayEngine:
    """Calls as Ray tasks.

    Args:
        ray: the module, connected.
        workers: how many at once.
        threads: of torch in each.
    """

    def __init__(self, ray: ModuleType, workers: int, threads: int = 1) -> None:
        self.workers = workers
        self._ray = ray
        self._threads = threads
        self._remote = ray.remote(num_cpus=1, max_retries=0)(_attempt)
        self._keeping = ray.remote(num_cpus=1, max_retries=0, num_returns=2)(_attempt_keeping)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Hand the call to Ray."""
        task = Task(function, arguments)
        task.handle = self._remote.remote(function, arguments, self._threads)
        return task

    def submit_keeping(self, function: Callable[..., Any], *arguments: Any) -> Task:
        """Hand Ray a call of a function that returns (value, kept).

        What is kept stays in Ray's object store: `Task.kept` is its reference, owned by this process, so that
        it outlives the worker. As an argument of a later call, it arrives as what it stands for.
        """
        task = Task(function, arguments)
        task.handle, task.kept = self._keeping.remote(function, self._threads, *arguments)
        return task

    def put(self, value: Any) -> Any:
        """A reference to a value, for arguments of `submit_keeping`."""
        return self._ray.put(value)

    def get(self, reference: Any) -> Any:
        """What a reference stands for.

        Raises:
            PaperbackError: if it was lost with the node that held it.
        """
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise PaperbackError(f"Ray lost what a worker had kept ({type(error).__name__}).") from error

    def wait(self, tasks: Sequence[Task]) -> Task:
        """The first task that is over; a worker or node that died costs its task."""
        over = next((task for task in tasks if task.outcome is not None), None)
        if over is not None:
            return over
        ready, _ = self._ray.wait([task.handle for task in tasks], num_returns=1)
        task = next(task for task in tasks if task.handle == ready[0])
        try:
            task.outcome = self._ray.get(ready[0])
        except self._ray.exceptions.RayError as error:
            task.outcome = Outcome(None, f"{LOST} ({type(error).__name__})", type(error).__name__)
        return task
