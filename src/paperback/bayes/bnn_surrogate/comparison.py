"""Problems by surrogates by trials, each loop on its own; the table of values and the table of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch

from paperback.bayes.bnn_surrogate.loop import MODEL_FREE, bayes_opt
from paperback.bayes.bnn_surrogate.make import make_surrogate
from paperback.bayes.bnn_surrogate.problems import Problem
from paperback.bayes.interface import BayesianRegressor
from paperback.errors import DataError, PaperbackError

Problems = Sequence[Problem | Callable[[int], Problem]]
Surrogates = Sequence[str] | Mapping[str, str | BayesianRegressor]


def compare(
    problems: Problems,
    surrogates: Surrogates,
    trials: int | Sequence[int] = 5,
    n_jobs: int = 1,
    **settings: Any,
) -> pd.DataFrame:
    """Run every surrogate on every problem, several times.

    In one trial all surrogates start from the same Sobol points. A loop that fails takes down no other: its
    row has the reason.

    Args:
        problems: problems, or functions from the trial's seed to one, for problems that are drawn anew.
        surrogates: names for `make_surrogate`, "random" and "sobol"; or such with names of their own.
        trials: how many, or their seeds.
        n_jobs: processes, as joblib counts them.
        **settings: of `BayesianOptimizer`.

    Returns:
        A row for each round of each loop: problem, surrogate, trial, evaluations, value (best so far, or
        dominated hypervolume), seconds (of the loop without the evaluations, up to there), error (None, or
        why the loop failed; its value is then NaN).

    Raises:
        DataError: if there is nothing to run.
    """
    seeds = list(range(trials)) if isinstance(trials, int) else list(trials)
    named = surrogates if isinstance(surrogates, Mapping) else {name: name for name in surrogates}
    if not (problems and named and seeds):
        raise DataError("give at least one problem, one surrogate and one trial.")
    for surrogate in named.values():  # a wrong name is found before hours of work
        if isinstance(surrogate, str) and surrogate not in MODEL_FREE:
            make_surrogate(surrogate)
    tasks = [
        joblib.delayed(_loop)(
            each if isinstance(each, Problem) else each(seed), name, surrogate, seed, settings
        )
        for each in problems
        for name, surrogate in named.items()
        for seed in seeds
    ]
    return pd.concat(joblib.Parallel(n_jobs=n_jobs)(tasks), ignore_index=True)


def ranks(results: pd.DataFrame) -> pd.DataFrame:
    """The rank of each surrogate on each problem, 1 for the best, and its mean over problems.

    Args:
        results: of `compare`.

    Returns:
        Surrogates by problems and "mean", sorted by that. In each trial surrogates are ranked by their last
        value; the ranks are averaged over trials. One that failed comes last.
    """
    last = results.sort_values("evaluations").groupby(["problem", "trial", "surrogate"], sort=False).last()
    rank = last["value"].fillna(-np.inf).groupby(["problem", "trial"]).rank(ascending=False)
    table = rank.groupby(["surrogate", "problem"]).mean().unstack()
    table = table[list(dict.fromkeys(results["problem"]))]
    table["mean"] = table.mean(axis=1)
    return table.sort_values("mean")


def _loop(
    problem: Problem, name: str, surrogate: str | BayesianRegressor, seed: int, settings: dict[str, Any]
) -> pd.DataFrame:
    torch.set_num_threads(1)
    acquisition = "qlogehvi" if problem.ref_point is not None else "qlogei"
    if isinstance(surrogate, str) and surrogate in MODEL_FREE:
        acquisition, surrogate = surrogate, "gp"
    start = time.perf_counter()
    error: str | None = None
    evaluations = problem.n_init + problem.q * np.arange(problem.iters + 1)
    values, seconds = np.full(len(evaluations), np.nan), np.full(len(evaluations), np.nan)
    try:
        history = bayes_opt(
            problem.f,
            problem.bounds,
            surrogate,
            n_init=problem.n_init,
            iters=problem.iters,
            q=problem.q,
            acquisition=acquisition,  # type: ignore[arg-type]
            discrete=problem.discrete,
            ref_point=problem.ref_point,
            seed=seed,
            **settings,
        )
    except PaperbackError as failure:
        error, seconds[-1] = str(failure), time.perf_counter() - start
    else:
        reference = problem.ref_point
        curve = history.best_so_far() if reference is None else history.hypervolume(reference)
        values, seconds = curve[evaluations - 1], np.cumsum(history.seconds)
    return pd.DataFrame(
        {
            "problem": problem.name,
            "surrogate": name,
            "trial": seed,
            "evaluations": evaluations,
            "value": values,
            "seconds": seconds,
            "error": error,
        }
    )
