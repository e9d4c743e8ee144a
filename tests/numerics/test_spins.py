import math

import pytest
import torch

from paperback.numerics import enumeration, spins


def random_potts(n=5, k=3, seed=0, scale=0.7):
    """A dense Potts model in float64."""
    generator = torch.Generator().manual_seed(seed)
    couplings = scale * torch.randn(n, k, n, k, generator=generator, dtype=torch.float64)
    couplings = (couplings + couplings.permute(2, 3, 0, 1)) / 2
    couplings[torch.arange(n), :, torch.arange(n)] = 0.0
    return couplings, torch.randn(n, k, generator=generator, dtype=torch.float64)


def test_log_weight_sums_pairs_once():
    couplings, bias = random_potts()
    states = torch.tensor([[0, 2, 1, 1, 0]])
    expected = sum(bias[i, s] for i, s in enumerate(states[0]))
    for i in range(5):
        for j in range(i):
            expected = expected + couplings[i, states[0, i], j, states[0, j]]
    torch.testing.assert_close(spins.potts_log_weight(states, couplings, bias), expected[None])


def test_an_ising_model_and_its_potts_model_agree():
    generator = torch.Generator().manual_seed(1)
    couplings = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    couplings = (couplings + couplings.T).fill_diagonal_(0.0)
    field = torch.randn(6, generator=generator, dtype=torch.float64)
    states = torch.cat(list(enumeration.joint_states((2,) * 6)))
    spin = 2.0 * states.double() - 1.0
    expected = 0.5 * ((spin @ couplings) * spin).sum(1) + spin @ field
    torch.testing.assert_close(
        spins.potts_log_weight(states, *spins.ising_to_potts(couplings, field)), expected
    )


def test_sample_categorical_frequencies_and_zero_states():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.0]]).expand(40_000, -1)
    drawn = spins.sample_categorical(weights, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.0, 0.75, 0.0, 0.25, 0.0]), atol=0.01, rtol=0)


def test_sample_categorical_never_runs_past_the_last_state(monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.ones(shape[0])
    )  # the level rounded up to the total
    assert spins.sample_categorical(torch.tensor([[0.3, 0.7, 0.0]]), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize(("edges", "n_colours"), [("none", 1), ("grid", 2), ("all", 6)])
def test_colour_separates_coupled_variables(edges, n_colours):
    coupled = torch.zeros(6, 6, dtype=torch.bool)
    if edges == "all":
        coupled[:] = True
    if edges == "grid":  # 2 x 3
        for i, j in [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]:
            coupled[i, j] = coupled[j, i] = True
    colours = spins.colour(coupled)
    assert len(colours) == n_colours
    assert sorted(torch.cat(colours).tolist()) == list(range(6))
    for members in colours:
        block = coupled[members][:, members] & ~torch.eye(len(members), dtype=torch.bool)
        assert not block.any()


@pytest.mark.parametrize("structure", ["dense", "bipartite"])
def test_gibbs_reaches_the_enumerated_distribution(structure):
    couplings, bias = random_potts(n=4, k=3, seed=2)
    if structure == "bipartite":
        couplings[:2, :, :2] = couplings[2:, :, 2:] = 0.0
    valid = torch.tensor([[True, True, True]] * 3 + [[True, True, False]])
    colours = spins.colour((couplings != 0).any(3).any(1))
    assert len(colours) == (4 if structure == "dense" else 2)
    generator = torch.Generator().manual_seed(0)
    states = torch.zeros(20_000, 4, dtype=torch.int64)
    for _ in range(40):
        states = spins.gibbs_sweep(states, couplings, bias, colours, generator, valid=valid)
    n_states = (3, 3, 3, 2)
    truth = enumeration.log_probabilities(
        lambda s: spins.potts_log_weight(s, couplings, bias), n_states
    ).exp()
    index = ((states[:, 0] * 3 + states[:, 1]) * 3 + states[:, 2]) * 2 + states[:, 3]
    share = torch.bincount(index, minlength=54) / len(states)
    assert 0.5 * float((share - truth).abs().sum()) < 0.02


def test_gibbs_keeps_what_is_not_free_and_does_not_touch_its_input():
    couplings, bias = random_potts(n=6)
    states = torch.randint(0, 3, (50, 6), generator=torch.Generator().manual_seed(1))
    before = states.clone()
    free = torch.rand(50, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    colours = spins.colour(torch.ones(6, 6, dtype=torch.bool))
    after = spins.gibbs_sweep(states, couplings, bias, colours, torch.Generator().manual_seed(3), free=free)
    assert torch.equal(states, before)
    assert torch.equal(after[~free], before[~free])
    assert not torch.equal(after, before)


def test_gibbs_at_infinite_temperature_is_uniform():
    couplings, bias = random_potts(n=3)
    states = torch.zeros(30_000, 3, dtype=torch.int64)
    colours = spins.colour(torch.ones(3, 3, dtype=torch.bool))
    states = spins.gibbs_sweep(states, couplings, bias, colours, torch.Generator().manual_seed(0), beta=0.0)
    share = torch.nn.functional.one_hot(states, 3).double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 1 / 3), atol=0.012, rtol=0)


def anneal_potts(seed, n_chains=400, steps=60):
    couplings, bias = random_potts(n=8, k=2, seed=3, scale=1.0)
    colours = spins.colour(torch.ones(8, 8, dtype=torch.bool))
    generator = torch.Generator().manual_seed(seed)
    estimate = spins.annealed_importance_sampling(
        lambda states, beta: beta * spins.potts_log_weight(states, couplings, bias),
        lambda states, beta, g: spins.gibbs_sweep(states, couplings, bias, colours, g, beta=beta),
        torch.randint(0, 2, (n_chains, 8), generator=generator),
        torch.linspace(0, 1, steps).tolist(),
        8 * math.log(2),
        generator,
    )
    truth = enumeration.log_partition(lambda s: spins.potts_log_weight(s, couplings, bias), (2,) * 8)
    return estimate, float(truth)


def test_annealed_importance_sampling_within_its_error_bar():
    scores = []
    for seed in range(8):
        estimate, truth = anneal_potts(seed)
        assert 0 < estimate.standard_error < 0.1
        assert 1 < estimate.effective_chains <= 400
        scores.append((estimate.value - truth) / estimate.standard_error)
    assert max(map(abs, scores)) < 4.0
    assert sum(s * s for s in scores) / len(scores) < 3.0


@pytest.mark.parametrize("betas", [[0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0]])
def test_annealing_needs_a_whole_path(betas):
    with pytest.raises(ValueError, match="from 0 to 1"):
        spins.annealed_importance_sampling(
            lambda x, _b: x.sum(-1), lambda x, _b, _g: x, torch.zeros(2, 2), betas, 0.0, torch.Generator()
        )
