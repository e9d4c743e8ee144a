from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from paperback.errors import DataError
from paperback.study.statistics import holm, mean_interval, paired_bootstrap, wilcoxon


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0], (2, 2, 2)), ([1.0, 3.0], (2, 1, 3)), ([1.0, 2.0, 3.0, 6.0], (3, 1, 6)), ([4.0] * 7, (4, 4, 4))],
)
def test_mean_interval_of_few_or_equal_values(values: list[float], expected: tuple[float, ...]) -> None:
    assert tuple(mean_interval(values)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [5, 8, 40])
def test_mean_interval_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert tuple(mean_interval(values.tolist())) == pytest.approx((values.mean(), low, high))


def test_mean_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(loc=1.0, size=(2000, 6))
    covered = np.mean([low <= 1.0 <= high for _, low, high in map(mean_interval, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_mean_interval_of_what_is_not_finite_is_nan() -> None:
    assert all(math.isnan(x) for x in mean_interval([1.0, math.nan, 2.0]))
    with pytest.raises(DataError, match="no values"):
        mean_interval([])


def test_bootstrap_is_paired() -> None:
    a = np.random.default_rng(1).normal(size=400)
    interval = paired_bootstrap(a + 0.1, a, n=500)
    # Every case differs by 0.1; unpaired, the interval would be about 0.28 wide.
    assert tuple(interval) == pytest.approx((0.1, 0.1, 0.1))


def test_bootstrap_agrees_with_the_normal_interval_of_many_cases() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.normal(0.5, 1, 1500), generator.normal(0, 1, 1500)
    difference = a - b
    half = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    result = paired_bootstrap(a, b, n=4000, seed=3)
    assert result.mean == pytest.approx(difference.mean())
    assert result.low == pytest.approx(difference.mean() - half, abs=0.1 * half)
    assert result.high == pytest.approx(difference.mean() + half, abs=0.1 * half)


def test_bootstrap_takes_a_statistic_and_repeats_with_its_seed() -> None:
    generator = np.random.default_rng(4)
    a, b = generator.exponential(size=(2, 101))
    first = paired_bootstrap(a, b, np.median, n=300, seed=5)
    assert first.mean == pytest.approx(np.median(a) - np.median(b))
    assert first.low <= first.mean <= first.high
    assert paired_bootstrap(a, b, np.median, n=300, seed=5) == first
    assert paired_bootstrap(a, b, np.median, n=300, seed=6) != first


def test_wilcoxon_by_hand() -> None:
    # Five positive differences: only one of the 2 ** 5 sign patterns is as extreme on that side.
    a, b = [2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert wilcoxon(a, b, "greater") == pytest.approx(1 / 32)
    assert wilcoxon(a, b) == pytest.approx(2 / 32)
    assert wilcoxon(a, b, "less") == pytest.approx(1.0)
    assert wilcoxon(a, a) == 1.0


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        (
            [0.01, 0.04, 0.03, 0.005],
            [0.03, 0.06, 0.06, 0.02],
        ),  # sorted: .005 * 4, .01 * 3, .03 * 2, max(.06, .04)
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm_by_hand(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


def test_holm_lies_between_the_raw_and_the_bonferroni_values() -> None:
    p = np.random.default_rng(6).random(50) ** 3
    adjusted = holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 50 * p)).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


@pytest.mark.parametrize(("a", "b"), [([1.0, 2.0], [1.0]), ([1.0], [2.0]), ([[1.0, 2.0]], [[1.0, 2.0]])])
@pytest.mark.parametrize("test", [wilcoxon, paired_bootstrap])
def test_pairs_that_are_none_are_refused(test: object, a: list[float], b: list[float]) -> None:
    with pytest.raises(DataError):
        test(a, b)  # type: ignore[operator]


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(DataError, match=r"must lie in 0\.\.1"):
        holm([0.5, 1.5])


def test_the_mean_of_equal_values_lies_in_their_range():
    for value in (0.925, 0.1, 1 / 3):
        for n in (2, 3, 4):
            mean, low, high = mean_interval([value] * n)
            assert low <= mean <= high
