"""Trains the two prior-fitted networks that ship: one for regression, one for classification.

    python recipes/prior_fitted.py [regression|classification [FOLDER]]

Without a name both are trained.

Regression: Gaussian processes of one to ten features, mostly few, with a Matern-5/2 or a squared-exponential
kernel. Lengthscales are log-normal about 0.5 sqrt(features) edges of the cube that the inputs fill, one for
each feature, and the noise has 0.01 to 10 percent of the function's variance. Classification: tables of one
to twenty features, independent or mixtures of common factors, that a random network cuts into two to four
classes. Both see up to 50 rows and standardise them, so that data of any unit can be given. Each is trained
from a seed, a few minutes on one core. MADE.json beside the network says what was measured on data
sets of the prior that it has not seen.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

from paperback.bayes.prior_fitted import PriorFittedTransformer, fit_prior, priors
from paperback.bayes.prior_fitted.estimators import FOLDER
from paperback.bayes.prior_fitted.training import in_network_units, within_tails
from paperback.study.measure import Stopwatch, parameters
from paperback.training import generator, seeded

SEED = 0
STEPS = {"regression": 3000, "classification": 2000}
LARGEST_CONTEXT, QUERIES = 50, 14


def main(name: str, folder: Path) -> None:
    """Train, measure, and write the folder."""
    torch.set_num_threads(1)
    with seeded(SEED, name):
        network = fresh(name)
    prior = {"regression": smooth_functions, "classification": tables}[name]
    print(f"{parameters(network):,} parameters", flush=True)
    with Stopwatch() as watch:
        fit_prior(
            network, prior, steps=STEPS[name], batch_size=24, lr=2e-3, queries=QUERIES, seed=SEED,
            steps_per_epoch=250,
            callbacks=[lambda n, _, history: print(n, history.train_loss[-1], flush=True)],
        )  # fmt: skip
    network.save_pretrained(folder)
    made = {
        "recipe": "recipes/prior_fitted.py",
        "seed": SEED,
        "steps": STEPS[name],
        "seconds": round(watch.seconds),
        "parameters": parameters(network),
        "torch": torch.__version__,
        "nats_per_query_after_rows": held_out(network, prior),
    }
    print(json.dumps(made, indent=2), flush=True)
    temporary = folder / ".MADE.json.tmp"
    temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "MADE.json")


def fresh(name: str) -> PriorFittedTransformer:
    """Four blocks of width 64, and 100 bars or four classes."""
    if name == "regression":
        return PriorFittedTransformer(
            10, d_model=64, layers=4, heads=4, max_context=LARGEST_CONTEXT, n_bars=100, units="data"
        )
    return PriorFittedTransformer(
        20, head="categorical", n_classes=4, d_model=64, layers=4, heads=4, max_context=LARGEST_CONTEXT,
        units="data",
    )  # fmt: skip


def smooth_functions(tasks: int, rows: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian processes; a batch shares the number of features and the kernel."""
    features = 1 + int(10 * float(torch.rand((), generator=draws)) ** 3)
    kernel: priors.Kernel = "rbf" if float(torch.rand((), generator=draws)) < 0.5 else "matern52"
    prior = priors.GPMixture(
        features,
        lengthscale=stats.lognorm(0.6, scale=0.5 * math.sqrt(features)),
        outputscale=1.0,
        noise=stats.loguniform(1e-4, 0.1),
        kernel=kernel,
    )
    return prior(tasks, rows, draws)


def tables(tasks: int, rows: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tables with classes; a batch shares the number of features and of classes."""
    correlated = float(torch.rand((), generator=draws)) < 0.7
    return priors.BNN((1, 20), layers=(0, 2), correlated=correlated, classes=(2, 4))(tasks, rows, draws)


def held_out(network: PriorFittedTransformer, prior: priors.Prior) -> dict[str, float]:
    """Mean -log q of queries in 1,000 data sets, by the number of rows that were seen."""
    draws, sizes = generator(SEED, "held out"), (4, 16, LARGEST_CONTEXT)
    sums = dict.fromkeys(sizes, 0.0)
    rounds = 40  # of 25 data sets; each has its own number of features
    for _ in range(rounds):
        x, y = prior(25, LARGEST_CONTEXT + QUERIES, draws)
        for n in sizes:
            tasks = in_network_units(
                network, x[:, :n], y[:, :n], x[:, LARGEST_CONTEXT:], y[:, LARGEST_CONTEXT:]
            )
            with torch.no_grad():
                outputs = network(tasks.context_x, tasks.context_y, tasks.x)
            loss = network.negative_log_likelihood(outputs, within_tails(network, tasks.y))
            sums[n] += float(loss.mean()) / rounds
    return {str(n): round(value, 4) for n, value in sums.items()}


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and given[0] not in STEPS:
        sys.exit(__doc__)
    for task in given[:1] or STEPS:
        main(task, Path(given[1]) if len(given) > 1 else FOLDER / task)
