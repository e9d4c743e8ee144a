"""Tiny transformers of three families, and text for them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["llama", "gpt2", "neox"])
def transformer(request):
    return make_transformer(request.param)


@pytest.fixture
def llama():
    return make_transformer("llama")


@pytest.fixture
def ids():
    return torch.randint(1, 11, (6, 9), generator=torch.Generator().manual_seed(0))


def make_transformer(family):
    """Two blocks of width 16 with four heads (two of keys and values in Llama)."""
    import transformers

    torch.manual_seed(0)
    none = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, max_position_embeddings=32, **none,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=16, n_layer=2, n_head=4, n_positions=32, **none
        )
        return transformers.GPT2LMHeadModel(config).eval()
    config = transformers.GPTNeoXConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, **none,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).eval()
