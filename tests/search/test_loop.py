"""The loop: the same trials on every engine and after every kill, and failures that cost one trial."""

import json
import time

import numpy as np
import pytest

from paperback.errors import ArtefactError, DataError
from paperback.search import (
    InvalidTrial,
    Proposal,
    RandomSearch,
    Searcher,
    SearchError,
    TrialStore,
    read_trials,
    search,
)


class HillClimb(Searcher):
    """A step away from the best that was told, so that what is proposed depends on every score."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.best = (-np.inf, 0.0, None)

    def _propose(self, rng):
        _, x, number = self.best
        return {"x": float(x + rng.normal())}, number

    def _learn(self, number, config, score):
        if score is not None and score > self.best[0]:
            self.best = (score, config["x"], number)


def parabola(config, seed):
    return {"score": -((config["x"] - 3.0) ** 2), "seed": float(seed)}


def essence(result):
    return [
        (trial.number, trial.config, trial.status, trial.score, trial.parent, trial.details)
        for trial in result
    ]


@pytest.mark.parametrize("engine", ["process", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_engine_gives_the_same_trials(engine, batch):
    here = search(HillClimb(), parabola, 8, batch=batch, progress=False)
    there = search(HillClimb(), parabola, 8, batch=batch, engine=engine, workers=2, progress=False)
    assert essence(there) == essence(here)
    assert here.best.score > here.trials[0].score


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kept", [1, 5, 6, 11])
def test_a_search_that_was_killed_goes_on_to_the_same_end(tmp_path, batch, kept):
    whole = search(HillClimb(), parabola, 12, batch=batch, store=tmp_path / "whole", progress=False)
    lines = (tmp_path / "whole" / "trials.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut"
    TrialStore(cut, json.loads((tmp_path / "whole" / "search.json").read_text()))
    (cut / "trials.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])  # killed while writing
    assert len(read_trials(cut / "trials.jsonl")) == kept
    again = search(HillClimb(), parabola, 12, batch=batch, store=cut, progress=False)
    assert essence(again) == essence(whole)
    assert len(read_trials(cut / "trials.jsonl")) == 12


def test_a_larger_budget_continues_and_an_equal_one_has_nothing_to_do(tmp_path):
    def never(config, seed):
        raise AssertionError

    short = search(HillClimb(), parabola, 5, store=tmp_path, progress=False)
    same = search(HillClimb(), never, 5, store=tmp_path, progress=False)
    assert essence(same) == essence(short)
    longer = search(HillClimb(), parabola, 9, store=tmp_path, progress=False)
    assert essence(longer)[:5] == essence(short)
    assert essence(longer) == essence(search(HillClimb(), parabola, 9, progress=False))


def test_an_asynchronous_search_tells_at_once_and_goes_on(tmp_path):
    arguments = {"batch": 2, "engine": "process", "asynchronous": True, "store": tmp_path, "progress": False}
    assert len(search(HillClimb(), parabola, 5, **arguments)) == 5
    result = search(HillClimb(), parabola, 9, **arguments)
    assert [trial.number for trial in result] == list(range(9))
    assert all(trial.score == parabola(trial.config, 0)["score"] for trial in result)


def test_failures_cost_one_trial_and_the_searcher_is_told(space):
    def sometimes(config, seed):
        if config["n"] == 1:
            raise ValueError("too small")
        if config["n"] == 2:
            raise InvalidTrial("no such model")
        return np.nan if config["n"] == 3 else config["x"]

    searcher = RandomSearch(space, seed=1)
    result = search(searcher, sometimes, 40, progress=False)
    by_n = {n: {(t.status, t.reason) for t in result if t.config["n"] == n} for n in (1, 2, 3, 4)}
    assert by_n == {
        1: {("failed", "ValueError: too small")},
        2: {("invalid", "no such model")},
        3: {("failed", "the score is nan.")},
        4: {("done", "")},
    }
    assert [score for _, _, score in searcher.told] == [trial.score for trial in result]
    assert result.best.config["n"] == 4
    assert result.best_so_far()[-1] == result.best.score
    assert len(result.table()) == 40


def test_the_least_score_can_be_the_best():
    result = search(
        HillClimb(), lambda config, seed: (config["x"] - 3.0) ** 2, 30, mode="min", progress=False
    )
    scores = [trial.score for trial in result]
    assert result.best.score == min(scores) == result.best_so_far()[-1]
    assert min(scores) < scores[0]


def test_a_search_of_failures_only_says_why(space):
    result = search(RandomSearch(space), lambda config, seed: 1 / 0, 3, progress=False)
    with pytest.raises(SearchError, match="ZeroDivisionError"):
        result.best  # noqa: B018
    assert np.isnan(result.best_so_far()).all()


@pytest.mark.parametrize("value", ["good", None, [1.0], {"loss": 1.0}, {"score": "good"}])
def test_what_is_no_number_stops_the_search(space, value):
    with pytest.raises(DataError, match=r"evaluate returned .* trial 0"):
        search(RandomSearch(space), lambda config, seed: value, 3, progress=False)


@pytest.mark.parametrize(
    "arguments", [{"budget": 0}, {"budget": 3, "batch": 0}, {"budget": 3, "mode": "best"}]
)
def test_settings_are_checked_before_anything_runs(space, arguments):
    def never(config, seed):
        raise AssertionError

    with pytest.raises(DataError):
        search(RandomSearch(space), never, progress=False, **arguments)


def test_a_store_of_another_search_is_refused(space, tmp_path):
    search(RandomSearch(space, seed=1), parabola_of_x, 2, store=tmp_path, progress=False)
    with pytest.raises(DataError, match="whose seed is 1, not 2"):
        search(RandomSearch(space, seed=2), parabola_of_x, 2, store=tmp_path, progress=False)
    (tmp_path / "trials.jsonl").write_bytes(b'{"number": 0}\n')
    with pytest.raises(ArtefactError, match="line 1"):
        search(RandomSearch(space, seed=1), parabola_of_x, 2, store=tmp_path, progress=False)


def parabola_of_x(config, seed):
    return -(config["x"] ** 2)


def test_a_state_goes_on_bit_for_bit():
    def drive(searcher, trials):
        proposals = []
        for _ in range(trials):
            proposal = searcher.ask()
            proposals.append(proposal)
            searcher.tell(proposal, parabola(proposal.config, 0)["score"])
        return proposals

    whole = drive(HillClimb(3), 10)
    first, second = HillClimb(3), HillClimb(3)
    assert drive(first, 4) == whole[:4]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert drive(second, 6) == whole[4:]
    with pytest.raises(DataError, match="has been used"):
        second.load_state_dict(first.state_dict())
    with pytest.raises(DataError, match="told already"):
        second.tell(Proposal(2, {"x": 0.0}), 1.0)
    with pytest.raises(DataError, match="nan"):
        second.tell(second.ask(), float("nan"))


def test_ten_thousand_trials_are_listed_and_gone_on_with_in_two_seconds(space, tmp_path):
    start = time.perf_counter()
    search(RandomSearch(space), parabola_of_x, 10_000, store=tmp_path, progress=False)
    assert (time.perf_counter() - start) / 10_000 < 5e-3  # seconds that the engine adds to a trial
    start = time.perf_counter()
    assert len(read_trials(tmp_path / "trials.jsonl")) == 10_000
    result = search(RandomSearch(space), parabola_of_x, 10_001, store=tmp_path, progress=False)
    assert time.perf_counter() - start < 2.0
    assert len(result) == 10_001
