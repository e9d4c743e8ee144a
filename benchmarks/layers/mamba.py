"""The selective scan beside its peers: time, memory and agreement of forward and backward, in one process.

    python benchmarks/layers/mamba.py

Peers: mambapy 1.2's Blelloch scan (`pscan`), and the sequential loop over positions, which transformers'
MambaMixer falls back to where its kernel is missing (`mamba_selective_scan`, called directly). `mamba-ssm`
runs on a GPU only and is left out. All get the same inputs; times are medians of interleaved repetitions
on one thread. Memory is what autograd keeps between forward and backward, inputs not counted; on top of it
ours works in three blocks of a megabyte, the others in copies of all states.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable

import torch
from mambapy.pscan import pscan
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from paperback.layers.mamba import selective_scan
from paperback.study.measure import Stopwatch

SHAPES = ((1, 1024, 256, 16), (8, 256, 128, 16), (1, 256, 256, 16))  # batch, length, channels, states
LENGTHS = (1024, 2048, 4096, 8192, 16384)
REPETITIONS = 7
Scan = Callable[..., Tensor]


def ours(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The chunked scan with recomputation."""
    return selective_scan(u, dt, A, B, C, backend="chunk")


def mambapy(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As mambapy's MambaBlock calls its scan."""
    states = pscan((dt[..., None] * A).exp(), (dt * u)[..., None] * B[:, :, None])
    return (states @ C[..., None])[..., 0]


def sequential(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """transformers' loop over positions."""
    return mamba_selective_scan(u.mT, dt.mT, A, B.mT, C.mT).mT


PEERS: dict[str, Scan] = {"ours": ours, "mambapy": mambapy, "sequential": sequential}


def inputs(batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    """u, dt, A, B, C as at the start of training."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    dt = 10 ** (2 * torch.rand(batch, length, channels, generator=generator) - 3)
    tensors = [draw(batch, length, channels), dt, A, draw(batch, length, states), draw(batch, length, states)]
    return [t.requires_grad_() for t in tensors]


def run(scan: Scan, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The output and all gradients."""
    y = scan(*tensors)
    return (y.detach(), *torch.autograd.grad(y.sum(), tensors))


def kept_bytes(scan: Scan, tensors: list[Tensor]) -> int:
    """Bytes of distinct memory that autograd keeps, inputs not counted."""
    own = {t.untyped_storage().data_ptr() for t in tensors}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = scan(*tensors)
    del y
    return sum(storage.nbytes() for storage in kept.values())


def milliseconds(scans: dict[str, Scan], tensors: list[Tensor]) -> dict[str, float]:
    """Median time of forward and backward, the scans taking turns; the slow one twice."""
    times: dict[str, list[float]] = {name: [] for name in scans}
    for repetition in range(REPETITIONS + 1):
        for name, scan in scans.items():
            if name == "sequential" and repetition > 2:
                continue
            with Stopwatch() as watch:
                run(scan, tensors)
            if repetition > 0:  # the first warms up
                times[name].append(watch.seconds * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for shape in SHAPES:
        tensors = inputs(*shape)
        times = milliseconds(PEERS, tensors)
        memory = {name: kept_bytes(scan, tensors) for name, scan in PEERS.items()}
        reference = run(sequential, tensors)
        print(f"(batch, length, channels, states) = {shape}, forward and backward")
        for name, scan in PEERS.items():
            error = max(
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(run(scan, tensors), reference, strict=True)
            )
            print(
                f"  {name:10} {times[name]:9.1f} ms = {times[name] / times['ours']:6.1f} x ours   "
                f"{memory[name] / 2**20:8.2f} MiB = {memory[name] / memory['ours']:6.1f} x ours   "
                f"off from sequential by {error:.1e} of the largest entry"
            )
    print("linear in the length: ours, forward and backward, (1, length, 256, 16)")
    base = None
    for length in LENGTHS:
        time = milliseconds({"ours": ours}, inputs(1, length, 256, 16))["ours"]
        base = base or time / length
        print(f"  {length:6} positions: {time:8.1f} ms, {time / length / base:.2f} x per position")


if __name__ == "__main__":
    main()
