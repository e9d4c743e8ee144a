import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from paperback.errors import DataError, NotSupportedError
from paperback.theory.inductive_bias import (
    Fit,
    InductiveBias,
    KernelSpace,
    LossLaw,
    NetworkSpace,
    added_bias,
    bits_from_losses,
    fit_law,
    rbf,
    sankaran_nats,
)

GRID = np.geomspace(1e-3, 10, 30)


def task(n=40, m=30, outputs=2, seed=0):
    """A smooth function of three inputs."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=(n + m, 3)))
    y = torch.stack([torch.sin(x.sum(1) + k) for k in range(outputs)], 1)
    return x[:n], y[:n], x[n:], y[n:]


def float_task(**sizes):
    return tuple(part.float() for part in task(**sizes))


def small_network():
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 2))


QUICK = Fit(epochs=60, batch_size=20, lr=1e-2)


@pytest.fixture(scope="module")
def network_bias():
    space = NetworkSpace(small_network, QUICK, 10, fit_tol=0.3, progress=False)
    return InductiveBias(space, n_bootstrap=20).fit(*float_task())


# -- kernels -------------------------------------------------------------------------------------------------


def test_the_posterior_interpolates_the_training_points():
    X, y, _, _ = task()
    posterior = KernelSpace(rbf(1.0), jitter=1e-8).posterior(X, y, X)
    torch.testing.assert_close(posterior.mean, y, atol=1e-4, rtol=0)
    assert float(posterior.covariance.diagonal().max()) < 1e-4


def test_draws_have_the_mean_and_the_covariance_of_the_posterior():
    X, y, X_test, _ = task(m=5)
    posterior = KernelSpace(rbf(1.0)).posterior(X, y, X_test)
    draws = posterior.sample(40_000, torch.Generator().manual_seed(0))[..., 0]
    torch.testing.assert_close(draws.mean(0), posterior.mean[:, 0], atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), posterior.covariance, atol=0.02, rtol=0)


def test_the_law_is_that_of_the_error_of_the_draws():
    X, y, X_test, y_test = task()
    posterior = KernelSpace(rbf(1.0)).posterior(X, y, X_test)
    law = posterior.law(y_test)
    draws = posterior.sample(20_000, torch.Generator().manual_seed(1))
    errors = (draws - y_test).square().mean((1, 2)).numpy()
    assert law.mean == pytest.approx(errors.mean(), rel=0.02)
    assert law.std == pytest.approx(errors.std(), rel=0.03)
    for probability in (0.01, 0.1, 0.5):
        e = np.quantile(errors, probability)
        assert math.exp(float(law.log_cdf(e))) == pytest.approx(probability, rel=0.15)
    assert stats.ks_2samp(law.sample(20_000, np.random.default_rng(0)), errors).pvalue > 1e-3


def test_agrees_with_the_gaussian_process_of_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF

    X, y, X_test, _ = task(outputs=1)
    peer = GaussianProcessRegressor(RBF(1.3), alpha=1e-6, optimizer=None).fit(X.numpy(), y[:, 0].numpy())
    mean, covariance = peer.predict(X_test.numpy(), return_cov=True)
    ours = KernelSpace(rbf(1.3)).posterior(X, y, X_test)
    np.testing.assert_allclose(ours.mean[:, 0], mean, atol=1e-6)
    np.testing.assert_allclose(ours.covariance, covariance, atol=1e-6)
    evidence = KernelSpace(rbf(1.3)).log_marginal_likelihood(X, y) * len(X)
    assert evidence == pytest.approx(peer.log_marginal_likelihood_value_, rel=1e-6)
    theirs = KernelSpace(RBF(1.3)).posterior(X, y, X_test)  # its kernel is one of ours as it is
    torch.testing.assert_close(theirs.covariance, ours.covariance, atol=1e-8, rtol=0)


def test_conjugate_gradients_give_what_the_factor_gives():
    X, y, X_test, y_test = task(n=120)
    dense = KernelSpace(rbf(1.0), 1e-4).posterior(X, y, X_test)
    iterative = KernelSpace(rbf(1.0), 1e-4, dense_limit=50, n_landmarks=30).posterior(X, y, X_test)
    torch.testing.assert_close(iterative.mean, dense.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(iterative.covariance, dense.covariance, atol=1e-5, rtol=0)
    exact, close = (float(p.law(y_test).log_cdf(0.05)) for p in (dense, iterative))
    assert close == pytest.approx(exact, rel=1e-2)


def test_bits_do_not_change_when_outputs_are_rotated():
    X, y, X_test, y_test = task()
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    bits = [
        float(InductiveBias(KernelSpace(rbf(1.0))).fit(X, y @ r, X_test, y_test @ r).bits(0.01).value)
        for r in (torch.eye(2, dtype=torch.float64), turn)
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-8)


@pytest.mark.parametrize("method", ["auto", "ncx2", "scaled_chi2", "empirical"])
def test_bits_fall_with_the_error_and_end_at_zero(method):
    bias = InductiveBias(KernelSpace(rbf(1.0)), method, n_samples=200, n_bootstrap=3).fit(*task())
    values = bias.curve(GRID).value
    assert bool((np.diff(values[np.isfinite(values)]) <= 1e-9).all())
    assert float(bias.bits(math.inf).value) == 0.0


def test_an_unreachable_error_takes_infinitely_many_bits():
    law = LossLaw(np.array([1.0]), np.array([1.0]), np.array([0.0]), constant=0.5)
    assert law.log_cdf([0.4, 0.6])[0] == -math.inf
    assert math.isfinite(law.log_cdf([0.4, 0.6])[1])


def test_a_kernel_that_needs_more_jitter_says_so():
    X, y, X_test, y_test = task()

    def indefinite(A, B):
        return rbf(2.0)(A, B) - 1e-4 * (A[:, None] == B[None]).all(-1).double()

    bias = InductiveBias(KernelSpace(indefinite, 1e-7)).fit(X, y, X_test, y_test)
    assert any("needed a jitter" in note for note in bias.bits(0.1).notes)


# -- laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("degrees", "noncentrality"), [(3.0, 4.0), (30.0, 5.0), (10.0, 200.0)])
def test_the_fit_is_at_least_as_likely_as_the_truth_and_as_scipy(degrees, noncentrality):
    losses = 0.01 * stats.ncx2.rvs(degrees, noncentrality, size=500, random_state=0)

    def likelihood(df, nc, scale):
        return stats.ncx2.logpdf(losses, df, nc, scale=scale).sum()

    law, paper = fit_law(losses), fit_law(losses, "paper")
    ours = likelihood(law.degrees[0], law.noncentrality[0], law.weights[0])
    assert ours >= likelihood(degrees, noncentrality, 0.01) - 1e-3
    assert ours >= likelihood(paper.degrees, paper.noncentrality, paper.scale) - 1e-2


def test_the_fit_survives_where_scipy_gives_up():
    """Two dozen losses of many degrees of freedom: scipy's start has no finite likelihood in reach."""
    losses = 1e-5 * stats.chi2.rvs(2000, size=24, random_state=2)
    law = fit_law(losses)
    assert law.mean == pytest.approx(losses.mean(), rel=1e-3)
    assert law.std == pytest.approx(losses.std(), rel=0.1)


def test_fitted_bits_agree_with_counting():
    losses = 0.01 * stats.ncx2.rvs(5, 10, size=4000, random_state=0)
    e = np.quantile(losses, [0.05, 0.3])
    counted = bits_from_losses(losses, e, "empirical")
    np.testing.assert_allclose(bits_from_losses(losses, e, "ncx2"), counted, rtol=0.05)
    np.testing.assert_allclose(bits_from_losses(losses, e, "scaled_chi2"), counted, rtol=0.08)


@pytest.mark.parametrize(("degrees", "noncentrality"), [(200.0, 50.0), (1000.0, 800.0)])
def test_sankarans_normal_variable_is_right_in_the_near_tail(degrees, noncentrality):
    """His z, put through the normal law; z^2 / 2 alone is its leading term and smaller."""
    for probability in (0.1, 1e-3, 1e-6):
        x = stats.ncx2.ppf(probability, degrees, noncentrality)
        nats = float(sankaran_nats(0.3 * x, degrees, noncentrality, 0.3))
        through = -stats.norm.logcdf(-math.sqrt(2 * nats))
        assert through == pytest.approx(-stats.ncx2.logcdf(x, degrees, noncentrality), rel=0.02)
        assert nats < through


def test_sankaran_falls_short_in_the_far_tail_and_stays_finite_at_zero():
    far = stats.chi2.ppf(1e-200, 200)  # a chi-square, whose tail scipy knows well
    exact = -stats.chi2.logcdf(far, 200)
    assert float(sankaran_nats(far, 200.0, 1e-9, 1.0)) < 0.8 * exact
    assert float(-LossLaw.single(200.0, 0.0, 1.0).log_cdf(far)) == pytest.approx(exact, rel=1e-3)
    assert math.isfinite(float(sankaran_nats(1e-300, 200.0, 50.0, 1.0)))


def test_the_papers_law_uses_sankaran_where_scipy_underflows():
    law = fit_law(1e-3 * stats.ncx2.rvs(300, 200, size=400, random_state=0), "paper")
    e = 0.002
    assert stats.ncx2.logcdf(e, law.degrees, law.noncentrality, scale=law.scale) == -math.inf
    expected = -sankaran_nats(e, law.degrees, law.noncentrality, law.scale)
    assert float(law.log_cdf(e)) == pytest.approx(float(expected))
    assert float(law.log_cdf(law.mean)) == pytest.approx(math.log(0.5), abs=0.05)


def test_empirical_bits_have_an_exact_binomial_interval():
    bias = InductiveBias(KernelSpace(rbf(1.0)), "empirical", n_samples=100).fit(*task())
    nothing = bias.bits(float(bias.losses_.min()) / 2)
    assert float(nothing.value) == math.inf
    assert float(nothing.interval[0]) == pytest.approx(-math.log2(1 - 0.025 ** (1 / 100)))
    half = bias.bits(float(np.median(bias.losses_)))
    assert half.interval[0] < half.value < half.interval[1]


# -- networks ------------------------------------------------------------------------------------------------


def test_a_stack_learns_what_each_network_learns_alone():
    X, y, X_test, y_test = float_task()
    full_batch = Fit(epochs=20, batch_size=len(X), lr=1e-2)  # then the order of the rows does not matter
    stacked = NetworkSpace(small_network, full_batch, 8, fit_tol=1.0, progress=False)
    alone = NetworkSpace(small_network, full_batch, 8, fit_tol=1.0, stack_size=1, progress=False)
    a, b = (space.errors(X, y, X_test, y_test, seed=3) for space in (stacked, alone))
    assert (a.stacked, b.stacked) == (True, False)
    torch.testing.assert_close(a.test_errors, b.test_errors, rtol=1e-4, atol=1e-6)


def test_networks_have_an_interval_and_say_when_the_law_decides(network_bias):
    near = network_bias.bits(network_bias.law_.mean)
    assert near.interval[0] <= near.value <= near.interval[1]
    assert near.n == len(network_bias.losses_)
    assert "extrapolated" not in near.flags
    far = network_bias.bits(max(1e-9, network_bias.law_.mean - 8 * network_bias.law_.std))
    assert "extrapolated" in far.flags
    assert any("standard deviations below" in note for note in far.notes)
    assert {"scaled chi-square", "extrapolation"} <= set(far.parts)


def test_the_same_seed_gives_the_same_bits(network_bias):
    again = InductiveBias(
        NetworkSpace(small_network, QUICK, 10, fit_tol=0.3, progress=False), n_bootstrap=20
    ).fit(*float_task())
    assert again.bits(0.1).value == network_bias.bits(0.1).value
    np.testing.assert_array_equal(again.losses_, network_bias.losses_)


def test_what_cannot_be_stacked_is_trained_model_by_model_and_says_why():
    def normalised():
        return nn.Sequential(nn.Linear(3, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))

    space = NetworkSpace(normalised, Fit(epochs=40, batch_size=20, lr=1e-2), 8, fit_tol=1.0, progress=False)
    bias = InductiveBias(space, n_bootstrap=3).fit(*float_task())
    assert any("running statistics" in note for note in bias.bits(1.0).notes)
    assert not space.trained_.stacked


def test_a_users_own_training_is_taken():
    def fit(model, X, y, seed):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(X), y).backward()
            optimizer.step()

    space = NetworkSpace(small_network, fit, 8, fit_tol=0.5, progress=False)
    bias = InductiveBias(space, n_bootstrap=3).fit(*float_task())
    assert len(bias.losses_) == 8


def test_a_model_that_cannot_fit_is_refused():
    space = NetworkSpace(lambda: nn.Linear(3, 2), Fit(epochs=2), 8, fit_tol=0.01, progress=False)
    with pytest.raises(DataError, match="0 of 8 networks fit the training data"):
        InductiveBias(space).fit(*float_task())


def test_added_bias_is_the_difference_with_both_uncertainties(network_bias):
    kernel = InductiveBias(KernelSpace(rbf(1.0))).fit(*float_task())
    added = added_bias(kernel, network_bias, 0.2)
    assert added.value == pytest.approx(kernel.bits(0.2).value - network_bias.bits(0.2).value)
    assert added.interval[0] <= added.value <= added.interval[1]
    other = InductiveBias(KernelSpace(rbf(1.0))).fit(*float_task(seed=5))
    with pytest.raises(DataError, match="different test targets"):
        added_bias(kernel, other, 0.2)


# -- bad input -----------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence():
    X, y, X_test, y_test = task()
    bias = InductiveBias(KernelSpace(rbf(1.0)))
    with pytest.raises(NotSupportedError, match="call fit"):
        bias.bits(0.1)
    bias.fit(X, y, X_test, y_test)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(DataError, match="above zero"):
            bias.bits(target)
    with pytest.raises(DataError, match="one_hot"):
        bias.fit(X, torch.zeros(len(X), dtype=torch.int64), X_test, y_test)
    with pytest.raises(DataError, match="not finite"):
        bias.fit(X, y * math.nan, X_test, y_test)
    with pytest.raises(DataError, match="one target per input"):
        bias.fit(X, y[:-1], X_test, y_test)
    with pytest.raises(DataError, match="torch tensor"):
        bias.fit(X.numpy(), y, X_test, y_test)
    with pytest.raises(DataError, match="n_models is 5"):
        NetworkSpace(small_network, n_models=5)
    with pytest.raises(DataError, match="not known exactly"):
        InductiveBias(NetworkSpace(small_network), "exact")
    with pytest.raises(DataError, match="method is 'best'"):
        InductiveBias(KernelSpace(rbf(1.0)), "best")
    with pytest.raises(DataError, match="length"):
        rbf(0.0)
    with pytest.raises(DataError, match="jitter"):
        KernelSpace(rbf(1.0), 0.0)


def test_bad_losses_are_one_sentence():
    good = np.linspace(1, 2, 10)
    with pytest.raises(DataError, match="7 losses"):
        bits_from_losses(good[:7], 0.5)
    with pytest.raises(DataError, match="loss 3 is nan"):
        bits_from_losses(np.where(np.arange(10) == 3, math.nan, good), 0.5)
    with pytest.raises(DataError, match="all 10 losses"):
        bits_from_losses(np.ones(10), 0.5)
    with pytest.raises(DataError, match="method is"):
        bits_from_losses(good, 0.5, "best")


def test_bad_kernels_and_networks_are_one_sentence():
    X, y, X_test, _ = task()
    with pytest.raises(DataError, match=r"kernel matrix .*eigenvalues go from .*jitter"):
        KernelSpace(lambda A, B: -rbf(1.0)(A, B)).posterior(X, y, X_test)
    with pytest.raises(DataError, match="one row per row"):
        KernelSpace(lambda A, B: torch.ones(3, 3)).posterior(X, y, X_test)
    data = float_task()
    fixed = small_network()
    for make, words in (
        (lambda: fixed, "same weights twice"),
        (lambda: nn.Linear(4, 2), "does not take inputs of shape"),
        (lambda: nn.Linear(3, 5), "it must give"),
        (lambda: None, "must return a torch module"),
    ):
        with pytest.raises(DataError, match=words):
            InductiveBias(NetworkSpace(make, QUICK, 8, progress=False)).fit(*data)


def test_test_rows_that_were_trained_on_are_counted():
    X, y, X_test, y_test = task()
    X_test, y_test = torch.cat([X_test, X[:3]]), torch.cat([y_test, y[:3]])
    with pytest.warns(UserWarning, match="3 of 33 test rows"):
        bias = InductiveBias(KernelSpace(rbf(1.0))).fit(X, y, X_test, y_test)
    assert any("3 of 33" in note for note in bias.bits(0.1).notes)
