"""Networks as functions of a weight vector, their posterior, and the Kronecker-factored Laplace law."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from paperback.bayes.bnn_surrogate import HMCSurrogate, LaplaceSurrogate
from paperback.bayes.bnn_surrogate.laplace import KroneckerPosterior
from paperback.bayes.bnn_surrogate.variances import folds
from paperback.bayes.networks import (
    RegNet,
    gaussian_likelihood,
    log_posterior,
    map_estimate,
    minibatch_log_posterior,
    normal_prior,
)
from paperback.errors import DataError


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=source(seed), dtype=torch.float64)


def as_module(network, weights):
    layers = []
    for (i, o), (matrix, bias) in zip(network._layers(), network.split(weights[None]), strict=True):
        linear = nn.Linear(i, o, dtype=torch.float64)
        linear.weight.data, linear.bias.data = matrix[0], bias[0]
        layers += [linear, nn.Tanh() if network.activation == "tanh" else nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (5,), (7, 4)])
def test_a_network_is_the_module_with_its_weights(hidden, activation):
    network = RegNet(3, 2, hidden, activation)
    weights, x = randn(4, network.size), randn(6, 3, seed=1)
    expected = torch.stack([as_module(network, each)(x) for each in weights])
    torch.testing.assert_close(network(weights, x), expected)
    own = randn(4, 6, 3, seed=2)  # each network its own rows
    expected = torch.stack([as_module(network, w)(rows) for w, rows in zip(weights, own, strict=True)])
    torch.testing.assert_close(network(weights, own), expected)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_layer_gradients_are_those_of_autograd(activation):
    network = RegNet(3, 2, (5, 4), activation)
    weights, x = randn(network.size), randn(6, 3, seed=1)
    outputs, layers = network.layer_gradients(weights, x)
    exact = torch.func.jacrev(lambda w: network(w[None], x)[0])(weights)  # (rows, outputs, size)
    torch.testing.assert_close(outputs, network(weights[None], x)[0])
    parts = []
    for a, g in layers:
        full = g[..., None] * a[:, None, None, :]  # (rows, outputs, units, inputs + 1)
        parts += [full[..., :-1].flatten(-2), full[..., -1]]
    torch.testing.assert_close(torch.cat(parts, -1), exact)


def test_initial_weights_have_the_range_of_torch():
    network = RegNet(16, 1, (9,))
    weights = network.initial(200, source())
    first, last = weights[:, : 17 * 9], weights[:, 17 * 9 :]
    for part, fan_in in ((first, 16), (last, 9)):
        assert float(part.abs().max()) == pytest.approx(fan_in**-0.5, rel=1e-2)


def test_noise_variance_enters_the_likelihood_as_a_variance():
    prediction, y = torch.zeros(1, 1, 1).double(), torch.full((1, 1), 1.5).double()
    density = gaussian_likelihood(0.25)(prediction, y)
    torch.testing.assert_close(density, Normal(0.0, 0.5).log_prob(torch.tensor([[1.5]]).double()))


def test_posterior_of_one_weight_from_one_row():
    """With f(x) = w x + b at x = 0 only the bias matters: its posterior has precision 1 / p2 + 1 / s2."""
    network = RegNet(1, 1, ())
    x, y = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()
    density = log_posterior(network, x, y, normal_prior(4.0), gaussian_likelihood(0.5))
    bias = torch.linspace(-2, 4, 7).double()
    values = density(torch.stack([torch.zeros(7).double(), bias], 1))
    variance = 1 / (1 / 4.0 + 1 / 0.5)
    exact = Normal(variance * 2.0 / 0.5, variance**0.5).log_prob(bias)
    torch.testing.assert_close(values - values[0], exact - exact[0])


def test_minibatches_estimate_the_posterior_without_bias():
    network = RegNet(2, 1, (3,))
    x, y, weights = randn(10, 2), randn(10, 1, seed=1), randn(1, network.size, seed=2).expand(4000, -1)
    parts = (normal_prior(1.0), gaussian_likelihood(0.3))
    exact = log_posterior(network, x, y, *parts)(weights[:1])
    estimates = minibatch_log_posterior(network, x, y, *parts, 3)(weights, source())
    error = float(estimates.std()) / math.sqrt(len(estimates))
    assert abs(float(estimates.mean() - exact)) < 4 * error
    whole = minibatch_log_posterior(network, x, y, *parts, 100)(weights[:2], source())
    torch.testing.assert_close(whole, exact.expand(2))


def test_row_weights_and_variances_are_each_networks_own():
    network = RegNet(2, 1, (3,))
    x, y, weights = randn(5, 2), randn(5, 1, seed=1), randn(2, network.size, seed=2)
    rows = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]).double()
    p2, s2 = torch.tensor([0.5, 2.0]).double(), torch.tensor([0.1, 1.0]).double()
    both = log_posterior(network, x, y, normal_prior(p2), gaussian_likelihood(s2), rows)(weights)
    one = log_posterior(network, x[:2], y[:2], normal_prior(0.5), gaussian_likelihood(0.1))(weights[:1])
    two = log_posterior(network, x, y, normal_prior(2.0), gaussian_likelihood(1.0))(weights[1:])
    torch.testing.assert_close(both, torch.cat([one, two]))


def test_map_estimate_of_linear_regression_is_ridge_regression():
    network = RegNet(3, 1, ())
    x, y = randn(20, 3), randn(20, 1, seed=1)
    density = log_posterior(network, x, y, normal_prior(2.0), gaussian_likelihood(0.1))
    found = map_estimate(density, network.initial(2, source()), steps=2000, lr=0.05, course="cosine")
    z = torch.cat([x, torch.ones(20, 1)], 1)
    exact = torch.linalg.solve(z.mT @ z / 0.1 + torch.eye(4) / 2.0, z.mT @ y / 0.1)[:, 0]
    torch.testing.assert_close(found, exact.expand(2, -1), atol=1e-4, rtol=0)


# -- HMC and Laplace where the posterior is known ------------------------------------------------------------


def linear_posterior(x, y, p2, s2, grid):
    z, zg = (torch.cat([each, torch.ones(len(each), 1)], 1) for each in (x, grid))
    covariance = torch.linalg.inv(z.mT @ z / s2 + torch.eye(z.shape[1]) / p2)
    return (zg @ covariance @ z.mT @ y / s2)[:, 0], zg @ covariance @ zg.mT


def linear_data():
    x = torch.rand(25, 2, generator=source(3), dtype=torch.float64)
    y = 3 * x[:, 0] - x[:, 1] + 0.4 * randn(25, seed=4)
    return x, (y - y.mean()) / y.std(correction=0)


def test_hmc_of_a_linear_network_is_bayesian_linear_regression():
    x, y = linear_data()
    model = HMCSurrogate(
        (), prior_variance=2.0, noise_variance=0.2, samples=6400, burn_in=300, chains=16, leapfrog_steps=10,
        map_steps=50, bounds=[[0.0, 0.0], [1.0, 1.0]],
    ).fit(x, y)  # fmt: skip
    grid = torch.rand(6, 2, generator=source(5), dtype=torch.float64)
    mean, covariance = linear_posterior(x, y[:, None], 2.0, 0.2, grid)
    draws = model._joint(grid).values[:, 0]
    scale = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / scale).abs().max()) < 0.06
    assert float(((draws.mT.cov() - covariance) / torch.outer(scale, scale)).abs().max()) < 0.06
    assert model.diagnostics_["r_hat"] < 1.02
    # Of an observation, with its noise:
    law = model.predict_distribution(grid)
    torch.testing.assert_close(law.stddev, (scale.square() + 0.2).sqrt(), rtol=0.03, atol=0)


def test_laplace_of_a_linear_network_is_bayesian_linear_regression():
    x, y = linear_data()
    model = LaplaceSurrogate(
        (), noise_variance=0.2, prior_precision=0.5, weight_decay=2 * 0.2 * 0.5 / 25, map_steps=3000, lr=0.05,
        bounds=[[0.0, 0.0], [1.0, 1.0]],
    ).fit(x, y)  # fmt: skip
    grid = torch.rand(6, 2, generator=source(5), dtype=torch.float64)
    mean, covariance = linear_posterior(x, y[:, None], 2.0, 0.2, grid)
    joint = model._joint(grid)
    torch.testing.assert_close(joint.mean[0], mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(joint.covariance_matrix[0], covariance, atol=1e-6, rtol=0)
    z = torch.cat([x, torch.ones(25, 1)], 1)
    evidence = MultivariateNormal(torch.zeros(25).double(), 2.0 * z @ z.mT + 0.2 * torch.eye(25)).log_prob(y)
    assert model.log_marginal_ == pytest.approx(float(evidence), abs=1e-3)


def test_prior_precision_maximises_the_marginal_likelihood():
    network = RegNet(2, 1, (6,))
    x, y, weights = randn(15, 2), randn(15, 1, seed=1), 0.7 * randn(network.size, seed=2)
    posterior = KroneckerPosterior(network)
    best = posterior.fit(weights, x, y, 0.3, None)
    delta = float(posterior.prior_precision)
    for factor in (0.8, 1.25):
        assert posterior.fit(weights, x, y, 0.3, factor * delta) < best


def test_kronecker_covariance_is_that_of_the_formula():
    """The features against inv(A kron G / s2 + delta) of each layer, built densely."""
    network = RegNet(2, 1, (3,))
    x, y, weights, new = randn(8, 2), randn(8, 1, seed=1), randn(network.size, seed=2), randn(4, 2, seed=3)
    posterior = KroneckerPosterior(network)
    posterior.fit(weights, x, y, 0.5, 0.7)
    _, features = posterior.features(weights, new)
    covariance = torch.zeros(4, 4).double()
    layers = zip(
        network.layer_gradients(weights, x)[1], network.layer_gradients(weights, new)[1], strict=True
    )
    for (a, g), (a_new, g_new) in layers:
        G = torch.einsum("nki,nkj->ij", g, g) / len(x)
        precision = torch.kron(G, a.mT @ a) / 0.5 + 0.7 * torch.eye(G.shape[0] * a.shape[1])
        jacobian = (g_new[:, 0, :, None] * a_new[:, None, :]).flatten(1)
        covariance += jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    torch.testing.assert_close(features[:, 0] @ features[:, 0].mT, covariance)


@pytest.mark.parametrize("rows", [5, 12, 100])
def test_every_row_is_held_out_in_one_fold(rows):
    held = folds(rows, source())
    assert held.shape == (5, rows)
    assert bool((held.sum(0) == 1).all())
    assert int(held.sum(1).max()) - int(held.sum(1).min()) <= 1


def test_a_minibatch_has_only_rows_that_are_seen():
    network = RegNet(1, 1, ())
    x, y = torch.arange(6).double()[:, None], torch.zeros(6, 1).double()
    seen = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).double()
    density = minibatch_log_posterior(network, x, y, lambda w: 0 * w[:, 0], lambda f, _: f[..., 0], 2, seen)
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()  # f(x) = x
    generator = source()
    values = torch.stack([density(weights, generator) for _ in range(500)])
    assert values[:, 0].unique().tolist() == [1.0]  # 0 + 1, and two rows stand for two
    assert float(values[:, 1].mean()) == pytest.approx(15.0, abs=1.0)


def test_variances_are_chosen_from_their_grids():
    rng = np.random.default_rng(0)
    X = rng.random((30, 1))
    noisy = np.sin(6 * X[:, 0]) + 1.5 * rng.standard_normal(30)
    clean = np.sin(6 * X[:, 0])
    settings = {"hidden": (8,), "samples": 80, "burn_in": 80, "chains": 2, "map_steps": 200}
    grid = {"prior_variance": [1.0], "noise_variance": [0.01, 1.0]}
    assert HMCSurrogate(**settings, **grid).fit(X, noisy).noise_variance_ == 1.0
    assert HMCSurrogate(**settings, **grid).fit(X, clean).noise_variance_ == 0.01
    assert (
        LaplaceSurrogate((8,), noise_variance=[0.01, 1.0], map_steps=300).fit(X, clean).noise_variance_
        == 0.01
    )


def test_bad_arguments_are_named():
    with pytest.raises(DataError, match="activation is 'sine'"):
        RegNet(2, 1, (3,), "sine")
    with pytest.raises(DataError, match="must be at least 1"):
        RegNet(0)
    with pytest.raises(DataError, match="prior variance is 0"):
        normal_prior(0.0)
    with pytest.raises(DataError, match="noise variance is -1"):
        gaussian_likelihood(-1.0)
    with pytest.raises(DataError, match="0 steps of Adam"):
        map_estimate(lambda w: w.sum(1), torch.zeros(1, 2).double(), steps=0)
    with pytest.raises(DataError, match="ran away"):
        map_estimate(lambda w: (w / 0).sum(1), torch.zeros(1, 2).double(), steps=3)
