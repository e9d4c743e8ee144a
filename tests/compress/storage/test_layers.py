"""Storage modules: the weight that they stand for, the outputs, the bytes, the way there and back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.compress.models import cnn, gpt2
from torch import nn

from paperback.compress.storage import (
    CodebookLinear,
    LayerForm,
    PackedEmbedding,
    PackedLinear,
    SparseLinear,
    build,
    pack_zeros,
    prepare,
    spec_of,
    stored_layers,
    to_dense,
)
from paperback.errors import ArtefactError, DataError
from paperback.networks.surgery import find_layers, swap, weight_matrix
from paperback.numerics.quantized import quantize_uniform
from paperback.training import seeded

LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (3, 5, 24)),
    "no bias": (lambda: nn.Linear(24, 10, bias=False), (3, 24)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 4, stride=2, padding=3, padding_mode="circular"), (2, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), padding="same", dilation=2), (2, 6, 9, 7)),
    "groups": (lambda: nn.Conv2d(6, 9, 4, groups=3, padding=1, padding_mode="reflect"), (2, 6, 9, 7)),
}


def pruned(layer, nm=None):
    """The layer with its smaller half set to zero, or N:M."""
    matrix = weight_matrix(layer)
    if nm is None:
        kept = matrix.abs() > matrix.abs().median()
    else:
        groups = matrix.abs().reshape(-1, nm[1])
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept.scatter_(1, groups.topk(nm[0], dim=1).indices, True)
        kept = kept.reshape(matrix.shape)
    with torch.no_grad():
        zeros = torch.where(kept, matrix, 0)
        transposed = type(layer).__name__ == "Conv1D"
        layer.weight.copy_(zeros.T if transposed else zeros.reshape(layer.weight.shape))
    return layer


STORED = {
    "packed": lambda layer: PackedLinear.from_dense(layer, 4, 8),
    "packed 3 bits": lambda layer: PackedLinear.from_dense(layer, 3, None, "absmax", clip="mse"),
    "packed 8 bits": lambda layer: PackedLinear.from_dense(layer, 8, 7, "linear"),
    "normal float": lambda layer: CodebookLinear.from_dense(layer),
    "quantile": lambda layer: CodebookLinear.from_dense(layer, "quantile", 3, 16),
    "kmeans": lambda layer: CodebookLinear.from_dense(layer, "kmeans", 2),
    "points": lambda layer: CodebookLinear.from_dense(layer, torch.tensor([0.0, 0.4, 1.0]), size=None),
    "sparse": lambda layer: SparseLinear.from_dense(pruned(layer)),
    "2:4": lambda layer: SparseLinear.from_dense(pruned(layer, (2, 4)), (2, 4)),
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_stored_layer_computes_with_the_weight_that_it_says(name, kind):
    make, shape = LAYERS[name]
    with seeded(0, "layer"):
        layer, x = make(), torch.randn(shape)
    stored = STORED[kind](layer)
    plain = stored.to_dense()
    assert type(plain) is type(layer)
    assert plain.weight.shape == layer.weight.shape == stored.weight.shape
    torch.testing.assert_close(stored(x), plain(x))
    assert torch.equal(stored.weight, plain.weight)
    assert (weight_matrix(layer) - stored.dense()).abs().max() < 0.2
    assert list(stored.parameters()) == []
    # Back through its spec and its state.
    with torch.device("meta"):
        assert all(tensor.is_meta for tensor in build(spec_of(stored)).buffers())
    again = build(spec_of(stored))
    again.load_state_dict(stored.state_dict())
    again.check()
    assert torch.equal(again(x), stored(x))
    assert torch.equal(copy.deepcopy(stored)(x), stored(x))


@pytest.mark.parametrize("kind", STORED)
def test_a_transformers_conv1d_keeps_its_outputs(kind):
    layer = find_layers(gpt2()).layers["transformer.h.0.attn.c_attn"]
    stored = STORED[kind](copy.deepcopy(layer))
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    plain = stored.to_dense()
    assert type(plain) is type(layer)
    torch.testing.assert_close(stored(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["packed", "normal float", "sparse"])
def test_half_and_double_precision_stay_what_they_are(kind, dtype):
    with seeded(0, "layer"):
        layer, x = nn.Linear(32, 8).to(dtype), torch.randn(4, 32).to(dtype)
    stored = STORED[kind](layer)
    assert stored(x).dtype == stored.dense().dtype == dtype
    assert (stored(x) - layer(x)).abs().max() < 0.5


def test_a_gradient_passes_through_to_the_input():
    layer = nn.Linear(16, 4)
    x = torch.randn(2, 16, requires_grad=True)
    PackedLinear.from_dense(layer, 8, None)(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1), atol=0.02, rtol=0.02)


def test_the_bytes_are_the_formulas():
    layer = nn.Linear(128, 64, bias=False)
    assert PackedLinear.from_dense(layer, 4, 32).nbytes == 64 * 128 // 2 + 64 * 4 * (2 + 0.5)
    assert PackedLinear.from_dense(layer, 3, 64, "absmax").nbytes == 64 * 128 * 3 // 8 + 64 * 2 * 2
    assert CodebookLinear.from_dense(layer, bits=4, size=64).nbytes == 64 * 128 // 2 + 64 * 2 * 2 + 16 * 4
    half = pruned(layer, (2, 4))
    assert SparseLinear.from_dense(half).nbytes == 64 * 128 // 8 + 64 * 64 * 4
    assert SparseLinear.from_dense(half, (2, 4)).nbytes == 64 * 32 * 3 // 8 + 64 * 64 * 4


@pytest.mark.parametrize("nm", [(1, 4), (2, 4), (4, 8), (1, 2), (3, 8)])
def test_n_of_m_is_exact_also_where_fewer_are_left(nm):
    layer = pruned(nn.Linear(48, 6), nm)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1, ::2] = 0
    stored = SparseLinear.from_dense(layer, nm)
    assert torch.equal(stored.dense(), layer.weight)
    assert stored.where.numel() == math.ceil(48 * 6 // nm[1] * math.ceil(math.log2(math.comb(*nm[::-1]))) / 8)


@pytest.mark.parametrize("scheme", ["linear", "affine", "absmax"])
@pytest.mark.parametrize("size", [None, 8, 5])
def test_an_embedding_unpacks_only_the_rows_that_are_asked_for(scheme, size):
    layer = nn.Embedding(40, 16, padding_idx=3)
    stored = PackedEmbedding.from_dense(layer, 4, size, scheme)
    ids = torch.tensor([[3, 39, 0], [7, 7, 12]])
    assert torch.equal(stored(ids), nn.functional.embedding(ids, stored.dense()))
    assert isinstance(stored.to_dense(), nn.Embedding)
    again = build(spec_of(stored))
    again.load_state_dict(stored.state_dict())
    assert torch.equal(again(ids), stored(ids))


def test_zeros_are_packed_where_it_is_worth_it():
    model = cnn()
    for layer in (model[0], model[3]):
        pruned(layer)
    pruned(model[6], (2, 4))
    with seeded(0, "x"):
        x = torch.randn(3, 1, 12, 12)
    before = model(x)
    first = model[0]
    with torch.no_grad():
        first.weight.copy_(torch.where(first.weight == 0, 1e-3, first.weight))  # nothing to gain
        before = model(x)
    packed = pack_zeros(model)
    assert packed is model
    assert model[0] is first
    assert sorted(stored_layers(model)) == ["3", "6"]
    assert model[6].spec()["nm"] == [2, 4]
    assert model[3].spec()["nm"] is None
    torch.testing.assert_close(model(x), before)
    assert stored_layers(to_dense(model)) == {}
    torch.testing.assert_close(model(x), before)


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = pruned(model[0]).weight
    pack_zeros(model)
    assert model[2].weight is model[0].weight


def test_a_layer_used_twice_is_swapped_in_both_places():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    swap(model, "0", PackedLinear.from_dense(layer, 8, None))
    assert model[0] is model[2]


@pytest.mark.parametrize("scheme", ["linear", "affine", "absmax"])
def test_a_prepared_layer_is_the_same_layer(scheme):
    with seeded(0, "layer"):
        layer, last, x = (
            t.to(torch.bfloat16) for t in (nn.Linear(128, 32), nn.Linear(32, 3), torch.randn(2, 3, 128))
        )
    model = nn.Sequential(PackedLinear.from_dense(layer, 4, 32, scheme), last)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        assert prepare(model, "dense") == 1
        assert torch.equal(model(x), expected)
        assert prepare(model, "kernel") == 1
        torch.testing.assert_close(model(x), expected, atol=0.03, rtol=0.03)
        assert model[0]._kernel is not None
    assert list(model.state_dict()) == names
    model.double()  # what was prepared for another type is forgotten
    assert model[0]._kernel is None
    assert prepare(nn.Sequential(PackedLinear.from_dense(layer, 3, 32)), "kernel") == 0
    assert prepare(nn.Sequential(PackedLinear.from_dense(layer.float(), 4, 32)), "kernel") == 0


def test_what_has_no_stored_form_is_refused():
    with pytest.raises(DataError, match="LSTM has no stored form"):
        LayerForm.of(nn.LSTM(3, 4))
    with pytest.raises(DataError, match="max_norm"):
        LayerForm.of(nn.Embedding(3, 4, max_norm=1.0))
    layer = nn.Linear(10, 4)
    with pytest.raises(DataError, match="more than 2; it is not 2:5"):
        SparseLinear.from_dense(layer, (2, 5))
    with pytest.raises(DataError, match="4 must divide the inputs"):
        SparseLinear.from_dense(layer, (2, 4))
    with pytest.raises(DataError, match="at most 256 patterns"):
        SparseLinear.from_dense(nn.Linear(16, 4), (8, 16))
    with pytest.raises(DataError, match=r"shape \(4, 9\)"):
        PackedLinear.from_quantized(layer, quantize_uniform(torch.randn(4, 9), 4))
    with pytest.raises(DataError, match="has no packed rows"):
        PackedEmbedding.from_dense(nn.Embedding(10, 3), 3, None)
    with pytest.raises(DataError, match="give one of"):
        CodebookLinear.from_dense(layer, "golden")
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        PackedLinear.from_dense(layer)


def test_specs_and_buffers_that_are_wrong_are_refused():
    layer = pruned(nn.Linear(16, 4), (2, 4))
    packed = PackedLinear.from_dense(layer, 4, None, "absmax")
    sparse = SparseLinear.from_dense(layer, (2, 4))
    spec = spec_of(packed)
    form, tensor = spec["form"], spec["tensor"]
    for wrong in ({"kind": "magic"}, {"form": None}, {"form": form | {"shape": [4, 0]}}, {"tensor": None},
                  {"tensor": tensor | {"shape": [4, 17]}}, {"bias_dtype": "os"}):  # fmt: skip
        with pytest.raises(ArtefactError):
            build(spec | wrong)
    for wrong in ({"nm": [5, 4]}, {"nm": "x"}, {"nm": None, "count": 65}, {"dtype": "int8"}):
        with pytest.raises(ArtefactError):
            build(spec_of(sparse) | wrong)
    packed.codes.fill_(255)
    with pytest.raises(ArtefactError, match="only 15 levels"):
        packed.check()
    sparse.where.fill_(255)
    with pytest.raises(ArtefactError, match="2:4 has 6"):
        sparse.check()
    bitmap = SparseLinear.from_dense(layer)
    bitmap.where.zero_()
    with pytest.raises(ArtefactError, match="0 places for"):
        bitmap.check()
