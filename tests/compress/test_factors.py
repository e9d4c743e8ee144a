"""Chains of cores: exactness, errors, gradients, closed forms, metrics; their layers; allocation."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compress.models import gpt2, llama, tokens
from torch import Tensor, nn

from paperback.compress.factors import (
    FactorLayer,
    LowRankLinear,
    MPOLinear,
    Sensitivity,
    allocate,
    balanced_factors,
    bond_limits,
    core_shapes,
    packed_bytes,
    sensitivity_profile,
    tt_als,
    tt_apply,
    tt_matrix,
    tt_svd,
)
from paperback.compress.factors.tensor_train import contraction_operations, matrix_operations, truncated_svd
from paperback.compress.storage import build, load_model, save_model, spec_of
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import swap
from paperback.training import generator


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=generator(seed), dtype=torch.float64)


def linear(out: int, inputs: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, out, bias=bias).double()
    with torch.no_grad():
        layer.weight.copy_(matrix(out, inputs, seed))
        if bias:
            layer.bias.copy_(matrix(out, 1, seed + 1).squeeze(1))
    return layer


# -- the decomposition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_shape", "in_shape"),
    [((30,), (8,)), ((6, 5), (4, 2)), ((2, 3, 5), (3, 2, 2)), ((4, 2, 2, 2), (2, 2, 2, 3))],
)
def test_full_bonds_are_exact(out_shape: tuple[int, ...], in_shape: tuple[int, ...]) -> None:
    weight = matrix(math.prod(out_shape), math.prod(in_shape))
    cores = tt_svd(weight, out_shape, in_shape)
    assert torch.allclose(tt_matrix(cores), weight, atol=1e-12)
    single = tt_matrix(tt_svd(weight.float(), out_shape, in_shape))
    assert torch.allclose(single, weight.float(), atol=1e-5)
    x = matrix(7, weight.shape[1], 1)
    assert torch.allclose(tt_apply(cores, x), x @ weight.T, atol=1e-12)


def test_entries_of_a_chain_by_the_definition() -> None:
    cores = [
        matrix(6, 2).view(1, 3, 2, 2),
        matrix(8, 3, 1).view(2, 2, 2, 3),
        matrix(3, 4, 2).view(3, 2, 2, 1),
    ]
    whole = tt_matrix(cores)
    assert whole.shape == (12, 8)
    for row, column in ((0, 0), (7, 3), (11, 7), (5, 6)):
        o, i = np.unravel_index(row, (3, 2, 2)), np.unravel_index(column, (2, 2, 2))
        product = torch.eye(1, dtype=torch.float64)
        for core, a, b in zip(cores, o, i, strict=True):
            product = product @ core[:, a, b, :]
        assert float(whole[row, column]) == pytest.approx(float(product), abs=1e-12)


def test_two_cores_are_van_loans_nearest_sum_of_kronecker_products() -> None:
    weight, chi = matrix(12, 20), 3
    approximation = tt_matrix(tt_svd(weight, (4, 3), (5, 4), chi))
    rearranged = weight.view(4, 3, 5, 4).permute(0, 2, 1, 3).reshape(20, 12)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    kronecker = sum(
        s[r] * torch.kron(u[:, r].view(4, 5).contiguous(), v[r].view(3, 4).contiguous()) for r in range(chi)
    )
    assert torch.allclose(approximation, kronecker, atol=1e-10)  # type: ignore[arg-type]
    error = float((weight - approximation).square().sum())
    assert error == pytest.approx(float(s[chi:].square().sum()), rel=1e-10)


@given(chi=st.integers(1, 20), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_the_error_is_bounded_and_never_grows_with_chi(chi: int, seed: int) -> None:
    weight, shapes = matrix(24, 24, seed), ((4, 3, 2), (2, 3, 4))

    def error(chi: int) -> float:
        return float((weight - tt_matrix(tt_svd(weight, *shapes, chi))).square().sum())

    cores = tt_svd(weight, *shapes, chi)
    assert [tuple(core.shape) for core in cores] == core_shapes(*shapes, chi)
    discarded = 0.0
    for k in (1, 2):
        order = (0, 3, 1, 2, 4, 5) if k == 1 else (0, 3, 1, 4, 2, 5)
        split = weight.view(4, 3, 2, 2, 3, 4).permute(order).reshape((8, 72) if k == 1 else (72, 8))
        discarded += float(torch.linalg.svdvals(split)[chi:].square().sum())
    assert error(chi) <= discarded + 1e-9
    assert error(chi + 1) <= error(chi) + 1e-9


def test_a_relative_error_is_kept() -> None:
    weight = matrix(24, 36) @ matrix(36, 36, 1) * torch.logspace(0, -3, 36, dtype=torch.float64)
    for eps in (0.5, 0.1, 0.01):
        cores = tt_svd(weight, (4, 3, 2), (4, 3, 3), eps=eps)
        assert float((weight - tt_matrix(cores)).norm() / weight.norm()) <= eps
    assert sum(c.numel() for c in cores) > sum(
        c.numel() for c in tt_svd(weight, (4, 3, 2), (4, 3, 3), eps=0.5)
    )


@pytest.mark.parametrize(
    ("size", "n"), [(128, 2), (384, 3), (576, 2), (7, 2), (13, 3), (1, 2), (2, 3), (11008, 2)]
)
def test_factors_of_sizes_are_balanced_or_padded(size: int, n: int) -> None:
    factors = balanced_factors(size, n)
    assert len(factors) == n
    assert list(factors) == sorted(factors, reverse=True)
    assert size <= math.prod(factors) <= size + max(1, size // 4)
    assert factors[0] <= 4 * factors[-1] or size < 2**n
    if size in (128, 384, 576, 11008):
        assert math.prod(factors) == size


def test_a_randomised_decomposition_of_a_large_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix(80, 3) @ matrix(3, 90, 1)
    monkeypatch.setattr("paperback.compress.factors.tensor_train.RANDOMISED_FROM", 64)
    u, s, v = truncated_svd(weight, 3)
    assert torch.allclose((u * s) @ v, weight, atol=1e-9)
    assert torch.equal(truncated_svd(weight, 3)[0], u)


def test_operations_are_those_of_a_count_by_hand() -> None:
    shapes = [(1, 4, 5, 3), (3, 2, 6, 1)]
    assert contraction_operations(shapes) == 5 * (3 * 2 * 6) + 4 * 5 * 3 * 2
    assert matrix_operations(shapes) == 4 * 5 * 3 + 4 * 5 * 3 * 2 * 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_shape": (4, 4)}, "product 16"),
        ({"in_shape": (2, 2, 5)}, "equally many"),
        ({"chi": 0}, "at least 1"),
        ({"eps": 1.5}, "relative error"),
        ({"weight": torch.full((12, 20), float("nan"))}, "not finite"),
    ],
)
def test_unusable_arguments_are_refused(change: dict[str, object], words: str) -> None:
    arguments = {"weight": matrix(12, 20), "out_shape": (4, 3), "in_shape": (5, 4), "chi": 2} | change
    with pytest.raises(DataError, match=words):
        tt_svd(**arguments)  # type: ignore[arg-type]


# -- the metric of the inputs --------------------------------------------------------------------------------


def gram(size: int, seed: int = 5) -> Tensor:
    x = matrix(4 * size, size, seed) @ matrix(size, size, seed + 1)
    return x.T @ x


def weighted_error(weight: Tensor, other: Tensor, h: Tensor) -> float:
    difference = weight - other
    return float(torch.einsum("oi,ij,oj->", difference, h, difference))


def test_with_white_inputs_the_metric_is_frobenius() -> None:
    weight = matrix(12, 20)
    cores = tt_svd(weight, (4, 3), (5, 4), 3)
    refined = tt_als(weight, cores, torch.eye(20, dtype=torch.float64))
    assert torch.allclose(tt_matrix(refined), tt_matrix(cores), atol=1e-6)
    layer = linear(12, 20)
    plain = LowRankLinear.from_dense(layer, 4)
    white = LowRankLinear.from_dense(layer, 4, torch.eye(20, dtype=torch.float64))
    assert torch.allclose(plain.dense(), white.dense(), atol=1e-5)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 4)), ((3, 2, 2), (5, 2, 2))])
def test_least_squares_never_make_the_error_larger(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    weight, h = matrix(12, 20), gram(20)
    cores = tt_svd(weight, *shapes, 3)
    errors = [weighted_error(weight, tt_matrix(tt_als(weight, cores, h, n)), h) for n in range(5)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[4] < 0.9 * errors[0]


def test_a_core_of_least_squares_is_where_the_gradient_vanishes() -> None:
    weight, h = matrix(12, 20), gram(20)
    h = h / h.diagonal().mean()
    cores = tt_als(weight, tt_svd(weight, (4, 3), (5, 4), 3), h, 1)
    last = cores[-1].requires_grad_()
    difference = weight - tt_matrix([cores[0], last])
    (slope,) = torch.autograd.grad(torch.einsum("oi,ij,oj->", difference, h, difference), last)
    assert float(slope.abs().max()) < 1e-4


def test_no_matrix_of_the_rank_is_better_in_the_metric() -> None:
    layer, h = linear(12, 20), gram(20)
    ours = weighted_error(layer.weight.detach(), LowRankLinear.from_dense(layer, 3, h).dense().detach(), h)
    lower = torch.linalg.cholesky(h)
    bound = float(torch.linalg.svdvals(layer.weight.detach() @ lower)[3:].square().sum())
    assert ours == pytest.approx(bound, rel=1e-3)
    plain = weighted_error(layer.weight.detach(), LowRankLinear.from_dense(layer, 3).dense().detach(), h)
    assert ours < plain


def test_too_large_a_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paperback.compress.factors.tensor_train.LARGEST_SYSTEM", 10)
    with pytest.raises(DataError, match=r"q_proj.*'frobenius'"):
        MPOLinear.from_dense(linear(12, 20), 3, gram=gram(20), name="q_proj")


# -- layers --------------------------------------------------------------------------------------------------

MAKERS = {
    "low rank": lambda layer: LowRankLinear.from_dense(layer, 4),
    "two cores": lambda layer: MPOLinear.from_dense(layer, 6),
    "three cores": lambda layer: MPOLinear.from_dense(layer, 5, 3),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("shape", [(30, 24), (13, 7), (24, 31)])
@pytest.mark.parametrize("batch", [(24,), (3, 24), (2, 3, 4, 24)])
def test_forward_is_a_product_with_the_dense_weight(make, shape, batch) -> None:  # type: ignore[no-untyped-def]
    out, inputs = shape
    dense = linear(out, inputs)
    layer = make(dense)
    x = torch.randn(*batch[:-1], inputs, generator=generator(1), dtype=torch.float64)
    wanted = nn.functional.linear(x, layer.dense(), dense.bias)
    for how in ("factors", "dense", "auto"):
        layer.forward_by = how
        assert torch.allclose(layer(x), wanted, atol=1e-10)
        assert layer(x).shape == wanted.shape
    layer.prepare("dense")
    assert torch.allclose(layer(x), wanted, atol=1e-10)


def test_small_batches_never_make_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MPOLinear.from_dense(linear(256, 256).float(), 1)
    assert layer._by_factors(torch.zeros(1, 256))
    assert layer._by_factors(torch.zeros(4096, 256))  # bonds this small are cheaper at any length
    wide = MPOLinear.from_dense(linear(64, 64).float(), 16)
    assert not wide._by_factors(torch.zeros(4096, 64))
    monkeypatch.setattr(MPOLinear, "dense", lambda self: pytest.fail("the dense weight was made"))
    layer(torch.zeros(1, 256))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_gradients_of_every_factor(make) -> None:  # type: ignore[no-untyped-def]
    layer = make(linear(6, 10))
    x = matrix(3, 10, 9)

    def answer(*factors: Tensor) -> Tensor:
        return layer.multiply(x, factors)

    assert torch.autograd.gradcheck(answer, [p.detach().requires_grad_() for p in layer.parameters()])
    layer.forward_by = "factors"
    layer(x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_packed_factors(make, bits: int) -> None:  # type: ignore[no-untyped-def]
    layer = make(linear(48, 36).float())
    before, numbers = layer.dense().detach(), layer.numbers
    sizes = [factor.numel() for factor in layer.factors]
    layer.quantize(bits)
    assert not list(layer.parameters())
    assert layer.numbers == numbers == sum(sizes)
    packed = sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "bias")
    assert packed == packed_bytes(sizes, bits)
    error = float((layer.dense() - before).norm() / before.norm())
    assert error < (0.02 if bits == 8 else 0.25)
    again = build(spec_of(layer))
    again.load_state_dict(layer.state_dict())
    again.check()
    assert torch.equal(again.dense(), layer.dense())
    with pytest.raises(DataError, match="packed already"):
        layer.quantize(bits)
    with pytest.raises(DataError, match="3 bits"):
        make(linear(48, 36)).quantize(3)


def test_convolutions_have_factors_too() -> None:
    convolution = nn.Conv2d(4, 8, 3, padding=1, stride=2)
    x = torch.randn(2, 4, 9, 9, generator=generator(0))
    for layer in (LowRankLinear.from_dense(convolution, 8), MPOLinear.from_dense(convolution)):
        assert torch.allclose(layer(x), convolution(x), atol=1e-5)


@pytest.mark.parametrize("model", [llama, gpt2])
@pytest.mark.parametrize("bits", [None, 4])
def test_folders_bring_the_layers_back(model, bits: int | None, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    network = model()
    names = [n for n, m in network.named_modules() if n.endswith(("0.mlp.up_proj", "0.mlp.c_fc"))]
    names += [n for n, m in network.named_modules() if n.endswith(("1.self_attn.q_proj", "1.attn.c_attn"))]
    for name, make in zip(names, (MAKERS["low rank"], MAKERS["two cores"]), strict=True):
        layer = make(network.get_submodule(name))
        if bits is not None:
            layer.quantize(bits)
        swap(network, name, layer)
    save_model(network, tmp_path / "model")
    ids = tokens()
    with torch.no_grad():
        wanted = network(ids).logits
        for loaded in (
            load_model(tmp_path / "model"),
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        ):
            assert torch.equal(loaded(ids).logits, wanted)
            assert isinstance(loaded.get_submodule(names[0]), FactorLayer)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_foreign_specs_are_refused(make) -> None:  # type: ignore[no-untyped-def]
    layer = make(linear(6, 10))
    spec = spec_of(layer)
    for key, value in (
        ("rank", 7),
        ("cores", [[1, 3, 5, 90], [90, 2, 2, 1]]),
        ("cores", "no"),
        ("dtype", "int8"),
    ):
        if key in spec:
            with pytest.raises(ArtefactError):
                build(copy.deepcopy(spec) | {key: value})
    layer.quantize(4)
    packed = spec_of(layer)
    packed["quantized"] = [entry | {"shape": [2, 2]} for entry in packed["quantized"]]
    with pytest.raises(ArtefactError, match="shapes"):
        build(packed)


def test_layers_refuse_what_they_cannot_factorise() -> None:
    with pytest.raises(DataError, match=r"rank of up is 0"):
        LowRankLinear.from_dense(linear(4, 4), 0, name="up")
    broken = linear(4, 4)
    with torch.no_grad():
        broken.weight[0, 0] = float("inf")
    for make in (LowRankLinear.from_dense, MPOLinear.from_dense):
        with pytest.raises(DataError, match="up has values that are not finite"):
            make(broken, 2, name="up")


# -- sensitivity ---------------------------------------------------------------------------------------------


def test_the_profile_leaves_the_model_and_ranks_layers() -> None:
    network = nn.Sequential(linear(16, 16), linear(16, 16, seed=3), nn.Linear(16, 16).double())
    before = copy.deepcopy(network.state_dict())
    x = matrix(40, 16, 7)
    with torch.no_grad():
        network[2].weight.copy_(torch.outer(matrix(16, 1, 4)[:, 0], matrix(16, 1, 6)[:, 0]))  # rank 1
        wanted = network(x)
    before = copy.deepcopy(network.state_dict())
    rows = sensitivity_profile(
        network, lambda m: float((m(x) - wanted).square().mean()), {"0": [4, 1], "2": [1]},
        lambda name, layer, size: LowRankLinear.from_dense(layer, size),
    )  # fmt: skip
    assert [(row.name, row.size, row.depth) for row in rows] == [("0", 4, 0), ("0", 1, 0), ("2", 1, 2)]
    assert rows[1].increase > rows[0].increase > 1e-3
    assert abs(rows[2].increase) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(isinstance(layer, nn.Linear) for layer in network)
    with pytest.raises(DataError, match="no layer 'up'"):
        sensitivity_profile(network, lambda m: 0.0, {"up": [1]})


def test_the_allocation_is_greedy_and_keeps_the_budget() -> None:
    def row(name: str, numbers: int, increase: float) -> Sensitivity:
        return Sensitivity(name, 0, name, numbers, numbers, 100, 1 + increase, increase)

    profile = [row("a", 50, 0.01), row("a", 20, 0.5), row("b", 50, 0.2), row("b", 20, 0.21)]
    assert allocate(profile, 200) == {"a": None, "b": None}
    assert allocate(profile, 150) == {"a": profile[0], "b": None}
    assert allocate(profile, 80) == {"a": profile[0], "b": profile[3]}
    assert allocate(profile, 40) == {"a": profile[1], "b": profile[3]}
    with pytest.raises(DataError, match="40 parameters, 39 are wanted"):
        allocate(profile, 39)


def test_bond_limits_are_the_smaller_sides() -> None:
    assert bond_limits((4, 3, 2), (2, 3, 4)) == (8, 8)
