"""HMC and SGHMC against distributions known in closed form; the diagnostics against known autocorrelation."""

import math

import pytest
import torch

from paperback.bayes.samplers import effective_sample_size, hmc, leapfrog, r_hat, sghmc
from paperback.errors import DataError

COVARIANCE = torch.tensor([[1.0, 0.9], [0.9, 2.0]], dtype=torch.float64)
PRECISION = torch.linalg.inv(COVARIANCE)


def gaussian(theta):
    return -((theta @ PRECISION) * theta).sum(1) / 2


def quartic(theta):
    return -theta.pow(4).sum(1) / 4 - theta.prod(1) / 3


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def zeros(chains, d=2):
    return torch.zeros(chains, d, dtype=torch.float64)


def ar1(rho, n, chains, seed=0):
    noise = torch.randn(n, chains, generator=source(seed), dtype=torch.float64)
    rows = [noise[0]]
    for step in noise[1:]:
        rows.append(rho * rows[-1] + math.sqrt(1 - rho**2) * step)
    return torch.stack(rows)


# -- trajectories --------------------------------------------------------------------------------------------


def test_leapfrog_run_backwards_returns_to_its_start():
    start, momentum = torch.randn(2, 5, 2, generator=source(), dtype=torch.float64)
    theta, r = leapfrog(quartic, start, momentum, 0.1, 30)
    back, minus = leapfrog(quartic, theta, -r, 0.1, 30)
    torch.testing.assert_close(back, start, atol=1e-10, rtol=0)
    torch.testing.assert_close(-minus, momentum, atol=1e-10, rtol=0)


def test_energy_error_falls_with_the_square_of_the_step_size():
    start, momentum = torch.randn(2, 200, 2, generator=source(1), dtype=torch.float64)

    def error(step):
        theta, r = leapfrog(quartic, start, momentum, step, round(1 / step))
        change = r.square().sum(1) / 2 - quartic(theta) - momentum.square().sum(1) / 2 + quartic(start)
        return change.abs().mean()

    steps = [0.02, 0.01, 0.005]
    errors = [error(step) for step in steps]
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])
    assert slope == pytest.approx(2, abs=0.2)


# -- hmc -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [{"leapfrog_steps": 5}, {"path_length": 2.0}])
def test_hmc_finds_the_covariance_of_a_gaussian(path):
    chains = hmc(gaussian, zeros(8), samples=1500, burn_in=300, step_size=0.1, generator=source(), **path)
    assert chains.samples.shape == (1500, 8, 2)
    pooled = chains.samples.flatten(0, 1)
    torch.testing.assert_close(pooled.T.cov(), COVARIANCE, atol=0.12, rtol=0)
    torch.testing.assert_close(pooled.mean(0), torch.zeros(2).double(), atol=0.1, rtol=0)
    assert bool((r_hat(chains.samples) < 1.05).all())
    torch.testing.assert_close(chains.log_density, gaussian(pooled).reshape(1500, 8))


def test_posterior_of_bayesian_linear_regression():
    x = torch.randn(30, 3, generator=source(2), dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.3 * torch.randn(30, generator=source(3)).double()
    precision = x.T @ x / 0.09 + torch.eye(3) / 4.0
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (x.T @ y) / 0.09

    def density(theta):
        return -(y - theta @ x.T).square().sum(1) / 0.18 - theta.square().sum(1) / 8

    run = hmc(
        density,
        zeros(16, 3),
        samples=1000,
        burn_in=300,
        step_size=0.02,
        leapfrog_steps=10,
        generator=source(),
    )
    pooled = run.samples.flatten(0, 1)
    scale = covariance.diagonal().sqrt()
    assert bool(((pooled.mean(0) - mean).abs() < 0.05 * scale).all())
    correlation = (pooled.T.cov() - covariance) / torch.outer(scale, scale)
    assert float(correlation.abs().max()) < 0.05


def test_step_size_adapts_to_the_acceptance_that_is_asked_for():
    tight, loose = (
        hmc(
            lambda theta: -theta.square().sum(1) / 2,
            zeros(16, 50),
            samples=300,
            burn_in=500,
            step_size=3.0,
            leapfrog_steps=3,
            target_acceptance=target,
            jitter=0.0,
            generator=source(),
        )
        for target in (0.95, 0.65)
    )
    assert float(tight.acceptance.mean()) == pytest.approx(0.95, abs=0.05)
    assert float(loose.acceptance.mean()) == pytest.approx(0.65, abs=0.1)
    assert float(tight.step_size.mean()) < float(loose.step_size.mean())


def test_without_burn_in_the_step_size_stays():
    run = hmc(gaussian, zeros(2), samples=5, burn_in=0, step_size=0.05, leapfrog_steps=2, generator=source())
    torch.testing.assert_close(run.step_size, torch.full((2,), 0.05).double())


def test_a_path_of_more_than_200_steps_is_halved():
    calls = []

    def counted(theta):
        calls.append(1)
        return gaussian(theta)

    hmc(
        counted,
        zeros(1),
        samples=1,
        burn_in=0,
        step_size=0.01,
        path_length=5.0,
        jitter=0.0,
        generator=source(),
    )
    assert len(calls) == 1 + 125  # 500 steps, halved to 250 and to 125


def test_chains_do_not_depend_on_each_other():
    """A chain beside one that sits in another place moves as beside any other."""
    start = torch.tensor([[0.0, 0.0], [3.0, 3.0]]).double()
    moved = torch.tensor([[0.0, 0.0], [-5.0, 1.0]]).double()
    runs = [
        hmc(gaussian, s, samples=50, burn_in=0, step_size=0.3, leapfrog_steps=3, generator=source())
        for s in (start, moved)
    ]
    torch.testing.assert_close(runs[0].samples[:, 0], runs[1].samples[:, 0])


def test_a_step_into_a_region_without_density_is_rejected():
    def half(theta):
        return torch.where(theta[:, 0] > 0, -theta.square().sum(1) / 2, -math.inf)

    start = zeros(4) + 0.5
    run = hmc(half, start, samples=400, burn_in=100, step_size=0.3, leapfrog_steps=3, generator=source())
    assert bool((run.samples[..., 0] > 0).all())
    assert float(run.samples[..., 0].mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.15)


def test_same_generator_same_chains():
    settings = {"samples": 20, "burn_in": 20, "step_size": 0.1, "leapfrog_steps": 3}
    one, two = (hmc(gaussian, zeros(3), generator=source(5), **settings) for _ in range(2))
    assert torch.equal(one.samples, two.samples)


# -- sghmc ---------------------------------------------------------------------------------------------------


def test_sghmc_finds_the_covariance_of_a_gaussian():
    run = sghmc(
        lambda theta, _: gaussian(theta),
        zeros(32),
        steps=5000,
        burn_in=1000,
        keep_every=5,
        lr=0.1,
        gradient_noise=False,
        generator=source(),
    )
    assert run.samples.shape == (800, 32, 2)
    torch.testing.assert_close(run.samples.flatten(0, 1).T.cov(), COVARIANCE, atol=0.12, rtol=0)


def test_sghmc_takes_noisy_gradients():
    def noisy(theta, generator):
        kick = 0.5 * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        return gaussian(theta) + (kick * theta).sum(1)

    run = sghmc(noisy, zeros(32), steps=4000, burn_in=1000, lr=0.05, generator=source())
    torch.testing.assert_close(run.samples.flatten(0, 1).T.cov(), COVARIANCE, atol=0.25, rtol=0)


# -- diagnostics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregression(rho):
    exact = 16000 * (1 - rho) / (1 + rho)
    assert float(effective_sample_size(ar1(rho, 4000, 4))) == pytest.approx(exact, rel=0.15)


def test_antithetic_chains_are_worth_more_than_their_length():
    assert float(effective_sample_size(ar1(-0.5, 4000, 4))) > 1.5 * 16000


def test_r_hat_sees_chains_that_disagree_in_place_or_in_width():
    good = ar1(0.5, 1000, 4)
    shifted = good + torch.tensor([0.0, 0.0, 0.0, 2.0])
    wider = good * torch.tensor([1.0, 1.0, 1.0, 3.0])
    assert float(r_hat(good)) < 1.02
    assert float(r_hat(shifted)) > 1.1
    assert float(r_hat(wider)) > 1.1


def test_r_hat_sees_a_drift_within_chains():
    drift = ar1(0.0, 1000, 4) + torch.linspace(-2, 2, 1000)[:, None]
    assert float(r_hat(drift)) > 1.3


def test_diagnostics_do_not_change_under_monotone_maps_and_take_vectors():
    draws = torch.stack([ar1(0.5, 400, 4, seed) for seed in range(3)], -1)
    for measure in (r_hat, effective_sample_size):
        values = measure(draws)
        assert values.shape == (3,)
        torch.testing.assert_close(values[1], measure(draws[..., 1]))
    torch.testing.assert_close(effective_sample_size(draws), effective_sample_size(draws.exp()))


# -- bad input -----------------------------------------------------------------------------------------------

HMC = {"samples": 5, "burn_in": 0, "step_size": 0.1, "leapfrog_steps": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "0 samples"),
        ({"burn_in": -1}, "-1 of burn-in"),
        ({"step_size": 0.0}, "step size 0.0"),
        ({"leapfrog_steps": 0}, "leapfrog_steps is 0"),
        ({"path_length": 1.0}, "exactly one"),
        ({"target_acceptance": 1.0}, "target_acceptance is 1.0"),
    ],
)
def test_hmc_names_a_bad_argument(change, message):
    with pytest.raises(DataError, match=message):
        hmc(gaussian, zeros(2), generator=source(), **(HMC | change))


def test_hmc_names_a_bad_start_and_a_bad_density():
    with pytest.raises(DataError, match="start has shape"):
        hmc(gaussian, torch.zeros(2), generator=source(), **HMC)
    with pytest.raises(DataError, match="no finite log density"):
        hmc(lambda t: t.sum(1).log() - 1, zeros(2) - 1, generator=source(), **HMC)
    with pytest.raises(DataError, match="one number for each"):
        hmc(lambda t: t.square(), zeros(2), generator=source(), **HMC)


def test_sghmc_names_bad_arguments_and_runaway_chains():
    with pytest.raises(DataError, match="keep_every is 10"):
        sghmc(lambda t, _: gaussian(t), zeros(2), steps=12, burn_in=5, keep_every=10, generator=source())
    with pytest.raises(DataError, match="ran away"):
        sghmc(lambda t, _: t.pow(4).sum(1), zeros(2) + 1, steps=500, burn_in=1, lr=1.0, generator=source())


def test_diagnostics_need_four_samples():
    for measure in (r_hat, effective_sample_size):
        with pytest.raises(DataError, match="at least 4"):
            measure(torch.zeros(3, 2))
