"""Gaussian expectations and network kernels: closed forms, limits, known sums."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from paperback.errors import DataError
from paperback.numerics.kernels import (
    ScalarFunction,
    arc_cosine,
    arc_sine,
    expectation,
    gaussian_nodes,
    gram_dual,
    kernel_step,
    nngp_and_ntk,
    quadrature,
)

TRIPLES = [(1.0, 1.0, 0.0), (1.0, 2.0, 0.5), (100.0, 0.01, -0.9), (1.0, 1.0, 1.0), (3.0, 3.0, 1 - 1e-9)]


def covariances():
    kxx, kyy, rho = torch.tensor(TRIPLES, dtype=torch.float64).T
    return kxx, rho * (kxx * kyy).sqrt(), kyy


@pytest.mark.parametrize("variance", [1e-4, 1.0, 200.0])
def test_moments_of_a_gaussian(variance):
    z, weights = gaussian_nodes(torch.tensor(variance, dtype=torch.float64))
    assert float(weights.sum()) == pytest.approx(1, abs=1e-13)
    for power, factor in ((2, 1), (4, 3), (6, 15)):
        assert float((weights * z**power).sum()) == pytest.approx(factor * variance ** (power / 2), rel=1e-12)


@pytest.mark.parametrize("function", [torch.tanh, F.hardtanh, F.silu, F.relu6], ids=lambda f: f.__name__)
def test_expectation_agrees_with_adaptive_integration(function):
    s, variance = ScalarFunction(function), 2.3

    def integrand(z):
        value = float(s.square(torch.tensor([z], dtype=torch.float64))[0])
        return value * math.exp(-(z**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    truth = integrate.quad(integrand, -15, 15, points=[-1, 0, 1, 6], epsabs=1e-12)[0]
    assert float(expectation(s.square, variance, s.kinks)) == pytest.approx(truth, abs=1e-10)


def test_the_derivative_of_relu_is_exact_though_it_jumps():
    s = ScalarFunction(F.relu)
    assert float(expectation(s.squared_slope, 0.7, s.kinks)) == pytest.approx(0.5, abs=1e-14)


def test_what_grows_too_fast_has_no_expectation():
    s = ScalarFunction(torch.exp)
    assert float(expectation(s.square, 0.5)) == pytest.approx(math.exp(1.0))
    assert math.isnan(float(expectation(s.square, 40.0)))


@pytest.mark.parametrize(
    ("function", "kinks"),
    [
        (F.relu, [0]), (F.hardtanh, [-1, 1]), (F.relu6, [0, 6]), (F.hardswish, [-3, 3]), (torch.tanh, []),
        (F.elu, []), (lambda z: torch.tanh(50 * z), []), (lambda z: (z - 0.25).abs(), [0.25]),
    ],
)  # fmt: skip
def test_kinks_are_found(function, kinks):
    assert ScalarFunction(function).kinks == pytest.approx(kinks, abs=1e-10)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: z[:3], "shape"),
        (lambda z: z.sum(), "shape"),
        (torch.log, "NaN or infinite"),
        (torch.zeros_like, "zero everywhere"),
        (lambda z: z.softmax(0), "not elementwise"),
        (lambda z: z + torch.rand(z.shape), "not elementwise"),
        (torch.sign, "jumps at 0"),
        (lambda z: z.detach() ** 2, "no derivative"),
    ],
)
def test_bad_activations(function, message):
    with pytest.raises(DataError, match=message):
        ScalarFunction(function)


@pytest.mark.parametrize(
    ("function", "dual"),
    [
        (F.relu, arc_cosine()), (lambda z: z, arc_cosine(1, 1)), (torch.erf, arc_sine),
        (lambda z: F.leaky_relu(z, 0.1), arc_cosine(0.1)), (torch.abs, arc_cosine(-1, 1)),
    ],
)  # fmt: skip
def test_quadrature_agrees_with_the_closed_forms(function, dual):
    for measured, exact in zip(quadrature(function)(*covariances()), dual(*covariances()), strict=True):
        torch.testing.assert_close(measured, exact, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.floats(-0.999, 0.999), st.floats(0.01, 30), st.floats(0.01, 30))
def test_dual_of_a_cubic_is_a_polynomial(rho, kxx, kyy):
    """E z^3 z'^3 = 9 kxx kyy kxy + 6 kxy^3."""
    kxx, kyy = torch.tensor([kxx], dtype=torch.float64), torch.tensor([kyy], dtype=torch.float64)
    kxy = rho * (kxx * kyy).sqrt()
    value, slope = quadrature(CUBE)(kxx, kxy, kyy)
    scale = float((kxx * kyy) ** 1.5)
    assert float(value) == pytest.approx(float(9 * kxx * kyy * kxy + 6 * kxy**3), abs=1e-8 * scale)
    assert float(slope) == pytest.approx(float(9 * (kxx * kyy + 2 * kxy**2)), rel=1e-8)


CUBE = ScalarFunction(lambda z: z**3)


def test_price_theorem_for_an_activation_without_closed_form():
    """d E[s s'] / d kxy = E[ds ds']."""
    dual, step = quadrature(F.gelu), 1e-4
    kxx, kxy, kyy = (torch.tensor([v], dtype=torch.float64) for v in (1.3, 0.6, 0.9))
    difference = (dual(kxx, kxy + step, kyy)[0] - dual(kxx, kxy - step, kyy)[0]) / (2 * step)
    assert float(difference) == pytest.approx(float(dual(kxx, kxy, kyy)[1]), rel=1e-7)


def test_gradients_pass_through_the_closed_form():
    gram = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda g: kernel_step(arc_cosine(), g, 0.1, 1.5), gram.requires_grad_())


def test_gram_dual_is_symmetric_and_its_diagonal_the_variance():
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, slopes = gram_dual(quadrature(torch.tanh), x @ x.mT / 7)
    assert torch.equal(values, values.mT)
    assert torch.equal(slopes, slopes.mT)
    s = ScalarFunction(torch.tanh)
    torch.testing.assert_close(values.diagonal(), expectation(s.square, x.square().mean(1)))


def test_kernels_agree_with_a_wide_network_and_its_jacobian():
    width, source = 4096, torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, dtype=torch.float64, generator=source)
    kernel, tangent = nngp_and_ntk(x, arc_cosine(), depth=2, C_b=0.2, C_W=1.5)
    a = torch.randn(width, 5, dtype=torch.float64, generator=source)
    b = torch.randn(width, dtype=torch.float64, generator=source)
    hidden = x @ a.T * (1.5 / 5) ** 0.5 + b * 0.2**0.5
    active = hidden.relu()
    torch.testing.assert_close(0.2 + 1.5 * active @ active.T / width, kernel, rtol=0.1, atol=0.05)
    slope = (hidden > 0).double()
    back = slope @ slope.T / width * 1.5  # of a readout with variance 1.5 / width
    by_hand = 0.2 + 1.5 * active @ active.T / width + back * (0.2 + 1.5 * x @ x.T / 5)
    torch.testing.assert_close(by_hand, tangent, rtol=0.1, atol=0.05)


def test_deep_linear_network_has_polynomial_kernels():
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kernel, tangent = nngp_and_ntk(x, arc_cosine(1, 1), depth=5, C_b=0.0, C_W=1.0)
    torch.testing.assert_close(kernel, x @ x.T / 3)
    torch.testing.assert_close(tangent, 5 * x @ x.T / 3)


@pytest.mark.parametrize("change", [{"depth": 0}, {"C_W": 0.0}, {"C_b": -0.1}])
def test_bad_arguments(change):
    with pytest.raises(DataError):
        nngp_and_ntk(torch.ones(2, 3), arc_cosine(), **({"depth": 2, "C_b": 0.0, "C_W": 1.0} | change))
