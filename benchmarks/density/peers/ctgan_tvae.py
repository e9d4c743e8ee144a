"""The TVAE of ctgan: fit a table, draw rows.

Runs in `.venv-peers-density`, called by `run_peer`. Reads one array for each column as ``column:NAME``,
discrete (names), epochs and rows; writes the columns drawn in the same way, fit_seconds and sample_seconds.
"""

import sys
import time

import numpy as np
import pandas as pd
import torch
from ctgan import TVAE


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = np.load(sys.argv[1])
    columns = {
        name.removeprefix("column:"): given[name] for name in given.files if name.startswith("column:")
    }
    frame = pd.DataFrame(columns)
    start = time.perf_counter()
    model = TVAE(epochs=int(given["epochs"]), enable_gpu=False)
    model.fit(frame, [str(name) for name in given["discrete"]])
    fit_seconds = time.perf_counter() - start
    start = time.perf_counter()
    drawn = model.sample(int(given["rows"]))
    sample_seconds = time.perf_counter() - start
    arrays = {f"column:{name}": _array(drawn[name]) for name in drawn.columns}
    np.savez(sys.argv[2], fit_seconds=fit_seconds, sample_seconds=sample_seconds, **arrays)


def _array(column: pd.Series) -> np.ndarray:
    """Text as numpy text: objects would have to be pickled."""
    return column.to_numpy(str) if column.dtype == object else column.to_numpy()


if __name__ == "__main__":
    main()
