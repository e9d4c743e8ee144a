"""Critical points: published numbers, classes, and what the theory's identities demand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperback.errors import DataError
from paperback.numerics.kernels import ScalarFunction, arc_cosine, expectation, gram_dual
from paperback.theory.criticality import Criticality


def recommended(function, **settings):
    return Criticality(function, **settings).recommended


@pytest.mark.parametrize(
    ("function", "kind", "K", "C_b", "C_W"),
    [
        (F.relu, "scale-invariant", 1, 0, 2),
        (lambda z: z, "scale-invariant", 1, 0, 1),
        (lambda z: F.leaky_relu(z, 0.1), "scale-invariant", 1, 0, 2 / 1.01),
        (torch.tanh, "K*=0", 0, 0, 1),
        (torch.erf, "K*=0", 0, 0, math.pi / 4),
        (F.gelu, "K*>0", (3 + math.sqrt(17)) / 2, 0.1729224, 1.9830583),
        (F.silu, "K*>0", 14.320174, 0.5551432, 1.9880047),
    ],
)
def test_published_critical_points(function, kind, K, C_b, C_W):
    point = recommended(function)
    assert point.kind == kind
    assert (point.K, point.C_b, point.C_W) == pytest.approx((K, C_b, C_W), abs=1e-6)


@pytest.mark.parametrize(("function", "a1", "b1"), [(torch.tanh, -2, -2), (torch.sin, -1, -1)])
def test_expansion_at_zero(function, a1, b1):
    point = recommended(function)
    assert (point.a1, point.b1, point.exponent) == pytest.approx((a1, b1, 1), abs=1e-6)
    assert point.stability == "from above"


def test_gelu_has_an_unstable_point_at_zero_too():
    first, second = Criticality(F.gelu).analyse()
    assert (first.kind, first.stability) == ("K*>0", "from above")
    assert (second.kind, second.stable) == ("K*=0", False)
    assert (second.a1, second.b1) == pytest.approx((6 / math.pi, 8 / math.pi), rel=1e-7)


def test_elu_expands_in_the_root_of_K():
    """s = z + z^2/2 for z < 0: g = K - E[|z|^3; z < 0] = K - sqrt(2 / pi) K^1.5."""
    point = recommended(F.elu)
    assert (point.exponent, point.stability) == (0.5, "from above")
    assert point.a1 == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-3)
    assert pytest.approx(2 / (1.0507010**2 * (1 + 1.6732632**2)), rel=1e-6) == recommended(F.selu).C_W


def test_piecewise_linear_about_zero():
    for function, c_w in ((F.hardtanh, 1.0), (F.relu6, 2.0)):
        point = recommended(function)
        assert (point.kind, point.a1, point.stability) == ("K*=0", 0, "from above")
        assert pytest.approx(c_w, abs=1e-10) == point.C_W


@pytest.mark.parametrize("function", [torch.sigmoid, F.softplus, torch.cos])
def test_activations_without_a_critical_point_get_a_fixed_point_nearby(function):
    theory = Criticality(function)
    point = theory.recommended
    assert point.kind == "none"
    assert theory.step(point.K, point.C_b, point.C_W) == pytest.approx(point.K, rel=1e-9)
    par, perp, _ = theory.susceptibilities(point.K, point.C_b, point.C_W)
    assert (point.chi_par, point.chi_perp) == pytest.approx((par, perp), abs=1e-9)
    distance = abs(par - 1) + abs(perp - 1)
    assert distance > 1e-3
    assert "no critical initialisation" in theory.describe()
    for K in (0.1, 1.0, 10.0):  # no other fixed point with C_b = 0 is better
        c_w = K / theory.expected_square(K)
        other_par, other_perp, _ = theory.susceptibilities(K, 0.0, c_w)
        assert distance <= abs(other_par - 1) + abs(other_perp - 1) + 1e-6


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.hardswish, F.mish], ids=lambda f: f.__name__)
def test_recommended_points_fulfil_the_three_equations(function):
    theory = Criticality(function, residual=0.6)
    point = theory.recommended
    assert theory.step(point.K, point.C_b, point.C_W) == pytest.approx(point.K, rel=1e-10)
    assert theory.susceptibilities(point.K, point.C_b, point.C_W)[:2] == pytest.approx((1, 1), abs=1e-9)


@pytest.mark.parametrize("function", [torch.tanh, F.gelu, F.relu, F.hardtanh], ids=lambda f: f.__name__)
def test_susceptibilities_are_derivatives(function):
    theory, K, step = Criticality(function), 1.7, 1e-4
    par, perp, h = theory.susceptibilities(K, 0.1, 1.3)
    low, high = theory.expected_square(K - step), theory.expected_square(K + step)
    assert 1.3 * (high - low) / (2 * step) == pytest.approx(par, abs=1e-6)
    s = theory.activation
    other = expectation(lambda z: z * s(z) * s.derivative(z), K, s.kinks) / K
    assert 1.3 * float(other) == pytest.approx(par, abs=1e-6)
    slopes = [theory.susceptibilities(k, 0.1, 1.3)[1] for k in (K - step, K + step)]
    assert (slopes[1] - slopes[0]) / (4 * step) == pytest.approx(h, abs=1e-5)
    assert 1.3 * float(expectation(s.squared_slope, K, s.kinks)) == pytest.approx(perp, abs=1e-12)


def test_scale_equivariance_of_relu():
    theory = Criticality(F.relu)
    assert theory.expected_square(9 * 0.37) == pytest.approx(9 * theory.expected_square(0.37), rel=1e-13)


def test_modules_are_taken_in_float64_and_left_as_they_are():
    prelu = nn.PReLU(init=0.5)
    assert pytest.approx(2 / 1.25) == recommended(prelu).C_W
    assert prelu.weight.dtype == torch.float32


def test_gram_flow_is_the_arc_cosine_recursion():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = 0.1 + 2 * x @ x.T / 6
    flow = Criticality(F.relu).gram_flow(gram, 0.1, 2.0, 3)
    expected = gram
    for layer in flow:
        torch.testing.assert_close(layer, expected, rtol=1e-10, atol=1e-10)
        expected = 0.1 + 2 * gram_dual(arc_cosine(), expected)[0]


def test_gram_flow_with_skips_keeps_a_critical_diagonal():
    theory = Criticality(F.gelu, residual=0.5)
    point = theory.recommended
    gram = torch.tensor([[point.K, 1.0], [1.0, point.K]], dtype=torch.float64)
    diagonals = theory.gram_flow(gram, point.C_b, point.C_W, 4).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonals, torch.full_like(diagonals, point.K), rtol=1e-10, atol=0)


def test_kernel_of_tanh_falls_as_a_power():
    """K(l) -> 1 / (2 l), for a1 = -2."""
    flow = Criticality(torch.tanh).flow(1.0, 0.0, 1.0, 400, 100)
    assert 1 / (2 * 400 * flow.K[-1]) == pytest.approx(1, abs=0.02)
    slope = np.log(flow.K[399] / flow.K[199]) / np.log(2)
    assert slope == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": 1.0}, "residual"), ({"residual": -0.1}, "residual"),
        ({"residual": math.nan}, "residual"),
        ({"K_range": (0.0, 1.0)}, "K_range"), ({"K_range": (2.0, 1.0)}, "K_range"),
    ],
)  # fmt: skip
def test_bad_settings(change, message):
    with pytest.raises(DataError, match=message):
        Criticality(torch.tanh, **change)


@pytest.mark.parametrize("arguments", [(0.0, 0.0, 1.0), (1.0, -0.1, 1.0), (1.0, 0.0, 0.0)])
def test_bad_susceptibility_arguments(arguments):
    with pytest.raises(DataError):
        Criticality(torch.tanh).susceptibilities(*arguments)


def test_bad_activation_is_named():
    with pytest.raises(DataError, match="Softmax"):
        Criticality(nn.Softmax(0))
    with pytest.raises(DataError, match="zero everywhere"):
        Criticality(lambda z: 0 * z)


def test_kinks_are_looked_for_as_far_as_the_largest_variance_reaches():
    assert ScalarFunction(lambda z: (z - 40).relu(), reach=50).kinks == pytest.approx([40])
    assert ScalarFunction(lambda z: (z + 2).relu(), reach=1).kinks == ()
