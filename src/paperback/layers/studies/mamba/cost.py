"""Cost against length: seconds of the processor, forward and backward, and how they grow."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.layers.mamba.blocks import AttentionBlock, MambaBlock
from paperback.layers.mamba.selective_scan import selective_scan
from paperback.study import Run
from paperback.training import generator, seeded

Task = Callable[[], None]

D_MODEL, D_INNER, D_STATE = 64, 256, 16
SCAN_LENGTH = 1024  # of the comparison of scans, at (1, 1024, 256, 16)


def layer_seconds(run: Run, lengths: Sequence[int], repeats: int) -> dict[str, dict[int, float]]:
    """Seconds of a block forward and backward on one sequence, by block and length.

    The blocks take turns, so that a busy moment of the machine meets all of them; the median counts.

    Args:
        run: asked for progress.
        lengths: positions.
        repeats: turns.
    """
    with seeded(run.seed, "cost"):
        blocks: dict[str, nn.Module] = {
            "S6": MambaBlock(D_MODEL, d_state=D_STATE),
            "SSD": MambaBlock(D_MODEL, d_state=64, kind="ssd", chunk=64),
            "attention": AttentionBlock(D_MODEL),
        }
    if importlib.util.find_spec("mambapy"):
        from mambapy.mamba import MambaBlock as PeerBlock
        from mambapy.mamba import MambaConfig

        with seeded(run.seed, "cost"):
            blocks["mambapy"] = PeerBlock(MambaConfig(d_model=D_MODEL, n_layers=1, d_state=D_STATE))
    source = generator(run.seed, "cost")
    found: dict[str, dict[int, float]] = {name: {} for name in blocks}
    for length in run.track(lengths, "cost against length"):
        u = torch.randn(1, length, D_MODEL, generator=source)
        tasks = {name: _training_step(block, u) for name, block in blocks.items()}
        for name, seconds in take_turns(tasks, repeats).items():
            found[name][length] = seconds
    return found


def scan_seconds(run: Run, length: int, repeats: int) -> dict[str, float]:
    """Seconds of the scan alone, forward and backward, at (1, length, 256, 16), by how it is computed."""
    source = generator(run.seed, "scan")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    u, B, C = draw(1, length, D_INNER), draw(1, length, D_STATE), draw(1, length, D_STATE)
    dt = F.softplus(draw(1, length, D_INNER) - 4)
    A = -torch.arange(1.0, D_STATE + 1).repeat(D_INNER, 1)
    inputs = [part.requires_grad_() for part in (u, dt, A, B, C)]

    def step(scan: Callable[[], Tensor]) -> Task:
        def once() -> None:
            for part in inputs:
                part.grad = None
            scan().sum().backward()

        return once

    return take_turns(
        {
            "chunked": step(lambda: selective_scan(u, dt, A, B, C, backend="chunk")),
            "step by step": step(lambda: selective_scan(u, dt, A, B, C, backend="sequential")),
            "loop over indices": step(lambda: loop_over_indices(u, dt, A, B, C)),
        },
        repeats,
    )


def loop_over_indices(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition written down: what the reference code and transformers do without a GPU.

    Autograd pads the gradient of every index to the whole length, so that it costs the length squared.
    """
    decay = torch.exp(dt[..., None] * A)
    drive = (dt * u)[..., None] * B[:, :, None]
    h, outputs = torch.zeros_like(drive[:, 0]), []
    for t in range(u.shape[1]):
        h = decay[:, t] * h + drive[:, t]
        outputs.append((h * C[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


def take_turns(tasks: dict[str, Task], repeats: int) -> dict[str, float]:
    """Median seconds of the processor for each task, after one turn that does not count.

    The time of the processor, not that of the clock: on one thread they are the same, unless other programs
    take the core away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}


def slope(seconds: dict[int, float], shortest: int) -> float:
    """Exponent p of seconds ∝ length^p: least squares on log-log axes, from a length on."""
    lengths = [length for length in seconds if length >= shortest]
    if len(lengths) < 2:
        lengths = list(seconds)
    return float(np.polyfit(np.log(lengths), np.log([seconds[length] for length in lengths]), 1)[0])


def _training_step(block: nn.Module, u: Tensor) -> Task:
    def once() -> None:
        block.zero_grad(set_to_none=True)
        block(u).sum().backward()

    return once
