"""Rows of data: the marginal head beside its own conditionals, and beside exact models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from paperback.data import images
from paperback.density.baselines import CategoricalMixture, IndependentCategorical
from paperback.density.bench import load
from paperback.density.interface import DensityModel
from paperback.density.marginalization import MarginalizationModel
from paperback.density.probabilistic_circuit import ProbabilisticCircuit
from paperback.density.studies.marginalization.answers import log_prob, speed_up
from paperback.study import Run

FLIPPED = 10  # variables of a spoiled row
INK = 8  # digits have levels 0..16; from here on a pixel is on


@dataclass
class Rows:
    """What one seed gave on the digits, or on the user's data."""

    model: MarginalizationModel
    scores: list[dict[str, object]]
    spearman: float
    spearman_subsets: float
    nll_head: float
    nll_arm: float
    speed_up: float
    auc: dict[str, float]


def _binary(x: Tensor, threshold: int) -> Int[Tensor, " rows variables"]:
    return (x >= threshold).long().flatten(1)


def train_on_rows(run: Run, seed: int) -> Rows:
    if run.data is None:
        data = images.digits(seed)
        train, val, test = (_binary(split.x, INK) for split in (data.train, data.val, data.test))
        n_states: tuple[int, ...] = (2,) * train.shape[1]
    else:
        own = load(run.data, run.target, run.budget, seed)
        train, val, test, n_states = own.train.x, own.val.x, own.test.x, own.n_states
    test = test[: run.size(smoke=30, standard=360, full=1000)]
    d = len(n_states)
    quiet: dict[str, Any] = {"seed": seed, "progress": run.progress}
    model = MarginalizationModel(d, n_states, seed=seed).fit(
        train, X_val=val, lr=(1e-3, 2e-3), **quiet,
        stage_epochs=run.size(smoke=(2, 2), quick=(100, 60), standard=(150, 150)),
    )  # fmt: skip
    exact: dict[str, DensityModel] = {
        "independent": IndependentCategorical(d, n_states).fit(train),
        "mixture, 30 components": CategoricalMixture(d, n_states, 30).fit(train, X_val=val, **quiet),
    }
    if len(set(n_states)) == 1:
        circuit = ProbabilisticCircuit(d, n_states[0], "hclt", run.size(smoke=4, standard=16))
        exact["hidden Chow-Liu tree"] = circuit.fit(
            train, X_val=val, epochs=run.size(smoke=2, quick=20, standard=60), patience=10, **quiet
        )
    n_orders = run.size(smoke=2, standard=20)
    scorers: dict[str, Callable[[Tensor], Tensor]] = {
        "marginal head": model.log_prob,
        "any-order ARM (conditionals)": lambda x: model.log_prob(x, exact=True, n_orders=n_orders),
        **{name: partial(log_prob, other) for name, other in exact.items()},
    }
    draws = torch.Generator().manual_seed(seed)
    spoiled = _spoil(test, torch.tensor(n_states), draws)
    found = {name: (score(test), score(spoiled)) for name, score in scorers.items()}
    truth = np.repeat([1, 0], len(test))
    auc = {name: float(roc_auc_score(truth, torch.cat(pair))) for name, pair in found.items()}
    head, arm = found["marginal head"][0], found["any-order ARM (conditionals)"][0]
    observed = torch.rand(test.shape, generator=draws) < torch.rand(len(test), 1, generator=draws)
    subsets = [model.log_prob(test, observed), model.log_prob(test, observed, exact=True, n_orders=n_orders)]
    return Rows(
        model=model,
        scores=[
            {"model": name, "nats per row": float(-pair[0].mean()), "AUC of spoiled rows": auc[name]}
            for name, pair in found.items()
        ],
        spearman=float(spearmanr(head, arm).statistic),
        spearman_subsets=float(spearmanr(*subsets).statistic),
        nll_head=float(-head.mean()),
        nll_arm=float(-arm.mean()),
        speed_up=speed_up(model, test)[0],
        auc=auc,
    )


def _spoil(rows: Tensor, n_states: Tensor, draws: torch.Generator) -> Tensor:
    """Change some random variables of each row to another state."""
    chosen = torch.rand(rows.shape, generator=draws).argsort(1) < min(FLIPPED, rows.shape[1] // 2)
    shift = 1 + (torch.rand(rows.shape, generator=draws) * (n_states - 1)).long()
    return torch.where(chosen, (rows + shift) % n_states, rows)


def report_rows(run: Run, outcomes: list[Rows]) -> None:
    first = outcomes[0]
    run.table("rows", first.scores, caption="Test rows, first seed. Nats of the head are not of a normalised "
              "distribution; those along orders, averaged over 20, and of the exact models are.")  # fmt: skip
    run.claim("the head ranks rows as the conditionals do", paper="0.99 on binary MNIST",
              measured=[o.spearman for o in outcomes], at_least=0.90)  # fmt: skip
    run.claim("the head ranks random subsets as the conditionals do", paper="0.99 on binary MNIST",
              measured=[o.spearman_subsets for o in outcomes], at_least=0.90)  # fmt: skip
    run.claim("the head's likelihood is that of the conditionals", paper="0.149 and 0.148 bits, about equal",
              measured=[abs(o.nll_head - o.nll_arm) for o in outcomes], at_most=3.0, unit="nats")  # fmt: skip
    run.claim("a marginal is faster than along one order", paper="100 to 1,000 times at D = 784",
              measured=[o.speed_up for o in outcomes], at_least=15.0, unit="times",
              note="All steps of the order go through the network in large batches.")  # fmt: skip
    if "hidden Chow-Liu tree" in first.auc:
        run.claim("spoiled rows are told by the head nearly as well as by an exact circuit",
                  paper="not reported", at_least=-0.03,
                  measured=[o.auc["marginal head"] for o in outcomes],
                  baseline=[o.auc["hidden Chow-Liu tree"] for o in outcomes])  # fmt: skip
