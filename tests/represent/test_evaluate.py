"""Features to numbers: against formulas, brute force and scikit-learn; any source of features; bad input."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from paperback.errors import DataError
from paperback.represent.evaluate import (
    auroc,
    class_means,
    evaluate,
    features,
    few_shot,
    fine_tune,
    knn,
    linear_probe,
    naive_bayes_probe,
    novel_classes,
    open_set,
    oscr,
    vision_model,
)
from paperback.represent.hyperspherical import MetricLearner

SMALL = {"name": "resnet", "width": 4, "stages": 2}


@pytest.fixture(scope="module")
def blobs():
    X, y = make_blobs(260, 6, centers=5, cluster_std=4.0, random_state=0)
    return (X[:140], y[:140]), (X[140:200], y[140:200]), (X[200:], y[200:])


def images(n, seed=0):
    """Noise on a bright upper, lower or left half: three classes."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randint(0, 100, (n, 28, 28), generator=g)
    x[y == 0, :14] += 120
    x[y == 1, 14:] += 120
    x[y == 2, :, :14] += 120
    return x.to(torch.uint8), y


# -- probes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [140, 5])
def test_the_ridge_is_scikit_learns_also_with_fewer_rows_than_features(blobs, n):
    (X, y), val, (X_test, y_test) = blobs
    if n == 5:
        X, y = X[np.unique(y, return_index=True)[1]], np.arange(5)
    found = linear_probe(X, y, X_test, y_test, val=val[0], val_labels=val[1])
    scaled, scaled_val, scaled_test = ((Z - X.mean(0)) / X.std(0) for Z in (X, val[0], X_test))
    accuracies = []
    for penalty, accuracy in found.tried:
        theirs = Ridge(alpha=len(X) * penalty).fit(scaled, np.eye(5)[y])
        assert accuracy == pytest.approx(np.mean(theirs.predict(scaled_val).argmax(1) == val[1]))
        accuracies.append(accuracy)
    assert dict(found.tried)[found.choice] == max(accuracies)
    best = Ridge(alpha=len(X) * found.choice).fit(scaled, np.eye(5)[y]).predict(scaled_test).argmax(1)
    assert np.array_equal(found.predictions, best)
    assert found.accuracy == np.mean(best == y_test)


def test_without_a_validation_part_each_row_is_left_out_in_turn(blobs):
    (X, y), _, test = blobs
    X, y = X[:40], y[:40]
    found = linear_probe(X, y, *test)
    scaled = (X - X.mean(0)) / X.std(0)
    for penalty, accuracy in found.tried[-3:]:
        hits = 0
        for i in range(40):
            kept = np.arange(40) != i
            # The penalty and the scale are those of all rows, as in the closed form.
            ridge = Ridge(alpha=40 * penalty).fit(scaled[kept], np.eye(5)[y[kept]])
            hits += ridge.predict(scaled[[i]]).argmax() == y[i]
        assert accuracy == pytest.approx(hits / 40)


def test_logistic_and_naive_bayes_probes(blobs):
    (X, y), val, (X_test, y_test) = blobs
    found = linear_probe(X, y, X_test, y_test, val=val[0], val_labels=val[1], kind="logistic")
    scaled = (X - X.mean(0)) / X.std(0)
    theirs = LogisticRegression(C=found.choice, max_iter=1000).fit(scaled, y)
    assert found.accuracy == pytest.approx(theirs.score((X_test - X.mean(0)) / X.std(0), y_test))
    assert naive_bayes_probe(X, y, X_test, y_test).accuracy > 0.5


def test_nearest_neighbours(blobs):
    (X, y), _, (X_test, y_test) = blobs
    one = knn(X, y, X_test, y_test, k=1)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(X, y)
    assert np.array_equal(one.predictions, theirs.predict(X_test))
    many = knn(X, y, X_test, y_test, k=7, temperature=0.5)
    cosines = X_test @ X.T / np.outer(np.linalg.norm(X_test, axis=1), np.linalg.norm(X, axis=1))
    for row, prediction in zip(cosines, many.predictions, strict=True):
        nearest = np.argsort(-row)[:7]
        votes = [np.exp(row[nearest][y[nearest] == k] / 0.5).sum() for k in range(5)]
        assert prediction == int(np.argmax(votes))
    assert knn(X[:3], [0, 1, 2], X_test, y_test).predictions.shape == (60,)


# -- episodes, open set, novel classes -----------------------------------------------------------------------


def test_few_shot_episodes():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(8), 30)
    apart = np.eye(8)[y] + 0.01 * rng.standard_normal((240, 8))
    assert few_shot(apart, y, ways=5, shots=1, episodes=50).mean == 1.0
    pool, labels = rng.standard_normal((8000, 8)), np.repeat(np.arange(8), 1000)
    noise = few_shot(pool, labels, ways=4, shots=5, queries=10, episodes=300)
    assert noise.low < 0.25 < noise.high
    assert noise.high - noise.low < 0.05
    again = few_shot(apart + 1, y, episodes=20, metric="euclidean", seed=3)
    assert again == few_shot(apart + 1, y, episodes=20, metric="euclidean", seed=3)
    # Euclidean episodes do not see an offset, cosine ones do.
    assert again == few_shot(apart + 100, y, episodes=20, metric="euclidean", seed=3)
    with pytest.raises(DataError, match="0 classes have the 31 rows"):
        few_shot(apart, y, shots=16)
    with pytest.raises(DataError, match="ways is 1"):
        few_shot(apart, y, ways=1)


def test_open_set_scores_by_counting():
    known, correct = np.array([0.9, 0.8, 0.4, 0.3]), np.array([True, False, True, True])
    unknown = np.array([0.5, 0.3])
    pairs = [(k > u) + 0.5 * (k == u) for k in known for u in unknown]
    assert auroc(known, unknown) == pytest.approx(np.mean(pairs))
    right = [c * ((k > u) + 0.5 * (k == u)) for k, c in zip(known, correct, strict=True) for u in unknown]
    assert oscr(known, correct, unknown) == pytest.approx(np.mean(right))
    assert oscr(known, np.zeros(4, bool), unknown) == 0.0
    with pytest.raises(DataError, match="one for each known row"):
        oscr(known, [True], unknown)


def test_open_set_and_novel_classes_by_hand():
    angles = np.deg2rad([0, 10, 90, 100, 180, 190, 45, 50])
    x, y = np.stack([np.cos(angles), np.sin(angles)], 1), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    classes, means = class_means(5 * x, y)
    np.testing.assert_allclose(np.rad2deg(np.arctan2(means[:, 1], means[:, 0])), [5, 95, -175, 47.5])
    assert list(classes) == [0, 1, 2, 3]
    # 30 and 70 degrees are nearest to class 3, but they belong to 0 and 1; 60 of class 3 is right.
    asked = np.deg2rad([2, 30, 70, 170, 60, 140])
    truth = [0, 0, 1, 2, 3, 3]
    test = np.stack([np.cos(asked), np.sin(asked)], 1)
    found = novel_classes(x, y, test, truth, novel=[2, 3])
    assert found.joint == pytest.approx(3 / 6)
    assert found.seen == pytest.approx(1 / 3)
    assert found.novel == pytest.approx(2 / 3)
    assert found.disjoint == pytest.approx(2 / 3)
    told = open_set(x[:4], y[:4], test[[0, 2, 3]], [0, 1, 2])
    assert (told.accuracy, told.auroc, told.oscr) == (1.0, 1.0, 1.0)
    one = novel_classes(x, y, test, truth, novel=[2, 3], shots=1, seed=1)
    assert 0 <= one.disjoint <= 1
    for arguments, message in (
        ({"novel": [2]}, "there are 1 of them"),
        ({"novel": [2, 7]}, "class 7 has no rows"),
        ({"novel": [2, 3], "shots": 3}, "class 2 has 2 rows"),
        ({"novel": [0, 1, 2, 3]}, "novel classes only"),
    ):
        with pytest.raises(DataError, match=message):
            novel_classes(x, y, test, truth, **arguments)
    with pytest.raises(DataError, match="others"):
        open_set(x, y, test, truth)


# -- any source ----------------------------------------------------------------------------------------------


def transformer():
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
            patch_size=8,
        )  # fmt: skip
        return transformers.ViTModel(config).eval()


def test_features_of_every_kind_of_source(tmp_path):
    x, y = images(30)
    encoder = MetricLearner("softmax", backbone=SMALL, epochs=1).fit(x, y, progress=False)
    assert np.array_equal(features(encoder, x), encoder.transform(x).double().numpy())
    assert features(lambda z: z.mean((2, 3)), x).shape == (30, 1)
    assert features(lambda z: z.flatten(1).numpy(), x, batch_size=7).shape == (30, 784)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(784, 3))
    assert np.array_equal(features(module, x), features(module, x))
    assert module.training
    model = transformer()
    found = features(model, x)
    assert found.shape == (30, 16)
    grey = nn.functional.interpolate(
        x[:, None].float() / 255, (32, 32), mode="bilinear", antialias=True
    ).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = model(pixel_values=(grey - mean) / std).pooler_output
    np.testing.assert_allclose(found, expected.double().numpy(), atol=1e-5)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    loaded = type(model).from_pretrained(tmp_path)
    half = vision_model(model, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    np.testing.assert_allclose(features(loaded, x), features(half, x), atol=1e-5)
    with pytest.raises(DataError, match="pixel_values"):
        vision_model(module)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda z: z, "average over positions"),
        (lambda z: z.flatten(1)[:1], "shape \\(1, 784\\) for 4 images"),
        (lambda z: z.flatten(1) / 0, "not finite for image 0"),
        (lambda z: "features", "features are a str"),
        (3, "cannot be called"),
    ],
)
def test_sources_that_cannot_be_used(source, message):
    with pytest.raises(DataError, match=message):
        features(source, images(4)[0])


def test_evaluate_says_it_all_in_one_call():
    train, test = images(90), images(90, 1)
    report = evaluate(
        lambda z: torch.nn.functional.avg_pool2d(z, 7).flatten(1),
        train=train, test=test, val=images(30, 2),
        protocols=("linear", "logistic", "nb", "knn", "few_shot", "novel_joint", "novel_disjoint"),
        label_counts=(12, None), shots=(1, 5), novel=(1, 2), seeds=2,
    )  # fmt: skip
    assert len(report.scores) == 2 * (4 * 2 + 3 * 2)
    assert report.dim == 16
    assert report.accuracy("linear") > 0.95
    assert report.accuracy("few_shot", 5) > 0.8
    frame = report.table()
    assert list(frame.columns) == ["protocol", "labels", "accuracy", "sd", "seeds"]
    assert report.to_markdown().count("\n") == len(frame) + 1
    assert "few_shot" in str(report)
    assert report.plot().axes[0].get_xlabel().startswith("labels")
    with pytest.raises(DataError, match="no linear with labels=7"):
        report.accuracy("linear", 7)


def test_a_transformers_model_is_evaluated_in_one_line():
    report = evaluate(
        transformer(), train=images(60), test=images(60, 1), label_counts=(30,), shots=(1,), seeds=1
    )
    assert report.name == "ViTModel"
    assert {score.protocol for score in report.scores} == {"linear", "knn", "few_shot"}


def test_fine_tuning_moves_a_copy():
    (x, y), test = images(60), images(60, 1)
    encoder = MetricLearner("softmax", backbone=SMALL, epochs=1).fit(x, y, progress=False)
    before = encoder.transform(x)
    tuned = fine_tune(encoder, (x, y), test, val_part=images(30, 2), epochs=4, lr=3e-2, batch_size=10)
    assert tuned.accuracy > 0.6
    assert torch.equal(encoder.transform(x), before)
    again = fine_tune(encoder, (x, y), test, val_part=images(30, 2), epochs=4, lr=3e-2, batch_size=10)
    assert again.accuracy == tuned.accuracy
    report = evaluate(encoder, train=(x, y), test=test, protocols=("fine_tune",), label_counts=(30,), seeds=1)
    assert 0 <= report.accuracy("fine_tune", 30) <= 1
    with pytest.raises(DataError, match="cannot be fine-tuned"):
        fine_tune(lambda z: z.flatten(1), (x, y), test)


def test_bad_features(blobs):
    (X, y), _, test = blobs
    for query, message in (
        (lambda: linear_probe(X, y[1:], *test), "one label for each"),
        (lambda: linear_probe(X, 0 * y, *test), "one class only"),
        (lambda: linear_probe(X[:, 1:], y, *test), "train has 5 features and test 6"),
        (lambda: linear_probe(X, y, *test, kind="probit"), "kind is 'probit'"),
        (lambda: linear_probe(0 * X, y, *test), "constant"),
        (lambda: knn(np.where(X[4, 1] == X, np.nan, X), y, *test), "not finite in row 4"),
        (lambda: knn(0 * X, y, *test), "is zero in row"),
        (lambda: knn(X, y, *test, k=0), "k is 0"),
        (lambda: evaluate(len, train=images(9), test=images(9), protocols=("quiz",)), "quiz"),
        (
            lambda: evaluate(lambda z: z.flatten(1), train=images(9), test=images(9), label_counts=(2,)),
            "has 2",
        ),
        (lambda: few_shot(X, y, metric="taxi"), "metric is 'taxi'"),
    ):
        with pytest.raises(DataError, match=message):
            query()
