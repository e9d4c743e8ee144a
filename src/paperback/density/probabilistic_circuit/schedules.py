"""Three ways to get each variable's exact conditional given those coded before it.

A schedule is a generator: it yields a node and the weights of (component, latent) of that node given what is
known, ``(batch, components * latents)``, and is sent the variable's value. All visit the nodes in the tree's
coding order and give the same weights; they differ in how many messages they send over the D - 1 edges:

    naive            D (D - 1): the whole circuit again for every variable
    small_to_large   the paper's: only the path from the highest node with something known below it
    dfs              2 (D - 1): each edge once down and once up, with the two messages kept

Probabilities are float64, rescaled at every message. Encoder and decoder run the same operations on arrays of
the same shape, so they see the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Literal

import torch
from torch import Tensor

from paperback.density.probabilistic_circuit import tree as inference
from paperback.density.probabilistic_circuit.structure import RootedTree
from paperback.density.probabilistic_circuit.tree import Parameters

ScheduleName = Literal["dfs", "small_to_large", "naive"]
Steps = Generator[tuple[int, Tensor], Tensor, None]


class CodingCircuit:
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

    def pmf(self, node: int, weight: Tensor) -> Tensor:
        """The variable's distribution ``(batch, states)``; uniform where the weights left no state."""
        pmf = weight @ self.emission[node].transpose(1, 2).flatten(0, 1)
        total = pmf.sum(-1, keepdim=True)
        return torch.where(total > 0, pmf / total, 1.0 / pmf.shape[-1])


def rescaled(weight: Tensor) -> Tensor:
    """Largest entry of each row of the batch 1, over components and latents; rows of zeros stay."""
    top = weight.amax((0, 2), keepdim=True)
    return weight / torch.where(top > 0, top, 1.0)


def _flat(weight: Tensor) -> Tensor:
    return weight.permute(1, 0, 2).flatten(1)


def dfs(circuit: CodingCircuit, batch: int) -> Steps:
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


def small_to_large(circuit: CodingCircuit, batch: int) -> Steps:
    """The paper's schedule: prior weights from the root once, then for each variable only the part of its
    path that something known hangs on is evaluated again.
    """
    tree = circuit.tree
    prior = [circuit.root[:, None, :]]
    for node in range(1, len(tree)):
        prior.append(rescaled(prior[tree.parents[node]] @ circuit.transition[node]))
    known: dict[int, Tensor] = {}
    for node in tree.coding_order:
        path = [node]
        while path[-1]:
            path.append(tree.parents[path[-1]])
        top = max((i for i, above in enumerate(path) if above in known), default=0)
        weight = prior[path[top]].expand(-1, batch, -1)
        for i in range(top, -1, -1):
            if i < top:
                weight = circuit.down(weight, path[i])
            if path[i] in known:
                weight = weight * known[path[i]]
        x = yield node, _flat(rescaled(weight))
        likelihood = circuit.emit(node, x) * known.pop(node, 1.0)
        if node:
            parent = tree.parents[node]
            known[parent] = rescaled(known.get(parent, 1.0) * circuit.up(likelihood, node))


def naive(circuit: CodingCircuit, batch: int) -> Steps:
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


SCHEDULES: dict[ScheduleName, Callable[[CodingCircuit, int], Steps]] = {
    "dfs": dfs,
    "small_to_large": small_to_large,
    "naive": naive,
}
