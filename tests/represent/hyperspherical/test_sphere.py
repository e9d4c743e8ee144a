"""The normalised softmax, its bound and its constraint; the losses of metric learning by brute force."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from paperback.errors import DataError
from paperback.represent.hyperspherical import (
    NormalizedLinear,
    loss_floor,
    normalized_softmax,
    scale_for_probability,
    separated_directions,
)
from paperback.training.metric_learning import contrastive_pairs, triplet_batch_hard, triplet_semi_hard

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3, 3, 0, 4])


def points(n=12, dim=3, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.floats(0.5, 30), st.integers(0, 99))
def test_no_configuration_goes_below_the_floor(k, scale, seed):
    floor = loss_floor(k, scale)
    corners = separated_directions(k, max(k - 1, 2), seed).double()
    assert normalized_softmax(corners, corners, torch.arange(k), scale).item() == pytest.approx(
        floor, rel=1e-4
    )
    other = points(k, max(k - 1, 2), seed)
    features = points(k, max(k - 1, 2), seed + 1)
    assert normalized_softmax(features, other, torch.arange(k), scale) >= floor - 1e-9
    assert normalized_softmax(other, other, torch.arange(k), scale) >= floor - 1e-9


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10_000), st.floats(0.01, 0.99))
def test_the_scale_is_the_smallest_that_reaches_a_probability(k, share):
    p = 1 / k + share * (1 - 1 / k)
    assert math.exp(-loss_floor(k, scale_for_probability(k, p))) == pytest.approx(p, rel=1e-9)


def test_a_simplex_where_there_is_room_and_a_warning_where_not():
    for k, dim in ((2, 5), (6, 5), (4, 9)):
        cosines = separated_directions(k, dim) @ separated_directions(k, dim).T
        torch.testing.assert_close(cosines, torch.eye(k) * (1 + 1 / (k - 1)) - 1 / (k - 1), atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="dim=7 would do"):
        square = separated_directions(8, 2)
    cosines = (square @ square.T)[~torch.eye(8, dtype=torch.bool)]
    assert cosines.max() < math.cos(2 * math.pi / 8) + 0.02  # eight points on a circle, evenly


@pytest.mark.parametrize("constraint", ["project", "reparam", "fixed", "none"])
def test_logits_are_scaled_cosines_without_a_bias(constraint):
    layer = NormalizedLinear(3, 4, scale=7.0, constraint=constraint)
    assert {name for name, _ in layer.named_parameters()} <= {"weight"}
    z = points().float()
    torch.testing.assert_close(layer(z), layer(5 * z))
    assert layer(z).abs().max() <= 7.0 + 1e-5
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(4))
    assert torch.equal(layer.weight, NormalizedLinear(3, 4, constraint=constraint).weight)


def test_the_projection_after_each_step():
    layer = NormalizedLinear(3, 5)
    z, y = points().float(), LABELS
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    optimizer.register_step_post_hook(lambda *_: layer.project_())
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(layer(z), y).backward()
        optimizer.step()
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
    free = NormalizedLinear(3, 5, constraint="none")
    free.weight.data *= 2
    free.project_()
    torch.testing.assert_close(free.weight.norm(dim=1), torch.full((5,), 2.0))


def test_reparam_has_a_tangential_gradient_that_the_projected_step_follows():
    z, y = points(), LABELS
    tangential = NormalizedLinear(3, 5, constraint="reparam").double()
    projected = NormalizedLinear(3, 5, constraint="project").double()
    for layer in (tangential, projected):
        layer.weight.data.copy_(F.normalize(layer.weight.data, dim=1))  # in double precision
        F.cross_entropy(layer(z), y).backward()
    w, gradient = tangential.weight.detach(), tangential.weight.grad
    torch.testing.assert_close((gradient * w).sum(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    # To first order a projected step is a step along the tangential part of the gradient.
    eps = 1e-5
    step = (F.normalize(w - eps * projected.weight.grad, dim=1) - w) / -eps
    torch.testing.assert_close(step, gradient, atol=1e-4, rtol=1e-3)


# -- metric learning -----------------------------------------------------------------------------------------


def distances(z):
    unit = F.normalize(z, dim=1)
    return [[float((a - b).norm()) for b in unit] for a in unit]


def test_batch_hard_by_brute_force():
    z, d = points(), distances(points())
    losses = []
    for a in range(12):
        positives = [d[a][j] for j in range(12) if LABELS[j] == LABELS[a] and j != a]
        negatives = [d[a][j] for j in range(12) if LABELS[j] != LABELS[a]]
        if positives:
            losses.append(max(0.0, max(positives) - min(negatives) + 0.3))
    assert triplet_batch_hard(z, LABELS, 0.3).item() == pytest.approx(sum(losses) / len(losses))


def test_semi_hard_by_brute_force():
    z, d = points(), distances(points())
    losses = []
    for a, p in itertools.permutations(range(12), 2):
        if LABELS[a] != LABELS[p]:
            continue
        negatives = [d[a][j] ** 2 for j in range(12) if LABELS[j] != LABELS[a]]
        beyond = [n for n in negatives if n > d[a][p] ** 2 + 1e-12]
        losses.append(max(0.0, d[a][p] ** 2 - (min(beyond) if beyond else max(negatives)) + 0.3))
    assert triplet_semi_hard(z, LABELS, 0.3).item() == pytest.approx(sum(losses) / len(losses))


def test_pairs_by_brute_force():
    z, d = points(), distances(points())
    pairs = list(itertools.permutations(range(12), 2))
    near = [d[a][b] ** 2 for a, b in pairs if LABELS[a] == LABELS[b]]
    far = [max(0.0, 1.1 - d[a][b]) ** 2 for a, b in pairs if LABELS[a] != LABELS[b]]
    expected = sum(near) / len(near) + sum(far) / len(far)
    assert contrastive_pairs(z, LABELS, 1.1).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [triplet_batch_hard, triplet_semi_hard, contrastive_pairs])
def test_losses_have_gradients_and_refuse_what_has_no_pairs(loss):
    z = points().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS), z)
    same = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    loss(same, torch.tensor([0, 0, 1, 1])).backward()
    assert same.grad.isfinite().all()
    with pytest.raises(DataError, match="larger batch"):
        loss(points(3), torch.tensor([0, 0, 0]))
    with pytest.raises(DataError, match="larger batch"):
        loss(points(3), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="one label for each row"):
        loss(points(3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="margin is 0"):
        loss(points(), LABELS, 0.0)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda: NormalizedLinear(3, 1), "there are 1 classes"),
        (lambda: NormalizedLinear(0, 3), "in_dim is 0"),
        (lambda: NormalizedLinear(3, 3, scale=0.0), "scale is 0"),
        (lambda: NormalizedLinear(3, 3, constraint="tight"), "constraint is 'tight'"),
        (lambda: loss_floor(3, -1.0), "scale is -1"),
        (lambda: scale_for_probability(4, 0.25), "probability is 0.25"),
        (lambda: scale_for_probability(4, 1.0), "probability is 1"),
    ],
)
def test_bad_arguments(query, message):
    with pytest.raises(DataError, match=message):
        query()
