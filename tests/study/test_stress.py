"""Attacks stay in their ball, find what there is to find, and refuse what they cannot use."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from paperback.errors import DataError
from paperback.study.stress import (
    boundary_line_attack,
    corrupt_labels,
    fast_gradient_attack,
    gain,
    project,
    projected_gradient_attack,
)

NORMS = [1, 2, math.inf]
DUAL = {1: math.inf, 2: 2, math.inf: 1}
ATTACKS = [projected_gradient_attack, fast_gradient_attack, boundary_line_attack]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(dtype=torch.float64, features=5, classes=3):
    weights = torch.randn(features, classes, generator=generator(1), dtype=dtype)
    return weights, lambda x: x.flatten(1) @ weights


def distance(a, b, norm):
    return torch.linalg.vector_norm((a.double() - b.double()).flatten(1), norm, dim=1)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_the_nearest_point_of_the_ball(norm):
    offsets = torch.randn(40, 4, generator=generator(), dtype=torch.float64)
    radius = torch.rand(40, generator=generator(1), dtype=torch.float64)
    radius[0] = 0
    found = project(offsets, radius, norm)
    assert (torch.linalg.vector_norm(found, norm, dim=1) <= radius + 1e-12).all()
    inside = torch.linalg.vector_norm(offsets, norm, dim=1) <= radius
    assert torch.equal(found[inside], offsets[inside])
    assert not inside.all()
    # The nearest point p of a convex set: no point q of it has a positive product with the way out of p.
    q = project(torch.randn(2000, 4, generator=generator(2), dtype=torch.float64) * 3, 1.0, norm)
    for x, p, r in zip(offsets, found, radius, strict=True):
        assert float(((q * r - p) @ (x - p)).max()) < 1e-12


def test_the_projection_on_the_l1_ball_agrees_with_an_optimiser():
    v = np.random.default_rng(0).normal(size=6)
    # x = positive - negative parts, so that the ball is a simplex
    start = np.full(12, 0.01)
    found = minimize(
        lambda z: ((z[:6] - z[6:] - v) ** 2).sum(),
        start,
        bounds=[(0, None)] * 12,
        constraints={"type": "ineq", "fun": lambda z: 1.3 - z.sum()},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    ours = project(torch.tensor(v)[None], 1.3, 1)[0].numpy()
    np.testing.assert_allclose(ours, found[:6] - found[6:], atol=1e-6)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_lie_in_the_ball_and_the_bounds_exactly(attack, norm, dtype):
    _, scores = linear(dtype, 12)
    inputs = torch.rand(60, 3, 4, generator=generator(), dtype=dtype)
    inputs[0] = 0
    labels = scores(inputs).argmax(1)
    for radius in (0.1, torch.linspace(0, 3, 60)):
        before = inputs.clone()
        found = attack(
            scores, inputs, labels, radius=radius, norm=norm, bounds=(0.0, 1.0), generator=generator()
        )
        assert torch.equal(inputs, before)
        assert found.shape == inputs.shape
        assert found.dtype == dtype
        assert (distance(found, inputs, norm) <= radius).all()
        assert (found >= 0).all()
        assert (found <= 1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_rounding_far_from_zero_does_not_leave_the_ball(norm):
    _, scores = linear(torch.float32)
    inputs = 1000 + torch.rand(50, 5, generator=generator())
    labels = scores(inputs).argmax(1)
    found = projected_gradient_attack(
        scores, inputs, labels, radius=1e-3, norm=norm, restarts=2, generator=generator()
    )
    assert (distance(found, inputs, norm) <= 1e-3).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_falls_exactly_beyond_its_margin(norm):
    """Two classes, s_1 - s_0 = w x: the distance to the boundary is |w x| over the dual norm of w."""
    weights, scores = linear(classes=2)
    difference = weights[:, 1] - weights[:, 0]
    inputs = torch.randn(80, 5, generator=generator(), dtype=torch.float64)
    labels = scores(inputs).argmax(1)
    margin = (inputs @ difference).abs() / torch.linalg.vector_norm(difference, DUAL[norm])
    settings = {"norm": norm, "generator": generator()}
    for attack, room in ((projected_gradient_attack, 1.001), (fast_gradient_attack, 1.0001)):
        safe = attack(scores, inputs, labels, radius=0.9999 * margin, **settings)
        assert torch.equal(scores(safe).argmax(1), labels)
        broken = attack(scores, inputs, labels, radius=room * margin, **settings)
        assert (scores(broken).argmax(1) != labels).all()
    safe = boundary_line_attack(scores, inputs, labels, radius=0.9999 * margin, directions=40, **settings)
    assert torch.equal(scores(safe).argmax(1), labels)
    broken = boundary_line_attack(scores, inputs, labels, radius=3 * margin, directions=40, **settings)
    assert (scores(broken).argmax(1) != labels).double().mean() > 0.9


def rings(x):
    """Two classes by the distance from 0, without a gradient."""
    outside = (x.norm(dim=1) > 1).to(x)
    return torch.stack([1 - outside, outside], 1)


def test_lines_break_a_model_whose_gradients_are_hidden():
    inputs = 2 * torch.rand(200, 2, generator=generator(), dtype=torch.float64) - 1
    inputs = inputs[(inputs.norm(dim=1) - 1).abs() > 1e-3]
    labels = rings(inputs).argmax(1)
    gap = (inputs.norm(dim=1) - 1).abs()
    with pytest.raises(DataError, match="boundary_line_attack"):
        projected_gradient_attack(rings, inputs, labels, radius=0.1, generator=generator())
    found = boundary_line_attack(
        rings, inputs, labels, radius=1.3 * gap, directions=60, generator=generator()
    )
    assert (rings(found).argmax(1) != labels).double().mean() > 0.95
    found = boundary_line_attack(
        rings, inputs, labels, radius=0.99 * gap, directions=60, generator=generator()
    )
    assert torch.equal(rings(found).argmax(1), labels)


def test_lines_go_towards_the_points_that_are_given():
    """One direction of a half space leads out, in many dimensions; chance does not find it."""

    def half(x):
        return torch.stack([torch.ones(len(x)), (x[:, 0] > 1).to(x) * 2], 1)

    inputs, labels = torch.zeros(5, 400), torch.zeros(5, dtype=torch.int64)
    points = torch.zeros(1, 400)
    points[0, 0] = 3.0
    towards = points, torch.ones(1, dtype=torch.int64)
    settings = {"radius": 1.1, "directions": 4}
    lost = boundary_line_attack(half, inputs, labels, **settings, generator=generator())
    assert (half(lost).argmax(1) == 0).all()
    found = boundary_line_attack(half, inputs, labels, **settings, towards=towards, generator=generator())
    assert (half(found).argmax(1) == 1).all()


def bumps(x):
    return torch.stack([torch.cos(4 * x).sum(1), torch.sin(3 * x).sum(1)], 1)


def test_more_steps_and_restarts_never_find_less_and_the_best_is_kept():
    inputs = torch.randn(60, 3, generator=generator(), dtype=torch.float64)
    labels = bumps(inputs).argmax(1)
    gains = [
        gain(bumps(attack), labels)
        for attack in (
            inputs,
            fast_gradient_attack(bumps, inputs, labels, radius=0.7, norm=2, generator=generator()),
            projected_gradient_attack(bumps, inputs, labels, radius=0.7, generator=generator()),
            projected_gradient_attack(bumps, inputs, labels, radius=0.7, restarts=6, generator=generator()),
        )
    ]
    assert (gains[1] >= gains[0]).all()
    assert (gains[2] >= gains[0]).all()
    assert (gains[3] >= gains[2]).all()
    assert gains[2].mean() > gains[1].mean() + 0.05
    assert gains[3].mean() > gains[2].mean()
    # The truth by a grid over the ball.
    grid = torch.cartesian_prod(*[torch.linspace(-0.7, 0.7, 41, dtype=torch.float64)] * 3)
    grid = grid[grid.norm(dim=1) <= 0.7]
    pairs = zip(inputs, labels, strict=True)
    truth = torch.stack([gain(bumps(x + grid), y.expand(len(grid))).max() for x, y in pairs])
    assert (truth - gains[3] < 0.1).double().mean() > 0.95  # a bump may have been missed


def test_one_seed_one_result_and_no_other_randomness():
    inputs = torch.randn(20, 3, generator=generator())
    labels = bumps(inputs).argmax(1)
    state = torch.get_rng_state()
    for attack, settings in ((projected_gradient_attack, {"restarts": 3}), (boundary_line_attack, {})):
        first, again, other = (
            attack(bumps, inputs, labels, radius=0.3, generator=generator(seed), **settings)
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_a_flat_start_is_left_at_random():
    """The gradient is 0 at the centre of a bowl; a random direction gets away from it."""

    def bowl(x):
        return torch.stack([0.01 - x.square().sum(1), torch.zeros(len(x))], 1)

    inputs = torch.zeros(5, 4)
    labels = torch.zeros(5, dtype=torch.int64)
    for norm in NORMS:
        found = projected_gradient_attack(bowl, inputs, labels, radius=1.0, norm=norm, generator=generator())
        assert (bowl(found).argmax(1) == 1).all()


def test_real_targets_are_attacked_by_their_squared_error():
    """FGSM on a linear regression: the error grows by radius times the L1 norm of the weights."""
    weights = torch.randn(4, generator=generator(), dtype=torch.float64)
    inputs = torch.randn(30, 4, generator=generator(1), dtype=torch.float64)
    targets = inputs @ weights + torch.randn(30, generator=generator(2), dtype=torch.float64)
    found = fast_gradient_attack(lambda x: x @ weights, inputs, targets, radius=0.3, generator=generator())
    before, after = ((x @ weights - targets).abs() for x in (inputs, found))
    torch.testing.assert_close(after, before + 0.3 * weights.abs().sum())
    column = fast_gradient_attack(
        lambda x: (x @ weights)[:, None], inputs, targets[:, None], radius=0.3, generator=generator()
    )
    assert torch.equal(column, found)


def test_gain_is_the_lead_of_the_best_wrong_class():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 4.0]])
    assert gain(scores, torch.tensor([1, 2])).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_the_rate_of_wrong_labels_is_exact_and_they_are_spread_evenly(rate):
    labels = torch.randint(0, 4, (4000,), generator=generator())
    before = labels.clone()
    noisy = corrupt_labels(labels, rate, 4, generator(1))
    assert torch.equal(labels, before)
    assert int((noisy != labels).sum()) == round(4000 * rate)
    shifts = ((noisy - labels) % 4)[noisy != labels].bincount(minlength=4)[1:]
    if rate:
        assert (shifts / shifts.sum() - 1 / 3).abs().max() < 0.05


def test_labels_follow_a_matrix():
    matrix = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    labels = torch.arange(3).repeat_interleave(5000)
    noisy = corrupt_labels(labels, matrix, 3, generator())
    found = torch.stack([noisy[labels == c].bincount(minlength=3) / 5000 for c in range(3)])
    torch.testing.assert_close(found, matrix, atol=0.03, rtol=0)


X, Y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": 3}, "norm"),
        ({"radius": -1.0}, "radius"),
        ({"radius": math.inf}, "radius"),
        ({"radius": torch.ones(2)}, "radius"),
        ({"inputs": X.long()}, "inputs"),
        ({"inputs": X / 0}, "inputs"),
        ({"labels": Y[:2]}, "labels"),
        ({"labels": Y.int()}, "labels"),
        ({"labels": Y + 3}, "labels"),
        ({"bounds": (0.5, 1.0)}, "bounds"),
        ({"scores": lambda x: x[:, :1]}, "two classes"),
    ],
)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_cannot_be_is_refused(attack, changes, words):
    arguments = {"scores": lambda x: 2 * x, "inputs": X, "labels": Y, "radius": 0.1}
    arguments |= {"generator": generator()} | changes
    with pytest.raises(DataError, match=words):
        attack(arguments.pop("scores"), arguments.pop("inputs"), arguments.pop("labels"), **arguments)


def test_counts_and_rates_that_cannot_be_are_refused():
    for settings in ({"steps": 0}, {"restarts": 0}, {"step_size": 0.0}):
        with pytest.raises(DataError):
            projected_gradient_attack(bumps, X, Y, radius=0.1, generator=generator(), **settings)
    with pytest.raises(DataError, match="directions"):
        boundary_line_attack(bumps, X, Y, radius=0.1, directions=0, generator=generator())
    with pytest.raises(DataError, match="towards"):
        boundary_line_attack(bumps, X, Y, radius=0.1, towards=(X[:, :1], Y), generator=generator())
    with pytest.raises(DataError, match="int64"):
        boundary_line_attack(bumps, X, X[:, 0], radius=0.1, generator=generator())
    for rate, n_classes in ((1.5, 2), (0.5, 1), (torch.ones(2, 2), 2), (torch.ones(3), 3)):
        with pytest.raises(DataError):
            corrupt_labels(Y, rate, n_classes, generator())


def test_nothing_to_attack_gives_nothing():
    for attack in ATTACKS:
        assert attack(bumps, X[:0], Y[:0], radius=0.1, generator=generator()).shape == (0, 2)
    alone = boundary_line_attack(bumps, X[:1], Y[:1], radius=0.1, generator=generator())
    assert alone.shape == (1, 2)


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_go_through_all_rivals(norm):
    """Of a linear model with many classes the nearest boundary is often not that of the second best class."""
    weights, _ = linear(features=8, classes=12)
    weights = weights * torch.linspace(0.3, 3, 12, dtype=torch.float64)
    inputs = torch.randn(100, 8, generator=generator(), dtype=torch.float64)

    def scaled(x):
        return x @ weights

    labels = scaled(inputs).argmax(1)
    difference = weights[:, labels].T[:, None] - weights.T
    lead = -(scaled(inputs) - scaled(inputs).gather(1, labels[:, None]))
    distances = lead / torch.linalg.vector_norm(difference, DUAL[norm], dim=2)
    exact = distances.scatter(1, labels[:, None], math.inf).amin(1)
    settings = {"norm": norm, "steps": 30, "generator": generator()}
    few = projected_gradient_attack(scaled, inputs, labels, radius=1.01 * exact, **settings)
    all_ = projected_gradient_attack(scaled, inputs, labels, radius=1.01 * exact, restarts=12, **settings)
    assert (scaled(few).argmax(1) != labels).double().mean() < 0.9
    assert (scaled(all_).argmax(1) != labels).double().mean() > 0.98
