"""The process of one job: ``python -m paperback.compare.worker JOBFILE``.

It reads the job, loads the data, lets the bench fit and measure one contender, and writes ``result.json``
beside the job file. Whatever a contender raises becomes a failed result with its reason; the traceback goes
to stderr, which the parent keeps as ``log.txt``. When the parent dies, so does this process: its standard
input is a pipe from the parent that closes at that moment, however the parent ended.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paperback.compare.bench import READING, Bench, load_bench
from paperback.compare.job import Job, Result, read_job, write_json
from paperback.errors import PaperbackError
from paperback.study.budget import check_budget
from paperback.study.measure import peak_memory
from paperback.study.wording import one_sentence

SPLIT_SEED = 0  # the data are split the same way for every job, so that seeds differ in the fit alone


def main(job_file: Path) -> None:
    """Run the job described by a file and write its result beside it.

    Args:
        job_file: JSON of a `Job`, in the job's folder.
    """
    job = read_job(job_file)
    started = time.perf_counter()
    try:
        metrics, artefact, reading = _measure(job, job_file.parent / "artefact")
        outcome: dict[str, Any] = {
            "status": "done",
            "metrics": metrics,
            "artefact": artefact,
            "reading": reading,
        }
    except Exception as error:  # the contender's, whatever it is: it becomes a row of the table
        traceback.print_exc()
        outcome = {"status": "failed", "reason": one_sentence(error)}
    result = Result(
        fingerprint=job.fingerprint,
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        **outcome,
    )
    write_json(job_file.parent / "result.json", result)


def _measure(job: Job, out: Path) -> tuple[dict[str, float | None], str | None, tuple[str, ...]]:
    bench = load_bench(job.bench)
    data = load_data(bench, job)
    out.mkdir()
    measured = bench.evaluate(bench.contender(job.contender), data, check_budget(job.budget), job.seed, out)
    words = out / READING
    reading = tuple(words.read_text(encoding="utf-8").splitlines()) if words.is_file() else ()
    return checked_metrics(bench, measured), _find_artefact(out), reading


def load_data(bench: Bench, job: Job) -> Any:
    """The data of a job: the shipped ones or the user's, split with the seed that all jobs share.

    Raises:
        DataError: if the user's data cannot be used.
    """
    model = {"model": job.model} if bench.takes_model else {}
    return bench.load(Path(job.data) if job.data else None, job.target, job.budget, SPLIT_SEED, **model)


def checked_metrics(bench: Bench, metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """The metrics that a bench returned, as plain numbers in the order in which the bench declares them.

    Args:
        bench: the bench, which declares the metrics.
        metrics: what its `evaluate` returned.

    Returns:
        Metric name to a finite float, or to None where the contender does not have the quantity.

    Raises:
        PaperbackError: naming the metric that is missing, undeclared, not a number, or not finite.
    """
    declared = [metric.name for metric in bench.metrics]
    unknown = sorted(set(metrics) - set(declared))
    missing = [name for name in declared if name not in metrics]
    if unknown or missing:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [
            f"has undeclared {', '.join(unknown)}"
        ] * bool(unknown)
        raise PaperbackError(f"what was measured {' and '.join(parts)}.")
    numbers: dict[str, float | None] = {}
    for name in declared:
        value = metrics[name]
        if value is not None:
            value = float(value)
            if not math.isfinite(value):
                raise PaperbackError(f"{name} came out as {value}.")
        numbers[name] = value
    return numbers


def _find_artefact(out: Path) -> str | None:
    """The folder that `paperback.load` takes: the one with the config, or the whole folder where the
    contender saved something else.
    """
    candidates = [out, *sorted(path for path in out.iterdir() if path.is_dir())]
    for folder in candidates:
        if (folder / "config.json").is_file():
            return folder.relative_to(out.parent).as_posix()
    return out.name if any(out.iterdir()) else None


def _die_with_parent() -> None:
    """Wait for the end of standard input, then end this process; with its children, where it leads a process
    group of its own.
    """
    while os.read(0, 4096):
        pass
    os.kill(0 if os.getpgrp() == os.getpid() else os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_die_with_parent, daemon=True).start()
    main(Path(sys.argv[1]))
