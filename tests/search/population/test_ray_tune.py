"""Our trainables under Ray Tune, and its population training as a searcher."""

import random

import pytest
import torch

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer, SearchError
from paperback.search.ray_tune import as_tune_trainable, tune_population, tune_space

tune = pytest.importorskip("ray.tune")

LR = {"lr": Float(1e-3, 0.6, log=True)}


@pytest.fixture
def adapted(noisy):
    """Makes instances as Ray does, without a cluster."""

    def make(config):
        trainable = object.__new__(as_tune_trainable(noisy))
        trainable.config, trainable._trial_info = config, None
        trainable.setup(config)
        return trainable

    return make


def test_a_checkpoint_goes_on_alike(adapted, tmp_path):
    whole, stopped = adapted({"lr": 0.1}), adapted({"lr": 0.1})
    for trainable in (whole, stopped):
        trainable.step()
    stopped.save_checkpoint(str(tmp_path))
    again = adapted({"lr": 0.1})
    again.load_checkpoint(str(tmp_path))
    assert [again.step() for _ in range(3)] == [whole.step() for _ in range(3)]


def test_a_copy_has_the_parents_state_and_its_own_settings(adapted, tmp_path):
    parent, child = adapted({"lr": 0.1}), adapted({"lr": 0.3})
    parent.step()
    parent.save_checkpoint(str(tmp_path))
    child.load_checkpoint(str(tmp_path))
    assert torch.equal(child.inner.x, parent.inner.x)
    assert torch.equal(child.inner.momentum, parent.inner.momentum)
    assert child.inner.lr == 0.3
    assert child.reset_config({"lr": 0.2})
    assert float(child.inner.x[0]) == 3.0  # begun anew


def test_priors_are_those_of_the_space():
    space = {
        "c": Choice(["a", "b"]),
        "n": Integer(1, 3),
        "m": Integer(2, 90, log=True),
        "x": Float(0, 2),
    } | LR
    priors = tune_space(space)
    drawn = {name: [prior.sample() for _ in range(300)] for name, prior in priors.items()}
    assert all(space[name].contains(value) for name, values in drawn.items() for value in values)
    assert set(drawn["n"]) == {1, 2, 3}
    assert set(drawn["c"]) == {"a", "b"}
    with pytest.raises(DataError, match="the search space is"):
        tune_space({})


@pytest.mark.slow
def test_ray_schedules_our_trainable(cluster, faulty):
    before = random.getstate()
    space = {"x": Float(-3.0, 3.0)}

    def fails(config, steps):
        if config["x"] > 2.9:
            raise ValueError("too far")

    result = tune_population(space, faulty(fails), 6, size=4)
    assert random.getstate() == before
    assert len(result) == 4
    assert all(space["x"].contains(trial.config["x"]) for trial in result)
    assert result.best.score == max(trial.score for trial in result if trial.score is not None)
    assert 0 < result.best.score <= 6.0


@pytest.mark.slow
def test_trials_that_fail_say_why(cluster, faulty):
    def fails(config, steps):
        raise ValueError("too far")

    result = tune_population({"x": Float(-3.0, 3.0)}, faulty(fails), 2, size=2)
    assert [trial.status for trial in result] == ["failed"] * 2
    with pytest.raises(SearchError, match="too far"):
        _ = result.best


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"size": 0}, {"interval": 9}])
def test_settings_out_of_range(noisy, wrong):
    with pytest.raises(DataError, match="give 1 or more of each"):
        tune_population(LR, noisy, **({"budget": 5} | wrong))
