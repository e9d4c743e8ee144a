"""All seven surrogates as estimators: scikit-learn's checks, saving, units, and their BoTorch models."""

import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperback.bayes.bnn_surrogate import SURROGATES, make_surrogate
from paperback.errors import DataError

SMALL = {
    "gp": {},
    "ibnn": {"depth": 2},
    "dkl": {"hidden": (8,), "pretrain_steps": 50, "train_steps": 20, "lr": 0.01},
    "hmc": {"hidden": (8,), "samples": 20, "burn_in": 20, "chains": 2, "leapfrog_steps": 4, "map_steps": 100},
    "sghmc": {"hidden": (8,), "steps": 400, "burn_in": 200, "lr": 0.05, "noise_variance": 0.1},
    "ensemble": {"hidden": (8,), "members": 4, "map_steps": 100},
    "lla": {"hidden": (8,), "map_steps": 200},
}
EACH = pytest.mark.parametrize("name", SURROGATES)
DRAWS = ("hmc", "sghmc", "ensemble")


def small(name, **settings):
    return make_surrogate(name, **(SMALL[name] | settings))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.random((24, 2))
    return X, np.sin(4 * X[:, 0]) + X[:, 1] ** 2 + 0.05 * rng.standard_normal(24)


@pytest.fixture(scope="module")
def fitted(data):
    return {name: small(name).fit(*data) for name in SURROGATES}


@parametrize_with_checks([small(name) for name in SURROGATES])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@EACH
def test_learns_a_smooth_function(name, data, fitted):
    X, y = data
    assert fitted[name].score(X, y) > (0.8 if name in ("gp", "ibnn", "lla") else 0.5)


@EACH
def test_saved_and_loaded_it_predicts_the_same(name, data, fitted, tmp_path):
    fitted[name].save_pretrained(tmp_path / name)
    again = type(fitted[name]).from_pretrained(tmp_path / name)
    for one, two in zip(fitted[name].predict(data[0], True), again.predict(data[0], True), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-10)
    assert again.diagnostics_ == fitted[name].diagnostics_


@EACH
def test_same_random_state_same_fit(name, data, fitted):
    np.testing.assert_array_equal(small(name).fit(*data).predict(data[0]), fitted[name].predict(data[0]))


@EACH
def test_units_of_targets_do_not_matter(name, data, fitted):
    X, y = data
    scaled = small(name).fit(X, 1e4 * y + 3e5)
    mean, std = fitted[name].predict(X, return_std=True)
    mean_scaled, std_scaled = scaled.predict(X, return_std=True)
    np.testing.assert_allclose(mean_scaled, 1e4 * mean + 3e5, rtol=0, atol=20)
    np.testing.assert_allclose(std_scaled, 1e4 * std, rtol=1e-2)


@EACH
def test_bounds_scale_the_inputs_and_keep_the_data_in(name, data):
    X, y = data
    low, high = np.array([-0.5, 0.0]), np.array([1.0, 3.0])
    model = small(name, bounds=[low.tolist(), high.tolist()]).fit(X, y)
    np.testing.assert_allclose(model._inputs(low[None]), [[0.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(model._inputs(high[None]), [[1.0, 1.0]], atol=1e-12)
    with pytest.raises(DataError, match="outside its bounds"):
        small(name, bounds=[[0.5, 0.0], [1.0, 1.0]]).fit(X, y)
    with pytest.raises(DataError, match="feature 1 are 1 and 0"):
        small(name, bounds=[[0.0, 1.0], [1.0, 0.0]]).fit(X, y)


@EACH
def test_batches_agree_with_single_points(name, fitted):
    points = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = fitted[name].to_botorch().posterior(points)
    for i in range(3):
        alone = fitted[name].to_botorch().posterior(points[i])
        torch.testing.assert_close(posterior.mean[i], alone.mean, atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(posterior.variance[i], alone.variance, atol=1e-6, rtol=1e-5)


@EACH
def test_gradients_of_samples_agree_with_finite_differences(name, fitted):
    model = fitted[name].to_botorch()
    points = torch.tensor([[0.2, 0.3], [0.6, 0.8]], dtype=torch.float64)
    sampler = SobolQMCNormalSampler(torch.Size([8]), seed=1)

    def samples(x):
        return sampler(model.posterior(x)).sum((1, 2))

    x = points.clone().requires_grad_()
    step, i, j = 1e-5, 1, 0
    moved = torch.zeros_like(points)
    moved[i, j] = step
    difference = (samples(points + moved) - samples(points - moved)) / (2 * step)
    exact = torch.stack([torch.autograd.grad(each, x, retain_graph=True)[0][i, j] for each in samples(x)])
    torch.testing.assert_close(difference, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))


@EACH
def test_same_base_samples_same_functions(name, fitted):
    model, sampler = fitted[name].to_botorch(), SobolQMCNormalSampler(torch.Size([16]), seed=0)
    points = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(sampler(model.posterior(points)), sampler(model.posterior(points)))


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_one_function_at_all_points(name, fitted):
    """Each sampled vector of values is that of one network."""
    model = fitted[name].to_botorch()
    points = torch.rand(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    samples = model.posterior(points).rsample(torch.Size([20]))[..., 0]
    networks = fitted[name]._joint(fitted[name]._scaled(points)).values[:, 0]
    networks = fitted[name].target_shift_[0] + fitted[name].target_scale_[0] * networks
    distance = (samples[:, None] - networks).abs().amax(2).amin(1)
    assert float(distance.max()) < 1e-9


@pytest.mark.parametrize("name", ["gp", "ibnn", "lla"])
def test_expected_improvement_of_draws_is_the_analytic_one(name, data, fitted):
    model, best = fitted[name].to_botorch(), float(np.median(data[1]))
    sampler = SobolQMCNormalSampler(torch.Size([4096]), seed=0)
    points = torch.rand(5, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sampled = qLogExpectedImprovement(model, best_f=best, sampler=sampler)(points)
    exact = LogExpectedImprovement(model, best_f=best)(points)
    likely = exact > -6
    assert bool(likely.any())
    torch.testing.assert_close(sampled[likely], exact[likely], atol=0.05, rtol=0)


@EACH
def test_acquisition_functions_of_botorch_run_on_it(name, fitted):
    model = fitted[name].to_botorch()
    box = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    acquire = qLogExpectedImprovement(model, best_f=1.0)
    options = {"maxiter": 5, "seed": 0}
    points, value = optimize_acqf(acquire, box, q=2, num_restarts=2, raw_samples=8, options=options)
    assert points.shape == (2, 2)
    assert bool(value.isfinite())


@EACH
def test_two_outputs_and_hypervolume_improvement(name, data):
    X, y = data
    model = small(name).fit(X, np.column_stack([y, -(X**2).sum(1)]))
    assert model.predict(X).shape == (24, 2)
    assert model.sample_functions(X, 3).shape == (3, 24, 2)
    acquire = qLogNoisyExpectedHypervolumeImprovement(
        model.to_botorch(),
        ref_point=[0.0, -2.0],
        X_baseline=torch.as_tensor(X[:6]),
        sampler=SobolQMCNormalSampler(torch.Size([16]), seed=0),
        prune_baseline=False,
    )
    points = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    points.requires_grad_()
    acquire(points).sum().backward()
    assert bool(points.grad.isfinite().all())


def test_a_wrong_name_suggests_the_right_one():
    with pytest.raises(DataError, match="did you mean ensemble"):
        make_surrogate("ensembel")
    with pytest.raises(DataError, match="there are gp, ibnn"):
        make_surrogate("xyz")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gp", {"priors": "old"}, "priors is 'old'"),
        ("ibnn", {"depth": 0}, "depth is 0"),
        ("hmc", {"samples": 6, "chains": 2}, "6 samples of 2 chains"),
        ("hmc", {"prior_variance": -1.0}, "prior_variance is -1.0"),
        ("hmc", {"noise_variance": []}, r"noise_variance is \[\]"),
        ("sghmc", {"batch_size": 0}, "batch_size is 0"),
        ("sghmc", {"burn_in": 400}, "samples after 400 of burn-in"),
        ("ensemble", {"members": 1}, "1 members"),
        ("ensemble", {"part": 0.0}, "on 0 of the rows"),
        ("lla", {"prior_precision": 0.0}, "prior_precision is 0"),
        ("lla", {"hidden": (0,)}, "must be at least 1"),
        ("dkl", {"activation": "sine"}, "activation is 'sine'"),
    ],
)
def test_a_bad_setting_is_named(name, settings, message, data):
    with pytest.raises(DataError, match=message):
        small(name, **settings).fit(*data)


def test_deep_kernel_learning_wants_four_rows(data):
    X, y = data
    with pytest.raises(DataError, match="at least 4 rows"):
        small("dkl").fit(X[:3], y[:3])
