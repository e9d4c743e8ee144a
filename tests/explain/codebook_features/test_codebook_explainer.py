"""The classifier with a codebook: scikit-learn's checks, additive reasons, interventions, saving."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks

from paperback.errors import ArtefactError, DataError
from paperback.explain.codebook_features import CodebookExplainer, CodebookModel
from paperback.testing import check_explainer


@parametrize_with_checks(
    [CodebookExplainer((16, 8), groups=2, n_codes=8, dense_epochs=8, epochs=4, batch_size=32)]
)
def test_estimator_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X_train, X_test, y_train, y_test = train_test_split(X, y, test_size=0.3, random_state=0)
    model = CodebookExplainer(dense_epochs=6, epochs=6, image_shape=(8, 8)).fit(X_train, y_train)
    return model, X_test, y_test


def test_digits_are_read_through_four_codes_each(digits):
    model, X, y = digits
    assert model.score(X, y) > 0.93
    assert model.codes(X).shape == (len(X), 4, 1)


def test_contributions_add_up_to_the_scores_that_decide(digits):
    model, X, _ = digits
    explanation = model.explain(X[:50])
    assert (explanation.prediction == model.predict(X[:50])).all()
    np.testing.assert_allclose(explanation.scores, model.decision_function(X[:50]), rtol=1e-4, atol=1e-4)
    used = (explanation.contributions != 0).any(1).sum(1)
    assert (used == 4).all()
    assert explanation.kind == "image"
    assert len(explanation.pictures) > 20  # of the codes that training rows have too
    explanation.plot(0)


def test_a_row_with_the_codes_of_another_is_classified_like_it(digits):
    model, X, _ = digits
    codes = model.codes(X[:40])
    for row in (3, 17):
        forced = {(group, int(code)): True for group, code in enumerate(codes[row].flatten())}
        assert (model.intervene(X[:40], forced) == model.predict(X[row : row + 1])[0]).all()


def test_a_banned_code_is_not_used(digits):
    model, X, _ = digits
    group, code = 2, int(model.codes(X[:1])[0, 2, 0])
    predicted = model.intervene(X[:30], {(group, code): False})
    untouched = model.codes(X[:30])[:, group, 0] != code
    assert (predicted[untouched] == model.predict(X[:30])[untouched]).all()
    with pytest.raises(DataError, match="no code 99"):
        model.intervene(X[:1], {(0, 99): True})
    with pytest.raises(DataError, match="no group 9"):
        model.intervene(X[:1], {(9, 0): True})


def test_save_and_load(tmp_path):
    X, y = load_wine(return_X_y=True, as_frame=True)
    labels = np.array(["barolo", "grignolino", "barbera"])[y]
    model = CodebookExplainer((12,), groups=3, n_codes=5, k=2, dense_epochs=5, epochs=3).fit(X, labels)
    model.save_pretrained(tmp_path / "wine")
    loaded = CodebookExplainer.from_pretrained(tmp_path / "wine")
    assert (loaded.predict_proba(X) == model.predict_proba(X)).all()
    assert (loaded.predict(X) == model.predict(X)).all()
    assert loaded.get_params() == model.get_params()
    assert loaded.explain(X).columns == tuple(X.columns)
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(pd.DataFrame({"a": [1.0]}))
    loaded.network_.save_pretrained(tmp_path / "bare")
    with pytest.raises(ArtefactError, match="no CodebookExplainer"):
        CodebookExplainer.from_pretrained(tmp_path / "bare")
    assert isinstance(loaded.network_, CodebookModel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": ()}, "one hidden layer"),
        ({"hidden": (10,), "groups": 4}, "groups must divide"),
        ({"k": 0}, "k is 0"),
        ({"k": 9, "n_codes": 8}, "k is 9 and n_codes 8"),
        ({"image_shape": (3, 5)}, "has 13 values"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message):
        CodebookExplainer(**arguments).fit(*load_wine(return_X_y=True))


def test_one_class_is_none():
    with pytest.raises(DataError, match="one class"):
        CodebookExplainer().fit(np.eye(5), np.zeros(5))


def test_it_behaves_as_every_classifier_of_this_wing():
    X, y = load_wine(return_X_y=True)

    def build(seed):
        return CodebookExplainer((16, 8), groups=2, n_codes=8, dense_epochs=5, epochs=3, seed=seed)

    check_explainer(build, X, y, tolerance=1e-5)
