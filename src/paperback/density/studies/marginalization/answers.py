"""What the experiments ask of models."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from paperback.density.interface import DensityModel
from paperback.density.marginalization import MarginalizationModel


def log_prob(model: DensityModel, X: Tensor, observed: Tensor | None = None) -> Tensor:
    """The log-probability of a model that has it as a number."""
    answer = model.log_prob(X, observed)
    assert isinstance(answer, Tensor)
    return answer


def speed_up(model: MarginalizationModel, rows: Tensor) -> tuple[float, float, float]:
    """Seconds along one order over seconds of one call, and both in ms per row."""

    def seconds(ask: Callable[[], object]) -> float:
        """The median of some repetitions, or a single one where that is slow and so not noisy."""
        times: list[float] = []
        while len(times) < 9 and sum(times) < 2.0:
            start = time.perf_counter()
            ask()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    rows = rows[:64]
    model.log_prob(rows)  # the first call is slower
    head = seconds(lambda: model.log_prob(rows))
    along = seconds(lambda: model.log_prob(rows, exact=True, n_orders=1))
    return along / head, 1e3 * along / len(rows), 1e3 * head / len(rows)
