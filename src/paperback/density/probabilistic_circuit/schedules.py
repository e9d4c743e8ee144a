"""Three ways to get each variable's exact conditional given those coded before it, on a latent tree.

A schedule is a generator: it yields a node and the weights of (component, latent) of that node given what is
known, ``(batch, components * latents)``, and is sent the variable's value. All visit the nodes in the tree's
coding order and give the same weights; they differ in how many messages they send over the D - 1 edges:

    naive            D (D - 1): the whole circuit again for every variable
    small_to_large   the paper's: at most 2 (D - 1) + D log2 D, see below
    dfs              2 (D - 1): each edge once down and once up, with the two messages kept

The paper's schedule keeps top-down probabilities inside the larger child of a product, where nothing of the
smaller one is known, and evaluates again in the smaller one only: D log2 D visits in all, the sum of the
smaller sides. The paper does so for each variable along its whole path, which needs a balanced circuit, and
therefore rebalances deep ones first. A rebalanced latent tree has parts that two latents border on: M^2 units
where there were M, and M^3 products for M^2. That is not needed. When the top-down probabilities of the
smaller side are made again once, on entering it, the same D log2 D holds for a tree of any depth.

Probabilities are float64, rescaled at every message. Encoder and decoder run the same operations on arrays of
the same shape, so they see the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Literal, Protocol

import torch
from torch import Tensor

from paperback.density.probabilistic_circuit import tree as inference
from paperback.density.probabilistic_circuit.structure import RootedTree
from paperback.density.probabilistic_circuit.tree import Parameters

ScheduleName = Literal["dfs", "small_to_large", "naive"]
Steps = Generator[tuple[int, Tensor], Tensor, None]


class CodingCircuit(Protocol):
    """A circuit that gives the conditionals of its variables one after another.

    Attributes:
        messages: how many messages were computed so far; what counts as one is up to the circuit.
        width: how many numbers are kept for each row that is coded.
    """

    messages: int
    width: int

    def steps(self, schedule: ScheduleName, batch: int) -> Steps:
        """Places in coding order with their weights; to be sent the value of each place's variable."""

    def variable(self, place: int) -> int:
        """The variable that is coded at a place."""

    def pmf(self, place: int, weight: Tensor) -> Tensor:
        """Distribution ``(batch, states)`` of that variable, float64, from the weights of the step."""


class TreeCoding:
    """A tree with its probabilities in float64 on the CPU, and a count of the messages that were sent.

    Args:
        tree: the shape.
        p: its log-probabilities.
    """

    def __init__(self, tree: RootedTree, p: Parameters) -> None:
        self.tree = tree
        root, transition, emission = (value.cpu().double() for value in vars(p).values())
        # float32 parameters sum to one only up to 1e-7.
        self.log = Parameters(
            root.flatten().log_softmax(0).view_as(root), transition.log_softmax(-1), emission.log_softmax(2)
        )
        self.root = self.log.root.exp()
        self.transition = self.log.transition.exp()
        self.emission = self.log.emission.exp()
        self.messages = 0
        self.width = len(tree) * root.numel()

    def steps(self, schedule: ScheduleName, batch: int) -> Steps:
        """Nodes in coding order with the weights of their latents."""
        return SCHEDULES[schedule](self, batch)

    def variable(self, place: int) -> int:
        """The variable of a node."""
        return self.tree.variables[place]

    def down(self, weight: Tensor, child: int) -> Tensor:
        """From weights of the parent's latent to the child's, ``(components, batch, latents)``."""
        self.messages += 1
        return rescaled(weight @ self.transition[child])

    def up(self, likelihood: Tensor, child: int) -> Tensor:
        """From the likelihood of the child's latent to the parent's."""
        self.messages += 1
        return rescaled(likelihood @ self.transition[child].transpose(-1, -2))

    def emit(self, node: int, x: Tensor) -> Tensor:
        """p(x | z) of a node's variable, ``(components, batch, latents)``."""
        return self.emission[node][:, x]

    def pmf(self, place: int, weight: Tensor) -> Tensor:
        """The variable's distribution ``(batch, states)``."""
        return normalised(weight @ self.emission[place].transpose(1, 2).flatten(0, 1))


def normalised(pmf: Tensor) -> Tensor:
    """Rows that sum to one; uniform where there is nothing but zeros: what is impossible can be coded too."""
    total = pmf.sum(-1, keepdim=True)
    return torch.where(total > 0, pmf / total, 1.0 / pmf.shape[-1])


def rescaled(weight: Tensor) -> Tensor:
    """Largest entry of each row of the batch 1, over components and latents; rows of zeros stay."""
    top = weight.amax((0, 2), keepdim=True)
    return weight / torch.where(top > 0, top, 1.0)


def _flat(weight: Tensor) -> Tensor:
    return weight.permute(1, 0, 2).flatten(1)


def dfs(circuit: TreeCoding, batch: int) -> Steps:
    """Depth first with two messages kept, by a stack of its own: trees can be deep."""
    tree = circuit.tree
    start = circuit.root[:, None, :].expand(-1, batch, -1)
    known: dict[int, Tensor] = {0: torch.ones_like(start)}
    down: dict[int, Tensor] = {0: start}
    stack = [(0, iter(tree.children[0]))]
    while stack:
        node, children = stack[-1]
        child = next(children, None)
        if child is not None:
            down[child] = circuit.down(down[node] * known[node], child)
            known[child] = torch.ones_like(start)
            stack.append((child, iter(tree.children[child])))
            continue
        stack.pop()
        x = yield node, _flat(rescaled(down.pop(node) * known[node]))
        likelihood = known.pop(node) * circuit.emit(node, x)
        if stack:
            parent = stack[-1][0]
            known[parent] = rescaled(known[parent] * circuit.up(likelihood, node))


def small_to_large(circuit: TreeCoding, batch: int) -> Steps:
    """The paper's schedule: top-down probabilities hold inside the largest child, where nothing else is known
    yet; on entering a smaller child, those of its whole subtree are made again from what is known by then.

    A node is entered so only once for each ancestor whose largest child it does not lie below, and there are
    at most log2 D of those: D log2 D messages for a tree of any depth.
    """
    tree = circuit.tree
    start = circuit.root[:, None, :]
    weights: dict[int, Tensor] = {0: start}
    for node in range(1, len(tree)):  # with nothing known all rows are equal: a batch of one
        weights[node] = circuit.down(weights[tree.parents[node]], node)
    known: dict[int, Tensor] = {}
    entered: set[int] = set()
    stack = [(0, iter(tree.children[0]))]
    while stack:
        node, children = stack[-1]
        child = next(children, None)
        if child is not None:
            if node in entered:  # a sibling is known already
                weights[child] = circuit.down(weights[node] * known[node], child)
                for below in tree.descendants(child):
                    weights[below] = circuit.down(weights[tree.parents[below]], below)
            entered.add(node)
            stack.append((child, iter(tree.children[child])))
            continue
        stack.pop()
        weight = (weights.pop(node) * known.get(node, 1.0)).expand(-1, batch, -1)
        x = yield node, _flat(rescaled(weight))
        likelihood = circuit.emit(node, x) * known.pop(node, 1.0)
        if stack:
            parent = stack[-1][0]
            known[parent] = rescaled(known.get(parent, 1.0) * circuit.up(likelihood, node))


def naive(circuit: TreeCoding, batch: int) -> Steps:
    """For each variable a pass over the whole circuit with what is known so far."""
    tree = circuit.tree
    states = torch.zeros(batch, len(tree), dtype=torch.int64)
    observed = torch.zeros(batch, len(tree), dtype=torch.bool)
    for node in tree.coding_order:
        circuit.messages += len(tree) - 1
        up = inference.upward(tree, circuit.log, states, observed)
        path = [node]
        while path[-1]:
            path.append(tree.parents[path[-1]])
        weight = up.component
        for child in reversed(path[:-1]):
            ratio = weight / up.message[child].clamp(min=torch.finfo(weight.dtype).tiny)
            weight = (ratio @ circuit.transition[child]) * up.likelihood[child]
        x = yield node, _flat(rescaled(weight))
        states[:, tree.variables[node]] = x
        observed[:, tree.variables[node]] = True


SCHEDULES: dict[ScheduleName, Callable[[TreeCoding, int], Steps]] = {
    "dfs": dfs,
    "small_to_large": small_to_large,
    "naive": naive,
}
