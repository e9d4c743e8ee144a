"""Truncated SVD as a compressor: errors of whole layers, budgets, the metric of activations, healing."""

from __future__ import annotations

import pytest
import torch
from tests.compress.models import cnn, llama, picture_data, token_data
from torch import nn

from paperback.compress import Budget
from paperback.compress.factors import LowRankLinear
from paperback.compress.storage import stored_layers
from paperback.compress.svd import SVD
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import find_layers, input_matrix, weight_matrix
from paperback.testing.compress import check_compressor

QUIET = {"latency_runs": 0, "progress": False}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return llama()


def test_each_layer_is_its_truncated_svd(dense: nn.Module) -> None:
    result = SVD(rank=5).compress(dense, **QUIET)
    layers = find_layers(dense).layers
    assert stored_layers(result.model).keys() == layers.keys()
    for name, layer in stored_layers(result.model).items():
        weight = weight_matrix(layers[name])
        assert isinstance(layer, LowRankLinear)
        error = float((layer.dense().detach() - weight).square().sum())
        assert error == pytest.approx(float(torch.linalg.svdvals(weight)[5:].square().sum()), rel=1e-3)


def test_the_metric_of_activations_keeps_outputs_better(dense: nn.Module) -> None:
    data = token_data()
    results = [
        SVD(rank=6, metric=m, targets=["layers.0.mlp.down"]).compress(dense, data, **QUIET)
        for m in ("frobenius", "activation")
    ]
    name = "model.layers.0.mlp.down_proj"
    layer = dense.get_submodule(name)
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(input_matrix(layer, args[0])))
    with torch.no_grad():
        dense(next(data.batches("train")))
    handle.remove()
    errors = []
    for result in results:
        difference = result.model.get_submodule(name).dense().detach() - weight_matrix(layer)
        errors.append(float((seen[0] @ difference.T).norm()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("budget", [Budget(parameters=14_000), Budget(ratio=0.75), Budget(bytes=60_000)])
def test_budgets_are_kept_and_used(dense: nn.Module, budget: Budget) -> None:
    report = SVD().compress(dense, budget=budget, **QUIET).report
    if budget.unit == "parameters":
        assert 0.9 * budget.value <= report.after.parameters <= budget.value
    else:
        limit = budget.value if budget.unit == "bytes" else budget.value * report.before.bytes_on_disk
        assert report.after.bytes_on_disk <= limit
        assert report.after.bytes_on_disk >= 0.7 * limit


def test_a_convolutional_network_keeps_its_bytes() -> None:
    network = nn.Sequential(nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3)).eval()
    result = SVD(ignore=()).compress(network, budget=Budget(bytes=50_000), **QUIET)
    assert 40_000 < result.report.after.bytes_on_disk <= 50_000


def test_healing_lowers_the_loss_and_trains_the_factors_alone(dense: nn.Module) -> None:
    data = token_data()
    plain = SVD(rank=3).compress(dense, data, **QUIET)
    healed = SVD(rank=3, heal_steps=30, heal_lr=1e-2, heal_batch_size=4).compress(dense, data, **QUIET)
    assert healed.extras["history"][-1] < healed.extras["history"][0]
    before, after = plain.model.state_dict(), healed.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("factor_" in name for name in moved)
    assert all(p.requires_grad for p in healed.model.parameters())


def test_settings_and_budgets_out_of_range_are_refused(dense: nn.Module) -> None:
    for settings, words in (
        ({"rank": 0}, "rank is 0"),
        ({"rank": 3, "ratio": 0.5}, "leave out ratio"),
        ({"ratio": 0.0}, "ratio is 0.0"),
        ({"metric": "fisher"}, "metric is 'fisher'"),
        ({"heal_steps": -1}, "heal_steps is -1"),
        ({"heal_steps": 2, "heal_lr": 0.0}, "lr is 0.0"),
        ({"quantize": "int2"}, "quantize is 'int2'"),
    ):
        with pytest.raises(DataError, match=words):
            SVD(**settings)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"smallest ratio for it is 0\.0"):
        SVD(ratio=0.01).compress(dense, **QUIET)
    with pytest.raises(BudgetError, match="smallest factors"):
        SVD().compress(dense, budget=Budget(parameters=3), **QUIET)
    with pytest.raises(BudgetError, match="cannot be told bits"):
        SVD().compress(dense, budget=Budget(bits=4), **QUIET)
    with pytest.raises(DataError, match="training"):
        SVD(heal_steps=3).compress(dense, **QUIET)
    with pytest.raises(DataError, match="calibration"):
        SVD(metric="activation").compress(dense, **QUIET)


@pytest.mark.parametrize(("make", "data"), [(llama, token_data), (cnn, picture_data)])
def test_it_behaves_as_a_compressor(make, data) -> None:  # type: ignore[no-untyped-def]
    check_compressor(lambda: SVD(ratio=0.5, metric="activation"), make, data())
