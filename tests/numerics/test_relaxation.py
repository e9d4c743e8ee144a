"""Relaxations: exact values forward, the stated gradients backward, the limits of the temperature."""

from __future__ import annotations

import math

import pytest
import torch

from paperback.errors import DataError
from paperback.numerics.relaxation import gumbel_noise, gumbel_softmax, straight_through
from paperback.training import generator


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    soft = (100 * torch.randn(50, generator=generator(0), dtype=torch.float64)).requires_grad_()
    out = straight_through(soft > 0, soft)
    assert torch.equal(out, (soft > 0).double())
    weights = torch.arange(50, dtype=torch.float64)
    (out * weights).sum().backward()
    assert torch.equal(soft.grad, weights)
    with pytest.raises(DataError, match="shape"):
        straight_through(torch.ones(3), torch.ones(4))


def test_gumbel_noise_has_the_moments_of_its_law() -> None:
    noise = gumbel_noise((200_000,), generator(1), dtype=torch.float64)
    deviation = math.pi / math.sqrt(6)
    assert abs(float(noise.mean()) - 0.5772157) < 4 * deviation / math.sqrt(len(noise))
    assert abs(float(noise.std()) / deviation - 1) < 0.02
    assert bool(noise.isfinite().all())
    assert torch.equal(noise[:5], gumbel_noise((200_000,), generator(1), dtype=torch.float64)[:5])


def test_draws_follow_the_softmax_of_the_logits() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    n = 40_000
    drawn = gumbel_softmax(logits.expand(n, 4), 0.3, generator=generator(2), hard=True)
    assert bool((drawn.sum(-1) == 1).all())
    assert bool(((drawn == 0) | (drawn == 1)).all())
    expected = logits.softmax(-1)
    error = (expected * (1 - expected) / n).sqrt()
    assert bool(((drawn.mean(0) - expected).abs() < 4 * error).all())


def test_temperature_limits() -> None:
    logits = torch.randn(20, 6, generator=generator(3), dtype=torch.float64)
    noise = gumbel_noise((20, 6), generator(4), dtype=torch.float64)
    cold = gumbel_softmax(logits, 1e-4, noise=noise)
    assert torch.equal(cold.round(), gumbel_softmax(logits, 1.0, noise=noise, hard=True))
    assert float((gumbel_softmax(logits, 1e6, noise=noise) - 1 / 6).abs().max()) < 1e-4
    assert torch.allclose(gumbel_softmax(logits, 2.0, noise=torch.zeros(20, 6)), (logits / 2).softmax(-1))


@pytest.mark.parametrize("dim", [0, -1])
def test_hard_draws_have_the_gradient_of_the_soft_ones(dim: int) -> None:
    logits = torch.randn(5, 3, generator=generator(5), dtype=torch.float64)
    noise = gumbel_noise((5, 3), generator(6), dtype=torch.float64)
    weight = torch.randn(5, 3, generator=generator(7), dtype=torch.float64)
    gradients = []
    for hard in (False, True):
        x = logits.clone().requires_grad_()
        (gumbel_softmax(x, 0.7, noise=noise, hard=hard, dim=dim) * weight).sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda x: gumbel_softmax(x, 0.7, noise=noise, dim=dim), logits.requires_grad_()
    )


def test_bad_input() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(DataError, match="temperature"):
        gumbel_softmax(logits, 0.0, generator=generator(0))
    with pytest.raises(DataError, match="exactly one"):
        gumbel_softmax(logits)
    with pytest.raises(DataError, match="exactly one"):
        gumbel_softmax(logits, noise=torch.zeros(2, 3), generator=generator(0))
    with pytest.raises(DataError, match="shape"):
        gumbel_softmax(logits, noise=torch.zeros(3))
