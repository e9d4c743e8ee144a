"""The circuit: sums to one, marginals, EM, structures, hand-made nodes, bad input."""

import math
from itertools import pairwise

import pytest
import torch

from paperback.density.probabilistic_circuit import (
    Input,
    NodeCircuit,
    ProbabilisticCircuit,
    Product,
    Sum,
    rat,
)
from paperback.density.probabilistic_circuit import tree as inference
from paperback.density.probabilistic_circuit.structure import chow_liu, mutual_information
from paperback.errors import DataError
from paperback.numerics.enumeration import joint_states, log_partition, marginals
from paperback.testing import check_density_model

STATES = (3, 2, 3, 3, 2, 3)
STRUCTURES = ("hclt", "hmm", "chow_liu", "independent")


def data(rows=80, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.stack([torch.randint(0, k, (rows,), generator=g) for k in STATES], 1)
    X[:, 2] = X[:, 0]
    X[:, 4] = (X[:, 3] + X[:, 1]) % 2
    return X


def fitted(structure="hclt", mixture=1, **settings):
    model = ProbabilisticCircuit(6, STATES, structure, 4, mixture).double()
    return model.fit(data(), progress=False, **({"epochs": 4} | settings))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("mixture", [1, 2])
def test_sums_to_one_with_exact_marginals_and_conditionals(structure, mixture):
    model = fitted(structure, mixture)
    assert abs(float(log_partition(model.log_prob, STATES))) < 1e-10
    X = data(64, seed=1)
    mask = torch.tensor([[bool(i >> j & 1) for j in range(6)] for i in range(64)])  # every mask once
    got, conditional = model.log_prob(X, mask), model.conditional(X, mask)
    for i in range(64):
        clamp = torch.where(mask[i], X[i], -1)
        torch.testing.assert_close(got[i], log_partition(model.log_prob, STATES, clamp=clamp))
        torch.testing.assert_close(conditional[i], marginals(model.log_prob, STATES, clamp=clamp))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_keeps_to_the_contract_of_the_task(structure):
    check_density_model(lambda _: ProbabilisticCircuit(6, STATES, structure, 4), data(), fit={"epochs": 3})


@pytest.mark.parametrize("seed", range(10))
def test_full_batch_em_never_lowers_the_likelihood(seed):
    model = ProbabilisticCircuit(6, STATES, n_latents=3, mixture=1 + seed % 2).double()
    X = data(50, seed)
    model.fit(X, progress=False, epochs=1, seed=seed)
    scores = [model.em_step(X, 1.0, 0.0) for _ in range(12)]
    assert all(b >= a - 1e-12 for a, b in pairwise(scores))


def test_flows_equal_automatic_differentiation():
    model = fitted(mixture=2)
    X, p = data(30, 3), model.parameters_in_logs
    by_hand, log_prob = inference.flows(model.tree, p, X)
    leaves = [v.clone().requires_grad_() for v in vars(p).values()]
    total = plain_log_prob(model, leaves, X).sum()
    torch.testing.assert_close(total.detach(), log_prob.sum())
    automatic = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(by_hand.root, automatic[0])
    torch.testing.assert_close(by_hand.transition[1:], automatic[1][1:])
    torch.testing.assert_close(by_hand.emission, automatic[2].nan_to_num())


def plain_log_prob(model, leaves, X):
    """The same sums, one node after another and nothing rescaled."""
    root, transition, emission = leaves
    tree = model.tree
    u = [emission[n][:, X[:, v]] for n, v in enumerate(tree.variables)]
    for n in range(len(tree) - 1, 0, -1):
        message = torch.logsumexp(transition[n][:, None] + u[n][:, :, None, :], -1)
        u[tree.parents[n]] = u[tree.parents[n]] + message
    return torch.logsumexp((root[:, None] + u[0]).permute(1, 0, 2).flatten(1), 1)


def test_one_latent_state_is_the_independent_model():
    one = ProbabilisticCircuit(6, STATES, "hclt", 1).double().fit(data(), progress=False, batch_size=None)
    independent = ProbabilisticCircuit(6, STATES, "independent").double()
    independent.fit(data(), progress=False, batch_size=None)
    torch.testing.assert_close(one.log_prob(data()), independent.log_prob(data()))


def test_the_chow_liu_tree_of_a_known_tree_is_that_tree():
    g = torch.Generator().manual_seed(0)
    edges = {(0, 1), (1, 2), (1, 3), (3, 4)}
    X = torch.randint(0, 3, (4000, 5), generator=g)
    for a, b in sorted(edges):
        X[:, b] = torch.where(torch.rand(4000, generator=g) < 0.8, X[:, a], X[:, b])
    tree = chow_liu(mutual_information(X, 3))
    pairs = zip(tree.variables[1:], tree.parents[1:], strict=True)
    assert {tuple(sorted((v, tree.variables[p]))) for v, p in pairs} == edges
    assert len(tree.levels) == 3  # rooted at its centre


def test_mutual_information_agrees_with_scikit_learn_over_many_blocks():
    from sklearn.metrics import mutual_info_score

    X = data(300)
    X = torch.cat([X] * 200, 1)  # 1,200 variables: two blocks of columns
    information = mutual_information(X, 3)
    for a, b in [(0, 2), (3, 1199), (700, 1003)]:
        assert float(information[a, b]) == pytest.approx(mutual_info_score(X[:, a], X[:, b]), abs=1e-5)


def test_the_chain_agrees_with_a_forward_algorithm():
    model = fitted("hmm")
    p, X = model.parameters_in_logs, data(10, 5)
    for row, expected in zip(X, model.log_prob(X), strict=True):
        alpha = p.root[0].exp() * p.emission[0, 0, row[0]].exp()
        for t in range(1, 6):
            alpha = (alpha @ p.transition[t, 0].exp()) * p.emission[t, 0, row[t]].exp()
        assert float(alpha.sum().log()) == pytest.approx(float(expected), abs=1e-10)


def test_conditional_samples_follow_the_exact_conditional():
    model = fitted(mixture=2)
    n = 20_000
    X, mask = data(1, 2).repeat(n, 1), torch.tensor([True, False, True, False, False, True]).repeat(n, 1)
    draws = model.complete(X, mask, "sample", torch.Generator().manual_seed(1))
    assert torch.equal(draws[mask], X[mask])
    free = torch.cat(list(joint_states(STATES, clamp=torch.where(mask[0], X[0], -1))))
    expected = (model.log_prob(free) - model.log_prob(X[:1], mask[:1])).exp()
    counts = torch.stack([(draws == row).all(1).sum() for row in free])
    chi_square = float(((counts - n * expected) ** 2 / (n * expected)).sum())
    degrees = len(free) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def brute_force_mode(model, X, mask):
    """The best completion of one row, over all completions."""
    free = torch.cat(list(joint_states(model.n_states, clamp=torch.where(mask, X, -1))))
    return free[model.log_prob(free).argmax()]


@pytest.mark.parametrize("structure", ["chow_liu", "independent"])
def test_max_product_is_exact_where_nothing_is_summed_out(structure):
    model = fitted(structure)
    X = data(64, seed=1)
    mask = torch.tensor([[bool(i >> j & 1) for j in range(6)] for i in range(64)])
    got = model.complete(X, mask, "mpe-approx")
    assert torch.equal(got[mask], X[mask])
    for i in range(64):
        torch.testing.assert_close(
            model.log_prob(got[i : i + 1])[0], model.log_prob(brute_force_mode(model, X[i], mask[i])[None])[0]
        )


@pytest.mark.parametrize("mixture", [1, 2])
def test_max_product_takes_latents_and_variables_of_largest_joint_probability(mixture):
    model = ProbabilisticCircuit(4, 3, "hclt", 2, mixture).double()
    X = data(100)[:, :4] % 3
    model.fit(X, epochs=3, progress=False)
    tree, p = model.tree, model.parameters_in_logs
    mask = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    got = model.complete(X[:12].reshape(12, 2, 2), mask.reshape(12, 2, 2), "mpe-approx").reshape(12, 4)
    assert torch.equal(got[mask], X[:12][mask])

    def best_with_latents(x):
        scores = []
        for c in range(mixture):
            for z in joint_states((2,) * 4):
                for row in z:
                    s = p.root[c, row[0]]
                    for node, variable in enumerate(tree.variables):
                        s = s + p.emission[node, c, x[variable], row[node]]
                        if node:
                            s = s + p.transition[node, c, row[tree.parents[node]], row[node]]
                    scores.append(float(s))
        return max(scores)

    for i in range(12):
        free = torch.cat(list(joint_states((3,) * 4, clamp=torch.where(mask[i], X[i], -1))))
        assert best_with_latents(got[i]) == pytest.approx(max(map(best_with_latents, free)), abs=1e-9)


def test_early_stopping_keeps_the_best_epoch():
    X, val = data(40, 0), data(200, 9)
    model = ProbabilisticCircuit(6, STATES, n_latents=8)
    model.fit(X, X_val=val, epochs=30, patience=2, progress=False, pseudocount=0.01)
    other = ProbabilisticCircuit(6, STATES, n_latents=8).fit(X, epochs=30, progress=False, pseudocount=0.01)
    assert float(model.log_prob(val).mean()) >= float(other.log_prob(val).mean())


# -- hand-made circuits --------------------------------------------------------------------------------------


def test_a_hand_made_circuit_is_what_it_says():
    def part(a, b):
        return Product([Input(0, [a, 1 - a]), Input(1, [b, 1 - b])])

    model = NodeCircuit.from_nodes(Sum([part(0.9, 0.2), part(0.1, 0.6)], [0.3, 0.7]), [2, 2]).double()
    p = float(model.log_prob(torch.tensor([[0, 0]])).exp())
    assert p == pytest.approx(0.3 * 0.9 * 0.2 + 0.7 * 0.1 * 0.6, abs=1e-6)


def test_random_region_graphs_keep_to_the_contract():
    X = data()
    check_density_model(lambda seed: rat(6, STATES, n_sums=2, seed=seed), X, fit={"epochs": 5})
    model = rat(6, STATES, n_sums=2).double()
    assert abs(float(log_partition(model.log_prob, STATES))) < 1e-6  # built in float32
    scores = [float(model.fit(X, epochs=1, pseudocount=0.0).log_prob(X).mean()) for _ in range(10)]
    assert all(b >= a - 1e-10 for a, b in pairwise(scores))
    mask = torch.rand(20, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    conditional = model.conditional(X[:20], mask)
    for i in range(20):
        clamp = torch.where(mask[i], X[i], -1)
        torch.testing.assert_close(conditional[i], marginals(model.log_prob, STATES, clamp=clamp))


def test_max_product_on_made_circuits():
    def part(a, b, c):
        return Product([Input(0, a), Product([Input(1, b), Input(2, c)])])

    one, zero = [1.0, 0.0], [0.0, 1.0]  # deterministic: the first variable tells which child of the sum it is
    root = Sum([part(one, [0.2, 0.8], [0.5, 0.5]), part(zero, [0.9, 0.1], [0.3, 0.7])], [0.45, 0.55])
    model = NodeCircuit.from_nodes(root, [2, 2, 2]).double()
    for i in range(8):
        mask = torch.tensor([[bool(i >> j & 1) for j in range(3)]])
        for X in joint_states((2, 2, 2)):
            got = model.complete(X, mask.expand_as(X), "mpe-approx")
            for row, found in zip(X, got, strict=True):
                best = brute_force_mode(model, row, mask[0])
                assert float(model.log_prob(found[None])) == pytest.approx(float(model.log_prob(best[None])))
    graph = rat(6, STATES, n_sums=2).double().fit(data(), epochs=3)
    X, nothing = data(5), torch.zeros(5, 6, dtype=torch.bool)
    got = graph.complete(X, nothing, "mpe-approx")
    assert bool((got == got[0]).all())  # nothing is known: all rows get the same
    with pytest.raises(DataError, match="how is"):
        graph.complete(X, nothing, "best")


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (Sum([Input(0), Input(1)]), "node 2 is not smooth"),
        (Product([Input(0), Input(0)]), "node 2 is not decomposable"),
        (Input(0), "not over all 2 variables"),
        (Product([Input(0, [0.5, 0.6]), Input(1)]), "sum to 1"),
        (Product([Input(0), Input(7)]), "node 0|node 1"),
    ],
)
def test_circuits_that_are_none_are_refused(root, message):
    with pytest.raises(DataError, match=message):
        NodeCircuit.from_nodes(root, [2, 2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_latents": 0}, "n_latents is 0"),
        ({"n_variables": 1}, "at least 2 variables"),
        ({"structure": "ring"}, "structure is 'ring'"),
        ({"mixture": 0}, "mixture 0"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        ProbabilisticCircuit(**({"n_variables": 6, "n_states": 3} | settings))


@pytest.mark.parametrize(
    "setting", [{"epochs": 0}, {"step_size": 0.0}, {"pseudocount": -1.0}, {"nonsense": 1}, {"patience": 0}]
)
def test_bad_settings_of_fit_are_refused(setting):
    with pytest.raises(DataError, match=next(iter(setting))):
        ProbabilisticCircuit(6, STATES).fit(data(), progress=False, **setting)
