"""The Riemann distribution against quadrature and draws."""

import math

import pytest
import torch

from paperback.bayes.prior_fitted import RiemannDistribution, quantile_borders
from paperback.errors import DataError


def law(batch=3, bars=8, seed=0, loc=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    widths = 0.1 + torch.rand(bars + 1, generator=generator, dtype=torch.float64)
    borders = widths.cumsum(0) - widths.sum() / 2
    logits = torch.randn(batch, bars, generator=generator, dtype=torch.float64)
    return RiemannDistribution(logits, borders, loc, scale)


@pytest.fixture
def draws():
    torch.manual_seed(0)
    distribution = law(loc=torch.tensor([0.0, 2.0, -1.0]), scale=torch.tensor([1.0, 0.5, 3.0]))
    return distribution, distribution.sample((100_000,))


def test_density_integrates_to_one_with_its_tails():
    distribution = law()
    y = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = distribution.log_prob(y[:, None]).exp()
    torch.testing.assert_close(
        torch.trapezoid(density, y, dim=0), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_half_of_a_tail_lies_within_its_bar():
    distribution = law()
    for outer in (0, -1):
        low, high = sorted([distribution.borders[outer], distribution.borders[1 if outer == 0 else -2]])
        mass = distribution.cdf(high) - distribution.cdf(low)
        torch.testing.assert_close(mass, distribution.probs[:, outer] / 2)


def test_cdf_is_the_integral_of_the_density():
    distribution = law()
    y = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(distribution.log_prob(y[:, None]).exp(), y, dim=0)
    torch.testing.assert_close(distribution.cdf(y[1:, None]), integral, atol=2e-3, rtol=0)


def test_log_prob_is_finite_on_borders_and_far_away():
    distribution = law()
    values = torch.cat([distribution.borders, torch.tensor([-100.0, 100.0])])
    assert distribution.log_prob(values[:, None]).isfinite().all()
    assert law(bars=8).log_prob(torch.tensor(1e6)).isfinite().all()


def test_icdf_inverts_cdf():
    distribution = law(loc=torch.tensor([0.0, 2.0, -1.0]), scale=torch.tensor([1.0, 0.5, 3.0]))
    u = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)[:, None].expand(500, 3)
    torch.testing.assert_close(distribution.cdf(distribution.icdf(u)), u)


def test_icdf_takes_one_probability_for_all_and_more_dimensions():
    distribution = law()
    one = distribution.icdf(torch.tensor(0.3))
    assert one.shape == (3,)
    torch.testing.assert_close(distribution.icdf(torch.full((4, 2, 3), 0.3)), one.expand(4, 2, 3))


def test_moments_and_quantiles_agree_with_draws(draws):
    distribution, y = draws
    error = y.std(0) / math.sqrt(len(y))
    assert ((y.mean(0) - distribution.mean).abs() < 4 * error).all()
    fourth = (y - distribution.mean).pow(4).mean(0)
    error = ((fourth - distribution.variance**2) / len(y)).sqrt()
    assert ((y.var(0) - distribution.variance).abs() < 4 * error).all()
    share = (y < distribution.icdf(torch.tensor(0.2))).double().mean(0)
    torch.testing.assert_close(share, torch.full((3,), 0.2).double(), atol=0.006, rtol=0)


@pytest.mark.parametrize("best", [-9.0, -2.5, -0.3, 0.4, 1.7, 6.0])
@pytest.mark.parametrize("maximize", [True, False])
def test_expected_improvement_against_draws(draws, best, maximize):
    distribution, y = draws
    gain = (y - best if maximize else best - y).clamp_min(0)
    error = gain.std(0) / math.sqrt(len(y)) + 1e-6
    assert ((distribution.ei(best, maximize=maximize) - gain.mean(0)).abs() < 4 * error).all()


def test_expected_improvement_is_the_integral_of_the_survival_function():
    distribution = law()
    for best in (-6.0, -1.234, 0.0, 0.77, 4.0):
        y = torch.linspace(best, best + 60, 200_001, dtype=torch.float64)
        survival = torch.trapezoid(1 - distribution.cdf(y[:, None]), y, dim=0)
        torch.testing.assert_close(distribution.ei(best), survival, atol=1e-5, rtol=0)


def test_draws_carry_gradients():
    logits = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    distribution = RiemannDistribution(logits, torch.linspace(-1, 1, 7))
    u = torch.tensor([0.37, 0.95], dtype=torch.float64)

    def quantile(parameters):
        return RiemannDistribution(parameters, torch.linspace(-1, 1, 7)).icdf(u)

    assert torch.autograd.gradcheck(quantile, (logits,))
    distribution.rsample((5,)).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_bars_are_equally_likely_and_uniform_logits_give_the_prior_entropy():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(100_000, generator=generator, dtype=torch.float64)
    borders = quantile_borders(y, 50)
    fresh = torch.randn(50_000, generator=generator, dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(fresh, borders[1:-1]), minlength=50).double()
    assert ((counts - 1000).abs() < 5 * math.sqrt(1000)).all()
    entropy = -RiemannDistribution(torch.zeros(1, 50), borders).log_prob(fresh).mean()
    assert abs(float(entropy) - 0.5 * math.log(2 * math.pi * math.e)) < 0.03


def test_bad_borders_and_targets_are_refused():
    with pytest.raises(DataError, match="rise"):
        RiemannDistribution(torch.zeros(1, 3), torch.tensor([0.0, 1.0, 1.0, 2.0]))
    with pytest.raises(DataError, match="one border more"):
        RiemannDistribution(torch.zeros(1, 3), torch.linspace(0, 1, 3))
    with pytest.raises(DataError, match="scale"):
        RiemannDistribution(torch.zeros(1, 3), torch.linspace(0, 1, 4), 0.0, 0.0)
    with pytest.raises(DataError, match="equal values"):
        quantile_borders(torch.zeros(1000), 10)
    with pytest.raises(DataError, match="10 targets"):
        quantile_borders(torch.arange(50.0), 10)
