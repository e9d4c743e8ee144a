"""Exact conditionals of the variables of a circuit made of nodes, one after another.

The derivative of the root with respect to an input unit is the probability of all that is known elsewhere
together with that unit. So, with S the input units n over X_t and p_n their distributions,

    p(x_1 .. x_(t-1), X_t = k) = sum_(n in S) (d root / d n)(x_1 .. x_(t-1)) p_n(k).

A unit's value changes only when a variable of its scope becomes known, its derivative only when one outside
of its scope does. The schedules differ in what they evaluate before each variable:

    naive            every value and every derivative
    small_to_large   the values that changed, and the derivatives along the paths to the variable's inputs;
                     O(log D |p|) where the circuit is O(log D) deep, as random region graphs are
    dfs              the values and derivatives on those paths that changed. Where all products follow one
                     tree of variables, every unit is evaluated once up and once down: O(|p|)

All is in logs and float64. What is to be evaluated depends on the circuit alone, not on the data; it is
planned once, with units of one height and width together in one operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor

from paperback.density.probabilistic_circuit.nodes import NodeCircuit
from paperback.density.probabilistic_circuit.schedules import ScheduleName, Steps, normalised
from paperback.density.probabilistic_circuit.tree import LOWEST


@dataclass(frozen=True)
class Graph:
    """A circuit whose products have two children, units numbered children first, all below the root.

    Attributes:
        children: of each unit, none for an input.
        first_edge: of each unit that is a sum, the place of its first weight; -1 for the others.
        inputs: unit of each row of the input distributions that is in use.
        variables: variable of each such unit.
        rows: its row.
        scopes: variables below each unit, as the bits of a number.
    """

    children: tuple[tuple[int, ...], ...]
    first_edge: tuple[int, ...]
    inputs: tuple[int, ...]
    variables: tuple[int, ...]
    rows: tuple[int, ...]
    scopes: tuple[int, ...]

    @cached_property
    def heights(self) -> list[int]:
        """Longest way down to an input."""
        height: list[int] = []
        for below in self.children:
            height.append(1 + max((height[child] for child in below), default=-1))
        return height

    @cached_property
    def parents(self) -> list[list[tuple[int, int]]]:
        """Of each unit: the parent, and its place among the parent's children."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.children]
        for unit, below in enumerate(self.children):
            for place, child in enumerate(below):
                found[child].append((unit, place))
        return found

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Variables depth first along the first child of every sum, a product's largest side first."""
        found: dict[int, None] = {}
        variable_of = dict(zip(self.inputs, self.variables, strict=True))
        stack = [len(self.children) - 1]
        while stack:
            unit = stack.pop()
            below = self.children[unit]
            if not below:
                found[variable_of[unit]] = None
            elif self.first_edge[unit] >= 0:
                stack.append(below[0])  # all children of a sum are over the same variables
            else:
                stack.extend(sorted(below, key=lambda child: self.scopes[child].bit_count()))
        return tuple(found)


def binary_graph(circuit: NodeCircuit) -> Graph:
    """The circuit with wide products split in halves, and without what the root never uses."""
    used, stack = {len(circuit.nodes) - 1}, [len(circuit.nodes) - 1]
    while stack:
        kind, args = circuit.nodes[stack.pop()]
        new = [] if kind == "input" else [child for child in args if child not in used]
        used.update(new)
        stack.extend(new)
    children: list[tuple[int, ...]] = []
    first_edge: list[int] = []
    scopes: list[int] = []
    inputs: list[tuple[int, int, int]] = []
    place: dict[int, int] = {}
    edge = row = 0

    def add(below: tuple[int, ...], first: int, scope: int) -> int:
        children.append(below)
        first_edge.append(first)
        scopes.append(scope)
        return len(children) - 1

    def product(units: list[int]) -> int:
        if len(units) == 1:
            return units[0]
        half = len(units) // 2
        left, right = product(units[:half]), product(units[half:])
        return add((left, right), -1, scopes[left] | scopes[right])

    for node, (kind, args) in enumerate(circuit.nodes):
        if node in used:
            if kind == "input":
                place[node] = add((), -1, 1 << args[0])
                inputs.append((place[node], args[0], row))
            elif kind == "sum":
                below = tuple(place[child] for child in args)
                place[node] = add(below, edge, scopes[below[0]])
            else:
                place[node] = product([place[child] for child in args])
        row += kind == "input"
        edge += len(args) if kind == "sum" else 0
    units, variables, rows = zip(*inputs, strict=True)
    return Graph(tuple(children), tuple(first_edge), units, variables, rows, tuple(scopes))


@dataclass(frozen=True)
class Values:
    """Units of one height, kind and width, to be evaluated from their children."""

    units: Tensor
    children: Tensor  # (units, width)
    edges: Tensor | None  # of sums, likewise

    def run(self, value: Tensor, log_weight: Tensor) -> int:
        """Write the values; returns the number of edges."""
        below = value[self.children]
        if self.edges is None:
            value[self.units] = below.sum(1)
        else:
            value[self.units] = torch.logsumexp(below + log_weight[self.edges][..., None], 1)
        return self.children.numel()


@dataclass(frozen=True)
class Derivatives:
    """Units of one height and number of parents, whose derivatives come from those of the parents."""

    units: Tensor
    parents: Tensor  # (units, number)
    under_sum: Tensor  # which parents are sums, likewise
    factors: Tensor  # the weight's place where the parent is a sum, else the sibling

    def run(self, value: Tensor, derivative: Tensor, log_weight: Tensor) -> int:
        """Write the derivatives; returns the number of edges."""
        term = derivative[self.parents]
        term[self.under_sum] += log_weight[self.factors[self.under_sum]][:, None]
        term[~self.under_sum] += value[self.factors[~self.under_sum]]
        derivative[self.units] = torch.logsumexp(term, 1)
        return self.parents.numel()


@dataclass(frozen=True)
class Step:
    """What is evaluated before a variable is coded."""

    values: list[Values]
    derivatives: list[Derivatives]


class NodeCoding:
    """A circuit made of nodes, ready to give its conditionals, and a count of the edges that were evaluated.

    Args:
        circuit: the model; its parameters are copied.
    """

    def __init__(self, circuit: NodeCircuit) -> None:
        self.graph = binary_graph(circuit)
        # float32 parameters sum to one only up to 1e-7.
        self.log_input = circuit.log_input.cpu().double().log_softmax(1)
        weight = circuit.log_weight.cpu().double().exp()
        owner = circuit.owner.cpu()
        self.log_weight = (weight / torch.zeros_like(weight).index_add(0, owner, weight)[owner]).log()
        by_variable: list[list[int]] = [[] for _ in range(circuit.n_variables)]
        for index, variable in enumerate(self.graph.variables):
            by_variable[variable].append(index)
        units, rows = torch.tensor(self.graph.inputs), torch.tensor(self.graph.rows)
        self.inputs = [units[chosen] for chosen in by_variable]
        self.rows = [rows[chosen] for chosen in by_variable]
        self.messages = 0
        self.width = 2 * len(self.graph.children)
        self._plans: dict[ScheduleName, list[Step]] = {}

    def variable(self, place: int) -> int:
        """The variable that is coded at a place."""
        return self.graph.order[place]

    def pmf(self, place: int, weight: Tensor) -> Tensor:
        """The variable's distribution ``(batch, states)`` from the weights of its input units."""
        return normalised(weight @ self.log_input[self.rows[self.variable(place)]].exp())

    def steps(self, schedule: ScheduleName, batch: int) -> Steps:
        """Places in coding order with the weights of their input units."""
        if schedule not in self._plans:
            self._plans[schedule] = plan(self.graph, schedule)
        size = (len(self.graph.children), batch)
        value = torch.zeros(size, dtype=torch.float64)  # with nothing known every unit is 1
        derivative = torch.full(size, -torch.inf, dtype=torch.float64)
        derivative[-1] = 0.0
        for place, step in enumerate(self._plans[schedule]):
            for group in step.values:
                self.messages += group.run(value, self.log_weight)
            for part in step.derivatives:
                self.messages += part.run(value, derivative, self.log_weight)
            variable = self.variable(place)
            log_weight = derivative[self.inputs[variable]].T
            x = yield place, (log_weight - log_weight.amax(1, keepdim=True).clamp(min=LOWEST)).exp()
            value[self.inputs[variable]] = self.log_input[self.rows[variable]][:, x]


def plan(graph: Graph, schedule: ScheduleName) -> list[Step]:
    """What a schedule evaluates before each variable, in coding order."""
    assert schedule in get_args(ScheduleName)
    n = len(graph.children)
    inner = [unit for unit in range(n) if graph.children[unit]]
    if schedule == "naive":
        everything = Step(_values(graph, inner), _derivatives(graph, range(n - 1)))
        return [everything] * len(graph.order)
    inputs: dict[int, list[int]] = {}
    for unit, variable in zip(graph.inputs, graph.variables, strict=True):
        inputs.setdefault(variable, []).append(unit)
    seen_below = [0] * n  # of the scope, what was known when the unit's value was computed
    seen_outside = [-1] * n  # all that was known when its derivative was; -1 for never
    known, steps = 0, []
    for variable in graph.order:
        derivatives: set[int] = set()
        siblings: set[int] = set()
        waiting = list(inputs[variable])
        while waiting:
            unit = waiting.pop()
            fresh = seen_outside[unit] >= 0 and not (known & ~seen_outside[unit] & ~graph.scopes[unit])
            if unit == n - 1 or unit in derivatives or (schedule == "dfs" and fresh):
                continue
            derivatives.add(unit)
            seen_outside[unit] = known
            for parent, place in graph.parents[unit]:
                waiting.append(parent)
                if graph.first_edge[parent] < 0:
                    siblings.add(graph.children[parent][1 - place])
        values: set[int] = set()
        waiting = list(siblings)
        while waiting:
            unit = waiting.pop()
            if seen_below[unit] != known & graph.scopes[unit]:
                seen_below[unit] = known & graph.scopes[unit]
                if graph.children[unit]:
                    values.add(unit)
                    waiting.extend(graph.children[unit])
        steps.append(Step(_values(graph, values), _derivatives(graph, derivatives)))
        known |= 1 << variable
    return steps


def _values(graph: Graph, units: Iterable[int]) -> list[Values]:
    groups: dict[tuple[int, bool, int], list[int]] = {}
    for unit in sorted(units):
        key = graph.heights[unit], graph.first_edge[unit] >= 0, len(graph.children[unit])
        groups.setdefault(key, []).append(unit)
    found = []
    for height, is_sum, width in sorted(groups):
        members = groups[height, is_sum, width]
        first = torch.tensor([graph.first_edge[unit] for unit in members])
        edges = first[:, None] + torch.arange(width) if is_sum else None
        found.append(
            Values(torch.tensor(members), torch.tensor([graph.children[unit] for unit in members]), edges)
        )
    return found


def _derivatives(graph: Graph, units: Iterable[int]) -> list[Derivatives]:
    """The highest units first: those that a unit needs stand above it."""
    groups: dict[tuple[int, int], list[int]] = {}
    for unit in sorted(units):
        groups.setdefault((graph.heights[unit], len(graph.parents[unit])), []).append(unit)
    found = []
    for key in sorted(groups, reverse=True):
        members = groups[key]
        above = [graph.parents[unit] for unit in members]
        factors = [
            [
                graph.first_edge[p] + place if graph.first_edge[p] >= 0 else graph.children[p][1 - place]
                for p, place in pairs
            ]
            for pairs in above
        ]
        parents = torch.tensor([[p for p, _ in pairs] for pairs in above])
        under_sum = torch.tensor([[graph.first_edge[p] >= 0 for p, _ in pairs] for pairs in above])
        found.append(Derivatives(torch.tensor(members), parents, under_sum, torch.tensor(factors)))
    return found
