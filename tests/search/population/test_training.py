"""The training of a population: copies that are copies, exploration only after them, the same everywhere."""

import json
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer, SearchError
from paperback.search.engine import LocalEngine
from paperback.search.population import PopulationTraining, replay
from paperback.search.population.lineage import seed_of

LR = {"lr": Float(1e-3, 0.6, log=True)}
X = {"x": Float(-9.0, 9.0)}


def table(result):
    """All that a run is made of, without seconds."""
    return [replace(trial, seconds=0.0) for trial in result]


def run(make, budget=12, **settings):
    engine, workers = settings.pop("engine", "local"), settings.pop("workers", None)
    settings = {"size": 5, "interval": 3, "synchronous": True} | settings
    searcher = PopulationTraining(LR, **settings)
    return searcher.run(make, budget, engine=engine, workers=workers, progress=False)


# -- the same result everywhere --------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        ("process", 1),
        ("process", 3),
        pytest.param("ray", 1, marks=pytest.mark.slow),
        pytest.param("ray", 4, marks=pytest.mark.slow),
    ],
    indirect=["engine"],
)
def test_a_synchronous_run_is_the_same_on_every_engine(noisy, engine, workers):
    here, there = run(noisy), run(noisy, engine=engine, workers=workers)
    assert table(here) == table(there)
    assert here.events == there.events
    assert here.members == there.members
    assert here.best_state.keys() == there.best_state.keys()
    assert all(torch.equal(here.best_state[name], there.best_state[name]) for name in here.best_state)


def test_the_seed_decides(noisy):
    assert table(run(noisy)) == table(run(noisy))
    assert table(run(noisy)) != table(run(noisy, seed=1))
    asynchronous = run(noisy, synchronous=False)
    assert table(asynchronous) == table(run(noisy, synchronous=False))  # nobody overtakes in one process


def test_one_member_is_plain_training(noisy):
    with pytest.warns(UserWarning, match="size 1 has nobody to copy"):
        searcher = PopulationTraining(LR, size=1, interval=3)
    result = searcher.run(noisy, 12, progress=False)
    plain = noisy()
    plain.setup(result.best_config, seed_of(0, 0))
    scores = [plain.step()["score"] for _ in range(12)]
    assert [trial.score for trial in result] == scores[2::3]
    assert all(torch.equal(result.best_state[name], value) for name, value in plain.state_dict().items())
    assert not result.events


@pytest.mark.parametrize("exploit", [None, "truncation"])
def test_who_never_copies_is_plain_training_too(noisy, exploit):
    result = run(noisy, exploit=exploit)
    copied = {event.child for event in result.events}
    for member in set(range(5)) - copied:
        plain = noisy()
        plain.setup(result.trials[member].config, seed_of(0, member))
        scores = [plain.step()["score"] for _ in range(12)]
        assert [t.score for t in result if t.details["member"] == member] == scores[2::3]
    assert (len(copied) == 0) == (exploit is None)


# -- copying ---------------------------------------------------------------------


def spy_on(noisy):
    """A trainable that notes what is loaded, saved and reconfigured, by the seed of its place."""
    notes = []

    class Spy(noisy):
        def setup(self, config, seed):
            self.seed = seed
            super().setup(config, seed)
            notes.append(("setup", seed, config))

        def load_state_dict(self, state):
            notes.append(("load", self.seed, {k: v.clone() for k, v in state.items()}))
            super().load_state_dict(state)

        def state_dict(self):
            notes.append(("save", self.seed, {k: v.clone() for k, v in super().state_dict().items()}))
            return super().state_dict()

        def reconfigure(self, config):
            notes.append(("reconfigure", getattr(self, "seed", None), config))
            super().reconfigure(config)

    return Spy, notes


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_copy_has_the_weights_and_momenta_of_its_parent_and_explored_settings(noisy):
    make, notes = spy_on(noisy)
    result = run(make)
    assert len(result.events) == 3  # one of five after each turn but the last
    for event in result.events:
        saved = [s for kind, seed, s in notes if kind == "save" and seed == seed_of(0, event.parent)]
        loaded = [s for kind, seed, s in notes if kind == "load" and seed == seed_of(0, event.child)]
        assert equal(loaded[event.turn], saved[event.turn])
        parent = next(t for t in result if t.number == event.turn * 5 + event.parent)
        ratio = event.after["lr"] / parent.config["lr"]
        assert round(ratio, 9) in (0.8, 1.2) or event.after["lr"] in (1e-3, 0.6)
        child = next(t for t in result if t.number == (event.turn + 1) * 5 + event.child)
        assert (child.config, child.parent) == (event.after, parent.number)


def test_settings_change_only_where_something_was_copied(noisy):
    make, notes = spy_on(noisy)
    result = run(make)
    changed = {(event.turn, event.child) for event in result.events}
    for trial in result:
        if trial.number >= 5:
            member, turn = int(trial.details["member"]), int(trial.details["turn"])
            before = result.trials[trial.number - 5]
            assert (trial.config != before.config) == ((turn - 1, member) in changed)
            assert (trial.parent == before.number) == ((turn - 1, member) not in changed)
    after_load = [kind for (before, _, _), (kind, _, _) in pairwise(notes) if before == "load"]
    assert after_load.count("reconfigure") == len(changed)


def test_the_top_is_never_replaced(noisy):
    result = run(noisy, size=10, budget=30, quantile=0.2)
    for event in result.events:
        turn = [t for t in result if t.details["turn"] == event.turn]
        ranked = sorted(turn, key=lambda t: -t.score)
        assert event.child in [int(t.details["member"]) for t in ranked[-2:]]
        assert event.parent in [int(t.details["member"]) for t in ranked[:2]]
        assert event.score == result.trials[event.turn * 10 + event.parent].score


@pytest.mark.parametrize("copy", ["weights", "hparams", ("weights", "hparams")])
def test_what_is_not_to_be_copied_is_not(noisy, copy):
    result = run(noisy, copy=copy, exploit="best")
    assert result.events
    for event in result.events:
        child = result.trials[(event.turn + 1) * 5 + event.child]
        own, parent = (event.turn * 5 + place for place in (event.child, event.parent))
        assert child.parent == (own if copy == "hparams" else parent)
        if copy == "weights":
            assert child.config == event.before
        else:
            ratio = child.config["lr"] / result.trials[parent].config["lr"]
            assert round(ratio, 9) in (0.8, 1.2) or child.config["lr"] in (1e-3, 0.6)


@pytest.mark.parametrize("exploit", ["truncation", "ttest", "tournament", "best"])
@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("explore", ["perturb", "resample"])
def test_every_variant_runs(noisy, exploit, synchronous, explore):
    result = run(noisy, exploit=exploit, synchronous=synchronous, explore=explore, budget=21)
    assert len(result) == 5 * 7
    assert result.events
    assert result.best.score == max(result.trials[n].score for n in result.members)
    assert all(LR["lr"].contains(trial.config["lr"]) for trial in result)


def test_own_strategies(noisy):
    result = run(
        noisy,
        exploit=lambda member, population, rng: 2 if member == 4 else None,
        explore=lambda config, rng: {"lr": 50.0},
    )
    assert {(event.child, event.parent) for event in result.events} == {(4, 2)}
    assert {trial.config["lr"] for trial in result if trial.details["member"] == 4} >= {0.6}
    with pytest.raises(DataError, match="exploit returned 9"):
        run(noisy, exploit=lambda member, population, rng: 9)
    with pytest.raises(DataError, match="does not set 'lr'"):
        run(noisy, explore=lambda config, rng: {})


def test_settings_to_begin_with(noisy):
    start = [{"lr": 0.1}, {"lr": 0.2}]
    result = run(noisy, start=start)
    assert [trial.config for trial in result][:2] == start
    assert [t.config for t in result][2:5] == [t.config for t in run(noisy)][2:5]


def test_the_least_score_can_be_best(faulty):
    make = faulty(lambda config, steps: abs(config["x"]) + 1.0 / steps)
    result = PopulationTraining(X, size=6, interval=1, mode="min", synchronous=True).run(
        make, 12, progress=False
    )
    assert result.best.score == min(result.trials[n].score for n in result.members)
    assert abs(result.best_config["x"]) < min(abs(trial.config["x"]) for trial in result.trials[:6])


# -- time-multiplexing -----------------------------------------------------------


class Shuffling(LocalEngine):
    """Workers that end in random order."""

    def __init__(self, workers):
        super().__init__()
        self.workers = workers
        self.rng = np.random.default_rng(0)
        self.most = 0

    def wait(self, tasks):
        self.most = max(self.most, len(tasks))
        return tasks[int(self.rng.integers(len(tasks)))]


@pytest.mark.parametrize("workers", [1, 2, 3, 20])
@pytest.mark.parametrize("synchronous", [True, False])
def test_members_share_workers_and_the_least_advanced_goes_first(noisy, workers, synchronous):
    engine = Shuffling(workers)
    result = run(noisy, engine=engine, synchronous=synchronous)
    assert engine.most == min(workers, 5)
    assert len(result) == 20
    assert {int(t.details["member"]) for t in result} == set(range(5))
    if synchronous:
        assert table(result) == table(run(noisy))


def test_nobody_waits_in_an_asynchronous_run(faulty):
    """The slow member ends its first turn when the others, on other workers, have had all theirs."""

    class Slow(Shuffling):
        def wait(self, tasks):
            ended = [t for t in tasks if t.arguments[1].config["x"] != 5.0]
            order.append((ended or tasks)[0].arguments[1].number)
            return (ended or tasks)[0]

    order = []
    make = faulty(lambda config, steps: None)
    start = [{"x": 5.0}, {"x": 1.0}, {"x": 1.0}]
    searcher = PopulationTraining(X, size=3, interval=1, exploit=lambda *_: None, start=start)
    searcher.run(make, 4, engine=Slow(3), progress=False)
    assert order == [1, 2, 4, 5, 7, 8, 10, 11, 0, 3, 6, 9]


# -- results ---------------------------------------------------------------------


def test_a_result_tells_all(noisy):
    result = run(noisy, budget=13)
    assert [t.details["step"] for t in result if t.details["member"] == 0] == [3, 6, 9, 12, 13]
    assert len(result.lineage) == len(result.events) == 4
    assert list(result.lineage.columns[:3]) == ["turn", "child", "parent"]
    assert isinstance(result.table(), pd.DataFrame)
    assert result.best_so_far()[-1] == max(t.score for t in result)
    assert replay(noisy, result.schedule()).metrics[-1]["score"] == result.best.score
    with pytest.raises(SearchError, match="no member 5"):
        result.schedule(5)


def test_plots(noisy):
    figure = run(noisy).plot()
    assert len(figure.axes) == 2
    assert figure.axes[1].get_ylabel() == "lr"
    space = {"kind": Choice(["a", "b"]), "n": Integer(1, 3)} | LR
    searcher = PopulationTraining(space, size=4, interval=2, synchronous=True)
    assert len(searcher.run(noisy, 6, progress=False).plot().axes) == 3


# -- bad input -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"quantile": 0.0}, "quantile is 0.0"),
        ({"quantile": 0.6}, "quantile is 0.6"),
        ({"factors": (0.8, 0.0)}, "give one or more positive"),
        ({"factors": ()}, "give one or more positive"),
        ({"resample_prob": 1.5}, "is a probability"),
        ({"exploit": "worst"}, "use truncation, ttest, tournament, best"),
        ({"exploit": 3}, "exploit is 3"),
        ({"explore": "jump"}, "use perturb, resample"),
        ({"copy": ("weight",)}, "copy is"),
        ({"copy": ()}, "copy is"),
        ({"mode": "up"}, "mode is 'up'"),
        ({"start": [{"lr": 7.0}]}, "outside"),
        ({"start": [{"lr": 0.1}] * 11}, "start has 11"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(DataError, match=message):
        PopulationTraining(LR, **settings)


@pytest.mark.parametrize("space", [{}, {"lr": 0.1}, {"lr": [0.1, 0.2]}, {1: Float(0, 1)}])
def test_what_is_no_space(space):
    with pytest.raises(DataError, match="search space"):
        PopulationTraining(space)


@pytest.mark.parametrize(
    ("budget", "interval", "message"), [(0, None, "budget is 0"), (5, 6, "interval is 6"), (5, 0, "is 0")]
)
def test_budgets_out_of_range(noisy, budget, interval, message):
    with pytest.raises(DataError, match=message):
        PopulationTraining(LR, interval=interval).run(noisy, budget)


def test_what_is_no_trainable(noisy):
    class Halfway:
        setup = step = state_dict = load_state_dict = lambda self: None

    searcher = PopulationTraining(LR)
    with pytest.raises(DataError, match="a Halfway without reconfigure"):
        searcher.run(Halfway, 10)
    with pytest.raises(DataError, match="give a class"):
        searcher.run(noisy(), 10)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, "loss, accuracy; 'score' is missing"),
        ({}, "empty mapping"),
        (3.0, "returned 3.0; it returns a mapping"),
        ({"score": "high"}, "'high' as 'score'"),
        ({"score": 1.0, "turn": 2.0}, "rename it"),
    ],
)
def test_metrics_that_cannot_be_used(faulty, metrics, message):
    class Strange(faulty(None)):
        def step(self):
            return metrics

    with pytest.raises(DataError, match=message):
        PopulationTraining(X).run(Strange, 10, progress=False)


def test_a_state_that_cannot_be_stored(faulty):
    class Strange(faulty(lambda config, steps: None)):
        def state_dict(self):
            return {"weights": np.zeros(3)}

    with pytest.raises(SearchError, match=r"all 10 members failed.*state_dict holds numpy"):
        PopulationTraining(X, synchronous=True).run(Strange, 10, progress=False)


def test_tensors_are_taken_as_numbers(faulty):
    make = faulty(lambda config, steps: torch.tensor(float(steps)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = PopulationTraining(X, size=3).run(make, 20, progress=False)
    assert json.dumps(result.best.score) == "20.0"
