"""The HyperCuboid: differentiable grid search over layers x width in x width out x operation.

There is one feature map for each width. In a step, the map of width j becomes the sum over all widths i and
operations o of ``weight[i, j, o] * op[i, j, o](map i)``; one softmax goes over all (i, j, o) of the step.
What is read out is the path from source to sink with the greatest sum of weights, found exactly by dynamic
programming. (Max-W adds the same to every weight of a step and so has the same path.) The architecture is
that plain chain, trained from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paperback.errors import DataError
from paperback.search.sharp_darts.kits import Kit
from paperback.search.sharp_darts.mixing import Mixing
from paperback.search.sharp_darts.steps import NestedStep
from paperback.training import seeded

NONE = "none"  # the operation that no architecture keeps
Readout = Literal["longest", "top_down", "bottom_up"]


@dataclass(frozen=True)
class Chain:
    """A chain through the cuboid.

    Attributes:
        widths: before the first step and after each.
        operations: of each step.
    """

    widths: tuple[int, ...]
    operations: tuple[str, ...]


@dataclass(frozen=True)
class HyperCuboid:
    """Chains through a grid of widths and operations.

    Args:
        widths: different, positive; the paper has C 2^i.
        layers: steps of the grid; a multiple of the number of strides, which alternate.
        operations: names that the kit knows.
        kit: what blocks are made of.
        strides: of successive steps; the paper has (1, 2), a perceptron (1,).
        skip_below: operations that weigh less in the mixture are not computed, but for the strongest of each
            width; "auto" is the paper's 1 / N^2 with N options. At 0 all are. Grouped steps leave none out.
        grouped: whether a kit that can computes all operations of a step at once; None does so where nothing
            is skipped.
        recompute: compute a step again in the backward pass, which saves the memory of its operations.

    Raises:
        DataError: if widths, layers or operations are unfit.
    """

    widths: Sequence[int]
    layers: int
    operations: Sequence[str]
    kit: Kit
    strides: Sequence[int] = (1, 2)
    skip_below: float | Literal["auto"] = 0.0
    grouped: bool | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or len(set(self.widths)) < len(self.widths):
            raise DataError(f"widths is {list(self.widths)}; give one or more different positive numbers.")
        if not set(self.operations) - {NONE} or len(set(self.operations)) < len(self.operations):
            raise DataError(
                f'operations is {list(self.operations)}; give different names, one or more besides "{NONE}".'
            )
        if not self.strides or self.layers < 1 or self.layers % len(self.strides):
            raise DataError(
                f"layers is {self.layers}; with the alternating strides {tuple(self.strides)} it must be a "
                f"positive multiple of {len(self.strides)}."
            )
        if self.skip_below != "auto" and not 0 <= self.skip_below < 1:
            raise DataError(f'skip_below is {self.skip_below}; it must lie in [0, 1), or be "auto".')
        with seeded(0, "check"):  # the user's random numbers are left as they are
            for name in self.operations:
                self.kit.operation(name, self.widths[0], self.widths[-1], self.strides[0], False)

    @property
    def options(self) -> int:
        """N, the options of one step."""
        return len(self.widths) ** 2 * len(self.operations)

    def stride(self, step: int) -> int:
        """The stride of a step."""
        return self.strides[step % len(self.strides)]

    def supernet(self, mixing: Mixing) -> CuboidSupernet:
        """The network with every operation, freshly drawn."""
        return CuboidSupernet(self, mixing)

    def build(self, chain: Chain) -> nn.Sequential:
        """The network of a chain, to be trained from scratch.

        Raises:
            DataError: if the chain does not have a width and an operation for each step.
        """
        if len(chain.operations) != self.layers or len(chain.widths) != self.layers + 1:
            raise DataError(
                f"the chain has {len(chain.widths)} widths and {len(chain.operations)} operations; "
                f"{self.layers} layers have {self.layers + 1} and {self.layers}."
            )
        return nn.Sequential(
            self.kit.stem(chain.widths[0], True),
            *(
                self.kit.operation(name, *widths, self.stride(k), True)
                for k, (name, widths) in enumerate(zip(chain.operations, pairwise(chain.widths), strict=True))
            ),
            self.kit.end(chain.widths[-1], True),
            self.kit.head(),
        )

    def random(self, generator: torch.Generator) -> Chain:
        """A path of uniform draws."""
        widths = torch.randint(len(self.widths), (self.layers + 1,), generator=generator)
        real = [name for name in self.operations if name != NONE]
        names = torch.randint(len(real), (self.layers,), generator=generator)
        return Chain(tuple(self.widths[i] for i in widths.tolist()), tuple(real[i] for i in names.tolist()))


def read_chain(
    weights: NDArray[np.floating], widths: Sequence[int], operations: Sequence[str], how: Readout = "longest"
) -> Chain:
    """A path through the grid.

    Args:
        weights: ``(layers, widths, widths, operations)``.
        widths: of the maps.
        operations: names; "none" is never chosen.
        how: "longest" has the greatest sum of weights; "top_down" takes the greatest weight at each step from
            source to sink, "bottom_up" from sink to source.

    Returns:
        The path; the first of equals.

    Raises:
        DataError: if the shape does not fit or there is no such read-out.
    """
    n = len(widths)
    if weights.ndim != 4 or weights.shape[1:] != (n, n, len(operations)) or len(weights) < 1:
        raise DataError(
            f"weights has shape {weights.shape}; it must be (layers, {n}, {n}, {len(operations)})."
        )
    allowed = np.where([name == NONE for name in operations], -np.inf, weights)
    best_operation, best = allowed.argmax(-1), allowed.max(-1)  # (layers, i, j)
    if how == "longest":
        nodes = _longest(best)
    elif how == "top_down":
        nodes = _greedy(best)
    elif how == "bottom_up":
        nodes = _greedy(best[::-1].swapaxes(1, 2))[::-1]
    else:
        raise DataError(f'how is {how!r}; it must be "longest", "top_down" or "bottom_up".')
    chosen = [int(best_operation[k, i, j]) for k, (i, j) in enumerate(pairwise(nodes))]
    return Chain(tuple(widths[i] for i in nodes), tuple(operations[o] for o in chosen))


def _longest(edges: NDArray[np.floating]) -> list[int]:
    """Nodes of the longest path, by dynamic programming from the sink."""
    to_go = np.zeros(edges.shape[1])
    choices = []
    for step in edges[::-1]:
        total = step + to_go
        choices.append(total.argmax(1))
        to_go = total.max(1)
    nodes = [int(to_go.argmax())]
    for choice in choices[::-1]:
        nodes.append(int(choice[nodes[-1]]))
    return nodes


def _greedy(edges: NDArray[np.floating]) -> list[int]:
    """Nodes of the path that takes the strongest edge at each step, the first from anywhere."""
    nodes = [int(edges[0].max(1).argmax())]
    for step in edges:
        nodes.append(int(step[nodes[-1]].argmax()))
    return nodes


class CuboidSupernet(nn.Module):
    """Every operation between all widths.

    Args:
        space: what it is made of.
        mixing: from alphas to weights.

    Attributes:
        alphas: "steps", ``(layers, widths^2 operations)``, width in first and operation last.
    """

    def __init__(self, space: HyperCuboid, mixing: Mixing) -> None:
        super().__init__()
        self.space = space
        self.mixing = mixing
        self.alphas = nn.ParameterDict({"steps": 1e-3 * torch.randn(space.layers, space.options)})
        self.stems = nn.ModuleList(space.kit.stem(width, False) for width in space.widths)
        self.steps = nn.ModuleList(self._step(space.stride(k)) for k in range(space.layers))
        self.ends = nn.ModuleList(space.kit.end(width, False) for width in space.widths)
        self.head = space.kit.head()

    def _step(self, stride: int) -> nn.Module:
        space = self.space
        grouped = space.grouped if space.grouped is not None else space.skip_below == 0
        make: Callable[..., nn.Module | None] | None = getattr(space.kit, "grouped_step", None)
        step = make(space.widths, space.operations, stride) if grouped and make is not None else None
        return NestedStep(space.widths, space.operations, space.kit, stride) if step is None else step

    def forward(self, x: Tensor) -> Tensor:
        """The output of the head."""
        alpha, n = self.alphas["steps"], len(self.space.widths)
        weights = self.mixing(alpha).view(len(alpha), n, n, -1)
        least = 1 / self.space.options**2 if self.space.skip_below == "auto" else self.space.skip_below
        maps: list[Tensor] = [stem(x) for stem in self.stems]
        for step, w in zip(self.steps, weights, strict=True):
            if self.space.recompute and self.training:
                maps = checkpoint(step, maps, w, least, use_reentrant=False)
            else:
                maps = step(maps, w, least)
        return self.head(torch.stack([end(m) for end, m in zip(self.ends, maps, strict=True)]).sum(0))

    def architecture(self, how: Readout = "longest") -> Chain:
        """The path that the softmax of the alphas says; see `read_chain`."""
        n = len(self.space.widths)
        weights = self.alphas["steps"].detach().softmax(-1).view(self.space.layers, n, n, -1)
        return read_chain(weights.cpu().numpy(), self.space.widths, self.space.operations, how)
