"""The study of DeepArchitect: who finds good models of digits with few evaluations, and a live search."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import stats

from paperback.data import images
from paperback.search import Searcher, search
from paperback.search.deep_architect import (
    MCTS,
    SMBO,
    Affine,
    BatchNormalization,
    Concat,
    Conv2D,
    Dropout,
    Evolution,
    MaxPooling2D,
    MaybeSwap,
    Optional,
    RandomSearch,
    ReLU,
    Repeat,
    Space,
    UserHyperparams,
)
from paperback.search.optuna import OptunaSearch
from paperback.search.parameters import Config
from paperback.search.replay import replay_score, replay_scores, replay_space
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, style
from paperback.training import derive, seeded, train

SEEDS = (0, 1, 2)
GOOD = 0.90  # validation accuracy of a good model
PAPER = "random finds few good models; MCTS, bisection and SMBO more, SMBO by far the most (curves)"

MAKERS: dict[str, Callable[[Space, int], Searcher]] = {
    "random": lambda space, seed: RandomSearch(space, seed=seed),
    "MCTS": lambda space, seed: MCTS(space, seed=seed),
    "MCTS, bisection": lambda space, seed: MCTS(space, bisect=True, seed=seed),
    "SMBO, choices": lambda space, seed: SMBO(space, seed=seed),
    "SMBO, n-grams": lambda space, seed: SMBO(space, features="ngram", seed=seed),
    "evolution": lambda space, seed: Evolution(space, seed=seed),
    "Optuna TPE": lambda space, seed: OptunaSearch(space, seed=seed),
}
SHARE_BARS = {"MCTS": 1.2, "MCTS, bisection": 1.5, "SMBO, choices": 2.2, "SMBO, n-grams": 1.6}
BEST_BARS = {"MCTS": 0.0015, "MCTS, bisection": 0.0015, "SMBO, choices": 0.003, "SMBO, n-grams": 0.003}


def study(run: Run) -> None:
    """Which searcher finds good models of handwritten digits with 48 evaluations?"""
    evaluations = run.size(smoke=8, standard=48)
    repeats = run.size(smoke=2, quick=20, standard=100)  # for each seed
    scores = {
        name: _repeated(run, name, make, repeats, evaluations)
        for name, make in MAKERS.items()
        if name != "Optuna TPE" or importlib.util.find_spec("optuna") is not None
    }
    _report_table(run, scores)
    for name, bar in SHARE_BARS.items():
        _claim_share(run, name, bar, scores)
    for name, bar in BEST_BARS.items():
        _claim_best(run, name, bar, scores)
    if "Optuna TPE" in scores:
        _claim_rival(run, scores)
    _draw(run, scores)
    _live(run)


def _repeated(
    run: Run, name: str, make: Callable[[Space, int], Searcher], repeats: int, evaluations: int
) -> np.ndarray:
    """Scores in the order of evaluation, ``(seeds * repeats, evaluations)``."""
    space, rows = replay_space(), []
    seeds = [derive(seed, name, repeat) for seed in run.seeds for repeat in range(repeats)]
    for seed in run.track(seeds, name):
        searcher, row = make(space, seed), []
        for _ in range(evaluations):
            proposal = searcher.ask()
            row.append(replay_score(proposal.config))
            searcher.tell(proposal, row[-1])
        rows.append(row)
    return np.array(rows)


def _share(scores: np.ndarray) -> np.ndarray:
    return (scores >= GOOD).mean(1)


def _report_table(run: Run, scores: dict[str, np.ndarray]) -> None:
    table = np.array(replay_scores())
    rows = [
        {
            "searcher": name,
            "best": found.max(1).mean(),
            "standard error": found.max(1).std(ddof=1) / np.sqrt(len(found)),
            "share of good models": _share(found).mean(),
        }
        for name, found in scores.items()
    ]
    n, repeats = scores["random"].shape[1], len(scores["random"])
    run.table(
        "searchers", rows, f"After {n} evaluations, means of {repeats} repeats. Good: {GOOD} or better."
    )
    run.note(
        f"Of the {len(table)} models {np.mean(table >= GOOD):.1%} are good; the best has {table.max():.4f}. "
        "Each was trained once, so scores are replayed without noise; they are of the validation part, "
        "which is what a search sees."
    )


def _claim_share(run: Run, name: str, bar: float, scores: dict[str, np.ndarray]) -> None:
    ours, random = _share(scores[name]), _share(scores["random"])
    rng = np.random.default_rng(0)
    draws = rng.integers(len(ours), size=(2, 4000, len(ours)))
    ratios = ours[draws[0]].mean(1) / np.maximum(random[draws[1]].mean(1), 1e-9)
    low, high = np.quantile(ratios, [0.025, 0.975])
    p = stats.ttest_ind(ours, random, equal_var=False, alternative="greater").pvalue
    run.claim(
        f"{name}: evaluates more good models than random search", paper=PAPER,
        measured=float(ours.mean() / max(random.mean(), 1e-9)), at_least=bar,
        interval=(float(low), float(high)), unit="times",
        note=f"Share {ours.mean():.3f} against {random.mean():.3f}; one-sided Welch p = {p:.1e}; bootstrap "
        "interval over repeats.",
    )  # fmt: skip


def _claim_best(run: Run, name: str, bar: float, scores: dict[str, np.ndarray]) -> None:
    ours, random = scores[name].max(1), scores["random"].max(1)
    test = stats.ttest_ind(ours, random, equal_var=False, alternative="greater")
    lead = float(ours.mean() - random.mean())
    run.claim(
        f"{name}: leads random search in the best score by its bar", paper=PAPER, measured=lead, at_least=bar,
        unit="accuracy", note="Mean over repeats of the best of the evaluations; the bar is on the mean.",
    )  # fmt: skip
    run.claim(
        f"{name}: this lead is no accident", paper="not tested", measured=float(test.pvalue), at_most=0.05,
        note="p-value of a one-sided Welch test over repeats.",
    )  # fmt: skip


def _claim_rival(run: Run, scores: dict[str, np.ndarray]) -> None:
    ours, rival = scores["SMBO, choices"], scores["Optuna TPE"]
    run.claim(
        "SMBO on choices is as good as Optuna's TPE in the best score", paper="not in the paper",
        measured=list(ours.max(1)), baseline=list(rival.max(1)), at_least=-0.002,
        unit="accuracy",
        note="One number per repeat; TPE with Optuna's settings, ordered lists as whole numbers.",
    )  # fmt: skip
    run.claim(
        "SMBO on choices evaluates as many good models as Optuna's TPE", paper="not in the paper",
        measured=list(_share(ours)), baseline=list(_share(rival)), at_least=0.0,
        note="One number per repeat.",
    )  # fmt: skip


def _draw(run: Run, scores: dict[str, np.ndarray]) -> None:
    colours = dict(zip(scores, (REFERENCE, *PALETTE), strict=False))
    colours |= {"SMBO, choices": METHOD, "MCTS": BASELINE}
    colours |= {"MCTS, bisection": PALETTE[5], "SMBO, n-grams": PALETTE[4]}
    colours |= {"evolution": PALETTE[2], "Optuna TPE": PALETTE[3]}
    with style():
        figure = Figure(figsize=(WIDE[0] * 1.25, WIDE[1]))
        left, right = figure.subplots(1, 2)
        for name, found in scores.items():
            best = np.maximum.accumulate(found, axis=1).mean(0)
            places = np.arange(1, len(best) + 1)
            left.plot(places, best, color=colours[name], label=name)
            share = np.sort(found.ravel())[::-1]
            quantiles = np.linspace(0, 1, 200)
            right.plot(quantiles, np.quantile(share, 1 - quantiles), color=colours[name], label=name)
        table = np.array(replay_scores())
        left.set(xlabel="evaluations", ylabel="best accuracy so far", title="Best so far")
        left.set_ylim(0.85, table.max() + 0.003)
        right.axhline(GOOD, color=REFERENCE, linewidth=0.8, linestyle="--")
        right.set(xlabel="share of evaluated models", ylabel="accuracy at least", title="What was evaluated")
        right.set_ylim(0.3, 1.0)
        left.legend(loc="lower right", fontsize=8)
    run.figure(
        "searchers", figure,
        "Left: the best validation accuracy found, mean over repeats. Right: the accuracy that a share of "
        "the evaluated models reaches; the dashed line is where a model counts as good.",
        "Two panels with a curve for each searcher.",
    )  # fmt: skip


def _live(run: Run) -> None:
    """SMBO on a space of convolutional networks that are trained as they are proposed."""
    data = images.fashion_mnist(run.size(smoke=100, quick=1000, standard=2000), n_val=500)
    x, y = data.train.x[:, None].float() / 255, data.train.y
    x_val, y_val = data.val.x[:, None].float() / 255, data.val.y
    block = Concat(
        [
            Conv2D([8, 16, 32], [3, 5]),
            MaybeSwap(ReLU(), BatchNormalization()),
            MaxPooling2D([2]),
            Optional(Dropout([0.5, 0.9])),
        ]
    )
    settings = UserHyperparams(lr=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], batch=[32, 64])
    space = Space(Concat([settings, Repeat(block, [1, 2]), Affine([10])]), (1, 28, 28), max_params=200_000)

    def evaluate(config: Config, seed: int) -> float:
        walk = space.replay(config)
        with seeded(seed, "weights"):
            model = walk.compile()
        train(
            model, lambda m, batch, _: F.cross_entropy(m(batch[0]), batch[1]), (x, y),
            epochs=run.size(smoke=1, standard=2), batch_size=walk.hyperparameters["batch"],
            lr=walk.hyperparameters["lr"], seed=seed, progress=False,
        )  # fmt: skip
        with torch.no_grad():
            return float((model(x_val).argmax(1) == y_val).double().mean())

    n = run.size(smoke=2, quick=4, standard=12)
    result = search(SMBO(space, initial=4, seed=run.seed), evaluate, n, progress=run.progress)
    rows = [
        {
            "trial": t.number,
            "accuracy": t.score,
            "seconds": t.seconds,
            "model": " ".join(map(str, t.config.values())),
        }
        for t in result
    ]
    run.table(
        "live", rows, f"Fashion-MNIST, {space.count():,} convolutional networks, {n} of them tried by SMBO."
    )
    run.claim(
        "a live search over convolutional networks ends with a usable model", paper="not in the paper",
        measured=float(result.best.score or 0.0), at_least=0.75, unit="accuracy",
        note="Validation accuracy, from which the model was chosen: it shows that the parts work together.",
    )  # fmt: skip
