"""The training of a population: turns, copies, and the store that a kill leaves."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from paperback.errors import DataError
from paperback.search.engine import Engine, Outcome, RayEngine, Task, open_engine
from paperback.search.interface import Mode, Status, Trainable, Trial
from paperback.search.parameters import Config, Parameter, check_config, check_space
from paperback.search.population.board import Board, Change, Plan, first_configs
from paperback.search.population.exploit import Exploit, best, tournament, truncation, ttest
from paperback.search.population.explore import Explore, confine, perturb
from paperback.search.population.lineage import MEMBER, STEP, STEPS, TURN
from paperback.search.population.result import PopulationResult
from paperback.search.population.turn import Files, Make, Objects, States, Turn
from paperback.search.store import TrialStore, read_facts
from paperback.study.progress import Bars

EXPLORES = {"perturb": 0.0, "resample": 0.25}  # and the probability of a fresh draw, unless one is given
COPIED = ("weights", "hparams")
TURNS = 20  # of a member, unless an interval is given
STATES = "states"


class PopulationTraining:
    """Trains a population whose members copy from each other and change their settings as they go.

    Args:
        space: names and parameters of the settings; their priors are what members begin with.
        size: members.
        interval: steps of a turn, after which a member may copy; a twentieth of the budget if not given.
        exploit: whom a member copies: "truncation" (the bottom quantile copies the top quantile), "ttest"
            (another at random, if Welch's test says that it is better), "tournament" (another at random, if
            it is better), "best", a function of this form (see `exploit`), or None: nobody copies, and the
            population is a random search over constant settings.
        explore: how settings change after a copy: "perturb", "resample" (as "perturb", but each setting is
            drawn afresh with probability `resample_prob`), or ``explore(config, rng) -> config``. Numbers
            are always moved into their ranges.
        quantile: of truncation, in (0, 0.5]; failed members are replaced from the top quantile too.
        factors: positive; what a perturbed number is multiplied by, all equally probable.
        resample_prob: of a fresh draw, for each setting; if not given, 0 for "perturb" and 0.25 for
            "resample".
        copy: what is copied, "weights", "hparams" or both. Settings change only where they are copied.
        synchronous: members wait for each other after each turn. The result is then a function of the
            arguments and the trainable, whatever the engine. Otherwise nobody waits, and a member sees what
            the others had last; on the engine "local" that is repeatable too.
        mode: whether the greatest ("max") or the least ("min") score is best.
        metric: name of the score in what the trainable's ``step`` returns.
        start: settings to begin with, for the first members.
        seed: of all draws.

    Raises:
        DataError: if an argument is out of its range.
    """

    def __init__(
        self,
        space: Mapping[str, Parameter],
        *,
        size: int = 10,
        interval: int | None = None,
        exploit: str | Exploit | None = "truncation",
        explore: str | Explore = "perturb",
        quantile: float = 0.2,
        factors: Sequence[float] = (0.8, 1.2),
        resample_prob: float | None = None,
        copy: Collection[str] = COPIED,
        synchronous: bool = False,
        mode: Mode = "max",
        metric: str = "score",
        start: Sequence[Config] = (),
        seed: int = 0,
    ) -> None:
        self.space = check_space(space)
        self.size, self.interval, self.quantile = size, interval, quantile
        self.factors, self.resample_prob = tuple(factors), resample_prob
        self.copied = frozenset([copy] if isinstance(copy, str) else copy)
        self.synchronous, self.mode, self.metric, self.seed = synchronous, mode, metric, seed
        self.start = [check_config(config, self.space) for config in start]
        self._check()
        self.exploit, self.explore = exploit, explore
        self._exploit = None if exploit is None else self._strategy(exploit)
        self._explore = self._change(explore)
        if size == 1 and exploit is not None:
            warnings.warn("a population of size 1 has nobody to copy; it trains one model.", stacklevel=2)
            self._exploit = None

    def run(
        self,
        trainable: Make,
        budget: int,
        *,
        engine: str | Engine = "local",
        workers: int | None = None,
        store: str | Path | None = None,
        progress: bool = True,
    ) -> PopulationResult:
        """Train.

        Args:
            trainable: a class, or a function without arguments, that makes a `Trainable`. Each turn is made
                by a new one, so large data had better be loaded once for each process. Other engines than
                "local" send it by value.
            budget: steps of each member.
            engine: where turns are made, see `paperback.search.engine.open_engine`. With more members than
                workers, the least advanced take their turns first.
            workers: how many turns at once; all CPUs if not given.
            store: folder for trials and states; a run that was stopped there goes on.
            progress: show a progress bar.

        Returns:
            All turns, the copies, and the best weights.

        Raises:
            DataError: if an argument is out of range, the trainable is none, its metrics lack the score, or
                the store is another run's.
            SearchError: if all members failed.
        """
        interval = self._interval(budget)
        steps = tuple(min(interval, budget - first) for first in range(0, budget, interval))
        _check_trainable(trainable)
        board = Board(self._plan(steps), first_configs(self.space, self.size, self.seed, self.start))
        folder = None if store is None else Path(store)
        book = None if folder is None else TrialStore(folder, self._facts(budget, interval))
        for trial in [] if book is None else book.read(repair=True):
            _check_same(trial, board)
            board.absorb(trial)
        with (
            open_engine(engine, workers) as place,
            _states(place, trainable, folder) as states,
        ):
            states.keep_only(board.weights())
            left = self.size * len(steps) - len(board.trials)
            running = self._train(board, place, trainable, states)
            for trial in Bars(progress).track(running, "turns", left):
                if book is not None:
                    book.append(trial)
                board.absorb(trial)
                states.keep_only(board.weights())
            board.check_alive()
            return self._result(board, states)

    def resume(
        self,
        store: str | Path,
        trainable: Make,
        *,
        engine: str | Engine = "local",
        workers: int | None = None,
        progress: bool = True,
    ) -> PopulationResult:
        """Go on with a run that was stopped; a synchronous one ends as it would have.

        Args:
            store: its folder.
            trainable: the same as before.
            engine: see `run`; it may be another one.
            workers: see `run`.
            progress: show a progress bar.

        Raises:
            DataError: if there is no run in the folder, or it is another one.
        """
        budget = read_facts(store).get("budget")
        if not isinstance(budget, int):
            raise DataError(f"{store} holds no population.")
        return self.run(trainable, budget, engine=engine, workers=workers, store=store, progress=progress)

    # -- arguments -----------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.size < 1:
            raise DataError(f"size is {self.size}; a population has at least one member.")
        if not 0 < self.quantile <= 0.5:
            raise DataError(f"quantile is {self.quantile}; it is greater than 0 and at most 0.5.")
        if not self.factors or not all(0 < factor < math.inf for factor in self.factors):
            raise DataError(f"factors is {self.factors}; give one or more positive numbers.")
        if self.resample_prob is not None and not 0 <= self.resample_prob <= 1:
            raise DataError(f"resample_prob is {self.resample_prob}; it is a probability.")
        if not self.copied or not self.copied <= set(COPIED):
            raise DataError(f'copy is {sorted(self.copied)}; give "weights", "hparams" or both.')
        if self.mode not in ("max", "min"):
            raise DataError(f'mode is {self.mode!r}; it is "max" or "min".')
        if len(self.start) > self.size:
            raise DataError(f"start has {len(self.start)} settings for {self.size} members; leave some out.")

    def _strategy(self, exploit: str | Exploit) -> Exploit:
        named: dict[Any, Exploit] = {
            "truncation": partial(truncation, quantile=self.quantile),
            "ttest": ttest,
            "tournament": tournament,
            "best": best,
        }
        if isinstance(exploit, str) and exploit in named:
            return named[exploit]
        if isinstance(exploit, str) or not callable(exploit):
            raise DataError(f"exploit is {exploit!r}; use {', '.join(named)}, a function or None.")
        return exploit

    def _change(self, explore: str | Explore) -> Change:
        if isinstance(explore, str) and explore in EXPLORES:
            probability = EXPLORES[explore] if self.resample_prob is None else self.resample_prob
            return lambda config, rng: perturb(config, self.space, rng, self.factors, probability)
        if isinstance(explore, str) or not callable(explore):
            raise DataError(f"explore is {explore!r}; use {', '.join(EXPLORES)} or a function.")
        return lambda config, rng: confine(explore(config, rng), self.space)

    def _interval(self, budget: int) -> int:
        if budget < 1:
            raise DataError(f"budget is {budget}; it is at least 1 step.")
        interval = max(1, budget // TURNS) if self.interval is None else self.interval
        if not 1 <= interval <= budget:
            raise DataError(f"interval is {interval}; it is at least 1 and at most the budget, {budget}.")
        return interval

    def _plan(self, steps: tuple[int, ...]) -> Plan:
        return Plan(
            self._exploit,
            self._explore,
            self.quantile,
            self.copied,
            self.synchronous,
            self.mode,
            self.seed,
            steps,
        )

    def _facts(self, budget: int, interval: int) -> dict[str, Any]:
        """What a store knows this run by."""
        return {
            "searcher": type(self).__name__,
            "seed": self.seed,
            "space": {name: repr(parameter) for name, parameter in self.space.items()},
            "size": self.size,
            "budget": budget,
            "interval": interval,
            "exploit": _name(self.exploit),
            "explore": _name(self.explore),
            "quantile": self.quantile,
            "factors": list(self.factors),
            "resample_prob": self.resample_prob,
            "copy": sorted(self.copied),
            "synchronous": self.synchronous,
            "mode": self.mode,
            "metric": self.metric,
            "start": self.start,
        }

    # -- the loop ------------------------------------------------------------------------------------------

    def _train(self, board: Board, engine: Engine, make: Make, states: States) -> Iterator[Trial]:
        """Turns, in the order in which they end; each is to be absorbed before the next is asked for."""
        running: dict[int, tuple[Turn, Task]] = {}
        while True:
            for place in board.ready(running.keys())[: engine.workers - len(running)]:
                turn = board.turn(place)
                running[place] = (turn, states.begin(engine, make, turn))
            if not running:
                return
            over = engine.wait([task for _, task in running.values()])
            place = next(place for place, (_, task) in running.items() if task is over)
            turn, task = running.pop(place)
            if task.outcome is not None and task.outcome.error is None:
                states.finish(task, turn.number)
            assert task.outcome is not None
            yield self._trial(board, place, turn, task.outcome)

    def _trial(self, board: Board, place: int, turn: Turn, outcome: Outcome) -> Trial:
        """A turn and what came of it."""
        before = 0.0 if turn.state is None else board.trials[turn.state].details[STEP]
        details = {
            MEMBER: float(place),
            TURN: float(board.members[place].turn),
            STEPS: float(turn.steps),
            STEP: before + turn.steps,
        }
        score: float | None = None
        reason = outcome.error or ""
        if outcome.error is None:
            metrics = _metrics(outcome.value, self.metric)
            score = metrics.pop(self.metric)
            details = {name: value for name, value in metrics.items() if math.isfinite(value)} | details
            if not math.isfinite(score):
                score, reason = None, f"{self.metric} is {score}."
        status: Status = "failed" if score is None else "done"
        number, seconds = turn.number, outcome.seconds
        return Trial(number, turn.config, status, score, reason, seconds, turn.state, details)

    def _result(self, board: Board, states: States) -> PopulationResult:
        trials = tuple(board.trials[number] for number in sorted(board.trials))
        result = PopulationResult(
            trials,
            self.mode,
            sum(trial.seconds for trial in trials),
            tuple(None if member.lost else member.weights for member in board.members),
            tuple(board.events),
            seed=self.seed,
        )
        return replace(result, best_state=states.read(result.best.number))


def _check_same(stored: Trial, board: Board) -> None:
    """Refuse a stored turn that this population would not have made."""
    place = int(stored.details.get(MEMBER, -1))
    due = board.turn(place) if place in board.ready(set()) else None
    if due is None or (due.number, due.config, due.state) != (stored.number, stored.config, stored.parent):
        raise DataError(
            f"trial {stored.number} of the store does not follow from those before it; the strategies or the "
            "library changed. Take another folder."
        )


@contextmanager
def _states(engine: Engine, make: Make, folder: Path | None) -> Iterator[States]:
    """Where states rest: with Ray in its object store, else in files; in the run's folder if it has one."""
    place = None if folder is None else folder / STATES
    if isinstance(engine, RayEngine):
        yield Objects(engine, make, place)
    elif place is not None:
        yield Files(place)
    else:
        with tempfile.TemporaryDirectory(prefix="population-") as temporary:
            yield Files(Path(temporary))


def _check_trainable(make: Any) -> None:
    """Refuse what makes no trainable, before anything runs."""
    if not callable(make):
        raise DataError(
            f"trainable is a {type(make).__name__}; give a class, or a function without arguments, that "
            "makes one."
        )
    made = make()
    if not isinstance(made, Trainable):
        methods = ("setup", "step", "state_dict", "load_state_dict", "reconfigure")
        missing = [name for name in methods if not callable(getattr(made, name, None))]
        raise DataError(f"the trainable is a {type(made).__name__} without {', '.join(missing)}.")


def _metrics(value: Any, metric: str) -> dict[str, float]:
    """What a step returned, as numbers."""
    if not isinstance(value, Mapping):
        raise DataError(f"the trainable's step returned {value!r}; it returns a mapping with {metric!r}.")
    if metric not in value:
        raise DataError(
            f"the trainable's step returned {', '.join(map(str, value)) or 'an empty mapping'}; "
            f"{metric!r} is missing."
        )
    for taken in (MEMBER, TURN, STEPS, STEP):
        if taken in value and taken != metric:
            raise DataError(
                f"the trainable's step returned {taken!r}, which a population notes itself; rename it."
            )
    plain = {}
    for name, number in value.items():
        if isinstance(number, Tensor) and number.ndim == 0:
            number = number.item()
        if not isinstance(number, Real):
            raise DataError(f"the trainable's step returned {number!r} as {name!r}; it must return numbers.")
        plain[str(name)] = float(number)
    return plain


def _name(strategy: Any) -> str | None:
    if strategy is None or isinstance(strategy, str):
        return strategy
    return getattr(strategy, "__qualname__", type(strategy).__name__)
