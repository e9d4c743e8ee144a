"""The schedule beside torch's, and the HyperCuboid with grouped widths beside one call for each operation.

Run: ``OMP_NUM_THREADS=1 python benchmarks/search/sharp_darts.py``.

The authors' code (ahundt/sharpDARTS) cannot be run here: it needs CUDA, apex and a torch of 2019. nni, which
has DARTS, is retired, and has no cuboid. So the cuboid is compared with a transcription of the forward pass
of the authors' MultiChannelNetwork: a loop over layers, widths out, widths in and operations, in which each
operation is a module and its weight is also written to a graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from paperback.search.sharp_darts import (
    ConvolutionKit,
    CosinePowerAnnealing,
    DenseKit,
    HyperCuboid,
    Kit,
    Mixing,
    cosine_power,
)

WIDTHS = (4, 8, 16, 32)
BAR = 3.0


class OfficialLoop(nn.Module):
    """The authors' forward pass, operation by operation, for any kit."""

    def __init__(self, space: HyperCuboid) -> None:
        super().__init__()
        self.space = space
        widths, kit = space.widths, space.kit
        self.stems = nn.ModuleList(kit.stem(width, False) for width in widths)
        self.grid = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(
                    nn.ModuleList(kit.operation(o, i, j, space.stride(k), False) for o in space.operations)
                    for j in widths
                )
                for i in widths
            )
            for k in range(space.layers)
        )
        self.ends = nn.ModuleList(kit.end(width, False) for width in widths)
        self.head = kit.head()
        self.alphas = nn.Parameter(1e-3 * torch.randn(space.layers, space.options))
        self.graph = nx.DiGraph()
        for k in range(space.layers):
            for j in widths:
                for i in widths:
                    for o in space.operations:
                        self.graph.add_edge(self._name(k, i, j, o), self._sum(k, j))

    def _name(self, layer: int, width_in: int, width_out: int, operation: str) -> str:
        return f"layer_{layer}_c_in_{width_in}_c_out_{width_out}_op_type_{operation}"

    def _sum(self, layer: int, width_out: int) -> str:
        return f"layer_{layer}_add_c_out_{width_out}"

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        widths, operations = self.space.widths, self.space.operations
        n = len(widths)
        weights = self.alphas.softmax(-1).view(-1, n, n, len(operations))
        maps: list[Tensor] = [stem(x) for stem in self.stems]
        for k in range(self.space.layers):
            strongest = weights[k].max()
            following = []
            for j, width_out in enumerate(widths):
                terms = []
                for i, width_in in enumerate(widths):
                    for o, operation in enumerate(operations):
                        w = weights[k, i, j, o]
                        edge = self.graph[self._name(k, width_in, width_out, operation)][
                            self._sum(k, width_out)
                        ]
                        edge["weight"] = float(w.clone().cpu().detach().numpy())
                        edge["weight_int"] = int(float(w.clone().cpu().detach().numpy()) * 1e5)
                        terms.append((1.0 - strongest + w) * self.grid[k][i][j][o](maps[i]))
                following.append(sum(terms[1:], terms[0]))
            maps = following
        ends = [end(m) for end, m in zip(self.ends, maps, strict=True)]
        return self.head(sum(ends[1:], ends[0]))


def least_seconds(call: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of some runs: what the machine does otherwise only adds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def compare_schedules(epochs: int = 2000) -> None:
    """Rates and microseconds per step."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    optimizer.step()
    ours = CosinePowerAnnealing(optimizer, epochs, 1e-4, 2.0, 5)
    seconds = {"CosinePowerAnnealing": least_seconds(lambda: [ours.step() for _ in range(epochs)], 3)}
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, 1e-4)
    seconds["torch CosineAnnealingLR"] = least_seconds(lambda: [theirs.step() for _ in range(epochs)], 3)
    for name, value in seconds.items():
        print(f"{name:26s} {1e6 * value / epochs:6.1f} us a step")
    t = np.arange(2, epochs + 1)
    cosine = 1e-4 + (0.1 - 1e-4) * (1 + np.cos(np.pi * (t - 1) / (epochs - 1))) / 2
    power_1 = cosine_power(t, epochs, 0.1, 1e-4, power=1, warmup=1)
    print(f"power 1 against the cosine: largest difference {np.abs(cosine - power_1).max():.1e}")


def compare_cuboids() -> None:
    """Milliseconds of a forward pass in training mode, and of forward and backward."""
    pair = ("sep_conv_3x3", "max_pool_3x3")
    dense: Kit = DenseKit(64)
    cases = {
        "perceptrons of the study, batch 48": (dense, (1,), 3, ("relu", "tanh", "linear"), (48, 64)),
        "convolutions, 8 x 8 pixels, batch 4": (ConvolutionKit(1, 10, 64), (1, 2), 4, pair, (4, 1, 8, 8)),
        "convolutions, 8 x 8 pixels, batch 16": (ConvolutionKit(1, 10, 64), (1, 2), 4, pair, (16, 1, 8, 8)),
        "convolutions, 14 x 14 pixels, batch 48": (
            ConvolutionKit(1, 10, 64),
            (1, 2),
            4,
            pair,
            (48, 1, 14, 14),
        ),
    }
    print(f"\nHyperCuboid, widths {WIDTHS}: milliseconds grouped, by the authors' loop, and the ratio")
    for name, (kit, strides, layers, operations, shape) in cases.items():
        space = HyperCuboid(WIDTHS, layers, operations, kit, strides)
        grouped, loop, x = space.supernet(Mixing()), OfficialLoop(space), torch.randn(shape)
        for what in ("forward", "forward and backward"):
            times = []
            for net in (grouped, loop):

                def call(net: nn.Module = net, x: Tensor = x, backward: bool = what != "forward") -> None:
                    y = net(x)
                    if backward:
                        y.square().mean().backward()

                times.append(1000 * least_seconds(call))
            ratio = times[1] / times[0]
            verdict = f"{'reaches' if ratio >= BAR else 'falls short of'} the bar of {BAR}"
            note = verdict if what == "forward" else ""
            print(f"{name:40s} {what:21s} {times[0]:8.2f} {times[1]:8.2f} {ratio:6.2f}  {note}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_schedules()
    compare_cuboids()
