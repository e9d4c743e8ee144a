"""Where a run takes place: versions, commit, machine.

Findings are published, so there is no host name, no user and no path in it.
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import psutil

from paperback.study.finding import Environment
from paperback.study.record import checkout

_PACKAGES = ("torch", "numpy", "scipy", "scikit-learn", "pandas", "accelerate")


def describe_environment() -> Environment:
    """Versions of Python and of what results depend on, commit of the checkout, size of the machine."""
    import paperback

    versions = {"python": platform.python_version(), "paperback": paperback.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # not installed here, so no result depends on it
    return Environment(
        versions=versions,
        commit=_commit(checkout()),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
    )


def _commit(root: Path | None) -> str | None:
    """The commit of a checkout, with "+changes" if its source differs from it.

    None if there is no git, no checkout or no commit.
    """
    if root is None:
        return None
    head = _git(root, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(root, "status", "--porcelain", "--", "src")
    return f"{head}+changes" if changes else head


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
