"""Runs a study from the catalogue, and sees to it that its folder tells the truth however the run ends."""

from __future__ import annotations

import inspect
import itertools
import shlex
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from filelock import FileLock, Timeout

from paperback import catalogue
from paperback.errors import ArtefactError, DataError, PaperbackError
from paperback.study import measure, report, terminal
from paperback.study.budget import JUDGED, Budget, check_budget
from paperback.study.finding import FIGURES, FINDINGS, LOG, REPORT, TABLES, Failure, Finding, Status, read_run
from paperback.study.run import Run, check_seeds

if TYPE_CHECKING:
    from paperback.catalogue import Method

Study = Callable[[Run], None]

_LOCK = ".lock"


def run_study(
    slug: str,
    *,
    budget: Budget = "quick",
    seeds: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    target: str | None = None,
    progress: bool = True,
) -> Finding:
    """Run the study of a method, write its folder, and print what it found.

    Args:
        slug: of the method, such as "monotone-dbm".
        budget: "smoke", "quick", "standard" or "full".
        seeds: how many, or which; if not given, those of the study, and only the first of them for smoke and
            quick.
        out: folder to write to, new or empty or of an earlier run, which is replaced;
            ``runs/<slug>-<budget>-<time>`` if not given.
        data: the user's data for the study to use in place of what ships.
        target: the target column of the user's data.
        progress: show progress bars on stderr and print the verdicts at the end.

    Returns:
        The finding; its `folder` holds report.html, findings.json, figures, tables, fitted models and the
        log.

    Raises:
        PaperbackError: if there is no such method or study, or an argument cannot be used.
        Exception: whatever the study raises, or KeyboardInterrupt; the folder then says so and holds what
            there was.
    """
    finding = execute(slug, budget=budget, seeds=seeds, out=out, data=data, target=target, progress=progress)
    if progress:
        terminal.print_finding(finding)
    return finding


def execute(
    slug: str,
    *,
    budget: Budget = "quick",
    seeds: int | Sequence[int] | None = None,
    out: str | Path | None = None,
    data: str | Path | None = None,
    target: str | None = None,
    progress: bool = True,
) -> Finding:
    """As `run_study`, without printing the verdicts at the end."""
    check_budget(budget)
    method = catalogue.find(slug)
    if data is not None and not Path(data).exists():
        raise DataError(f"{data} does not exist; give the path of a file or a folder.")
    study = _study_of(method)
    own = own_seeds(study)
    chosen = choose_seeds(own, budget, seeds)
    folder = Path(out) if out is not None else _new_folder(Path("runs"), f"{slug}-{budget}")
    with _held(folder), _termination_as_interrupt():
        _clear(folder)
        measure.reset_peak_memory()
        run = Run(
            slug,
            budget=budget,
            seeds=chosen,
            out=folder,
            data=data,
            target=target,
            progress=progress,
            question=inspect.getdoc(study) or "",
            command=_command(slug, budget, own, chosen, data, target),
        )
        try:
            with _warnings_to_log(run):
                study(run)
            if data is not None and not run.data_was_read:
                raise PaperbackError(
                    f"the study of {slug} has its own data and did not read {data}; run it without --data."
                )
        except BaseException as error:
            _give_up(run, method, error)
            raise
        run.write_log("complete")
        report.write(run.finding("complete"), method, folder)
        return run.save("complete")


def own_seeds(study: Study) -> tuple[int, ...]:
    """The seeds that a study wants: its attribute ``SEEDS``, or that of its module.

    Seed 0 alone if it names none.
    """
    module = sys.modules[study.__module__]
    return check_seeds(getattr(study, "SEEDS", getattr(module, "SEEDS", (0,))))


def choose_seeds(own: tuple[int, ...], budget: Budget, wanted: int | Sequence[int] | None) -> tuple[int, ...]:
    """The seeds of a run.

    Args:
        own: those of the study.
        budget: standard and full runs take all of them, smoke and quick ones the first.
        wanted: how many instead (the study's first, then 0, 1, .. as far as they are new), or which.

    Returns:
        At least one seed.

    Raises:
        DataError: if none are wanted, or they cannot be used.
    """
    if wanted is None:
        return own if budget in JUDGED else own[:1]
    if not isinstance(wanted, int):
        return check_seeds(wanted)
    if wanted < 1:
        raise DataError(f"{wanted} seeds were asked for; a run needs at least one.")
    more = (seed for seed in itertools.count() if seed not in own)
    return tuple(itertools.islice(itertools.chain(own, more), wanted))


def _study_of(method: Method) -> Study:
    if not method.study:
        raise PaperbackError(f"{method.slug} has no study yet; `paperback list` shows the methods that work.")
    study: Study = method.load_study()
    return study


def _give_up(run: Run, method: Method, error: BaseException) -> None:
    """Leave a folder that says how the run ended, with what it had."""
    interrupted = isinstance(error, KeyboardInterrupt)
    status: Status = "interrupted" if interrupted else "failed"
    failure = Failure(type(error).__name__, str(error) or ("Ctrl-C" if interrupted else "no message"))
    if not interrupted:
        run.write_log("".join(traceback.format_exception(error)).rstrip())
    run.write_log(status)
    report.write(run.finding(status, failure), method, run.out)
    run.save(status, failure)  # last: until here the folder says that the run did not finish
    if run.progress:
        terminal.print_kept(run.out, status)


def _new_folder(parent: Path, stem: str) -> Path:
    """Make a new folder named after the time, even when several runs begin in the same second."""
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder, number = parent / f"{stem}-{stamp}", 1
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            folder = parent / f"{stem}-{stamp}-{number}"
        else:
            return folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder.

    The system lets go of the lock when the process dies, however it dies.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; give a folder for the run to write to.")
    _check_replaceable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise PaperbackError(f"another run is writing to {folder}; give this one another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _check_replaceable(folder: Path) -> None:
    """Raise unless the folder is new, empty, or of an earlier run."""
    present = {path.name for path in folder.iterdir()} - {_LOCK} if folder.exists() else set()
    if not present:
        return
    try:
        read_run(folder)
    except ArtefactError as error:
        raise DataError(
            f"{folder} holds other files than those of a run, which would be overwritten; give a new folder."
        ) from error


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote here, and nothing else."""
    if not (folder / FINDINGS).exists():
        return
    earlier = read_run(folder)
    for model in earlier.models:
        shutil.rmtree(folder / model.name, ignore_errors=True)
    named = [folder / FIGURES / f"{f.name}.png" for f in earlier.figures]
    named += [folder / TABLES / f"{t.name}.csv" for t in earlier.tables]
    for path in (*named, folder / REPORT, folder / LOG, folder / FINDINGS):
        path.unlink(missing_ok=True)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, so that a batch system's "please end" is met like Ctrl-C.

    Works in the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt("SIGTERM")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextmanager
def _warnings_to_log(run: Run) -> Iterator[None]:
    """Write warnings into the log of the run too, such as that of an iteration which did not converge."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            run.write_log(f"{category.__name__}: {message}")
            shown(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _command(
    slug: str,
    budget: Budget,
    own: tuple[int, ...],
    seeds: tuple[int, ...],
    data: str | Path | None,
    target: str | None,
) -> str:
    """What repeats a run: a command line, or Python where no number of seeds gives these seeds."""
    data = None if data is None else str(data)
    count = None if seeds == choose_seeds(own, budget, None) else len(seeds)
    if count is not None and seeds != choose_seeds(own, budget, count):
        given = {"budget": budget, "seeds": seeds, "data": data, "target": target}
        arguments = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
        return f"from paperback.study import run_study\n\nrun_study({slug!r}, {arguments})"
    words = ["paperback", "run", slug, "--budget", budget]
    for option, value in (("--seeds", count), ("--data", data), ("--target", target)):
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)
