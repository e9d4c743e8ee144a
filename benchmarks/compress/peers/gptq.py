"""GPTQ by llmcompressor: perplexity and seconds.

Runs in `.venv-peers-compress`, called by `benchmarks/compress/gptq.py`. Reads a model folder and a
safetensors file with the tokens to calibrate on and to judge on; writes JSON to its output.
"""

import json
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def perplexity(model, rows):
    """exp of the mean nats of a token, each row from its second."""
    nats = 0.0
    for part in rows.split(8):
        logits = model(part).logits[:, :-1].float()
        nats += float(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return math.exp(nats / rows[:, 1:].numel())


def main(folder, tokens, output, *bits):
    torch.set_num_threads(1)
    data = load_file(tokens)
    rows = data["calibration"]
    results = {}
    for n in map(int, bits):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        weights = QuantizationArgs(num_bits=n, type="int", symmetric=False, strategy="group", group_size=32)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        recipe = GPTQModifier(
            config_groups={"all": scheme}, ignore=["lm_head"], dampening_frac=0.01, block_size=128,
            actorder=None,
        )  # fmt: skip
        dataset = Dataset.from_dict(
            {"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}
        )
        start = time.perf_counter()
        oneshot(
            model=model, dataset=dataset, recipe=recipe, max_seq_length=rows.shape[1],
            num_calibration_samples=len(rows), batch_size=8, shuffle_calibration_samples=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        results[str(n)] = {"seconds": seconds, "perplexity": perplexity(model, data["test"])}
    temporary = f"{output}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(results, file)
    os.replace(temporary, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
