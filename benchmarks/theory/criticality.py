"""Criticality beside its peers: neural-tangents for the kernels, torch.nn.init for the gains.

    python benchmarks/theory/criticality.py [--inputs 60] [--peer-python /path/to/python]

1. neural-tangents (JAX): NNGP and NTK kernels of fully connected networks, in float64, on the same inputs,
   for activations that it knows in closed form (ReLU, erf, GELU) and for one that it can only do by
   Gauss-Hermite quadrature (SiLU through ElementwiseNumerical, with 25 and with 100 nodes). Largest
   difference and seconds; its seconds are after compilation. It breaks under current JAX (it imports
   jax.core.Jaxpr, which is gone) and so has an environment of its own: `tools/setup-peers theory`.
2. torch.nn.init.calculate_gain: a table of fixed gains, against what criticality asks for; and the time that
   the search takes for any callable.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.numerics.kernels import Dual, arc_cosine, arc_sine, nngp_and_ntk, quadrature
from paperback.theory.criticality import Criticality

PEER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-peers-theory" / "bin" / "python"
DEPTH, C_B, C_W = 4, 0.1, 1.5

PEER = """
import json, sys, time
import numpy as np
import jax
jax.config.update("jax_enable_x64", True)
from neural_tangents import stax
folder, depth, c_b, c_w = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
x = np.load(folder + "/x.npy")
kinds = {
    "relu": stax.Relu(), "erf": stax.Erf(), "gelu": stax.Gelu(),
    "silu, 25 nodes": stax.ElementwiseNumerical(jax.nn.silu, deg=25),
    "silu, 100 nodes": stax.ElementwiseNumerical(jax.nn.silu, deg=100),
}
for name, activation in kinds.items():
    dense = lambda: stax.Dense(1, W_std=c_w ** 0.5, b_std=c_b ** 0.5)
    layers = [dense()]
    for _ in range(depth - 1):
        layers += [activation, dense()]
    kernel = jax.jit(stax.serial(*layers)[2], static_argnames="get")
    found = kernel(x, None, ("nngp", "ntk"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = jax.block_until_ready(kernel(x, None, ("nngp", "ntk")))
        seconds.append(time.perf_counter() - start)
    np.savez(f"{folder}/{name}.npz", nngp=found.nngp, ntk=found.ntk, seconds=min(seconds))
print(json.dumps({"jax": jax.__version__}))
"""


def fastest(
    work: Callable[[], tuple[Tensor, Tensor]], repeats: int = 3
) -> tuple[float, tuple[Tensor, Tensor]]:
    """The least seconds of several runs, and the result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def against_neural_tangents(n_inputs: int, python: str) -> None:
    """The same kernels from both."""
    x = torch.randn(n_inputs, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours: dict[str, tuple[str, Dual]] = {
        "relu, closed form": ("relu", arc_cosine()),
        "relu, quadrature": ("relu", quadrature(F.relu)),
        "erf, closed form": ("erf", arc_sine),
        "erf, quadrature": ("erf", quadrature(torch.erf)),
        "gelu, quadrature": ("gelu", quadrature(F.gelu)),
        "silu, quadrature (their 25)": ("silu, 25 nodes", quadrature(F.silu)),
        "silu, quadrature (their 100)": ("silu, 100 nodes", quadrature(F.silu)),
    }
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", x.numpy())
        command = [python, "-c", PEER, folder, str(DEPTH), str(C_B), str(C_W)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            version = json.loads(done.stdout.splitlines()[-1])["jax"]
            print(f"neural-tangents on jax {version}: {n_inputs} inputs, depth {DEPTH}")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            print(f"neural-tangents not run: {reason.strip().splitlines()[-1]}")
        for name, (peer, dual) in ours.items():
            seconds, kernels = fastest(lambda dual=dual: nngp_and_ntk(x, dual, DEPTH, C_B, C_W))  # type: ignore[misc]
            line = f"  {name:28} ours {seconds:8.2e} s"
            file = Path(folder) / f"{peer}.npz"
            if file.exists():
                theirs = np.load(file)
                apart = [
                    float(np.abs(k.numpy() - theirs[key]).max())
                    for key, k in zip(("nngp", "ntk"), kernels, strict=True)
                ]
                ratio = float(theirs["seconds"]) / seconds
                line += (
                    f"   theirs {float(theirs['seconds']):8.2e} s   {ratio:7.3g} x as fast"
                    f"   apart: NNGP {apart[0]:.1e}, NTK {apart[1]:.1e}"
                )
            print(line)


def against_gains() -> None:
    """gain^2 is what torch takes for C_W; it knows no C_b."""
    print("torch.nn.init gains (C_W = gain^2, C_b = 0) and the critical point")
    table: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
        "linear": ("linear", lambda z: z), "relu": ("relu", F.relu),
        "leaky_relu": ("leaky_relu", F.leaky_relu),
        "tanh": ("tanh", torch.tanh), "sigmoid": ("sigmoid", torch.sigmoid), "selu": ("selu", F.selu),
        "gelu": (None, F.gelu), "silu": (None, F.silu), "mish": (None, F.mish), "elu": (None, F.elu),
        "hardswish": (None, F.hardswish), "x + sin(x)^2": (None, lambda z: z + torch.sin(z) ** 2),
    }  # fmt: skip
    for name, (known, function) in table.items():
        start = time.perf_counter()
        theory = Criticality(function)
        point = theory.recommended
        seconds = time.perf_counter() - start
        gain = "no entry" if known is None else f"{nn.init.calculate_gain(known) ** 2:8.4f}"
        print(
            f"  {name:13} torch {gain:>8}   C_W {point.C_W:8.4f}  C_b {point.C_b:7.4f}  {point.kind:15} "
            f"{seconds:5.2f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=60)
    parser.add_argument("--peer-python", default=str(PEER_PYTHON), help="a python with neural-tangents")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    against_neural_tangents(arguments.inputs, arguments.peer_python)
    against_gains()
