"""Successive halving: who is promoted, and what is spent."""

from collections import Counter

import pytest

from paperback.errors import DataError
from paperback.search import Proposal, search
from paperback.search.halving import SuccessiveHalving


def draw(rng):
    return {"x": float(rng.random())}


def test_the_better_half_goes_on():
    searcher = SuccessiveHalving(draw, (1, 2, 4))
    for number, x in enumerate((0.1, 0.9)):
        searcher.tell(Proposal(number, {"x": x, "steps": 1}), x)
    promoted = searcher.ask()
    assert promoted.config == {"x": 0.9, "steps": 2}
    assert promoted.parent == 1
    assert searcher.ask().config["steps"] == 1  # while it is pending it is not promoted again
    searcher.tell(promoted, 0.5)
    assert searcher.ask().config["steps"] == 1  # one trial of the second rung has no better half


def test_rungs_are_filled_as_they_should_be_and_the_best_arrives():
    result = search(
        SuccessiveHalving(draw, (1, 2, 4)),
        lambda config, seed: config["x"] + config["steps"],
        70,
        progress=False,
    )
    counts = Counter(trial.config["steps"] for trial in result)
    assert counts[1] == pytest.approx(40, abs=3)
    assert counts[2] == pytest.approx(20, abs=3)
    assert counts[4] == pytest.approx(10, abs=3)
    firsts = sorted(trial.config["x"] for trial in result if trial.config["steps"] == 1)
    assert result.best_config["x"] in firsts[-5:]


def test_a_failed_trial_is_not_promoted():
    searcher = SuccessiveHalving(draw, (1, 2))
    for number in range(4):
        searcher.tell(Proposal(number, {"x": 0.1 * number, "steps": 1}), None)
    assert searcher.ask().config["steps"] == 1


@pytest.mark.parametrize("settings", [{"rungs": (1,)}, {"rungs": (2, 1)}, {"rungs": (1, 2), "eta": 1.0}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(DataError, match=r"rungs is|eta is"):
        SuccessiveHalving(draw, **settings)
