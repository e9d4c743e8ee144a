"""The loop that every ask-and-tell search runs in: propose, evaluate somewhere, write down, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from paperback.errors import DataError
from paperback.search.engine import Engine, Outcome, Task, open_engine
from paperback.search.interface import InvalidTrial, Mode, Proposal, Searcher, SearchResult, Status, Trial
from paperback.search.parameters import Config
from paperback.search.store import TrialStore
from paperback.study.progress import Bars
from paperback.training import derive

Evaluate = Callable[[Config, int], Any]
SCORE = "score"


def search(
    searcher: Searcher,
    evaluate: Evaluate,
    budget: int,
    *,
    mode: Mode = "max",
    engine: str | Engine = "local",
    workers: int | None = None,
    batch: int = 1,
    asynchronous: bool = False,
    store: str | Path | None = None,
    seconds: float = math.inf,
    progress: bool = True,
) -> SearchResult:
    """Search: propose, evaluate, write down, tell, until the budget is spent.

    Proposals are made in rounds of `batch`, evaluated at once, and told in the order of their numbers. So the
    trials depend on the searcher, its seed and `batch`, and not on the engine, the number of workers or which
    evaluation is over first. An asynchronous search has no rounds: it keeps `batch` evaluations under way and
    tells each when it is over, which wastes no time and cannot be repeated.

    Args:
        searcher: a new one; where a store has trials, it is told these first.
        evaluate: ``(config, seed) -> score``, or to a mapping with "score" and further numbers. It raises
            `InvalidTrial` for a configuration that makes no usable model. Other engines than "local" send it
            by value.
        budget: trials, >= 1, those of the store included.
        mode: whether greater ("max") or smaller ("min") scores are better.
        engine: where evaluations are made, see `paperback.search.engine.open_engine`.
        workers: how many at once; `batch` if not given.
        batch: proposals made before the first of them is told, >= 1.
        asynchronous: see above.
        store: folder for the trials; a search that was begun there goes on.
        seconds: no evaluation begins after so many, counted in this sitting.
        progress: show a progress bar.

    Returns:
        All trials. Ctrl-C leaves the store as it is, to go on from.

    Raises:
        DataError: if an argument is out of range, the store is another search's, or evaluate returns
            something that is no number.
    """
    if budget < 1 or batch < 1:
        raise DataError(f"budget is {budget} and batch {batch}; both are at least 1.")
    if mode not in ("max", "min"):
        raise DataError(f'mode is {mode!r}; it is "max" or "min".')
    if searcher.asked or searcher.told:
        raise DataError("the searcher has been used; give a new one, and a store to go on with a search.")
    deadline = time.perf_counter() + seconds
    facts = searcher.facts() | {"mode": mode, "batch": batch, "asynchronous": asynchronous}
    book = None if store is None else TrialStore(store, facts)
    trials = [] if book is None else book.read(repair=True)
    with open_engine(engine, workers or batch) as place:
        step = _asynchronously if asynchronous else _in_rounds
        sign = 1.0 if mode == "max" else -1.0
        running = step(_Evaluator(searcher, evaluate, place, sign), trials, budget, batch, deadline)
        for trial in Bars(progress).track(running, "trials", max(0, budget - len(trials))):
            trials.append(trial)
            if book is not None:
                book.append(trial)
    trials.sort(key=lambda trial: trial.number)
    return SearchResult(tuple(trials), mode, sum(trial.seconds for trial in trials))


class _Evaluator:
    """A searcher, the function that is searched over, and where it is called."""

    def __init__(self, searcher: Searcher, evaluate: Evaluate, engine: Engine, sign: float) -> None:
        self.searcher = searcher
        self.engine = engine
        self._evaluate = evaluate
        self._sign = sign

    def begin(self, proposal: Proposal) -> Task:
        """Evaluate, with a seed that depends on the number of the proposal."""
        seed = derive(self.searcher.seed, "evaluate", proposal.number)
        return self.engine.submit(self._evaluate, proposal.config, seed)

    def finish(self, running: dict[int, tuple[Proposal, Task]]) -> Trial:
        """The first of some evaluations that is over, taken out of them."""
        over = self.engine.wait([task for _, task in running.values()])
        number = next(number for number, (_, task) in running.items() if task is over)
        proposal, _ = running.pop(number)
        assert over.outcome is not None
        return _trial(proposal, over.outcome)

    def tell(self, trial: Trial) -> None:
        """What a searcher learns from a trial."""
        score = None if trial.score is None else self._sign * trial.score
        self.searcher.tell(Proposal(trial.number, trial.config, trial.parent), score)


def _in_rounds(
    work: _Evaluator, stored: list[Trial], budget: int, batch: int, deadline: float
) -> Iterator[Trial]:
    """Trials of rounds whose members do not know of each other, in the order in which they are over."""
    known = {trial.number: trial for trial in stored}
    while work.searcher.asked < budget and time.perf_counter() < deadline:
        first = work.searcher.asked
        numbers = range(first, min(first + batch, budget))
        if all(number in known for number in numbers):  # what was asked need not be asked again
            for number in numbers:
                work.tell(known[number])
            continue
        proposals = [work.searcher.ask() for _ in numbers]
        for proposal in proposals:
            if proposal.number in known:
                _check_same(proposal, known[proposal.number])
        running: dict[int, tuple[Proposal, Task]] = {}
        for proposal in proposals:
            if proposal.number not in known:
                running[proposal.number] = (proposal, work.begin(proposal))
            if len(running) >= work.engine.workers:
                yield _note(work.finish(running), known)
        while running:
            yield _note(work.finish(running), known)
        for number in numbers:
            work.tell(known[number])


def _asynchronously(
    work: _Evaluator, stored: list[Trial], budget: int, batch: int, deadline: float
) -> Iterator[Trial]:
    """Trials in the order in which they are over; a new one begins whenever one is."""
    for trial in stored:
        work.tell(trial)
    left = budget - len(stored)
    running: dict[int, tuple[Proposal, Task]] = {}
    while left > 0 or running:
        while left > 0 and len(running) < min(batch, work.engine.workers) and time.perf_counter() < deadline:
            proposal = work.searcher.ask()
            running[proposal.number] = (proposal, work.begin(proposal))
            left -= 1
        if not running:
            return
        trial = work.finish(running)
        work.tell(trial)
        yield trial


def _note(trial: Trial, known: dict[int, Trial]) -> Trial:
    known[trial.number] = trial
    return trial


def _check_same(proposal: Proposal, stored: Trial) -> None:
    if proposal.config != stored.config:
        raise DataError(
            f"trial {stored.number} of the store is {stored.config}, where this searcher proposes "
            f"{proposal.config}; the searcher, its settings or the library changed. Take another folder."
        )


def _trial(proposal: Proposal, outcome: Outcome) -> Trial:
    """A proposal and what came of it."""
    number, config, parent = proposal.number, proposal.config, proposal.parent
    if outcome.error is not None:
        status: Status = "invalid" if outcome.kind == InvalidTrial.__name__ else "failed"
        return Trial(number, config, status, None, outcome.error, outcome.seconds, parent)
    numbers = outcome.value if isinstance(outcome.value, Mapping) else {SCORE: outcome.value}
    if SCORE not in numbers:
        raise DataError(
            f"evaluate returned {', '.join(map(str, numbers)) or 'an empty mapping'} for trial {number}; "
            f'"{SCORE}" is missing.'
        )
    plain = {str(name): _number(value, f"{name} of trial {number}") for name, value in numbers.items()}
    score = plain.pop(SCORE)
    details = {name: value for name, value in plain.items() if math.isfinite(value)}
    if not math.isfinite(score):
        reason = f"the score is {score}."
        return Trial(number, config, "failed", None, reason, outcome.seconds, parent, details)
    return Trial(number, config, "done", score, "", outcome.seconds, parent, details)


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        raise DataError(f"evaluate returned {value!r} as {what}; it must return numbers.")
    return float(value)
