"""The converter: attention out, Mamba in, the rest of the model untouched, and a report that is true."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from paperback.errors import DataError, NotSupportedError
from paperback.layers.mamba import Mamba
from paperback.layers.mamba.convert import MultiheadMamba, replace_attention
from paperback.study.measure import parameters

SMALL = {"d_state": 4}


def encoder(layers=2, batch_first=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers).eval()


def test_an_encoder_of_torch_is_converted_and_reported():
    model = encoder()
    before = copy.deepcopy(model.state_dict())
    result = replace_attention(model, **SMALL)
    assert [(c.name, c.was, c.now, c.action) for c in result.changes] == [
        (f"layers.{i}.self_attn", "MultiheadAttention", "Mamba", "changed") for i in range(2)
    ]
    for change in result.changes:
        new = result.model.get_submodule(change.name)
        assert change.parameters_before == parameters(model.layers[0].self_attn)
        assert change.parameters_after == parameters(new)
        assert new.layer.causal is False
    assert "2 layers changed, 0 left" in str(result)
    # The user's model is as it was, and what was no attention is the same in both.
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    kept = [name for name in before if "self_attn" not in name]
    converted = result.model.state_dict()
    assert kept
    assert all(torch.equal(before[name], converted[name]) for name in kept)


@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_in_a_converted_encoder_in_both_modes(batch_first):
    """In evaluation mode torch would pack the sequences for a fused kernel; it must not."""
    model = replace_attention(encoder(batch_first=batch_first), **SMALL).model
    u = torch.randn(2, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[6], [4]])

    def run(u, padding):
        out = model(u if batch_first else u.transpose(0, 1), src_key_padding_mask=padding)
        return out if batch_first else out.transpose(0, 1)

    for module in (model.eval(), model.train()):
        del module
        with torch.no_grad():
            out = run(u, padding)
            torch.testing.assert_close(out[1, :4], run(u[1:, :4], padding[1:, :4])[0], atol=1e-5, rtol=1e-5)


def test_an_encoder_run_causally_needs_a_forward_scan():
    u, mask = torch.randn(1, 6, 16), nn.Transformer.generate_square_subsequent_mask(6)
    forward = replace_attention(encoder(), scan="forward", **SMALL).model
    out = forward(u, mask=mask, is_causal=True)
    changed = u.clone()
    changed[:, 4:] += 1
    torch.testing.assert_close(forward(changed, mask=mask, is_causal=True)[:, :4], out[:, :4])
    both = replace_attention(encoder(), **SMALL).model
    with pytest.raises(NotSupportedError, match="forward"):
        both(u, mask=mask, is_causal=True)
    window = mask.clone()
    window[5, 0] = -torch.inf
    with pytest.raises(NotSupportedError, match="causality and padding only"):
        forward(u, mask=window)


def test_a_decoder_keeps_its_cross_attention_and_becomes_causal():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    result = replace_attention(nn.TransformerDecoder(layer, 2), **SMALL)
    assert len(result.changed) == len(result.left) == 2
    assert {change.name.rpartition(".")[2] for change in result.left} == {"multihead_attn"}
    assert "cross-attention" in result.left[0].why
    u, memory = torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    out = result.model(u, memory)
    changed = u.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(result.model(changed, memory)[:, :3], out[:, :3])


class Own(nn.Module):
    """A user's attention, twice the same object."""

    def __init__(self):
        super().__init__()
        self.dim = 16

    def forward(self, x):
        return x


def test_own_classes_hybrids_and_shared_layers():
    shared = Own()
    model = nn.Sequential(shared, nn.Linear(16, 16), shared, nn.MultiheadAttention(16, 2))
    result = replace_attention(
        model, where=lambda name, _: name != "3", also={Own: lambda old: Mamba(old.dim, d_state=4)}
    )
    assert [c.action for c in result.changes] == ["changed", "changed", "left"]
    assert result.left[0].why == "not asked for by where="
    assert result.model[0] is result.model[2]
    assert isinstance(result.model[0], Mamba)
    assert result.model[1].weight.shape == (16, 16)


def test_a_model_that_is_attention_itself_and_other_calls():
    layer = nn.MultiheadAttention(16, 2).double()
    result = replace_attention(layer, scan="forward", in_place=True, **SMALL)
    assert isinstance(result.model, MultiheadMamba)
    assert next(result.model.parameters()).dtype == torch.float64
    u = torch.randn(5, 16, dtype=torch.float64)  # without a batch
    out, weights = result.model(u, u, u)
    assert weights is None
    batch = u.unsqueeze(1)
    torch.testing.assert_close(result.model(batch, batch, batch)[0].squeeze(1), out)
    with pytest.raises(NotSupportedError, match="same tensor"):
        result.model(u, u + 1, u)


def test_the_same_seed_gives_the_same_layers_and_draws_nothing_else():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = replace_attention(encoder_without_seed(), seed=3, **SMALL).model.state_dict()
    assert torch.equal(torch.rand(1), expected)
    second = replace_attention(encoder_without_seed(), seed=3, **SMALL).model.state_dict()
    names = [name for name in first if "self_attn" in name]
    assert all(torch.equal(first[name], second[name]) for name in names)


def encoder_without_seed():
    with torch.random.fork_rng():
        return encoder()


def test_a_setting_that_does_not_fit_leaves_the_model_as_it_was():
    model = encoder()
    with pytest.raises(DataError, match="headdim"):
        replace_attention(model, kind="ssd", headdim=7, in_place=True)
    assert all(isinstance(layer.self_attn, nn.MultiheadAttention) for layer in model.layers)


def test_nothing_to_do_is_said():
    assert "0 layers changed" in str(replace_attention(nn.Linear(2, 2)))


# -- transformers ------------------------------------------------------------------------------------------


def theirs(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"vocab_size": 11, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        config = transformers.LlamaConfig(
            **shared, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(**shared, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.BertConfig(
        **shared, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@torch.no_grad()
def test_models_of_transformers_with_padding(kind):
    result = replace_attention(theirs(kind), **SMALL)
    assert len(result.changed) == 2
    model, causal = result.model, kind != "bert"
    assert all(model.get_submodule(change.name).layer.causal is causal for change in result.changed)
    text = torch.randint(3, 11, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    out = model(text, attention_mask=mask.long())[0]
    alone = model(text[1:, :4])[0]
    torch.testing.assert_close(out[1, :4], alone[0], atol=1e-5, rtol=1e-4)
    if causal:
        torch.testing.assert_close(model(text[:, :5])[0], model(text)[0][:, :5], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_converted_language_model_generates_and_a_hybrid_does_too():
    for where in (None, lambda name, _: ".0." in name):
        model = replace_attention(theirs("llama"), where=where, **SMALL).model
        text = torch.randint(3, 11, (1, 4))
        made = model.generate(text, max_new_tokens=3, do_sample=False)
        expected = text
        for _ in range(made.shape[1] - 4):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(made, expected)
        with pytest.raises(NotSupportedError, match="use_cache=False"):
            model(text, use_cache=True)
