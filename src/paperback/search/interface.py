"""What every search has in common: trials, searchers that propose them, trainables, and the result.

A *searcher* proposes configurations and is told how good they were (`Searcher.ask`, `Searcher.tell`). A
*trainable* is a training that can be stopped, stored, changed and gone on with. Both are driven by the loops
of this wing, on any engine, with every trial on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from paperback.errors import DataError, PaperbackError
from paperback.search.parameters import Config
from paperback.training import derive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Status = Literal["done", "failed", "invalid"]
Mode = Literal["max", "min"]


class SearchError(PaperbackError):
    """A search that cannot go on: no trial of it succeeded."""


class InvalidTrial(PaperbackError):
    """Raised by an evaluate function for a configuration that makes no usable model, such as one too large.

    The trial counts, as the worst there is, and the search learns from it; any other exception is a failure.
    """


@dataclass(frozen=True)
class Trial:
    """One configuration and what came of it.

    Attributes:
        number: place in the search, from 0.
        config: what was tried; plain JSON.
        status: "done"; "failed" (an exception, a score that is not finite, a lost process); "invalid"
            (`InvalidTrial`).
        score: the result, None unless done.
        reason: why it failed or is invalid; empty if done.
        seconds: that the evaluation took.
        parent: number of the trial that it was made from, None if from none.
        details: further numbers that the evaluation returned.
    """

    number: int
    config: Config
    status: Status
    score: float | None
    reason: str = ""
    seconds: float = 0.0
    parent: int | None = None
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A configuration to be tried.

    Attributes:
        number: place in the search, from 0.
        config: what to try; plain JSON.
        parent: number of the trial that it was made from, if any.
    """

    number: int
    config: Config
    parent: int | None = None


class Searcher(ABC):
    """Proposes configurations and learns from their scores; greater scores are better.

    What a searcher knows is what it was told, in the order in which it was told; what it draws comes from its
    seed and the number of the proposal. So a search goes on after a kill by telling a new searcher the stored
    trials, and gives what it would have given.

    Args:
        seed: of every draw.

    Attributes:
        asked: proposals made so far.
        told: numbers, configurations and scores, None for a trial that failed.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.asked = 0
        self.told: list[tuple[int, Config, float | None]] = []
        self._pending: dict[int, Config] = {}
        self._finished: set[int] = set()

    def ask(self) -> Proposal:
        """The next configuration to try. Several may be asked for before the first is told."""
        number = self.asked
        config, parent = self._propose(np.random.default_rng(derive(self.seed, "ask", number)))
        self.asked += 1
        self._pending[number] = config
        return Proposal(number, config, parent)

    def tell(self, proposal: Proposal, score: float | None) -> None:
        """Learn what came of a configuration, one's own or a stored one.

        Args:
            proposal: what was tried.
            score: the result, greater is better; None if the trial failed or is invalid.

        Raises:
            DataError: if the score is not finite, or this number has been told already.
        """
        if score is not None and not np.isfinite(score):
            raise DataError(f"the score of trial {proposal.number} is {score}; tell None for a failed trial.")
        if proposal.number in self._finished:
            raise DataError(f"trial {proposal.number} has been told already.")
        self._finished.add(proposal.number)
        self._pending.pop(proposal.number, None)
        self.asked = max(self.asked, proposal.number + 1)
        self.told.append((proposal.number, proposal.config, score))
        self._learn(proposal.number, proposal.config, score)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` of a searcher with the same settings needs to go on alike; plain JSON."""
        return {"asked": self.asked, "told": [list(entry) for entry in self.told]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another searcher with the same settings was.

        Args:
            state: from `state_dict`. Proposals that had not been told by then are forgotten: whoever goes on
                asks for them again.

        Raises:
            DataError: if this searcher has been used already.
        """
        if self.asked or self.told:
            raise DataError("this searcher has been used; load the state into a new one.")
        for number, config, score in state["told"]:
            self.tell(Proposal(number, config), score)

    def facts(self) -> dict[str, Any]:
        """What a store keeps to know this search again: name, seed and settings; plain JSON."""
        return {"searcher": type(self).__name__, "seed": self.seed, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        """The settings on which proposals depend, the space included; plain JSON."""
        return {}

    @abstractmethod
    def _propose(self, rng: np.random.Generator) -> tuple[Config, int | None]:
        """A configuration and the number of its parent, from what was told, what is pending, and `rng`."""

    def _learn(self, number: int, config: Config, score: float | None) -> None:
        """Take in one result; None is a failure. A searcher that does not learn leaves it as it is."""
        return


@runtime_checkable
class Trainable(Protocol):
    """A training that can be stopped, stored, changed and gone on with."""

    def setup(self, config: Config, seed: int) -> None:
        """Begin anew with a configuration."""

    def step(self) -> Mapping[str, float]:
        """Train a little, and return metrics."""

    def state_dict(self) -> dict[str, Any]:
        """All that another instance needs to go on alike: weights, optimizer, random numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""

    def reconfigure(self, config: Config) -> None:
        """Go on with another configuration, without losing weights or an optimizer's momenta."""


@dataclass(frozen=True)
class SearchResult:
    """Every trial of a search, and the best.

    Attributes:
        trials: in the order of their numbers.
        mode: whether the greatest ("max") or the least ("min") score is best.
        seconds: that the search took, over all its sittings.
    """

    trials: tuple[Trial, ...]
    mode: Mode = "max"
    seconds: float = 0.0

    @property
    def best(self) -> Trial:
        """The best trial; the first of equals.

        Raises:
            SearchError: if no trial succeeded.
        """
        scored = [trial for trial in self.trials if trial.score is not None]
        if not scored:
            reasons = sorted({trial.reason for trial in self.trials})
            raise SearchError(f"none of {len(self.trials)} trials succeeded: {'; '.join(reasons[:3])}")
        return max(scored, key=lambda trial: (self._sign * float(trial.score or 0.0), -trial.number))

    @property
    def best_config(self) -> Config:
        """The configuration of the best trial."""
        return self.best.config

    @property
    def _sign(self) -> float:
        return 1.0 if self.mode == "max" else -1.0

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def best_so_far(self) -> np.ndarray:
        """The best score among the first 1, 2, ... trials, ``(trials,)``; NaN before the first success."""
        scores = np.array([np.nan if trial.score is None else trial.score for trial in self.trials])
        running = np.fmax.accumulate(self._sign * scores) if len(scores) else scores
        return self._sign * running

    def table(self) -> pd.DataFrame:
        """One row a trial: number, status, score, seconds, parent, reason, and a column for each setting."""
        import pandas as pd

        rows = [
            {
                "number": trial.number,
                "status": trial.status,
                "score": trial.score,
                "seconds": trial.seconds,
                "parent": trial.parent,
                "reason": trial.reason,
                **trial.config,
                **trial.details,
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Figure:
        """Each trial's score and the best so far, against the number of trials."""
        from matplotlib.figure import Figure

        from paperback.study.figures import METHOD, REFERENCE, WIDE, style

        with style():
            figure = Figure(figsize=WIDE)
            axes = figure.subplots()
            scores = [np.nan if trial.score is None else trial.score for trial in self.trials]
            axes.plot(scores, ".", color=REFERENCE, alpha=0.7, label="trial")
            axes.step(range(len(scores)), self.best_so_far(), where="post", color=METHOD, label="best so far")
            axes.set(xlabel="trials", ylabel="score", title=f"{len(scores)} trials")
            axes.legend()
        return figure
