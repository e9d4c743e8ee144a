import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky, quadratic_form_logcdf


def random_covariance(n, rank, seed=0):
    a = torch.randn(n, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T


# -- quadratic forms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [1, 2, 5, 40, 400])
def test_equal_weights_are_a_chi_square(degrees):
    weights, shifts = torch.full((degrees,), 0.3), torch.zeros(degrees)
    probabilities = np.array([1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9])
    q = 0.3 * stats.chi2.ppf(probabilities, degrees)
    ours = quadratic_form_logcdf(weights, shifts, torch.tensor(q)).numpy()
    exact = stats.chi2.logcdf(q / 0.3, degrees)
    # Of a single squared normal variable the formula knows the probability to 13 % only.
    np.testing.assert_allclose(
        ours, exact, rtol=0.01 if degrees > 1 else 0, atol=0.01 if degrees > 1 else 0.13
    )


def test_far_in_the_tail_where_the_probability_underflows():
    # P(x) = (x/2)^(n/2) exp(-x/2) / Gamma(n/2 + 1) * (1 + x / (n + 2) + x^2 / ((n + 2) (n + 4)) + ...)
    n, x = 600, 6.0
    terms = [1.0]
    for k in range(1, 40):
        terms.append(terms[-1] * x / (n + 2 * k))
    exact = n / 2 * math.log(x / 2) - x / 2 - math.lgamma(n / 2 + 1) + math.log(sum(terms))
    assert exact < -1000
    ours = quadratic_form_logcdf(torch.ones(n), torch.zeros(n), x)
    assert float(ours) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(("degrees", "noncentrality"), [(3, 5.0), (20, 100.0), (0.7, 12.0), (500, 30.0)])
def test_one_term_is_a_noncentral_chi_square(degrees, noncentrality):
    q = stats.ncx2.ppf([1e-6, 1e-3, 0.1, 0.5, 0.9], degrees, noncentrality)
    ours = quadratic_form_logcdf(
        torch.ones(1), torch.tensor([noncentrality**0.5]), torch.tensor(q), degrees=torch.tensor([degrees])
    )
    np.testing.assert_allclose(ours, stats.ncx2.logcdf(q, degrees, noncentrality), rtol=0.015, atol=0.02)


def test_degrees_stand_for_repeated_terms():
    weights, shifts = torch.tensor([[1.0, 0.2], [1.5, 0.4]], dtype=torch.float64)
    repeated = quadratic_form_logcdf(weights.repeat(3), shifts.repeat(3), 2.0)
    counted = quadratic_form_logcdf(weights, shifts * 3**0.5, 2.0, degrees=torch.tensor([3.0, 3.0]))
    assert float(repeated) == pytest.approx(float(counted), rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_million_draws(seed):
    rng = np.random.default_rng(seed)
    weights, shifts = rng.exponential(size=12), rng.normal(size=12)
    draws = np.concatenate(
        [(weights * (rng.standard_normal((100_000, 12)) + shifts) ** 2).sum(1) for _ in range(10)]
    )
    for probability in (1e-3, 0.5, 0.99):
        q = np.quantile(draws, probability)
        ours = float(quadratic_form_logcdf(torch.tensor(weights), torch.tensor(shifts), float(q)).exp())
        error = math.sqrt(probability * (1 - probability) / len(draws))
        assert abs(ours - probability) < 4 * error + 0.03 * probability


def test_it_is_a_distribution_function_through_the_mean():
    weights, shifts = torch.tensor([1.0, 0.5, 0.01]), torch.tensor([0.3, -2.0, 0.0])
    mean = float((weights * (1 + shifts**2)).sum())
    q = torch.cat([mean + torch.linspace(-1e-3, 1e-3, 41, dtype=torch.float64), torch.logspace(-6, 3, 200)])
    logs = quadratic_form_logcdf(weights, shifts, q.double().sort().values)
    assert bool((logs.diff() >= 0).all())
    assert bool((logs <= 0).all())
    # No step where the limit at the mean takes over.
    near = quadratic_form_logcdf(weights, shifts, mean + torch.tensor([-2e-4, -1e-4, 0, 1e-4, 2e-4]).double())
    assert float(near.diff().std() / near.diff().mean()) < 1e-2


def test_a_constant_shifts_and_terms_of_weight_zero_do_not_matter():
    weights, shifts = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 7.0])
    with_constant = quadratic_form_logcdf(weights, shifts, 3.5, constant=3.0)
    assert float(with_constant) == pytest.approx(float(quadratic_form_logcdf(weights[:1], shifts[:1], 0.5)))
    assert float(quadratic_form_logcdf(weights, shifts, 3.0, constant=3.0)) == -math.inf
    step = quadratic_form_logcdf(torch.zeros(2), shifts, torch.tensor([2.9, 3.0, 3.1]), constant=3.0)
    assert step.tolist() == [-math.inf, 0.0, 0.0]


def test_infinity_is_certain_and_the_shape_is_kept():
    q = torch.tensor([[math.inf, 1.0], [0.0, -1.0]])
    logs = quadratic_form_logcdf(torch.ones(3), torch.zeros(3), q)
    assert logs.shape == (2, 2)
    assert float(logs[0, 0]) == 0.0
    assert logs[1].tolist() == [-math.inf, -math.inf]


def test_bad_quadratic_forms_are_one_sentence():
    with pytest.raises(DataError, match="one number per term"):
        quadratic_form_logcdf(torch.ones(3), torch.ones(2), 1.0)
    with pytest.raises(DataError, match="weights >= 0"):
        quadratic_form_logcdf(torch.tensor([1.0, -1e-9]), torch.ones(2), 1.0)
    with pytest.raises(DataError, match="finite"):
        quadratic_form_logcdf(torch.tensor([1.0, math.nan]), torch.ones(2), 1.0)
    with pytest.raises(DataError, match="NaN"):
        quadratic_form_logcdf(torch.ones(2), torch.ones(2), math.nan)


# -- Cholesky ------------------------------------------------------------------------------------------------


def test_a_good_matrix_gets_no_jitter():
    matrix = random_covariance(6, 9)
    factor = cholesky(matrix)
    assert float(factor.jitter) == 0.0
    torch.testing.assert_close(factor.lower @ factor.lower.T, matrix)


def test_a_singular_matrix_gets_as_little_as_it_needs():
    matrix = random_covariance(30, 5)
    factor = cholesky(matrix)
    mean = float(matrix.diagonal().mean())
    assert 0 < float(factor.jitter) <= 1e-7 * mean
    rebuilt = matrix + factor.jitter * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(factor.lower @ factor.lower.T, rebuilt)


def test_each_matrix_of_a_batch_has_its_own_jitter():
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    factor = cholesky(torch.stack([torch.eye(3, dtype=torch.float64), indefinite]))
    assert float(factor.jitter[0]) == 0.0
    assert float(factor.jitter[1]) > 1e-5


def test_gradients_flow_through_the_factor():
    matrix = random_covariance(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: cholesky((m + m.T) / 2).lower.tril(), matrix)


def test_what_cannot_be_factorised_is_named_with_its_condition_and_the_remedy():
    matrix = torch.diag(torch.tensor([1.0, -0.5]))
    with pytest.raises(DataError, match=r"kernel matrix \(2 x 2\).*-5\.00e-01 to 1\.00e\+00.*shorten it"):
        cholesky(matrix, "kernel matrix", remedy="shorten it")
    with pytest.raises(DataError, match="not symmetric"):
        cholesky(torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(DataError, match="square"):
        cholesky(torch.ones(2, 3))
    with pytest.raises(DataError, match="not finite"):
        cholesky(torch.tensor([[math.nan]]))
