"""Finite width: the four-point vertex, the next order, residuals, aspect ratios, learning rates."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperback.errors import DataError
from paperback.theory.criticality import Criticality, sample_networks
from paperback.theory.studies.criticality.networks import ResidualNetwork, multilayer

A2, A4 = 1.01 / 2, 1.0001 / 2  # leaky ReLU of slope 0.1


@pytest.mark.parametrize(
    ("function", "c_w", "growth"),
    [
        (F.relu, 2.0, 5.0),
        (lambda z: z, 1.0, 2.0),
        (lambda z: F.leaky_relu(z, 0.1), 1 / A2, 3 * A4 / A2**2 - 1),
    ],
)
def test_vertex_of_scale_invariant_networks(function, c_w, growth):
    flow = Criticality(function).flow(0.7, 0.0, c_w, 6, 50)
    np.testing.assert_allclose(flow.K, 0.7, rtol=1e-12)
    np.testing.assert_allclose(flow.relative_vertex, growth * np.arange(6) / 50, atol=1e-12)
    np.testing.assert_allclose(flow.resummed, (1 + growth / 50) ** np.arange(6) - 1, atol=1e-12)
    np.testing.assert_allclose(flow.G1, 0, atol=1e-10)
    assert flow.exact


def test_unequal_widths_add_one_over_n():
    widths = (10, 20, 40, 80)
    flow = Criticality(F.relu).flow(1.0, 0.0, 2.0, 4, widths)
    np.testing.assert_allclose(flow.relative_vertex, 5 * np.cumsum([0, 1 / 10, 1 / 20, 1 / 40]), rtol=1e-12)
    np.testing.assert_allclose(flow.V, flow.relative_vertex * [10, 10, 20, 40], rtol=1e-12)


def test_vertex_and_next_order_of_unequal_tanh_networks_by_their_recursion():
    """The equations in the book's form, with V and G1 per width, written out."""
    theory, widths = Criticality(torch.tanh), (30, 60, 20, 50)
    flow = theory.flow(0.8, 0.05, 1.2, 4, widths)
    s, K, V, G1 = theory.activation, 0.8, 0.0, 0.0
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    weights = weights / weights.sum()
    for layer in range(3):
        points = torch.from_numpy(math.sqrt(K) * z)
        square = s.square(points).numpy()
        g, fourth = weights @ square, weights @ square**2
        g1 = weights @ (square * (K * z**2 - K)) / (2 * K**2)
        g2 = weights @ (square * (K**2 * (z**4 - 6 * z**2 + 3))) / (4 * K**4)
        before = widths[layer - 1] if layer else widths[0]
        G1 = (1.2 * g1 * G1 + 0.6 * g2 * V) * widths[layer] / before
        V = (1.2 * g1) ** 2 * widths[layer] / before * V + 1.2**2 * (fourth - g**2)
        K = 0.05 + 1.2 * g
        assert (flow.K[layer + 1], flow.V[layer + 1], flow.G1[layer + 1]) == pytest.approx(
            (K, V, G1), rel=1e-9
        )


def test_slopes_of_the_classes():
    assert Criticality(F.relu).nu == pytest.approx(5)
    assert Criticality(torch.tanh).nu == pytest.approx(2 / 3, abs=1e-4)
    assert Criticality(lambda z: z, residual=0.6).nu == pytest.approx(
        (1 - 0.36) * ((1 - 0.36) * 2 + 4 * 0.36)
    )
    flow = Criticality(torch.tanh).flow(1.0, 0.0, 1.0, 300, 1000)
    assert flow.relative_vertex[-1] / (299 / 1000) == pytest.approx(2 / 3, abs=0.02)
    selu = Criticality(F.selu)
    deep = selu.flow(1e-3, 0.0, selu.recommended.C_W, 600, 1000).relative_vertex
    assert (deep[-1] - deep[-101]) * 1000 / 100 == pytest.approx(selu.nu, rel=0.1)


def test_weak_branches_push_the_usable_depth_out():
    slopes = [Criticality(torch.tanh, residual=gamma).nu for gamma in (0.0, 0.5, 0.9, 0.99)]
    assert slopes == sorted(slopes, reverse=True)
    assert slopes[-1] < 0.1 * slopes[0]


@pytest.mark.parametrize("kind", [nn.Identity, nn.Tanh])
def test_residual_vertex_against_monte_carlo(kind):
    gamma, n, depth = 0.5**0.5, 48, 8
    theory = Criticality(kind(), residual=gamma)
    c_w = theory.recommended.C_W
    flow = theory.flow(1.0, 0.0, c_w, depth, n)
    assert flow.exact
    names = ["first", *(f"sums.{i}" for i in range(depth - 1))]
    vertex, error = _vertex(lambda: ResidualNetwork(n, depth, gamma, kind()), n, c_w, names, 5000)
    # To first order in 1/n: the second one is of the size of the square.
    assert (np.abs(vertex - flow.relative_vertex) <= 3 * error + flow.relative_vertex**2).all()


def test_residual_relu_is_flagged_and_only_its_first_step_given():
    gamma = 0.5**0.5
    flow = Criticality(F.relu, residual=gamma).flow(1.0, 0.0, 1.0, 5, 48)
    assert not flow.exact
    assert flow.relative_vertex[:2] == pytest.approx([0, 2.25 / 48])
    assert np.isnan(flow.V[2:]).all()
    assert np.isfinite(flow.K).all()
    names = ["first", *(f"sums.{i}" for i in range(4))]
    vertex, error = _vertex(lambda: ResidualNetwork(48, 5, gamma, nn.ReLU()), 48, 1.0, names, 3000)
    assert abs(vertex[1] - 2.25 / 48) <= 3 * error[1]
    assert vertex[4] > 4 * 2.25 / 48 + 5 * error[4]  # what the recursion would give is far too small


def _vertex(make_model, n, c_w, names, networks):
    """V / (n K^2) with K = 1 known, and its standard error."""
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    x *= (1 / c_w / x.square().mean()).sqrt()
    sample = sample_networks(make_model, x, networks, names, ensemble=(0.0, c_w), progress=False)
    K, pairs = sample.second[:, 0], sample.pairs[:, 0]
    ratio = pairs.mean(0) / K.mean(0) ** 2
    influence = pairs / K.mean(0) ** 2 - 2 * ratio * K / K.mean(0)
    return ratio - 1, influence.std(0) / math.sqrt(networks)


def test_aspect_ratio_depth_and_regime():
    theory = Criticality(F.relu)
    assert theory.aspect_ratio(10) == pytest.approx(4 / (50 * 5))
    assert theory.optimal_depth(500, 10) == pytest.approx(8)
    assert [theory.regime(d, 500, 10) for d in (0.5, 8, 80)] == ["kernel-like", "effectively deep", "chaotic"]


def test_learning_rates_make_all_layers_contribute_equally():
    """The parts of the tangent kernel, computed by its recursion, are equal deep in a tanh network."""
    theory, depth = Criticality(torch.tanh), 200
    rates = theory.lr_factors(depth)
    np.testing.assert_allclose(rates.bias, 1 / np.arange(1, depth + 1), rtol=1e-6)
    flow = theory.flow(0.5, 0.0, 1.0, depth, 100)
    behind = np.array([flow.chi_perp[layer:-1].prod() for layer in range(depth)])
    bias = rates.bias * behind
    assert bias[50:].std() / bias[50:].mean() < 0.05
    squares = np.array([theory.expected_square(K) for K in flow.K])
    weight = (rates.weight * np.concatenate([[1.0], squares[:-1]]) * behind)[50:]
    assert weight.std() / weight.mean() < 0.05


def test_learning_rates_elsewhere_are_one_over_depth():
    for function in (F.relu, F.gelu, torch.sigmoid):
        rates = Criticality(function).lr_factors(4)
        assert rates.bias.tolist() == rates.weight.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K1": 0.0}, "K1"), ({"C_W": -1.0}, "C_W"), ({"C_b": -1.0}, "C_b"), ({"depth": 0}, "depth"),
        ({"widths": 0}, "width"), ({"widths": (3, 3)}, "2 widths for depth 3"), ({"K1": math.nan}, "K1"),
    ],
)  # fmt: skip
def test_bad_flow_arguments(change, message):
    arguments = {"K1": 1.0, "C_b": 0.0, "C_W": 1.0, "depth": 3, "widths": 8} | change
    with pytest.raises(DataError, match=message):
        Criticality(torch.tanh).flow(**arguments)


def test_bad_shapes_of_networks():
    theory = Criticality(F.relu)
    for call in (
        lambda: theory.aspect_ratio(0),
        lambda: theory.optimal_depth(0, 1),
        lambda: theory.lr_factors(0),
    ):
        with pytest.raises(DataError):
            call()
    with pytest.raises(DataError, match="gram"):
        theory.gram_flow(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), 0.0, 2.0, 2)


def test_multilayer_of_the_study_has_its_layers():
    assert [type(m) for m in multilayer(nn.ReLU, 5, 4, 2, 3)] == [nn.Linear, nn.ReLU, nn.Linear]
