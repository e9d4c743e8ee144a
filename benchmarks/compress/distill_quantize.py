"""A small student rounded by paperback and by torchao, and trained by paperback: accuracy and bytes.

    python benchmarks/compress/distill_quantize.py [--peer-python /path/to/python]

`tools/setup-peers compress` makes the peer's environment. The distilled student of the study (first seed) is
written as safetensors; torchao rounds its linear layers' and convolutions' weights, as rows, by its own
primitives (asymmetric, one scale a row for 8 bits, groups of 32 for 4 bits) and hands them back as floats;
all are judged here on the same test part. Bytes are those of codes and scales.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from paperback.compress import evaluate
from paperback.compress.data import Data
from paperback.compress.distill_quantize import DifferentiableQuantization, QuantizedDistillation
from paperback.compress.studies.distill_quantize import BATCH, RATE, network
from paperback.data import images
from paperback.networks.surgery import find_layers, set_weight_matrix, weight_matrix
from paperback.training import seeded, train

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-compress" / "bin" / "python"
PEER = Path(__file__).parent / "peers" / "rounded_weights.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = images.fashion_mnist(6000, 0)
    parts = {
        name: (getattr(dataset, name).x[:5000].float().unsqueeze(1) / 255,
               torch.as_tensor(getattr(dataset, name).y[:5000]))
        for name in ("train", "val", "test")
    }  # fmt: skip
    data = Data(**parts, batch_size=500)
    with seeded(0, "teacher"):
        teacher = network(24, 128, 10, (28, 28))
    train(
        teacher,
        lambda m, b, _: F.cross_entropy(m(b[0]), b[1]),
        data.train,
        epochs=6,
        batch_size=BATCH,
        lr=RATE,
    )
    common = {"epochs": 6, "lr": RATE, "batch_size": BATCH}
    make = lambda: network(6, 32, 10, (28, 28))  # noqa: E731
    student = QuantizedDistillation(make, bits=None, **common).compress(teacher, data, latency_runs=0).model
    print(f"student, float32: {evaluate(student, data.batches('test'))['accuracy']:.3f}")
    layers = find_layers(student).layers
    with tempfile.TemporaryDirectory() as folder:
        given = f"{folder}/weights.safetensors"
        save_file({name: weight_matrix(layer).contiguous() for name, layer in layers.items()}, given)
        for bits in (8, 4, 3, 2):
            back = f"{folder}/{bits}.safetensors"
            done = subprocess.run(
                [arguments.peer_python, PEER, given, back, str(bits)],
                check=True,
                capture_output=True,
                text=True,
            )
            theirs = copy.deepcopy(student)
            for name, weight in load_file(back).items():
                set_weight_matrix(theirs.get_submodule(name), weight)
            peer = evaluate(theirs, data.batches("test"))["accuracy"]
            print(f"{bits} bits: torchao {peer:.3f} ({int(done.stdout):,} bytes)")
            for name, method, model in (
                ("rounded afterwards", QuantizedDistillation(student, bits, epochs=0), teacher),
                ("quantized distillation", QuantizedDistillation(make, bits, **common), teacher),
                ("learned points", DifferentiableQuantization(bits, allocate=False, epochs=3), student),
            ):
                result = method.compress(model, data, teacher=teacher, latency_runs=0, progress=False)
                ours = result.report.quality_after["accuracy"]
                print(
                    f"    {name}: {ours:.3f}, {ours - peer:+.3f} beside torchao; "
                    f"{result.report.after.bytes_on_disk:,} bytes on disk"
                )


if __name__ == "__main__":
    main()
