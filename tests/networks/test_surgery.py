"""Finding, reading, writing and swapping layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.networks.surgery import (
    blocks_of,
    find_layers,
    input_matrix,
    set_weight_matrix,
    swap,
    weight_matrix,
)

transformers = pytest.importorskip("transformers")


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def test_every_layer_is_found_or_has_a_reason():
    found = find_layers(gpt2())
    assert all(name.endswith(("c_attn", "c_proj", "c_fc")) for name in found.layers)
    assert len(found.layers) == 8
    assert found.skipped["transformer.wte"].startswith("Embedding")
    assert "ignored" in found.skipped["lm_head"]


def test_targets_are_parts_of_names_or_patterns():
    model = gpt2()
    assert set(find_layers(model, ["mlp"]).layers) == set(
        find_layers(model, ["transformer.h.*.mlp.*"]).layers
    )
    assert len(find_layers(model, ["h.0."]).layers) == 4
    with pytest.raises(DataError, match="nothing_like_it"):
        find_layers(model, ["nothing_like_it"])
    with pytest.raises(DataError, match="typo"):
        find_layers(model, ignore=["typo"])


def test_a_shared_weight_is_found_once():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    found = find_layers(model)
    assert set(found.layers) == {"a", "c"}
    assert found.tied == {"b": "a"}
    assert "a" in found.skipped["b"]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), torch.randn(2, 5, 6)),
        (nn.Linear(6, 4), torch.randn(3, 6)),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 8, 7)),
        (nn.Conv2d(3, 4, (3, 2), dilation=2, padding="same"), torch.randn(2, 3, 8, 7)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 6, 6)),
        (nn.Conv1d(3, 4, 5, stride=2, padding=2), torch.randn(2, 3, 11)),
        (transformers.pytorch_utils.Conv1D(4, 6), torch.randn(2, 5, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_its_matrix_times_its_inputs(layer, x):
    columns = input_matrix(layer, x)
    y = columns @ weight_matrix(layer).T + layer.bias
    expected = layer(x)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, expected.reshape(y.shape), atol=1e-5, rtol=1e-4)


def test_written_matrices_are_read_back():
    for layer in (nn.Linear(6, 4), nn.Conv2d(3, 4, 3), transformers.pytorch_utils.Conv1D(4, 6)):
        matrix = torch.randn_like(weight_matrix(layer))
        set_weight_matrix(layer, matrix)
        assert torch.equal(weight_matrix(layer), matrix)
        with pytest.raises(DataError, match="cannot take"):
            set_weight_matrix(layer, matrix[:, :-1])


def test_grouped_convolutions_have_no_single_input():
    with pytest.raises(DataError, match="groups"):
        input_matrix(nn.Conv2d(4, 4, 3, groups=4), torch.randn(1, 4, 5, 5))


def test_a_module_is_swapped_wherever_it_stands():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    new = nn.Identity()
    swap(model, "0", new)
    assert model[0] is new
    assert model[2] is new
    with pytest.raises(DataError, match="no module"):
        swap(model, "7", new)


def test_blocks_are_the_longest_list_of_one_class():
    assert [name for name, _ in blocks_of(gpt2())] == ["transformer.h.0", "transformer.h.1"]
    assert [name for name, _ in blocks_of(net())] == [""]
