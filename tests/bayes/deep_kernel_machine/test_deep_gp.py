"""The deep Gaussian processes that the machines are measured against."""

import numpy as np
import pytest
import torch

from paperback.bayes.deep_kernel_machine.deep_gp import DeepGaussianProcess
from paperback.bayes.distributions import NormalMixture
from paperback.errors import DataError


def data(rows=120, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, size=(rows, 2))
    return X, 30 + 100 * np.sin(2 * X[:, 0]) + 10 * rng.normal(size=rows)


@pytest.mark.parametrize("kind", ["sampled", "sigma-points"])
def test_learns_a_curve_and_gives_a_mixture(kind):
    X, y = data()
    settings = {"n_inducing": 15, "steps": 120, "batch_size": 120, "lr": 0.05}
    model = DeepGaussianProcess(kind, **settings).fit(X, y)
    new, truth = data(seed=1)
    with torch.no_grad():
        law = model.predict_distribution(new)
        assert isinstance(model._law(torch.zeros(3, 2).double()), NormalMixture)
    assert np.sqrt(np.mean((law.mean.numpy() - truth) ** 2)) < 35  # the mean alone: 64
    inside = np.abs(law.mean.numpy() - truth) < 2 * law.stddev.numpy()
    assert inside.mean() > 0.7
    again = DeepGaussianProcess(kind, **settings).fit(X, y)
    np.testing.assert_array_equal(again.predict(new), model.predict(new))


def test_inner_layers_begin_as_the_identity_nearly_without_noise():
    X, y = data()
    model = DeepGaussianProcess(n_inducing=15, steps=1, lr=1e-9).fit(X, y)
    x = torch.randn(20, 2, dtype=torch.float64)
    with torch.no_grad():
        hidden = model.module_.gp.hidden(x)
    torch.testing.assert_close(hidden.mean[0], x, rtol=0, atol=1e-4)


def test_two_targets_or_too_few_rows_are_refused():
    X, y = data(20)
    with pytest.raises(DataError, match="2 targets"):
        DeepGaussianProcess(n_inducing=5).fit(X, np.column_stack([y, y]))
    with pytest.raises(DataError, match="n_inducing = 50"):
        DeepGaussianProcess().fit(X, y)
