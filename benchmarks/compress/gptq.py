"""Our GPTQ beside llmcompressor's, on the same model and the same tokens: perplexity and seconds.

    python benchmarks/compress/gptq.py [--peer-python /path/to/python] [--rows 64] [--bits 4 3 2]

`tools/setup-peers compress` puts llmcompressor 0.14 into an environment of its own. Both get
`pretrained("lm-tiny")`, rows of 256 tokens of the Bible, groups of 32 inputs with a zero point, a damping
of .01, blocks of 128 columns and no activation order, and go through the network block by block with the
compressed blocks feeding the next. Bars of the sheet: perplexity ratio in .99 to 1.01, time at most 1.2
times theirs. Ours keeps scales in float16, as it stores them; llmcompressor computes them in the model's
float32 here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from paperback.compress import Data, evaluate, text_rows
from paperback.compress.survey import GPTQ
from paperback.data import text
from paperback.networks import pretrained, pretrained_folder, pretrained_tokenizer

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-compress" / "bin" / "python"
PEER = Path(__file__).parent / "peers" / "gptq.py"
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, bible = pretrained_tokenizer("lm-tiny"), text.kjv()
    rows = text_rows(tokenizer, bible.train.x[:2_000_000], LENGTH, arguments.rows, 0)
    test = text_rows(tokenizer, bible.test.x, LENGTH, 64, 0)
    ours = {}
    for bits in arguments.bits:
        result = GPTQ(bits, 32).compress(pretrained("lm-tiny"), Data(rows), latency_runs=0, progress=False)
        perplexity = evaluate(result.model, test.split(8))["perplexity"]
        ours[str(bits)] = {"seconds": result.report.seconds, "perplexity": perplexity}
    if not arguments.peer_python.exists():
        print(f"{arguments.peer_python} is missing; run tools/setup-peers compress. Ours alone: {ours}")
        return
    with tempfile.TemporaryDirectory() as folder:
        tokens, output = Path(folder) / "tokens.safetensors", Path(folder) / "result.json"
        save_file({"calibration": rows.contiguous(), "test": test.contiguous()}, tokens)
        command = [arguments.peer_python, PEER, pretrained_folder("lm-tiny"), tokens, output]
        subprocess.run(
            [*map(str, command), *map(str, arguments.bits)], check=True, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        theirs = json.loads(output.read_text(encoding="utf-8"))
    print("bits  perplexity: ours   theirs   ratio     seconds: ours  theirs   ratio")
    for bits, peer in theirs.items():
        own = ours[bits]
        print(
            f"{bits:>4} {own['perplexity']:>17.3f} {peer['perplexity']:>8.3f} "
            f"{own['perplexity'] / peer['perplexity']:>7.4f} {own['seconds']:>18.1f} {peer['seconds']:>7.1f} "
            f"{own['seconds'] / peer['seconds']:>7.2f}"
        )


if __name__ == "__main__":
    main()
