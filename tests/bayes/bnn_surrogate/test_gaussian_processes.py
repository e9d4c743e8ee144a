"""The infinitely wide network against wide networks, and deep kernel learning against the GP it contains."""

import math

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP

from paperback.bayes.bnn_surrogate import DeepKernelGP, GPSurrogate, InfiniteBNN
from paperback.bayes.bnn_surrogate.gaussian_processes import FeatureKernel
from paperback.bayes.kernels import NNGPKernel
from paperback.bayes.networks import RegNet
from paperback.numerics.kernels import arc_cosine, arc_sine, nngp_and_ntk


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.random((20, 3))
    return X, np.sin(5 * X[:, 0]) + X[:, 1] * X[:, 2] + 0.1 * rng.standard_normal(20)


@pytest.mark.parametrize(("activation", "function"), [("relu", torch.relu), ("erf", torch.erf)])
def test_kernel_is_the_covariance_of_wide_random_networks(activation, function):
    """Two networks of width 4,096 at a time; what all their units share is the kernel after each layer."""
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vw, vb, width, source = 10.0, 1.3, 4096, torch.Generator().manual_seed(0)
    kernel = NNGPKernel(2, activation, weight_variance=vw, bias_variance=vb).double()
    estimates = []
    for _ in range(4):
        h = x
        for _ in range(2):
            weights = torch.randn(h.shape[1], width, generator=source) * math.sqrt(vw / h.shape[1])
            h = function(h @ weights.double() + math.sqrt(vb) * torch.randn(width, generator=source).double())
        estimates.append(vb + vw * h @ h.mT / width)  # of the next layer's units, given this one
    exact = kernel(x, x).to_dense()
    torch.testing.assert_close(torch.stack(estimates).mean(0), exact, rtol=0.04, atol=0)


@pytest.mark.parametrize(("activation", "dual"), [("relu", arc_cosine()), ("erf", arc_sine)])
def test_surrogates_kernel_is_the_recursion_of_the_ground_floor(activation, dual, data):
    model = InfiniteBNN(3, activation).fit(*data)
    x = model._inputs(data[0])
    found = model.models_[0].covar_module(x).to_dense()
    exact, _ = nngp_and_ntk(x, dual, 4, 1.6, 10.0)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)  # its raw parameters came from float32
    torch.testing.assert_close(model.models_[0].covar_module(x, diag=True), found.diagonal())
    assert float(torch.linalg.eigvalsh(exact)[0]) > -1e-8 * float(exact.max())


def test_only_noise_and_mean_are_trained_unless_the_kernel_is_asked_for(data):
    fixed, learned = InfiniteBNN().fit(*data), InfiniteBNN(learn_kernel=True).fit(*data)
    kernel = fixed.models_[0].covar_module
    assert float(kernel.weight_variance) == pytest.approx(10.0)
    assert float(kernel.bias_variance) == pytest.approx(1.6)
    kernel = learned.models_[0].covar_module
    assert float(kernel.base_kernel.weight_variance.detach()) != pytest.approx(10.0, rel=1e-2)
    assert learned.log_marginal_ > fixed.log_marginal_


def test_log_marginal_is_that_of_the_targets(data):
    X, y = data
    model = InfiniteBNN().fit(X, y)
    gp, x = model.models_[0], model._inputs(X)
    scale = float(model.target_scale_[0])
    covariance = gp.covar_module(x).to_dense() + gp.likelihood.noise * torch.eye(len(x))
    mean = model.target_shift_[0] + scale * float(gp.mean_module.constant)
    mean = torch.full((len(x),), mean, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(mean, scale**2 * covariance.detach())
    assert model.log_marginal_ == pytest.approx(float(law.log_prob(torch.as_tensor(y))), rel=1e-6)


def test_predictions_are_those_of_the_textbook_formula(data):
    X, y = data
    model = GPSurrogate("paper").fit(X, y)
    gp, x = model.models_[0], model._inputs(X)
    new = model._inputs(np.random.default_rng(1).random((5, 3)))
    with torch.no_grad():
        K = gp.covar_module(x).to_dense() + gp.likelihood.noise * torch.eye(len(x))
        k, constant = gp.covar_module(new, x).to_dense(), gp.mean_module.constant
        z = (torch.as_tensor(y) - model.target_shift_[0]) / model.target_scale_[0]
        mean = constant + k @ torch.linalg.solve(K, z - constant)
        covariance = gp.covar_module(new).to_dense() - k @ torch.linalg.solve(K, k.mT)
        joint, law = model._joint(new), model._law(new)
    torch.testing.assert_close(joint.mean[0], mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(joint.covariance_matrix[0], covariance, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        law.variance[:, 0], covariance.diagonal() + gp.likelihood.noise, atol=1e-6, rtol=0
    )


def test_priors_are_those_they_are_named_after(data):
    old, new = GPSurrogate("paper").fit(*data).models_[0], GPSurrogate("current").fit(*data).models_[0]
    assert type(old.covar_module.base_kernel).__name__ == "MaternKernel"
    assert float(old.covar_module.base_kernel.lengthscale_prior.concentration) == 3.0
    assert float(old.covar_module.outputscale_prior.rate) == pytest.approx(0.15)
    default = SingleTaskGP(torch.rand(5, 3).double(), torch.rand(5, 1).double()).covar_module
    assert type(new.covar_module) is type(default)
    assert float(new.covar_module.lengthscale_prior.loc) == pytest.approx(
        float(default.lengthscale_prior.loc)
    )


def test_deep_kernel_learning_without_a_network_is_a_gp(data):
    """Its features are then the inputs, so at the same hyper-parameters it predicts what the GP does."""
    deep, plain = DeepKernelGP((), train_steps=5).fit(*data), GPSurrogate("paper").fit(*data)
    theirs, ours = plain.models_[0], deep.models_[0]
    ours.covar_module.base_kernel.load_state_dict(theirs.covar_module.state_dict())
    ours.mean_module.load_state_dict(theirs.mean_module.state_dict())
    ours.likelihood.noise = theirs.likelihood.noise.detach()
    ours.train()
    ours.eval()
    new = np.random.default_rng(2).random((7, 3))
    for one, two in zip(deep.predict(new, True), plain.predict(new, True), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-7)


def test_features_are_the_last_hidden_layer():
    network = RegNet(3, 1, (5, 4))
    kernel = FeatureKernel(network, NNGPKernel())
    weights = torch.randn(1, network.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kernel.weights.data = weights[0, : len(kernel.weights)]
    x = torch.rand(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    features = kernel.features(x)
    (matrix, bias) = list(network.split(weights))[-1]
    outputs = features @ matrix[0].mT + bias[0]
    torch.testing.assert_close(outputs, network(weights.expand(2, -1), x))


def test_joint_training_raises_the_marginal_likelihood(data):
    short, long = (
        DeepKernelGP((8, 8), pretrain_steps=100, train_steps=steps, lr=3e-3).fit(*data) for steps in (1, 150)
    )
    assert long.log_marginal_ > short.log_marginal_ + 1


def test_points_that_lie_on_each_other_do_not_break_the_joint_law(data):
    for model in (GPSurrogate(), InfiniteBNN()):
        joint = model.fit(*data)._joint(model._inputs(np.repeat(data[0][:1], 4, axis=0)))
        assert bool(joint.rsample((3,)).isfinite().all())
