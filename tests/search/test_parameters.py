"""Flat spaces: ranges are kept, priors are what they say, and what is no space is refused."""

import numpy as np
import pytest
from scipy import stats

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer
from paperback.search.parameters import check_config, check_space, sample_config

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "parameter",
    [Float(-2, 3), Float(1e-4, 1, log=True), Integer(1, 9), Integer(1, 99, log=True), Choice(["a", 2, None])],
)
def test_draws_are_values_of_the_parameter(parameter):
    assert all(parameter.contains(parameter.sample(RNG)) for _ in range(500))


def test_a_logarithmic_number_is_uniform_in_its_logarithm():
    draws = [Float(1e-3, 1e1, log=True).sample(RNG) for _ in range(2000)]
    assert stats.kstest((np.log10(draws) + 3) / 4, "uniform").pvalue > 1e-3


def test_the_ends_of_a_whole_range_are_drawn_as_often_as_the_rest():
    counts = np.bincount([Integer(1, 4).sample(RNG) for _ in range(4000)], minlength=5)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3
    logarithmic = np.bincount([Integer(1, 8, log=True).sample(RNG) for _ in range(4000)], minlength=9)[1:]
    expected = np.diff(np.log(np.arange(0.5, 9.5)))
    assert stats.chisquare(logarithmic, 4000 * expected / expected.sum()).pvalue > 1e-3


def test_clipping_stays_inside_and_keeps_whole_numbers_whole():
    assert Float(0, 1).clip(7.0) == 1.0
    assert Integer(2, 9).clip(3.6) == 4
    assert isinstance(Integer(2, 9).clip(100.0), int)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1, 1), "no range"),
        (lambda: Float(0, np.inf), "no range"),
        (lambda: Float(0, 1, log=True), "greater than 0"),
        (lambda: Integer(0.5, 2), "not whole"),
        (lambda: Choice([]), "no values"),
        (lambda: Choice(["a", "a"]), "stands twice"),
        (lambda: Choice([object()]), "use text, numbers"),
        (lambda: check_space({}), "at least one"),
        (lambda: check_space({"a": 3}), "use Float, Integer or Choice"),
        (lambda: check_space({3: Float(0, 1)}), "names are text"),
        (lambda: check_config({"x": 2.0}, {"x": Float(0, 1)}), "outside"),
        (lambda: check_config({}, {"x": Float(0, 1)}), "does not set 'x'"),
        (lambda: check_config({"x": 0.5, "y": 1}, {"x": Float(0, 1)}), "sets 'y'"),
    ],
)
def test_what_is_no_space_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_true_is_not_one():
    choice = Choice([True, 1])
    assert choice.contains(True)
    assert not Integer(0, 3).contains(True)


def test_the_same_generator_gives_the_same_configuration(space):
    first, second = (sample_config(space, np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert check_config(first, space) == first
