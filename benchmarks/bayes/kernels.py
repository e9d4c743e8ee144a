"""Kernels of wide networks beside neural-tangents: the same numbers, and how fast.

    python benchmarks/bayes/kernels.py [--inputs 2000] [--images 150] [--peer-python /path/to/python]

NNGP and NTK of fully connected networks of three hidden layers (ReLU and erf), and the NNGP of a
convolutional one without pooling, all in float64, each library in one process on one core. neural-tangents
is timed after compilation. It breaks under current JAX and so has an environment of its own, the one of the
theory wing: `tools/setup-peers theory`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paperback.bayes.kernels import ConvNNGPKernel, NNGPKernel, NTKKernel

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-theory" / "bin" / "python"
DEPTH, BIAS, WEIGHT, SIDE = 3, 0.1, 1.5, 8

PEER = """
import sys, time
import numpy as np
import jax
jax.config.update("jax_enable_x64", True)
from neural_tangents import stax
folder, depth = sys.argv[1], int(sys.argv[2])
bias, weight = float(sys.argv[3]) ** 0.5, float(sys.argv[4]) ** 0.5
x, images = np.load(folder + "/x.npy"), np.load(folder + "/images.npy")

def timed(name, kernel, data):
    kernel = jax.jit(kernel)
    found = jax.block_until_ready(kernel(data))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = jax.block_until_ready(kernel(data))
        seconds.append(time.perf_counter() - start)
    np.savez(f"{folder}/{name}.npz", kernel=found, seconds=min(seconds))

for activation, act in (("relu", stax.Relu()), ("erf", stax.Erf())):
    layers = []
    for _ in range(depth):
        layers += [stax.Dense(1, W_std=weight, b_std=bias), act]
    kernel = stax.serial(*layers, stax.Dense(1, W_std=weight, b_std=bias))[2]
    for which in ("nngp", "ntk"):
        timed(f"{which} {activation}", lambda data, kernel=kernel, which=which: kernel(data, None, which), x)
layers = []
for _ in range(depth):
    layers += [stax.Conv(1, (3, 3), padding="SAME", W_std=weight, b_std=bias), stax.Relu()]
kernel = stax.serial(*layers, stax.Flatten(), stax.Dense(1, W_std=1.0))[2]
timed("nngp conv", lambda data: kernel(data, None, "nngp"), images)
"""


def fastest(work: Callable[[], Tensor], repeats: int = 3) -> tuple[float, Tensor]:
    """The least seconds of several runs, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def ours(x: Tensor, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by the peer's names."""
    kernels: dict[str, tuple[NNGPKernel, Tensor]] = {}
    for activation in ("relu", "erf"):
        for which, cls in (("nngp", NNGPKernel), ("ntk", NTKKernel)):
            kernels[f"{which} {activation}"] = (cls(DEPTH, activation), x)  # type: ignore[arg-type]
    kernels["nngp conv"] = (ConvNNGPKernel((SIDE, SIDE), DEPTH), images)
    for kernel, _ in kernels.values():
        kernel.double().requires_grad_(False)
        kernel.weight_variance, kernel.bias_variance = WEIGHT, BIAS
    return {
        name: lambda kernel=kernel, data=data: kernel.forward(data, data)  # type: ignore[misc]
        for name, (kernel, data) in kernels.items()
    }


def main() -> None:
    """Print seconds, ratio and the largest relative difference of each kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--peer-python", default=str(PEER_PYTHON), help="a python with neural-tangents")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # inherited by the peer: XLA takes every core that it sees
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.inputs, 10, generator=generator, dtype=torch.float64)
    images = torch.randn(arguments.images, SIDE, SIDE, generator=generator, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x.numpy())
        np.save(f"{folder}/images.npy", images[..., None].numpy())
        command = [arguments.peer_python, "-c", PEER, folder, str(DEPTH), str(BIAS), str(WEIGHT)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            print(f"neural-tangents not run: {reason.strip().splitlines()[-1]}")
        print(f"{arguments.inputs} inputs, {arguments.images} images of {SIDE} x {SIDE}, one core")
        for name, work in ours(x, images.flatten(1)).items():
            seconds, kernel = fastest(work)
            line = f"  {name:10} ours {seconds:7.3f} s"
            file = Path(folder) / f"{name}.npz"
            if file.exists():
                theirs = np.load(file)
                scale = np.abs(theirs["kernel"]).max()
                apart = float(np.abs(kernel.numpy() - theirs["kernel"]).max() / scale)
                ratio = float(theirs["seconds"]) / seconds
                line += f"   theirs {ratio * seconds:7.3f} s   {ratio:5.2f} x as fast   apart {apart:.1e}"
            print(line)


if __name__ == "__main__":
    main()
