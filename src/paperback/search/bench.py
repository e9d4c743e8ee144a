"""How searchers are compared: the best score against evaluations and against seconds, over seeds.

By default on the replay space: 576 models of handwritten digits that were all trained beforehand, so that
an evaluation costs nothing and the seconds are the searcher's own. With ``--model module:function`` on the
user's problem: the function returns ``(space, evaluate)``, a `Space` or a dictionary of parameters, and
``evaluate(config, seed) -> score``, greater being better.

Every contender has the same budget, counted in full evaluations: a training that successive halving stops
after an eighth of its steps costs an eighth, and only its trainings to the end are scored. Searchers that
walk see continuous parameters of a dictionary as lists of values (`from_dict`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from paperback.compare.bench import Bench, Contender, Kind, Metric
from paperback.compare.users_code import users_function
from paperback.errors import DataError
from paperback.search.deep_architect import MCTS, SMBO, Evolution, RandomSearch, Space, from_dict
from paperback.search.halving import RESOURCE, SuccessiveHalving
from paperback.search.interface import InvalidTrial, Searcher
from paperback.search.optuna import OptunaSearch
from paperback.search.parameters import Config
from paperback.search.replay import STEPS, replay_score, replay_space
from paperback.study.budget import Budget, for_budget
from paperback.study.measure import Stopwatch
from paperback.training import derive

METRICS = (
    Metric("best", "best score", better="higher", primary=True),
    Metric("best_at_half", "best after half the budget", better="higher"),
    Metric("best_at_quarter", "best after a quarter", better="higher"),
    Metric("mean_best", "best so far, mean over the budget", better="higher"),
    Metric("failed", "trials without a score, share", better="lower"),
    Metric("evaluations_to_best", "evaluations until the best", better="lower", cost=True),
    Metric("search_seconds", "searcher, per trial", "s", better="lower", cost=True),
    Metric("seconds_to_best", "seconds until the best", "s", better="lower", cost=True),
)


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        space: of the configurations.
        evaluate: ``(config, seed) -> score``, greater is better.
        budget: full evaluations.
        rungs: amounts of training that evaluate can stop at, empty if it cannot.
    """

    space: Space
    evaluate: Callable[[Config, int], float]
    budget: int
    rungs: tuple[int, ...] = ()


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, model: str | None = None
) -> Problem:
    """The replay space, or the user's problem.

    Args:
        path: must be None.
        target: must be None.
        budget: how many evaluations.
        seed: not used; every draw belongs to the seed of a job.
        model: "module:function" that returns a space and an evaluate function.

    Raises:
        DataError: if data are given, or the function does not give what it should.
    """
    if path is not None or target is not None:
        raise DataError(
            "searchers are compared on a space, not on data; leave --data and --target out, or bring a space "
            "and an evaluate function with --model module:function."
        )
    evaluations = for_budget(budget, smoke=8, quick=24, standard=48, full=96)
    if model is None:
        return Problem(replay_space(), _replay, evaluations, STEPS)
    space, evaluate = _users_problem(model)
    return Problem(space if isinstance(space, Space) else from_dict(space), evaluate, evaluations)


def evaluate(
    contender: Contender, data: Problem, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Search with one contender, measure it, and save its trials in ``trials.csv`` under `out`."""
    searcher: Searcher = contender.build(data, budget, seed)
    full = data.rungs[-1] if data.rungs else 1
    spent, searching, elapsed, rows = 0.0, 0.0, 0.0, []
    while spent < data.budget - 1e-9:
        with Stopwatch() as asking:
            proposal = searcher.ask()
        steps = int(proposal.config.get(RESOURCE, full)) if data.rungs else full
        with Stopwatch() as evaluating:
            score = _attempt(data.evaluate, proposal.config, derive(seed, "evaluate", proposal.number))
        with Stopwatch() as telling:
            searcher.tell(proposal, score)
        spent += steps / full
        searching += asking.seconds + telling.seconds
        elapsed += asking.seconds + evaluating.seconds + telling.seconds
        rows.append({"spent": spent, "seconds": elapsed, "score": score, "whole": steps == full})
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / "trials.csv", index=False)
    return _measures(table, data.budget) | {"search_seconds": searching / len(table)}


def _measures(table: pd.DataFrame, budget: int) -> dict[str, float | None]:
    """From trials, in the order of evaluation; None where nothing had a score by then."""
    scored = table[table["whole"] & table["score"].notna()]
    measured: dict[str, float | None] = {
        "failed": float(table["score"].isna().mean()),
        "best": _best(scored, budget),
        "best_at_half": _best(scored, budget / 2),
        "best_at_quarter": _best(scored, budget / 4),
        "mean_best": None,
        "evaluations_to_best": None,
        "seconds_to_best": None,
    }
    if len(scored):
        places = np.arange(np.ceil(scored["spent"].iloc[0]), budget + 1)
        measured["mean_best"] = float(np.mean([_best(scored, place) for place in places]))
        first = scored.iloc[int(scored["score"].astype(float).argmax())]
        measured["evaluations_to_best"] = float(first["spent"])
        measured["seconds_to_best"] = float(first["seconds"])
    return measured


def _best(scored: pd.DataFrame, spent: float) -> float | None:
    """The best score once so much was spent; a last evaluation may go beyond it by less than one."""
    until = scored[scored["spent"] < spent + 1 - 1e-9]["score"]
    return float(until.max()) if len(until) else None


def _attempt(function: Callable[[Config, int], Any], config: Config, seed: int) -> float | None:
    """The score, None if the model is invalid or the score not finite. Other exceptions end the job."""
    try:
        score = float(function(config, seed))
    except InvalidTrial:
        return None
    return score if np.isfinite(score) else None


def _replay(config: Config, seed: int) -> float:
    """The table's score, after the steps that a configuration may name."""
    choices = {name: value for name, value in config.items() if name != RESOURCE}
    return replay_score(choices, config.get(RESOURCE, STEPS[-1]))


def _users_problem(address: str) -> tuple[Any, Callable[[Config, int], float]]:
    made = users_function(address, "returns (space, evaluate)")()
    fits = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Space | Mapping)
    if not fits or not callable(made[1]):
        raise DataError(f"--model {address} gives {made!r}; return (space, evaluate).")
    return made


def _contender(
    name: str,
    label: str,
    build: Callable[[Problem, int], Searcher],
    applies: Callable[[Problem], str | None] = lambda problem: None,
) -> Contender:
    kind: Kind = "method" if name == "deep-architect" else "baseline"
    return Contender(name, label, kind, applies, lambda data, budget, seed: build(data, seed))


def _can_stop(problem: Problem) -> str | None:
    return None if problem.rungs else "evaluate cannot stop a training early"


def _has_optuna(problem: Problem) -> str | None:
    return None if importlib.util.find_spec("optuna") else "needs paperback[optuna]"


BENCH = Bench(
    task="search",
    metrics=METRICS,
    contenders=(
        _contender("deep-architect", "SMBO (DeepArchitect)", lambda p, seed: SMBO(p.space, seed=seed)),
        _contender("smbo-ngram", "SMBO on n-grams", lambda p, s: SMBO(p.space, features="ngram", seed=s)),
        _contender("mcts", "tree search", lambda p, seed: MCTS(p.space, seed=seed)),
        _contender("mcts-bisection", "bisected tree search", lambda p, s: MCTS(p.space, bisect=True, seed=s)),
        _contender("evolution", "regularised evolution", lambda p, seed: Evolution(p.space, seed=seed)),
        _contender(
            "halving",
            "successive halving",
            lambda p, s: SuccessiveHalving(lambda rng: p.space.sample(rng).config, p.rungs, seed=s),
            _can_stop,
        ),
        _contender("optuna-tpe", "Optuna TPE", lambda p, seed: OptunaSearch(p.space, seed=seed), _has_optuna),
        _contender("random", "random search", lambda p, seed: RandomSearch(p.space, seed=seed)),
    ),
    load=load,
    evaluate=evaluate,
    seconds={"smoke": 3, "quick": 4, "standard": 5, "full": 8},
    takes_model=True,
)
