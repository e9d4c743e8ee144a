"""Lineage: the schedule is that of the weights, and a replay with it gives the weights again."""

from dataclasses import replace

import pytest
import torch

from paperback.errors import DataError
from paperback.search import Float
from paperback.search.interface import Trial
from paperback.search.population import PopulationTraining, Schedule, replay, schedule
from paperback.search.population.lineage import ancestors, seed_of

LR = {"lr": Float(1e-3, 0.6, log=True)}


def trial(number, lr, parent, steps=10):
    """One turn of three members."""
    details = {"member": float(number % 3), "turn": float(number // 3), "steps": float(steps)}
    return Trial(number, {"lr": lr}, "done", 0.0, parent=parent, details=details)


# Place 2 copies place 0 after turn 0, place 1 copies place 2 after turn 1, and place 0 place 1 after turn 2.
TRIALS = [
    trial(0, 0.1, None), trial(1, 0.2, None), trial(2, 0.3, None),
    trial(3, 0.1, 0), trial(4, 0.2, 1), trial(5, 0.12, 0),
    trial(6, 0.1, 3), trial(7, 0.144, 5), trial(8, 0.12, 5),
    trial(9, 0.1152, 7, 4), trial(10, 0.144, 7, 4), trial(11, 0.12, 8, 4),
]  # fmt: skip


def test_schedules_are_those_of_the_ancestors():
    def pieces(*steps):
        return tuple((first, {"lr": lr}) for first, lr in steps)

    plan = schedule(TRIALS, 9)
    assert plan == Schedule(pieces((0, 0.1), (10, 0.12), (20, 0.144), (30, 0.1152)), 34, seed_of(0, 0))
    assert schedule(TRIALS, 10).pieces == pieces((0, 0.1), (10, 0.12), (20, 0.144))
    assert schedule(TRIALS, 11).pieces == pieces((0, 0.1), (10, 0.12))
    assert schedule(TRIALS, 4) == Schedule(pieces((0, 0.2)), 20, seed_of(0, 1))
    assert [t.number for t in ancestors(TRIALS[::-1], 9)] == [0, 5, 7, 9]
    with pytest.raises(DataError, match="no trial 12"):
        schedule(TRIALS, 12)


def test_the_settings_of_a_step():
    plan = schedule(TRIALS, 9)
    lrs = [plan.at(step)["lr"] for step in (0, 9, 10, 19, 20, 29, 30, 33)]
    assert lrs == [0.1, 0.1, 0.12, 0.12, 0.144, 0.144, 0.1152, 0.1152]


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("exploit", ["truncation", "tournament"])
def test_a_replay_gives_the_weights_bit_by_bit(noisy, synchronous, exploit):
    searcher = PopulationTraining(LR, size=6, interval=4, exploit=exploit, synchronous=synchronous)
    result = searcher.run(noisy, 42, progress=False)
    for member in range(6):
        plan = result.schedule(member)
        again = replay(noisy, plan)
        score = result.trials[result.members[member]].score
        assert again.metrics[-1]["score"] == score
        assert len(again.metrics) == plan.steps
    assert all(len(result.schedule(event.child).pieces) > 1 for event in result.events[-1:])
    best = replay(noisy, result.schedule())
    assert all(torch.equal(best.state[name], result.best_state[name]) for name in best.state)
    assert replay(noisy, result.schedule(), seed=5).metrics[-1] != best.metrics[-1]


def test_a_replay_of_other_settings_is_other(noisy):
    result = PopulationTraining(LR, size=6, interval=4, synchronous=True).run(noisy, 42, progress=False)
    plan = result.schedule()
    constant = replace(plan, pieces=plan.pieces[:1])
    assert len(plan.pieces) > 1
    assert replay(noisy, constant).metrics[-1] != replay(noisy, plan).metrics[-1]
