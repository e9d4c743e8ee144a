"""The baselines: scikit-learn's checks, their laws, what they refuse, saving."""

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperback.bayes.baselines import (
    DeepEnsembleClassifier,
    DeepEnsembleRegressor,
    ForestRegressor,
    QuantileBoosting,
    QuantileLaw,
    SparseGP,
)
from paperback.bayes.bnn_surrogate import GPSurrogate
from paperback.errors import DataError, NotSupportedError

D = torch.float64
REGRESSORS = [
    SparseGP(n_inducing=20, steps=50),
    DeepEnsembleRegressor(n_members=3, hidden=(32,), epochs=200),
    QuantileBoosting(n_trees=40),
    ForestRegressor(n_trees=50),
]
SMALL = [
    SparseGP(n_inducing=5, steps=10),
    DeepEnsembleRegressor(n_members=2, hidden=(16,), epochs=60),
    DeepEnsembleClassifier(n_members=2, hidden=(16,), epochs=60),
    QuantileBoosting(n_trees=30),
    ForestRegressor(n_trees=5),
]


@parametrize_with_checks(SMALL)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def data(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.uniform(-2, 2, size=(rows, 2))
    return X, 10 + np.sin(2 * X[:, 0]) + 0.1 * X[:, 1] + 0.2 * rng.normal(size=rows)


@pytest.mark.parametrize("model", REGRESSORS, ids=lambda model: type(model).__name__)
def test_laws_are_calibrated_on_smooth_data(model):
    X, y = data()
    X_test, y_test = data(seed=1)
    model.fit(X, y)
    with torch.no_grad():
        law = model.predict_distribution(X_test)
        probability = law.cdf(torch.as_tensor(y_test))
        inside = ((probability > 0.05) & (probability < 0.95)).double().mean()
        assert 0.75 < float(inside) < 0.99
        constant = torch.distributions.Normal(y.mean(), y.std())
        gain = (
            law.log_prob(torch.as_tensor(y_test)).mean() - constant.log_prob(torch.as_tensor(y_test)).mean()
        )
    assert float(gain) > 0.4
    assert np.corrcoef(model.predict(X_test), y_test)[0, 1] > 0.85
    again = type(model)(**model.get_params()).fit(X, y)
    np.testing.assert_allclose(again.predict(X_test), model.predict(X_test), rtol=1e-6)


def test_sparse_gp_with_all_rows_is_the_exact_gp():
    X, y = data(40)
    mean, std = SparseGP(n_inducing=40).fit(X, y).predict(X[:10] + 0.1, return_std=True)
    exact_mean, exact_std = GPSurrogate().fit(X, y).predict(X[:10] + 0.1, return_std=True)
    np.testing.assert_allclose(mean, exact_mean, atol=0.05)
    np.testing.assert_allclose(std, exact_std, rtol=0.1)


def law():
    quantiles = torch.tensor([[-1.0, 0.0, 0.5, 2.0, 5.0], [1.0, 1.1, 1.2, 1.3, 1.4]], dtype=D)
    return QuantileLaw(quantiles, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))


def test_quantile_law_has_its_quantiles_and_integrates_to_one():
    made = law()
    for column, level in enumerate((0.05, 0.25, 0.5, 0.75, 0.95)):
        torch.testing.assert_close(made.icdf(torch.tensor(level, dtype=D)), made.quantiles[:, column])
        torch.testing.assert_close(made.cdf(made.quantiles[:, column]), torch.full((2,), level, dtype=D))
    p = torch.tensor([[1e-5], [0.02], [0.6], [0.9999]], dtype=D)
    torch.testing.assert_close(made.cdf(made.icdf(p)), p.expand(4, 2))
    grid = torch.linspace(-30, 60, 900_001, dtype=D)[:, None]
    density = made.log_prob(grid).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, grid, dim=0), torch.ones(2, dtype=D), rtol=0, atol=1e-3
    )
    mean = torch.trapezoid(grid * density, grid, dim=0)
    torch.testing.assert_close(made.mean, mean, rtol=1e-3, atol=1e-3)
    second = torch.trapezoid(grid.square() * density, grid, dim=0)
    torch.testing.assert_close(made.variance, second - mean.square(), rtol=1e-2, atol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(made.sample((100_000,)).mean(0), made.mean, rtol=0.03, atol=0.01)


def test_forest_is_the_mixture_of_its_leaves():
    X, y = data(60)
    model = ForestRegressor(n_trees=7).fit(X, y)
    trees = model.models_[0].estimators_
    z = (y - model.target_shift_) / model.target_scale_
    by_hand = np.mean([tree.predict(X[:3]) for tree in trees], axis=0)
    np.testing.assert_allclose(model.predict(X[:3]), model.target_shift_ + model.target_scale_ * by_hand)
    assert z.std() == pytest.approx(1.0)


def test_trees_say_what_they_do_not_have(tmp_path):
    X, y = data(60)
    model = ForestRegressor(n_trees=5).fit(X, y)
    with pytest.raises(DataError, match="no gradients"):
        model.predict_distribution(torch.as_tensor(X).requires_grad_())
    with pytest.raises(NotSupportedError, match="skops"):
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(NotSupportedError, match="each point"):
        model.sample_functions(X)


@pytest.mark.parametrize("model", [SMALL[0], SMALL[1]], ids=lambda model: type(model).__name__)
def test_saved_and_loaded_predicts_the_same(model, tmp_path):
    X, y = data(60)
    model.fit(X, y).save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model")
    for a, b in zip(again.predict(X, True), model.predict(X, True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_deep_ensemble_classifier(tmp_path):
    X, y = data()
    labels = np.where(y > 10, "high", "low")
    model = DeepEnsembleClassifier(n_members=3, epochs=300).fit(X, labels)
    assert model.score(*(data(seed=1)[0], np.where(data(seed=1)[1] > 10, "high", "low"))) > 0.85
    assert model.sample_functions(X[:4], 6).shape == (6, 4, 2)
    model.save_pretrained(tmp_path / "model")
    again = DeepEnsembleClassifier.from_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))


def test_bad_settings():
    with pytest.raises(DataError, match="n_members"):
        DeepEnsembleRegressor(n_members=0).fit(*data(60))
    with pytest.raises(DataError, match="n_inducing"):
        SparseGP(n_inducing=0).fit(*data(60))
