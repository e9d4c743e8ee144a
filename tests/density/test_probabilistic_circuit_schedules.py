"""The three schedules: equal conditionals at the predicted cost, on trees of any depth and made circuits."""

import math

import pytest
import torch

from paperback.density.probabilistic_circuit import (
    Input,
    NodeCircuit,
    PCCompressor,
    ProbabilisticCircuit,
    Product,
    Sum,
    rat,
)
from paperback.density.probabilistic_circuit.node_schedules import NodeCoding, binary_graph
from paperback.density.probabilistic_circuit.schedules import SCHEDULES, TreeCoding
from paperback.density.probabilistic_circuit.structure import RootedTree, rooted
from paperback.density.probabilistic_circuit.tree import Parameters
from paperback.numerics.enumeration import joint_states

D, K, M = 40, 3, 2


def random_edges(n, reach, seed):
    """Each variable hangs on one of the `reach` before it: 1 gives a chain, n a shallow tree."""
    g = torch.Generator().manual_seed(seed)
    return [(int(torch.randint(max(0, v - reach), v, (1,), generator=g)), v) for v in range(1, n)]


TREES = {
    "chain from its end": rooted(random_edges(D, 1, 0), D, root=0),
    "chain from its middle": rooted(random_edges(D, 1, 0), D),
    "star": rooted([(0, v) for v in range(1, D)], D, root=0),
    "star from a leaf": rooted([(0, v) for v in range(1, D)], D, root=1),
    "caterpillar": rooted([(max(0, v - 2) // 2 * 2, v) for v in range(1, D)], D),
    "balanced": rooted([((v - 1) // 2, v) for v in range(1, D)], D, root=0),
    "two chains on a star": rooted([(0 if v in (1, 15, 30) else v - 1, v) for v in range(1, D)], D, root=0),
    "random, deep": rooted(random_edges(D, 4, 1), D, root=0),
    "random, shallow": rooted(random_edges(D, D, 2), D, root=0),
}


def parameters(components=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def logits(*shape):
        return 2 * torch.randn(*shape, generator=g, dtype=torch.float64)

    root = logits(components * M).log_softmax(0).view(components, M)
    return Parameters(
        root, logits(D, components, M, M).log_softmax(-1), logits(D, components, K, M).log_softmax(2)
    )


def walked(circuit, schedule, X):
    """All conditionals ``(variables, batch, states)`` in coding order, the order, and what they cost."""
    circuit.messages, pmfs, order = 0, [], []
    steps = circuit.steps(schedule, len(X))
    place, weight = next(steps)
    while True:
        pmfs.append(circuit.pmf(place, weight))
        order.append(circuit.variable(place))
        try:
            place, weight = steps.send(X[:, order[-1]])
        except StopIteration:
            return torch.stack(pmfs), order, circuit.messages


def sizes(tree: RootedTree):
    size = [1] * len(tree)
    for node in range(len(tree) - 1, 0, -1):
        size[tree.parents[node]] += size[node]
    return size


@pytest.mark.parametrize("name", list(TREES))
@pytest.mark.parametrize("components", [1, 2])
def test_schedules_agree_at_the_predicted_cost(name, components):
    tree = TREES[name]
    circuit = TreeCoding(tree, parameters(components))
    X = torch.randint(0, K, (5, D), generator=torch.Generator().manual_seed(1))
    found = {schedule: walked(circuit, schedule, X) for schedule in SCHEDULES}
    pmfs, orders, cost = ({s: run[i] for s, run in found.items()} for i in range(3))
    assert sorted(orders["dfs"]) == list(range(D))
    assert orders["dfs"] == orders["small_to_large"] == orders["naive"]
    for schedule in ("dfs", "small_to_large"):
        torch.testing.assert_close(pmfs[schedule], pmfs["naive"], rtol=1e-12, atol=1e-12)
    assert cost["naive"] == D * (D - 1)
    assert cost["dfs"] == 2 * (D - 1)
    size = sizes(tree)
    smaller_sides = sum(sum(sorted(size[c] for c in below)[:-1]) for below in tree.children)
    assert cost["small_to_large"] == 2 * (D - 1) + smaller_sides
    assert smaller_sides <= D * math.log2(D)


def test_a_chain_of_thousands_costs_the_paper_s_schedule_no_more_than_a_shallow_tree():
    n = 3000
    deep = rooted(random_edges(n, 1, 0), n)
    assert len(deep.levels) == n // 2 + 1
    circuit = TreeCoding(
        deep,
        Parameters(torch.zeros(1, 1), torch.zeros(n, 1, 1, 1), torch.full((n, 1, 2, 1), 0.5).log()),
    )
    _, _, cost = walked(circuit, "small_to_large", torch.zeros(1, n, dtype=torch.int64))
    assert cost <= 2 * n + n / 2  # the half that the centre's other half precedes is entered again


def test_the_learned_hidden_markov_model_is_a_chain_and_cheap():
    model = ProbabilisticCircuit(50, 2, "hmm", 3)
    circuit = PCCompressor(model).circuit
    cost = [walked(circuit, s, torch.zeros(2, 50, dtype=torch.int64))[2] for s in SCHEDULES]
    assert cost == [2 * 49, 2 * 49, 50 * 49]


# -- circuits made of nodes ----------------------------------------------------------------------------------


def chain_of_nodes(n):
    """x_v below a latent of two states, which hangs on that of x_(v-1): a deep, structured circuit."""
    upper = [Input(n - 1), Input(n - 1)]
    for v in range(n - 2, -1, -1):
        parts = [Product([Input(v), Sum(upper)]) for _ in range(2)]
        upper = parts
    return NodeCircuit.from_nodes(Sum(upper), [3] * n, seed=3)


MADE = {
    "random region graph": lambda: rat(8, (2, 3, 2, 4, 2, 3, 2, 2), n_sums=2, seed=1),
    "one repetition": lambda: rat(16, 2, repetitions=1, n_sums=2, seed=2),
    "chain": lambda: chain_of_nodes(20),
    "wide product": lambda: NodeCircuit.from_nodes(Product([Input(v) for v in range(33)]), [3] * 33),
    "one input": lambda: NodeCircuit.from_nodes(Input(0), [4]),
    "shared inputs": lambda: shared(),
    "with zeros": lambda: with_zeros(),
}


def shared():
    a, b, c = Input(0), [Input(1), Input(1)], Input(2)
    left = Sum([Product([a, b[0]]), Product([a, b[1]])])
    return NodeCircuit.from_nodes(Sum([Product([left, c]), Product([a, b[0], Input(2)])]), [2, 3, 2], seed=5)


def with_zeros():
    parts = [Product([Input(0, row), Input(1, row)]) for row in ([1.0, 0.0], [0.0, 1.0])]
    return NodeCircuit.from_nodes(Sum(parts, [1.0, 0.0]), [2, 2])


@pytest.mark.parametrize("name", list(MADE))
def test_schedules_agree_on_circuits_made_of_nodes(name):
    model = MADE[name]().double()
    g = torch.Generator().manual_seed(0)
    X = torch.stack([torch.randint(0, k, (7,), generator=g) for k in model.n_states], 1)
    found = {schedule: walked(NodeCoding(model), schedule, X) for schedule in SCHEDULES}
    for schedule in ("dfs", "small_to_large"):
        torch.testing.assert_close(found[schedule][0], found["naive"][0], rtol=1e-12, atol=1e-12)
        assert found[schedule][1] == found["naive"][1]
    assert found["dfs"][2] <= found["small_to_large"][2] <= found["naive"][2]
    pmfs, order, _ = found["dfs"]
    coded = torch.stack([pmfs[t].gather(1, X[:, v, None])[:, 0] for t, v in enumerate(order)])
    possible = coded.prod(0) > 0
    log_prob = coded.log().sum(0)
    if name != "with zeros":  # there what is impossible is coded as if all states were alike
        assert bool(possible.all())
        torch.testing.assert_close(log_prob, model.log_prob(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["random region graph", "chain", "shared inputs"])
def test_conditionals_of_made_circuits_are_those_of_the_model(name):
    model = MADE[name]().double()
    g = torch.Generator().manual_seed(2)
    X = torch.stack([torch.randint(0, k, (5,), generator=g) for k in model.n_states], 1)
    pmfs, order, _ = walked(NodeCoding(model), "dfs", X)
    known = torch.zeros_like(X, dtype=torch.bool)
    for pmf, variable in zip(pmfs, order, strict=True):
        expected = model.conditional(X, known)[:, variable]
        torch.testing.assert_close(pmf, expected, rtol=1e-6, atol=1e-6)  # built in float32
        known[:, variable] = True


def test_where_products_follow_one_tree_every_edge_is_used_once_up_and_once_down():
    for n in (10, 20, 40):
        model = chain_of_nodes(n)
        edges = sum(len(below) for below in binary_graph(model).children)
        cost = {s: walked(NodeCoding(model), s, torch.zeros(1, n, dtype=torch.int64))[2] for s in SCHEDULES}
        assert cost["dfs"] <= 2 * edges
        assert cost["naive"] == n * 2 * edges


def test_the_paths_of_a_region_graph_are_log_many_passes():
    n = 64
    model = rat(n, 2, repetitions=2, n_sums=2)
    edges = sum(len(below) for below in binary_graph(model).children)
    _, _, cost = walked(NodeCoding(model), "small_to_large", torch.zeros(1, n, dtype=torch.int64))
    assert cost <= 2 * edges * (math.log2(n) + 1)
    assert cost < walked(NodeCoding(model), "naive", torch.zeros(1, n, dtype=torch.int64))[2] / 8


def test_probabilities_of_a_made_circuit_sum_to_one_along_the_coding_order():
    model = shared().double()
    X = torch.cat(list(joint_states(model.n_states)))
    pmfs, order, _ = walked(NodeCoding(model), "dfs", X)
    total = sum(
        float(p)
        for p in torch.stack([pmfs[t].gather(1, X[:, v, None])[:, 0] for t, v in enumerate(order)]).prod(0)
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_other_models_cannot_be_coded():
    from paperback.density import IndependentCategorical
    from paperback.errors import DataError

    with pytest.raises(DataError, match="IndependentCategorical"):
        PCCompressor(IndependentCategorical(3, 2))
