"""The bench of the explain wing: data, what is measured, and a comparison from end to end."""

import importlib.util
import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import paperback
from paperback.compare import compare
from paperback.compare.bench import READING, Bench
from paperback.compare.job import Result
from paperback.compare.worker import load_data
from paperback.data import images
from paperback.errors import DataError
from paperback.explain.baselines import GLVQ, LogisticRegression, NearestNeighbours
from paperback.explain.bench import BENCH, explanation_size, faithfulness
from paperback.explain.bench.contenders import differentiable_scores
from paperback.explain.bench.measure import _attacked
from paperback.explain.interface import Explanation

NAMES = [contender.name for contender in BENCH.contenders]
CERTIFIED = ["prototype-rbf", "logistic", "tree", "neighbours", "glvq", "glvq-margin"]
PLACES = {"logistic", "tree", "svm"}  # whose parts are columns


def write_table(path, n=160):
    rng = np.random.default_rng(0)
    size = rng.integers(0, 3, n)
    frame = pd.DataFrame(
        {
            "length": 10 * size + rng.normal(0, 2, n),
            "colour": np.where(rng.random(n) < 0.2 + 0.3 * size, "red", "blue"),
            "checked": rng.random(n) < 0.5,
            "noise": rng.normal(1000, 300, n),
        }
    )
    frame.loc[::9, "noise"] = np.nan
    frame.loc[::11, "colour"] = np.nan
    frame["size"] = np.array(["small", "middle", "large"])[size]
    frame["price"] = 10.0 * size + rng.normal(0, 1, n)
    frame.to_csv(path, index=False)
    return path


def measure(name, data, folder, seed=0):
    measured = BENCH.evaluate(BENCH.contender(name), data, "smoke", seed, folder)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert all(value is None or math.isfinite(value) for value in measured.values())
    return measured


@pytest.fixture(scope="module")
def digits():
    return BENCH.load(None, None, "smoke", 0)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return BENCH.load(write_table(tmp_path_factory.mktemp("table") / "t.csv"), "size", "smoke", 0)


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.primary.name == "accuracy"
    assert BENCH.cost.name == "fit_seconds"
    methods = {contender.name for contender in BENCH.contenders if contender.kind == "method"}
    assert methods == {"prototype-rbf", "codebook-features"}
    for name in methods:
        assert paperback.catalogue.find(name).task == "explain"


def test_default_data_are_the_digits_between_0_and_1(digits):
    assert digits.image_shape == (8, 8)
    assert digits.columns[9] == "pixel 1, 1"
    raw = images.digits(0).train
    np.testing.assert_allclose(digits.train[0], raw.x[:200].flatten(1).numpy() / 16)
    np.testing.assert_array_equal(digits.train[1], raw.y[:200])
    assert 0.2 < digits.radius < 0.8


def test_a_table_becomes_columns_of_numbers(table):
    assert table.columns == (
        "length", "noise", "price", "missingindicator_noise", "colour_blue", "colour_missing", "colour_red",
        "checked_False", "checked_True",
    )  # fmt: skip
    X = table.train[0]
    np.testing.assert_allclose(X[:, 0].mean(), 0, atol=1e-12)
    np.testing.assert_allclose(X[:, 0].std(), 1)
    assert (X[X[:, 3] == 1, 1] == 0).all()
    np.testing.assert_array_equal(X[:, 4:7].sum(1), 1)
    assert table.dataset.classes == ("large", "middle", "small")
    assert table.bounds is None


def test_values_that_were_never_seen_are_taken(tmp_path):
    frame = pd.read_csv(write_table(tmp_path / "t.csv"))
    frame["name"] = [f"row {i}" for i in range(len(frame))]
    frame["blank"] = np.nan
    frame.to_csv(tmp_path / "names.csv", index=False)
    data = BENCH.load(tmp_path / "names.csv", "size", "smoke", 0)
    assert sum(column.startswith("name_") for column in data.columns) <= 20
    assert not any("blank" in column for column in data.columns)
    assert all(np.isfinite(part[0]).all() for part in (data.train, data.val, data.test))


def test_large_images_become_small(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(30):
        folder = tmp_path / "photos" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    data = BENCH.load(tmp_path / "photos", None, "smoke", 0)
    assert data.image_shape == (28, 28)
    x, y = rng.integers(0, 255, (40, 56, 28), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", images=x, labels=y)
    data = BENCH.load(tmp_path / "a.npz", None, "smoke", 0)
    assert data.image_shape == (28, 14)
    assert any("brought to 28x14" in note for note in data.dataset.notes)


@pytest.mark.parametrize(
    ("target", "words"),
    [("price", "is a number"), (None, "a target is needed"), ("prize", "prize")],
)
def test_tables_without_classes_are_refused(tmp_path, target, words):
    with pytest.raises(DataError, match=words):
        BENCH.load(write_table(tmp_path / "t.csv"), target, "smoke", 0)


def test_other_bad_data_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="the digits have no column"):
        BENCH.load(None, "size", "smoke", 0)
    np.savez(tmp_path / "a.npz", images=np.zeros((30, 4, 4), dtype=np.uint8))
    with pytest.raises(DataError, match="labels"):
        BENCH.load(tmp_path / "a.npz", None, "smoke", 0)
    with pytest.raises(DataError, match="no column 'x'"):
        BENCH.load(tmp_path / "a.npz", "x", "smoke", 0)
    pd.DataFrame({"a": [np.nan] * 30, "b": ["x", "y"] * 15}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError, match="empty"):
        BENCH.load(tmp_path / "t.csv", "b", "smoke", 0)


@pytest.mark.parametrize("kind", ["digits", "table"])
@pytest.mark.parametrize("name", NAMES)
def test_a_contender_is_measured_and_saved(name, kind, request, tmp_path):
    data = request.getfixturevalue(kind)
    assert BENCH.contender(name).applies(data) is None
    measured = measure(name, data, tmp_path)
    assert measured["accuracy"] >= measured["attacked_accuracy"]
    assert (measured["certified_accuracy"] is None) == (name not in CERTIFIED)
    if name in CERTIFIED:
        assert measured["broken"] == 0
        assert measured["attacked_accuracy"] >= measured["certified_accuracy"]
    assert measured["explanation_size"] > 0
    assert (measured["deletion"] is None) == (name == "neighbours")
    reading = (tmp_path / READING).read_text()
    assert "Settings: " in reading
    assert ("contributions of the explanation" in reading) == (name in PLACES)
    assert (tmp_path / "explanation.png").stat().st_size > 1000
    assert measured["bytes"] > 500
    if name not in ("prototype-rbf", "codebook-features"):
        loaded = paperback.load(tmp_path / "model")
        assert (loaded.predict(data.test[0]) == data.test[1]).mean() == measured["accuracy"]


def test_the_same_seed_measures_the_same(digits, tmp_path):
    runs = [measure("glvq", digits, tmp_path / str(i), seed=3) for i in range(2)]
    for name in ("accuracy", "attacked_accuracy", "certified_accuracy", "deletion", "bytes"):
        assert runs[0][name] == runs[1][name]


def test_attacks_stay_in_the_ball_and_among_pixels(digits):
    model = LogisticRegression().fit(*digits.train)
    found = _attacked(model, digits, "smoke", 0)
    assert np.linalg.norm(found - digits.test[0], axis=1).max() <= digits.radius
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_tree_withstands_no_more_than_it_certifies(table, tmp_path):
    measured = measure("tree", table, tmp_path)
    assert measured["attacked_accuracy"] <= measured["certified_accuracy"] + 0.03


def test_a_class_without_training_rows_is_wrong_and_no_trouble(digits):
    X, y = digits.train
    model = LogisticRegression().fit(X[y != 3], y[y != 3])
    found = _attacked(model, digits, "smoke", 0)
    np.testing.assert_array_equal(found[digits.test[1] == 3], digits.test[0][digits.test[1] == 3])


@pytest.mark.parametrize("name", ["prototype-rbf", "codebook-features", "glvq", "svm", "logistic"])
def test_scores_for_gradients_are_those_of_predict(name, digits):
    candidates = BENCH.contender(name).build(digits, "smoke", 0)
    model = candidates.make(**candidates.settings[0]).fit(*digits.train)
    x = torch.tensor(digits.test[0], requires_grad=True)
    scores = differentiable_scores(model)(x)
    np.testing.assert_array_equal(model.classes_[scores.argmax(1)], model.predict(digits.test[0]))
    (slope,) = torch.autograd.grad(scores[:, 0].sum(), x)
    assert float(slope.abs().max()) > 0


def test_the_size_of_an_explanation_by_hand():
    contributions = np.zeros((3, 2, 4))
    contributions[0, 0] = [10, 0.5, 0, 0]  # one part makes up 95 %
    contributions[1, 0] = [4, 3, 2, 1]  # three make up exactly 90 %
    contributions[2, 0] = 1.0
    contributions[2, 1] = 1.0  # nothing speaks for one class more than for the other
    found = Explanation(
        np.arange(2), contributions.sum(2), contributions, [f"part {i}" for i in range(4)], np.zeros((3, 1))
    )
    assert explanation_size(found) == pytest.approx((1 + 3 + 0) / 3)


def test_faithfulness_by_hand():
    """One column of ten decides: taken first it is gone at once, taken last it stays until the end."""
    X = np.random.default_rng(0).normal(size=(50, 10)) + 5
    order = np.tile(np.arange(10), (50, 1))

    def predict(x):
        return (x[:, 0] > 2).astype(int)

    first = faithfulness(predict, X, order, np.zeros(10))
    assert first.deletion == pytest.approx(0.05)
    assert first.insertion == pytest.approx(0.95)
    last = faithfulness(predict, X, order[:, ::-1].copy(), np.zeros(10))
    assert last.deletion == pytest.approx(0.95)
    assert last.insertion == pytest.approx(0.05)


def test_without_captum_what_needs_it_says_so(digits, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "captum" else real(name, *rest)
    )
    assert "paperback[explain]" in BENCH.contender("svm").applies(digits)
    assert measure("glvq", digits, tmp_path)["deletion"] is None
    assert "paperback[explain]" in (tmp_path / READING).read_text()


def test_the_settings_are_chosen_on_the_validation_rows(digits, tmp_path):
    candidates = BENCH.contender("neighbours").build(digits, "standard", 0)
    assert len(candidates.settings) > 1
    accuracies = [
        NearestNeighbours(**settings).fit(*digits.train).score(*digits.val)
        for settings in candidates.settings
    ]
    best = candidates.settings[int(np.argmax(accuracies))]
    BENCH.evaluate(BENCH.contender("neighbours"), digits, "standard", 0, tmp_path)
    assert f"n_neighbors={best['n_neighbors']}, best of 5" in (tmp_path / READING).read_text()


def run_here(jobs, folder, engine, start):
    """What `paperback.compare.engine.run_all` does, without a process for each job."""
    for job in jobs:
        out = folder / job.name / "artefact"
        out.mkdir(parents=True)
        measured = BENCH.evaluate(
            BENCH.contender(job.contender), load_data(BENCH, job), "smoke", job.seed, out
        )
        yield job, Result(job.fingerprint, "done", metrics=dict(measured), seconds=1.0)


def test_a_comparison_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr("paperback.compare.comparison.run_all", run_here)
    board = compare(
        "explain", methods=["prototype-rbf"], budget="smoke", seeds=1, out=tmp_path / "out", progress=False
    )
    rows = {row.contender: row for row in board.rows}
    assert set(rows) == set(NAMES) - {"codebook-features"}
    assert {row.status for row in rows.values()} == {"done"}
    assert (tmp_path / "out" / "leaderboard.html").is_file()


def test_glvq_is_a_prototype_network_of_one_part_for_each_class(digits):
    found = GLVQ(2, epochs=2).fit(*digits.train).explain(digits.test[0][:5])
    assert (np.count_nonzero(found.contributions, axis=2) == 1).all()
