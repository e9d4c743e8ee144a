"""Peculiarities of marginalization models: identities, limits, gradients, samplers, both trainings, bad
input."""

import math

import pytest
import torch
from torch import nn

from paperback.density.marginalization import (
    AnyOrderARM,
    InconsistentMarginals,
    IsingEnergy,
    MarginalizationModel,
    PottsEnergy,
    RewardEnergy,
)
from paperback.density.marginalization.networks import to_symbols
from paperback.density.marginalization.objectives import (
    Chain,
    EnergyLoss,
    MarginalLoss,
    any_order_nll,
    begin_loss,
    block_residuals,
    one_step_residuals,
    standardise,
)
from paperback.density.marginalization.orders import (
    complete_by_marginals,
    complete_in_order,
    gibbs,
    ordered_log_prob,
    random_steps,
)
from paperback.errors import ArtefactError, DataError, NotSupportedError
from paperback.numerics.enumeration import joint_states, log_partition, log_probabilities
from paperback.numerics.spins import ising_to_potts
from paperback.testing import check_density_model


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def table(n_states, seed=0):
    """A random distribution, as log-probabilities of all joint states."""
    return torch.randn(math.prod(n_states), generator=source(seed), dtype=torch.float64).log_softmax(0)


def every_state(n_states):
    return torch.cat(list(joint_states(n_states)))


class TabularNetwork(nn.Module):
    """One parameter for each partly known row, and one logit for each of its conditionals."""

    heads = "dual"

    def __init__(self, n_states):
        super().__init__()
        self.n_states, k = n_states, max(n_states)
        self.base = (k + 1) ** torch.arange(len(n_states))
        rows = (k + 1) ** len(n_states)
        self.m = nn.Parameter(torch.zeros(rows, dtype=torch.float64))
        self.c = nn.Parameter(torch.zeros(rows, len(n_states), k, dtype=torch.float64))
        self.missing = ~(torch.arange(k) < torch.tensor(n_states)[:, None])

    def log_marginal(self, symbols):
        return self.m[(symbols * self.base).sum(-1)]

    def logits(self, symbols):
        return self.c[(symbols * self.base).sum(-1)].masked_fill(self.missing, -torch.inf)

    def logits_at(self, symbols, columns):
        return self.logits(symbols)[torch.arange(len(columns)), columns]

    @torch.no_grad()
    def fill_exactly(self, log_p):
        """Set both heads to what the table of joint log-probabilities says."""
        k, states = max(self.n_states), every_state(self.n_states)
        for symbols in torch.cartesian_prod(*[torch.arange(k + 1)] * len(self.n_states)):
            row = int((symbols * self.base).sum())
            agrees = ((states == symbols - 1) | (symbols == 0)).all(1)
            if agrees.any():
                self.m[row] = log_p[agrees].logsumexp(0)
                for i, n in enumerate(self.n_states):
                    for s in range(n):
                        self.c[row, i, s] = (
                            log_p[agrees & (states[:, i] == s)].logsumexp(0) if symbols[i] == 0 else 0.0
                        )
        return self


class Holder(nn.Module):
    """What a loss sees of a model."""

    def __init__(self, network, n_states):
        super().__init__()
        self.network = network
        self.log_z = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)
        self.valid = ~network.missing


# -- self-consistency ------------------------------------------------------------------------------


@pytest.mark.parametrize("n_states", [(2, 2, 2), (3, 2, 3, 2)])
def test_exact_heads_have_no_one_step_residual(n_states):
    network = TabularNetwork(n_states).fill_exactly(table(n_states))
    residuals = one_step_residuals(network, every_state(n_states).repeat(20, 1), source())
    assert float(residuals.value.detach().abs().max()) < 1e-10
    assert float(begin_loss(network, len(n_states), torch.zeros((), dtype=torch.float64))) < 1e-20


def test_block_residuals_of_exact_heads_vanish_in_the_mean_of_every_row():
    n_states = (2, 3, 2, 2)
    network = TabularNetwork(n_states).fill_exactly(table(n_states))
    row = torch.tensor([[1, 2, 0, 1]]).expand(60_000, -1)
    for n_strata in (1, 4):
        residuals = block_residuals(network, row, source(), n_strata)
        error = residuals.value.std() / math.sqrt(len(row))
        assert float(residuals.value.std()) > 0.01  # it is an estimate
        assert abs(float(residuals.value.mean())) < 4 * float(error)
        assert residuals.size.min() == 1
        assert residuals.size.max() == 4


def test_more_strata_have_less_noise():
    n_states = (2,) * 8
    network = TabularNetwork(n_states)
    symbols = torch.cartesian_prod(*[torch.arange(3)] * 8)
    with torch.no_grad():  # as in any good model, the more is known the less is left to be said
        network.c[(symbols * network.base).sum(1), :, 1] = 0.5 * (symbols > 0).sum(1, keepdim=True).double()
    rows = torch.ones(4000, 8, dtype=torch.int64)
    one, four = (block_residuals(network, rows, source(), n).value.std() for n in (1, 4))
    assert float(four) < 0.8 * float(one)


def test_random_steps_are_uniform_over_orders_and_steps():
    states = torch.zeros(30_000, 4, dtype=torch.int64)
    arrival, column = random_steps(states, source())
    before = arrival < arrival.gather(1, column[:, None])
    size = torch.bincount(before.sum(1), minlength=4) / len(states)
    torch.testing.assert_close(size, torch.full((4,), 0.25), atol=0.015, rtol=0)
    # Given one variable before, it is any of the three others alike.
    only = before[(before.sum(1) == 1) & (column == 2)].float().mean(0)
    torch.testing.assert_close(only, torch.tensor([1, 1, 0, 1]) / 3, atol=0.03, rtol=0)


def test_tabular_heads_learn_every_marginal_from_consistency_and_likelihood():
    n_states = (2, 2, 2)
    log_p = table(n_states)
    holder = Holder(TabularNetwork(n_states), n_states)
    states = every_state(n_states)
    loss = MarginalLoss(Chain(2), q_mix=1.0, block_weight=0.0, explore=0.0, joint=True)
    optimizer = torch.optim.Adam(holder.network.parameters(), lr=0.05)
    draws = source()
    steps = 1500
    for step in range(steps):
        rows = states[torch.multinomial(log_p.exp(), 512, replacement=True, generator=draws)]
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        loss(holder, (rows,), draws)["loss"].backward()
        optimizer.step()
    truth = TabularNetwork(n_states).fill_exactly(log_p)
    symbols = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with torch.no_grad():
        error = (holder.network.log_marginal(symbols).exp() - truth.log_marginal(symbols).exp()).abs()
    assert float(error.max()) < 0.02


def test_consistency_alone_makes_marginals_exact_for_exact_conditionals():
    n_states = (2, 2, 2)
    truth = TabularNetwork(n_states).fill_exactly(table(n_states))
    network = TabularNetwork(n_states).fill_exactly(table(n_states))
    with torch.no_grad():
        network.m.zero_()
    optimizer = torch.optim.Adam([network.m], lr=0.1)
    states, draws, zero = every_state(n_states).repeat(16, 1), source(), torch.zeros(())
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 1200)
        optimizer.zero_grad()
        loss = one_step_residuals(network, states, draws).loss(3).mean() + begin_loss(network, 3, zero)
        loss.backward()
        optimizer.step()
    symbols = torch.cartesian_prod(*[torch.arange(3)] * 3)
    torch.testing.assert_close(network.log_marginal(symbols), truth.log_marginal(symbols), atol=1e-3, rtol=0)


def test_the_weight_of_consistency_grows_with_the_number_of_variables():
    for d in (3, 6):
        network = TabularNetwork((2,) * d)
        with torch.no_grad():
            network.m[0] = 1.0
        residuals = one_step_residuals(network, torch.zeros(50, d, dtype=torch.int64), source())
        gradient = torch.autograd.grad(residuals.loss(d).mean(), network.m)[0]
        plain = torch.autograd.grad(
            one_step_residuals(network, torch.zeros(50, d, dtype=torch.int64), source())
            .value.square()
            .mean(),
            network.m,
        )[0]
        torch.testing.assert_close(gradient, d * plain)


# -- likelihood along orders -----------------------------------------------------------------------


def test_the_any_order_loss_is_the_mean_over_all_orders():
    n_states = (2, 3, 2)
    network = TabularNetwork(n_states)
    with torch.no_grad():
        network.c.normal_(generator=source())
    row = torch.tensor([[1, 2, 0]])
    orders = torch.cartesian_prod(*[torch.arange(3)] * 3)
    orders = orders[[len(set(o.tolist())) == 3 for o in orders]]
    exact = -ordered_log_prob(network, row, row >= 0, orders, 100).mean()
    sampled = any_order_nll(network, row.expand(100_000, -1), source())
    assert abs(float(sampled.mean() - exact)) < 4 * float(sampled.std()) / math.sqrt(100_000)


def test_every_order_gives_the_exact_marginal_where_conditionals_are_exact():
    n_states, log_p = (2, 3, 2, 2), table((2, 3, 2, 2))
    network = TabularNetwork(n_states).fill_exactly(log_p)
    states = every_state(n_states)
    observed = torch.rand(states.shape, generator=source()) < 0.6
    ranks = torch.stack([torch.randperm(4, generator=source(s)) for s in range(6)])
    along = ordered_log_prob(network, states, observed, ranks, rows=7)
    with torch.no_grad():
        expected = network.log_marginal(to_symbols(states, observed))
    torch.testing.assert_close(along, expected.expand(6, -1), atol=1e-10, rtol=0)


# -- sampling --------------------------------------------------------------------------------------


def chi_square(states, log_p, n_states):
    """Pearson's statistic of samples, and a bound that it passes once in some 10,000 times."""
    index = torch.zeros(len(states), dtype=torch.int64)
    for i, k in enumerate(n_states):
        index = index * k + states[:, i]
    expected = log_p.exp() * len(states)
    statistic = ((torch.bincount(index, minlength=len(log_p)) - expected).square() / expected).sum()
    freedom = len(log_p) - 1
    return float(statistic), freedom + 4 * math.sqrt(2 * freedom)


def test_gibbs_steps_leave_the_distribution_alone():
    n_states, log_p = (2, 2, 3, 2), table((2, 2, 3, 2))
    network = TabularNetwork(n_states).fill_exactly(log_p)
    draws = source()
    states = every_state(n_states)[torch.multinomial(log_p.exp(), 20_000, replacement=True, generator=draws)]
    moved = states
    for _ in range(3):
        moved = gibbs(network, moved, 2, draws)
    statistic, bound = chi_square(moved, log_p, n_states)
    assert statistic < bound
    assert float((moved != states).any(1).float().mean()) > 0.5


@pytest.mark.parametrize("by", ["conditionals", "marginals"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_samples_follow_the_distribution(by, block):
    n_states, log_p = (2, 2, 3, 2), table((2, 2, 3, 2))
    network = TabularNetwork(n_states).fill_exactly(log_p)
    draws = source()
    nothing = torch.zeros(20_000, 4, dtype=torch.int64)
    arrival = torch.rand(nothing.shape, generator=draws)
    if by == "conditionals":
        states = complete_in_order(network, nothing, nothing.bool(), arrival, draws, block)
    else:
        valid = ~network.missing
        states = complete_by_marginals(
            network.log_marginal, nothing, nothing.bool(), arrival, draws, valid, block
        )
    statistic, bound = chi_square(states, log_p, n_states)
    # Blocks by conditionals lose the dependence inside a block; blocks by marginals keep it.
    assert (statistic < bound) == (by == "marginals" or block == 1)


@pytest.mark.parametrize("block", [1, 2])
def test_conditional_samples_by_marginals_follow_bayes_rule(block):
    n_states, log_p = (2, 2, 3, 2), table((2, 2, 3, 2))
    network = TabularNetwork(n_states).fill_exactly(log_p)
    draws, n = source(), 20_000
    given = torch.tensor([[1, 0, 2, 0]]).expand(n, -1)
    observed = torch.tensor([[True, False, True, False]]).expand(n, -1)
    arrival = torch.rand(n, 4, generator=draws)
    states = complete_by_marginals(
        network.log_marginal, given, observed, arrival, draws, ~network.missing, block
    )
    assert torch.equal(states[observed], given[observed])
    every = every_state(n_states)
    agrees = (every[:, 0] == 1) & (every[:, 2] == 2)
    posterior = log_p[agrees].log_softmax(0)
    statistic, bound = chi_square(states[:, [1, 3]], posterior, (2, 2))
    assert statistic < bound


# -- energies --------------------------------------------------------------------------------------


def test_the_lattice_counts_every_edge_twice_as_the_authors_do():
    side, sigma, bias = 4, 0.15, 0.2
    f = IsingEnergy.lattice(side, sigma, bias)
    states = torch.randint(0, 2, (50, side * side), generator=source())
    spins = (2.0 * states - 1).reshape(-1, side, side)
    edges = (spins * spins.roll(1, 1)).sum((1, 2)) + (spins * spins.roll(1, 2)).sum((1, 2))
    torch.testing.assert_close(f(states), 2 * sigma * edges + bias * spins.sum((1, 2)), atol=1e-4, rtol=1e-5)
    potts = PottsEnergy(*ising_to_potts(f.couplings, f.field))
    torch.testing.assert_close(potts(states), f(states), atol=1e-4, rtol=1e-5)
    # The number of the sheet, from an exact enumeration.
    log_z = log_partition(IsingEnergy.lattice(4, 0.15), (2,) * 16)
    assert float(log_z) == pytest.approx(12.7855, abs=1e-3)


def test_a_reward_is_asked_once_for_each_different_row():
    asked = []

    def score(row):
        asked.append(row)
        return sum(row)

    f = RewardEnergy(score, temperature=0.5)
    states = torch.tensor([[1, 1], [0, 1], [1, 1]])
    assert f(states).tolist() == [4.0, 2.0, 4.0]
    assert sorted(asked) == [(0, 1), (1, 1)]


def test_reinforce_is_the_gradient_of_the_divergence():
    """E[(log p - f) grad log p] equals grad KL(p || exp f / Z), by finite differences, for a tabular
    softmax."""
    logits = torch.randn(8, generator=source(), dtype=torch.float64, requires_grad=True)
    f = torch.randn(8, generator=source(1), dtype=torch.float64)

    def divergence(values):
        log_p = values.log_softmax(0)
        return float((log_p.exp() * (log_p - f.log_softmax(0))).sum())

    log_p = logits.log_softmax(0)
    reward = (log_p - f).detach()
    surrogate = (log_p.detach().exp() * (reward - 3.7) * log_p).sum()  # any baseline
    gradient = torch.autograd.grad(surrogate, logits)[0]
    step = 1e-6 * torch.eye(8, dtype=torch.float64)
    numeric = [(divergence(logits.detach() + e) - divergence(logits.detach() - e)) / 2e-6 for e in step]
    torch.testing.assert_close(gradient, torch.tensor(numeric, dtype=torch.float64), atol=1e-6, rtol=1e-5)


def test_a_constant_in_the_energy_changes_no_gradient():
    n_states = (2, 2, 2)
    gradients = []
    for constant in (0.0, 100.0):
        holder = Holder(TabularNetwork(n_states).fill_exactly(table(n_states)), n_states)

        def f(states, constant=constant):
            return states.double().sum(1) + constant

        loss = EnergyLoss(f, "kl", 4.0, "marginal", 0.5, Chain(2))
        loss(holder, (torch.zeros(200, 1),), source())["loss"].backward()
        gradients.append((holder.network.m.grad, holder.network.c.grad))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-9, rtol=1e-7)


def test_standardised_rewards_have_mean_zero_and_deviation_one():
    r = standardise(torch.randn(1000, generator=source()) * 5 + 3)
    assert float(r.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(r.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    assert torch.equal(standardise(torch.full((10,), 2.0)), torch.zeros(10))
    small = 1e-4 * torch.randn(1000, generator=source())
    assert float(standardise(small).abs().max()) < 0.01  # what is met is not amplified


SMALL = IsingEnergy(
    torch.tensor([[0.0, 0.8, 0.0], [0.8, 0.0, -0.6], [0.0, -0.6, 0.0]]), torch.tensor([0.3, 0.0, -0.2])
)


@pytest.fixture(scope="module", params=["kl", "kl by conditionals", "fm", "fm on data"])
def trained_on_energy(request):
    model = MarginalizationModel(3, 2, hidden=32, n_blocks=1, gibbs_steps=2)
    objective, _, way = request.param.partition(" ")
    return model.fit_energy(
        SMALL,
        steps=800,
        objective=objective,
        estimator="conditionals" if way == "by conditionals" else "marginal",
        X=every_state((2, 2, 2)) if way == "on data" else None,
        batch_size=256,
        lr=3e-3,
        refill_every=50,
        progress=False,
    )


def test_training_on_an_energy_finds_marginals_and_log_z(trained_on_energy):
    model, states = trained_on_energy, every_state((2, 2, 2))
    truth = log_probabilities(SMALL, (2, 2, 2))
    log_p = model.log_prob(states)
    assert float(log_p.logsumexp(0)) == pytest.approx(0.0, abs=0.1)
    assert float((truth.exp() * (truth - log_p.log_softmax(0))).sum()) < 0.02
    observed = torch.tensor([[True, False, True]]).expand(8, -1)
    clamped = torch.where(observed, states, -1)
    log_z = log_partition(SMALL, (2, 2, 2))
    expected = torch.stack([log_partition(SMALL, (2, 2, 2), clamp=c) for c in clamped]) - log_z
    torch.testing.assert_close(model.log_prob(states, observed), expected, atol=0.1, rtol=0)
    for how, tolerance in (("marginal", 0.1), ("bound", 0.1), ("importance", 0.05)):
        estimate = model.log_partition(2000, how=how)
        assert estimate.value == pytest.approx(float(log_z), abs=tolerance)
        assert 0 <= estimate.standard_error < 0.05
    assert float(model.consistency) < 0.01


@pytest.mark.parametrize("estimator", ["exact", "one_step"])
def test_the_rival_trains_on_an_energy(estimator):
    model = AnyOrderARM(3, 2, hidden=32, n_blocks=1)
    model.fit_energy(SMALL, steps=600, estimator=estimator, batch_size=256, lr=3e-3, progress=False)
    truth = log_probabilities(SMALL, (2, 2, 2))
    log_p = model.log_prob(every_state((2, 2, 2)))
    assert float((log_p.exp() * (log_p - truth)).sum()) < (0.005 if estimator == "exact" else 0.15)


# -- the model -------------------------------------------------------------------------------------

N_STATES = (3, 2, 4, 2)


def dependent_data(n=300, seed=0):
    generator = source(seed)
    a, b = torch.randint(0, 3, (n,), generator=generator), torch.randint(0, 2, (n,), generator=generator)
    return torch.stack([a, b, (a + b).clamp(max=3), b ^ (torch.rand(n, generator=generator) < 0.2)], 1)


X = dependent_data()
QUICK = {"stage_epochs": (2, 2), "batch_size": 64}


@pytest.mark.filterwarnings("ignore::paperback.density.marginalization.InconsistentMarginals")
@pytest.mark.parametrize(
    "settings", [{}, {"heads": "single"}, {"trunk": "transformer", "hidden": 16, "n_blocks": 1}]
)
def test_it_behaves_as_a_density_model(settings):
    def build(seed):
        return MarginalizationModel(4, N_STATES, **{"hidden": 24, "n_blocks": 1, "seed": seed} | settings)

    check_density_model(build, X, fit=QUICK)


def test_the_rival_behaves_as_a_density_model():
    check_density_model(
        lambda seed: AnyOrderARM(4, N_STATES, hidden=24, n_blocks=1, seed=seed),
        X,
        fit={"epochs": 3, "batch_size": 64},
    )


@pytest.fixture(scope="module")
def fitted():
    model = MarginalizationModel(4, N_STATES, hidden=64, n_blocks=2)
    return model.fit(X, stage_epochs=(60, 60), lr=3e-3, batch_size=64, progress=False)


@pytest.mark.parametrize("heads", ["dual", "single"])
def test_training_on_data_brings_the_heads_together(heads):
    model = MarginalizationModel(4, N_STATES, hidden=64, n_blocks=2, heads=heads)
    model.fit(X, stage_epochs=(60, 60), lr=3e-3, batch_size=64, progress=False)
    by_head, by_conditionals = model.log_prob(X), model.log_prob(X, exact=True)
    assert float((by_head - by_conditionals).abs().mean()) < 0.15
    entropy = math.log(3) + math.log(2) - 0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert float(-by_conditionals.mean()) == pytest.approx(entropy, abs=0.2)
    every = every_state(N_STATES)
    assert float(model.log_prob(every).logsumexp(0)) == pytest.approx(0.0, abs=0.15)
    assert float(model.log_prob(every, exact=True).logsumexp(0)) == pytest.approx(0.0, abs=1e-4)
    assert float(model.consistency) < 0.05
    assert model.consistency_error(X) < 0.05


def test_the_second_stage_leaves_the_conditionals_alone():
    model = MarginalizationModel(4, N_STATES, hidden=16, n_blocks=1)
    model.fit(X, stage_epochs=(2, 0), progress=False)
    assert math.isnan(float(model.consistency))
    before = {name: t.clone() for name, t in model.network.conditional.state_dict().items()}
    model.fit(X, stage_epochs=(0, 2), progress=False)
    for name, tensor in model.network.conditional.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.requires_grad for p in model.network.parameters())
    model.fit(X, stage_epochs=(0, 2), joint=True, progress=False)
    after = model.network.conditional.state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_nothing_observed_has_probability_one(fitted):
    nothing = torch.zeros_like(X, dtype=torch.bool)
    torch.testing.assert_close(fitted.log_prob(X, nothing), torch.zeros(len(X)), atol=1e-6, rtol=0)
    assert torch.equal(fitted.log_prob(X, nothing, exact=True), torch.zeros(len(X)))


def test_one_call_for_a_hundred_subsets_equals_a_hundred_calls(fitted):
    subsets = torch.rand(100, 4, generator=source()) < 0.5
    together = fitted.evidence(X[:3], subsets)
    alone = torch.stack([fitted.log_prob(X[:3], s.expand(3, -1)) for s in subsets], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_marginals_do_not_depend_on_how_the_variables_are_named():
    """The log marginal of a subset is one number: the order in which it is observed has no place in it."""
    model = MarginalizationModel(4, 2, hidden=8, n_blocks=1)
    rows = torch.tensor([[1, 0, 1, 1]])
    observed = torch.tensor([[True, False, True, True]])
    forward = model.log_prob(rows, observed)
    garbage = torch.where(observed, rows, 99)
    assert torch.equal(forward, model.log_prob(garbage, observed))


@pytest.mark.parametrize("by", ["conditionals", "marginals"])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("order", ["random", "forward", torch.tensor([2, 0, 3, 1])])
def test_completion_keeps_what_is_observed_in_any_order(fitted, by, block, order):
    observed = torch.rand(X.shape, generator=source()) < 0.5
    filled = fitted.complete(X, observed, "sample", source(), order=order, block=block, by=by)
    assert torch.equal(filled[observed], X[observed])
    assert bool(((filled >= 0) & (filled < torch.tensor(N_STATES))).all())
    drawn = fitted.sample(300, source(), order=order, block=block, by=by)
    assert bool(((drawn >= 0) & (drawn < torch.tensor(N_STATES))).all())
    if by == "marginals" or block == 1:  # x_2 is a function of x_0 and x_1
        assert float((drawn[:, 2] == (drawn[:, 0] + drawn[:, 1]).clamp(max=3)).float().mean()) > 0.9


def test_a_forward_order_begins_with_the_first_variable():
    """A network that says nothing but where it was asked."""

    class Spy:
        def __init__(self):
            self.columns = []

        def logits_at(self, symbols, columns):
            self.columns.append(columns.tolist())
            return torch.zeros(len(symbols), 2)

    spy = Spy()
    rows = torch.zeros(2, 3, dtype=torch.int64)
    observed = torch.tensor([[False, True, False], [False, False, False]])
    complete_in_order(spy, rows, observed, torch.arange(3.0).expand(2, -1), source())
    assert spy.columns == [[0, 0], [2, 1], [2]]


def test_save_and_load_keep_the_consistency(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "model")
    loaded = MarginalizationModel.from_pretrained(tmp_path / "model")
    assert float(loaded.consistency) == float(fitted.consistency)
    torch.testing.assert_close(loaded.log_prob(X), fitted.log_prob(X))
    with pytest.raises(NotSupportedError, match="fit_energy"):
        loaded.log_partition()


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, symbols):
        return self.linear(symbols.to(self.linear.weight.dtype))


@pytest.mark.filterwarnings("ignore::paperback.density.marginalization.InconsistentMarginals")
def test_a_trunk_of_ones_own(tmp_path):
    model = MarginalizationModel(4, N_STATES, trunk=Trunk()).fit(X, **QUICK, progress=False)
    assert model.network.conditional.trunk is not model.network.marginal.trunk
    assert model.log_prob(X).shape == (len(X),)
    with pytest.raises(ArtefactError, match="trunk"):
        model.save_pretrained(tmp_path / "model")


def test_a_checkpointed_training_resumes_to_the_same_model(tmp_path):
    def build():
        return MarginalizationModel(4, N_STATES, hidden=16, n_blocks=1).fit(
            X, stage_epochs=(2, 0), progress=False
        )

    class Stop(Exception):
        pass

    def stop_after_two(epoch, model, history):
        if epoch == 2:
            raise Stop

    whole = build().fit(X, stage_epochs=(0, 4), progress=False)
    half = build()
    with pytest.raises(Stop):
        half.fit(X, stage_epochs=(0, 4), progress=False, checkpoint=tmp_path, callbacks=[stop_after_two])
    resumed = build().fit(X, stage_epochs=(0, 4), progress=False, checkpoint=tmp_path)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, msg=name)


def test_an_inconsistent_model_says_so():
    model = MarginalizationModel(4, N_STATES, hidden=8, n_blocks=1)
    model.consistency.fill_(0.7)
    with pytest.warns(InconsistentMarginals, match=r"0\.7 nats"):
        model.log_prob(X)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gibbs_steps": 5}, "gibbs_steps is 5"),
        ({"gibbs_steps": 0}, "gibbs_steps is 0"),
        ({"q_mix": 1.5}, "q_mix is 1.5"),
        ({"heads": "triple"}, "heads is 'triple'"),
        ({"trunk": "cnn"}, "trunk is 'cnn'"),
        ({"hidden": 0}, "hidden is 0"),
        ({"trunk": "transformer", "hidden": 18}, "multiple of 4"),
        ({"trunk": nn.Identity()}, "floating features"),
        ({"n_states": 1}, "at least 2"),
    ],
)
def test_bad_arguments_are_refused(settings, match):
    with pytest.raises(DataError, match=match):
        MarginalizationModel(**{"n_variables": 4, "n_states": 2} | settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"f": lambda x: x}, "one number for each row"),
        ({"f": lambda x: 1.0}, "float"),
        ({"f": lambda x: torch.where(x[:, 0] == 1, torch.nan, 0.0)}, "must be finite"),
        ({"f": torch.zeros(3)}, "must be a function"),
        ({"steps": 0}, "steps is 0"),
        ({"objective": "tv"}, "objective is 'tv'"),
        ({"estimator": "magic"}, "estimator 'magic'"),
        ({"X": torch.zeros(5, 3, dtype=torch.int64)}, "X is given"),
        ({"batch_size": 1}, "batch_size 1"),
        ({"alpha": 0.0}, "alpha 0.0"),
    ],
)
def test_bad_energies_are_refused(settings, match):
    model = MarginalizationModel(3, 2, hidden=8, n_blocks=1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(DataError, match=match):
        model.fit_energy(**{"f": SMALL, "steps": 5, "batch_size": 8, "progress": False} | settings)
    assert before.keys() == model.state_dict().keys()
    assert not model.log_z.requires_grad


def test_bad_questions_are_refused(fitted):
    known = torch.ones_like(X, dtype=torch.bool)
    bad = [
        lambda: fitted.log_prob(X, exact=True, n_orders=0),
        lambda: fitted.sample(3, block=0),
        lambda: fitted.sample(3, block=9, by="marginals"),
        lambda: fitted.sample(3, by="magic"),
        lambda: fitted.sample(3, order="backwards"),
        lambda: fitted.sample(3, order=torch.tensor([0, 0, 1, 2])),
        lambda: fitted.sample(0),
        lambda: fitted.evidence(X, known[:2, :3]),
        lambda: fitted.evidence(X, known[:2].long()),
        lambda: fitted.consistency_error(X, n_repeats=0),
        lambda: fitted.log_partition(1, f=SMALL),
        lambda: fitted.log_partition(10, f=SMALL, how="magic"),
        lambda: fitted.fit(SMALL),
        lambda: fitted.fit(X, stage_epochs=(-1, 2)),
        lambda: fitted.fit(X, block_weight=2.0),
        lambda: fitted.fit(X, explore=-0.1),
        lambda: MarginalizationModel(4, N_STATES, hidden=8, heads="single").fit(X, joint=False),
        lambda: RewardEnergy(sum, temperature=0.0),
        lambda: IsingEnergy.lattice(1, 0.1),
    ]
    for question in bad:
        with pytest.raises(DataError):
            question()
