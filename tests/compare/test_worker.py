import numpy as np
import pytest
from fake_bench import HEALTHY

from paperback.compare.worker import checked_metrics
from paperback.errors import DataError, PaperbackError
from paperback.study.wording import one_sentence

FULL = {"fit_seconds": 1, "loss": np.float32(0.5), "accuracy": None, "size": 10.0}


def test_metrics_come_out_as_plain_numbers_in_the_order_of_the_bench():
    metrics = checked_metrics(HEALTHY, FULL)
    assert list(metrics) == ["loss", "accuracy", "size", "fit_seconds"]
    assert metrics["loss"] == 0.5
    assert type(metrics["loss"]) is float
    assert metrics["accuracy"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": float("nan")}, "loss came out as nan"),
        ({"accuracy": float("-inf")}, "accuracy came out as -inf"),
        ({"lost": 1.0}, "has undeclared lost"),
    ],
)
def test_metrics_that_cannot_be_compared_are_refused(change, message):
    with pytest.raises(PaperbackError, match=message):
        checked_metrics(HEALTHY, FULL | change)


def test_a_missing_metric_is_named():
    with pytest.raises(PaperbackError, match="lacks accuracy, size"):
        checked_metrics(HEALTHY, {"loss": 1.0, "fit_seconds": 1.0})


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("two\nlines"), "ValueError: two lines"),
        (KeyError(), "KeyError"),
        (DataError("column x is empty; fill it."), "column x is empty; fill it."),
    ],
)
def test_an_exception_becomes_one_sentence(error, sentence):
    assert one_sentence(error) == sentence


def test_an_endless_message_is_cut():
    assert len(one_sentence(ValueError("x" * 10_000))) == 300
