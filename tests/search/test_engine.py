"""Engines: the same outcomes everywhere, and a call that fails costs itself only."""

import os
import time

import pytest
import torch

from paperback.errors import PaperbackError
from paperback.search.engine import LOST, open_engine

EVERYWHERE = ["local", "process", pytest.param("ray", marks=pytest.mark.slow)]


def work(task: str) -> float:
    """Sent by value, so it imports what it needs."""
    import os
    import signal

    import torch

    if task == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("a word")
    if task == "memory":
        raise MemoryError
    return float(torch.get_num_threads())


def outcomes(name, tasks):
    with open_engine(name, 2) as engine:
        waiting = [engine.submit(work, task) for task in tasks]
        everything = list(waiting)
        while waiting:
            over = engine.wait(waiting)
            assert over.outcome is not None
            waiting.remove(over)
        return [task.outcome for task in everything]


@pytest.mark.parametrize("engine", EVERYWHERE, indirect=True)
def test_values_and_failures_come_back_in_their_places(engine):
    before = torch.get_num_threads()
    found = outcomes(engine, ["fine", "raise", "memory", "fine"])
    assert [outcome.value for outcome in found] == [1.0, None, None, 1.0]
    assert [outcome.error for outcome in found] == [None, "ValueError: a word", "MemoryError", None]
    assert [outcome.kind for outcome in found] == ["", "ValueError", "MemoryError", ""]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("engine", EVERYWHERE[1:], indirect=True)
def test_a_process_that_is_killed_costs_its_call_only(engine):
    found = outcomes(engine, ["fine", "die", "fine", "raise", "fine"])
    assert [outcome.value for outcome in found] == [1.0, None, 1.0, None, 1.0]
    assert found[1].error.startswith(LOST)
    assert found[3].error == "ValueError: a word"


def test_processes_are_others():
    with open_engine("process", 1) as engine:
        task = engine.submit(os.getpid)
        engine.wait([task])
    assert task.outcome.value not in (None, os.getpid())


def test_an_engine_that_is_given_is_left_open():
    with open_engine("process", 1) as engine:
        with open_engine(engine) as same:
            assert same is engine
        task = engine.submit(time.time)
        assert engine.wait([task]).outcome.error is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("moon",), "no engine 'moon'"), (("local", 0), "at least 1")],
)
def test_what_is_no_engine_is_refused(arguments, message):
    with pytest.raises(PaperbackError, match=message), open_engine(*arguments):
        pass
