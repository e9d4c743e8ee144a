"""What the study measures networks against must itself be right."""

import math

import pytest
import torch
from torch.distributions import Normal

from paperback.bayes.prior_fitted.exact import gp_posterior
from paperback.bayes.studies.prior_fitted.rivals import LogNormalGP, fit_mle2

GP = LogNormalGP()


def tasks(n, seed=0):
    x, y = GP.prior()(n, 12, torch.Generator().manual_seed(seed))
    return x[:, :5], y[:, :5], x[:, 5:]


def test_the_target_of_hmc_is_marginal_likelihood_times_hyper_prior():
    context_x, context_y, x = tasks(3)
    states = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = gp_posterior(
        context_x,
        context_y,
        x,
        lengthscale=states[:, 0].exp(),
        outputscale=states[:, 1].exp(),
        noise=GP.noise,
    ).log_marginal
    medians, widths = torch.tensor([GP.lengthscale, GP.outputscale]).double().T
    prior = Normal(medians.log(), widths).log_prob(states).sum(1)
    difference = GP.log_density(context_x, context_y)(states) - fit - prior
    torch.testing.assert_close(difference, difference[0].expand(3))


def test_the_hyper_priors_of_the_network_are_those_of_hmc():
    for name, (median, width) in (("lengthscale", GP.lengthscale), ("outputscale", GP.outputscale)):
        low, middle, high = GP.hyper_priors[name].ppf([0.158655, 0.5, 0.841345])
        assert middle == pytest.approx(median)
        assert high / middle == pytest.approx(math.exp(width), rel=1e-4)
        assert middle / low == pytest.approx(math.exp(width), rel=1e-4)


def test_hmc_predicts_as_the_quadrature_does():
    task = tasks(6)
    chains = GP.sample_posterior(
        task[0], task[1], samples=400, burn_in=150, generator=torch.Generator().manual_seed(0)
    )
    sampled, exact = GP.predict_from(chains.samples, *task), GP.exact(*task)
    assert float(((sampled.mean - exact.mean) / exact.stddev).abs().mean()) < 0.1
    assert float((sampled.stddev / exact.stddev - 1).abs().mean()) < 0.1


def test_mle2_finds_a_likelihood_above_its_starts_and_map_stays_near_the_prior():
    context_x, context_y, x = (part[0] for part in tasks(1, seed=3))
    law = fit_mle2(context_x, context_y, x, GP)
    assert law.mean.shape == (7,)

    def marginal(length, variance):
        return float(
            gp_posterior(
                context_x, context_y, x, lengthscale=length, outputscale=variance, noise=GP.noise
            ).log_marginal
        )

    grid = torch.linspace(-4, 4, 81).double().exp()
    best = max((marginal(a * 0.25, b), float(a * 0.25), float(b)) for a in grid[::4] for b in grid[::4])
    near = gp_posterior(context_x, context_y, x, lengthscale=best[1], outputscale=best[2], noise=GP.noise).law
    torch.testing.assert_close(law.mean, near.mean, atol=0.3, rtol=0)
    with_priors = fit_mle2(context_x, context_y, x, GP, with_priors=True)
    assert with_priors.stddev.isfinite().all()
