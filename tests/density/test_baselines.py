import math
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import one_hot

from paperback.density import (
    CategoricalMixture,
    CategoricalRBM,
    IndependentCategorical,
    MaskedNetwork,
)
from paperback.density.baselines.rbm.objective import LikelihoodGradient, mean_pseudo_log_likelihood
from paperback.errors import DataError, NotSupportedError
from paperback.numerics import enumeration
from paperback.testing import DENSITY_CHECKS, DensityCase

N_STATES = (3, 2, 4, 2)


def dependent_data(n=400, seed=0):
    """Variables that hang together through a class of three."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=generator)
    noise = torch.randint(0, 2, (n, 4), generator=generator)
    X = torch.stack(
        [y, noise[:, 0], (y + noise[:, 0]).clamp(max=3), noise[:, 0] ^ (noise[:, 1] & noise[:, 2])], 1
    )
    return X, y


X, Y = dependent_data()


def test_independent_probabilities_are_smoothed_shares():
    model = IndependentCategorical(4, N_STATES, pseudo_count=2.0).fit(X)
    p = model.conditional(X[:1], torch.zeros(1, 4, dtype=torch.bool))[0]
    for i, k in enumerate(N_STATES):
        expected = (torch.bincount(X[:, i], minlength=k) + 2.0 / k) / (len(X) + 2.0)
        torch.testing.assert_close(p[i, :k], expected)


def test_independent_never_calls_a_state_impossible():
    model = IndependentCategorical(2, 3).fit(torch.zeros(10, 2, dtype=torch.int64))
    assert float(model.log_prob(torch.tensor([[2, 2]]))) > -10


# -- mixture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_classes", [False, True])
@pytest.mark.parametrize("smoothing", [1e-6, 3.0])
def test_em_never_lowers_the_penalised_likelihood(with_classes, smoothing):
    model = CategoricalMixture(
        4, N_STATES, 6, n_classes=3 if with_classes else None, smoothing=smoothing
    ).double()
    _, history = model.expectation_maximisation(
        X, Y if with_classes else None, 6, torch.Generator().manual_seed(0), max_iterations=60, tolerance=0.0
    )
    assert len(history) > 10
    assert all(b >= a - 1e-10 for a, b in pairwise(history))
    assert history[-1] > history[0] + 0.05


def test_a_mixture_of_one_is_the_independent_model():
    mixture = CategoricalMixture(4, N_STATES, 1, smoothing=1e6).fit(
        X, progress=False
    )  # smoothed to the same marginals
    independent = IndependentCategorical(4, N_STATES).fit(X)
    torch.testing.assert_close(mixture.log_prob(X), independent.log_prob(X), atol=1e-4, rtol=1e-4)


def test_a_mixture_finds_two_clusters():
    generator = torch.Generator().manual_seed(0)
    cluster = torch.rand(500, 1, generator=generator) < 0.3
    data = (torch.rand(500, 12, generator=generator) < torch.where(cluster, 0.9, 0.1)).long()
    model = CategoricalMixture(12, 2, 2).fit(data, progress=False)
    torch.testing.assert_close(
        model.log_weight.exp().sort().values, torch.tensor([0.3, 0.7]), atol=0.05, rtol=0
    )
    table = model.log_table.exp().reshape(2, 12, 2)[model.log_weight.argsort(), :, 1]
    torch.testing.assert_close(table.mean(1), torch.tensor([0.9, 0.1]), atol=0.05, rtol=0)


def test_the_number_of_components_is_chosen_on_the_validation_part_and_saved(tmp_path):
    X_val, Y_val = dependent_data(100, seed=1)
    model = CategoricalMixture(4, N_STATES, (1, 3, 6), n_classes=3).fit(X, Y, X_val, Y_val, progress=False)
    assert model.n_components in (3, 6)
    single = CategoricalMixture(4, N_STATES, 1, n_classes=3).fit(X, Y, X_val, Y_val, progress=False)
    assert float(model.log_prob(X_val).mean()) > float(single.log_prob(X_val).mean()) + 0.1
    model.save_pretrained(tmp_path / "model")
    assert CategoricalMixture.from_pretrained(tmp_path / "model").n_components == model.n_components


def test_mixture_classification_is_bayes_rule():
    model = CategoricalMixture(4, N_STATES, 4, n_classes=3).fit(X, Y, progress=False)
    weights = model.log_weight.exp()
    tables = model.log_table.exp().reshape(4, 4, 4)
    row, y_given = X[:1], model.log_class.exp()
    seen = weights * tables[:, 0, row[0, 0]] * tables[:, 2, row[0, 2]]
    expected = (seen[:, None] * y_given).sum(0) / seen.sum()
    observed = torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(model.predict_proba(row, observed)[0], expected)


def test_chunks_do_not_change_a_mixture(monkeypatch):
    whole = CategoricalMixture(4, N_STATES, 4).fit(X, progress=False)
    monkeypatch.setattr("paperback.density.baselines.mixture.CHUNK_ENTRIES", 16 * 7)
    pieces = CategoricalMixture(4, N_STATES, 4).fit(X, progress=False)
    torch.testing.assert_close(pieces.log_prob(X), whole.log_prob(X), atol=1e-3, rtol=1e-3)
    observed = torch.rand(X.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert whole.conditional(X, observed).shape == pieces.conditional(X, observed).shape
    assert pieces.complete(X, observed, how="sample").shape == X.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_components": 0}, "n_components"),
        ({"n_components": ()}, "n_components"),
        ({"n_classes": 1}, "n_classes"),
        ({"smoothing": 0.0}, "smoothing"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        CategoricalMixture(4, N_STATES, **arguments)


# -- restricted Boltzmann machine ----------------------------------------------------------------------------


def random_rbm(n_states=N_STATES, n_hidden=5, n_classes=3, seed=0, scale=1.0, **settings):
    """A machine with random weights, in float64."""
    model = CategoricalRBM(len(n_states), n_states, n_hidden, n_classes, **settings).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def joint_log_weight(model):
    """log weight of (visible, class, hidden), written out term by term."""
    n, w = model.n_variables, model.weights
    table = w.visible.unflatten(0, (n, model.max_states))
    bias = w.visible_bias.unflatten(0, (n, model.max_states))

    def log_weight(states):
        h = states[:, n + 1 :].double()
        total = h @ w.hidden_bias + w.label_bias[states[:, n]] + (w.label[states[:, n]] * h).sum(1)
        for i in range(n):
            total = total + bias[i, states[:, i]] + (table[i, states[:, i]] * h).sum(1)
        return total.detach()

    return log_weight, (*model.n_states, model.n_classes, *(2,) * model.n_hidden)


def test_rbm_free_energy_sums_the_hidden_units_out():
    model = random_rbm()
    log_weight, n_states = joint_log_weight(model)
    for row, label in zip(X[:5], Y[:5], strict=True):
        clamp = torch.cat([row, label[None], torch.full((5,), -1)])
        expected = -enumeration.log_partition(log_weight, n_states, clamp=clamp)
        torch.testing.assert_close(model.free_energy(row[None], label[None])[0], expected)
        clamp[4] = -1
        torch.testing.assert_close(
            model.free_energy(row[None])[0], -enumeration.log_partition(log_weight, n_states, clamp=clamp)
        )


@pytest.mark.parametrize(("n_states", "n_hidden"), [(N_STATES, 3), (N_STATES, 8), ((2, 2), 6), ((3,) * 3, 2)])
def test_rbm_partition_function_by_either_side(n_states, n_hidden):
    model = random_rbm(n_states, n_hidden)
    log_weight, joint = joint_log_weight(model)
    result = model.log_partition()
    assert math.isclose(result.value, float(enumeration.log_partition(log_weight, joint)), rel_tol=1e-9)
    assert result.standard_error == 0.0


@pytest.mark.parametrize("n_hidden", [3, 8])  # the hidden side is smaller, the visible side is smaller
def test_rbm_marginals_are_exact_on_small_machines(n_hidden):
    model = random_rbm(n_hidden=n_hidden)
    log_weight, joint = joint_log_weight(model)
    total = enumeration.log_partition(log_weight, joint)
    observed = torch.tensor(
        [[True, False, True, False], [False, False, False, True], [True] * 4, [False] * 4]
    )
    found = model.log_prob(X[:4], observed)
    for i in range(4):
        clamp = torch.cat([torch.where(observed[i], X[i], -1), torch.full((1 + n_hidden,), -1)])
        torch.testing.assert_close(
            found[i], enumeration.log_partition(log_weight, joint, clamp=clamp) - total
        )


def test_rbm_class_of_a_complete_row_is_exact():
    model = random_rbm()
    log_weight, joint = joint_log_weight(model)
    expected = [
        enumeration.marginals(log_weight, joint, clamp=torch.cat([x, torch.full((6,), -1)]))[4, :3]
        for x in X[:4]
    ]
    torch.testing.assert_close(model.predict_proba(X[:4]), torch.stack(expected))


def test_rbm_gibbs_marginals_approach_enumeration():
    model = random_rbm(seed=1)
    log_weight, joint = joint_log_weight(model)
    observed = torch.tensor([[True, False, False, False], [False, False, True, False], [False] * 4])
    posterior = model.infer(X[:3], observed, "gibbs", n_sweeps=400, n_chains=60)
    for i in range(3):
        clamp = torch.cat([torch.where(observed[i], X[i], -1), torch.full((6,), -1)])
        truth = enumeration.marginals(log_weight, joint, clamp=clamp)
        assert float((posterior.visible[i] - truth[:4]).abs().max()) < 0.02
        assert float((posterior.label[i] - truth[4, :3]).abs().max()) < 0.02
        assert float((posterior.hidden[i] - truth[5:, 1]).abs().max()) < 0.02
    assert float(posterior.residual.max()) < 0.1


def test_rbm_samples_follow_the_likelihood():
    model = random_rbm(n_hidden=4, seed=2, n_sweeps=40)
    truth = enumeration.log_probabilities(model.log_prob, N_STATES).exp()
    drawn = model.sample(8_000, torch.Generator().manual_seed(0))
    index = ((drawn[:, 0] * 2 + drawn[:, 1]) * 4 + drawn[:, 2]) * 2 + drawn[:, 3]
    share = torch.bincount(index, minlength=48) / len(drawn)
    assert 0.5 * float((share - truth).abs().sum()) < 0.04


def test_rbm_conditional_draws_follow_the_conditional():
    model = random_rbm(n_hidden=4, seed=3, n_sweeps=40)
    rows = X[:1].expand(5_000, -1)
    observed = torch.tensor([[True, False, True, False]]).expand(5_000, -1)
    drawn = model.complete(rows, observed, how="sample")
    clamp = torch.where(observed[0], X[0], -1)
    truth = enumeration.marginals(model.log_prob, N_STATES, clamp=clamp)
    share = one_hot(drawn, 4).double().mean(0)
    torch.testing.assert_close(share, truth, atol=0.03, rtol=0)


@pytest.mark.parametrize("method", ["meanfield", "parallel"])
def test_rbm_mean_field_satisfies_its_equations(method):
    model = random_rbm(scale=0.3)
    observed = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    q = model.infer(X[:20], observed, method, tolerance=1e-10)
    assert bool(q.converged.all())
    assert int(q.iterations.min()) > 1
    w = model.weights
    visible = torch.where(
        observed[..., None], one_hot(X[:20], 4).double(), w.visible_logits(q.hidden).softmax(-1)
    )
    torch.testing.assert_close(q.visible, visible, atol=1e-8, rtol=0)
    torch.testing.assert_close(q.label, w.label_logits(q.hidden).softmax(-1), atol=1e-8, rtol=0)
    torch.testing.assert_close(
        q.hidden, w.hidden_input(q.visible.flatten(1), q.label).sigmoid(), atol=1e-8, rtol=0
    )


def two_valleys():
    """One visible variable and one hidden unit that want to agree, on either of two states."""
    model = CategoricalRBM(1, 2, 1, inference="parallel").double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-8.0], [8.0]]))
        model.visible_bias.copy_(torch.tensor([8.0, 0.0]))
    return model


def test_rbm_parallel_updates_cycle_where_alternating_ones_settle():
    """Started at odds, visible and hidden side swap their beliefs for ever."""
    model = two_valleys()
    row, nothing = torch.zeros(100, 1, dtype=torch.int64), torch.zeros(100, 1, dtype=torch.bool)
    parallel = model.infer(row, nothing, random_start=True, max_iterations=300)
    alternating = model.infer(row, nothing, "meanfield", random_start=True, max_iterations=300)
    assert bool(alternating.converged.all())
    cycling = ~parallel.converged
    assert 20 < int(cycling.sum()) < 80  # the starts at odds are about half
    assert float(parallel.residual[cycling].min()) > 0.9
    assert bool((parallel.iterations[cycling] == 300).all())
    assert int(parallel.iterations[~cycling].max()) < 300


def test_rbm_warns_when_mean_field_does_not_settle():
    model = two_valleys()
    with torch.no_grad():
        model.base_visible.copy_(
            torch.tensor([0.0, 4.0])
        )  # the base rate points up, the undecided hidden unit down
        model.visible_bias.copy_(torch.tensor([8.5, 0.0]))
    with pytest.warns(
        RuntimeWarning, match="10 of 10 rows did not reach a fixed point of the parallel update"
    ):
        model.conditional(torch.zeros(10, 1, dtype=torch.int64), torch.zeros(10, 1, dtype=torch.bool))


def test_rbm_random_starts_differ_by_seed_and_repeat():
    model = random_rbm(scale=3.0)
    nothing = torch.zeros(30, 4, dtype=torch.bool)
    runs = [model.infer(X[:30], nothing, "meanfield", random_start=True, seed=s).visible for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert float((runs[0] - runs[2]).abs().max()) > 0.1  # strong couplings have many fixed points


def test_rbm_annealed_estimate_within_its_error_bar():
    model = random_rbm((2,) * 6, 21, n_classes=2, scale=0.5, seed=4)  # the visible side is small
    truth = model.log_partition().value
    model.is_small = False
    scores = []
    for seed in range(6):
        estimate = model.log_partition(n_chains=200, n_temperatures=300, seed=seed)
        assert 0 < estimate.standard_error < 0.1
        scores.append((estimate.value - truth) / estimate.standard_error)
    assert max(map(abs, scores)) < 4.0
    assert sum(s * s for s in scores) / len(scores) < 3.0


def test_rbm_likelihood_follows_the_parameters():
    model = random_rbm()
    before = model.log_prob(X[:3])
    with torch.no_grad():
        model.hidden_bias.add_(1.0)
    assert not torch.allclose(model.log_prob(X[:3]), before)
    every = torch.cat(list(enumeration.joint_states(N_STATES)))
    assert math.isclose(float(model.log_prob(every).exp().sum()), 1.0, rel_tol=1e-9)


@pytest.mark.parametrize("persistent", [True, False])
def test_rbm_chain_gradient_agrees_with_the_exact_gradient(persistent):
    """Many chains, run long: the mean of the stochastic gradient is the exact gradient."""
    model = random_rbm(n_hidden=3, seed=5, scale=0.5)
    v, y = one_hot(X, 4).double().flatten(1), one_hot(Y, 3).double()
    joint = (v, y)
    every = torch.cat(list(enumeration.joint_states((*N_STATES, 3))))
    every_v, every_y = one_hot(every[:, :4], 4).double().flatten(1), one_hot(every[:, 4], 3).double()
    exact = model.weights.log_weight(every_v, every_y).logsumexp(0) - model.weights.log_weight(*joint).mean()
    expected = torch.autograd.grad(exact, list(model.parameters()))
    generator = torch.Generator().manual_seed(0)
    many = (v.repeat(10, 1), y.repeat(10, 1))
    gradient = LikelihoodGradient(many, k=20, persistent=persistent)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(30):
        loss = gradient(model.weights, many, generator)
        for sum_, part in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            sum_ += part / 30
    for found, truth in zip(total, expected, strict=True):
        torch.testing.assert_close(found, truth, atol=0.01, rtol=0)


def test_rbm_pseudo_likelihood_against_enumeration():
    model = random_rbm()
    v, y = one_hot(X, 4).double().flatten(1), one_hot(Y, 3).double()
    every = torch.cat(list(enumeration.joint_states((*N_STATES, 3))))
    log_weight = model.weights.log_weight(
        one_hot(every[:, :4], 4).double().flatten(1), one_hot(every[:, 4], 3).double()
    )
    table = log_weight.detach().reshape(*N_STATES, 3)
    rows = torch.cat([X, Y[:, None]], 1)
    expected = sum(table.log_softmax(i)[tuple(rows.T)] for i in range(5)).mean() / 5
    generator = torch.Generator().manual_seed(0)
    found = torch.stack(
        [mean_pseudo_log_likelihood(model.weights, v, y, generator) for _ in range(20)]
    ).mean()
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("algorithm", ["pcd", "cd"])
def test_rbm_learns_dependent_data(algorithm):
    X_test, Y_test = dependent_data(300, seed=1)
    model = CategoricalRBM(4, N_STATES, 10, n_classes=3, n_sweeps=200)
    model.fit(X, Y, algorithm=algorithm, epochs=100, batch_size=50, lr=0.05, weight_decay=0.0, progress=False)
    independent = IndependentCategorical(4, N_STATES).fit(X)
    assert float(model.log_prob(X_test).mean()) > float(independent.log_prob(X_test).mean()) + 0.5
    assert float((model.predict(X_test) == Y_test).double().mean()) > 0.99  # the first variable is the class
    observed = torch.tensor([[False, True, True, True]]).expand_as(X_test)
    completed = model.complete(X_test, observed)
    assert (
        float((completed[:, 0] == X_test[:, 0]).double().mean()) > 0.9
    )  # the third and second give the first away


def test_rbm_keeps_the_best_epoch_of_the_validation_part():
    X_val, Y_val = dependent_data(100, seed=1)
    settings = {"epochs": 3, "batch_size": 50, "progress": False}
    model = CategoricalRBM(4, N_STATES, 10, n_classes=3).fit(X, Y, X_val, Y_val, **settings)
    assert math.isfinite(float(model.log_prob(X_val).mean()))
    with pytest.raises(DataError, match="patience needs"):
        CategoricalRBM(4, N_STATES, 10, n_classes=3).fit(X, Y, patience=1, **settings)


def test_a_large_rbm_has_an_estimate_and_no_marginal():
    model = CategoricalRBM(30, 4, 25)
    assert model.capabilities.log_prob == "estimate"
    assert model.capabilities.marginal == "none"
    rows = torch.zeros(2, 30, dtype=torch.int64)
    assert math.isclose(
        float(model.log_prob(rows)[0]), -30 * math.log(4), rel_tol=1e-4
    )  # without couplings all is uniform
    with pytest.raises(NotSupportedError, match="CategoricalMixture"):
        model.log_prob(rows, torch.tensor([[True] + [False] * 29]).expand(2, -1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_hidden": 0}, "n_hidden"),
        ({"n_classes": 1}, "n_classes"),
        ({"inference": "guess"}, "inference"),
        ({"n_sweeps": 1}, "n_sweeps"),
    ],
)
def test_impossible_machines_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        CategoricalRBM(4, N_STATES, **arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"algorithm": "sgd"}, "algorithm"), ({"k": 0}, "k is 0"), ({"epochs": 0}, "epochs")],
)
def test_impossible_trainings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        CategoricalRBM(4, N_STATES, 5).fit(X, progress=False, **settings)


# -- network for random masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("check", DENSITY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("with_classes", [True, False])
def test_masked_network_behaves_as_every_density_model(check, with_classes):
    def build(seed):
        return MaskedNetwork(4, N_STATES, 3 if with_classes else None, width=16)

    check(DensityCase(build, X[:40], Y[:40] if with_classes else None, {"epochs": 2}))


def test_masked_network_learns_what_the_mixture_knows_exactly():
    """On data from a small mixture its conditionals come close to the true ones."""
    mixture = CategoricalMixture(4, N_STATES, 3, n_classes=3).fit(X, Y, progress=False)
    drawn = mixture.sample(4000, torch.Generator().manual_seed(1))
    observed = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    network = MaskedNetwork(4, N_STATES).fit(drawn[:3500], epochs=30, lr=3e-3, progress=False)
    exact = mixture.conditional(drawn[3500:], observed[3500:])
    close = (network.conditional(drawn[3500:], observed[3500:]) - exact).abs().mean()
    independent = IndependentCategorical(4, N_STATES).fit(drawn[:3500])
    far = (independent.conditional(drawn[3500:], observed[3500:]) - exact).abs().mean()
    assert float(close) < 0.02
    assert float(close) < 0.3 * float(far)


def test_masked_network_wants_labels_and_classes_together():
    with pytest.raises(DataError, match="go together"):
        MaskedNetwork(4, N_STATES).fit(X, Y, progress=False)
    with pytest.raises(DataError, match="obs_level"):
        MaskedNetwork(4, N_STATES, obs_level=1.0)
    with pytest.raises(NotSupportedError, match="no class"):
        MaskedNetwork(4, N_STATES).predict(X)
