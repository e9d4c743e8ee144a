"""Our spaces under Optuna's samplers, and Optuna's samplers as one of our searchers (extra ``optuna``).

`suggest` runs a walk of a DeepArchitect `Space`, or a flat space, with ``trial.suggest_...``, so that any
Optuna study can search it. `OptunaSearch` is the other way round: an Optuna sampler with ``ask`` and
``tell``, with this wing's engines, stores and restarts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paperback.errors import DataError, MissingExtraError
from paperback.search.deep_architect.space import Space, is_ordered
from paperback.search.interface import Searcher
from paperback.search.parameters import Choice, Config, Float, Integer, Parameter, check_space

if TYPE_CHECKING:
    import optuna

Flat = Mapping[str, Parameter]
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "nsga2": "NSGAIISampler"}


def suggest(trial: optuna.trial.BaseTrial, space: Space | Flat) -> Config:
    """A configuration that Optuna chooses.

    Ordered lists of numbers are suggested as places in the list, so that a sampler can use their order;
    other lists are categories.

    Args:
        trial: of Optuna.
        space: of DeepArchitect, or names and parameters.

    Returns:
        As our searchers propose it. ``trial.params`` has places where the list is ordered.
    """
    if not isinstance(space, Space):
        return {name: _suggest_parameter(trial, name, p) for name, p in check_space(space).items()}
    walk = space.walk()
    while walk.open is not None:
        name, values, _ = walk.open
        if is_ordered(values):
            walk.choose(trial.suggest_int(name, 0, len(values) - 1))
        else:
            walk.choose(values.index(trial.suggest_categorical(name, list(values))))
    return walk.config


class OptunaSearch(Searcher):
    """An Optuna sampler as a searcher.

    Each proposal is drawn with a sampler of its own seed and from the trials told, so that a search that was
    stopped goes on as it would have.

    Args:
        space: of DeepArchitect, or names and parameters.
        sampler: "tpe" (tree-structured Parzen estimator), "random" or "nsga2".
        seed: of the draws.

    Raises:
        MissingExtraError: if Optuna is not installed.
        DataError: if there is no such sampler, or the space cannot be used.
    """

    def __init__(
        self, space: Space | Flat, sampler: Literal["tpe", "random", "nsga2"] = "tpe", *, seed: int = 0
    ) -> None:
        super().__init__(seed)
        if sampler not in SAMPLERS:
            raise DataError(f"sampler is {sampler!r}; use {', '.join(SAMPLERS)}.")
        self.space = space if isinstance(space, Space) else check_space(space)
        self.sampler = sampler
        self._optuna = import_optuna()
        with _quiet(self._optuna):
            self._study = self._optuna.create_study(direction="maximize", sampler=self._new_sampler(0))
        self._running: dict[int, Any] = {}

    def _settings(self) -> dict[str, Any]:
        space = self.space
        shown = repr(space) if isinstance(space, Space) else {name: repr(p) for name, p in space.items()}
        return {"space": shown, "sampler": self.sampler, "optuna": self._optuna.__version__}

    def _new_sampler(self, seed: int) -> Any:
        return getattr(self._optuna.samplers, SAMPLERS[self.sampler])(seed=seed)

    def _propose(self, rng: np.random.Generator) -> tuple[Config, None]:
        self._study.sampler = self._new_sampler(int(rng.integers(2**31)))
        trial = self._study.ask()
        config = suggest(trial, self.space)
        self._running[self.asked] = trial
        return config, None

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        states = self._optuna.trial.TrialState
        state = states.FAIL if score is None else states.COMPLETE
        trial = self._running.pop(number, None)
        if trial is not None:
            self._study.tell(trial, score, state=state)
            return
        # Told from a store: the trial that the sampler would have made.
        replayed = self._optuna.trial.FixedTrial(_places(config, self.space))
        suggest(replayed, self.space)
        self._study.add_trial(
            self._optuna.trial.create_trial(
                state=state, value=score, params=replayed.params, distributions=replayed.distributions
            )
        )


def import_optuna() -> ModuleType:
    """Optuna.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise MissingExtraError("Optuna is not installed; install paperback[optuna].") from error


def _suggest_parameter(trial: optuna.trial.BaseTrial, name: str, parameter: Parameter) -> Any:
    if isinstance(parameter, Float):
        return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)
    if isinstance(parameter, Integer):
        return trial.suggest_int(name, parameter.low, parameter.high, log=parameter.log)
    values = parameter.values
    if parameter.ordered and len(values) > 1:
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return trial.suggest_categorical(name, list(values))


def _places(config: Config, space: Space | Flat) -> dict[str, Any]:
    """What Optuna calls a configuration: places in ordered lists, values elsewhere."""
    if not isinstance(space, Space):
        ordered = {name for name, p in space.items() if isinstance(p, Choice) and p.ordered}
        return {
            name: space[name].values.index(value) if name in ordered else value  # type: ignore[union-attr]
            for name, value in config.items()
        }
    walk, places = space.walk(), {}
    while walk.open is not None:
        name, values, _ = walk.open
        index = walk.toward(config)
        places[name] = index if is_ordered(values) else values[index]
        walk.choose(index)
    return places


@contextmanager
def _quiet(optuna: ModuleType) -> Iterator[None]:
    """Without the line that Optuna prints for every study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
