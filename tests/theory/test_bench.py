import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from paperback.compare.bench import Bench, Metric
from paperback.compare.job import Result
from paperback.compare.leaderboard import DataNote, Leaderboard, build_rows, summarise
from paperback.compare.report import render
from paperback.compare.words import heading
from paperback.errors import DataError, PaperbackError
from paperback.study.environment import describe_environment
from paperback.theory.bench import BENCH

NETWORKS = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

def images():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def normalised():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

TRAINED = small()

def trained():
    return TRAINED

def columns():
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

def wrong():
    return nn.Linear(5, 10)

def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def broken():
    raise RuntimeError("no weights here")

def nothing():
    return None
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A module of networks that can be imported, as a user has one in the working directory."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "users_networks.py").write_text(NETWORKS)
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder)
    yield "users_networks"
    patch.undo()


def measure(data, name, out):
    return BENCH.evaluate(BENCH.contender(name), data, "smoke", 0, out)


def read(out):
    return (out / "reading.txt").read_text().splitlines()


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.takes_model
    assert BENCH.primary.name == "test_error"
    assert [c.name for c in BENCH.contenders if c.kind == "method"] == ["effective-theory"]


def test_without_a_model_it_is_a_small_network_on_the_digits(tmp_path):
    data = BENCH.load(None, None, "smoke", 0)
    assert data.X.shape == (120, 1, 8, 8)
    assert data.y.shape == (120, 10)
    assert float(data.X.mean()) == pytest.approx(0, abs=1e-5)
    measured = measure(data, "effective-theory", tmp_path)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert 0 < measured["test_error"] < 0.8
    assert measured["critical_distance"] < 0.3
    assert measured["information"] > 0
    sentences = read(tmp_path)
    assert [s.partition(":")[0] for s in sentences] == [
        "Criticality at the start", "Kernel flow", "Test", "Information", "Inductive bias",
    ]  # fmt: skip
    assert (tmp_path / "card.txt").read_text().startswith(sentences[0])
    assert (tmp_path / "network.safetensors").stat().st_size > 1000


def test_the_same_seed_gives_the_same_card(networks, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:small")
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        results.append(measure(data, "he", tmp_path / name))
    for result in results:
        result.pop("fit_seconds")
    assert results[0] == results[1]
    assert results[0]["bits"] is None or math.isfinite(results[0]["bits"])


def test_a_users_network_as_it_comes_is_not_trained(networks, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:images")
    measured = measure(data, "as-is", tmp_path)
    assert measured["fit_seconds"] == 0.0
    assert measured["test_error"] > 0.8
    assert measured["bits"] is None
    assert any(sentence.startswith("Inductive bias") for sentence in read(tmp_path))


def test_initialisations_set_what_they_say(networks):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:small")
    torch.manual_seed(0)
    first = {
        c.name: next(m for m in c.build(data, "smoke", 0)().modules() if isinstance(m, nn.Linear))
        for c in BENCH.contenders
    }
    assert float(first["he"].weight.std()) == pytest.approx((2 / 64) ** 0.5, rel=0.1)
    assert float(first["xavier"].weight.std()) == pytest.approx((2 / 96) ** 0.5, rel=0.1)
    assert float(first["he"].bias.abs().max()) == 0.0
    assert float(first["default"].weight.abs().max()) <= 1 / 8 + 1e-6


def test_what_is_not_covered_is_said_in_words(networks, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:normalised")
    assert "BatchNorm1d" in BENCH.contender("effective-theory").applies(data)
    measured = measure(data, "own-weights", tmp_path)
    assert measured["critical_distance"] is None
    assert measured["test_error"] is not None
    assert any(s.startswith("Criticality: not measured") and "BatchNorm1d" in s for s in read(tmp_path))


def test_a_network_that_is_always_the_same_has_no_ensemble(networks, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:trained")
    assert data.fixed
    measured = measure(data, "as-is", tmp_path)
    assert measured["kernel_slope"] is None
    assert any("same weights each time" in sentence for sentence in read(tmp_path))


def test_measuring_does_not_train_the_users_own_object(networks, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{networks}:trained")
    before = [p.detach().clone() for p in data.make().parameters()]
    measure(data, "own-weights", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, data.make().parameters(), strict=True))


def test_a_table_with_a_number_as_its_target(networks, tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"width": rng.normal(size=200), "kind": np.where(rng.random(200) < 0.5, "a", "b")})
    frame["price"] = 3 * frame["width"] + (frame["kind"] == "a") + 0.1 * rng.normal(size=200)
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = BENCH.load(tmp_path / "t.csv", "price", "smoke", 0, model=f"{networks}:columns")
    assert data.X.shape[1] == 3
    assert data.n_classes is None
    out = tmp_path / "out"
    out.mkdir()
    measured = measure(data, "own-weights", out)
    assert measured["accuracy"] is None
    assert measured["test_error"] < 0.5
    assert any("the target in 10 bins" in sentence for sentence in read(out))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("wrong", r"does not fit the data: inputs of shape \(2, 1, 8, 8\)"),
        ("few", r"gives \(2, 3\).*where \(2, 10\)"),
        ("broken", "RuntimeError: no weights here"),
        ("nothing", "returned a NoneType"),
        ("missing", "the module has no missing"),
    ],
)
def test_a_bad_network_is_one_sentence(networks, function, words):
    with pytest.raises(DataError, match=words):
        BENCH.load(None, None, "smoke", 0, model=f"{networks}:{function}")


def test_bad_data_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="module:function"):
        BENCH.load(None, None, "smoke", 0, model=str(tmp_path))
    with pytest.raises(DataError, match="missing"):
        BENCH.load(tmp_path / "missing.csv", "y", "smoke", 0)
    pd.DataFrame({"a": range(50), "b": range(50)}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(DataError):
        BENCH.load(tmp_path / "t.csv", None, "smoke", 0)


# -- what compare does with it -------------------------------------------------------------------------------


def board(tmp_path, reading):
    result = Result("x", "done", metrics={m.name: 0.5 for m in BENCH.metrics}, seconds=1.0, reading=reading)
    rows = build_rows(BENCH, BENCH.contenders[:1], (0,), {}, {BENCH.contenders[0].name: {0: result}})
    return Leaderboard(
        "theory", "smoke", (0,), True, DataNote("digits", "", "", ""), BENCH.metrics, rows,
        describe_environment(), "2026-01-01T00:00:00+00:00", folder=tmp_path,
    )  # fmt: skip


def test_the_report_shows_the_reading(tmp_path):
    page = render(board(tmp_path, ("Criticality: it is <critical>.",)), None)
    assert "What was read" in page
    assert "it is &lt;critical&gt;." in page
    assert "What was read" not in render(board(tmp_path, ()), None)


def test_a_metric_without_a_better_side_has_no_arrow_and_ranks_nothing(tmp_path):
    shown = board(tmp_path, ())
    assert heading(shown, "information") == "I(X;T), last hidden layer [bits]"
    with pytest.raises(PaperbackError, match="neither primary nor a cost"):
        replace(BENCH, metrics=(Metric("a", "a", better="neither", primary=True),))


def test_a_folder_without_a_config_is_not_offered_to_load(tmp_path):
    result = Result("x", "done", metrics={}, artefact="artefact")
    row = summarise(BENCH.contenders[0], {0: result}, 1, BENCH.metrics)
    folder = tmp_path / row.artefact
    folder.mkdir(parents=True)
    assert not row.holds_model(tmp_path)
    (folder / "config.json").write_text(json.dumps({}))
    assert row.holds_model(tmp_path)
