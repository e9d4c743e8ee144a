"""Pointer networks beside their peers, on the same data, in one script.

    python benchmarks/layers/pointer_network.py [--repeats 9] [--threads 1] [--sets 100]

1. Training steps per second, H = 128, n = 10, batch 128: ours (one LSTM call and one pointing operation for
   the whole output) against a decoder that goes step by step in Python, as the public PyTorch codes do. None
   of those is a package; `StepByStep` is our own transcription of the algorithm, with our weights, and both
   losses are compared before anything is timed.
2. Convex hulls: ours for a batch against scipy's Qhull, set by set.
3. Shortest tours: our batched Held and Karp and 2-opt against python-tsp (dynamic programming and local
   search), set by set, if it is installed; length and seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull
from torch import Tensor, nn

from paperback.data.simulate.geometry import (
    convex_hull,
    farthest_insertion,
    held_karp,
    hull_batch,
    tour_length,
    two_opt,
)
from paperback.layers.pointer_network import PointerNetwork

HIDDEN, POINTS, BATCH = 128, 10, 128


class StepByStep(nn.Module):
    """A pointer network whose encoder, decoder and attention are called once per element or output."""

    def __init__(self, model: PointerNetwork) -> None:
        super().__init__()
        self.go, self.end, self.attention = model.go, model.end, model.attentions[0]
        self.read, self.write = nn.LSTMCell(2, HIDDEN), nn.LSTMCell(2, HIDDEN)
        for cell, lstm in ((self.read, model.encoder.lstm), (self.write, model.decoder)):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(lstm, f"{name}_l0"))

    def loss(self, points: Tensor, targets: Tensor) -> Tensor:
        """As `PointerNetwork.loss`, without padding of the input."""
        batch, n, _ = points.shape
        h = c = points.new_zeros(batch, HIDDEN)
        states = [self.end.expand(batch, -1)]
        for j in range(n):
            h, c = self.read(points[:, j], (h, c))
            states.append(h)
        elements = torch.stack(states, 1)
        fed, total = self.go.expand(batch, -1), points.new_zeros(())
        for i in range(targets.shape[1]):
            h, c = self.write(fed, (h, c))
            inner = torch.tanh(self.attention.of_keys(elements) + self.attention.of_query(h)[:, None])
            scores = inner @ self.attention.direction
            total = total + F.cross_entropy(scores, targets[:, i], ignore_index=-1, reduction="sum")
            chosen = (targets[:, i] - 1).clamp_min(0)
            fed = points[torch.arange(batch), chosen]
        return total / (targets >= 0).sum()


def interleaved(repeats: int, *asked: Callable[[], object]) -> list[float]:
    """Median seconds of each, in turns, so that a busy machine disturbs all alike."""
    times: list[list[float]] = [[] for _ in asked]
    for _ in range(repeats + 1):
        for ask, seconds in zip(asked, times, strict=True):
            start = time.perf_counter()
            ask()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[1:]) for seconds in times]


def training(repeats: int) -> None:
    torch.manual_seed(0)
    model = PointerNetwork(2, HIDDEN)
    peer = StepByStep(model)
    points, targets, _ = hull_batch(POINTS, BATCH, 0)
    ours, theirs = model.loss(points, targets).item(), peer.loss(points, targets).item()
    assert abs(ours - theirs) < 1e-5, "both have to compute the same loss"

    def step(module: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.0)

        def run() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                module.loss(points, targets).backward()  # type: ignore[operator]
                optimizer.step()

        return run

    mine, other = (seconds / 5 for seconds in interleaved(repeats, step(model), step(peer)))
    print(f"training, n = {POINTS}, H = {HIDDEN}, batch {BATCH}, outputs {targets.shape[1]}")
    print(f"  ours           {1 / mine:7.1f} steps/s")
    print(f"  step by step   {1 / other:7.1f} steps/s   (transcription)")
    print(f"  ratio          {other / mine:7.2f}       (bar: >= 2)")


def hulls(repeats: int, sets: int) -> None:
    print(f"convex hulls of {sets} sets")
    for n in (10, 100):
        points = torch.rand(sets, n, 2, generator=torch.Generator().manual_seed(n))
        arrays = points.double().numpy()
        mine, other = interleaved(
            repeats, lambda p=points: convex_hull(p), lambda a=arrays: [ConvexHull(x).vertices for x in a]
        )
        print(
            f"  n = {n:3}: ours {1e3 * mine:7.2f} ms, Qhull {1e3 * other:7.2f} ms, ratio {other / mine:.2f}"
        )


def tours(repeats: int, sets: int) -> None:
    try:
        from python_tsp.exact import solve_tsp_dynamic_programming
        from python_tsp.heuristics import solve_tsp_local_search
    except ImportError:
        print(
            "tours: python-tsp is not installed; nothing to compare with (pip install --no-deps python-tsp: "
            "what it needs for reading files wants an older networkx)"
        )
        return
    points = torch.rand(sets, 9, 2, generator=torch.Generator().manual_seed(9))
    distances = torch.cdist(points.double(), points.double()).numpy()
    print(f"tours through 9 points, {sets} sets")
    for name, ours, theirs in (
        ("exact", lambda: held_karp(points), solve_tsp_dynamic_programming),
        ("2-opt", lambda: two_opt(points, farthest_insertion(points)), solve_tsp_local_search),
    ):
        mine, other = interleaved(
            repeats, ours, lambda solve=theirs: [solve(d) for d in distances]
        )  # fmt: skip
        length = float(tour_length(points, ours()).mean())
        their_length = float(np.mean([theirs(d)[1] for d in distances]))
        print(
            f"  {name}: ours {length:.4f} in {1e3 * mine:8.2f} ms, python-tsp {their_length:.4f} in "
            f"{1e3 * other:8.2f} ms, ratio {other / mine:.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sets", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    training(arguments.repeats)
    hulls(arguments.repeats, arguments.sets)
    tours(arguments.repeats, arguments.sets)


if __name__ == "__main__":
    main()
