"""The population as everybody sees it: who has which weights, settings and score, and who copies whom.

What happens here depends only on the seed and on the trials in the order in which they are absorbed. So a
population that was stopped is brought back by absorbing the trials of its store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import numpy as np

from paperback.errors import DataError
from paperback.search.interface import Mode, SearchError, Trial
from paperback.search.parameters import Config, Parameter, sample_config
from paperback.search.population.exploit import EVALUATIONS, Exploit, Standing, truncation
from paperback.search.population.lineage import MEMBER, Event, seed_of
from paperback.search.population.turn import Turn
from paperback.training import derive

Change = Callable[[Config, np.random.Generator], Config]


@dataclass(frozen=True)
class Plan:
    """What a population does; see `PopulationTraining`.

    Attributes:
        exploit: whom to copy; None if nobody ever copies.
        explore: how settings change after a copy.
        quantile: from whose top failed members are replaced.
        copied: "weights", "hparams" or both.
        synchronous: whether all members wait for each other after each turn.
        mode: whether the greatest or the least score is best.
        seed: of the draws.
        steps: of each turn.
    """

    exploit: Exploit | None
    explore: Change
    quantile: float
    copied: Set[str]
    synchronous: bool
    mode: Mode
    seed: int
    steps: tuple[int, ...]


@dataclass
class Member:
    """A place in the population.

    Attributes:
        config: settings of its next turn.
        turn: turns that it has had.
        weights: number of the trial that they are of, None at the beginning.
        standing: what the others know.
    """

    config: Config
    turn: int = 0
    weights: int | None = None
    standing: Standing = field(default_factory=lambda: Standing(None))

    @property
    def lost(self) -> bool:
        """Whether its training failed and nobody has taken its place yet."""
        return self.standing.score == -math.inf


class Board:
    """The population.

    Args:
        plan: what it does.
        configs: settings that the members begin with.

    Attributes:
        members: by their places.
        trials: all turns, by their numbers.
        events: all copies, in their order.
    """

    def __init__(self, plan: Plan, configs: Sequence[Config]) -> None:
        self.plan = plan
        self.members = [Member(dict(config)) for config in configs]
        self.trials: dict[int, Trial] = {}
        self.events: list[Event] = []

    def ready(self, running: Set[int]) -> list[int]:
        """Members that can take a turn now, the least advanced first.

        Args:
            running: members that are taking one.
        """
        waiting = [
            (member.turn, place)
            for place, member in enumerate(self.members)
            if place not in running and not member.lost and member.turn < len(self.plan.steps)
        ]
        if self._barrier:
            now = min((member.turn for member in self.members), default=0)
            waiting = [(turn, place) for turn, place in waiting if turn == now]
        return [place for _, place in sorted(waiting)]

    def turn(self, place: int) -> Turn:
        """The next turn of a member."""
        member = self.members[place]
        before = member.config if member.weights is None else self.trials[member.weights].config
        return Turn(
            number=member.turn * len(self.members) + place,
            seed=seed_of(self.plan.seed, place),
            config=member.config,
            config_of_state=before,
            state=member.weights,
            steps=self.plan.steps[member.turn],
        )

    def weights(self) -> set[int]:
        """The trials whose states are still needed."""
        return {member.weights for member in self.members if member.weights is not None}

    def absorb(self, trial: Trial) -> None:
        """Take in a turn, and let members copy.

        Args:
            trial: the turn that `turn` gave, and what came of it.

        Raises:
            SearchError: if there is nobody left whom failed members could copy.
        """
        member = self.members[int(trial.details[MEMBER])]
        self.trials[trial.number] = trial
        member.turn += 1
        if trial.score is None:
            member.standing = Standing(-math.inf)
        else:
            score = trial.score if self.plan.mode == "max" else -trial.score
            recent = (*member.standing.recent, score)[-EVALUATIONS:]
            member.weights, member.standing = trial.number, Standing(score, recent)
        if self.plan.exploit is None:
            return
        if self._barrier:
            if len({member.turn for member in self.members}) == 1:
                self._decide(list(range(len(self.members))))
                self.check_alive()
            return
        lost = [place for place, other in enumerate(self.members) if other.lost]
        self._decide(sorted({int(trial.details[MEMBER]), *lost}))

    def check_alive(self) -> None:
        """Refuse a population without any member that could be copied.

        Raises:
            SearchError: with the reasons of the failures.
        """
        if all(member.lost for member in self.members):
            reasons = list(dict.fromkeys(t.reason for t in self.trials.values() if t.score is None))
            raise SearchError(
                f"all {len(self.members)} members failed, so there is nobody to go on from: "
                f"{'; '.join(reasons[:3])}"
            )

    @property
    def _barrier(self) -> bool:
        return self.plan.synchronous and self.plan.exploit is not None

    def _decide(self, places: Sequence[int]) -> None:
        """Some members copy others, all as the others were before."""
        before = [replace(member) for member in self.members]
        standings = [member.standing for member in before]
        for place in places:
            member = self.members[place]
            if member.turn == len(self.plan.steps) and not member.lost:
                continue  # there is no turn left to use a copy in
            stream = (self.plan.seed, "exploit", place, member.turn)
            source = self._source(place, standings, np.random.default_rng(derive(*stream)))
            if source is not None:
                self._copy(place, source, before[source])

    def _source(self, place: int, standings: Sequence[Standing], rng: np.random.Generator) -> int | None:
        if self.members[place].lost:
            return truncation(place, standings, rng, self.plan.quantile)
        assert self.plan.exploit is not None
        source = self.plan.exploit(place, standings, rng)
        if source is None or source == place:
            return None
        if not 0 <= source < len(standings):
            raise DataError(f"exploit returned {source!r}; it returns a place from 0 or None.")
        return source if standings[source].usable else None

    def _copy(self, place: int, source: int, parent: Member) -> None:
        """A failed member copies everything: its own weights are gone, and its settings were no good."""
        member, rescued = self.members[place], self.members[place].lost
        before = member.config
        if rescued or "weights" in self.plan.copied:
            # Unseen by the others until its next evaluation, see the package's docstring.
            member.weights, member.standing = parent.weights, Standing(None, parent.standing.recent)
        if rescued or "hparams" in self.plan.copied:
            stream = (self.plan.seed, "explore", place, member.turn)
            member.config = dict(parent.config)
            if member.turn < len(self.plan.steps):
                rng = np.random.default_rng(derive(*stream))
                member.config = self.plan.explore(member.config, rng)
        assert parent.weights is not None
        score = self.trials[parent.weights].score
        assert score is not None
        self.events.append(Event(member.turn - 1, place, source, before, dict(member.config), score, rescued))


def first_configs(
    space: Mapping[str, Parameter], size: int, seed: int, start: Sequence[Config]
) -> list[Config]:
    """Settings to begin with: those given, and independent draws from the prior for the other members."""
    return [
        dict(start[place])
        if place < len(start)
        else sample_config(space, np.random.default_rng(derive(seed, "draw", place)))
        for place in range(size)
    ]
