"""Classes that come and go; calibration; rejection; what is refused. The study's wiring."""

import numpy as np
import pytest
import torch
from torch import nn

import paperback
from paperback.errors import DataError
from paperback.represent.evaluate import novel_classes
from paperback.represent.hyperspherical import HypersphericalClassifier, MetricLearner
from paperback.represent.studies import hyperspherical as module
from paperback.study import Run
from paperback.testing.represent import ENCODER_CHECKS, EncoderCase

SMALL = {"name": "resnet", "width": 4, "stages": 2}


def images(n=60, seed=0):
    """A bright square in one of six places: six classes."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 6
    x = torch.randint(0, 90, (n, 28, 28), generator=g)
    for i, k in enumerate(y.tolist()):
        row, column = divmod(k, 3)
        x[i, 14 * row : 14 * row + 12, 9 * column : 9 * column + 8] += 150
    return x.to(torch.uint8), y


def build(seed=0, **settings):
    return HypersphericalClassifier(
        **{"backbone": SMALL, "dim": 8, "epochs": 2, "batch_size": 16} | settings, seed=seed
    )


@pytest.fixture(scope="module")
def fitted():
    x, y = images(120)
    return build(epochs=12, lr=5e-3).fit(x[y < 4], y[y < 4], progress=False)


@pytest.fixture
def classifier(fitted, tmp_path):
    """A copy of the fitted one, as it comes back from a folder."""
    fitted.save_pretrained(tmp_path / "model")
    return paperback.load(tmp_path / "model")


CASES = {
    "classifier": lambda seed: build(seed, holdout=0.2),
    "triplets": lambda seed: MetricLearner("batch_hard", SMALL, 8, epochs=1, batch_size=16, seed=seed),
}


@pytest.mark.parametrize("check", ENCODER_CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_the_contract_of_the_wing(name, check):
    check(EncoderCase(CASES[name], *images(36)))


@pytest.mark.parametrize("loss", ["softmax", "batch_hard", "semi_hard", "pairs", "sup_con"])
def test_metric_learners_learn(loss):
    x, y = images(60)
    learner = MetricLearner(loss, SMALL, 8, epochs=6, batch_size=30, lr=3e-3).fit(x, y, progress=False)
    assert learner.history_.train_loss[-1] < learner.history_.train_loss[0]


def test_it_learns_and_its_features_are_unit_vectors(fitted):
    x, y = images(60, seed=1)
    seen = y < 4
    assert (fitted.predict(x[seen]) == y[seen]).double().mean() > 0.8
    torch.testing.assert_close(fitted.transform(x).norm(dim=1), torch.ones(60))
    torch.testing.assert_close(fitted.predict_proba(x).sum(1), torch.ones(60))
    assert fitted.classes_.tolist() == fitted.seen_classes_.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(fitted.weights.norm(dim=1), torch.ones(4))


def test_one_example_is_its_own_prototype(classifier):
    x, y = images(60, seed=2)
    one = x[y == 5][:1]
    classifier.add_class(5, one)
    torch.testing.assert_close(classifier.prototypes_[-1], classifier.transform(one)[0])


def test_examples_in_two_calls_and_classes_in_any_order(classifier, fitted, tmp_path):
    x, y = images(60, seed=2)
    five, four = x[y == 5], x[y == 4]
    classifier.add_class(5, five[:3])
    classifier.add_class(5, five[3:], update=True)
    classifier.add_class(4, four)
    other = paperback.load(tmp_path / "model")
    other.add_class(4, four.flip(0))
    other.add_class(5, five)
    assert torch.equal(classifier.predict(x), other.predict(x))
    torch.testing.assert_close(classifier.prototypes_[-2:], other.prototypes_[-2:].flip(0), atol=1e-6, rtol=0)


def test_removing_what_was_added_restores_everything_bitwise(classifier):
    x, y = images(60, seed=2)
    before, seen = classifier.predict_proba(x), classifier.predict_proba(x, among="seen")
    classifier.add_class(5, x[y == 5])
    assert torch.equal(classifier.predict_proba(x, among="seen"), seen)
    assert classifier.predict_proba(x).shape == (60, 5)
    classifier.remove_class(5)
    assert torch.equal(classifier.predict_proba(x), before)
    classifier.remove_class(0)
    assert classifier.seen_classes_.tolist() == [1, 2, 3]


def test_joint_and_disjoint_are_those_of_class_means(classifier):
    x, y = images(90, seed=2)
    test, truth = images(90, seed=3)
    train, train_y = images(120)  # what it was fitted to, less what was held out
    for label in (4, 5):
        classifier.add_class(label, x[y == label])
    head = classifier.novel_head()
    novel = truth >= 4
    assert torch.equal(head.predict(test), classifier.predict(test, among="novel"))
    assert torch.equal(head.predict(test), classifier.predict(test, among=[4, 5]))
    assert classifier.novel_head([5]).predict(test).unique().tolist() == [5]
    rows = torch.cat([train[train_y < 4], x[y >= 4]])
    labels = torch.cat([train_y[train_y < 4], y[y >= 4]])
    found = novel_classes(classifier.transform(rows), labels, classifier.transform(test), truth, novel=[4, 5])
    assert found.disjoint == pytest.approx(float((head.predict(test[novel]) == truth[novel]).double().mean()))
    assert abs(found.joint - float((classifier.predict(test) == truth).double().mean())) < 0.05


def test_what_stands_for_the_seen_classes(classifier):
    means = classifier.prototypes_
    classifier.represent_seen("weights")
    assert torch.equal(classifier.prototypes_, classifier.weights)
    assert not torch.allclose(classifier.prototypes_, means)
    classifier.represent_seen("means")
    assert torch.equal(classifier.prototypes_, means)
    with pytest.raises(DataError, match="by is 'both'"):
        classifier.represent_seen("both")
    x, y = images(60)
    automatic = build(seen="auto", scale="auto", epochs=3).fit(x, y, progress=False)
    held = automatic.transform(x)
    assert automatic._weights_are_better(held, y) in (True, False)
    assert float(automatic.cosine_scale) == pytest.approx(5 / 6 * np.log(5 * 999), rel=1e-5)
    # Where trained vectors point elsewhere, means are better, and the other way round.
    automatic.weights = -automatic.weights
    assert not automatic._weights_are_better(held, y)
    automatic.weights, automatic.sums = automatic._prototypes(False), -automatic.sums
    assert automatic._weights_are_better(held, y)


def test_rejection_keeps_its_rate_on_what_it_was_calibrated_by(classifier):
    x, y = images(120, seed=4)
    mine = x[y < 4]
    classifier.calibrate(mine)
    for rate in (0.0, 0.1, 0.5):
        refused = classifier.predict(mine, reject=rate) == -1
        assert float(refused.double().mean()) == pytest.approx(rate, abs=0.02)
    noise = torch.randint(0, 256, (40, 28, 28), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert (classifier.predict(noise, reject=0.1) == -1).double().mean() > 0.5
    with pytest.raises(DataError, match="false rejection rate"):
        classifier.predict(mine, reject=2.0)


def test_save_and_load_with_added_classes(classifier, tmp_path):
    x, y = images(60, seed=2)
    classifier.add_class(4, x[y == 4])
    classifier.represent_seen("weights")
    classifier.save_pretrained(tmp_path / "again")
    loaded = paperback.load(tmp_path / "again")
    assert torch.equal(loaded.predict_proba(x), classifier.predict_proba(x))
    assert loaded.predict(x, reject=0.2).tolist() == classifier.predict(x, reject=0.2).tolist()
    loaded.add_class(5, x[y == 5])
    assert loaded.seen_classes_.tolist() == [0, 1, 2, 3]


def test_images_without_a_label_are_left_out():
    x, y = images(60)
    some = torch.where(torch.arange(60) < 40, y, -1)
    first = build().fit(x, some, progress=False)
    assert first.classes_.tolist() == [0, 1, 2, 3, 4, 5]
    assert int(first.counts.sum()) == 36


class Silent(nn.Module):
    dim = 4

    def forward(self, x):
        return torch.zeros(len(x), 4)


class Spatial(nn.Module):
    dim = 4

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.layer(x)


def test_bad_input(classifier):
    x, y = images(60)
    for query, message in (
        (lambda: classifier.add_class(2, x[:1]), "class 2 is there already; add examples with update=True"),
        (lambda: classifier.add_class(9, x[:1], update=True), "class 9 is not there already"),
        (lambda: classifier.add_class(-1, x[:1]), "label is -1"),
        (lambda: classifier.add_class(9, x[:0]), "class 9 has no images"),
        (lambda: classifier.remove_class(9), "no class 9; there are 0, 1, 2, 3"),
        (lambda: classifier.predict(x, among="novel"), "add_class adds novel ones"),
        (lambda: classifier.novel_head(), "add_class adds novel ones"),
        (lambda: classifier.predict(x, among="old"), "among is 'old'"),
        (lambda: classifier.predict(x, among=[1, 7]), "among has 7"),
        (lambda: classifier.predict(x, among=[]), "among is empty"),
        (lambda: classifier.calibrate(x[:0]), "images is empty"),
        (lambda: build().predict(x), "call fit first"),
        (lambda: build().fit(x, 0 * y, progress=False), "labels have 1 class"),
        (lambda: build(holdout=0.0).fit(x, y, progress=False).predict(x, reject=0.1), "no threshold"),
        (lambda: build(scale=0), "scale is 0"),
        (lambda: build(scale="large"), "scale is 'large'"),
        (lambda: build(constraint="loose"), "constraint is 'loose'"),
        (lambda: build(seen="mean"), "seen is 'mean'"),
        (lambda: build(seen="auto", holdout=0.0), "above 0 with seen"),
        (lambda: build(dim=1), "dim is 1"),
        (lambda: MetricLearner("quadruplets"), "no loss 'quadruplets'"),
        (lambda: HypersphericalClassifier(Spatial()).transform(x), "average over positions"),
    ):
        with pytest.raises(DataError, match=message):
            query()
    empty = HypersphericalClassifier(Silent(), dim=3)
    empty.projection.bias.data.zero_()
    with pytest.raises(DataError, match=r"image\(s\) 0, 1, 2 is zero"):
        empty.transform(x[:3])
    with pytest.warns(UserWarning, match="cannot form a simplex"):
        build(dim=2, constraint="fixed", epochs=1).fit(x, y, progress=False)


def test_the_study_runs(tmp_path):
    run = Run("hyperspherical", budget="smoke", out=tmp_path, progress=False)
    module.study(run)
    finding = run.finding("complete")
    assert len(finding.claims) == 7
    assert all(claim.verdict == "not judged" for claim in finding.claims)
    assert {figure.name for figure in finding.figures} == {"methods", "calibration"}
