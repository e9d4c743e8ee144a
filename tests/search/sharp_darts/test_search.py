"""The search: who moves what, the second order against the exact one, and resumed bit for bit."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from paperback.errors import ArtefactError, DataError, PaperbackError
from paperback.search import Trainable
from paperback.search.sharp_darts import (
    CellSpace,
    Chain,
    DenseKit,
    DifferentiableSearch,
    Genotype,
    HyperCuboid,
    architecture_from,
    search_seeds,
    unrolled_gradient,
)
from paperback.search.sharp_darts.search import STATE

SPACE = HyperCuboid((2, 4), 2, ("relu", "linear"), DenseKit(5, classes=3, hidden=4), strides=(1,))
CELLS = CellSpace(("none", "skip_connect", "max_pool_3x3"), cells=3, nodes=1, width=2, channels=1, classes=3)
SEARCH = DifferentiableSearch(SPACE, steps=6, batch_size=8, arch_lr=3e-3, seed=1)


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return (x[:30], y[:30]), (x[30:], y[30:])


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_search_gives_an_architecture_that_can_be_built(data):
    result = SEARCH.run(*data, progress=False)
    assert result.history["steps"].shape == (7, 2, 8)
    np.testing.assert_allclose(result.history["steps"].sum(-1), 1, rtol=1e-5)
    assert result.losses.shape == (6, 2)
    assert SPACE.build(result.architecture)(data[0][0]).shape == (30, 3)
    (trial,) = result.trials
    assert result.best is trial
    assert json.loads(json.dumps(trial.config)) == trial.config
    assert architecture_from(trial.config) == result.architecture
    predicted = result.supernet.eval()(data[1][0]).argmax(1)
    assert trial.score == pytest.approx((predicted == data[1][1]).double().mean().item())
    assert len(result.plot().axes) == 1


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("weighting", ["max_w", "scalar"])
def test_cells_are_searched_too(order, weighting):
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 3
    search = DifferentiableSearch(CELLS, weighting, order, steps=2, batch_size=4)
    result = search.run((x, y), (x, y), progress=False)
    assert isinstance(result.architecture, Genotype)
    assert architecture_from(result.best_config) == result.architecture
    assert CELLS.build(result.architecture)(x).shape == (20, 3)


@pytest.mark.parametrize("order", [1, 2])
def test_skipped_operations_keep_their_weights(data, order):
    space = HyperCuboid((2, 4), 2, ("relu", "linear"), DenseKit(5, 3, 4), strides=(1,), skip_below=0.9)
    running = DifferentiableSearch(space, "scalar", order, steps=3, batch_size=8).start(*data)
    before = {name: p.detach().clone() for name, p in running.weights.items()}
    for _ in range(3):
        running.step()
    kept = [name for name, p in running.weights.items() if torch.equal(p, before[name])]
    assert sum(name.startswith("steps.") for name in kept) >= 10  # of 16; one for each width out is computed
    assert not any(name.startswith(("ends.", "head.")) for name in kept)


def test_a_search_learns_the_weights_and_moves_the_alphas(data):
    result = replace(SEARCH, steps=150, lr=0.1, arch_lr=9e-3).run(*data, progress=False)
    assert result.losses[-20:].mean() < 0.6 * result.losses[:5].mean()
    assert np.abs(result.history["steps"][-1] - result.history["steps"][0]).max() > 1e-2


def test_alphas_move_by_the_validation_half_and_weights_by_the_training_half(data):
    running = SEARCH.start(*data)
    train, val = running._batch(running.train, "train"), running._batch(running.val, "val")
    alphas = {name: p.detach().clone() for name, p in running.alphas.items()}
    weights = {name: p.detach().clone() for name, p in running.weights.items()}
    running._step_alphas(train, val)
    assert same(running.weights, weights)
    assert not same(running.alphas, alphas)
    alphas = {name: p.detach().clone() for name, p in running.alphas.items()}
    running._step_weights(train)
    assert same(running.alphas, alphas)
    assert not same(running.weights, weights)
    assert not any(name.startswith("alphas.") for name in running.weights)
    # With other training rows the first step of the alphas is the same, that of the weights not.
    other = SEARCH.start((data[0][0] + 1, data[0][1]), data[1])
    first = SEARCH.start(*data)
    first.step(), other.step()
    assert same(first.alphas, other.alphas)
    assert not same(first.weights, other.weights)


class Quadratic(nn.Module):
    """Outputs alpha_i w_i + w_i^2 / 2 x: its loss is quadratic in w, and the finite difference exact."""

    def __init__(self):
        super().__init__()
        self.alphas = nn.ParameterDict({"a": torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)})
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64))

    def forward(self, x):
        return (self.alphas["a"] * self.w * x).sum(-1) + 0.5 * (self.w**2).sum()


@pytest.mark.parametrize("with_momenta", [False, True])
def test_the_unrolled_gradient_is_the_exact_one_on_a_quadratic(with_momenta):
    model, xi, decay, momentum = Quadratic(), 0.1, 0.02, 0.9
    x, x_val = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    buffer = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64) if with_momenta else torch.zeros(3).double()

    def loss(outputs, targets):
        return (outputs - targets).mean()

    rows, val_rows = (x, torch.zeros(4).double()), (x_val, torch.zeros(4).double())
    value, (found,) = unrolled_gradient(
        model, loss, rows, val_rows, xi=xi, momentum=momentum, weight_decay=decay,
        momenta={"w": buffer} if with_momenta else None,
    )  # fmt: skip
    alpha = model.alphas["a"]
    (slope,) = torch.autograd.grad(loss(model(x), rows[1]), model.w, create_graph=True)
    ahead = model.w - xi * (slope + decay * model.w + momentum * buffer)
    expected = torch.func.functional_call(model, {"w": ahead}, (x_val,)).mean()
    (exact,) = torch.autograd.grad(expected, alpha)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)
    assert value.item() == pytest.approx(expected.item())


def test_without_a_step_the_second_order_is_the_first(data):
    supernet = SEARCH.start(*data).supernet.double()
    rows = [(x.double(), y) for x, y in data]
    loss = nn.functional.cross_entropy
    _, second = unrolled_gradient(supernet, loss, *rows, xi=0.0)
    first = torch.autograd.grad(loss(supernet(rows[1][0]), rows[1][1]), list(supernet.alphas.values()))
    torch.testing.assert_close(tuple(second), first)


@pytest.mark.parametrize("order", [1, 2])
def test_resumed_from_its_state_it_ends_bit_for_bit_alike(data, order):
    search = replace(SEARCH, order=order)
    whole = search.start(*data)
    half = search.start(*data)
    for step in range(6):
        whole.step()
        if step < 3:
            half.step()
    state = half.state_dict()
    half.step()  # the state that was taken does not move with it
    other = replace(search).start(*data)
    other.load_state_dict(state)
    for _ in range(3):
        other.step()
    assert same(other.supernet.state_dict(), whole.supernet.state_dict())
    a, b = other.result(), whole.result()
    np.testing.assert_array_equal(a.history["steps"], b.history["steps"])
    np.testing.assert_array_equal(a.losses, b.losses)
    assert other._sgd.param_groups[0]["lr"] == whole._sgd.param_groups[0]["lr"]


def test_killed_and_run_again_it_ends_alike(data, tmp_path, monkeypatch):
    whole = SEARCH.run(*data, progress=False)
    step, calls = type(SEARCH.start(*data)).step, []

    def killed(self):
        calls.append(self.steps_done)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr("paperback.search.sharp_darts.search.RunningSearch.step", killed)
    with pytest.raises(KeyboardInterrupt):
        SEARCH.run(*data, store=tmp_path, store_every=2, progress=False)
    again = SEARCH.run(*data, store=tmp_path, store_every=2, progress=False)
    assert calls == [0, 1, 2, 3, 4, 4, 5]
    assert same(again.supernet.state_dict(), whole.supernet.state_dict())
    np.testing.assert_array_equal(again.history["steps"], whole.history["steps"])


def test_a_folder_of_another_search_or_a_damaged_one_is_refused(data, tmp_path):
    SEARCH.run(*data, store=tmp_path, progress=False)
    with pytest.raises(DataError, match="another search"):
        replace(SEARCH, seed=5).run(*data, store=tmp_path, progress=False)
    (x, y), val = data
    with pytest.raises(DataError, match="another search"):
        SEARCH.run((x + 1, y), val, store=tmp_path, progress=False)
    content = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtefactError, match="damaged"):
        SEARCH.run(*data, store=tmp_path, progress=False)


def test_it_is_a_trainable(data):
    running = SEARCH.start(*data)
    assert isinstance(running, Trainable)
    running.setup({"lr": 0.1, "weighting": "scalar"}, seed=3)
    assert running.settings == replace(SEARCH, lr=0.1, weighting="scalar", seed=3)
    assert running.step()["score"] < 0
    before = [p.detach().clone() for p in running.weights.values()]
    rate = running._sgd.param_groups[0]["lr"]
    running.reconfigure({"lr": 0.05, "arch_lr": 1e-3})
    assert running._sgd.param_groups[0]["lr"] == pytest.approx(rate / 2, rel=0.01)
    assert running._adam.param_groups[0]["lr"] == 1e-3
    assert all(torch.equal(a, b) for a, b in zip(before, running.weights.values(), strict=True))
    for config, words in (({"steps": 9}, "sets 'steps'"), ({"seed": 9}, "sets 'seed'")):
        with pytest.raises(DataError, match=words):
            running.reconfigure(config)
    with pytest.raises(DataError, match="sets 'rate'"):
        running.setup({"rate": 1}, seed=0)


def test_the_users_random_numbers_are_left_alone(data):
    before = torch.get_rng_state()
    replace(SEARCH, space=replace(SPACE), steps=2).run(*data, progress=False)
    CellSpace()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "engine", ["local", "process", pytest.param("ray", marks=pytest.mark.slow)], indirect=True
)
def test_seeds_on_any_engine(data, engine):
    search = replace(SEARCH, steps=2)
    result = search_seeds(search, (4, 7), *data, engine=engine, workers=2)
    assert [trial.config["seed"] for trial in result] == [4, 7]
    for trial in result:
        alone = replace(search, seed=trial.config["seed"]).run(*data, progress=False)
        assert isinstance(alone.architecture, Chain)
        assert architecture_from(trial.config) == alone.architecture
        assert trial.score == alone.best.score
    with pytest.raises(DataError, match="seeds is empty"):
        search_seeds(search, (), *data)


PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from paperback.search.sharp_darts import DifferentiableSearch, HyperCuboid

class Plain:
    def stem(self, width, affine): return nn.Linear(5, width)
    def operation(self, name, width_in, width_out, stride, affine): return nn.Linear(width_in, width_out)
    def end(self, width, affine): return nn.Linear(width, 4)
    def head(self): return nn.Linear(4, 3)

rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if processes > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
x, y = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
space = HyperCuboid((2, 4), 2, ("a", "b"), Plain(), strides=(1,))
search = DifferentiableSearch(space, steps=5, batch_size=8, arch_lr=3e-3)
running = search.start((x[:12], y[:12]), (x[12:], y[12:]))
for _ in range(5):
    running.step()
torch.save(dict(running.supernet.state_dict()), f"{folder}/{processes}-{rank}.pt")
"""


@pytest.mark.slow
def test_processes_that_share_the_batches_do_what_one_does(tmp_path):
    """With blocks that see no other row of the batch; a batch norm would see the share of its process."""
    groups = [
        subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(n), str(tmp_path)])
        for n in (1, 2)
        for rank in range(n)
    ]
    assert [process.wait(timeout=150) for process in groups] == [0, 0, 0]
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert same(*two)
    for name in one:
        torch.testing.assert_close(one[name], two[0][name], rtol=1e-4, atol=1e-5)


def test_a_seed_that_fails_costs_itself(data):
    def loss(outputs, targets):
        return outputs.sum() * float("nan")

    result = search_seeds(SEARCH, (0, 1), *data, loss)
    assert [trial.status for trial in result] == ["failed", "failed"]
    assert "not finite" in result.trials[0].reason


def test_targets_may_be_numbers(data):
    rows = [(x, x[:, :1]) for x, _ in data]
    space = HyperCuboid((2, 4), 2, ("relu",), DenseKit(5, classes=1), strides=(1,))
    result = DifferentiableSearch(space, steps=2, batch_size=8).run(
        *rows, nn.functional.mse_loss, progress=False
    )
    assert result.best.score < 0


def test_a_loss_that_is_not_finite_leaves_the_weights(data):
    running = SEARCH.start(*data)
    running.step()
    weights = {name: p.detach().clone() for name, p in running.weights.items()}
    running.train[0][:] = float("inf")
    with pytest.raises(PaperbackError, match="not finite in step 2"):
        running.step()
    assert same(running.weights, weights)


def test_a_large_rate_of_the_alphas_is_warned_about(data):
    with pytest.warns(UserWarning, match="arch_lr is 0.02"):
        DifferentiableSearch(SPACE, arch_lr=0.02).start(*data)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weighting": "sum"}, "weighting is 'sum'"),
        ({"order": 3}, "order is 3"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 1}, "batch_size 1"),
        ({"arch_lr": 0.0}, "arch_lr 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr_min": 1.0}, "lr_min is 1.0"),
        ({"power": 0.9}, "power is 0.9"),
        ({"warmup": 6}, "warmup is 6"),
        ({"order": 2, "space": replace(SPACE, recompute=True)}, "recompute=True"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(DataError, match=words):
        replace(SEARCH, **settings)


def test_bad_data(data):
    (x, y), val = data
    with pytest.raises(DataError, match="val is missing"):
        SEARCH.start((x, y), None)
    with pytest.raises(DataError, match="train has 30 inputs and 29 targets"):
        SEARCH.start((x, y[1:]), val)
    with pytest.raises(DataError, match="store_every is 0"):
        SEARCH.run((x, y), val, store_every=0)
    with pytest.raises(DataError, match="the configuration has depth"):
        architecture_from({"depth": 3})
