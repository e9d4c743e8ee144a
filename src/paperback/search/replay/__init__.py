"""A search that costs nothing: 576 small models of handwritten digits, each trained once, their scores kept.

The space sets the optimizer, its learning rate, and a multilayer perceptron of 1, 2 or 4 equal blocks. Every
model was trained for 50 steps on the digits that come with scikit-learn; ``digits.csv`` has its accuracy on
the validation part after 6, 12, 25 and 50 steps.
``python -m paperback.search.replay FILE`` makes the table
anew (about a minute); how each number came about stands in `train_model`.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable
from functools import cache

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from paperback.data import images
from paperback.errors import DataError
from paperback.search.deep_architect import (
    Affine,
    BatchNormalization,
    Concat,
    Dropout,
    Optional,
    Or,
    ReLU,
    RepeatTied,
    Space,
    UserHyperparams,
)
from paperback.search.parameters import Config
from paperback.training import derive, generator, seeded

STEPS = (6, 12, 25, 50)  # after which the accuracy was measured
BATCH = 64
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def replay_space() -> Space:
    """The 576 models."""
    activation = Or(
        [ReLU(), Concat([BatchNormalization(), ReLU()]), Concat([ReLU(), BatchNormalization()])],
        names=["relu", "norm, relu", "relu, norm"],
    )
    block = Concat([Affine([16, 64]), activation, Optional(Dropout([0.5]))])
    settings = UserHyperparams(optimizer=["adam", "sgd"], lr=list(LEARNING_RATES))
    return Space(Concat([settings, RepeatTied(block, [1, 2, 4]), Affine([10])]), (64,))


def replay_score(config: Config, steps: int = STEPS[-1]) -> float:
    """The validation accuracy of a model of the space.

    Args:
        config: of a walk through `replay_space`.
        steps: of training, 6, 12, 25 or 50.

    Raises:
        DataError: if the model or the number of steps is not in the table.
    """
    if steps not in STEPS:
        raise DataError(f"steps is {steps}; the table has {', '.join(map(str, STEPS))}.")
    scores = _table().get(_key(config))
    if scores is None:
        raise DataError(f"{config} is no model of the replay space.")
    return scores[steps]


def replay_scores() -> list[float]:
    """Validation accuracy of all models after the full training."""
    return [scores[STEPS[-1]] for scores in _table().values()]


def train_model(config: Config) -> list[float]:
    """Train one model, and measure it on the way.

    1,077 digits scaled to [0, 1] (split 0 of `images.digits`, 360 for validation), batches of 64 drawn
    without replacement, cross-entropy, Adam or gradient descent with momentum 0.9. Weights, batches and
    dropout have seeds that depend on the configuration.

    Returns:
        Accuracy on the 360 validation images after each of `STEPS`.
    """
    x, y, x_val, y_val = _digits()
    seed = derive(0, _key(config))
    order = torch.cat([torch.randperm(len(x), generator=generator(seed, "order", i)) for i in range(4)])
    scores = []
    with seeded(seed, "training"):
        walk = replay_space().replay(config)
        model, lr = walk.compile(), walk.hyperparameters["lr"]
        if walk.hyperparameters["optimizer"] == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for step, rows in enumerate(order.split(BATCH)[: STEPS[-1]], start=1):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x[rows]), y[rows]).backward()
            optimizer.step()
            if step in STEPS:
                with torch.no_grad():
                    scores.append(float((model.eval()(x_val).argmax(1) == y_val).double().mean()))
    return scores


def make_table(configs: Iterable[Config]) -> pd.DataFrame:
    """Train models: one row each, the configuration and the accuracies after `STEPS`."""
    rows = [
        {"config": _key(config), **dict(zip(STEPS, train_model(config), strict=True))} for config in configs
    ]
    return pd.DataFrame(rows)


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = images.digits(n_val=360)
    return _pixels(data.train.x), data.train.y, _pixels(data.val.x), data.val.y


def _pixels(x: Tensor) -> Tensor:
    return x.flatten(1).float() / 16


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True)


@cache
def _table() -> dict[str, dict[int, float]]:
    source = importlib.resources.files("paperback.search.replay") / "digits.csv"
    with source.open(encoding="utf-8") as file:
        frame = pd.read_csv(file).set_index("config")
    return {str(key): {step: float(row[str(step)]) for step in STEPS} for key, row in frame.iterrows()}
