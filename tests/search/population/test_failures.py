"""A member that fails is replaced, and costs nobody else anything."""

import pytest

from paperback.search import Float, SearchError
from paperback.search.engine import LOST
from paperback.search.population import PopulationTraining

X = {"x": Float(-9.0, 9.0)}
START = [{"x": -2.5}, {"x": 1.0}, {"x": 2.0}, {"x": 3.0}]  # -2.5 is the one that fails
EVERYWHERE = ["local", "process", pytest.param("ray", marks=pytest.mark.slow)]


def raises(config, steps):
    if config["x"] == -2.5 and steps >= 2:
        raise RuntimeError("diverged")


def gives_nan(config, steps):
    return float("nan") if config["x"] == -2.5 and steps >= 2 else None


def gives_infinity(config, steps):
    return float("inf") if config["x"] == -2.5 and steps >= 2 else None


def runs_out_of_memory(config, steps):
    if config["x"] == -2.5 and steps >= 2:
        raise MemoryError


def asks_for_too_much(config, steps):
    import torch

    if config["x"] == -2.5 and steps >= 2:
        torch.empty(2**50)


def make_dying():
    def dies(config, steps):
        import os
        import signal

        if config["x"] == -2.5 and steps >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    return dies


def population(**settings):
    settings = {"size": 4, "interval": 1, "start": START, "synchronous": True} | settings
    return PopulationTraining(X, **settings)


def check(result, reason):
    """Place 0 fails in its second turn, copies the best, and fails no more."""
    failed = [trial for trial in result if trial.status == "failed"]
    assert [(trial.number, trial.score) for trial in failed] == [(4, None)]
    assert reason in failed[0].reason
    rescue = next(event for event in result.events if event.rescued)
    assert (rescue.turn, rescue.child) == (1, 0)
    assert rescue.score == max(trial.score for trial in result.trials[5:8])
    assert None not in result.members
    assert all(result.trials[number].score is not None for number in result.members)
    assert result.trials[8].parent == 4 + rescue.parent  # it went on from the weights of the best
    assert result.trials[8].config != START[0]


@pytest.mark.parametrize("engine", EVERYWHERE, indirect=True)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raises, "RuntimeError: diverged"),
        (gives_nan, "score is nan"),
        (gives_infinity, "score is inf"),
        (runs_out_of_memory, "MemoryError"),
        (asks_for_too_much, "RuntimeError"),
    ],
)
def test_a_failed_member_is_replaced(faulty, engine, fault, reason):
    result = population().run(faulty(fault), 5, engine=engine, workers=2, progress=False)
    check(result, reason)
    others = population().run(faulty(fault), 5, progress=False)
    assert [trial.config for trial in result] == [trial.config for trial in others]


@pytest.mark.parametrize("engine", EVERYWHERE[1:], indirect=True)
def test_a_killed_worker_costs_its_member_and_nobody_else(faulty, engine):
    result = population().run(faulty(make_dying()), 5, engine=engine, workers=2, progress=False)
    check(result, LOST)
    quiet = population().run(faulty(raises), 5, progress=False)
    assert [(t.config, t.score) for t in result] == [(t.config, t.score) for t in quiet]


@pytest.mark.parametrize("exploit", ["truncation", "ttest", "tournament", "best"])
@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("copy", ["weights", "hparams", ("weights", "hparams")])
def test_every_strategy_replaces_it(faulty, exploit, synchronous, copy):
    searcher = population(exploit=exploit, synchronous=synchronous, copy=copy)

    def at_once(config, steps):
        raises(config, steps + 1)

    result = searcher.run(faulty(at_once), 6, progress=False)
    assert sum(trial.status == "failed" for trial in result) == 1
    assert next(event for event in result.events if event.child == 0).rescued
    assert None not in result.members


def test_who_fails_in_the_last_turn_is_replaced_too(faulty):
    def late(config, steps):
        return float("nan") if steps == 4 and config["x"] == 3.0 else None

    result = population(exploit=lambda *_: None).run(faulty(late), 4, progress=False)
    assert result.trials[-1].status == "failed"
    assert result.members == (12, 13, 14, 13)
    assert result.events[-1].after == START[1]


def test_the_first_to_fail_waits_for_somebody_to_copy(faulty):
    def first(config, steps):
        return float("nan") if config["x"] == -2.5 else None

    result = population(synchronous=False).run(faulty(first), 4, progress=False)
    assert result.trials[0].status == "failed"
    assert (result.events[0].child, result.events[0].parent) == (0, 1)
    assert len(result) == 16
    assert None not in result.members


@pytest.mark.parametrize("synchronous", [True, False])
def test_when_all_fail_the_search_says_why(faulty, synchronous):
    def fails(config, steps):
        raise KeyError("weights")

    with pytest.raises(SearchError, match=r"all 4 members failed.*KeyError: 'weights'"):
        population(synchronous=synchronous).run(faulty(fails), 4, progress=False)


def test_nobody_is_replaced_where_nobody_copies(faulty):
    result = population(exploit=None).run(faulty(raises), 4, progress=False)
    assert result.members == (None, 13, 14, 15)
    assert not result.events
    with pytest.raises(SearchError, match="member 0 failed"):
        result.schedule(0)
