"""DeepArchitect's searchers beside Optuna's TPE: what they find on the replay table, and seconds per trial.

Run: ``python benchmarks/search/deep_architect.py``. Needs ``paperback[optuna]``; without it the searchers are
timed alone.
"""

from __future__ import annotations

import importlib.util
import time

import numpy as np
import torch

from paperback.search.replay import replay_score, replay_space
from paperback.search.studies.deep_architect import GOOD, MAKERS

REPEATS, EVALUATIONS, MANY = 20, 48, 1000


def quality(name: str) -> tuple[float, float]:
    """Mean best score and share of good models."""
    space, best, good = replay_space(), [], []
    for seed in range(REPEATS):
        searcher, scores = MAKERS[name](space, seed), []
        for _ in range(EVALUATIONS):
            proposal = searcher.ask()
            scores.append(replay_score(proposal.config))
            searcher.tell(proposal, scores[-1])
        best.append(max(scores))
        good.append(np.mean(np.array(scores) >= GOOD))
    return float(np.mean(best)), float(np.mean(good))


def milliseconds(name: str) -> float:
    """Per trial, ask and tell, over 1,000 trials."""
    searcher, spent = MAKERS[name](replay_space(), 0), 0.0
    for _ in range(MANY):
        start = time.perf_counter()
        proposal = searcher.ask()
        spent += time.perf_counter() - start
        score = replay_score(proposal.config)
        start = time.perf_counter()
        searcher.tell(proposal, score)
        spent += time.perf_counter() - start
    return 1000 * spent / MANY


if __name__ == "__main__":
    torch.set_num_threads(1)
    has_optuna = importlib.util.find_spec("optuna") is not None
    times = {}
    print(f"{'searcher':18s} {'best':>7s} {'good':>6s} {'ms/trial':>9s}")
    for searcher in MAKERS:
        if searcher == "Optuna TPE" and not has_optuna:
            print("Optuna is not installed; install paperback[optuna].")
            continue
        best, good = quality(searcher)
        times[searcher] = milliseconds(searcher)
        print(f"{searcher:18s} {best:7.4f} {good:6.3f} {times[searcher]:9.3f}")
    if has_optuna:
        ratio = times["Optuna TPE"] / times["SMBO, choices"]
        print(f"TPE needs {ratio:.1f} times the seconds per trial of SMBO on choices.")
