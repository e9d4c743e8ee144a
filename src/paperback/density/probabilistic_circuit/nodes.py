"""Circuits made by hand: input, sum and product nodes, checked and compiled into batched levels.

    root = Sum([Product([Input(0), Input(1)]), Product([Input(0), Input(1)])], [0.3, 0.7])
    model = NodeCircuit.from_nodes(root, n_states=[2, 3])

A product's children must be over different variables (decomposable), a sum's over the same (smooth); then
every marginal is exact. EM and conditionals use the circuit's flows, d log p / d log of a parameter or input,
by automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from paperback.density.interface import Capabilities
from paperback.density.probabilistic_circuit.circuit import Circuit
from paperback.density.probabilistic_circuit.transforms import Transform, transformed
from paperback.errors import DataError
from paperback.numerics.spins import sample_categorical


@dataclass(frozen=True, eq=False)
class Input:
    """A categorical distribution of one variable; random, to be fitted, if no probabilities are given."""

    variable: int
    probabilities: Sequence[float] | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """The product of nodes over different variables."""

    children: Sequence[Node]


@dataclass(frozen=True, eq=False)
class Sum:
    """A mixture of nodes over the same variables; weights are random, to be fitted, if not given."""

    children: Sequence[Node]
    weights: Sequence[float] | None = None


Node = Input | Product | Sum


class NodeCircuit(Circuit):
    """A circuit of any smooth and decomposable form; `from_nodes` makes one.

    Args:
        n_states: number of states of each variable.
        nodes: a list for each node, children first, the root last: ``["input", variable]``,
            ``["product", *children]`` or ``["sum", *children]``, children by their place in the list.
        seed: of the random parameters.

    Raises:
        DataError: naming the node that is not smooth, not decomposable, or refers to what is not there.
    """

    capabilities = Capabilities("exact", "exact", "exact", "exact", "exact", "none")
    log_input: Tensor
    log_weight: Tensor
    owner: Tensor

    def __init__(self, n_states: Sequence[int], nodes: Sequence[Sequence[Any]], seed: int = 0) -> None:
        super().__init__(len(n_states), n_states)
        self.nodes = [(str(node[0]), tuple(int(i) for i in node[1:])) for node in nodes]
        _check_scopes(self.nodes, self.n_variables)
        self.inputs = [node for node, (kind, _) in enumerate(self.nodes) if kind == "input"]
        self.input_variables = [self.nodes[node][1][0] for node in self.inputs]
        self.levels = _levels(self.nodes)
        self.sums = [node for node, (kind, _) in enumerate(self.nodes) if kind == "sum"]
        edges = [i for i, node in enumerate(self.sums) for _ in self.nodes[node][1]]
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("owner", torch.tensor(edges, dtype=torch.int64), persistent=False)
        valid = self.valid[self.input_variables]
        logits = 0.5 * torch.randn(len(self.inputs), self.max_states, generator=generator)
        self.register_buffer("log_input", logits.masked_fill(~valid, -torch.inf).log_softmax(1))
        weights = torch.rand(len(edges), generator=generator) + 0.1
        self.register_buffer("log_weight", self._normalised(weights).log())

    @classmethod
    def from_nodes(cls, root: Node, n_states: Sequence[int], seed: int = 0) -> NodeCircuit:
        """Compile a circuit from its root; a node that is used twice is kept once.

        Args:
            root: the node over all variables.
            n_states: number of states of each variable.
            seed: of parameters that are not given.

        Raises:
            DataError: if the circuit is not smooth or decomposable, or parameters do not fit.
        """
        order = _children_first(root)
        place = {id(node): i for i, node in enumerate(order)}
        spec: list[list[Any]] = []
        for node in order:
            if isinstance(node, Input):
                spec.append(["input", node.variable])
            else:
                kind = "sum" if isinstance(node, Sum) else "product"
                spec.append([kind, *(place[id(child)] for child in node.children)])
        model = cls(list(n_states), spec, seed)
        edge, row = 0, 0
        for index, node in enumerate(order):
            if isinstance(node, Sum):
                if node.weights is not None:
                    given = _distribution(node.weights, len(node.children), f"the sum node {index}")
                    model.log_weight[edge : edge + len(given)] = given.log()
                edge += len(node.children)
            elif isinstance(node, Input):
                if node.probabilities is not None:
                    k = model.n_states[node.variable]
                    given = _distribution(node.probabilities, k, f"the input node {index}")
                    model.log_input[row, :k] = given.log()
                row += 1
        return model

    def _normalised(self, weight: Tensor) -> Tensor:
        """Edge weights that sum to one at each sum node."""
        total = torch.zeros(len(self.sums), dtype=weight.dtype, device=weight.device)
        return weight / total.index_add(0, self.owner, weight)[self.owner]

    def _evaluate(self, input_values: Tensor, log_weight: Tensor, best: bool = False) -> Tensor:
        """log of the root, from those of the inputs ``(batch, inputs)``; sums are maxima if `best`."""
        values: list[Tensor | None] = [None] * len(self.nodes)
        for node, value in zip(self.inputs, input_values.unbind(1), strict=True):
            values[node] = value
        start, first = {}, 0
        for node in self.sums:
            start[node] = first
            first += len(self.nodes[node][1])
        for kind, width, members in self.levels:
            children = [values[child] for node in members for child in self.nodes[node][1]]
            stacked = torch.stack(children, 1).unflatten(1, (len(members), width))  # type: ignore[arg-type]
            if kind == "sum":
                edges = torch.tensor([[start[n] + j for j in range(width)] for n in members])
                stacked = stacked + log_weight[edges.to(log_weight.device)]
                result = stacked.max(2).values if best else torch.logsumexp(stacked, 2)
            else:
                result = stacked.sum(2)
            for node, value in zip(members, result.unbind(1), strict=True):
                values[node] = value
        root = values[-1]
        assert root is not None
        return root

    def _input_values(self, states: Tensor, observed: Tensor | None, log_input: Tensor) -> Tensor:
        rows = torch.arange(len(self.inputs), device=states.device)
        value = log_input[rows, states[:, self.input_variables]]
        return value if observed is None else value.masked_fill(~observed[:, self.input_variables], 0.0)

    @torch.no_grad()
    def _log_prob(self, states: Tensor, observed: Tensor | None) -> Tensor:
        return self._evaluate(self._input_values(states, observed, self.log_input), self.log_weight)

    def _conditional(self, states: Tensor, observed: Tensor) -> Tensor:
        value = self._input_values(states, observed, self.log_input).detach().requires_grad_()
        with torch.enable_grad():
            log_prob = self._evaluate(value, self.log_weight).sum()
        (flow,) = torch.autograd.grad(log_prob, value)
        share = torch.zeros(len(states), self.n_variables, self.max_states).to(flow)
        index = torch.tensor(self.input_variables, device=flow.device)
        share.index_add_(1, index, flow[..., None] * self.log_input.exp())
        return share / share.sum(-1, keepdim=True)

    def _most_probable(self, states: Tensor, observed: Tensor) -> Tensor:
        best, state = self.log_input.max(1)
        value = self._input_values(states, None, self.log_input)
        value = torch.where(observed[:, self.input_variables], value, best).detach().requires_grad_()
        with torch.enable_grad():
            score = self._evaluate(value, self.log_weight, best=True).sum()
        (chosen,) = torch.autograd.grad(score, value)  # 1 at the one input of each variable that was taken
        index = torch.tensor(self.input_variables, device=states.device)
        return torch.zeros_like(states).index_add_(1, index, chosen.round().long() * state)

    def _sample_conditional(self, states: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        states, known = states.clone(), observed.clone()
        for variable in range(self.n_variables):  # each given all before it: exact
            pmf = self._conditional(states, known)[:, variable]
            draw = sample_categorical(pmf, generator)
            states[:, variable] = torch.where(known[:, variable], states[:, variable], draw)
            known[:, variable] = True
        return states

    def flows(self, states: Int[Tensor, "batch variables"]) -> tuple[Tensor, Tensor]:
        """Expected counts of input states ``(inputs, states)`` and of sum edges, summed over the rows."""
        log_input = self.log_input.detach().clone().requires_grad_()
        log_weight = self.log_weight.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = self._evaluate(self._input_values(states, None, log_input), log_weight).sum()
        of_input, of_weight = torch.autograd.grad(total, (log_input, log_weight), allow_unused=True)
        return of_input, torch.zeros_like(log_weight) if of_weight is None else of_weight

    def fit(
        self,
        X: Int[Tensor, " batch *event"],
        y: Int[Tensor, " batch"] | None = None,
        X_val: Int[Tensor, " batch_val *event"] | None = None,
        y_val: Int[Tensor, " batch_val"] | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
        epochs: int = 50,
        pseudocount: float = 0.1,
        transform: Transform | None = None,
        **training: Any,
    ) -> Self:
        """Full-batch EM from the parameters as they are.

        Args:
            X: states ``(batch, *event)``.
            y: ignored.
            X_val: ignored.
            y_val: ignored.
            seed: ignored; nothing is drawn.
            progress: ignored.
            epochs: EM steps, >= 1.
            pseudocount: spread over the outcomes of each distribution, >= 0.
            transform: a bijection; the model is one of what it makes of X. Hand it to `PCCompressor` too.
            **training: there is no other setting.

        Returns:
            The model itself.

        Raises:
            DataError: if X cannot be used or a setting is unknown or out of range.
        """
        if training:
            raise DataError(f"NodeCircuit.fit has no setting {next(iter(training))!r}; leave it out.")
        if epochs < 1 or pseudocount < 0:
            raise DataError(f"epochs is {epochs} and pseudocount {pseudocount}; give >= 1 and >= 0.")
        states, _ = self.check_training(transformed(X, transform))
        valid = self.valid[self.input_variables]
        width = torch.bincount(self.owner, minlength=len(self.sums))[self.owner]
        for _ in range(epochs):
            of_input, of_weight = self.flows(states)
            new = (of_input + pseudocount / valid.sum(1, keepdim=True)) * valid
            total = new.sum(1, keepdim=True)
            self.log_input.copy_(torch.where(total > 0, new / total, self.log_input.exp()).log())
            weight = self._normalised(of_weight + pseudocount / width)
            self.log_weight.copy_(torch.where(weight.isnan(), self.log_weight.exp(), weight).log())
        return self


def rat(
    n_variables: int,
    n_states: int | Sequence[int],
    *,
    repetitions: int = 4,
    n_sums: int = 3,
    seed: int = 0,
) -> NodeCircuit:
    """A random region graph (RAT): the variables split at random in halves, down to single ones.

    Args:
        n_variables: number of variables, >= 2.
        n_states: states of each.
        repetitions: independent ways to split, >= 1.
        n_sums: nodes of each region, >= 1.
        seed: of splits and parameters.
    """
    if n_variables < 2 or repetitions < 1 or n_sums < 1:
        raise DataError("rat needs at least 2 variables, 1 repetition and 1 sum per region.")
    generator = torch.Generator().manual_seed(seed)

    def products(scope: list[int]) -> list[Node]:
        half = len(scope) // 2
        left, right = region(scope[:half]), region(scope[half:])
        return [Product([a, b]) for a in left for b in right]

    def region(scope: list[int]) -> list[Node]:
        if len(scope) == 1:
            return [Input(scope[0]) for _ in range(n_sums)]
        parts = products(scope)
        return [Sum(parts) for _ in range(n_sums)]

    tops: list[Node] = []
    for _ in range(repetitions):
        tops += products(torch.randperm(n_variables, generator=generator).tolist())
    states = [n_states] * n_variables if isinstance(n_states, int) else list(n_states)
    return NodeCircuit.from_nodes(Sum(tops), states, seed)


def _children_first(root: Node) -> list[Node]:
    """All nodes below the root, each once and after its children; a stack, since circuits can be deep."""
    order: list[Node] = []
    state: dict[int, str] = {}
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            state[id(node)] = "done"
        elif id(node) not in state:
            state[id(node)] = "open"
            stack.append((node, True))
            stack.extend((child, False) for child in getattr(node, "children", ()))
        elif state[id(node)] == "open":
            raise DataError("the circuit has a cycle; a node cannot stand below itself.")
    return order


def _check_scopes(nodes: list[tuple[str, tuple[int, ...]]], n_variables: int) -> None:
    scopes: list[frozenset[int]] = []
    for index, (kind, args) in enumerate(nodes):
        if kind == "input":
            if len(args) != 1 or not 0 <= args[0] < n_variables:
                raise DataError(f"the input node {index} is not over one variable in 0..{n_variables - 1}.")
            scopes.append(frozenset(args))
            continue
        if kind not in ("sum", "product") or not args or any(not 0 <= child < index for child in args):
            raise DataError(f"node {index} is not a sum or product of nodes that stand before it.")
        below = [scopes[child] for child in args]
        union = frozenset().union(*below)
        if kind == "sum" and any(scope != union for scope in below):
            raise DataError(f"the sum node {index} is not smooth: its children are over different variables.")
        if kind == "product" and sum(map(len, below)) != len(union):
            raise DataError(f"the product node {index} is not decomposable: its children share a variable.")
        scopes.append(union)
    if not scopes or scopes[-1] != frozenset(range(n_variables)):
        raise DataError(f"the root, the last node, is not over all {n_variables} variables.")


def _levels(nodes: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, int, list[int]]]:
    """Nodes of one height, kind and number of children together: one batched operation each."""
    height: list[int] = []
    groups: dict[tuple[int, str, int], list[int]] = {}
    for index, (kind, args) in enumerate(nodes):
        if kind == "input":
            height.append(0)
        else:
            height.append(1 + max(height[child] for child in args))
            groups.setdefault((height[-1], kind, len(args)), []).append(index)
    return [(kind, width, groups[height, kind, width]) for height, kind, width in sorted(groups)]


def _distribution(values: Sequence[float], size: int, where: str) -> Tensor:
    given = torch.tensor(list(values), dtype=torch.float32)
    if given.shape != (size,) or not bool((given >= 0).all()) or abs(float(given.sum()) - 1) > 1e-4:
        raise DataError(f"{where} needs {size} non-negative numbers that sum to 1.")
    return given / given.sum()
