"""Trains the tiny language model that ships: a Llama of 1.4 million parameters with a tokenizer of its own.

    python recipes/lm_tiny.py [FOLDER]

It reads the training parts of the three texts in the package (Austen, the King James Bible, WordNet's
definitions), learns 2,048 byte-pair tokens from them, and trains for three passes, a quarter of an hour on
one core. Definitions stand one to a document as ``words: definition``. The widths are powers of two, so that
every compressor's group sizes divide them. The folder is an ordinary `transformers` checkpoint in half
precision; its MANIFEST.json holds the SHA-256 of each file and what was measured on the validation parts,
beside two count models of the same tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from paperback.data import text
from paperback.study.measure import Stopwatch, parameters
from paperback.training import generator, seeded, train

FOLDER = Path(__file__).resolve().parents[1] / "src" / "paperback" / "networks" / "files" / "lm-tiny"
SEED = 0
VOCABULARY = 2048
LENGTH = 256  # tokens of a training row
EPOCHS = 3
END = "<|endoftext|>"  # between two documents, and at the beginning of each


def main(folder: Path) -> None:
    """Train, measure, and write the folder."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    training, validation = documents("train"), documents("val")
    tokenizer = learn_tokens([t for texts in training.values() for t in texts])
    rows = as_rows(tokenizer, [t for texts in training.values() for t in texts])
    print(f"{rows.numel():,} tokens of training in {len(rows):,} rows", flush=True)
    model = untrained()
    print(f"{parameters(model):,} parameters", flush=True)
    held_out = as_rows(tokenizer, [t for texts in validation.values() for t in texts])
    with Stopwatch() as watch:
        train(
            model, next_token_loss, (rows,), val_tensors=(held_out,), epochs=EPOCHS, batch_size=16, lr=3e-3,
            optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
            schedule="cosine", warmup_fraction=0.05, clip_norm=1.0, seed=SEED, description="lm-tiny",
            callbacks=[lambda epoch, _, history: print(epoch, history.val_metric[-1], flush=True)],
        )  # fmt: skip
    model = model.half().float()  # what is measured is what ships
    measured = measure(model, tokenizer, rows, validation)
    print(json.dumps(measured, indent=2), flush=True)
    write(folder, model, tokenizer, {"validation_bits_per_byte": measured, "seconds": round(watch.seconds)})


# -- texts ---------------------------------------------------------------------------------------------------


def documents(split: str) -> dict[str, list[str]]:
    """The texts of one split by source; each definition is a document, a book is one long one."""
    glosses = getattr(text.wordnet_glosses(), split).x
    return {
        "austen": [getattr(text.austen(), split).x],
        "kjv": [getattr(text.kjv(), split).x],
        "wordnet_glosses": [f"{w}: {t}\n" for w, t in zip(glosses["words"], glosses["text"], strict=True)],
    }


def learn_tokens(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding on bytes: every text can be written, and comes back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((line for t in texts for line in t.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END,
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def as_rows(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All documents one after the other, each behind the end token, cut into rows ``(rows, 256)``."""
    stream = encode(tokenizer, texts)
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts))
    return torch.tensor([i for document in encoded for i in (end, *document.ids)])


# -- model ---------------------------------------------------------------------------------------------------


def untrained() -> LlamaForCausalLM:
    """Six layers of width 128, four heads of 32 with two heads of keys and values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with seeded(SEED, "lm-tiny"):
        return LlamaForCausalLM(config)


def next_token_loss(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """Cross-entropy of each token given those before it in its row."""
    (ids,) = batch
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# -- measurement ---------------------------------------------------------------------------------------------


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, rows: Tensor, validation: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Bits per byte on the validation part of each text: the model, and two count models of its tokens.

    A row's first token has no context; all three are measured on the others, in bytes of the mean token.
    """
    unigram, bigram = counts(rows)
    result = {}
    for name, texts in validation.items():
        n_bytes = sum(len(t.encode()) for t in texts)
        ids = encode(tokenizer, texts)
        share = n_bytes / len(ids)  # bytes of a token, the mean over this text
        block = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        before, after = block[:, :-1], block[:, 1:]
        with torch.no_grad():
            nats = sum(float(next_token_loss(model, (r,), generator(0))) * len(r) for r in block.split(16))
        bits = {
            "model": nats / len(block),
            "bigram": float(-bigram[before, after].log().mean()),
            "unigram": float(-unigram[after].log().mean()),
        }
        result[name] = {k: round(v / math.log(2) / share, 4) for k, v in bits.items()}
        result[name]["bytes_per_token"] = round(share, 3)
    return result


def counts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of tokens, and of a token after another (Witten and Bell's interpolation of both)."""
    unigram = torch.bincount(rows.flatten(), minlength=VOCABULARY).double() + 1
    unigram /= unigram.sum()
    pairs = (rows[:, :-1] * VOCABULARY + rows[:, 1:]).flatten()
    table = torch.bincount(pairs, minlength=VOCABULARY**2).double().view(VOCABULARY, VOCABULARY)
    total, kinds = table.sum(1, keepdim=True), (table > 0).sum(1, keepdim=True)
    kinds = kinds.clamp(min=1)
    return unigram, (table + kinds * unigram) / (total + kinds)


# -- files ---------------------------------------------------------------------------------------------------


def write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict) -> None:
    """The checkpoint with its manifest, written beside the folder and moved into its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".lm-tiny-"))
    model.half().save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    files = sorted(temporary.iterdir())
    manifest = {
        "files": {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        },
        "recipe": "recipes/lm_tiny.py",
        "seed": SEED,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": parameters(model),
    } | facts
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        path.chmod(0o644)
    temporary.chmod(0o755)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {total:,} bytes", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
