"""The information of layers and planes over a training, and the 12-bit task they are shown on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from scipy import stats
from torch import nn

from paperback.data.simulate.icosahedron import icosahedron_corners, icosahedron_task
from paperback.errors import DataError
from paperback.study import run_study
from paperback.testing.theory import check_measurement
from paperback.theory import Measurement
from paperback.theory.adaptive_information import (
    InformationPlane,
    compression_score,
    ebab_edges,
    mutual_information,
)
from paperback.theory.information import AdaptiveKDE, FixedBins, Sample, entropy
from paperback.theory.studies.adaptive_information.stack import ACTIVATIONS, WIDTHS, Condition, Stack
from paperback.training import train


@pytest.fixture(scope="module")
def task():
    return icosahedron_task()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    T = np.maximum(rng.standard_normal((400, 3)), 0)
    return T, (T.sum(1) > 1.2).astype(int)


# -- the task ------------------------------------------------------------------------------------------------


def test_task_is_balanced_and_whole(task):
    assert task.x.shape == (4096, 12)
    assert len(task.x.unique(dim=0)) == 4096
    assert len(task.score.unique()) == 64
    assert float(task.y.double().mean()) == pytest.approx(0.497, abs=5e-4)


def test_corners_are_an_icosahedron():
    cosines = icosahedron_corners() @ icosahedron_corners().T
    expected = sorted([1.0, -1.0] + [1 / math.sqrt(5)] * 5 + [-1 / math.sqrt(5)] * 5)
    assert np.sort(cosines, axis=1) == pytest.approx(np.tile(expected, (12, 1)), abs=1e-12)


def test_rotations_and_reflections_change_no_label(task):
    """All 120 symmetries: permutations of the corners that keep the cosines."""
    cosines = (icosahedron_corners() @ icosahedron_corners().T).round(6)
    frame = [0, *np.flatnonzero(np.isclose(cosines[0], cosines[0, 1]))[:1]]
    third = next(i for i in range(12) if abs(np.linalg.det(icosahedron_corners()[[*frame, i]])) > 0.1)
    frame.append(third)
    found = 0
    for images in itertools.permutations(range(12), 3):
        if not np.array_equal(cosines[np.ix_(images, images)], cosines[np.ix_(frame, frame)]):
            continue
        A = np.linalg.solve(icosahedron_corners()[frame], icosahedron_corners()[list(images)])
        order = np.argmax(icosahedron_corners() @ A @ icosahedron_corners().T, axis=1)
        code = (task.x[:, order].double() @ 2.0 ** torch.arange(12).double()).long()
        assert torch.equal(task.y[code], task.y)
        assert torch.equal(task.score[code], task.score)
        found += 1
    assert found == 120


# -- one layer -----------------------------------------------------------------------------------------------


def test_result_is_a_measurement_with_both_informations(layer):
    found = mutual_information(*layer)
    assert isinstance(found, Measurement)
    assert (found.name, found.unit, found.n) == ("I(X;T)", "bits", 400)
    assert 0 < found["I(T;Y)"].value <= entropy(layer[1]) < found.value < math.log2(400)
    assert found.interval is None
    assert "log2 n" in found.bias
    assert "I(T;Y)" in str(found)
    assert len(found.table()) == 2


@pytest.mark.parametrize(
    "convert", [torch.tensor, list, lambda a: torch.tensor(a, requires_grad=a.dtype == float)]
)
def test_tensors_and_lists_are_taken(convert, layer):
    assert mutual_information(convert(layer[0]), convert(layer[1])).value == mutual_information(*layer).value


def test_feature_maps_are_flattened(layer):
    T = np.tile(layer[0], (1, 4)).reshape(400, 3, 2, 2)
    assert mutual_information(T, layer[1]).value == mutual_information(T.reshape(400, -1), layer[1]).value


def test_saturation_is_flagged():
    rng = np.random.default_rng(0)
    T, y = rng.standard_normal((200, 30)), np.arange(200) % 2
    for estimator in ("ebab", "fixed", "akde"):
        found = mutual_information(T, y, estimator=estimator)
        assert found.flags == {"saturated"}
        assert found.value == pytest.approx(math.log2(200), abs=0.1)
    assert mutual_information(T > 0, y, np.arange(200) % 50).flags == {"saturated"}  # I(X;T) = H(X) = log2 50
    assert not mutual_information(T[:, :1] > 0, y).flags
    assert not mutual_information(T, y, estimator="cs_qmi").flags


def test_kde_gives_its_bounds_as_interval(layer):
    found = mutual_information(*layer, estimator="akde")
    direct = AdaptiveKDE().estimate(Sample(layer[0], layer[1]))
    assert found.interval == direct.xt_bounds
    assert found["I(T;Y)"].interval == direct.ty_bounds
    assert found.confidence is None


def test_many_rows_are_subsampled_for_pairwise_estimators(layer):
    whole = mutual_information(*layer, estimator="akde")
    part = mutual_information(*layer, estimator="akde", max_points=300)
    assert part.interval[0] < whole.value < part.interval[1]
    assert part.standard_error > 0
    assert "300 of 400" in part.notes[0]
    assert part.value == mutual_information(*layer, estimator="akde", max_points=300).value
    assert part.value != mutual_information(*layer, estimator="akde", max_points=300, seed=1).value


def test_interval_over_subsets_has_the_width_that_theory_gives_it():
    """A symmetric channel with four symbols: var I = var log2 p(x,y) / p(x) p(y) / n (delta method)."""
    rng = np.random.default_rng(0)
    expected = math.log2(0.7 / 0.1) * math.sqrt(0.7 * 0.3 / 1000)
    errors = []
    for i in range(20):
        sent = rng.integers(0, 4, 1000)
        heard = np.where(rng.random(1000) < 0.6, sent, rng.integers(0, 4, 1000))
        found = mutual_information(heard[:, None], sent, subsets=20, seed=i)["I(T;Y)"]
        errors.append(found.standard_error)
        half = (found.interval[1] - found.interval[0]) / 2
        assert half == pytest.approx(stats.t.ppf(0.975, 19) * found.standard_error)
        assert sum(found.interval) / 2 == pytest.approx(found.value)
    assert np.mean(errors) == pytest.approx(expected, rel=0.1)


def test_few_rows_warn(layer):
    with pytest.warns(UserWarning, match="99 inputs"):
        found = mutual_information(layer[0][:99], layer[1][:99])
    assert found.notes[0] == "Only 99 inputs."


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"y": np.zeros(399, int)}, r"y has shape \(399,\) for 400 rows"),
        ({"y": np.linspace(0, 1, 400)}, "y is of dtype float64; give integers"),
        ({"y": None}, "y is missing"),
        ({"x_ids": np.arange(3)}, "x_ids has shape"),
        ({"x": np.zeros((3, 2))}, "x has 3 rows"),
        ({"T": np.full((400, 2), np.inf)}, r"T is not finite at \(0, 0\)"),
        ({"T": 3.0}, "T is a single number"),
        ({"n_bins": 1}, "n_bins is 1"),
        ({"estimator": "bins"}, "estimator is 'bins'"),
        ({"noise": 0.1}, "noise is no setting of the estimator 'ebab'"),
        ({"low": 0.5}, "low is 0.5"),
    ],
)
def test_bad_input_is_refused(change, says, layer):
    arguments = {"T": layer[0], "y": layer[1]} | change
    with pytest.raises(DataError, match=says):
        mutual_information(**arguments)


# -- planes --------------------------------------------------------------------------------------------------


def test_plane_measures_what_the_layers_give_out(model, task):
    plane = InformationPlane(model, task.x, task.y)
    assert plane.record(0)
    table = plane.table().set_index("layer")
    assert list(table.index) == ["1", "3", "4"]  # activations and the output
    for name, depth in (("1", 2), ("3", 4), ("4", 5)):
        direct = mutual_information(model[:depth](task.x), task.y)
        assert table["I(X;T)"][name] == pytest.approx(direct.value)
        assert table["I(T;Y)"][name] == pytest.approx(direct["I(T;Y)"].value)
    only = InformationPlane(model, task.x, task.y, layers=["0"])
    only.record(0)
    assert list(only.table()["layer"]) == ["0"]


def test_plane_watches_a_training(model, task):
    plane = InformationPlane(model, task.x, task.y, n=5, epochs=20)
    plane.record(0)
    train(
        model,
        lambda net, batch, _: nn.functional.cross_entropy(net(batch[0]), batch[1]),
        (task.x, task.y),
        epochs=20,
        batch_size=512,
        lr=0.02,
        callbacks=[plane],
        progress=False,
    )
    table = plane.table()
    assert sorted(table["epoch"].unique()) == [e for e in range(21) if plane.due(e)]
    assert {0, 1, 20} <= set(table["epoch"])
    course = plane.measurement("3")
    assert list(course.index) == sorted(table["epoch"].unique())
    score = plane.compression().set_index("layer")
    assert score["compression"]["3"] == pytest.approx(course.value.max() - course.value[-1])
    assert score["end"]["3"] == course.value[-1]
    figure = plane.plot()
    axes = figure.axes[0]
    assert isinstance(axes, Axes)
    assert len(axes.get_legend().get_texts()) == 3
    assert not any(module._forward_hooks for module in model.modules())


def test_fixed_bins_wait_for_the_largest_activation(model, task):
    plane = InformationPlane(model, task.x, task.y, layers=["1"], estimator="fixed", schedule="all")
    states = []
    for epoch in range(3):
        plane.record(epoch)
        states.append(model[:2](task.x).detach().double().numpy())
        with torch.no_grad():
            model[0].weight.mul_(2 if epoch == 0 else 0.25)
    bins = FixedBins(bin_range=(0.0, max(float(T.max()) for T in states)))
    expected = [bins.estimate(Sample(T, task.y.numpy())).xt for T in states]
    assert plane.table()["I(X;T)"].tolist() == pytest.approx(expected)


def test_activations_that_wait_go_to_disk(model, task, monkeypatch):
    """As float16 once they are too many: the same information but for the rounding."""

    def course():
        plane = InformationPlane(model, task.x, task.y, layers=["1"], estimator="fixed", schedule="all")
        for epoch in range(3):
            plane.record(epoch)
        return plane

    in_memory = course()
    monkeypatch.setattr("paperback.theory.adaptive_information.plane.MEMORY_LIMIT", 4096 * 4 * 4 + 1)
    on_disk = course()
    kinds = [T.dtype for T in on_disk._kept.values()]
    assert kinds == [torch.float32, torch.float16, torch.float16]
    assert on_disk.table()["I(X;T)"].to_numpy() == pytest.approx(
        in_memory.table()["I(X;T)"].to_numpy(), abs=0.05
    )


def test_log_schedule_spreads_its_records(task):
    plane = InformationPlane(None, task.x, task.y, n=50, epochs=1500)
    epochs = [e for e in range(1501) if plane.due(e)]
    assert 35 <= len(epochs) <= 52
    late = np.array(epochs[-20:])
    assert (late[1:-1] / late[:-2]).max() < 1.25
    assert [InformationPlane(None, task.x, task.y, schedule=[3, 7]).due(e) for e in (0, 3, 5, 7)] == [
        0,
        1,
        0,
        1,
    ]


def test_compression_score():
    assert compression_score([[1.0, 5.0], [4.0, 3.0], [2.0, 2.0]]).tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, t: InformationPlane(m, t.x, t.y, schedule="linear"), "schedule is 'linear'"),
        (lambda m, t: InformationPlane(m, t.x, t.y, n=0), "n is 0"),
        (lambda m, t: InformationPlane(m, t.x, t.y[:5]), "y has shape"),
        (lambda m, t: InformationPlane(m, t.x, t.y, layers=["nose"]).record(0), "'nose'"),
        (lambda m, t: InformationPlane(None, t.x, t.y).record(0), "no model"),
        (lambda m, t: InformationPlane(m, t.x, t.y).table(), "nothing was recorded"),
        (lambda m, t: InformationPlane(m, t.x, t.y).measurement("1"), "layer '1' was not recorded"),
        (lambda m, t: InformationPlane(m, t.x, t.y).add(0, {"1": t.x[:9]}), "layer '1' has 9 rows"),
        (lambda m, t: InformationPlane(m, t.x, t.y).add(-1, {"1": t.x}), "epoch -1 is negative"),
    ],
)
def test_planes_that_cannot_be(call, says, model, task):
    with pytest.raises(DataError, match=says):
        call(model, task)


def test_an_epoch_is_recorded_once_and_a_failure_loses_nothing(model, task):
    plane = InformationPlane(model, task.x, task.y, layers=["1"])
    plane.record(0)
    with pytest.raises(DataError, match="epoch 0 is negative or has been recorded"):
        plane.record(0)
    with pytest.raises(DataError, match="not finite"):
        plane.add(1, {"1": torch.full((4096, 2), math.nan)})
    assert plane.record(1)
    assert plane.table()["epoch"].tolist() == [0, 1]
    assert not plane.record(997)
    assert plane.record(997, force=True)


# -- the study's networks ------------------------------------------------------------------------------------


def test_a_stack_trains_each_network_as_if_it_were_alone(task):
    conditions = [Condition("tanh", 0.0, 3), Condition("relu", 0.01, 3), Condition("relu", 0.0, 5)]
    stack = Stack(conditions, len(task.y))
    assert [c.activation for c in stack.conditions] == ["relu", "relu", "tanh"]
    rows = torch.arange(64)
    for index, condition in enumerate(stack.conditions):
        layers: list[nn.Module] = []
        for weight, bias in zip(stack.weights, stack.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data, linear.bias.data = weight[index].T.clone(), bias[index, 0].clone()
            layers.append(linear)
        alone = nn.ModuleList(layers)

        def forward(x, alone=alone, act=ACTIVATIONS[condition.activation]):
            for depth, linear in enumerate(alone):
                x = linear(x) if depth == len(WIDTHS) - 2 else act(linear(x))
            return x

        chosen = stack.order[index][rows]
        norms = sum((linear.weight**2).sum() for linear in list(alone)[:-1])
        loss = nn.functional.cross_entropy(forward(task.x[chosen]), task.y[chosen])
        (loss + 0.5 * condition.penalty * norms).backward()
        stack.zero_grad()
        stack.loss(task, rows).backward()
        for depth, linear in enumerate(alone):
            torch.testing.assert_close(stack.weights[depth].grad[index], linear.weight.grad.T)
            torch.testing.assert_close(stack.biases[depth].grad[index, 0], linear.bias.grad)


def test_networks_of_one_seed_begin_alike(task):
    stack = Stack([Condition("relu", 0.0, 1), Condition("elu", 0.0, 1), Condition("relu", 0.0, 2)], 4096)
    names = [(c.activation, c.seed) for c in stack.conditions]
    a, b, c = (names.index(k) for k in (("relu", 1), ("elu", 1), ("relu", 2)))
    for weight in stack.weights:
        assert torch.equal(weight[a], weight[b])
        assert not torch.equal(weight[a], weight[c])
        assert weight.abs().max() <= weight.shape[1] ** -0.5
    assert torch.equal(stack.order[a], stack.order[b])


def test_the_study_runs(tmp_path):
    finding = run_study("adaptive-information", budget="smoke", out=tmp_path / "run", progress=False)
    assert finding.status == "complete"
    assert len(finding.claims) == 8
    assert {f.name for f in finding.figures} == {"planes", "layers", "resolution"}


def test_edges_are_exported():
    assert len(ebab_edges(np.arange(100.0), 10)) == 12


@pytest.mark.parametrize("estimator", ["ebab", "fixed", "akde", "cs_qmi", "ksg"])
def test_every_estimator_keeps_the_contract_of_the_wing(estimator, layer):
    T, y = layer
    check_measurement(lambda _: mutual_information(T, y, estimator=estimator, x=T), seeded=False)
    if estimator in ("akde", "cs_qmi"):  # these draw subsets of many rows
        check_measurement(
            lambda seed: mutual_information(T, y, estimator=estimator, x=T[:, :1], max_points=200, seed=seed)
        )


def test_a_plane_keeps_the_contract_of_the_wing(model, task):
    def measure(_):
        plane = InformationPlane(model, task.x, task.y)
        plane.record(0)
        plane.record(1)
        return plane.measurement("3")

    check_measurement(measure, model=model, seeded=False)
