"""CompactifAI: the planted chain it must find, budgets, allocation, healing, packed cores, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.compress.models import gpt2, llama, token_data, tokens
from torch import nn

from paperback.compress import Budget, Compressed
from paperback.compress.compactifai import CompactifAI
from paperback.compress.factors import MPOLinear, packed_bytes
from paperback.compress.storage import stored_layers
from paperback.compress.svd import SVD
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.testing.compress import check_compressor
from paperback.training import generator

QUIET = {"latency_runs": 0, "progress": False}
UNHEALED = {"heal_steps": 0}


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def unhealed(dense: nn.Module) -> Compressed:
    return CompactifAI(ratio=0.5, **UNHEALED).compress(dense, token_data(), **QUIET)


def test_a_sum_of_kronecker_products_is_found_and_no_low_rank_comes_near() -> None:
    draws = generator(0)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        pairs = [torch.randn(2, 8, 8, generator=draws) for _ in range(4)]
        layer.weight.copy_(sum(torch.kron(a, b) for a, b in pairs))  # type: ignore[arg-type]
    network = nn.Sequential(layer)
    mpo = CompactifAI(chi=4, **UNHEALED).compress(network, **QUIET)
    numbers = stored_layers(mpo.model)["0"].numbers  # type: ignore[union-attr]
    assert numbers == 4 * 2 * 64
    low_rank = SVD(rank=-(-numbers // 128)).compress(network, **QUIET)

    def error(result: Compressed) -> float:
        return float((result.model[0].dense() - layer.weight).detach().norm() / layer.weight.detach().norm())  # type: ignore[index]

    assert error(mpo) < 1e-5
    assert error(low_rank) > 0.5


@pytest.mark.parametrize("cores", [2, 3])
def test_sizes_follow_the_closed_form(dense: nn.Module, cores: int) -> None:
    method = CompactifAI(cores, ratio=0.5, **UNHEALED)
    result = method.compress(dense, **QUIET)
    for name, layer in stored_layers(result.model).items():
        assert isinstance(layer, MPOLinear)
        shape, chi = layer.form.shape, result.extras["sizes"][name]
        sizes = method.sizes_of_factors(shape, chi)
        assert sizes == [factor.numel() for factor in layer.factors]
        budget = shape[0] * shape[1] // 2
        assert sum(sizes) <= budget < sum(method.sizes_of_factors(shape, chi + 1))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("unit", ["parameters", "bytes", "ratio"])
def test_budgets_are_never_exceeded(dense: nn.Module, unit: str, quantize: str | None) -> None:
    value = {"parameters": 13_000, "bytes": 70_000, "ratio": 0.8}[unit]
    allocate = "sensitivity" if unit == "bytes" else "uniform"
    method = CompactifAI(quantize=quantize, allocate=allocate, **UNHEALED)  # type: ignore[arg-type]
    result = method.compress(dense, token_data(), Budget(**{unit: value}), **QUIET)  # type: ignore[arg-type]
    numbers = sum(layer.numbers for layer in stored_layers(result.model).values())  # type: ignore[misc]
    if unit == "parameters":
        handled = sum(weight_matrix(layer).numel() for layer in find_layers(dense).layers.values())
        assert sum(p.numel() for p in dense.parameters()) - handled + numbers <= value
    else:
        limit = value * (1 if unit == "bytes" else result.report.before.bytes_on_disk)
        assert result.report.after.bytes_on_disk <= limit


def test_sensitive_layers_get_more_of_the_same_budget(dense: nn.Module, unhealed: Compressed) -> None:
    method = CompactifAI(ratio=0.5, allocate="sensitivity", **UNHEALED)
    result = method.compress(dense, token_data(), **QUIET)

    def numbers(result: Compressed) -> int:
        layers = {**find_layers(result.model).layers, **stored_layers(result.model)}
        return sum(
            layer.numbers if isinstance(layer, MPOLinear) else weight_matrix(layer).numel()
            for layer in layers.values()
        )

    assert 0.9 * numbers(unhealed) <= numbers(result) <= numbers(unhealed)
    shares = {n: s for n, s in result.extras["sizes"].items() if s != unhealed.extras["sizes"][n]}
    assert shares
    assert {row.name for row in result.extras["profile"]} == set(find_layers(dense).layers)
    assert {row.type for row in result.extras["profile"]} >= {"q_proj", "down_proj"}
    assert {row.depth for row in result.extras["profile"]} == {0, 1}


def test_an_error_in_place_of_a_size(dense: nn.Module) -> None:
    result = CompactifAI(eps=0.6, **UNHEALED).compress(dense, **QUIET)
    for name, layer in stored_layers(result.model).items():
        weight = weight_matrix(dense.get_submodule(name))
        assert float((layer.dense().detach() - weight).norm() / weight.norm()) <= 0.6


def test_chains_larger_than_the_weight_are_left_dense(dense: nn.Module) -> None:
    sizes = {"model.layers.0.mlp.up_proj": 4, "model.layers.0.mlp.down_proj": 500}
    result = CompactifAI(chi=sizes, **UNHEALED).compress(dense, **QUIET)
    assert list(stored_layers(result.model)) == ["model.layers.0.mlp.up_proj"]
    left = {row.name: row.what for row in result.report.layers if row.what.startswith("left")}
    assert "larger than the weight" in left["model.layers.0.mlp.down_proj"]
    assert "does not name it" in left["model.layers.1.mlp.up_proj"]
    with pytest.raises(DataError, match="no layer became smaller"):
        CompactifAI(ratio=1.5, **UNHEALED).compress(dense, **QUIET)


@pytest.mark.parametrize("loss", ["lm", "distill"])
def test_healing_brings_the_loss_down(dense: nn.Module, unhealed: Compressed, loss: str) -> None:
    method = CompactifAI(
        ratio=0.5, heal_steps=40, heal_lr=1e-2, heal_batch_size=4, heal_loss=loss,  # type: ignore[arg-type]
    )  # fmt: skip
    healed = method.compress(dense, token_data(), **QUIET)
    with torch.no_grad():
        wanted = dense(tokens()).logits
        before, after = ((r.model(tokens()).logits - wanted).norm() for r in (unhealed, healed))
    assert healed.extras["history"][-1] < healed.extras["history"][0]
    if loss == "distill":
        assert after < before


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("model", [llama, gpt2])
def test_packed_cores_on_disk(model, quantize: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    result = CompactifAI(ratio=0.5, quantize=quantize, **UNHEALED).compress(model(), **QUIET)  # type: ignore[arg-type]
    result.save(tmp_path / "model")
    layers = stored_layers(result.model)
    bits = int(quantize[3:])
    for layer in layers.values():
        assert isinstance(layer, MPOLinear)
        bias = 0 if layer.bias is None else 4 * layer.bias.numel()
        assert layer.nbytes - bias == packed_bytes([factor.numel() for factor in layer.factors], bits)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, result.model(tokens()).logits)


def test_settings_out_of_range_are_refused(dense: nn.Module) -> None:
    for settings, words in (
        ({"cores": 1}, "cores is 1"),
        ({"chi": 0}, "chi is 0"),
        ({"chi": {"x": 0}}, "chi is 0"),
        ({"eps": 1.0}, "eps is 1.0"),
        ({"eps": 0.1, "ratio": 0.5}, "without chi and ratio"),
        ({"chi": 3, "allocate": "sensitivity"}, "chi fixes the sizes"),
        ({"eps": 0.3, "allocate": "sensitivity"}, "eps fixes the sizes"),
        ({"heal_loss": "mse"}, "heal_loss is 'mse'"),
    ):
        with pytest.raises(DataError, match=words):
            CompactifAI(**settings)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match=r"q_proj.*no chi.*smallest ratio"):
        CompactifAI(ratio=0.01, **UNHEALED).compress(dense, **QUIET)
    with pytest.raises(DataError, match="'up', which is not a layer"):
        CompactifAI(chi={"up": 3}, **UNHEALED).compress(dense, **QUIET)


@pytest.mark.parametrize(
    "settings",
    [
        {"heal_steps": 2, "heal_batch_size": 4},
        {"heal_steps": 0, "metric": "activation", "cores": 3},
        {"heal_steps": 0, "quantize": "int4"},
    ],
    ids=["healed", "activation", "packed"],
)
def test_it_behaves_as_a_compressor(settings: dict[str, object]) -> None:
    check_compressor(lambda: CompactifAI(ratio=0.5, **settings), llama, token_data())  # type: ignore[arg-type]
