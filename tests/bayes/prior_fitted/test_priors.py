"""Priors against their covariances, and the exact posteriors that networks are measured by."""

import math

import pytest
import torch
from scipy import stats
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern

from paperback.bayes.prior_fitted import PriorFittedTransformer, priors
from paperback.bayes.prior_fitted.exact import gp_posterior, grid_posterior
from paperback.bayes.prior_fitted.priors import draw_checked, kernel_matrix
from paperback.bayes.prior_fitted.training import split_weights
from paperback.errors import DataError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kernel", ["rbf", "matern52"])
def test_gp_draws_have_the_kernel_as_their_covariance(kernel, monkeypatch):
    x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: x.expand(*shape))
    prior = priors.GP(lengthscale=0.3, outputscale=2.0, noise=0.1, kernel=kernel)
    _, y = prior(20_000, 6, generator())
    kernel_ = ConstantKernel(2.0) * (RBF(0.3) if kernel == "rbf" else Matern(0.3, nu=2.5))
    expected = torch.from_numpy(kernel_(x.numpy())) + 0.1 * torch.eye(6)
    products = y[:, :, None].double() * y[:, None].double()
    error = products.std(0) / math.sqrt(len(y))
    assert ((products.mean(0) - expected).abs() < 4 * error).all()


def test_every_data_set_draws_its_own_hyper_parameters():
    prior = priors.GPMixture(
        3, lengthscale=stats.gamma(3, scale=1 / 6), outputscale=stats.lognorm(1.0), noise=0.01
    )
    x, y = prior(2_000, 20, generator())
    assert x.shape == (2_000, 20, 3)
    variances = y.square().mean(1)  # of a log-normal outputscale: far more spread than one scale gives
    assert float(variances.log().std()) > 0.8
    assert float(prior(50, 20, generator())[1].abs().sum()) == float(
        prior(50, 20, generator())[1].abs().sum()
    )


def test_a_batch_draws_its_number_of_features():
    prior = priors.GPMixture((1, 4), noise=0.01)
    assert {prior(2, 3, generator(seed))[0].shape[2] for seed in range(40)} == {1, 2, 3, 4}


def test_ridge_and_bnn_have_their_shapes_and_are_finite():
    x, y = priors.Ridge(3)(5, 7, generator())
    assert (x.shape, y.shape) == ((5, 7, 3), (5, 7))
    for correlated in (False, True):
        x, y = priors.BNN(4, correlated=correlated)(5, 7, generator())
        assert (x.shape, y.shape) == ((5, 7, 4), (5, 7))
        assert y.isfinite().all()
        assert float(y.std()) > 0


def test_tabular_classes_are_of_equal_size_and_in_no_order():
    _, y = priors.BNN(4, classes=2)(400, 20, generator())
    assert (y.double().mean(1) == 0.5).all()
    x, y = priors.BNN(1, weight_scale=1.0, keep=1.0, hidden_noise=0.0, layers=(1, 1), classes=3)(
        300, 30, generator()
    )
    assert all((y == label).sum(1).eq(10).all() for label in range(3))
    rising = torch.stack(
        [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(x[..., 0], y, strict=True)]
    )
    assert 0.3 < float((rising > 0).double().mean()) < 0.7


def test_a_simulator_of_single_data_sets_is_a_prior():
    def draw(draws, rows):
        x = torch.rand(rows, 2, generator=draws)
        return x, x.sum(1)

    x, y = priors.from_callable(draw)(3, 5, generator())
    torch.testing.assert_close(x.sum(2), y)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (lambda t, r: torch.zeros(t, r, 1), "pair of tensors"),
        (lambda t, r: (torch.zeros(t, r), torch.zeros(t, r)), "returned shapes"),
        (lambda t, r: (torch.zeros(t, r, 1), torch.zeros(t, r + 1)), "returned shapes"),
        (lambda t, r: (torch.zeros(t, r, 3), torch.zeros(t, r)), "larger num_features"),
        (lambda t, r: (torch.zeros(t, r, 1), torch.full((t, r), torch.nan)), "targets that are not finite"),
        (lambda t, r: (torch.full((t, r, 1), torch.inf), torch.zeros(t, r)), "features that are not finite"),
    ],
)
def test_what_a_prior_may_not_return_is_named(drawn, message):
    def my_prior(tasks, rows, draws):
        return drawn(tasks, rows)

    with pytest.raises(DataError, match="my_prior") as caught:
        draw_checked(my_prior, 4, 5, PriorFittedTransformer(2, d_model=8, layers=1), generator())
    assert message in str(caught.value)


def test_a_classifying_network_wants_classes():
    network = PriorFittedTransformer(1, head="categorical", d_model=8, layers=1)
    with pytest.raises(DataError, match="no classes"):
        draw_checked(priors.GP(), 4, 5, network, generator())


def test_an_unknown_kernel_is_refused():
    x = torch.zeros(2, 1)
    with pytest.raises(DataError, match="matern52"):
        kernel_matrix(x, x, torch.tensor(1.0), torch.tensor(1.0), "cubic")


@pytest.mark.parametrize("split", ["weighted", "uniform"])
def test_contexts_are_drawn_with_their_weights(split):
    weights = split_weights(9, 1, split)
    expected = torch.tensor([1 / (10 - n) if split == "weighted" else 1.0 for n in range(10)]).double()
    torch.testing.assert_close(weights, expected / expected.sum())
    counts = torch.bincount(torch.multinomial(weights, 20_000, True, generator=generator()), minlength=10)
    assert ((counts - 20_000 * weights).abs() < 4 * (20_000 * weights).sqrt()).all()


def test_each_context_has_the_same_number_of_targets_in_expectation():
    targets = split_weights(9, 3, "weighted") * (12 - torch.arange(10))
    torch.testing.assert_close(targets, targets[0].expand(10))


def test_the_exact_posterior_is_that_of_scikit_learn():
    x, y = priors.GP(2, lengthscale=0.4, noise=0.05)(1, 12, generator())
    posterior = gp_posterior(x[0, :8], y[0, :8], x[0, 8:], lengthscale=0.4, outputscale=1.0, noise=0.05)
    reference = GaussianProcessRegressor(RBF(0.4), alpha=0.05, optimizer=None).fit(
        x[0, :8].double().numpy(), y[0, :8].double().numpy()
    )
    mean, std = reference.predict(x[0, 8:].double().numpy(), return_std=True)
    torch.testing.assert_close(posterior.law.mean, torch.from_numpy(mean))
    torch.testing.assert_close(posterior.law.variance, torch.from_numpy(std**2) + 0.05)
    assert math.isclose(float(posterior.log_marginal), reference.log_marginal_likelihood_value_, rel_tol=1e-9)


def test_the_exact_posterior_of_an_empty_context_is_the_prior():
    x = torch.rand(3, 5, 1, generator=generator())
    law = gp_posterior(x[:, :0], x[:, :0, 0], x, lengthscale=0.3, outputscale=2.0, noise=0.5).law
    torch.testing.assert_close(law.mean, torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(law.variance, torch.full((3, 5), 2.5, dtype=torch.float64))


def test_the_grid_is_the_closed_form_when_the_hyper_prior_is_a_point():
    x, y = priors.GP(lengthscale=0.3, noise=0.01)(4, 10, generator())
    task = (x[:, :6], y[:, :6], x[:, 6:])
    exact = gp_posterior(*task, lengthscale=0.3, outputscale=1.0, noise=0.01).law
    grid = grid_posterior(*task, lengthscale=0.3, outputscale=1.0, noise=0.01)
    torch.testing.assert_close(grid.log_prob(y[:, 6:].double()), exact.log_prob(y[:, 6:].double()))
    narrow = stats.lognorm(1e-5, scale=0.3)
    grid = grid_posterior(*task, lengthscale=narrow, outputscale=1.0, noise=0.01)
    torch.testing.assert_close(
        grid.log_prob(y[:, 6:].double()), exact.log_prob(y[:, 6:].double()), rtol=1e-4, atol=1e-4
    )


def test_the_grid_is_fine_enough():
    prior = {"lengthscale": stats.lognorm(0.5, scale=0.3), "outputscale": stats.lognorm(0.5), "noise": 0.01}
    x, y = priors.GPMixture(kernel="rbf", **prior)(50, 15, generator())
    laws = [grid_posterior(x[:, :5], y[:, :5], x[:, 5:], points=points, **prior) for points in (24, 60)]
    coarse, fine = (float(law.log_prob(y[:, 5:].double()).mean()) for law in laws)
    assert abs(coarse - fine) < 1e-3
