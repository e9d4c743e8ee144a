"""Priors of the scale and the integrals over it, against scipy's laws and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from paperback.bayes.scale_mixture_nngp.scale_prior import (
    BurrXII,
    Exponential,
    HalfCauchy,
    InverseGamma,
    PointMass,
    Sampler,
    importance_nodes,
    inverse_gamma_evidence,
    log_evidence,
    log_grid,
    log_likelihood,
    posterior_nodes,
    scale_prior,
    spec_of,
)
from paperback.errors import DataError

D = torch.float64
PRIORS = {
    "inverse-gamma": (InverseGamma(2.5, 1.5), stats.invgamma(2.5, scale=1.5)),
    "burr": (BurrXII(2.0, 1.5), stats.burr12(2.0, 1.5)),
    "exponential": (Exponential(0.7), stats.expon(scale=1 / 0.7)),
}


def number(value):
    return torch.tensor(value, dtype=D)


@pytest.mark.parametrize("name", PRIORS)
def test_densities_and_draws_are_scipys(name):
    prior, reference = PRIORS[name]
    s2 = torch.linspace(0.05, 9, 40, dtype=D)
    np.testing.assert_allclose(prior.log_prob(s2), reference.logpdf(s2.numpy()), rtol=1e-10)
    draws = prior.sample(4000, torch.Generator().manual_seed(0)).numpy()
    assert stats.kstest(draws, reference.cdf).pvalue > 0.001


def test_half_cauchy_is_the_law_of_a_squared_half_cauchy_variable():
    prior = HalfCauchy(1.7)
    draws = prior.sample(4000, torch.Generator().manual_seed(0)).sqrt().numpy()
    assert stats.kstest(draws, stats.halfcauchy(scale=1.7).cdf).pvalue > 0.001
    s2 = torch.linspace(0.1, 9, 20, dtype=D)
    by_hand = stats.halfcauchy(scale=1.7).logpdf(s2.sqrt().numpy()) - np.log(2 * s2.sqrt().numpy())
    np.testing.assert_allclose(prior.log_prob(s2), by_hand)


@pytest.mark.parametrize(("n", "q"), [(0.0, 0.0), (1.0, 0.3), (20.0, 55.0), (3000.0, 10.0), (50.0, 1e6)])
def test_quadrature_equals_the_closed_form(n, q):
    prior = InverseGamma(2.0, 3.0)
    q, n, log_det = number([q]), number([n]), number([1.3])
    u, log_step = log_grid(prior, q, n)
    s2 = u.exp()
    by_grid = prior.log_prob(s2) + u + log_likelihood(s2, q[:, None], log_det[:, None], n[:, None]) + log_step
    closed = inverse_gamma_evidence(number(2.0), number(3.0), q, log_det, n)
    torch.testing.assert_close(by_grid.logsumexp(-1), closed, rtol=1e-8, atol=1e-8)
    points = posterior_nodes(prior, q[0], n[0])
    a, b = 2.0 + float(n) / 2, 3.0 + float(q) / 2
    assert float(points.mean) == pytest.approx(b / (a - 1), rel=1e-8)
    if a > 3:  # else the tails beyond the grid count in the second moment
        assert float(points.variance) == pytest.approx((b / (a - 1)) ** 2 / (a - 2), rel=1e-6)


@pytest.mark.parametrize("prior", [HalfCauchy(1.0), BurrXII(2.0, 1.0), Exponential(1.0)])
def test_evidence_is_scipys_integral(prior):
    q, log_det, n = 7.0, 0.4, 6.0

    def integrand(u):
        s2 = number(math.exp(u))
        value = prior.log_prob(s2) + u + log_likelihood(s2, number(q), number(log_det), number(n))
        return float(value.exp())

    expected, _ = integrate.quad(integrand, -30, 30, epsabs=0, epsrel=1e-10, limit=500)
    value = log_evidence(prior, number([q]), number([log_det]), number([n]))
    assert float(value) == pytest.approx(math.log(expected), abs=1e-8)


def test_importance_sampling_agrees_with_the_posterior():
    prior = InverseGamma(2.0, 2.0)
    q, n = number(8.0), number(10.0)
    points = importance_nodes(prior, q, n, 100_000, torch.Generator().manual_seed(0))
    exact = torch.distributions.InverseGamma(number(7.0), number(6.0))
    assert float(points.mean) == pytest.approx(float(exact.mean), rel=0.01)
    assert 1000 < points.effective_size < 100_000
    drawn = points.sample((20_000,))
    assert float(drawn.mean()) == pytest.approx(float(exact.mean), rel=0.05)


def test_evidence_has_the_gradients_of_finite_differences():
    n = number([5.0, 12.0])
    q, log_det = number([3.0, 20.0]).requires_grad_(), number([0.2, -1.0]).requires_grad_()
    for prior in (HalfCauchy(), InverseGamma(), PointMass(0.5)):
        assert torch.autograd.gradcheck(lambda a, b, prior=prior: log_evidence(prior, a, b, n), (q, log_det))


def test_specifications_come_and_go():
    for spec in (("inverse-gamma", 2.0, 3.0), ("burr", 2.0, 1.0), ("half-cauchy", 0.5), ("point", 1.0)):
        assert spec_of(scale_prior(spec)) == list(spec)
    assert scale_prior("exponential") == Exponential(1.0)
    assert isinstance(scale_prior(lambda n, g: torch.rand(n, generator=g)), Sampler)


@pytest.mark.parametrize("spec", [
    "gamma", ("inverse-gamma", -1.0, 1.0), ("inverse-gamma", 0.0, 1.0), ("burr", 1.0, 2.0, 3.0),
    ("exponential", math.inf), InverseGamma(1.0, -2.0),
])  # fmt: skip
def test_impossible_priors(spec):
    with pytest.raises(DataError):
        scale_prior(spec)


def test_a_sampler_is_checked_and_has_no_density():
    with pytest.raises(DataError, match="positive"):
        Sampler(lambda n, g: -torch.ones(n)).sample(3, torch.Generator())
    with pytest.raises(DataError, match="no density"):
        Sampler(lambda n, g: torch.ones(n)).log_prob(torch.ones(2))
