"""Running a peer in an environment of its own.

Some libraries that the benchmarks of this wing stand beside want other versions of what paperback needs.
`tools/setup-peers bayes` puts them, pinned in `peers.txt`, into `.venv-peers-bayes`; the scripts of this
folder run there and know nothing of paperback. Arrays go in and come out as npz files.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
PYTHON = HERE.parents[2] / ".venv-peers-bayes" / "bin" / "python"
MISSING = f"not run: there is no {PYTHON.parents[1].name}; make it with `tools/setup-peers bayes`"


def run_peer(script: str, limit: float = 1800.0, **arrays: object) -> dict[str, np.ndarray] | str:
    """Run a script of this folder on some arrays, on one thread.

    Args:
        script: its file name; it is called with the paths of an npz file to read and one to write.
        limit: seconds after which it is ended.
        **arrays: numbers and arrays for it.

    Returns:
        The arrays that it wrote, or a sentence that says why there are none.
    """
    if not PYTHON.exists():
        return MISSING
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.npz"), Path(folder, "made.npz")
        np.savez(given, **arrays)
        command = [str(PYTHON), "-W", "ignore", str(HERE / script), str(given), str(made)]
        one = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=one, check=False
            )
        except subprocess.TimeoutExpired:
            return f"not run to its end: {script} took more than {limit:.0f} s"
        if done.returncode:
            return f"not run: {script} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        with np.load(made) as arrays_made:
            return dict(arrays_made)
