"""The bench of the layers wing: its tasks, its contenders, a user's layer."""

import math

import pytest
import torch
from torch import nn

from paperback.compare.bench import Bench
from paperback.errors import DataError
from paperback.layers import bench
from paperback.layers.bench import BENCH, SYMBOLS, TASKS, Residual, _to_point_at, _twice
from paperback.layers.sequence_tasks import NO_TARGET

CONTENDERS = [contender.name for contender in BENCH.contenders if contender.name != "your-layer"]


@pytest.fixture(scope="module")
def data():
    return BENCH.load(None, None, "smoke", 0)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module on the path, with layers that are right and wrong."""
    (tmp_path / "users_layers.py").write_text(
        "import torch\n"
        "good = lambda width: torch.nn.Linear(width, width)\n"
        "wider = lambda width: torch.nn.Linear(width, 2 * width)\n"
        "no_module = lambda width: width\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "users_layers"


def test_the_bench_is_what_compare_expects():
    assert isinstance(BENCH, Bench)
    assert BENCH.takes_model
    assert BENCH.primary.name == "right"
    assert BENCH.cost.name == "fit_seconds"
    assert {c.name for c in BENCH.contenders if c.kind == "baseline"} == {"lstm", "transformer"}


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_contender_is_measured_and_saved(data, name, tmp_path):
    contender = BENCH.contender(name)
    assert contender.applies(data) is None
    measured = BENCH.evaluate(contender, data, "smoke", 0, tmp_path)
    assert set(measured) == {metric.name for metric in BENCH.metrics}
    assert all(value is None or math.isfinite(value) for value in measured.values())
    assert (measured["tour_gap"] is None) == (name != "pointer-network")
    assert measured["flops"] > 0
    assert measured["right"] == pytest.approx(sum(measured[t] for t in (*TASKS, "hull")) / 4)
    assert {path.name for path in tmp_path.iterdir()} == {f"{t}.safetensors" for t in (*TASKS, "hull")}


def test_the_same_seed_measures_the_same(data, tmp_path):
    found = [BENCH.evaluate(BENCH.contender("lstm"), data, "smoke", 3, tmp_path / str(i)) for i in range(2)]
    assert all(found[0][name] == found[1][name] for name in (*TASKS, "hull", "longer", "flops"))


@pytest.mark.parametrize("task", TASKS)
def test_the_places_to_point_at_hold_the_answers(task):
    drawn = TASKS[task](50, 12, torch.Generator().manual_seed(0))
    features, targets = _to_point_at(task, drawn)
    assert (targets[:, -1] == 0).all()
    assert torch.equal(features.argmax(-1), drawn.tokens)
    answers = drawn.targets[drawn.targets != NO_TARGET].view(50, -1)
    assert torch.equal(drawn.tokens.gather(1, targets[:, :-1] - 1), answers)
    assert (answers < SYMBOLS).all()


def test_points_are_read_twice_with_a_mark():
    points = torch.rand(2, 3, 2)
    twice = _twice(points)
    assert twice.shape == (2, 6, 3)
    assert torch.equal(twice[:, :3, :2], twice[:, 3:, :2])
    assert twice[0, :, 2].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_layer_that_learns_is_seen_to_learn(tmp_path):
    easy = bench.LayersData(width=32, length=6, steps=250, batch_size=64, tested=200, layer=None)
    learner = BENCH.contender("lstm").build(easy, "smoke", 0)
    _, right, _ = learner.sequence("copying", easy, 0)
    assert right > 0.5  # guessing is right once in eight


def test_a_users_layer_takes_part(module, tmp_path):
    data = BENCH.load(None, None, "smoke", 0, model=f"{module}:good")
    contender = BENCH.contender("your-layer")
    assert contender.applies(data) is None
    measured = BENCH.evaluate(contender, data, "smoke", 0, tmp_path)
    assert measured["parameters"] == 2 * (16 * 16 + 16) + 2 * 16  # with their two norms
    assert measured["flops"] == 2 * 2 * 1024 * 16 * 16


def test_without_a_layer_of_the_users_its_row_says_how_to_bring_one(data):
    assert "--model module:function" in BENCH.contender("your-layer").applies(data)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "has no nothing"),
        ("number", "is a int; give a function"),
    ],
)
def test_bad_functions(module, name, words):
    with pytest.raises(DataError, match=words):
        BENCH.load(None, None, "smoke", 0, model=f"{module}:{name}")


def test_bad_layers(module, tmp_path):
    for name, words in (
        ("wider", "a layer keeps the shape"),
        ("no_module", "returned a int; return a module"),
    ):
        data = BENCH.load(None, None, "smoke", 0, model=f"{module}:{name}")
        with pytest.raises(DataError, match=words):
            BENCH.evaluate(BENCH.contender("your-layer"), data, "smoke", 0, tmp_path / name)


def test_bad_arguments(tmp_path):
    for call, words in (
        (lambda: BENCH.load(tmp_path, None, "smoke", 0), "leave --data and --target out"),
        (lambda: BENCH.load(None, None, "smoke", 0, model="no_such_module:f"), "no module no_such_module"),
        (lambda: BENCH.load(None, None, "smoke", 0, model=str(tmp_path)), "give module:function"),
    ):
        with pytest.raises(DataError, match=words):
            call()


def test_a_recurrent_module_of_torch_is_a_layer_too():
    u = torch.randn(2, 5, 4)
    assert Residual(4, nn.GRU(4, 4, batch_first=True))(u).shape == u.shape
