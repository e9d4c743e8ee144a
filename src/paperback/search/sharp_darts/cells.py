"""The cell space of DARTS: a network of cells, and which operations join the nodes of a cell.

A cell has two inputs, the outputs of the two cells before it, and n nodes. Node i sums one operation on each
of its 2 + i predecessors; the output is the nodes side by side. Two kinds of cell are searched: the normal
one, and the reduction cell at one and two thirds of the depth, which halves the size and doubles the width.
In the supernet every edge is a mixture of all primitives. A genotype keeps, for each node, the two edges with
the strongest operation other than "none", and that operation (DARTS, Liu, Simonyan and Yang 2019).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paperback.errors import DataError
from paperback.saving import Saved
from paperback.search.sharp_darts.mixing import Mixing
from paperback.search.sharp_darts.operations import (
    POOLS,
    PRIMITIVES,
    FactorizedReduce,
    make_operation,
    relu_conv_norm,
)
from paperback.training import seeded

Edge = tuple[str, int]  # a primitive, and which node it comes from: 0 and 1 are the inputs of the cell


@dataclass(frozen=True)
class Genotype:
    """The two cells of an architecture; two edges for each node, in the order of the nodes.

    Attributes:
        normal: edges of the cell that keeps the size.
        reduce: edges of the cell that halves it.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]


# The cells that the authors publish under this name; 3.6 million parameters at C = 36 and 20 cells.
SHARPSEPCONV_DARTS_MAX_W = Genotype(
    normal=(
        ("dil_conv_3x3", 0),
        ("dil_conv_5x5", 1),
        ("sep_conv_3x3", 2),
        ("dil_conv_5x5", 1),
        ("avg_pool_3x3", 2),
        ("sep_conv_3x3", 0),
        ("avg_pool_3x3", 4),
        ("max_pool_3x3", 3),
    ),
    reduce=(
        ("max_pool_3x3", 0),
        ("skip_connect", 1),
        ("sep_conv_5x5", 0),
        ("skip_connect", 2),
        ("sep_conv_5x5", 0),
        ("dil_conv_5x5", 3),
        ("sep_conv_5x5", 4),
        ("skip_connect", 3),
    ),
)


@dataclass(frozen=True)
class CellSpace:
    """Networks of cells of two kinds.

    Args:
        primitives: names of `make_operation`.
        cells: of the supernet, >= 3.
        nodes: of a cell, >= 1.
        width: C, channels of a node before the first reduction, even.
        channels: of the images.
        classes: to tell apart.
        recompute: compute a cell of the supernet again in the backward pass, which saves the memory of all
            its operations.

    Raises:
        DataError: if a number is too small, or a primitive is unknown, stands twice, or is only "none".
    """

    primitives: Sequence[str] = PRIMITIVES
    cells: int = 8
    nodes: int = 4
    width: int = 16
    channels: int = 3
    classes: int = 10
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.cells < 3 or min(self.nodes, self.channels, self.classes) < 1:
            raise DataError(
                f"CellSpace has cells={self.cells}, nodes={self.nodes}, channels={self.channels}, "
                f"classes={self.classes}; cells is at least 3, the others at least 1."
            )
        if self.width < 2 or self.width % 2:
            raise DataError(f"width is {self.width}; it must be positive and even.")
        if not set(self.primitives) - {"none"} or len(set(self.primitives)) < len(self.primitives):
            raise DataError(
                f'primitives is {list(self.primitives)}; give different names, one or more besides "none".'
            )
        with seeded(0, "check"):  # the user's random numbers are left as they are
            for name in self.primitives:
                make_operation(name, 2, 2)

    def supernet(self, mixing: Mixing) -> CellSupernet:
        """The network with every operation on every edge, freshly drawn."""
        return CellSupernet(self, mixing)

    def build(
        self,
        genotype: Genotype,
        *,
        cells: int | None = None,
        width: int | None = None,
        drop_path: float = 0.0,
        auxiliary: bool = False,
    ) -> CellNetwork:
        """The network of a genotype, to be trained from scratch.

        Args:
            genotype: its cells; primitives need not be those of the space.
            cells: how many; those of the space if not given.
            width: C; that of the space if not given.
            drop_path: greatest probability that an operation's output is dropped for an image; `retrain` has
                it rise linearly.
            auxiliary: a second classifier after two thirds of the cells; for images of 32 pixels and more.

        Raises:
            DataError: if the genotype cannot be built.
        """
        return CellNetwork(
            genotype.normal,
            genotype.reduce,
            cells=self.cells if cells is None else cells,
            width=self.width if width is None else width,
            channels=self.channels,
            classes=self.classes,
            drop_path=drop_path,
            auxiliary=auxiliary,
        )

    def random(self, generator: torch.Generator) -> Genotype:
        """A genotype of uniform draws: two different predecessors for each node, any operation but "none"."""
        names = [name for name in self.primitives if name != "none"]

        def cell() -> tuple[Edge, ...]:
            edges: list[Edge] = []
            for node in range(self.nodes):
                for source in torch.randperm(2 + node, generator=generator)[:2].tolist():
                    edges.append((names[int(torch.randint(len(names), (), generator=generator))], source))
            return tuple(edges)

        return Genotype(cell(), cell())


def parse_cell(
    weights: Tensor, primitives: Sequence[str], *, skip_primitive: str | None = "none"
) -> tuple[Edge, ...]:
    """The edges that a cell keeps.

    Args:
        weights: ``(edges, primitives)``; the edges of node 0 first, each node's by predecessor.
        primitives: names of the columns.
        skip_primitive: never chosen, nor counted where edges are ranked; None counts all.

    Returns:
        Two edges for each node, the stronger one first.

    Raises:
        DataError: if no primitive is left, or the number of edges is not that of a cell.
    """
    columns = [i for i, name in enumerate(primitives) if name != skip_primitive]
    if not columns:
        raise DataError(
            f"the only primitive is {skip_primitive!r}, which is skipped; give others, "
            "or skip_primitive=None."
        )
    strongest, chosen = weights[:, columns].max(1)
    edges: list[Edge] = []
    start, node = 0, 0
    while start < len(weights):
        stop = start + 2 + node
        if stop > len(weights):
            raise DataError(f"weights has {len(weights)} rows; n nodes have 2 + 3 + ... + (n + 1) edges.")
        best = strongest[start:stop].argsort(descending=True, stable=True)[:2].tolist()
        edges += [(primitives[columns[int(chosen[start + source])]], source) for source in best]
        start, node = stop, node + 1
    return tuple(edges)


class Place(NamedTuple):
    """Where a cell stands in the network."""

    before_last: int  # channels that the two cells before give
    last: int
    width: int  # of its nodes
    reduction: bool
    after_reduction: bool


def places(cells: int, width: int, nodes: int, stem: int) -> Iterator[Place]:
    """The cells of a network one after the other; those at one and two thirds reduce."""
    before_last, last, after_reduction = stem, stem, False
    for cell in range(cells):
        reduction = cell in (cells // 3, 2 * cells // 3)
        width *= 2 if reduction else 1
        yield Place(before_last, last, width, reduction, after_reduction)
        before_last, last, after_reduction = last, nodes * width, reduction


class CellSupernet(nn.Module):
    """Every operation on every edge; the alphas are shared by all cells of a kind.

    Args:
        space: what it is made of.
        mixing: from alphas to weights.

    Attributes:
        alphas: "normal" and "reduce", ``(edges, primitives)``.
    """

    def __init__(self, space: CellSpace, mixing: Mixing) -> None:
        super().__init__()
        self.space = space
        self.mixing = mixing
        edges = sum(2 + node for node in range(space.nodes))
        self.alphas = nn.ParameterDict(
            {kind: 1e-3 * torch.randn(edges, len(space.primitives)) for kind in ("normal", "reduce")}
        )
        stem = 3 * space.width
        self.stem = _stem(space.channels, stem)
        self.cells = nn.ModuleList(
            MixedCell(place, space) for place in places(space.cells, space.width, space.nodes, stem)
        )
        self.classifier = nn.Linear(4 * space.nodes * space.width, space.classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of ``(batch, channels, H, W)``."""
        weights = {kind: self.mixing(alpha) for kind, alpha in self.alphas.items()}
        before_last = last = self.stem(images)
        for cell in self.cells:
            arguments = (before_last, last, weights[str(cell.kind)])
            if self.space.recompute and self.training:
                before_last, last = last, checkpoint(cell, *arguments, use_reentrant=False)
            else:
                before_last, last = last, cell(*arguments)
        return self.classifier(last.mean((2, 3)))

    def architecture(self, skip_primitive: str | None = "none") -> Genotype:
        """The genotype that the alphas say; see `parse_cell`."""
        normal, reduce = (
            parse_cell(self.alphas[kind].detach(), self.space.primitives, skip_primitive=skip_primitive)
            for kind in ("normal", "reduce")
        )
        return Genotype(normal, reduce)


class MixedCell(nn.Module):
    """A cell with all operations on all edges.

    Args:
        place: where it stands.
        space: its nodes and primitives.
    """

    def __init__(self, place: Place, space: CellSpace) -> None:
        super().__init__()
        self.kind = "reduce" if place.reduction else "normal"
        self.nodes = space.nodes
        self.inputs = _inputs(place, affine=False)
        self.edges = nn.ModuleList(
            MixedOperation(space.primitives, place.width, 2 if place.reduction and source < 2 else 1)
            for node in range(space.nodes)
            for source in range(2 + node)
        )

    def forward(self, before_last: Tensor, last: Tensor, weights: Tensor) -> Tensor:
        """The nodes side by side; `weights` is ``(edges, primitives)``."""
        states = [self.inputs[0](before_last), self.inputs[1](last)]
        edge = 0
        for _ in range(self.nodes):
            terms = [self.edges[edge + i](state, weights[edge + i]) for i, state in enumerate(states)]
            edge += len(states)
            states.append(torch.stack(terms).sum(0))
        return torch.cat(states[2:], dim=1)


class MixedOperation(nn.Module):
    """The weighted sum of all primitives on one edge; a pool is followed by a batch norm, as the others are.

    Args:
        primitives: their names.
        width: channels of input and output.
        stride: 1 or 2.
    """

    def __init__(self, primitives: Sequence[str], width: int, stride: int) -> None:
        super().__init__()
        self.operations = nn.ModuleList()
        for name in primitives:
            operation = make_operation(name, width, width, stride, affine=False)
            if name in POOLS:
                operation = nn.Sequential(operation, nn.BatchNorm2d(width, affine=False))
            self.operations.append(operation)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The mixture, with one weight for each primitive."""
        outputs = torch.stack([operation(x) for operation in self.operations])
        return torch.einsum("o,obchw->bchw", weights, outputs)


class CellNetwork(Saved, nn.Module):
    """The network of a genotype.

    Args:
        normal: edges of the cell that keeps the size, two for each node: a primitive, and the node it comes
            from.
        reduce: edges of the cell that halves it.
        cells: how many, >= 3.
        width: C, even.
        channels: of the images.
        classes: to tell apart.
        drop_path: greatest probability, in [0, 1), that an operation's output is dropped.
        auxiliary: whether there is a second classifier after two thirds of the cells.

    Attributes:
        drop_path: the probability now, 0 at first.

    Raises:
        DataError: if an edge comes from a node that is not before its own, or a number is out of range.
    """

    def __init__(
        self,
        normal: Sequence[Edge],
        reduce: Sequence[Edge],
        cells: int = 20,
        width: int = 36,
        channels: int = 3,
        classes: int = 10,
        drop_path: float = 0.0,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        if cells < 3 or width < 2 or width % 2 or not 0 <= drop_path < 1:
            raise DataError(
                f"cells is {cells}, width {width} and drop_path {drop_path}; cells is at least 3, width "
                "positive and even, drop_path in [0, 1)."
            )
        _check_edges(normal, reduce)
        nodes, stem = len(normal) // 2, 3 * width
        self.greatest_drop_path, self.drop_path = drop_path, 0.0
        self.stem = _stem(channels, stem)
        self.cells = nn.ModuleList(
            BuiltCell(place, reduce if place.reduction else normal)
            for place in places(cells, width, nodes, stem)
        )
        self.auxiliary_after = 2 * cells // 3
        self.auxiliary = _auxiliary_head(4 * nodes * width, classes) if auxiliary else None
        self.classifier = nn.Linear(4 * nodes * width, classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``(batch, classes)``; in training with an auxiliary classifier, its logits beside them."""
        before_last = last = self.stem(images)
        beside = None
        for i, cell in enumerate(self.cells):
            before_last, last = last, cell(before_last, last, self.drop_path)
            if i == self.auxiliary_after and self.auxiliary is not None and self.training:
                if min(last.shape[2:]) < 8:
                    raise DataError(
                        f"images of {tuple(images.shape[2:])} pixels are too small for the auxiliary "
                        "classifier; build the network with auxiliary=False."
                    )
                beside = self.auxiliary(last)
        logits = self.classifier(last.mean((2, 3)))
        return logits if beside is None else (logits, beside)


class BuiltCell(nn.Module):
    """A cell with the operations of a genotype.

    Args:
        place: where it stands.
        edges: two for each node.
    """

    def __init__(self, place: Place, edges: Sequence[Edge]) -> None:
        super().__init__()
        self.sources = [source for _, source in edges]
        self.inputs = _inputs(place, affine=True)
        self.operations = nn.ModuleList(
            make_operation(name, place.width, place.width, 2 if place.reduction and source < 2 else 1)
            for name, source in edges
        )

    def forward(self, before_last: Tensor, last: Tensor, drop_path: float = 0.0) -> Tensor:
        """The nodes side by side."""
        states = [self.inputs[0](before_last), self.inputs[1](last)]
        for node in range(len(self.sources) // 2):
            terms = []
            for edge in (2 * node, 2 * node + 1):
                operation = self.operations[edge]
                term = operation(states[self.sources[edge]])
                if self.training and drop_path > 0 and not isinstance(operation, nn.Identity):
                    term = _dropped(term, drop_path)
                terms.append(term)
            states.append(terms[0] + terms[1])
        return torch.cat(states[2:], dim=1)


def _stem(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


def _inputs(place: Place, *, affine: bool) -> nn.ModuleList:
    """Both inputs of a cell brought to its width, and the older one to the size of the newer."""
    if place.after_reduction:
        first: nn.Module = FactorizedReduce(place.before_last, place.width, affine=affine)
    else:
        first = relu_conv_norm(place.before_last, place.width, affine=affine)
    return nn.ModuleList([first, relu_conv_norm(place.last, place.width, affine=affine)])


def _auxiliary_head(channels: int, classes: int) -> nn.Sequential:
    """The second classifier of DARTS for CIFAR, on maps of 8 pixels and more."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3, count_include_pad=False),
        nn.Conv2d(channels, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(768, classes),
    )


def _dropped(x: Tensor, probability: float) -> Tensor:
    """Zero for some images of the batch, and scaled up for the others."""
    kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= probability
    return x * kept / (1 - probability)


def _check_edges(normal: Sequence[Edge], reduce: Sequence[Edge]) -> None:
    if not normal or len(normal) % 2 or len(normal) != len(reduce):
        raise DataError(
            f"the genotype has {len(normal)} normal and {len(reduce)} reducing edges; both cells have two "
            "for each node, and equally many nodes."
        )
    for kind, edges in (("normal", normal), ("reducing", reduce)):
        for edge, (name, source) in enumerate(edges):
            if not 0 <= source < 2 + edge // 2:
                raise DataError(
                    f"edge {edge} ({name}) of the {kind} cell comes from {source}; node {edge // 2} has the "
                    f"predecessors 0..{1 + edge // 2}."
                )
