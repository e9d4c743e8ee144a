"""Cosine power annealing against torch's cosine, its closed form, its limits, and itself resumed."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paperback.errors import DataError
from paperback.search.sharp_darts import CosinePowerAnnealing, cosine_power

T = 40
EPOCHS = np.arange(1, T + 1)


def direct(T, lr_max, lr_min, power, warmup):
    """The definition: the power of the cosine over all epochs, scaled by its least and greatest."""
    shifted = EPOCHS[:T] - warmup
    c = (1 + np.cos(np.pi * shifted / (T - warmup))) / 2
    q = c if power == 1 else power ** (c + 1)
    q = (q - q.min()) / (q.max() - q.min())
    if warmup:
        q[: warmup + 1] = np.arange(1, warmup + 2) / (warmup + 1)
    return lr_min + (lr_max - lr_min) * q


def scheduled(make, epochs, groups=(0.3,)):
    """Rates of each epoch under a scheduler."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in groups])
    schedule = make(optimizer)
    rates = []
    for _ in range(epochs):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return np.array(rates)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 10.0, 1000.0])
def test_it_is_its_definition(power, warmup):
    expected = direct(T, 0.3, 0.01, power, warmup)
    np.testing.assert_allclose(
        cosine_power(EPOCHS, T, 0.3, 0.01, power=power, warmup=warmup), expected, rtol=1e-10
    )


def test_power_1_after_a_warm_up_is_torchs_cosine_annealing():
    warmup, rest = 5, T - 5
    cosine = scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, rest, 0.01), rest + 1)[:, 0]
    ours = cosine_power(EPOCHS, T, 0.3, 0.01, power=1, warmup=warmup)
    np.testing.assert_allclose(ours[warmup + 1 :], cosine[2:], rtol=1e-9)
    assert ours[warmup] == pytest.approx(cosine[0])


def test_power_1_is_torchs_cosine_up_to_the_scale_of_the_first_epoch():
    cosine = scheduled(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T, 0.01), T + 1)[1:, 0]
    ours = cosine_power(EPOCHS, T, 0.3, 0.01, power=1)
    np.testing.assert_allclose(
        (ours - 0.01) / (ours[0] - 0.01), (cosine - 0.01) / (cosine[0] - 0.01), atol=1e-9
    )


def test_closed_form():
    c = (1 + np.cos(np.pi * EPOCHS / T)) / 2
    for power in (2.0, 10.0):
        q = (power**c - 1) / (power - 1)
        np.testing.assert_allclose(cosine_power(EPOCHS, T, 1.0, power=power), q / q[0], atol=1e-12)


def test_the_limit_of_power_1_is_the_cosine():
    near, at = (cosine_power(EPOCHS, T, 1.0, power=p) for p in (1.001, 1.0))
    assert np.abs(near - at).max() < 1e-3
    np.testing.assert_allclose(cosine_power(EPOCHS, T, 1.0, power=1 + 1e-12), at, atol=1e-9)


@given(st.integers(2, 200), st.floats(1, 1e4), st.data())
def test_it_rises_linearly_and_falls_from_the_greatest_to_the_least(T, power, data):
    warmup = data.draw(st.integers(0, T - 2))
    rates = cosine_power(np.arange(1, T + 1), T, 0.3, 0.01, power=power, warmup=warmup)
    assert rates[warmup] == pytest.approx(0.3)
    assert rates[-1] == pytest.approx(0.01)
    assert (np.diff(rates[warmup:]) <= 1e-12).all()
    np.testing.assert_allclose(np.diff(rates[: warmup + 1], 2), 0, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 6])
def test_the_scheduler_gives_the_same_rates_to_every_group(warmup):
    rates = scheduled(lambda o: CosinePowerAnnealing(o, T, 0.01, 10.0, warmup), T + 5, groups=(0.3, 0.1))
    for column, peak in enumerate((0.3, 0.1)):
        expected = cosine_power(np.arange(1, T + 6), T, peak, 0.01, power=10.0, warmup=warmup)
        np.testing.assert_allclose(rates[:, column], expected, rtol=1e-12)


def test_resumed_it_goes_on_alike():
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.3)
    first = CosinePowerAnnealing(optimizer, T, 0.01, 2.0, 5)
    for _ in range(17):
        optimizer.step()
        first.step()
    other = torch.optim.SGD([torch.zeros(1)], 0.3)
    second = CosinePowerAnnealing(other, T, 0.01, 2.0, 5)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    rates = []
    for _ in range(T - 17):
        rates.append(other.param_groups[0]["lr"])
        other.step()
        second.step()
    assert rates == cosine_power(np.arange(18, T + 1), T, 0.3, 0.01, warmup=5).tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"power": 0.5}, "power is 0.5"),
        ({"power": float("nan")}, "power is nan"),
        ({"T": 0}, "T is 0"),
        ({"warmup": 5}, "warmup is 5"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_bad_settings(settings, words):
    settings = {"T": 5} | settings
    with pytest.raises(DataError, match=words):
        cosine_power(1, lr_max=0.1, **settings)
    with pytest.raises(DataError, match=words):
        CosinePowerAnnealing(torch.optim.SGD([torch.zeros(1)], 0.1), **settings)


def test_epochs_count_from_1():
    with pytest.raises(DataError, match="count from 1"):
        cosine_power([0, 1], 5, 0.1)
