"""What the weights of a member went through: copies, ancestors, and the schedule of settings to train again.

A trial of a population is one turn of one member, and its parent is the trial whose state it went on from. So
the ancestors of a trial are the whole history of its weights, which is not that of the member's place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paperback.errors import DataError
from paperback.search.interface import Trainable, Trial
from paperback.search.parameters import Config
from paperback.training import derive

MEMBER, TURN, STEPS, STEP = "member", "turn", "steps", "step"  # details of every trial of a population


@dataclass(frozen=True)
class Event:
    """One member copied another.

    Attributes:
        turn: that the member had just finished, from 0.
        child: place of the member that copied.
        parent: place of the member that was copied.
        before: settings that the child had.
        after: settings that it goes on with, explored.
        score: of the parent, as the trainable gave it.
        rescued: whether the child had failed.
    """

    turn: int
    child: int
    parent: int
    before: Config
    after: Config
    score: float
    rescued: bool


@dataclass(frozen=True)
class Schedule:
    """The settings that some weights were trained with, piece by piece.

    Attributes:
        pieces: (first step, settings), the first from step 0.
        steps: that the weights were trained for.
        seed: that the oldest ancestor was set up with.
    """

    pieces: tuple[tuple[int, Config], ...]
    steps: int
    seed: int

    def at(self, step: int) -> Config:
        """The settings of a step, from 0."""
        return next(config for first, config in reversed(self.pieces) if first <= step)


@dataclass(frozen=True)
class Replay:
    """A training with a schedule.

    Attributes:
        metrics: what each step returned.
        state: after the last step.
    """

    metrics: tuple[Mapping[str, float], ...]
    state: dict[str, Any]


def seed_of(seed: int, member: int) -> int:
    """The seed that a member's trainable is set up with."""
    return derive(seed, "member", member)


def ancestors(trials: Sequence[Trial], number: int) -> list[Trial]:
    """The trials whose steps made the weights of a trial, the oldest first, the trial itself last.

    Args:
        trials: of a population, in any order.
        number: of the trial.

    Raises:
        DataError: if there is no such trial.
    """
    by_number = {trial.number: trial for trial in trials}
    if number not in by_number:
        raise DataError(f"there is no trial {number} among the {len(by_number)} of this population.")
    chain, place = [], by_number.get(number)
    while place is not None:
        chain.append(place)
        place = None if place.parent is None else by_number[place.parent]
    return chain[::-1]


def schedule(trials: Sequence[Trial], number: int, seed: int = 0) -> Schedule:
    """The schedule that the weights of a trial really saw.

    Args:
        trials: of a population.
        number: of the trial.
        seed: of the population.

    Returns:
        Pieces of constant settings; neighbours that are alike are one.
    """
    chain = ancestors(trials, number)
    pieces: list[tuple[int, Config]] = []
    steps = 0
    for trial in chain:
        if not pieces or pieces[-1][1] != trial.config:
            pieces.append((steps, dict(trial.config)))
        steps += int(trial.details[STEPS])
    return Schedule(tuple(pieces), steps, seed_of(seed, int(chain[0].details[MEMBER])))


def replay(trainable: Callable[[], Trainable], plan: Schedule, seed: int | None = None) -> Replay:
    """Train one new model with a schedule.

    With a trainable whose state holds all of its random numbers, and the seed of the schedule, this gives the
    weights of the population bit by bit; with another seed, it shows what the schedule is worth by itself.

    Args:
        trainable: gives a new trainable.
        plan: from `schedule`.
        seed: for the trainable's setup; that of the schedule if not given.

    Returns:
        The metrics of each step, and the last state.
    """
    model = trainable()
    model.setup(dict(plan.pieces[0][1]), plan.seed if seed is None else seed)
    changes = dict(plan.pieces[1:])
    metrics = []
    for step in range(plan.steps):
        if step in changes:
            model.reconfigure(dict(changes[step]))
        metrics.append(model.step())
    return Replay(tuple(metrics), dict(model.state_dict()))


def edges(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Trial]]:
    """Each trial that succeeded with the one that it went on from."""
    by_number = {trial.number: trial for trial in trials}
    for trial in trials:
        if trial.parent is not None and trial.score is not None:
            yield by_number[trial.parent], trial
