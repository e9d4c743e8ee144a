"""The mathematics of the naive Bayes probe, its merging, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp
from sklearn.datasets import make_blobs
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from sklearn.utils.estimator_checks import parametrize_with_checks

import paperback
from paperback.errors import DataError, NotSupportedError
from paperback.represent.generative_classifier import NaiveBayesProbe

EXACT = {"var_smoothing": 0.0, "scale": None}


@pytest.fixture(scope="module")
def rows():
    X, y = make_blobs(90, 5, centers=4, cluster_std=3.0, random_state=0)
    return X * [1, 10, 0.1, 1, 1] + [0, 5, 100, 0, -3], y


@parametrize_with_checks(
    [NaiveBayesProbe(), NaiveBayesProbe(shared=False, scale="standard"), NaiveBayesProbe(covariance="full")]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_the_linear_form_is_the_gaussian_posterior(rows):
    X, y = rows
    probe = NaiveBayesProbe(**EXACT).fit(X, y)
    prior = np.bincount(y) / len(y)
    pooled = sum(p * X[y == k].var(0) for k, p in enumerate(prior))
    log = np.stack(
        [
            np.log(prior[k]) + stats.norm(X[y == k].mean(0), np.sqrt(pooled)).logpdf(X).sum(1)
            for k in range(4)
        ],
        axis=1,
    )
    expected = np.exp(log - logsumexp(log, axis=1, keepdims=True))
    np.testing.assert_allclose(probe.predict_proba(X), expected, atol=1e-10)
    paper = np.stack([X[y == k].mean(0) for k in range(4)]) / pooled
    np.testing.assert_allclose(probe.coef_ - probe.coef_[0], paper - paper[0], atol=1e-9)
    layer = probe.to_linear()
    scores = layer(torch.tensor(X))
    np.testing.assert_allclose(scores.softmax(1).numpy(), expected, atol=1e-9)
    assert np.array_equal(scores.argmax(1).numpy(), probe.predict(X))


@pytest.mark.parametrize("scale", ["minmax", "standard", None])
def test_class_variances_are_scikit_learns_gaussian_naive_bayes(rows, scale):
    X, y = rows
    ours = NaiveBayesProbe(shared=False, var_smoothing=0.0, scale=scale).fit(X, y).predict_proba(X)
    theirs = GaussianNB(var_smoothing=0.0).fit(X, y).predict_proba(X)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("scale", ["minmax", None])
def test_a_full_matrix_is_linear_discriminant_analysis(rows, scale):
    X, y = rows
    ours = NaiveBayesProbe(covariance="full", var_smoothing=0.0, scale=scale).fit(X, y)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(X), atol=1e-8)
    np.testing.assert_allclose(ours.var_, theirs.covariance_, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "settings_",
    [{}, {"shared": False}, {"covariance": "full", "floor": 0.1}, {"scale": "standard", "floor": "auto"}],
)
@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 89), max_size=4), seed=st.integers(0, 99))
def test_batches_in_any_order_are_one_fit(rows, settings_, cuts, seed):
    X, y = rows
    order = np.random.default_rng(seed).permutation(len(X))
    if seed % 2:  # batches that lack classes
        order = order[np.argsort(y[order], kind="stable")]
    probe = NaiveBayesProbe(**settings_)
    for part in np.split(order, sorted(set(cuts))):
        probe.partial_fit(X[part], y[part], classes=np.arange(4))
    whole = NaiveBayesProbe(**settings_).fit(X, y)
    np.testing.assert_allclose(probe.var_, whole.var_, rtol=1e-9)
    np.testing.assert_allclose(probe.theta_, whole.theta_, rtol=1e-9)
    np.testing.assert_allclose(probe.predict_proba(X), whole.predict_proba(X), atol=1e-8)


def test_a_class_may_come_later(rows):
    X, y = rows
    old = y != 2
    probe = NaiveBayesProbe().fit(X[old], y[old])
    before = dict(zip(probe.classes_, probe.theta_, strict=True))
    probe.partial_fit(X[~old], y[~old])
    after = dict(zip(probe.classes_, probe.theta_, strict=True))
    assert list(probe.classes_) == [0, 1, 2, 3]
    assert all(np.array_equal(before[k], after[k]) for k in (0, 1, 3))
    np.testing.assert_allclose(
        probe.predict_proba(X), NaiveBayesProbe().fit(X, y).predict_proba(X), atol=1e-9
    )


def test_a_declared_class_without_rows_has_probability_zero(rows):
    X, y = rows
    probe = NaiveBayesProbe().partial_fit(X, y, classes=[0, 1, 2, 3, 9])
    p = probe.predict_proba(X)
    assert p.shape == (90, 5)
    assert (p[:, 4] == 0).all()
    np.testing.assert_allclose(p[:, :4], NaiveBayesProbe().fit(X, y).predict_proba(X), atol=1e-12)


def test_affine_maps_and_the_order_of_features_change_nothing(rows):
    X, y = rows
    expected = NaiveBayesProbe(var_smoothing=0.0).fit(X, y).predict_proba(X)
    moved = X * [3, -2, 0.5, 1e4, 1e-4] + [1, 2, 3, 4, 5]
    np.testing.assert_allclose(
        NaiveBayesProbe(var_smoothing=0.0).fit(moved, y).predict_proba(moved), expected, atol=1e-9
    )
    np.testing.assert_allclose(
        NaiveBayesProbe().fit(X[:, ::-1], y).predict_proba(X[:, ::-1]),
        NaiveBayesProbe().fit(X, y).predict_proba(X),
        atol=1e-9,
    )


def test_the_risk_is_the_closed_form():
    """Two isotropic Gaussians at a distance delta: the error nears Phi(-delta / 2)."""
    rng, delta, m = np.random.default_rng(0), 2.0, 100_000
    y = rng.integers(0, 2, 2 * m)
    X = rng.standard_normal((2 * m, 4)) + np.outer(y, [delta, 0, 0, 0])
    error = 1 - NaiveBayesProbe().fit(X[:m], y[:m]).score(X[m:], y[m:])
    risk = stats.norm.cdf(-delta / 2)
    assert abs(error - risk) < 4 * np.sqrt(risk * (1 - risk) / m)


def test_the_floor(rows):
    X, y = rows
    one_each = [int(np.argmax(y == k)) for k in range(4)]
    few = NaiveBayesProbe(floor="auto").fit(X[one_each], y[one_each])
    assert np.isfinite(few.decision_function(X)).all()
    assert few._floor() == 0.5
    assert NaiveBayesProbe(floor="auto").fit(X, y)._floor() == pytest.approx(4 / 90)
    whole = NaiveBayesProbe(floor=1.0, scale=None).fit(X, y)
    assert np.ptp(whole.var_) == 0
    centred = -((X[:, None] - whole.theta_) ** 2).sum(-1) / (2 * whole.var_[0])
    expected = (centred + np.log(whole.class_count_ / 90)).argmax(1)
    assert np.array_equal(whole.predict(X), expected)


def test_the_diagnosis_tells_dependence_from_independence():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    shift = np.where(y[:, None] == 1, 1.0, -1.0)
    alone = rng.standard_normal((4000, 6)) * [1, 2, 1, 2, 1, 1] + shift
    told = NaiveBayesProbe(scale=None).fit(alone, y).diagnose(alone, y)
    np.testing.assert_allclose(told.sigma, [1, 2, 1, 2, 1, 1], rtol=0.05)
    # Of two classes at distance 2: KL is 2 / sigma^2 in each feature, the variance of the difference 4.
    assert told.divergence == pytest.approx(np.mean([2, 0.5, 2, 0.5, 2, 2]), rel=0.1)
    np.testing.assert_allclose(told.variances, [4, 1, 4, 1, 4, 4], rtol=0.15)
    assert told.dependence == pytest.approx(1, abs=0.15)
    same = np.repeat(alone[:, :1], 6, axis=1)
    assert NaiveBayesProbe(scale=None).fit(same, y).diagnose(same, y).dependence == pytest.approx(6)


def test_tensors_are_taken(rows):
    X, y = rows
    probe = NaiveBayesProbe().fit(torch.tensor(X), torch.tensor(y))
    assert np.array_equal(probe.predict(torch.tensor(X)), NaiveBayesProbe().fit(X, y).predict(X))


@pytest.mark.parametrize("settings_", [{}, {"shared": False}, {"covariance": "full"}])
def test_save_and_load(rows, settings_, tmp_path):
    X, y = rows
    words = np.array(["a", "b", "c", "d"])[y]
    probe = NaiveBayesProbe(**settings_).fit(X, words)
    probe.save_pretrained(tmp_path / "probe")
    loaded = paperback.load(tmp_path / "probe")
    assert np.array_equal(loaded.predict_proba(X), probe.predict_proba(X))
    assert list(loaded.partial_fit(X, words).class_count_) == list(2 * probe.class_count_)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"var_smoothing": -1.0}, "var_smoothing is -1"),
        ({"floor": 1.5}, "floor is 1.5"),
        ({"floor": "low"}, "floor is 'low'"),
        ({"covariance": "round"}, "covariance is 'round'"),
        ({"covariance": "full", "shared": False}, "shared=True"),
        ({"scale": "log"}, "scale is 'log'"),
    ],
)
def test_bad_arguments(rows, settings_, message):
    with pytest.raises(DataError, match=message):
        NaiveBayesProbe(**settings_).fit(*rows)


def test_bad_rows(rows):
    X, y = rows
    constant = X.copy()
    constant[:, [1, 3]] = 7.0
    with pytest.raises(DataError, match=r"column\(s\) 1, 3"):
        NaiveBayesProbe(var_smoothing=0.0).fit(constant, y)
    with pytest.raises(DataError, match=r"column\(s\) 1, 3"):
        NaiveBayesProbe(var_smoothing=0.0, shared=False).fit(constant, y)
    assert NaiveBayesProbe().fit(constant, y).score(constant, y) > 0.5
    with pytest.raises(DataError, match="singular"):
        NaiveBayesProbe(var_smoothing=0.0, covariance="full", scale=None).fit(X[:4], y[:4])
    with pytest.raises(ValueError, match="NaN"):
        NaiveBayesProbe().fit(np.where(X[0, 0] == X, np.nan, X), y)
    probe = NaiveBayesProbe().fit(X, y)
    with pytest.raises(ValueError, match="5 features"):
        probe.partial_fit(X[:, 1:], y)
    with pytest.raises(DataError, match="labels of the fitted classes"):
        probe.diagnose(X, y + 1)
    quadratic = NaiveBayesProbe(shared=False).fit(X, y)
    with pytest.raises(NotSupportedError, match="shared=True"):
        quadratic.to_linear()
    with pytest.raises(NotSupportedError, match="diag"):
        quadratic.diagnose(X, y)
    with pytest.raises(AttributeError, match="shared=True"):
        quadratic.coef_  # noqa: B018
