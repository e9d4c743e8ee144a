"""A job, its result, and the files that hold them.

A comparison is a set of jobs, one for each contender and seed. A job is described by a small JSON file that
its process reads; what came of it is another, ``result.json``, written under a temporary name and renamed, so
that it is there whole or not at all. A result carries the fingerprint of the job that made it: a result whose
fingerprint differs belongs to another comparison and is never read as this one's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paperback.errors import ArtefactError, DataError
from paperback.study.encoding import decode, encode, write_atomically

Status = Literal["done", "failed"]


@dataclass(frozen=True)
class Job:
    """One contender, one seed, on one set of data.

    Attributes:
        bench: import path of the bench, "module:NAME".
        contender: name of the contender in the bench.
        seed: of the fit; the split of the data is the same for every job.
        budget: "smoke", "quick", "standard" or "full".
        data: path of the user's data, absolute; None for the shipped ones.
        target: the user's target column, if any.
        model: the user's model, a path or "module:function", if any.
        fingerprint: of all of the above, the contents of the data and the version of paperback.
    """

    bench: str
    contender: str
    seed: int
    budget: str
    data: str | None
    target: str | None
    model: str | None
    fingerprint: str

    @property
    def name(self) -> str:
        """Name of the job's folder under ``jobs/``."""
        return f"{self.contender}-{self.seed}"


@dataclass(frozen=True)
class Result:
    """What came of a job.

    Attributes:
        fingerprint: of the job.
        status: "done" or "failed".
        reason: one sentence, why it failed; empty when done.
        metrics: metric name to number, or None where the contender does not have the quantity; empty when
            failed.
        seconds: wall time of building, fitting and measuring.
        peak_memory: most resident memory of the process and its children, in bytes (Python and torch are in
            it).
        artefact: where the fitted model lies, relative to the job's folder; None if the contender saved none.
        reading: sentences that the bench has on what it measured.
        finished: date and time, ISO 8601, UTC.
    """

    fingerprint: str
    status: Status
    reason: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory: int | None = None
    artefact: str | None = None
    reading: tuple[str, ...] = ()
    finished: str = ""


def fingerprint(**specification: Any) -> str:
    """SHA-256 over a specification of plain values, in hexadecimal; the order of the arguments does not
    matter.
    """
    return hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files (hidden ones left out).

    Args:
        path: file or folder.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: if there is nothing at the path.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise DataError(f"there is no file or folder {path}; check the path.")
    digest = hashlib.sha256()
    for file_path in _visible_files(path):
        digest.update(f"{file_path.relative_to(path).as_posix()}\0{content_hash(file_path)}\n".encode())
    return digest.hexdigest()


def _visible_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():  # a dangling link is no file
                yield path


def write_json(path: Path, value: Any) -> None:
    """Write a data class or plain values as strict JSON, whole or not at all."""
    write_atomically(path, json.dumps(encode(value), indent=2, allow_nan=False) + "\n")


def read_job(path: Path) -> Job:
    """The job that a file describes.

    Raises:
        ArtefactError: if it is not exactly what a job file holds.
    """
    job: Job = decode(Job, json.loads(path.read_text(encoding="utf-8")), path.name)
    return job


def read_result(folder: Path, fingerprint: str) -> Result | None:
    """The result in a job's folder, or None where there is none that belongs to this job.

    Nothing, a file that is not whole, and the result of another specification all mean the same: the job has
        to run.

    Args:
        folder: the job's folder.
        fingerprint: of the job.

    Returns:
        The result, done or failed, or None.
    """
    try:
        content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        result: Result = decode(Result, content, "result.json")
    except (OSError, ValueError, ArtefactError):
        return None
    return result if result.fingerprint == fingerprint else None
