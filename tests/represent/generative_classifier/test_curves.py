"""Logistic regression, sample curves, and the choice between the probes."""

from typing import ClassVar

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

import paperback
from paperback.errors import DataError
from paperback.represent.generative_classifier import (
    Curve,
    LogisticProbe,
    NaiveBayesProbe,
    choose_probe,
    sample_curve,
    samples_to_converge,
)


@pytest.fixture(scope="module")
def rows():
    X, y = make_blobs(240, 4, centers=3, cluster_std=4.0, random_state=1)
    return X * [1, 10, 0.1, 1] + 3, y


@parametrize_with_checks([LogisticProbe()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_form_is_scikit_learns_on_scaled_features(rows, classes):
    X, y = rows
    X, y = X[y < classes], y[y < classes]
    scaled = (X - X.min(0)) / np.ptp(X, axis=0)
    theirs = LogisticRegression(max_iter=1000).fit(scaled, y)
    ours = LogisticProbe().fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X), theirs.predict_proba(scaled), atol=1e-9)
    np.testing.assert_allclose(ours.decision_function(X), theirs.decision_function(scaled), atol=1e-8)


def test_cross_validation_chooses_c(rows):
    X, y = rows[0][:60], rows[1][:60]
    probe = LogisticProbe(C="cv").fit(X, y)
    assert probe.tried_[int(np.argmax(probe.cv_accuracy_))] == probe.C_
    assert max(probe.cv_accuracy_) > 0.5
    with pytest.raises(DataError, match="two rows of each class"):
        LogisticProbe(C="cv").fit(X[:4], [0, 0, 0, 1])


def test_stochastic_descent_nears_the_unpenalised_optimum(rows):
    X, y = np.repeat(rows[0][:120], 16, axis=0), np.repeat(rows[1][:120], 16)
    ours = LogisticProbe(solver="sgd", lr=3.0).fit(X, y)
    scaled = (X - X.min(0)) / np.ptp(X, axis=0)
    best = LogisticRegression(C=np.inf, max_iter=5000).fit(scaled, y)
    np.testing.assert_allclose(ours.predict_proba(X), best.predict_proba(scaled), atol=0.03)


def test_save_and_load(rows, tmp_path):
    probe = LogisticProbe().fit(*rows)
    probe.save_pretrained(tmp_path / "probe")
    loaded = paperback.load(tmp_path / "probe")
    assert np.array_equal(loaded.predict_proba(rows[0]), probe.predict_proba(rows[0]))


@pytest.mark.parametrize("settings_", [{"C": 0.0}, {"C": "best"}, {"scale": "log"}, {"solver": "newton"}])
def test_bad_arguments(rows, settings_):
    with pytest.raises(DataError, match="must be"):
        LogisticProbe(**settings_).fit(*rows)
    with pytest.raises(DataError, match="one class"):
        LogisticProbe().fit(rows[0], np.zeros(240))


def test_the_curve_gives_both_probes_the_same_nested_rows(rows):
    X, y = rows

    class Spy(NaiveBayesProbe):
        seen: ClassVar = []

        def fit(self, X, y):
            Spy.seen.append((X.copy(), y.copy()))
            return super().fit(X, y)

    curve = sample_curve(Spy(), X, y, X, y, sizes=(24, 3, 240), repeats=2, seed=5)
    assert curve.sizes == (3, 24, 240)
    assert curve.errors.shape == (3, 2)
    first, second, all_ = Spy.seen[:3]
    assert sorted(first[1]) == [0, 1, 2]
    assert np.array_equal(second[0][:3], first[0])
    assert sorted(map(tuple, all_[0])) == sorted(map(tuple, X))
    seen, Spy.seen = Spy.seen, []
    sample_curve(Spy(), X, y, X, y, sizes=(3, 24, 240), repeats=2, seed=5)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(seen, Spy.seen, strict=True))
    assert not np.array_equal(seen[0][0], seen[3][0])
    exact = NaiveBayesProbe().fit(X, y)
    np.testing.assert_allclose(curve.errors[-1], 1 - exact.score(X, y))


def test_samples_to_converge():
    curve = Curve((4, 8, 16, 32), np.array([[0.5, 0.3], [0.2, 0.2], [0.11, 0.11], [0.1, 0.1]]))
    assert samples_to_converge(curve) == 16
    assert samples_to_converge(curve, eps=0.15) == 8
    assert samples_to_converge(curve, asymptote=0.0) is None
    assert samples_to_converge(curve, eps=0.1, asymptote=0.0) == 32


@pytest.mark.parametrize("sizes", [(2,), (241,), ()])
def test_sizes_must_hold_all_classes(rows, sizes):
    with pytest.raises(DataError, match="between 3, the number of classes, and 240"):
        sample_curve(NaiveBayesProbe(), *rows, *rows, sizes=sizes)
    with pytest.raises(DataError, match="repeats is 0"):
        sample_curve(NaiveBayesProbe(), *rows, *rows, sizes=(3,), repeats=0)


def test_the_better_probe_is_chosen():
    """Naive Bayes where its model is true and rows are few; logistic regression where features repeat."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20)
    true = rng.standard_normal((40, 100)) + np.where(y[:, None] == 1, 0.2, -0.2)
    found = choose_probe(true, y)
    assert isinstance(found.probe, NaiveBayesProbe)
    assert found.log_losses["naive Bayes"] < found.log_losses["logistic regression"]
    y = np.repeat([0, 1], 200)
    one = rng.standard_normal((400, 1)) + np.where(y[:, None] == 1, 0.7, -0.7)
    repeated = choose_probe(np.repeat(one, 30, axis=1) + 0.01 * rng.standard_normal((400, 30)), y)
    assert isinstance(repeated.probe, LogisticProbe)
    with pytest.raises(DataError, match="two rows of each"):
        choose_probe(true[:3], [0, 0, 1])
