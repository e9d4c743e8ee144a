"""Which variable hangs on which: mutual information, the Chow-Liu tree, and rooted trees in level order.

The Chow-Liu tree is the spanning tree of largest summed mutual information, the best tree-shaped model of the
data (Chow and Liu 1968). It is rooted at its centre, so that as few levels as possible are worked through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from paperback.errors import ArtefactError

BLOCK_COLUMNS = 2048  # one-hot columns of each side that are multiplied at once


@dataclass(frozen=True)
class RootedTree:
    """A rooted tree over the variables, its nodes numbered level by level; node 0 is the root.

    Attributes:
        variables: variable of each node.
        parents: parent node of each node, smaller than the node itself; -1 for the root.
    """

    variables: tuple[int, ...]
    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.variables)

    @cached_property
    def levels(self) -> tuple[slice, ...]:
        """The nodes of each depth, the root's first."""
        depth = [0] * len(self)
        for node in range(1, len(self)):
            depth[node] = depth[self.parents[node]] + 1
        starts = [i for i in range(len(self)) if i == 0 or depth[i] != depth[i - 1]] + [len(self)]
        return tuple(slice(a, b) for a, b in pairwise(starts))

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Children of each node, that of the largest subtree first."""
        size = [1] * len(self)
        for node in range(len(self) - 1, 0, -1):
            size[self.parents[node]] += size[node]
        found: list[list[int]] = [[] for _ in range(len(self))]
        for node in range(1, len(self)):
            found[self.parents[node]].append(node)
        return tuple(tuple(sorted(group, key=lambda c: (-size[c], c))) for group in found)

    @cached_property
    def coding_order(self) -> tuple[int, ...]:
        """Nodes in the order in which they are coded: largest subtree first, a node after its subtree."""
        order, stack = [], [0]
        while stack:  # children in reverse, node before them; then all of it backwards
            node = stack.pop()
            order.append(node)
            stack.extend(self.children[node])
        return tuple(reversed(order))

    def descendants(self, node: int) -> Iterator[int]:
        """Nodes below a node, each after its parent."""
        waiting = list(self.children[node])
        while waiting:
            below = waiting.pop()
            yield below
            waiting.extend(self.children[below])

    @classmethod
    def from_buffers(cls, variables: Tensor, parents: Tensor) -> RootedTree:
        """The tree that a saved model holds.

        Raises:
            ArtefactError: if the numbers are not a tree in level order.
        """
        names, above = variables.tolist(), parents.tolist()
        proper = sorted(names) == list(range(len(names))) and above[0] == -1
        if not proper or any(not 0 <= p < node for node, p in enumerate(above[1:], 1)):
            raise ArtefactError("the model's tree is damaged; its nodes are not in level order.")
        if any(a > b for a, b in pairwise(above)):
            raise ArtefactError("the model's tree is damaged; its nodes are not in level order.")
        return cls(tuple(names), tuple(above))


def rooted(edges: Sequence[tuple[int, int]], n_variables: int, root: int | None = None) -> RootedTree:
    """Root a tree and number its nodes level by level.

    Args:
        edges: n_variables - 1 pairs of variables that make a tree.
        n_variables: number of variables, >= 1.
        root: the variable at the root; the tree's centre, which gives the fewest levels, if not given.
    """
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    graph = csr_matrix((np.ones(len(edges)), (rows, columns)), shape=(n_variables, n_variables))
    if root is None:
        end = breadth_first_order(graph, 0, directed=False)[0][-1]
        order, above = breadth_first_order(graph, end, directed=False)
        path = [int(order[-1])]
        while path[-1] != end:
            path.append(int(above[path[-1]]))
        root = path[len(path) // 2]
    order, above = breadth_first_order(graph, root, directed=False)
    node_of = {int(variable): node for node, variable in enumerate(order)}
    parents = tuple(-1 if v == root else node_of[int(above[v])] for v in order)
    return RootedTree(tuple(int(v) for v in order), parents)


def chain(n_variables: int) -> RootedTree:
    """The variables one after another, as in a hidden Markov model."""
    return rooted([(i, i + 1) for i in range(n_variables - 1)], n_variables, root=0)


def star(n_variables: int) -> RootedTree:
    """Every variable hangs on the first; with one latent state it is the independent model."""
    return rooted([(0, i) for i in range(1, n_variables)], n_variables, root=0)


def chow_liu(information: Float[Tensor, "variables variables"]) -> RootedTree:
    """The spanning tree of largest summed mutual information, rooted at its centre."""
    # A sparse graph takes 0 for "no edge", so every distance is made positive.
    distance = information.max() - information.double() + 1.0
    tree = minimum_spanning_tree(np.triu(distance.numpy(), 1)).tocoo()
    edges = [(int(a), int(b)) for a, b in zip(tree.row, tree.col, strict=True)]
    return rooted(edges, len(information))


def quantile_bins(
    states: Int[Tensor, "rows variables"], n_states: Sequence[int], n_bins: int
) -> Int[Tensor, "rows variables"]:
    """States cut to at most n_bins neighbouring groups, equally wide."""
    width = torch.tensor([max(1, -(-k // n_bins)) for k in n_states], device=states.device)
    return states // width


def mutual_information(
    states: Int[Tensor, "rows variables"], n_bins: int
) -> Float[Tensor, "variables variables"]:
    """Mutual information of every pair of variables, in nats, from counts.

    Memory stays bounded: blocks of one-hot columns are multiplied, above the diagonal only.

    Args:
        states: values in 0..n_bins - 1.
        n_bins: number of values.

    Returns:
        Symmetric; the entropies stand on the diagonal.
    """
    rows, n = states.shape
    step = max(1, BLOCK_COLUMNS // n_bins)
    hot = [torch.nn.functional.one_hot(part, n_bins).flatten(1).float() for part in states.split(step, dim=1)]
    marginal = torch.cat([block.sum(0) for block in hot]).view(n, n_bins) / rows
    entropy = torch.special.entr(marginal).sum(1)
    result = torch.empty(n, n)
    for i, left in enumerate(hot):
        for j, right in enumerate(hot[i:], i):
            joint = (left.T @ right / rows).view(left.shape[1] // n_bins, n_bins, -1, n_bins)
            joint_entropy = torch.special.entr(joint).sum((1, 3))
            a, b = slice(i * step, i * step + len(joint_entropy)), j * step
            c = slice(b, b + joint_entropy.shape[1])
            block = entropy[a, None] + entropy[c] - joint_entropy
            result[a, c], result[c, a] = block, block.T
    return result
