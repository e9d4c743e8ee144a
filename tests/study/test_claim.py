from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paperback.errors import DataError
from paperback.study.claim import Claim, judge, make_claim, reaches


def claim(**numbers: object) -> Claim:
    return make_claim("a claim", paper="so much", **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "high", "direction", "verdict"),
    [
        (0.5, 0.7, "at least", "held"),
        (0.4, 0.7, "at least", "held"),  # the lower end is on the bar
        (0.3, 0.7, "at least", "undecided"),
        (0.3, 0.4, "at least", "undecided"),  # the upper end is on the bar
        (0.2, 0.3, "at least", "did not hold"),
        (0.2, 0.3, "at most", "held"),
        (0.2, 0.4, "at most", "held"),
        (0.3, 0.5, "at most", "undecided"),
        (0.4, 0.5, "at most", "undecided"),
        (0.5, 0.7, "at most", "did not hold"),
        (-math.inf, 0.3, "at most", "held"),
        (0.3, math.inf, "at most", "undecided"),
        (0.5, math.inf, "at least", "held"),
        (math.nan, 0.7, "at least", "did not hold"),
        (0.5, math.nan, "at most", "did not hold"),
    ],
)
def test_interval_decides(low: float, high: float, direction: str, verdict: str) -> None:
    assert judge(0.45, low, high, 0.4, direction) == verdict  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", ["at least", "at most"])
def test_a_value_that_is_not_finite_does_not_hold(value: float, direction: str) -> None:
    assert judge(value, 0.0, 1.0, 0.5, direction) == "did not hold"  # type: ignore[arg-type]


def test_bar_is_reached_up_to_rounding_and_no_further() -> None:
    assert 0.84 - 0.81 < 0.03
    assert reaches(0.84 - 0.81, 0.03, "at least")
    assert reaches(0.3, 0.1 + 0.2, "at most")
    assert not reaches(0.03 - 1e-6, 0.03, "at least")
    assert not reaches(math.nan, 0.0, "at least")


def test_one_value_decides_alone_and_says_so() -> None:
    one = claim(measured=0.8, at_least=0.8)
    assert (one.verdict, one.value, one.interval, one.interval_kind) == ("held", 0.8, None, None)
    assert claim(measured=0.79, at_least=0.8).verdict == "did not hold"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_seeds_have_their_range(n: int) -> None:
    values = [0.80 + 0.01 * i for i in range(n)]
    result = claim(measured=values, at_least=0.8)
    assert result.interval == (min(values), max(values))
    assert (result.interval_kind, result.verdict) == ("range", "held")
    assert claim(measured=values, at_least=0.805).verdict == "undecided"


def test_five_seeds_have_a_t_interval() -> None:
    result = claim(measured=[1.0, 2.0, 3.0, 4.0, 5.0], at_least=1.0)
    # The 0.975 quantile of t with 4 degrees of freedom is 2.776445, the standard error sqrt(2.5 / 5).
    half = 2.776445 * math.sqrt(0.5)
    assert result.interval == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert (result.interval_kind, result.verdict) == ("t interval", "held")
    assert claim(measured=[1.0, 2.0, 3.0, 4.0, 5.0], at_least=1.1).verdict == "undecided"


def test_given_interval_takes_precedence_over_seeds() -> None:
    result = claim(measured=[0.9, 0.9, 0.9], at_least=0.5, interval=(0.4, 1.0))
    assert (result.interval, result.interval_kind, result.verdict) == ((0.4, 1.0), "given", "undecided")


def test_baseline_is_paired_by_seed() -> None:
    # The spread over seeds is large, but the difference is the same in each.
    result = claim(measured=[0.2, 0.5, 0.9], baseline=[0.1, 0.4, 0.8], at_least=0.05)
    assert result.value == pytest.approx(0.1)
    assert result.interval == pytest.approx((0.1, 0.1))
    assert result.verdict == "held"
    assert (result.measured_mean, result.baseline_mean) == pytest.approx((1.6 / 3, 1.3 / 3))


def test_a_single_baseline_stands_for_all_seeds() -> None:
    result = claim(measured=[0.2, 0.4], baseline=0.1, at_most=0.5)
    assert result.interval == pytest.approx((0.1, 0.3))
    assert claim(measured=0.1, baseline=[0.2, 0.4], at_most=0.0).interval == pytest.approx((-0.3, -0.1))


def test_nan_among_seeds_does_not_hold() -> None:
    result = claim(measured=[0.9, math.nan, 0.9], at_least=0.1)
    assert (result.verdict, result.bar_reached) == ("did not hold", False)


@pytest.mark.parametrize(("bar", "reached"), [(0.4, True), (0.6, False)])
def test_without_judging_only_the_bar_is_told(bar: float, reached: bool) -> None:
    result = claim(measured=[0.4, 0.6], at_least=bar, judged=False)
    assert (result.verdict, result.bar_reached) == ("not judged", reached)


@pytest.mark.parametrize(
    "value",
    [np.array([0.5, 0.7]), torch.tensor([0.5, 0.7], dtype=torch.float64), (0.5, 0.7), iter([0.5, 0.7])],
)
def test_arrays_and_tensors_are_taken(value: object) -> None:
    assert claim(measured=value, at_least=0.5).measured == (0.5, 0.7)


@pytest.mark.parametrize("value", [np.float64(0.5), np.array(0.5), torch.tensor(0.5), 1])
def test_scalars_are_taken(value: object) -> None:
    assert claim(measured=value, at_least=0.5).verdict == "held"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"measured": 1.0}, "exactly one of at_least and at_most"),
        ({"measured": 1.0, "at_least": 0.0, "at_most": 2.0}, "exactly one of at_least and at_most"),
        ({"measured": 1.0, "at_least": math.nan}, "finite"),
        ({"measured": [], "at_least": 0.0}, "measured of the claim 'a claim' is empty"),
        ({"measured": "good", "at_least": 0.0}, "measured"),
        ({"measured": [1.0, 2.0], "baseline": [1.0, 2.0, 3.0], "at_least": 0.0}, "2 measured and 3 baseline"),
        ({"measured": 1.0, "at_least": 0.0, "interval": (2.0, 1.0)}, "the lower end first"),
        ({"measured": 1.0, "at_least": 0.0, "interval": (1.0,)}, "two numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        claim(**numbers)
