"""The classifier: scikit-learn's checks, reasons that add up, guarantees, interventions, files, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import paperback
import paperback.explain.prototype_rbf.classifier as rooms
from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.explain import Explanation
from paperback.explain.prototype_rbf import CBCHead, RBFPrototypeClassifier
from paperback.explain.prototype_rbf.network import METRICS
from paperback.testing.explain import check_explainer

FAST = {"epochs": 15, "n_components": 3}
KINDS = [
    {},
    {"loss": "margin"},
    {"negative": False},
    {"head": "original"},
    {"head": "rbf"},
    {"kernel": "gaussian"},
    {"sigma": "per-component"},
    {"vectors_per_class": 2},
    {"metric": "manhattan"},
    {"metric": "chebyshev", "kernel": "gaussian"},
    {"metric": "cosine"},
    {"metric": "sqeuclidean"},
]
IDS = ["-".join(map(str, k.values())) or "default" for k in KINDS]


# No check is expected to fail; the one for the array API is skipped by scikit-learn itself.
@parametrize_with_checks(
    [
        RBFPrototypeClassifier(epochs=20),
        RBFPrototypeClassifier(2, epochs=20, loss="margin", vectors_per_class=2),
    ]
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_the_checks_of_the_wing(kind, blobs):
    rows, labels = blobs[0][:60], blobs[1][:60]
    norm = METRICS.get(kind.get("metric", "euclidean"), 2)
    check_explainer(
        lambda seed: RBFPrototypeClassifier(2, epochs=4, seed=seed, **kind), rows, labels, norm=norm
    )


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_every_kind_learns_and_explains_what_it_predicts(kind, blobs):
    rows, labels, test, truth = blobs
    names = np.array(["ant", "bee", "cow", "dog"])
    model = RBFPrototypeClassifier(**FAST, **kind).fit(rows, names[labels])
    assert model.score(test, names[truth]) > (0.6 if kind.get("metric") == "cosine" else 0.85)
    found = model.explain(test)
    assert isinstance(found, Explanation)
    np.testing.assert_array_equal(found.prediction, model.predict(test))
    np.testing.assert_allclose(found.scores, model.agreement(test), rtol=1e-12)
    np.testing.assert_allclose(found.contributions.sum(2) + found.offsets, found.scores)
    shares = model.predict_proba(test)
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[shares.argmax(1)], model.predict(test))
    assert (found.certificates is not None) == (kind.get("metric", "euclidean") in METRICS)


def test_contributions_are_reasons_for_presence_and_absence(blobs):
    rows, labels, test, _ = blobs
    model = RBFPrototypeClassifier(**FAST).fit(rows, labels)
    found, d = model.explain(test), model.detections(test)
    positive, negative = model.reasoning_
    np.testing.assert_allclose((positive + negative).sum(0), 1)
    for c in range(4):
        np.testing.assert_allclose(found.contributions[:, c, :12], d * positive[:, c])
        np.testing.assert_allclose(found.contributions[:, c, 12:], (1 - d) * negative[:, c])
    assert found.parts[0] == "component 0 present"
    assert found.parts[12] == "component 0 absent"
    np.testing.assert_array_equal(found.pictures["component 5 absent"], model.components_[5])


@pytest.mark.parametrize("kind", KINDS[:10], ids=IDS[:10])
def test_the_sign_of_a_certificate_is_whether_the_label_is_predicted(kind, blobs):
    rows, labels, test, truth = blobs
    model = RBFPrototypeClassifier(**FAST, **kind).fit(rows, labels)
    right = model.predict(test) == truth
    for tight in (True, False):
        radii = model.certify(test, truth, tight=tight)
        np.testing.assert_array_equal(radii > 0, right)
        own = model.certify(test, tight=tight)
        assert (own >= 0).all()
        np.testing.assert_array_equal(own[right], radii[right])
    assert (model.certify(test) >= model.certify(test, tight=False) - 1e-9).all()


@pytest.mark.parametrize("kind", KINDS[:10], ids=IDS[:10])
def test_no_random_step_within_the_certificate_changes_the_prediction(kind, blobs):
    rows, labels, test, _ = blobs
    model = RBFPrototypeClassifier(**FAST, **kind).fit(rows, labels)
    radii, before = model.certify(test), model.predict(test)
    p = METRICS[model.metric]
    for seed in range(40):
        steps = np.random.default_rng(seed).normal(size=test.shape)
        if seed % 2:  # towards a row of another class
            steps = rows[np.random.default_rng(seed).integers(len(rows), size=len(test))] - test
        steps *= (radii / np.linalg.norm(steps, ord=p, axis=1))[:, None] * (1 - 1e-9)
        np.testing.assert_array_equal(model.predict(test + steps), before)


def test_all_results_scale_with_the_data(blobs):
    rows, labels, test, _ = blobs
    for kind in ({}, {"kernel": "gaussian"}, {"metric": "manhattan"}):
        model = RBFPrototypeClassifier(**FAST, **kind).fit(rows, labels)
        other = RBFPrototypeClassifier(**FAST, **kind).fit(1024 * rows, labels)
        np.testing.assert_allclose(other.agreement(1024 * test), model.agreement(test), rtol=1e-6)
        np.testing.assert_allclose(other.certify(1024 * test), 1024 * model.certify(test), rtol=1e-5)


def test_a_certificate_of_detections_that_underflow_follows_predict():
    """A row 10,000 sigma away from everything has no agreement as a float, and no guarantee."""
    rows = np.array([[0.0], [0.1], [1.0], [1.1]])
    model = RBFPrototypeClassifier(1, negative=False, epochs=1).fit(rows, [0, 0, 1, 1])
    far = np.array([[1e5]])
    assert model.agreement(far).max() == 0
    assert model.predict(far) == [0]
    np.testing.assert_array_equal(model.predict_proba(far), [[0.5, 0.5]])
    assert model.certify(far) == [0]
    assert model.certify(far, [1]) == [0]
    assert model.explain(far).prediction == [0]


def test_interventions_replace_detections(blobs):
    rows, labels, test, _ = blobs
    model = RBFPrototypeClassifier(**FAST).fit(rows, labels)
    d = model.detections(test)
    np.testing.assert_array_equal(model.intervene(test, {}), model.predict(test))
    forced = {k: float(k // 3 == 2) for k in range(12)}  # the components that class 2 started with
    assert (model.intervene(test, forced) == 2).all()
    d[:, [0, 7]] = [1.0, 0.25]
    positive, negative = model.reasoning_
    expected = (d @ positive + (1 - d) @ negative).argmax(1)
    np.testing.assert_array_equal(model.intervene(test, {0: 1.0, 7: 0.25}), expected)


def test_the_counterfactual_direction_leads_to_the_runner_up(blobs):
    rows, labels, test, _ = blobs
    model = RBFPrototypeClassifier(**FAST).fit(rows, labels)
    direction, scores = model.counterfactual(test), np.sort(model.agreement(test), 1)
    np.testing.assert_allclose(np.linalg.norm(direction, axis=1), 1)
    moved = np.sort(model.agreement(test + 1e-4 * direction), 1)
    assert (moved[:, -1] - moved[:, -2] < scores[:, -1] - scores[:, -2]).all()


def test_the_robust_loss_widens_the_radii(blobs):
    rows, labels, test, truth = blobs
    radii = [
        RBFPrototypeClassifier(epochs=40, loss=loss).fit(rows, labels).certify(test, truth, tight=False)
        for loss in ("robust", "margin")
    ]
    assert np.median(radii[0]) > np.median(radii[1])


def test_the_same_seed_gives_the_same_and_the_users_random_state_stays(blobs):
    rows, labels, test, _ = blobs
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = RBFPrototypeClassifier(**FAST, seed=3).fit(rows, labels)
    assert torch.rand(1) == expected
    again, other = clone(first).fit(rows, labels), RBFPrototypeClassifier(**FAST, seed=4).fit(rows, labels)
    np.testing.assert_array_equal(first.agreement(test), again.agreement(test))
    assert not np.array_equal(first.agreement(test), other.agreement(test))


def test_many_rows_give_what_single_rows_give(blobs, monkeypatch):
    rows, labels, test, _ = blobs
    model = RBFPrototypeClassifier(**FAST).fit(rows, labels)
    whole = model.agreement(test), model.certify(test)
    monkeypatch.setattr(rooms, "BATCH", 7)
    np.testing.assert_allclose(model.agreement(test), whole[0])
    singly = [model.certify(test[i : i + 1])[0] for i in range(len(test))]
    np.testing.assert_allclose(singly, whole[1])


@pytest.mark.parametrize("kind", [{}, {"head": "rbf", "sigma": "per-component"}, {"image_shape": (1, 3)}])
def test_saved_and_read_it_is_the_same(kind, blobs, tmp_path):
    rows, labels, test, _ = blobs
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    model = RBFPrototypeClassifier(**FAST, **kind).fit(frame, np.array(list("wxyz"))[labels])
    model.save_pretrained(tmp_path / "model")
    found = paperback.load(tmp_path / "model")
    assert isinstance(found, RBFPrototypeClassifier)
    test = pd.DataFrame(test, columns=["a", "b", "c"])
    np.testing.assert_array_equal(found.predict(test), model.predict(test))
    np.testing.assert_array_equal(found.certify(test), model.certify(test))
    assert found.explain(test).columns == ("a", "b", "c")
    assert found.image_shape is None or tuple(found.image_shape) == model.image_shape
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="damaged"):
        RBFPrototypeClassifier.from_pretrained(tmp_path / "model")


def test_a_class_with_fewer_rows_than_components(blobs):
    rows = np.array([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0], [5.0, 6.0], [6.0, 5.0]])
    model = RBFPrototypeClassifier(4, epochs=30).fit(rows, [0, 0, 1, 1, 1])
    assert model.components_.shape == (8, 2)
    assert model.predict(rows).tolist() == [0, 0, 1, 1, 1]


def test_an_image_is_explained_as_an_image(digits, tmp_path):
    rows, labels, test, truth = digits
    model = RBFPrototypeClassifier(image_shape=(8, 8), epochs=20).fit(rows[:600], labels[:600])
    assert model.score(test, truth) > 0.85
    found = model.explain(test[:3])
    assert found.kind == "image"
    assert found.image_shape == (8, 8)
    figure = found.plot(1)
    figure.savefig(tmp_path / "figure.png")
    assert found.pictures["component 3 present"].shape == (64,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "nll"}, "loss is 'nll'.*robust, margin"),
        ({"loss": "hinge"}, "loss is 'hinge'"),
        ({"metric": "mahalanobis"}, "metric is 'mahalanobis'"),
        ({"metric": "cosine", "loss": "robust"}, "no triangle inequality"),
        ({"metric": "sqeuclidean", "loss": "robust"}, "no triangle inequality"),
        ({"kernel": "linear"}, "kernel is 'linear'"),
        ({"sigma": "none"}, "sigma is 'none'"),
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"head": "mlp"}, "head is 'mlp'"),
        ({"n_components": 0}, "fewer components than classes"),
        ({"n_components": None}, "fewer components than classes"),
        ({"vectors_per_class": 0}, "0 vectors"),
        ({"margin": 0.0}, "margin is 0.0"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": (1, 2, 3)}, "epochs is"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"least": 0.1}, "least is 0.1"),
        ({"head": "original", "negative": False}, "negative=False"),
        ({"image_shape": (5, 5)}, "image_shape is"),
    ],
)
def test_bad_settings_are_named(settings, message, blobs):
    with pytest.raises(DataError, match=message):
        RBFPrototypeClassifier(**settings).fit(*blobs[:2])


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_without_triangle_inequality_it_classifies_but_certifies_nothing(metric, blobs):
    model = RBFPrototypeClassifier(**FAST, metric=metric).fit(*blobs[:2])
    for error in (ValueError, NotSupportedError):
        with pytest.raises(error, match="no triangle inequality"):
            model.certify(blobs[2])


def test_bad_rows_and_labels_are_named(blobs):
    rows, labels, test, truth = blobs
    with pytest.raises(ValueError, match="one class only"):
        RBFPrototypeClassifier(**FAST).fit(rows, np.zeros(len(rows)))
    hole = rows.copy()
    hole[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        RBFPrototypeClassifier(**FAST).fit(hole, labels)
    model = RBFPrototypeClassifier(**FAST).fit(rows, labels)
    with pytest.raises(ValueError, match="NaN"):
        model.certify(hole)
    with pytest.raises(DataError, match="label of a class that was fitted"):
        model.certify(test, np.full(len(test), 9))
    with pytest.raises(DataError, match="label of a class that was fitted"):
        model.certify(test, truth[:-1])
    for settings, message in (({12: 1.0}, "no component 12"), ({-1: 1.0}, "no component -1"),
                              ({0: 1.5}, "set to 1.5"), ({0: np.nan}, "set to nan")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            model.intervene(test, settings)


def test_fewer_components_than_classes_are_refused_in_the_network():
    with pytest.raises(DataError, match="2 components for 3 classes"):
        rooms.PrototypeNetwork(4, 2, 3)


def test_a_head_goes_on_any_backbone():
    """CBCHead is an ordinary module: a linear layer with a sigmoid learns through it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Sigmoid(), CBCHead(6, 2))
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        rooms.deep.margin_loss(model(x), y, 0.1).backward()
        optimizer.step()
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_not_supported_names_what_is(blobs):
    images = np.random.default_rng(0).normal(size=(20, 64))
    backbone = torch.nn.Conv2d(1, 8, 3)
    model = RBFPrototypeClassifier(backbone=backbone, image_shape=(8, 8), epochs=(1, 1, 1))
    model.fit(images, np.arange(20) % 2)
    for call in (model.certify, model.counterfactual):
        with pytest.raises(NotSupportedError, match="RBFPrototypeClassifier"):
            call(images)
    with pytest.raises(NotSupportedError, match="safetensors"):
        model.save_pretrained("anywhere")
