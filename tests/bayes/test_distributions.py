"""The wing's laws against scipy, torch and simulation."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal

from paperback.bayes.distributions import (
    FunctionDraws,
    MultivariateStudentT,
    NormalMixture,
    Rescaled,
    StudentTWithQuantiles,
    in_units,
)
from paperback.errors import DataError, NotSupportedError

D = torch.float64


def mixture():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(5, 3, generator=generator, dtype=D)
    return NormalMixture(mean, 0.1 + mean.abs(), torch.randn(5, generator=generator, dtype=D))


def laws():
    loc, scale = torch.tensor([0.0, 1.0, -2.0], dtype=D), torch.tensor([1.0, 0.5, 3.0], dtype=D)
    student = StudentTWithQuantiles(4.0, loc, scale)
    return {"mixture": mixture(), "student": student, "rescaled": Rescaled(mixture(), loc, scale),
            "normal": in_units(Normal(loc, scale), loc, scale, flat=False)}  # fmt: skip


@pytest.mark.parametrize("name", laws())
def test_icdf_inverts_cdf_and_cdf_integrates_the_density(name):
    law = laws()[name]
    p = torch.tensor([[1e-6], [0.05], [0.5], [0.99]], dtype=D)
    torch.testing.assert_close(law.cdf(law.icdf(p)), p.expand(4, 3), rtol=1e-8, atol=1e-12)
    grid = torch.linspace(-80, 80, 400_001, dtype=D)[:, None]
    density = law.log_prob(grid).exp()
    integral = torch.cumulative_trapezoid(density, grid, dim=0)
    torch.testing.assert_close(integral[200_000], law.cdf(grid[200_001]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", laws())
def test_moments_are_those_of_samples(name):
    law = laws()[name]
    torch.manual_seed(0)
    samples = law.sample((200_000,))
    assert samples.shape == (200_000, 3)
    standard_error = law.stddev / np.sqrt(200_000)
    assert bool(((samples.mean(0) - law.mean).abs() < 4 * standard_error).all())
    torch.testing.assert_close(samples.var(0), law.variance, rtol=0.1, atol=0)


def test_quantiles_have_the_gradients_of_finite_differences():
    p = torch.tensor([0.1, 0.7], dtype=D)
    mean = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: NormalMixture(m, 0.7).icdf(p), mean, eps=1e-6, atol=1e-6)
    scale = torch.tensor([0.5, 2.0], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: StudentTWithQuantiles(3.0, 0.3 * s, s).cdf(p), scale)
    assert torch.autograd.gradcheck(lambda s: StudentTWithQuantiles(3.0, 0.3 * s, s).icdf(p), scale)


def test_mixture_keeps_its_laws_when_it_is_expanded():
    law = mixture()
    wide = law.expand((4, 3))
    value = torch.linspace(-1, 1, 3, dtype=D)
    torch.testing.assert_close(wide.log_prob(value), law.log_prob(value).expand(4, 3))


def test_multivariate_t_is_scipys():
    generator = np.random.default_rng(0)
    factor = generator.normal(size=(3, 3))
    shape, loc = factor @ factor.T + np.eye(3), generator.normal(size=3)
    tril = torch.linalg.cholesky(torch.as_tensor(shape))
    law = MultivariateStudentT(5.0, torch.as_tensor(loc), tril)
    reference = stats.multivariate_t(loc, shape, df=5)
    value = generator.normal(size=(10, 3))
    np.testing.assert_allclose(law.log_prob(torch.as_tensor(value)), reference.logpdf(value))
    torch.manual_seed(0)
    draws = law.rsample((300_000,)).numpy()
    np.testing.assert_allclose(np.cov(draws.T), law.covariance_matrix.numpy(), rtol=0.1, atol=0.1)
    marginal = law.marginal()
    one = stats.t(5, loc[0], np.sqrt(shape[0, 0]))
    np.testing.assert_allclose(marginal.log_prob(torch.zeros(3, dtype=D))[0], one.logpdf(0.0))
    np.testing.assert_allclose(marginal.cdf(torch.zeros(3, dtype=D))[0], one.cdf(0.0))


def test_few_degrees_of_freedom_have_no_moments():
    law = MultivariateStudentT(
        torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.zeros(2, dtype=D), torch.eye(2, dtype=D)
    )
    assert law.mean.isnan().all(1).tolist() == [True, False, False]
    assert law.covariance_matrix.isinf().any(-1).any(-1).tolist() == [True, True, False]
    assert torch.isinf(law.covariance_matrix[1, 0, 0])


def test_function_draws_are_drawn_whole():
    values = torch.arange(12.0).reshape(3, 4)
    draws = FunctionDraws(values).rsample((50,))
    rows = {tuple(row) for row in draws.tolist()}
    assert rows <= {tuple(row) for row in values.tolist()}
    assert len(rows) == 3
    with pytest.raises(NotSupportedError, match="no joint density"):
        FunctionDraws(values).log_prob(values[0])


@pytest.mark.parametrize("make", [
    lambda: Rescaled(Normal(0.0, 1.0), torch.tensor(0.0), torch.tensor(0.0)),
    lambda: NormalMixture(torch.zeros(0, 2), 1.0),
    lambda: NormalMixture(torch.zeros(2, 2), 0.0),
    lambda: MultivariateStudentT(0.0, torch.zeros(2), torch.eye(2)),
    lambda: FunctionDraws(torch.zeros(0, 2)),
])  # fmt: skip
def test_impossible_laws_are_refused(make):
    with pytest.raises(DataError):
        make()
