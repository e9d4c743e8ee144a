"""Packed int4 weights beside torchao's and GGUF's: bytes, codes, errors, and the time of a forward pass.

    python benchmarks/compress/packed.py [--peer-python /path/to/python] [--side 1024]

`tools/setup-peers compress` puts torchao 0.18 and gguf 0.19 into an environment of their own. All get the
same float32 weights, those of the 42 layers of `pretrained("lm-tiny")`; files are written by each library's
own writer (torchao: torch.save of the state, GGUF: GGUFWriter). "linear" is torchao's grid (minimum and
step of each group as floats), "absmax" stores as much as Q4_0 (one scale for 32 weights).

The time of a forward pass is the median of 15, in one thread, of one layer of side x side for 1 and 64 rows:
dense, packed (unpacked in every call), packed and prepared dense, sparse with half of the weights zero, and
in bfloat16 packed and prepared for torch's int4 kernel, the one that torchao calls. Packing makes the model
smaller; unprepared layers are slower than dense ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paperback.compress.storage import PackedLinear, SparseLinear, save_model
from paperback.networks import pretrained
from paperback.networks.surgery import find_layers, weight_matrix

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-compress" / "bin" / "python"
PEER = Path(__file__).parent / "peers" / "int4_weights.py"


def median_seconds(layer: nn.Module, x: Tensor, runs: int = 15) -> float:
    """Seconds of one pass, the median, after five that do not count."""
    times = []
    with torch.no_grad():
        for i in range(runs + 5):
            start = time.perf_counter()
            layer(x)
            if i >= 5:
                times.append(time.perf_counter() - start)
    return float(np.median(times))


def sizes(weights: dict[str, Tensor], folder: Path) -> dict[str, dict[str, float]]:
    """Bytes of tensors and files, and squared error, by scheme and group."""
    rows: dict[str, dict[str, float]] = {}
    for scheme in ("linear", "affine", "absmax"):
        for size in (32, 64, 128):
            stored = nn.ModuleDict()
            for name, weight in weights.items():
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data.copy_(weight)
                stored[name.replace(".", "-")] = PackedLinear.from_dense(layer, 4, size, scheme)
            path = folder / f"{scheme}-{size}"
            save_model(stored, path)
            dense = [module.dense() for module in stored.values()]
            rows[f"{scheme}, group {size}"] = {
                "payload": sum(module.nbytes for module in stored.values()),
                "file": (path / "model.safetensors").stat().st_size,
                "folder": sum(file.stat().st_size for file in path.iterdir()),
                "error": sum(
                    float((d - w).square().sum()) for d, w in zip(dense, weights.values(), strict=True)
                ),
            }
    return rows


def equal_codes(weights: dict[str, Tensor], folder: Path) -> dict[int, tuple[int, int]]:
    """Codes that differ from torchao's, and how many there are, by group; all scales in float32."""
    differ = {}
    for size in (32, 128):
        theirs = torch.load(folder / f"codes-{size}.pt", weights_only=True)
        wrong = 0
        for name, weight in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data.copy_(weight)
            ours = (
                PackedLinear.from_dense(layer, 4, size, "linear", scale_dtype=torch.float32).quantized().codes
            )
            wrong += int((ours != theirs[name]).sum())
        differ[size] = wrong, sum(weight.numel() for weight in weights.values())
    return differ


def latencies(square: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Seconds of a pass through one layer in each form."""
    weight, x = square["weight"], square["x"][:rows]
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    dense.weight.data.copy_(weight)
    packed = PackedLinear.from_dense(dense, 4, 32, "linear")
    seconds = {"dense": median_seconds(dense, x), "packed": median_seconds(packed, x)}
    assert packed.prepare("dense")
    seconds["packed, prepared dense"] = median_seconds(packed, x)
    half, x16 = copy.deepcopy(dense).to(torch.bfloat16), x.to(torch.bfloat16)
    seconds["dense, bfloat16"] = median_seconds(half, x16)
    packed = PackedLinear.from_dense(half, 4, 32, "linear")
    assert packed.prepare("kernel")
    seconds["packed, bfloat16, kernel"] = median_seconds(packed, x16)
    with torch.no_grad():
        dense.weight[dense.weight.abs() < dense.weight.abs().median()] = 0
    return seconds | {"sparse, half zeros": median_seconds(SparseLinear.from_dense(dense), x)}


def main() -> None:
    """Run both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    parser.add_argument("--side", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    layers = find_layers(pretrained("lm-tiny")).layers
    weights = {name: weight_matrix(layer).clone() for name, layer in layers.items()}
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (arguments.side, arguments.side), "x": (64, arguments.side)}
    square = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(weights, folder / "weights.safetensors")
        save_file(square, folder / "square.safetensors")
        theirs: dict[str, Any] | None = None
        if arguments.peer_python.is_file():
            command = [
                arguments.peer_python,
                PEER,
                folder / "weights.safetensors",
                folder / "square.safetensors",
                folder,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"the peers failed: {done.stderr[-800:]}")
            else:
                theirs = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            print(f"{arguments.peer_python} is not there; run tools/setup-peers compress. Our side alone:")
        count = sum(weight.numel() for weight in weights.values())
        print(f"{len(weights)} matrices, {count:,} weights, {4 * count:,} bytes as float32")
        print(f"{'':34}{'payload':>11}{'bits/weight':>12}{'file':>11}{'squared error':>15}")
        table = {f"paperback {name}": row for name, row in sizes(weights, folder).items()}
        if theirs is not None:
            table |= {f"torchao {name}": row for name, row in theirs["torchao"].items()}
            table["GGUF Q4_0"] = theirs["q4_0"]
        for name, row in table.items():
            error = f"{row['error']:15.3f}" if "error" in row else ""
            print(
                f"{name:34}{row['payload']:11,.0f}{8 * row['payload'] / count:12.3f}{row['file']:11,}{error}"
            )
        if theirs is not None:
            for size, (wrong, total) in equal_codes(weights, folder).items():
                print(f"codes that differ from torchao's, group {size}: {wrong:,} of {total:,}")
            for ours, peer in (
                ("paperback linear, group 32", "torchao group 32, float32"),
                ("paperback linear, group 32", "torchao group 32, bfloat16"),
                ("paperback linear, group 128", "torchao group 128, bfloat16"),
                ("paperback absmax, group 32", "GGUF Q4_0"),
                ("paperback affine, group 64", "GGUF Q4_0"),
            ):
                ratios = [table[ours][what] / table[peer][what] for what in ("payload", "file")]
                print(f"{ours} / {peer}: payload {ratios[0]:.3f}, file {ratios[1]:.3f}")
    print(f"\nmilliseconds of a pass, {arguments.side} x {arguments.side}, one thread")
    for rows in (1, 64):
        seconds = latencies(square, rows)
        if theirs is not None:
            seconds |= {
                f"torchao {dtype}": theirs["seconds"][f"{rows} {dtype}"] for dtype in ("float32", "bfloat16")
            }
        for name, value in seconds.items():
            print(f"  {rows:2} rows  {name:26}{1000 * value:9.3f}  ({value / seconds['dense']:.2f} x dense)")
        if theirs is not None:
            for ours, peer in (("packed", "float32"), ("packed, bfloat16, kernel", "bfloat16")):
                ratio = seconds[ours] / seconds[f"torchao {peer}"]
                print(f"  {rows:2} rows  {ours} / torchao {peer}: {ratio:.2f}")


if __name__ == "__main__":
    main()
