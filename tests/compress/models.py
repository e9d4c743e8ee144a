"""Small models and data that the tests of this wing share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paperback.compress import Data
from paperback.training import seeded


def llama(layers: int = 2, tied: bool = True) -> nn.Module:
    """A Llama of 32 dimensions with grouped queries, untrained."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with seeded(0, "llama"):
        return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    """A GPT-2 of 32 dimensions, untrained."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    with seeded(0, "gpt2"):
        return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    """A BERT classifier of 32 dimensions, untrained."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    with seeded(0, "bert"):
        return transformers.BertForSequenceClassification(config).eval()


def cnn() -> nn.Sequential:
    """A small convolutional classifier of 12 x 12 images, untrained."""
    with seeded(0, "cnn"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
        ).eval()  # fmt: skip


def tokens(rows: int = 8, length: int = 16, seed: int = 0) -> Tensor:
    """Token ids ``(rows, length)`` below 64."""
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def pictures(rows: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images ``(rows, 1, 12, 12)`` and labels ``(rows,)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, 12, 12, generator=generator), torch.randint(
        0, 10, (rows,), generator=generator
    )


def token_data() -> Data:
    """Training and validation tokens."""
    return Data(tokens(), tokens(seed=1), batch_size=4)


def sentence_data() -> Data:
    """Training and validation tokens with a class for each row."""
    parts = [[{"input_ids": ids, "labels": ids[:, 0] % 2} for ids in tokens(seed=s).split(4)] for s in (0, 1)]
    return Data(*parts)


def picture_data() -> Data:
    """Training and validation images with labels."""
    return Data(pictures(), pictures(seed=1), batch_size=8)
