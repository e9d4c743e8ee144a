"""What came of a population."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from paperback.search.interface import SearchError, SearchResult, Trial
from paperback.search.population.lineage import STEP, Event, Schedule, ancestors, edges, schedule

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class PopulationResult(SearchResult):
    """Every turn of a population, who copied whom, and the best weights.

    A trial is one turn of one member; `trials` have their details: member, turn, steps of the turn, and step,
    the steps that the weights have had by then.

    Attributes:
        members: for each place in the population the number of the trial whose weights it ended with; None
            if it failed and nobody replaced it.
        events: all copies, in their order.
        best_state: what the best member's trainable gave as its state dict.
        seed: of the population.
    """

    members: tuple[int | None, ...] = ()
    events: tuple[Event, ...] = ()
    best_state: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def best(self) -> Trial:
        """The last turn of the member that ended with the best score; the first of equals.

        Raises:
            SearchError: if no member succeeded.
        """
        ended = [trial for trial in self.trials if trial.number in self.members]
        if not ended:
            raise SearchError(f"none of {len(self.members)} members succeeded.")
        return max(ended, key=lambda trial: (self._sign * float(trial.score or 0.0), -trial.number))

    @property
    def lineage(self) -> pd.DataFrame:
        """One row for each copy: turn, child, parent, settings before and after, the parent's score."""
        import pandas as pd

        columns = ["turn", "child", "parent", "before", "after", "score", "rescued"]
        return pd.DataFrame(
            [{name: getattr(e, name) for name in columns} for e in self.events], columns=columns
        )

    def schedule(self, member: int | None = None) -> Schedule:
        """The settings that a member's final weights were trained with, their ancestors' included.

        Args:
            member: its place; the best if not given.

        Raises:
            SearchError: if there is no such member, or it has no weights.
        """
        if member is None:
            return schedule(self.trials, self.best.number, self.seed)
        if not 0 <= member < len(self.members):
            raise SearchError(f"there is no member {member}; they are 0 to {len(self.members) - 1}.")
        number = self.members[member]
        if number is None:
            raise SearchError(f"member {member} failed and was not replaced, so it has no weights.")
        return schedule(self.trials, number, self.seed)

    def plot(self) -> Figure:
        """The tree of ancestors over the scores, and the settings of the population over the steps.

        The weights that ended best, and their ancestors, are drawn in colour. Up to three settings that are
        numbers have a panel each.
        """
        from matplotlib.figure import Figure

        from paperback.study.figures import WIDE, style

        names = [
            name
            for name, value in self.best.config.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ][:3]
        with style():
            figure = Figure(figsize=(WIDE[0], WIDE[1] * (0.55 + 0.45 * max(1, len(names)))))
            panels = figure.subplots(1 + len(names), 1, sharex=True, squeeze=False)[:, 0]
            draw_tree(panels[0], self)
            for axes, name in zip(panels[1:], names, strict=True):
                draw_setting(axes, self, name)
            panels[-1].set_xlabel("steps that the weights have had")
        return figure


def draw_tree(axes: Axes, result: PopulationResult) -> None:
    """The tree of ancestors over the scores."""
    from matplotlib.collections import LineCollection

    from paperback.study.figures import METHOD, REFERENCE

    def place(trial: Trial) -> tuple[float, float]:
        return trial.details[STEP], math.nan if trial.score is None else trial.score

    lines = [[place(parent), place(child)] for parent, child in edges(result.trials)]
    axes.add_collection(LineCollection(lines, colors=REFERENCE, linewidths=0.7, alpha=0.5))
    chain = np.array([place(trial) for trial in ancestors(result.trials, result.best.number)])
    axes.plot(*chain.T, color=METHOD, label="weights that ended best")
    axes.autoscale_view()
    _log_if_wide(axes, np.array([trial.score for trial in result.trials if trial.score is not None]))
    axes.set(ylabel="score", title=f"{len(result.members)} members, {len(result.events)} copies")
    axes.legend()


def draw_setting(axes: Axes, result: PopulationResult, name: str) -> None:
    """A setting's values in the population, and those of the best weights' schedule."""
    from paperback.study.figures import METHOD, REFERENCE

    steps = [trial.details[STEP] for trial in result.trials]
    values = np.array([float(trial.config[name]) for trial in result.trials])
    axes.plot(steps, values, ".", color=REFERENCE, alpha=0.4, markersize=4)
    plan = result.schedule()
    firsts = [first for first, _ in plan.pieces]
    own = [float(config[name]) for _, config in plan.pieces]
    axes.step([*firsts, plan.steps], [*own, own[-1]], where="post", color=METHOD)
    _log_if_wide(axes, values)
    axes.set_ylabel(name)


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    if (values > 0).all() and values.max() > 30 * values.min():
        axes.set_yscale("log")
