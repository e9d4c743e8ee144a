"""What the experiments ask of models."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn

from paperback.density.interface import DensityModel
from paperback.density.marginalization import MarginalizationModel
from paperback.training import History


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


class TrainingClock:
    """A callback of `train` that notes the processor's seconds of each round, without what it reads itself.

    Not those of the wall, so that two models get the same share also where the machine has other work.

    Args:
        read: called after each round with the model and the history; its time does not count.

    Attributes:
        seconds: of each round.
    """

    def __init__(self, read: Callable[[nn.Module, History], None] | None = None) -> None:
        self.seconds: list[float] = []
        self._read = read
        self._since = time.process_time()

    def __call__(self, epoch: int, model: nn.Module, history: History) -> None:
        self.seconds.append(time.process_time() - self._since)
        if self._read is not None:
            self._read(model, history)
        self._since = time.process_time()
