"""Population training beside Ray Tune's PopulationBasedTraining: the same problem, members, steps and copies.

1. The noisy quadratic model of the study, whose steps take no time: final true loss, and wall time in this
   process against that of Ray on this machine (which is up before the clock starts, and reuses its actors).
2. Steps that take 0.1 s, on four workers of Ray under both: our engine "ray" against Ray's own schedule.

Run: ``python benchmarks/search/population.py [SEEDS]``, SEEDS of Ray Tune; ours, which take no time, have 20.
Needs ``paperback[ray]``.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats

from paperback.search import Float, SearchResult
from paperback.search.parameters import Config
from paperback.search.population import PopulationTraining
from paperback.search.ray_tune import tune_population
from paperback.search.studies.population import HIGH, LOW, Quadratic

SPACE = {"lr": Float(LOW, HIGH, log=True)}
MEMBERS, TURNS = 10, 20  # turns of 50 optimizer steps
OUR_SEEDS = 20
SECONDS, SLOW_MEMBERS, SLOW_TURNS, WORKERS = 0.1, 8, 10, 4


class Slow:
    """A step that takes a while, and no CPU, so that four workers fit on any machine."""

    def setup(self, config: Config, seed: int) -> None:
        self.steps = 0
        self.reconfigure(config)

    def step(self) -> dict[str, float]:
        time.sleep(SECONDS)
        self.steps += 1
        return {"loss": abs(np.log(self.lr / 0.1)) / self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]

    def reconfigure(self, config: Config) -> None:
        self.lr = config["lr"]


def timed(search: Callable[[], SearchResult]) -> tuple[float, float]:
    """The best score, and seconds."""
    start = time.perf_counter()
    best = search().best.score
    assert best is not None
    return best, time.perf_counter() - start


def ours(make: Any, size: int, turns: int, seed: int, **engine: Any) -> SearchResult:
    """Ours, asynchronous as Ray's."""
    searcher = PopulationTraining(SPACE, size=size, interval=1, mode="min", metric="loss", seed=seed)
    return searcher.run(make, turns, progress=False, **engine)


def rays(make: Any, size: int, turns: int, seed: int) -> SearchResult:
    """Ray Tune's, with the same quantile and factors."""
    return tune_population(SPACE, make, turns, size=size, mode="min", metric="loss", seed=seed)


def quality(seeds: int) -> None:
    """Loss and wall time where steps take no time."""
    loss: dict[str, list[float]] = {"ours, asynchronous": [], "ours, synchronous": [], "Ray Tune": []}
    seconds: dict[str, list[float]] = {name: [] for name in loss}
    searches: dict[str, Callable[[int], SearchResult]] = {
        "ours, asynchronous": lambda seed: ours(Quadratic, MEMBERS, TURNS, seed),
        "ours, synchronous": lambda seed: PopulationTraining(
            SPACE, size=MEMBERS, interval=1, mode="min", metric="loss", seed=seed, synchronous=True
        ).run(Quadratic, TURNS, progress=False),
        "Ray Tune": lambda seed: rays(Quadratic, MEMBERS, TURNS, seed),
    }
    for name, search in searches.items():
        for seed in range(seeds if name == "Ray Tune" else OUR_SEEDS):
            best, spent = timed(lambda search=search, seed=seed: search(seed))  # type: ignore[misc]
            loss[name].append(best)
            seconds[name].append(spent)
    print(f"{MEMBERS} members, {TURNS} turns of 50 steps; {OUR_SEEDS} seeds, {seeds} of Ray Tune")
    print(f"{'':20s} {'loss':>8s} {'sd':>8s} {'seconds':>9s}")
    for name in loss:
        print(
            f"{name:20s} {np.mean(loss[name]):8.4f} {np.std(loss[name]):8.4f} {np.mean(seconds[name]):9.2f}"
        )
    for name in ("ours, asynchronous", "ours, synchronous"):
        difference = np.mean(loss[name]) - np.mean(loss["Ray Tune"])
        test = stats.ttest_ind(loss[name], loss["Ray Tune"], equal_var=False)
        low, high = test.confidence_interval(0.95)
        ratio = np.mean(seconds[name]) / np.mean(seconds["Ray Tune"])
        print(
            f"{name} minus Ray Tune: loss {difference:+.4f} (95 % interval {low:+.4f} to {high:+.4f}), "
            f"wall time {ratio:.4f} times ({1 / ratio:.0f} times less)"
        )


def overhead() -> None:
    """Wall time where steps take a while, both on Ray with four workers; the least of two."""
    seconds = {
        "our engine ray": min(
            timed(lambda: ours(Slow, SLOW_MEMBERS, SLOW_TURNS, 0, engine="ray", workers=WORKERS))[1]
            for _ in range(2)
        ),
        "Ray Tune": min(timed(lambda: rays(Slow, SLOW_MEMBERS, SLOW_TURNS, 0))[1] for _ in range(2)),
    }
    least = SECONDS * SLOW_MEMBERS * SLOW_TURNS / WORKERS
    print(f"{SLOW_MEMBERS} members, {SLOW_TURNS} steps of {SECONDS} s, {WORKERS} workers: >= {least:.1f} s")
    for name, spent in seconds.items():
        print(f"{name:20s} {spent:9.2f} s")
    print(f"our engine ray needs {seconds['our engine ray'] / seconds['Ray Tune']:.3f} times Ray's wall time")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if importlib.util.find_spec("ray") is None:
        sys.exit("Ray is not installed; install paperback[ray].")
    import ray

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    rays(Quadratic, 4, 2, 0)  # workers are up, and have imported what they need
    quality(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    overhead()
    ray.shutdown()
