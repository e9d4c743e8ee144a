"""Prior-fitted networks as estimators: scikit-learn's checks, units, BoTorch, batches, saving, bad input."""

import warnings

import numpy as np
import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from sklearn.utils.estimator_checks import parametrize_with_checks

import paperback
from paperback.bayes.prior_fitted import (
    PriorFittedClassifier,
    PriorFittedNetwork,
    PriorFittedTransformer,
    RiemannDistribution,
)
from paperback.bayes.prior_fitted.exact import gp_posterior
from paperback.errors import DataError, NotSupportedError

# The network computes in single precision: the seventh digit of a prediction depends on the rows it is
# computed together with, and these checks ask for that digit.
SINGLE_PRECISION = {
    "check_methods_sample_order_invariance": "equal to 1e-5, not to 1e-7",
    "check_methods_subset_invariance": "equal to 1e-5, not to 1e-7",
}


# The checks give up to 300 rows.
@parametrize_with_checks(
    [PriorFittedNetwork(allow_extrapolation=True), PriorFittedClassifier(allow_extrapolation=True)],
    expected_failed_checks=lambda _: SINGLE_PRECISION,
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(rows=10, features=1, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(size=(rows, features))
    return X, np.sin(6 * X[:, 0])


def test_with_units_of_the_prior_the_law_is_the_network_s(gp_network):
    network, _ = gp_network
    X, y = data()
    model = PriorFittedNetwork(network).fit(X, y)
    known = torch.as_tensor(X)[None], torch.as_tensor(y)[None], torch.tensor([[[0.3], [0.6]]])
    with torch.no_grad():
        expected = network.law(network(*known))
    law = model.predict_distribution(np.array([[0.3], [0.6]]))
    assert isinstance(law, RiemannDistribution)
    torch.testing.assert_close(law.mean, expected.mean[0], atol=1e-5, rtol=0)
    exact = gp_posterior(*known, lengthscale=0.4, outputscale=1.0, noise=0.01).law.mean[0]
    torch.testing.assert_close(law.mean, exact, atol=0.3, rtol=0)


def test_with_units_of_the_data_units_do_not_matter(ridge_network):
    X, y = data(features=2)
    mean, std = PriorFittedNetwork(ridge_network).fit(X, y).predict(X, return_std=True)
    other = PriorFittedNetwork(ridge_network).fit(9 * X - 4, 1e4 * y + 5)
    mean2, std2 = other.predict(9 * X - 4, return_std=True)
    np.testing.assert_allclose(mean2, 1e4 * mean + 5, rtol=1e-3, atol=2)
    np.testing.assert_allclose(std2, 1e4 * std, rtol=1e-3)


def test_what_the_estimator_standardises_is_what_the_training_does(ridge_network):
    X, y = data(features=3)
    model = PriorFittedNetwork(ridge_network).fit(X, y)
    one = model.predict_distribution(X[:4])
    (batch,) = model.predict_batch([(X, y, X[:4])])
    torch.testing.assert_close(one.mean, batch.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.stddev, batch.stddev, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", [PriorFittedNetwork, PriorFittedClassifier])
def test_rows_are_predicted_alike_in_any_company(cls):
    X, y = data(rows=40, features=3)
    model = cls.pretrained().fit(X, y if cls is PriorFittedNetwork else y > 0)
    predict = model.predict if cls is PriorFittedNetwork else model.predict_proba
    together = predict(X)
    np.testing.assert_allclose(
        np.concatenate([predict(X[i : i + 1]) for i in range(40)]), together, atol=1e-5
    )
    np.testing.assert_allclose(predict(X[::-1].copy())[::-1], together, atol=1e-5)


def test_a_batch_of_tasks_equals_one_by_one(gp_network):
    model = PriorFittedNetwork(gp_network[0])
    tasks = [(*data(rows=n, seed=n), data(rows=q, seed=9)[0]) for n, q in ((3, 2), (5, 4), (3, 2), (0, 3))]
    laws = model.predict_batch(tasks)
    assert [law.batch_shape[0] for law in laws] == [2, 4, 2, 3]
    for (X, y, new), law in zip(tasks[:3], laws[:3], strict=True):
        alone = PriorFittedNetwork(gp_network[0]).fit(X, y).predict_distribution(new)
        torch.testing.assert_close(law.mean, alone.mean, atol=1e-5, rtol=0)


def test_several_targets_are_each_predicted_by_themselves(gp_network):
    X, y = data()
    both = PriorFittedNetwork(gp_network[0]).fit(X, np.column_stack([y, -y]))
    law = both.predict_distribution(X)
    assert law.batch_shape == (10, 2)
    single = PriorFittedNetwork(gp_network[0]).fit(X, -y).predict(X)
    np.testing.assert_allclose(both.predict(X)[:, 1], single, atol=1e-5)


def test_paths_are_joint_and_functions_are_refused(gp_network):
    X, y = data(rows=4)
    model = PriorFittedNetwork(gp_network[0]).fit(X, y)
    near = np.array([[0.5], [0.501], [0.9]])
    paths = model.sample_path(near, 800, seed=1)
    assert paths.shape == (800, 3)
    assert torch.equal(paths, model.sample_path(near, 800, seed=1))
    first = model.predict_distribution(near)
    torch.testing.assert_close(
        paths[:, 0].mean(), first.mean[0], atol=4 * float(first.stddev[0]) / 28, rtol=0
    )
    independent = first.sample((800,))
    assert torch.corrcoef(paths.T)[0, 1] > torch.corrcoef(independent.T)[0, 1] + 0.2
    with pytest.raises(NotSupportedError, match="sample_path"):
        model.sample_functions(X)
    with pytest.raises(DataError, match="n is 0"):
        model.sample_path(near, 0)
    with pytest.raises(DataError, match="trained with at most 12"):
        model.sample_path(np.linspace(0, 1, 10)[:, None])


def test_it_is_a_botorch_surrogate(gp_network):
    X, y = data(rows=8)
    model = PriorFittedNetwork(gp_network[0]).fit(X, y).to_botorch()
    sampler = SobolQMCNormalSampler(torch.Size([64]), seed=0)
    acquisition = qLogExpectedImprovement(model, best_f=float(y.max()) - 0.5, sampler=sampler)
    torch.manual_seed(0)
    candidate, value = optimize_acqf(
        acquisition, torch.tensor([[0.0], [1.0]], dtype=torch.float64), q=2, num_restarts=2, raw_samples=16
    )
    assert candidate.shape == (2, 1)
    assert value.isfinite()
    points = torch.full((1, 1), 0.4, dtype=torch.float64, requires_grad=True)
    model.posterior(points).mean.sum().backward()
    assert points.grad.abs() > 0


def test_probabilities_of_classes(tabular_network):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 4))
    y = np.array(["low", "high"])[(X[:, 0] > 0).astype(int)]
    model = PriorFittedClassifier(tabular_network).fit(X, y)
    probabilities = model.predict_proba(X)
    assert probabilities.shape == (30, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert model.score(X, y) > 0.7


@pytest.mark.parametrize("name", ["regression", "classification"])
def test_save_and_load(name, ridge_network, tabular_network, tmp_path):
    X, y = data(features=2)
    if name == "regression":
        model = PriorFittedNetwork(ridge_network).fit(X, y)
    else:
        model = PriorFittedClassifier(tabular_network).fit(X, y > 0)
    model.save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))
    np.testing.assert_array_equal(loaded.fit(X, y > 0).predict(X), model.fit(X, y > 0).predict(X))


def test_the_network_may_be_a_folder(ridge_network, tmp_path):
    ridge_network.save_pretrained(tmp_path / "network")
    X, y = data()
    expected = PriorFittedNetwork(ridge_network).fit(X, y).predict(X)
    np.testing.assert_array_equal(
        PriorFittedNetwork(str(tmp_path / "network")).fit(X, y).predict(X), expected
    )


def test_the_regressor_that_ships_predicts_at_once():
    rng = np.random.default_rng(0)
    X = rng.uniform(-3, 3, size=(40, 2))
    y = 100 + 20 * np.sin(X[:, 0]) + 10 * X[:, 1]
    new = rng.uniform(-2.5, 2.5, size=(200, 2))
    truth = 100 + 20 * np.sin(new[:, 0]) + 10 * new[:, 1]
    model = PriorFittedNetwork.pretrained().fit(X, y)
    assert model.score(new, truth) > 0.95
    law = model.predict_distribution(new)
    inside = (law.icdf(torch.tensor(0.025)) < torch.as_tensor(truth)) & (
        torch.as_tensor(truth) < law.icdf(torch.tensor(0.975))
    )
    assert 0.85 < float(inside.double().mean()) <= 1


def test_the_classifier_that_ships_predicts_at_once():
    rng = np.random.default_rng(0)
    X, new = rng.normal(size=(40, 5)), rng.normal(size=(300, 5))
    model = PriorFittedClassifier.pretrained().fit(X, X[:, 0] + X[:, 1] > 0)
    assert model.score(new, new[:, 0] + new[:, 1] > 0) > 0.8


def test_what_ships_is_small_and_checked(tmp_path, monkeypatch):
    from paperback.bayes.prior_fitted import estimators
    from paperback.errors import ArtefactError
    from paperback.study.measure import size_on_disk

    assert size_on_disk(estimators.FOLDER) < 5e6
    import shutil

    shutil.copytree(estimators.FOLDER, tmp_path / "files")
    weights = tmp_path / "files" / "regression" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    monkeypatch.setattr(estimators, "FOLDER", tmp_path / "files")
    with pytest.raises(ArtefactError, match="SHA-256"):
        estimators.shipped_network.__wrapped__("regression")
    with pytest.raises(ArtefactError, match="install paperback again"):
        estimators.shipped_network.__wrapped__("vision")


def test_a_network_without_a_prior_is_refused():
    with pytest.raises(DataError, match="fit_prior"):
        PriorFittedNetwork(PriorFittedTransformer(1, d_model=8, layers=1)).fit(*data())


def test_the_head_must_fit_the_task(ridge_network, tabular_network):
    with pytest.raises(DataError, match="head"):
        PriorFittedNetwork(tabular_network).fit(*data())
    with pytest.raises(DataError, match="head"):
        PriorFittedClassifier(ridge_network).fit(data()[0], data()[1] > 0)


def test_too_many_rows_raise_or_warn(gp_network):
    X, y = data(rows=13)
    with pytest.raises(DataError, match="allow_extrapolation=True"):
        PriorFittedNetwork(gp_network[0]).fit(X, y)
    with pytest.warns(UserWarning, match="extrapolates"):
        model = PriorFittedNetwork(gp_network[0], allow_extrapolation=True).fit(X, y)
    assert np.isfinite(model.predict(X)).all()


def test_too_many_features_or_classes_are_refused(ridge_network, tabular_network):
    with pytest.raises(DataError, match="at most 3"):
        PriorFittedNetwork(ridge_network).fit(*data(features=4))
    with pytest.raises(DataError, match="4 classes"):
        PriorFittedClassifier(tabular_network).fit(data(rows=12)[0], np.arange(12) % 4)


def test_it_says_why_not(ridge_network, tabular_network):
    assert PriorFittedNetwork(ridge_network).why_not(*data()) is None
    assert "at most 3" in PriorFittedNetwork(ridge_network).why_not(*data(features=4))
    assert "at most 20" in PriorFittedNetwork(ridge_network).why_not(*data(rows=21))
    assert "4 classes" in PriorFittedClassifier(tabular_network).why_not(data(rows=12)[0], np.arange(12) % 4)


def test_numbers_that_are_not_finite_are_refused(gp_network):
    X, y = data()
    y[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        PriorFittedNetwork(gp_network[0]).fit(X, y)
    with pytest.raises(DataError, match="task 0 holds"):
        PriorFittedNetwork(gp_network[0]).predict_batch([(X, y, X)])
    with pytest.raises(DataError, match="task 0 has shapes"):
        PriorFittedNetwork(gp_network[0]).predict_batch([(X, y[:4], X)])


def test_data_that_the_prior_does_not_describe_are_named(gp_network):
    X, y = data()
    with pytest.warns(UserWarning, match="20.0% of the targets"):
        model = PriorFittedNetwork(gp_network[0]).fit(X, np.where(X[:, 0] > np.sort(X[:, 0])[7], 50.0, y))
    assert model.diagnostics_["targets_outside_borders"] == pytest.approx(0.2)
    with pytest.warns(UserWarning, match="100.0% of the rows of X"):
        PriorFittedNetwork(gp_network[0]).fit(X + 40, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PriorFittedNetwork(gp_network[0]).fit(X, y)
