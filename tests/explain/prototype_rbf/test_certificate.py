"""The certificate: sign, formula, guarantee by brute force, scale, gradient, range."""

import numpy as np
import pytest
import torch

from paperback.errors import DataError
from paperback.explain.prototype_rbf import certificate, relative
from paperback.explain.prototype_rbf.network import METRICS

VARIANTS = [
    {},
    {"negative": False},
    {"head": "original"},
    {"head": "rbf"},
    {"vectors_per_class": 3},
    {"sigma": "per-component"},
    {"kernel": "gaussian"},
    {"kernel": "gaussian", "sigma": "per-component", "vectors_per_class": 2},
]
IDS = ["-".join(map(str, v.values())) or "default" for v in VARIANTS]


def points(seed, n, dimension=2):
    return torch.empty(n, dimension, dtype=torch.float64).uniform_(
        -3, 3, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("tight", [True, False])
def test_the_sign_says_whether_the_class_is_predicted_on_1000_models(make_network, tight):
    for seed in range(1000):
        network = make_network(seed, **VARIANTS[seed % len(VARIANTS)])
        x = points(seed, 4)
        y = torch.randint(3, (4,), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            radii, predicted = network.radii(x, y, tight=tight), network(x).argmax(1)
        assert ((radii > 0) == (predicted == y)).all(), seed


def test_the_closed_form_is_the_root_of_the_inequality(make_network):
    """Plain bisection on a/z + b - q z, written out class by class."""
    for seed in range(60):
        network = make_network(seed, **VARIANTS[seed % 3])
        x, y = points(seed, 3), torch.tensor([0, 1, 2])
        with torch.no_grad():
            found = network.radii(x, y, tight=False)
            d, sigma = network.detections(x), float(network.log_sigma.exp())
            positive, negative = network.head.reasoning()
        for i in range(3):
            best = np.inf
            for c in {0, 1, 2} - {i}:
                a = float((positive[:, i] + negative[:, c]) @ d[i])
                q = float((negative[:, i] + positive[:, c]) @ d[i])
                b = float(negative[:, i].sum() - negative[:, c].sum())
                low, high = -60.0 * sigma, 60.0 * sigma
                for _ in range(100):
                    middle = (low + high) / 2
                    z = np.exp(middle / sigma)
                    low, high = (middle, high) if a / z + b - q * z > 0 else (low, middle)
                best = min(best, low)
            assert float(found[i]) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS[:6], ids=IDS[:6])
def test_the_tight_radius_is_never_nearer_to_0_than_the_closed_form(make_network, variant):
    wider = 0
    for seed in range(40):
        network = make_network(seed, **variant)
        x = points(seed, 10)
        y = torch.arange(10) % 3
        with torch.no_grad():
            loose, tight = (network.radii(x, y, tight=t) for t in (False, True))
        # what has no end is cut at the farthest component and 64 sigma
        cut = float(network.distances(x).detach().max() + 64 * network.log_sigma.detach().exp().max()) - 1e-6
        assert (tight.abs() >= loose.abs().clamp_max(cut) - 1e-8).all()
        wider += int((tight > 1.05 * loose.clamp_min(0)).sum())
    assert wider > 0


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_no_point_of_the_plane_within_the_radius_changes_class(make_network, metric, variant):
    axis = torch.linspace(-1, 1, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    norms = torch.linalg.vector_norm(grid, METRICS[metric], dim=1)
    grid = grid[norms > 0] / norms[norms > 0, None]  # directions; lengths follow
    lengths = torch.tensor([0.1, 0.4, 0.7, 0.9, 0.99, 1 - 1e-9], dtype=torch.float64)
    unit_ball = (lengths[:, None, None] * grid[::7]).flatten(0, 1)
    checked = 0
    for seed in range(9):  # 9 models for each of 3 metrics and 8 variants: 216
        network = make_network(seed, metric=metric, **variant)
        x = points(100 + seed, 8)
        with torch.no_grad():
            y = network(x).argmax(1)
            radii = network.widest_radii(x, y)
            assert (radii >= network.radii(x, y, tight=True)).all()
            around = x[:, None] + radii[:, None, None] * unit_ball
            changed = network(around.flatten(0, 1)).argmax(1).view(8, -1) != y[:, None]
        assert not changed.any(), seed
        checked += int((radii > 0.05).sum())
    assert checked > 20


def test_on_a_line_the_radius_is_reached_where_it_can_be(make_network):
    """Between two prototypes of two classes nothing but the radius itself keeps the class."""
    network = make_network(0, n_features=1, n_components=2, n_classes=2, negative=False)
    with torch.no_grad():
        network.components.copy_(torch.tensor([[-1.0], [1.0]]))
        network.log_sigma.zero_()
        network.head.logits.copy_(40 * torch.eye(2))
        x = torch.tensor([[-0.5], [0.25]], dtype=torch.float64)
        for tight in (True, False):
            radii = network.radii(x, torch.tensor([0, 1]), tight=tight)
            torch.testing.assert_close(
                radii, torch.tensor([0.5, 0.25], dtype=torch.float64), atol=1e-8, rtol=0
            )


@pytest.mark.parametrize("kernel", ["exp", "gaussian"])
def test_of_one_prototype_per_class_the_radius_is_the_distance_to_the_plane_between(make_network, kernel):
    """(delta_j^2 - delta_k^2) / (2 |w_j - w_k|), beyond which the class does change."""
    for seed in range(20):
        network = make_network(seed, n_features=5, n_components=3, n_classes=3, negative=False, kernel=kernel)
        with torch.no_grad():
            network.head.logits.copy_(200 * torch.eye(3))
            x = points(seed, 20, 5)
            squared, w = network.distances(x).square(), network.components
            y = squared.argmin(1)
            lead = squared - squared.amin(1, keepdim=True)
            plane = lead / (2 * torch.cdist(w, w)[y]).clamp_min(1e-12)
            nearest = plane.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), torch.inf).min(1)
            torch.testing.assert_close(network.widest_radii(x, y), nearest.values, rtol=1e-6, atol=1e-8)
            way = torch.nn.functional.normalize(w[nearest.indices] - w[y], dim=1)
            assert (network(x + 1.0001 * nearest.values[:, None] * way).argmax(1) != y).all()
            wider = network.widest_radii(x, y) > 1.01 * network.radii(x, y, tight=True)
            assert wider.double().mean() > 0.5


def test_the_bound_on_the_difference_of_two_distances_holds_and_is_reached():
    draws = torch.Generator().manual_seed(0)
    x, w, v = (torch.randn(4000, 2, 3, generator=draws, dtype=torch.float64) for _ in range(3))
    x, eps = x[:, 0], torch.rand(4000, 1, generator=draws, dtype=torch.float64)
    delta = (x[:, None] - w).norm(dim=-1)
    apart = (w[:, 0] - w[:, 1]).norm(dim=-1)
    bounds = relative._Bounds(
        delta[:, :1], delta[:, 1:], apart[:, None], torch.ones(4000, 1, 1, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64), "exp",
    )  # fmt: skip
    bound = -bounds(eps, torch.zeros_like(eps))[0][:, 0, 0]
    away = (w[:, 1] - w[:, 0]) / apart[:, None]
    tightest = torch.full_like(bound, torch.inf)
    for step in (eps * torch.nn.functional.normalize(v[:, 0], dim=1), eps * away):
        moved = (x[:, None] + step[:, None] - w).norm(dim=-1)
        assert (moved[:, 0] - moved[:, 1] <= bound + 1e-12).all()
        tightest = torch.minimum(tightest, bound - (moved[:, 0] - moved[:, 1]))
    assert tightest.min() < 1e-3


def test_a_larger_radius_never_has_a_larger_guaranteed_gap(make_network):
    for seed, variant in enumerate(VARIANTS):
        network = make_network(seed, **variant)
        x = points(seed, 5)
        positive, negative = network.head.reasoning()
        weights, offset = positive - negative, network.head.offset()
        own = torch.zeros(5, dtype=torch.long)
        rise = weights.T[own][:, None, :] - weights.T
        constant = offset[own][:, None] - offset
        before = None
        for eps in torch.linspace(-3, 3, 61, dtype=torch.float64):
            terms, one = certificate._terms(
                network.distances(x), eps.expand_as(constant), rise, constant,
                network.log_sigma.exp(), network.kernel,
            )  # fmt: skip
            gap = terms.sum(-1) / one + constant
            assert before is None or (gap <= before + 1e-12).all()
            before = gap


@pytest.mark.parametrize("variant", [*VARIANTS[:6], {"metric": "manhattan"}, {"metric": "chebyshev"}])
@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0])
def test_radii_scale_with_everything(make_network, variant, factor):
    network = make_network(3, **variant)
    x, y = points(3, 20), torch.arange(20) % 3
    with torch.no_grad():
        before = [network.radii(x, y, tight=tight) for tight in (True, False)]
        network.components.mul_(factor)
        network.log_sigma.add_(np.log(factor))
        after = [network.radii(factor * x, y, tight=tight) for tight in (True, False)]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, factor * old, rtol=1e-6, atol=1e-9 * factor)


def test_the_closed_form_falls_when_the_rivals_detections_rise():
    """Monotone in d: more of a component that speaks for the class, and less of one against it, is safer."""
    log_positive = torch.tensor([[5.0, -5.0], [-5.0, 5.0]], dtype=torch.float64).log_softmax(0)
    offset, own = torch.zeros(2, dtype=torch.float64), torch.zeros(30, dtype=torch.long)
    sigma = torch.tensor(1.0, dtype=torch.float64)
    rising = torch.linspace(-20, -1e-3, 30, dtype=torch.float64)
    level = torch.full_like(rising, -1.0)
    for log_d, sign in (((rising, level), 1), ((level, rising), -1)):
        radii = certificate.closed_form(torch.stack(log_d, 1), log_positive, None, offset, own, sigma)[:, 1]
        assert (sign * radii.diff() > 0).all()


@pytest.mark.parametrize("variant", VARIANTS[:6], ids=IDS[:6])
def test_log_space_equals_the_naive_formula_where_that_is_finite(make_network, variant):
    compared = 0
    for seed in range(30):
        network = make_network(seed, **variant, sigma_range=(0.05, 0.5))
        x, y = points(seed, 10), torch.arange(10) % 3
        with torch.no_grad():
            d, sigma = network.detections(x), network.log_sigma.exp().min()
            positive, negative = network.head.reasoning()
            offset, each = network.head.offset(), network.head.vectors_per_class
            scores = network.head.vector_scores(d).unflatten(1, (3, each))
            own = y * each + scores[torch.arange(10), y].argmax(1)
            p, n = d @ positive, d @ negative
            a, q = p[torch.arange(10), own][:, None] + n, n[torch.arange(10), own][:, None] + p
            b = offset[own][:, None] - offset
            naive = sigma * ((b + (b**2 + 4 * a * q).sqrt()) / (2 * q)).log()
            naive = certificate.against_rivals(naive, y, each)
            found = network.radii(x, y, tight=False)
        good = naive.isfinite() & (a.amin(1) > 1e-100) & ((4 * a * q / b**2).amin(1) > 1e-3)
        compared += int(good.sum())
        torch.testing.assert_close(found[good], naive[good], rtol=1e-7, atol=1e-8)
    assert compared > 30


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("sigma", [1e-3, 1e-1, 1e3])
def test_nothing_underflows(make_network, variant, sigma):
    network = make_network(5, **variant, sigma_range=(sigma, sigma))
    x, y = 10 * points(5, 30), torch.arange(30) % 3
    for tight in (True, False):
        network.zero_grad()
        radii = network.radii(x, y, tight=tight)
        assert radii.isfinite().all()
        radii.sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad.isfinite().all(), name


def test_where_detections_underflow_the_nearest_prototype_still_decides_the_radius(make_network):
    network = make_network(0, n_features=1, n_components=2, n_classes=2, negative=False)
    with torch.no_grad():
        network.components.copy_(torch.tensor([[-1.0], [1.0]]))
        network.log_sigma.fill_(np.log(1e-4))
        network.head.logits.copy_(40 * torch.eye(2))
        x = torch.tensor([[-0.5]], dtype=torch.float64)
        assert network.detections(x).max() == 0
        tight, closed = (float(network.radii(x, torch.tensor([0]), tight=t)) for t in (True, False))
    assert tight == pytest.approx(0.5, abs=1e-6)
    # the closed form lets what the near prototype does for the rival, e^-40, grow while the rest falls
    assert closed == pytest.approx(20e-4, rel=1e-6)


@pytest.mark.parametrize("tight", [True, False])
@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_gradients_are_those_of_finite_differences(make_network, variant, tight):
    network = make_network(1, n_components=4, **variant)
    x, y = points(1, 3), torch.tensor([0, 1, 2])
    network.radii(x, y, tight=tight).sum().backward()
    step = 1e-5
    for name, parameter in network.named_parameters():
        flat, slope = parameter.data.view(-1), parameter.grad.reshape(-1)
        for i in range(len(flat)):
            ends = []
            for sign in (1, -1):
                flat[i] += sign * step
                with torch.no_grad():
                    ends.append(float(network.radii(x, y, tight=tight).sum()))
                flat[i] -= sign * step
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(slope[i]) == pytest.approx(expected, rel=2e-4, abs=2e-5), f"{name}[{i}]"


@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_no_triangle_inequality_no_radius(make_network, metric):
    network = make_network(0, metric=metric)
    with pytest.raises(DataError, match="triangle inequality"):
        network.radii(points(0, 2), torch.tensor([0, 1]), tight=True)


def test_the_sheets_closed_form_would_be_wrong_for_the_squared_distance(make_network):
    """exp(-delta^2/sigma) breaks the factor e^(eps/sigma): why sqeuclidean certifies nothing."""
    network = make_network(0, n_features=1, n_components=2, n_classes=2, metric="sqeuclidean", negative=False)
    with torch.no_grad():
        network.components.copy_(torch.tensor([[-10.0], [10.0]]))
        network.log_sigma.zero_()
        network.head.logits.copy_(40 * torch.eye(2))
        x = torch.tensor([[-9.0]], dtype=torch.float64)
        claimed = certificate.closed_form(
            network.log_detections(x), *network.head.log_reasoning(), network.head.offset(),
            torch.tensor([0]), network.log_sigma.exp().min(),
        )[0, 1]  # fmt: skip
        assert claimed > 9  # the border is at 0, 9 away
        assert network(x + claimed * 0.999).argmax() == 1


def test_a_certificate_of_many_components_keeps_its_memory_bounded(make_network):
    network = make_network(0, n_components=10_000, n_classes=10, n_features=2)
    assert network.rows_at_once * 10_000 * 10 * 8 < 5e7
