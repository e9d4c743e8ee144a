"""A measurement: its checks, its table, its words and its figure."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperback.errors import DataError
from paperback.theory.interface import Measurement, t_interval


def example(**change):
    fields = {"value": [1.0, 2.0], "interval": ([0.5, 1.5], [1.5, 2.5]), "n": 10, "prediction": [1.0, 2.1]}
    return Measurement("K", **(fields | {"index": ["first", "last"], "axis": "layer"} | change))


def test_mean_error_and_interval_are_those_of_scipy():
    samples = np.random.default_rng(0).normal(size=(12, 3))
    measured = Measurement.from_samples("x", samples, confidence=0.9)
    np.testing.assert_allclose(measured.value, samples.mean(0))
    np.testing.assert_allclose(measured.standard_error, stats.sem(samples))
    expected = stats.t.interval(0.9, 11, samples.mean(0), stats.sem(samples))
    np.testing.assert_allclose(measured.interval, expected)
    assert (measured.n, measured.confidence) == (12, 0.9)


def test_one_repetition_has_no_interval_and_infinite_freedom_is_normal():
    assert Measurement.from_samples("x", [3.0]).interval is None
    assert t_interval(0.0, 1.0, math.inf)[1] == pytest.approx(1.959964, abs=1e-6)


def test_tensors_become_float64_that_nobody_writes_to():
    measured = Measurement("x", torch.ones(3, requires_grad=True))
    assert measured.value.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        measured.value[0] = 2
    assert isinstance(Measurement("x", torch.tensor(2)).value, float)


def test_parts_flags_and_words():
    part = Measurement("upper", 3.0, (2.0, 4.0), unit="bits", prediction=2.5, flags={"saturated"})
    whole = example(parts={"upper": part})
    assert whole["upper"] is part
    assert whole["K"] is whole
    assert "saturated" in part.flags
    text = str(whole)
    assert "2 entries" in text
    assert "upper = 3 [2, 4] bits, predicted 2.5 (n = 1, saturated)" in text
    with pytest.raises(DataError, match="no part 'lower'"):
        whole["lower"]


def test_table_has_a_row_per_entry_and_leaves_out_empty_columns():
    table = example(parts={"b": Measurement("b", 2.0, unit="bits")}).table()
    assert list(table["layer"])[:2] == ["first", "last"]
    assert list(table["value"]) == [1, 2, 2]
    assert table["low"].isna().tolist() == [False, False, True]
    assert "standard error" not in table
    assert "unit" not in example().table()
    assert example(index=None).table()["layer"].tolist() == [1, 2]


def test_plot_draws_value_interval_and_prediction():
    figure = example(parts={"b": Measurement("b", 2.0, (1.0, 3.0))}).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["K", "b"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["measured", "predicted"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["first", "last"]


def test_plot_into_given_axes():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    assert example(index=[10, 20]).plot(axes) is figure
    assert axes.get_lines()[0].get_xdata().tolist() == [10, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n = 0"),
        ({"value": np.ones((2, 2))}, "one dimension"),
        ({"interval": ([2.0, 2.0], [1.0, 3.0])}, "lower end above"),
        ({"prediction": 1.0}, "prediction of K"),
        ({"standard_error": [1.0]}, "standard_error of K"),
        ({"index": ["one"]}, "index 1"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        example(**change)


def test_no_samples_and_a_bad_confidence():
    with pytest.raises(DataError, match="one row per repetition"):
        Measurement.from_samples("x", [])
    with pytest.raises(DataError, match="confidence is 1"):
        Measurement.from_samples("x", [1.0, 2.0], confidence=1)
