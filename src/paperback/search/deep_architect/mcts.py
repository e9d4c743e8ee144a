"""Monte Carlo tree search over the choices of a space (UCT; paper section 5.2, Kocsis & Szepesvari 2006).

Every node of the tree is a prefix of choices. A walk goes down while the node it is at has no child that was
never visited, to the child with the largest

    mean score + c sqrt(2 ln n_parent / n_child),

ties at random. Then it takes an unvisited child, which becomes part of the tree, and makes the rest of its
choices at random. The score is backed up along the tree part only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from paperback.errors import DataError
from paperback.search.deep_architect.searchers import SpaceSearcher
from paperback.search.deep_architect.space import Space, Walk, wander
from paperback.search.parameters import Config


class Node:
    """A prefix of choices.

    Attributes:
        visits: how many trials went through it.
        scored: how many of these had a score; the others count as the worst.
        total: the sum of their scores.
        children: by the index chosen.
    """

    __slots__ = ("children", "scored", "total", "visits")

    def __init__(self) -> None:
        self.visits = 0
        self.scored = 0
        self.total = 0.0
        self.children: dict[int, Node] = {}


class MCTS(SpaceSearcher):
    """Monte Carlo tree search.

    Scores are expected in [0, 1], as the paper has them. If one lies outside, all are rescaled by the least
    and the greatest told until then. A trial that failed or is invalid counts as 0. While trials are pending,
    each counts as one more visit with the worst score (virtual loss), so that asking several times at once
    does not give the same leaf.

    Args:
        space: what is searched.
        c: weight of exploration, >= 0; 0.5 in the paper's experiments.
        bisect: restructure the tree so that each k-way choice is made in ceil(log2 k) binary ones.
        seed: of the draws.

    Raises:
        DataError: if c is negative.
    """

    def __init__(self, space: Space, c: float = 0.5, *, bisect: bool = False, seed: int = 0) -> None:
        super().__init__(space, seed)
        if not (c >= 0 and math.isfinite(c)):
            raise DataError(f"c is {c}; it is a finite number, at least 0.")
        self.c = c
        self.bisect = bisect
        self.root = Node()
        self.low, self.high = 0.0, 1.0
        self._least, self._greatest = math.inf, -math.inf

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"c": self.c, "bisect": self.bisect}

    def _propose(self, rng: np.random.Generator) -> tuple[Config, None]:
        borrowed = [self._visit(config, None) for config in self._pending.values()]
        walk, node = self.space.walk(bisect=self.bisect), self.root
        while walk.open is not None:
            index = self.choose(node, len(walk.open.values), rng)
            walk.choose(index)
            if index not in node.children:
                break  # the node to expand: what follows is the rollout
            node = node.children[index]
        for path in reversed(borrowed):
            _leave(path)
        return self._rollout(walk, rng), None

    def choose(self, node: Node, width: int, rng: np.random.Generator) -> int:
        """The child to go to: one that was never visited, or the one with the largest upper bound."""
        fresh = [index for index in range(width) if index not in node.children]
        if fresh:
            return fresh[int(rng.random() * len(fresh))]
        log_visits = 2 * math.log(node.visits)
        bounds = [
            self._mean(child) + self.c * math.sqrt(log_visits / child.visits)
            for child in (node.children[index] for index in range(width))
        ]
        best = max(bounds)
        ties = [index for index, bound in enumerate(bounds) if bound == best]
        return ties[int(rng.random() * len(ties))]

    def _rollout(self, walk: Walk, rng: np.random.Generator) -> Config:
        return wander(walk, rng).config

    def _mean(self, node: Node) -> float:
        """Mean score in [0, 1]; visits without a score are 0."""
        return (node.total - node.scored * self.low) / ((self.high - self.low) * node.visits)

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        self._visit(config, score)
        if score is None:
            return
        self._least, self._greatest = min(self._least, score), max(self._greatest, score)
        if self._least < 0 or self._greatest > 1:
            width = self._greatest - self._least
            self.low, self.high = self._least, self._least + (width or 1.0)

    def _visit(self, config: Config, score: float | None) -> list[tuple[Node, int]]:
        """Back up along the tree part of a configuration's path, and expand the tree by one node.

        Returns:
            The path: nodes, each with the index chosen there.
        """
        walk, node, path = self.space.walk(bisect=self.bisect), self.root, []
        while True:
            node.visits += 1
            if score is not None:
                node.scored += 1
                node.total += score
            if walk.open is None:
                path.append((node, -1))
                return path
            index = walk.toward(config)
            path.append((node, index))
            if node.visits > 1 or node is self.root:
                walk.choose(index)
                node = node.children.setdefault(index, Node())
            else:
                return path


def _leave(path: list[tuple[Node, int]]) -> None:
    """Undo a visit without a score."""
    for node, index in path:
        node.visits -= 1
        child = node.children.get(index)
        if child is not None and child.visits == 1:
            del node.children[index]  # only this visit made it
