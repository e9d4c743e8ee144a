"""The loop: determinism, resuming, discrete inputs, pending points, failures, several objectives."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from paperback.bayes.bnn_surrogate import (
    BayesianOptimizer,
    EnsembleSurrogate,
    GPSurrogate,
    History,
    HMCSurrogate,
    InfiniteBNN,
    Problem,
    bayes_opt,
    compare,
    network_draw,
    problem,
    ranks,
)
from paperback.bayes.bnn_surrogate.problems import pest_control
from paperback.errors import ArtefactError, DataError

BOX = [[-1.0, 0.0], [2.0, 5.0]]
FAST = {"n_init": 4, "iters": 2, "q": 2}


def bowl(X):
    return -((X[:, 0] - 0.5) ** 2) - 0.1 * (X[:, 1] - 3) ** 2


def two(X):
    return np.column_stack([-((X - 0.3) ** 2).sum(1), -((X - 0.7) ** 2).sum(1)])


def tiny_hmc():
    return HMCSurrogate((6,), samples=32, burn_in=20, chains=2, leapfrog_steps=4, map_steps=60)


def test_finds_the_top_of_a_bowl():
    history = bayes_opt(bowl, BOX, "gp", n_init=5, iters=6, q=2, restarts=4, raw_samples=32)
    assert len(history) == 17
    assert history.best()[1] > -0.01
    assert (np.diff(history.best_so_far()) >= 0).all()


@pytest.mark.parametrize("surrogate", ["ibnn", tiny_hmc()])
def test_same_seed_same_history(surrogate):
    one, again, other = (bayes_opt(bowl, BOX, surrogate, seed=seed, **FAST) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one.X, again.X)
    np.testing.assert_array_equal(one.Y, again.Y)
    assert not np.array_equal(one.X, other.X)


@pytest.mark.parametrize("scale", [1e4, 1e-3])
def test_units_of_values_do_not_change_what_is_chosen(scale):
    plain = bayes_opt(bowl, BOX, "ibnn", **FAST)
    scaled = bayes_opt(lambda X: scale * bowl(X) + 7 * scale, BOX, "ibnn", **FAST)
    np.testing.assert_allclose(scaled.X, plain.X, atol=1e-3)


def test_an_interrupted_optimisation_goes_on_as_the_undisturbed_one(tmp_path):
    calls = []

    def breaks(X):
        calls.append(len(X))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return bowl(X)

    surrogate = EnsembleSurrogate((6,), members=3, map_steps=60)
    settings = {"n_init": 6, "iters": 4, "q": 2, "choose_every": 2, "path": tmp_path / "history.json"}
    with pytest.raises(KeyboardInterrupt):
        bayes_opt(breaks, BOX, surrogate, **settings)
    resumed = bayes_opt(bowl, BOX, surrogate, **settings)
    whole = bayes_opt(bowl, BOX, surrogate, **(settings | {"path": None}))
    np.testing.assert_array_equal(resumed.X, whole.X)
    assert resumed.variances == whole.variances
    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_history_survives_the_disk_with_failures_and_pending_points(tmp_path):
    history = History(
        np.eye(2), np.array([[1.0], [np.nan]]), 3, np.ones((1, 2)), {"noise_variance": 0.1}, [0.5]
    )
    history.save(tmp_path / "h.json")
    again = History.load(tmp_path / "h.json")
    np.testing.assert_array_equal(again.X, history.X)
    np.testing.assert_array_equal(again.Y, history.Y)
    np.testing.assert_array_equal(again.pending, history.pending)
    assert (again.asked, again.variances, again.seconds) == (3, {"noise_variance": 0.1}, [0.5])
    History.empty(3).save(tmp_path / "e.json")
    assert History.load(tmp_path / "e.json").X.shape == (0, 3)
    for text in ("{", "[]", '{"format": 1}', '{"format": 99}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ArtefactError, match=r"bad\.json"):
            History.load(tmp_path / "bad.json")


def test_pending_points_are_not_asked_for_again():
    optimizer = BayesianOptimizer(BOX, GPSurrogate(), n_init=4)
    X = optimizer.ask(4)
    optimizer.tell(X, bowl(X))
    first = optimizer.ask(2)
    second = optimizer.ask(2)  # before the first is told
    distance = np.abs((first[:, None] - second) / np.array([3.0, 5.0])).max(2)
    assert distance.min() > 1e-3
    assert len(optimizer.history.pending) == 4
    optimizer.tell(second, bowl(second))
    np.testing.assert_array_equal(optimizer.history.pending, first)


def test_asks_one_by_one_begin_with_the_same_points_as_one_ask():
    one, many = BayesianOptimizer(BOX, n_init=4), BayesianOptimizer(BOX, n_init=4)
    np.testing.assert_allclose(np.concatenate([many.ask(1) for _ in range(4)]), one.ask(4))


# -- discrete inputs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("surrogate", ["gp", "sobol"])
def test_discrete_coordinates_take_their_values_only(surrogate):
    values = [0.0, 1.5, 4.0]
    acquisition = "sobol" if surrogate == "sobol" else "qlogei"
    history = bayes_opt(bowl, BOX, "gp", discrete={1: values}, acquisition=acquisition, **FAST)
    assert set(history.X[:, 1]) <= set(values)
    assert len(set(history.X[:, 0])) == len(history)


def test_the_acquisition_at_rounded_points_chooses(monkeypatch):
    """The candidate that was better before rounding is worse after it, and is not taken."""
    from paperback.bayes.bnn_surrogate import loop

    candidates = torch.tensor([[[0.5, 0.45]], [[0.9, 0.9]]], dtype=torch.float64)  # q = 1 each

    class Acquire:
        def __call__(self, X):
            return X[..., 0, 1]  # larger where the rounded coordinate is larger

    monkeypatch.setattr(loop, "optimize_acqf", lambda *_, **__: (candidates, torch.tensor([5.0, 1.0])))
    monkeypatch.setattr(BayesianOptimizer, "_acquire", lambda *_: Acquire())
    optimizer = BayesianOptimizer(BOX, GPSurrogate(), n_init=4, discrete={1: [0.0, 5.0]})
    optimizer.tell(X := optimizer.ask(4), bowl(X))
    np.testing.assert_allclose(optimizer.ask(1), [[-1.0 + 3 * 0.9, 5.0]])


def test_pest_control_is_a_fixed_function_of_25_choices():
    pest = problem("pest-control", n_init=4, iters=1, q=2)
    history = bayes_opt(pest.f, pest.bounds, InfiniteBNN(), n_init=4, iters=1, q=2, discrete=pest.discrete)
    np.testing.assert_array_equal(history.X, np.rint(history.X))
    np.testing.assert_array_equal(pest_control(history.X), history.Y[:, 0])
    assert float(pest_control(np.full((1, 25), 4))[0]) > float(pest_control(np.zeros((1, 25)))[0])


def test_pest_control_prices():
    """Without pest only the price is left: 25 times 0.8 with 30 % off for the second pesticide."""
    spray = np.full((1, 25), 2)
    paid = 25 * 0.8 * (1 - 0.3)
    assert -float(pest_control(spray)[0]) == pytest.approx(paid, abs=1.5)
    assert -float(pest_control(spray)[0]) >= paid


# -- several objectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("acquisition", ["qlogehvi", "qehvi"])
def test_hypervolume_grows_and_beats_its_start(acquisition):
    unit = [[0.0, 0.0], [1.0, 1.0]]
    history = bayes_opt(
        two, unit, "gp", n_init=4, iters=3, q=2, acquisition=acquisition, ref_point=[-0.6, -0.6]
    )
    volume = history.hypervolume([-0.6, -0.6])
    assert (np.diff(volume) >= 0).all()
    assert volume[-1] > volume[3]


def test_hypervolume_of_known_points():
    history = History(np.zeros((4, 1)), np.array([[1.0, 2.0], [2.0, 1.0], [np.nan, 5.0], [0.5, 0.5]]))
    np.testing.assert_allclose(history.hypervolume([0.0, 0.0]), [2.0, 3.0, 3.0, 3.0])
    with pytest.raises(DataError, match="no single best"):
        history.best()


# -- failures and bad input ----------------------------------------------------------------------------------


def told(on_failure):
    optimizer = BayesianOptimizer(BOX, GPSurrogate(), n_init=4, on_failure=on_failure)
    X, y = optimizer.ask(4), np.array([1.0, np.nan, 3.0, 2.0])
    optimizer.tell(X, y)
    return optimizer


def test_crashed_evaluations_are_dropped_or_penalised_or_refused():
    with pytest.raises(DataError, match=r"row 1 is \[nan\].*dropped or penalised"):
        told("raise")
    assert len(told("drop")._usable()[0]) == 3
    np.testing.assert_array_equal(told("penalise")._usable()[1][:, 0], [1.0, 1.0, 3.0, 2.0])
    optimizer = told("drop")
    assert optimizer.ask(1).shape == (1, 2)
    assert optimizer.history.best()[1] == 3.0


def test_all_failed_is_said():
    optimizer = BayesianOptimizer(BOX, n_init=2, on_failure="drop")
    optimizer.tell(optimizer.ask(2), [np.nan, np.inf])
    with pytest.raises(DataError, match="all evaluations have failed"):
        optimizer.ask(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": [[0.0, 1.0], [1.0, 0.0]]}, "bounds of feature 1 are 1 and 0"),
        ({"bounds": [0.0, 1.0]}, "bounds has shape"),
        ({"bounds": [[0.0], [np.inf]]}, "finite"),
        ({"acquisition": "ucb"}, "acquisition is 'ucb'"),
        ({"acquisition": "qehvi"}, "qehvi needs a ref_point"),
        ({"mc_samples": 1}, "mc_samples is 1"),
        ({"n_init": 0}, "n_init is 0"),
        ({"raw_samples": 1}, "raw_samples is 1"),
        ({"on_failure": "ignore"}, "on_failure is 'ignore'"),
        ({"discrete": {5: [0.0]}}, "names feature 5"),
        ({"discrete": {1: [9.0]}}, "within its bounds"),
        ({"surrogate": "gpp"}, "did you mean gp"),
        ({"history": History.empty(3)}, "3 features and the bounds 2"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(DataError, match=message):
        BayesianOptimizer(**({"bounds": BOX} | settings))


def test_bad_calls_are_named():
    optimizer = BayesianOptimizer(BOX, n_init=3)
    with pytest.raises(DataError, match="q is 0"):
        optimizer.ask(0)
    X = optimizer.ask(3)
    with pytest.raises(DataError, match="none is told"):
        optimizer.ask(1)
    with pytest.raises(DataError, match="outside its bounds"):
        optimizer.tell(X + 100, bowl(X))
    with pytest.raises(DataError, match="qlogei is for one"):
        optimizer.tell(X, two(X))
    with pytest.raises(DataError, match="a value for each row"):
        optimizer.tell(X, [1.0])
    several = BayesianOptimizer(BOX, acquisition="qlogehvi", ref_point=[0.0, 0.0, 0.0])
    with pytest.raises(DataError, match="y has 2 outputs and ref_point 3"):
        several.tell(X, two(X))
    with pytest.raises(DataError, match="iters is -1"):
        bayes_opt(bowl, BOX, iters=-1)
    assert len(optimizer.history) == 0  # nothing of what was refused was kept


# -- problems and comparison ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["branin", "hartmann", "ackley", "branin-currin", "dtlz1", "dtlz5"])
def test_problems_are_functions_on_their_box(name):
    each = problem(name)
    low, high = np.array(each.bounds)
    values = np.asarray(each.f(low + np.random.default_rng(0).random((3, len(low))) * (high - low)))
    assert len(values) == 3
    assert (values.ndim == 2) == (each.ref_point is not None)
    assert np.isfinite(values).all()


def test_hartmann_is_to_be_maximised():
    top = np.array([[0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]])
    assert float(problem("hartmann").f(top)[0]) == pytest.approx(3.32237, abs=1e-4)
    with pytest.raises(DataError, match="no problem 'xyz'"):
        problem("xyz")


def test_network_draws_differ_by_seed_only():
    X = np.random.default_rng(0).random((3, 12))
    one, same, other = (network_draw(12, seed).f(X) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_compare_starts_all_from_the_same_points_and_survives_a_failure():
    bowl_problem = Problem("bowl", bowl, BOX, 4, 1, 2)
    table = compare(
        [bowl_problem, problem("branin-currin", n_init=4, iters=1, q=2)],
        {"random": "random", "sobol": "sobol", "gp": "gp", "broken": InfiniteBNN(depth=0)},
        trials=2,
    )
    assert len(table) == 2 * 4 * 2 * 2
    first = table[(table["evaluations"] == 4) & (table["surrogate"] != "broken")]
    assert (first.groupby(["problem", "trial"])["value"].nunique() == 1).all()
    broken = table[table["surrogate"] == "broken"]
    assert broken["value"].isna().all()
    assert broken["error"].str.contains("depth is 0").all()
    assert table[table["surrogate"] != "broken"]["value"].notna().all()
    order = ranks(table)
    assert order.index[-1] == "broken"
    assert list(order.columns) == ["bowl", "branin-currin", "mean"]
    assert float(order.loc["broken", "bowl"]) == 4.0


def test_ranks_average_over_trials():
    import pandas as pd

    rows = [
        {"problem": "p", "surrogate": name, "trial": trial, "evaluations": 5, "value": value}
        for trial, values in enumerate([(1.0, 2.0), (3.0, 0.0)])
        for name, value in zip("ab", values, strict=True)
    ]
    table = ranks(pd.DataFrame(rows))
    assert list(table["p"]) == [1.5, 1.5]


def test_compare_wants_something_to_run():
    with pytest.raises(DataError, match="at least one problem"):
        compare([], ["gp"])
    with pytest.raises(DataError, match="did you mean gp"):
        compare([problem("branin")], ["gpp"])


def test_the_surrogate_that_was_given_stays_unfitted():
    surrogate = GPSurrogate()
    bayes_opt(bowl, BOX, surrogate, **FAST)
    assert clone(surrogate).get_params() == surrogate.get_params()
    assert not hasattr(surrogate, "models_")
