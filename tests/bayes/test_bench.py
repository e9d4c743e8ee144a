"""The bench: every contender on numbers and on classes, its measures, and clear errors."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.distributions import Normal

from paperback.bayes.bench import BENCH, METRICS, measure_classes, measure_numbers
from paperback.errors import DataError

NAMES = {metric.name for metric in METRICS}


def table(tmp_path, rows=120, classes=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 2))
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "kind": rng.choice(["u", "v"], rows)})
    value = x[:, 0] + (frame["kind"] == "u") + 0.1 * rng.normal(size=rows)
    frame["target"] = np.where(value > 0.5, "high", "low") if classes else 1000 + 50 * value
    frame.to_csv(tmp_path / "data.csv", index=False)
    return tmp_path / "data.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    made = {}
    for name in ("numbers", "classes"):
        (folder / name).mkdir()
        path = table(folder / name, classes=name == "classes")
        made[name] = BENCH.load(path, "target", "smoke", 0)
    return made


@pytest.mark.parametrize("kind", ["numbers", "classes"])
@pytest.mark.parametrize("contender", BENCH.contenders, ids=lambda contender: contender.name)
def test_every_contender_is_measured(contender, kind, data, tmp_path):
    if reason := contender.applies(data[kind]):
        pytest.skip(reason)
    measured = BENCH.evaluate(contender, data[kind], "smoke", 0, tmp_path)
    assert measured.keys() == NAMES
    assert np.isfinite(measured["nlpd"])
    assert (measured["rmse"] is None) == (kind == "classes")
    assert (measured["accuracy"] is None) == (kind == "numbers")
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert len(predictions) == len(data[kind].X_test)


def test_each_kind_of_target_has_methods_and_baselines(data):
    for kind in data.values():
        kinds = [contender.kind for contender in BENCH.contenders if contender.applies(kind) is None]
        assert kinds.count("method") >= 2
        assert kinds.count("baseline") >= 3


def test_the_shipped_data_and_their_units():
    made = BENCH.load(None, None, "smoke", 0)
    assert made.X.shape[0] == 60
    assert made.y.mean() == pytest.approx(0.0, abs=1e-12)
    assert made.y.std() == pytest.approx(1.0)
    assert {"carat", "cut_Ideal"} <= set(made.columns)


def test_measures_of_a_known_law():
    rng = np.random.default_rng(0)
    mean = rng.normal(size=4000)
    y = mean + 0.5 * rng.normal(size=4000)
    right, _ = measure_numbers(Normal(torch.as_tensor(mean), torch.tensor(0.5)), y)
    assert right["nlpd"] == pytest.approx(0.5 * np.log(2 * np.pi * 0.25) + 0.5, abs=0.03)
    assert right["rmse"] == pytest.approx(0.5, abs=0.02)
    assert right["calibration"] < 0.02
    assert right["coverage_90"] == pytest.approx(0.9, abs=0.02)
    narrow, table = measure_numbers(Normal(torch.as_tensor(mean), torch.tensor(0.1)), y)
    assert narrow["calibration"] > 0.1
    assert narrow["coverage_50"] < 0.2
    assert (table["low_90"] < table["high_90"]).all()


def test_measures_of_known_probabilities():
    p = np.array([[0.9, 0.1]] * 1000)
    y = np.array([0] * 900 + [1] * 100)
    scores, _ = measure_classes(p, y)
    assert scores["accuracy"] == pytest.approx(0.9)
    assert scores["calibration"] < 1e-4
    assert scores["nlpd"] == pytest.approx(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    certain, _ = measure_classes(np.array([[1.0, 0.0]] * 1000), y)
    assert 2 < certain["nlpd"] < 4


def test_data_that_cannot_be_used(tmp_path):
    path = table(tmp_path)
    with pytest.raises(DataError, match="target is needed"):
        BENCH.load(path, None, "smoke", 0)
    pd.DataFrame({"a": range(60), "y": [1.5] * 60}).to_csv(path, index=False)
    with pytest.raises(DataError, match="one value only"):
        BENCH.load(path, "y", "smoke", 0)
