"""Our spaces under Optuna, and Optuna as a searcher."""

import json

import pytest

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer, search
from paperback.search.optuna import OptunaSearch, suggest
from paperback.search.replay import LEARNING_RATES, replay_space

optuna = pytest.importorskip("optuna")


def replay_score(config):
    return 0.8 - 0.1 * abs(LEARNING_RATES.index(config["lr"]) - 4) + 0.1 * (config["optimizer"] == "adam")


def failing(config, seed):
    if config["lr"] == 0.3:
        raise RuntimeError("too fast")
    return replay_score(config)


def flat(config, seed):
    return -abs(config["x"] - 0.01) - config["n"] - (config["k"] == 2) - (config["c"] == "a")


FLAT = {
    "x": Float(1e-4, 1.0, log=True),
    "n": Integer(1, 9),
    "k": Choice([1, 2, 4], ordered=True),
    "c": Choice(["a", "b"]),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("space", "evaluate"), [(replay_space(), failing), (FLAT, flat)])
def test_a_search_goes_on_after_a_stop(tmp_path, batch, space, evaluate):
    def stop(config, seed):
        seen.append(config)
        if len(seen) > 18:
            raise KeyboardInterrupt
        return evaluate(config, seed)

    seen = []
    whole = search(OptunaSearch(space), evaluate, 28, batch=batch, progress=False)
    with pytest.raises(KeyboardInterrupt):
        search(OptunaSearch(space), stop, 28, batch=batch, progress=False, store=tmp_path)
    again = search(OptunaSearch(space), evaluate, 28, batch=batch, progress=False, store=tmp_path)
    assert [trial.config for trial in again] == [trial.config for trial in whole]


def test_a_study_of_optuna_searches_our_space():
    space = replay_space()
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: replay_score(suggest(trial, space)), n_trials=30)
    lr = study.best_trial.params["lr"]
    assert lr in range(8)  # a place in the ordered list
    config = suggest(optuna.trial.FixedTrial(study.best_trial.params), space)
    assert replay_score(config) == study.best_value


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_configurations_are_those_of_the_space(sampler):
    space = replay_space()
    result = search(OptunaSearch(space, sampler), failing, 15, progress=False)
    for trial in result:
        assert json.loads(json.dumps(trial.config)) == space.replay(trial.config).config


def test_there_is_no_such_sampler():
    with pytest.raises(DataError, match="use tpe"):
        OptunaSearch(replay_space(), "grid")
