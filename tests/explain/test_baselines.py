"""The baselines: explanations that add up, certificates that hold and are as large as they can be."""

import itertools
import sys

import numpy as np
import pytest
import torch
from sklearn import linear_model
from sklearn.datasets import load_digits, make_blobs
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import estimator_checks_generator

import paperback
from paperback.errors import DataError, MissingExtraError, NotSupportedError
from paperback.explain.baselines import (
    GLVQ,
    SVM,
    DecisionTree,
    LogisticRegression,
    NearestNeighbours,
    integrated_gradients,
)
from paperback.study.stress import boundary_line_attack, projected_gradient_attack
from paperback.testing.explain import EXPLAIN_CHECKS, ExplainCase

BUILDERS = {
    "linear": lambda seed=0: LogisticRegression(),
    "tree": lambda seed=0: DecisionTree(max_depth=4, seed=seed),
    "1-nn": lambda seed=0: NearestNeighbours(1),
    "4-nn": lambda seed=0: NearestNeighbours(4),
    "glvq": lambda seed=0: GLVQ(2, epochs=5, seed=seed),
    "glvq-margin": lambda seed=0: GLVQ(2, loss="margin", epochs=5, seed=seed),
    "svm": lambda seed=0: SVM(),
}
CERTIFIED = [name for name in BUILDERS if name != "svm"]


def blobs(n=90, features=3, centers=3, seed=0):
    X, y = make_blobs(n, features, centers=centers, cluster_std=2.5, random_state=seed)
    return X, y


CASES = {name: ExplainCase(build, *blobs()) for name, build in BUILDERS.items()}
TWO_CLASSES = {name: ExplainCase(build, *blobs(centers=2)) for name, build in BUILDERS.items()}


@pytest.mark.parametrize("check", EXPLAIN_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", BUILDERS)
def test_the_behaviour_of_the_wing(name, check):
    check(CASES[name])


@pytest.mark.parametrize("name", BUILDERS)
def test_two_classes_have_two_scores(name):
    for check in EXPLAIN_CHECKS[1:7]:
        check(TWO_CLASSES[name])


def scikit_checks():
    for name, build in BUILDERS.items():
        for estimator, check in estimator_checks_generator(build()):
            yield pytest.param(estimator, check, id=f"{name}-{check.func.__name__}")


@pytest.mark.parametrize(("estimator", "check"), list(scikit_checks()))
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X = X / 16
    return X[:1000], y[:1000], X[1000:1400], y[1000:1400]


def test_predictions_agree_with_scikit_learn(digits):
    X, y, X_test, _ = digits
    mean, scale = X.mean(0), np.sqrt(X.var(0).mean())
    reference = linear_model.LogisticRegression(C=0.1, max_iter=1000).fit((X - mean) / scale, y)
    ours = LogisticRegression(0.1).fit(X, y)
    expected = reference.predict_proba((X_test - mean) / scale)
    np.testing.assert_allclose(ours.predict_proba(X_test), expected, atol=1e-6)
    tree = DecisionTreeClassifier(max_depth=6, random_state=3).fit(X, y)
    np.testing.assert_allclose(
        DecisionTree(6, seed=3).fit(X, y).predict_proba(X_test), tree.predict_proba(X_test)
    )
    neighbours = KNeighborsClassifier(3).fit(X, y)
    np.testing.assert_allclose(
        NearestNeighbours(3).fit(X, y).predict_proba(X_test), neighbours.predict_proba(X_test)
    )
    machine = SVC(C=5, gamma=2 / (64 * X.var())).fit(X[:, :], y == 3)
    ours = SVM(5, gamma=2).fit(X, y)
    decision = machine.decision_function(X_test)
    np.testing.assert_allclose(ours.scores(torch.tensor(X_test))[:, 3].numpy(), decision, atol=1e-8)


@pytest.mark.parametrize(
    ("model", "least"),
    [
        (LogisticRegression(0.1), 0.90),
        (DecisionTree(12), 0.75),
        (NearestNeighbours(1), 0.95),
        (GLVQ(4, epochs=30), 0.93),
        (GLVQ(4, loss="margin", epochs=30), 0.93),
        (SVM(), 0.96),
    ],
    ids=lambda value: type(value).__name__,
)
def test_they_are_good_classifiers_of_digits(digits, model, least):
    X, y, X_test, y_test = digits
    assert model.fit(X, y).score(X_test, y_test) >= least


@pytest.mark.parametrize("name", CERTIFIED)
def test_certificates_hold_against_a_grid(name):
    """No point of a fine grid of the plane within the radius is classified otherwise."""
    X, y = blobs(60, 2)
    model = BUILDERS[name]().fit(X, y)
    axis = np.linspace(-1, 1, 61)
    disc = np.array([p for p in itertools.product(axis, axis) if np.hypot(*p) <= 1])
    radii = np.minimum(model.certify(X), 10.0)
    points = X[:, None] + 0.9999 * radii[:, None, None] * disc
    labels = model.predict(points.reshape(-1, 2)).reshape(len(X), -1)
    assert (labels == model.predict(X)[:, None]).all()
    assert (radii > 0).mean() > 0.5


@pytest.mark.parametrize("name", ["linear", "tree", "glvq"])
def test_certificates_are_nearly_as_large_as_can_be(name):
    """An exact certificate (linear, tree): 1.02 times the radius is enough to be classified otherwise. With
    nearest prototypes in the plane it mostly is."""
    X, y = blobs(60, 2)
    model = BUILDERS[name]().fit(X, y)
    angles = np.linspace(0, 2 * np.pi, 2000)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    radii = model.certify(X)
    kept = np.flatnonzero((radii > 1e-3) & (radii < 100))
    points = X[kept, None] + (1.02 * radii[kept, None, None] + 1e-5) * circle
    labels = model.predict(points.reshape(-1, 2)).reshape(len(kept), -1)
    broken = (labels != model.predict(X[kept])[:, None]).any(1)
    assert broken.mean() > (0.6 if name == "glvq" else 0.9999)


@pytest.mark.parametrize("name", ["linear", "glvq", "glvq-margin"])
def test_the_gradient_finds_nothing_within_and_something_beyond(digits, name):
    X, y, X_test, _ = digits
    model = BUILDERS[name]().fit(X, y)
    rows, labels = torch.tensor(X_test[:100]), torch.tensor(model.predict(X_test[:100]))
    radii = torch.tensor(model.certify(X_test[:100]))
    draw = torch.Generator().manual_seed(0)
    for attack, settings in ((projected_gradient_attack, {"steps": 20}), (boundary_line_attack, {})):
        within = attack(model.scores, rows, labels, radius=0.9999 * radii, generator=draw, **settings)
        assert torch.equal(model.scores(within).argmax(1), labels)
    beyond = projected_gradient_attack(
        model.scores, rows, labels, radius=1.5 * radii, restarts=10, generator=draw
    )
    assert (model.scores(beyond).argmax(1) != labels).double().mean() > 0.95


def test_the_certificate_of_glvq_is_never_below_the_hypothesis_margin():
    X, y = blobs(80, 4)
    model = GLVQ(3, epochs=5).fit(X, y)
    distances = np.linalg.norm(X[:, None] - model.prototypes_, axis=2).reshape(len(X), 3, 3).min(2)
    row = np.arange(len(X))
    own = distances[row, y]
    distances[row, y] = np.inf
    margin = (distances.min(1) - own) / 2
    radii = model.certify(X, y)
    right = model.predict(X) == y
    assert (radii[right] >= margin[right] - 1e-5).all()
    assert (radii[right] > margin[right] + 1e-3).mean() > 0.5
    assert ((margin > 0) == right).all()


def test_the_certificate_of_neighbours_by_hand():
    model = NearestNeighbours(1).fit([[0.0], [1.0], [5.0]], ["a", "a", "b"])
    np.testing.assert_allclose(model.certify([[1.5], [5.0]]), [1.5, 2.0], atol=1e-5)
    three = NearestNeighbours(3).fit([[0.0], [1.0], [5.0]], ["a", "a", "b"])
    # a has two of three votes wherever; its second nearest row always counts, b has no second row
    assert (three.certify([[0.5], [4.0]]) == np.inf).all()
    assert three.certify([[0.5]], ["b"])[0] <= 0


def test_a_tree_is_explained_by_its_way_down():
    X = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]] * 5)
    y = np.array([0, 0, 0, 1] * 5)
    found = DecisionTree().fit(X, y).explain([[1.0, 1.0], [0.0, 1.0]])
    np.testing.assert_allclose(found.offsets[0], [0.75, 0.25])
    # first split: shares of class 1 go from 1/4 to 1/2 or 0; second from 1/2 to 1
    np.testing.assert_allclose(sorted(found.contributions[0, 1]), [0.25, 0.5])
    np.testing.assert_allclose(found.scores[0], [0, 1])
    assert found.certificates[0] == pytest.approx(0.5, abs=1e-6)


def test_counterexamples_of_a_tree_are_the_radius_away_and_classified_otherwise():
    X, y = blobs(80, 4)
    model = DecisionTree(5).fit(X, y)
    found = model.counterexamples(X)
    assert (model.predict(found) != model.predict(X)).all()
    np.testing.assert_allclose(np.linalg.norm(found - X, axis=1), model.certify(X), atol=1e-5)
    stump = DecisionTree(min_samples_leaf=80).fit(X, y)
    np.testing.assert_array_equal(stump.counterexamples(X), X)


def test_neighbours_are_the_parts_of_their_explanation():
    X, y = blobs(50, 2)
    model = NearestNeighbours(3).fit(X, y)
    found = model.explain(X[:7])
    assert (np.count_nonzero(found.contributions.sum(1), axis=1) == 3).all()
    reference = KNeighborsClassifier(3).fit(X, y).kneighbors(X[:7])[1]
    for row, expected in enumerate(reference):
        parts = [found.parts[k] for k in np.flatnonzero(found.contributions[row].sum(0))]
        assert {int(part.split()[2]) for part in parts} == set(expected)
        np.testing.assert_array_equal(found.pictures[parts[0]], X[int(parts[0].split()[2])])


def test_integrated_gradients_of_a_polynomial_by_hand():
    """s = x0^2 x1 from 0: along t x the derivatives are 2 t^2 x0 x1 and t^2 x0^2, so 2/3 and 1/3 of s."""
    X = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    found = integrated_gradients(lambda x: x[:, 0] ** 2 * x[:, 1], X, torch.zeros(2))
    s = X[:, 0] ** 2 * X[:, 1]
    torch.testing.assert_close(found, torch.stack([2 * s / 3, s / 3], 1))


def test_integrated_gradients_of_a_machine_add_up_to_the_difference_from_the_mean(digits):
    X, y, X_test, _ = digits
    model = SVM().fit(X, y)
    found = model.explain(X_test[:20])
    reference = model.scores(torch.tensor(X.mean(0))[None]).numpy()
    np.testing.assert_allclose(found.offsets, np.repeat(reference, 20, 0), atol=1e-3)


def test_scores_that_go_with_the_rows_have_arguments():
    X, which = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    found = integrated_gradients(
        lambda x, i: x.gather(1, i[:, None])[:, 0], X, torch.zeros(3), arguments=(which,)
    )
    torch.testing.assert_close(found, X * torch.nn.functional.one_hot(which, 3))


def test_without_captum_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(MissingExtraError, match=r"paperback\[explain\]"):
        integrated_gradients(lambda x: x.sum(1), torch.zeros(1, 2), torch.zeros(2))


def test_a_ceiling_gives_no_guarantee():
    with pytest.raises(NotSupportedError, match="GLVQ"):
        SVM().fit(*blobs()).certify(blobs()[0])


@pytest.mark.parametrize("name", BUILDERS)
def test_paperback_loads_a_baseline_without_being_told_its_class(name, tmp_path):
    X, y = blobs()
    model = BUILDERS[name]().fit(X, y)
    model.save_pretrained(tmp_path / "model")
    loaded = paperback.load(tmp_path / "model")
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize("name", BUILDERS)
def test_images_are_drawn(name):
    X, y = blobs(40, 4)
    model = BUILDERS[name]().set_params(image_shape=(2, 2)).fit(X, y)
    found = model.explain(X[:2])
    assert found.kind == "image"
    found.plot(0)
    if name in ("linear", "tree", "svm"):
        assert found.parts == ("pixel 0, 0", "pixel 0, 1", "pixel 1, 0", "pixel 1, 1")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (NearestNeighbours(0), "n_neighbors is 0"),
        (NearestNeighbours(91), "90 training rows"),
        (GLVQ(0), "n_prototypes is 0"),
        (GLVQ(loss="nll"), "loss is 'nll'"),
        (GLVQ(loss="margin", margin=-1.0), "margin is -1.0"),
        (SVM(gamma=0), "gamma is 0"),
        (LogisticRegression(image_shape=(2, 2)), "image_shape"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model, words):
    with pytest.raises(DataError, match=words):
        model.fit(*blobs())


def test_labels_that_were_never_seen_have_no_radius():
    X, y = blobs()
    with pytest.raises(DataError, match="label"):
        NearestNeighbours().fit(X, y).certify(X, y + 7)
    for steps, reference in ((0, torch.zeros(2)), (4, torch.zeros(3))):
        with pytest.raises(DataError, match="reference"):
            integrated_gradients(lambda x: x.sum(1), torch.zeros(1, 2), reference, steps=steps)
