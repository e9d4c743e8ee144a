from __future__ import annotations

import math

import pytest

from paperback.study import wording
from paperback.study.claim import make_claim


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.71432, "0.7143"),
        (0.5, "0.5"),
        (12.3456, "12.35"),
        (123456.7, "123,457"),
        (1234567, "1,234,567"),
        (-0.25, "−0.25"),
        (0.0, "0"),
        (1e-7, "1.00e−07"),
        (math.nan, "not a number"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert wording.number(value) == text


def test_a_column_has_equal_decimals_unless_it_spans_orders_of_magnitude() -> None:
    assert wording.column([0.71432, 0.5, None, 0.68]) == ["0.7143", "0.5000", "–", "0.6800"]
    assert wording.column([1200.0, 0.003]) == ["1,200", "0.003"]
    assert wording.column([0.5, math.nan, 2]) == ["0.5", "not a number", "2"]
    assert wording.column([True, False, "x-y"]) == ["yes", "no", "x-y"]
    assert wording.column([0.0, 0.0]) == ["0", "0"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (59.7, "60 s"),
        (61, "1 min 01 s"),
        (3599.9, "1 h 00 min"),
        (7805, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3_400_000_000, "3.4 GB"), (10**13, "10000.0 GB")],
)
def test_sizes(n: int, text: str) -> None:
    assert wording.size(n) == text


def test_a_sentence_without_interval() -> None:
    claim = make_claim("c", paper="", measured=60, at_most=60.0, unit="iterations")
    assert wording.claim_sentence(claim, 1) == (
        "Measured 60\u00a0iterations (one value, no interval); it had to be at most 60\u00a0iterations. "
        "There is no interval, so the value alone decides."
    )


def test_a_sentence_says_what_the_interval_is_over() -> None:
    claim = make_claim("c", paper="", measured=[0.1, 0.2, 0.3, 0.4, 0.5], at_least=0.9)
    sentence = wording.claim_sentence(claim, 5)
    assert "95 % t interval over 5 seeds" in sentence
    assert sentence.endswith("No part of the interval reaches the bar.")
    assert "over 5 values" in wording.claim_sentence(claim, 1)
    given = make_claim("c", paper="", measured=0.1, at_least=0.0, interval=(0.05, 0.2))
    assert "0.05 to 0.20, interval given by the study" in wording.claim_sentence(given, 1)


@pytest.mark.parametrize(("bar", "words"), [(0.5, "was reached here"), (1.5, "was not reached here")])
def test_a_sentence_of_a_run_that_does_not_judge(bar: float, words: str) -> None:
    claim = make_claim("c", paper="", measured=1.0, at_least=bar, judged=False)
    assert words in wording.claim_sentence(claim, 1)
