"""Euclidean projection onto linear constraints by cvxpylayers.

Runs in `.venv-peers-density`, called by `run_peer`. Reads A, b (A x + b >= 0) and rows, all in units in which
every column has spread 1; writes projected and seconds, of the second of two calls.
"""

import sys
import time

import cvxpy
import numpy as np
import torch
from cvxpylayers.torch import CvxpyLayer


def main() -> None:
    torch.set_num_threads(1)
    given = np.load(sys.argv[1])
    A, b, rows = given["A"], given["b"], torch.from_numpy(given["rows"])
    target, x = cvxpy.Parameter(A.shape[1]), cvxpy.Variable(A.shape[1])
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - target)), [A @ x + b >= 0])
    layer = CvxpyLayer(problem, parameters=[target], variables=[x])
    layer(rows)
    start = time.perf_counter()
    projected = layer(rows)[0]
    seconds = time.perf_counter() - start
    np.savez(sys.argv[2], projected=projected.numpy(), seconds=seconds)


if __name__ == "__main__":
    main()
