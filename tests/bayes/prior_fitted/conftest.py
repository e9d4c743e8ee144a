"""One small network for each kind of test, trained in seconds."""

import pytest

from paperback.bayes.prior_fitted import PriorFittedTransformer, fit_prior, priors
from paperback.training import seeded


def trained(prior, steps, *, lr=2e-3, **settings):
    small = {"d_model": 32, "layers": 2, "heads": 2, "n_bars": 40}
    with seeded(0, "small network"):
        network = PriorFittedTransformer(**(small | settings))
    history = fit_prior(
        network, prior, steps=steps, batch_size=32, lr=lr, queries=8, progress=False, steps_per_epoch=25
    )
    return network, history


@pytest.fixture(scope="session")
def gp_network():
    """Fitted to a Gaussian process with a long lengthscale, in the prior's units; also its history."""
    return trained(priors.GP(lengthscale=0.4, noise=0.01), 300, max_context=12)


@pytest.fixture(scope="session")
def ridge_network():
    """Fitted to linear functions of one to three features, for data of any units."""

    def prior(tasks, rows, generator):
        return priors.Ridge(1 + int(rows + generator.initial_seed()) % 3)(tasks, rows, generator)

    return trained(prior, 150, num_features=3, max_context=20, units="data")[0]


@pytest.fixture(scope="session")
def tabular_network():
    """Fitted to tables of four features with three classes."""
    prior = priors.BNN(4, layers=(1, 1), width=(8, 8), classes=3)
    return trained(prior, 150, num_features=4, max_context=30, head="categorical", n_classes=3, units="data")[
        0
    ]
