"""MaskLLM beside a plain training of the same model, and beside one-shot 2:4 pruning.

    python benchmarks/compress/maskllm.py [--steps 40] [--repeats 3] [--threads 1] [--learn 0]

1. Seconds of a step of MaskLLM (masks sampled, masked weights, gradient of the gates, AdamW) over those of
   a plain step (forward, backward, AdamW on the weights) on lm-tiny, 8 rows of 128 tokens. Bar: at most 1.6.
2. With ``--learn N``: perplexity on validation text after N steps, over that of SparseGPT's 2:4 with the same
   calibration rows. Bar: at most 0.97.

NVlabs/MaskLLM needs Megatron and several GPUs and is not on PyPI, so it cannot run here; the plain step
stands for what it adds to. SparseGPT is ours; benchmarks/compress/pruning.py compares it with llmcompressor.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import Tensor, nn

from paperback.compress import Data, evaluate, text_rows
from paperback.compress.data import default_loss
from paperback.compress.maskllm import MaskLLM
from paperback.compress.pruning import SparseGPT
from paperback.data import text
from paperback.networks import pretrained, pretrained_tokenizer
from paperback.study.measure import Stopwatch
from paperback.training import train

BATCH, LENGTH, RATE = 8, 128, 2e-3
STEP_BAR, PERPLEXITY_BAR = 1.6, 0.97


def plain_seconds(model: nn.Module, rows: Tensor) -> float:
    """Seconds of a step that trains the weights."""
    trained = copy.deepcopy(model)
    with Stopwatch() as watch:
        train(
            trained, lambda m, batch, _: default_loss(m, batch[0]), rows, epochs=1, batch_size=BATCH, lr=1e-4,
            optimizer="adamw", clip_norm=1.0, progress=False,
        )  # fmt: skip
    return watch.seconds / (len(rows) // BATCH)


def masked_seconds(model: nn.Module, rows: Tensor) -> float:
    """Seconds of a step that trains the gates, everything that compress does around it included."""
    method = MaskLLM(prior="magnitude", steps=len(rows) // BATCH, lr=RATE, batch_size=BATCH)
    result = method.compress(model, rows, latency_runs=0, progress=False)
    return result.report.seconds / (len(rows) // BATCH)


def learned_ratio(model: nn.Module, rows: Tensor, held_out: Tensor) -> float:
    """Perplexity of the learned mask over that of SparseGPT with its update."""
    one_shot = SparseGPT(nm=(2, 4)).compress(model, Data(train=rows[:128]), latency_runs=0, progress=False)
    method = MaskLLM(prior=one_shot.extras["masks"], steps=len(rows) // BATCH, lr=RATE, batch_size=BATCH)
    learned = method.compress(model, rows, latency_runs=0, progress=True)
    ours, theirs = (evaluate(m, held_out.split(20))["perplexity"] for m in (learned.model, one_shot.model))
    print(f"perplexity: MaskLLM {ours:.2f}, SparseGPT {theirs:.2f}")
    return ours / theirs


def main() -> None:
    """Run and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--learn", type=int, default=0, help="steps of the second part; 0 leaves it out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = pretrained("lm-tiny"), pretrained_tokenizer("lm-tiny")
    novels = text.austen()
    rows = text_rows(tokenizer, novels.train.x[:2_000_000], LENGTH, arguments.steps * BATCH)
    masked_seconds(model, rows[: 2 * BATCH])  # warm up
    pairs = [(masked_seconds(model, rows), plain_seconds(model, rows)) for _ in range(arguments.repeats)]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    ours, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"a step of MaskLLM {ours * 1000:.0f} ms, a plain step {theirs * 1000:.0f} ms: ratio {ratio:.2f}")
    print(f"bar at most {STEP_BAR}: {'reached' if ratio <= STEP_BAR else 'missed'}")
    if arguments.learn:
        rows = text_rows(tokenizer, novels.train.x, LENGTH, arguments.learn * BATCH)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        ratio = learned_ratio(model, rows, text_rows(tokenizer, novels.val.x, 256, 60))
        verdict = "reached" if ratio <= PERPLEXITY_BAR else "missed"
        print(f"ratio {ratio:.3f}, bar at most {PERPLEXITY_BAR}: {verdict}")


if __name__ == "__main__":
    main()
