"""The bench of searches: each contender on the shipped space, the user's problem, and clear errors."""

import math
import sys

import pandas as pd
import pytest

from paperback.errors import DataError
from paperback.search import InvalidTrial
from paperback.search.bench import BENCH, METRICS
from paperback.search.replay import replay_scores


@pytest.mark.parametrize("contender", BENCH.contenders, ids=lambda contender: contender.name)
def test_every_contender_is_measured(contender, tmp_path):
    data = BENCH.load(None, None, "quick", 0)
    if reason := contender.applies(data):
        pytest.skip(reason)
    measured = BENCH.evaluate(contender, data, "quick", 0, tmp_path)
    assert measured.keys() == {metric.name for metric in METRICS}
    assert 0.8 < measured["best"] <= max(replay_scores())
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert data.budget <= trials["spent"].iloc[-1] < data.budget + 1
    assert measured["best"] == trials.loc[trials["whole"], "score"].max()
    again = BENCH.evaluate(contender, data, "quick", 0, tmp_path)
    assert again["best"] == measured["best"]
    assert again["mean_best"] == measured["mean_best"]


def problem():
    def evaluate(config, seed):
        if config["n"] == 3:
            raise InvalidTrial("odd")
        return math.nan if config["n"] == 4 else -config["n"]

    return {"n": list(range(8)), "m": [1, 2]}, evaluate


def broken():
    return 3


def test_the_users_problem(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "users", sys.modules[__name__])
    data = BENCH.load(None, None, "smoke", 0, model="users:problem")
    assert "early" in BENCH.contender("halving").applies(data)
    measured = BENCH.evaluate(BENCH.contender("evolution"), data, "smoke", 1, tmp_path)
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert measured["best"] == trials["score"].max() <= 0
    assert measured["failed"] == trials["score"].isna().mean()


@pytest.mark.parametrize(
    ("path", "model", "message"),
    [
        ("x.csv", None, "not on data"),
        (None, "users", "give module:function"),
        (None, "no_such_module:f", "no module no_such_module"),
        (None, "users:missing", "has no missing"),
        (None, "users:broken", r"return \(space, evaluate\)"),
    ],
)
def test_what_cannot_be_used_is_said(monkeypatch, path, model, message):
    monkeypatch.setitem(sys.modules, "users", sys.modules[__name__])
    with pytest.raises(DataError, match=message):
        BENCH.load(path, None, "smoke", 0, model=model)
