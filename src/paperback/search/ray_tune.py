"""Our trainables under Ray Tune, and Ray Tune's own population training as a baseline (extra ``ray``).

`as_tune_trainable` gives the class that any ``ray.tune.Tuner`` takes; `tune_population` runs
``ray.tune.schedulers.PopulationBasedTraining`` over a flat space.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from paperback.errors import DataError, MissingExtraError
from paperback.search.interface import Mode, SearchResult, Trainable, Trial
from paperback.search.parameters import Choice, Config, Float, Integer, Parameter, check_space
from paperback.search.population.turn import pack, unpack
from paperback.study.ray_cluster import ray_cluster
from paperback.training import derive

STATE, SETTINGS = "state.pt", "config.json"


def as_tune_trainable(trainable: Callable[[], Trainable], *, seed: int = 0) -> type:
    """A class of Ray Tune that trains what this makes.

    It is made for schedulers that copy checkpoints between trials: what is restored is set up with the
    settings it was trained with, and then reconfigured to those of the trial.

    Args:
        trainable: makes one of ours.
        seed: each trial has its own, from this one and its place in Tune's list.

    Returns:
        A subclass of ``ray.tune.Trainable``.

    Raises:
        MissingExtraError: if Ray Tune is not installed.
    """
    tune = import_tune()

    class TuneTrainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self.own_seed = derive(seed, "tune", str(self.trial_id).rpartition("_")[2])
            self.inner = trainable()
            self.inner.setup(dict(config), self.own_seed)

        def step(self) -> dict[str, float]:
            return dict(self.inner.step())

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            Path(checkpoint_dir, STATE).write_bytes(pack(self.inner.state_dict()))
            Path(checkpoint_dir, SETTINGS).write_text(json.dumps(self.config), encoding="utf-8")

        def load_checkpoint(self, checkpoint: str) -> None:
            before = json.loads(Path(checkpoint, SETTINGS).read_text(encoding="utf-8"))
            self.inner = trainable()
            self.inner.setup(before, self.own_seed)
            self.inner.load_state_dict(unpack(Path(checkpoint, STATE).read_bytes()))
            if self.config != before:
                self.inner.reconfigure(dict(self.config))

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

    return TuneTrainable


def tune_space(space: Mapping[str, Parameter]) -> dict[str, Any]:
    """A flat space in the words of Ray Tune: priors to draw from.

    Args:
        space: names and parameters.
    """
    tune = import_tune()

    def domain(parameter: Parameter) -> Any:
        if isinstance(parameter, Choice):
            return tune.choice(list(parameter.values))
        if isinstance(parameter, Integer):
            draw = tune.lograndint if parameter.log else tune.randint
            return draw(parameter.low, parameter.high + 1)
        draw = tune.loguniform if parameter.log else tune.uniform
        return draw(parameter.low, parameter.high)

    return {name: domain(parameter) for name, parameter in check_space(space).items()}


def tune_population(
    space: Mapping[str, Parameter],
    trainable: Callable[[], Trainable],
    budget: int,
    *,
    size: int = 10,
    interval: int = 1,
    quantile: float = 0.2,
    factors: Sequence[float] = (0.8, 1.2),
    resample_prob: float = 0.0,
    synchronous: bool = False,
    mode: Mode = "max",
    metric: str = "score",
    seed: int = 0,
    address: str = "",
) -> SearchResult:
    """Ray Tune's PopulationBasedTraining.

    It differs from ours in this: settings are moved into their ranges here, since Ray does not; a member that
    gives NaN keeps its place; an unordered choice is moved to a neighbour in its list; and Ray draws from
    Python's global random numbers, whose state is put back at the end, in the order in which its trials
    report, so that a run cannot be repeated.

    Args:
        space: names and parameters.
        trainable: makes a trainable.
        budget: steps of each member.
        size: members.
        interval: steps between copies.
        quantile: that is copied, and that copies.
        factors: two; what a number is multiplied by.
        resample_prob: of a fresh draw.
        synchronous: whether members wait for each other.
        mode: whether the greatest or the least score is best.
        metric: name of the score.
        seed: of the draws.
        address: of a Ray cluster, empty for the one that Ray finds or starts.

    Returns:
        One trial for each member, with the settings and the score that it had last.

    Raises:
        DataError: if an argument is out of range.
        MissingExtraError: if Ray Tune is not installed.
    """
    if budget < 1 or size < 1 or not 1 <= interval <= budget:
        raise DataError(f"budget is {budget}, size {size} and interval {interval}; give 1 or more of each.")
    tune = import_tune()
    priors = tune_space(space)
    schedulers = importlib.import_module("ray.tune.schedulers")
    variants = importlib.import_module("ray.tune.search.basic_variant")
    mutations = {
        name: list(parameter.values) if isinstance(parameter, Choice) else priors[name]
        for name, parameter in space.items()
    }
    scheduler = schedulers.PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=interval,
        hyperparam_mutations=mutations,
        quantile_fraction=quantile,
        resample_probability=resample_prob,
        perturbation_factors=tuple(factors),
        custom_explore_fn=lambda config: _clipped(config, space),
        synch=synchronous,
    )
    with ray_cluster(address), _quiet(), _python_random(seed), tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            tune.with_resources(as_tune_trainable(trainable, seed=seed), {"cpu": 1}),
            param_space=priors,
            tune_config=tune.TuneConfig(
                num_samples=size,
                scheduler=scheduler,
                metric=metric,
                mode=mode,
                search_alg=variants.BasicVariantGenerator(random_state=seed),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(stop={"training_iteration": budget}, storage_path=folder, verbose=0),
        )
        grid = tuner.fit()
        trials = tuple(_trial(number, result, metric) for number, result in enumerate(grid))
    return SearchResult(trials, mode, sum(trial.seconds for trial in trials))


def import_tune() -> ModuleType:
    """Ray Tune.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module("ray.tune")
    except ImportError as error:
        raise MissingExtraError("Ray Tune is not installed; install paperback[ray].") from error


def _trial(number: int, result: Any, metric: str) -> Trial:
    metrics = result.metrics or {}
    score, seconds = metrics.get(metric), float(metrics.get("time_total_s", 0.0))
    if result.error is not None or score is None or not math.isfinite(score):
        reason = str(result.error or f"{metric} is {score}.")
        return Trial(number, dict(result.config), "failed", None, reason, seconds)
    return Trial(number, dict(result.config), "done", float(score), "", seconds)


def _clipped(config: Config, space: Mapping[str, Parameter]) -> Config:
    """Numbers moved into their ranges."""
    return {
        name: parameter.clip(config[name])
        if isinstance(parameter := space[name], Float | Integer)
        else config[name]
        for name in space
    }


@contextmanager
def _python_random(seed: int) -> Iterator[None]:
    """Python's global random numbers, from which Ray's scheduler draws, seeded here and put back."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that Ray Tune prints for every copy, and without its statistics of use."""
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    before = os.environ.get("RAY_AIR_NEW_OUTPUT")
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:
            del os.environ["RAY_AIR_NEW_OUTPUT"]
        else:
            os.environ["RAY_AIR_NEW_OUTPUT"] = before
