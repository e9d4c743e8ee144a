"""Exploit and explore: who copies whom, and where settings go."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer
from paperback.search.population.exploit import (
    Standing,
    best,
    tournament,
    truncation,
    ttest,
    welch,
)
from paperback.search.population.explore import confine, perturb

SPACE = {
    "lr": Float(1e-4, 1.0, log=True),
    "shift": Float(-2.0, 2.0),
    "layers": Integer(1, 6),
    "width": Choice([8, 16, 32, 64], ordered=True),
    "kind": Choice(["a", "b", "c"]),
}
FAILED = -math.inf


def rng(seed=0):
    return np.random.default_rng(seed)


def standings(scores, histories=None):
    histories = histories or [()] * len(scores)
    return [Standing(score, tuple(recent)) for score, recent in zip(scores, histories, strict=True)]


# -- truncation ------------------------------------------------------------------


@pytest.mark.parametrize(("size", "replaced"), [(5, 1), (10, 2), (30, 6), (12, 2), (2, 1)])
def test_truncation_replaces_the_bottom_from_the_top(size, replaced):
    scores = rng().permutation(size).astype(float)
    population = standings(scores)
    sources = {place: truncation(place, population, rng(place)) for place in range(size)}
    losers = {place for place, source in sources.items() if source is not None}
    assert losers == {place for place in range(size) if scores[place] < replaced}
    assert {scores[sources[place]] for place in losers} <= set(range(size - replaced, size))


def test_truncation_draws_uniformly_from_the_top():
    population = standings(np.arange(10.0))
    drawn = [truncation(0, population, rng(seed), 0.3) for seed in range(3000)]
    counts = np.bincount(drawn, minlength=10)
    assert counts[:7].sum() == 0
    assert stats.chisquare(counts[7:]).pvalue > 1e-3


@given(
    scores=st.lists(st.sampled_from([FAILED, None, 0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=9),
    quantile=st.floats(0.01, 0.5),
)
def test_truncation_never_copies_what_cannot_be_copied(scores, quantile):
    population = standings(scores)
    usable = [score for score in scores if score not in (FAILED, None)]
    for place, standing in enumerate(population):
        source = truncation(place, population, rng(), quantile)
        if standing.score == FAILED:
            assert (source is not None) == bool(usable)
        if source is not None:
            assert source != place
            assert population[source].usable
            assert standing.score is None or population[source].score >= standing.score


def test_all_failed_members_copy_however_many_they_are():
    population = standings([FAILED, FAILED, FAILED, 1.0, FAILED])
    assert [truncation(place, population, rng()) for place in range(5)] == [3, 3, 3, None, 3]


# -- the other strategies --------------------------------------------------------


def test_welch_is_scipys():
    for seed in range(20):
        a, b = rng(seed).normal(0, 1, 10), rng(seed + 100).normal(0.5, 3, 7)
        assert welch(a, b) == stats.ttest_ind(a, b, equal_var=False).pvalue
    assert welch([1.0, 1.0], [1.0, 1.0]) == 1.0  # where scipy says that it is not a number


def test_the_t_test_copies_what_is_significantly_better():
    noise = np.linspace(-1, 1, 10)
    better, same = standings([0.0, 2.0], [noise, noise + 2]), standings([0.0, 0.1], [noise, noise + 0.1])
    assert [ttest(place, better, rng()) for place in (0, 1)] == [1, None]
    assert [ttest(place, same, rng()) for place in (0, 1)] == [None, None]
    assert ttest(0, standings([0.0, 9.0], [[0.0], [9.0]]), rng()) is None  # one score is no sample


def test_the_t_test_asks_for_level_five_per_cent():
    for shift in np.linspace(0, 2, 41):
        own, theirs = np.linspace(-1, 1, 10), np.linspace(-1, 1, 10) * 1.5 + shift
        copies = ttest(0, standings([0.0, shift], [own, theirs]), rng()) == 1
        p = stats.ttest_ind(theirs, own, equal_var=False).pvalue
        assert copies == (p < 0.05 and theirs.mean() > own.mean())


def test_a_tournament_is_won_by_the_higher_score():
    population = standings([1.0, 3.0, 2.0, None, FAILED])
    drawn = {place: {tournament(place, population, rng(seed)) for seed in range(60)} for place in range(5)}
    assert drawn == {0: {1, 2}, 1: {None}, 2: {None, 1}, 3: {0, 1, 2}, 4: {0, 1, 2}}


def test_the_best_is_copied_by_everybody_else():
    population = standings([1.0, 3.0, 3.0, None, FAILED])
    assert [best(place, population, rng()) for place in range(5)] == [1, None, None, 1, 1]
    assert best(0, standings([FAILED, None]), rng()) is None


# -- explore ---------------------------------------------------------------------


def test_settings_stay_in_their_ranges():
    random, config = rng(), {"lr": 0.5, "shift": -1.5, "layers": 3, "width": 8, "kind": "a"}
    for _ in range(10_000):
        config = perturb(config, SPACE, random, (0.3, 3.0), 0.05)
        assert all(parameter.contains(config[name]) for name, parameter in SPACE.items())


def test_numbers_are_multiplied_by_one_of_the_factors():
    random, config = rng(), {"lr": 0.01, "shift": -0.5, "layers": 3, "width": 16, "kind": "a"}
    moved = [perturb(config, SPACE, random) for _ in range(2000)]
    for name in ("lr", "shift"):
        ratios = np.array([new[name] / config[name] for new in moved])
        assert set(ratios.round(9)) == {0.8, 1.2}
        assert 0.45 < (ratios > 1).mean() < 0.55
    assert {new["width"] for new in moved} == {8, 32}
    assert {new["layers"] for new in moved} == {2, 4}
    assert {new["kind"] for new in moved} == {"a", "b", "c"}


def test_a_whole_number_is_never_stuck():
    space, seen, config, random = {"n": Integer(-3, 3)}, set(), {"n": 1}, rng()
    for _ in range(500):
        before = config["n"]
        config = perturb(config, space, random)
        seen.add(config["n"])
        assert before == 0 or abs(config["n"] - before) <= 1
    assert {1, 2, 3} <= seen
    assert 0 in seen  # 1 * 0.8 goes a step toward 0
    assert perturb({"n": 2}, space, random, (1.0,)) == {"n": 2}


def test_zero_is_drawn_afresh_as_no_factor_moves_it():
    values = [perturb({"shift": 0.0}, {"shift": SPACE["shift"]}, rng(seed))["shift"] for seed in range(50)]
    assert len(set(values)) == 50


def test_an_ordered_choice_moves_by_one():
    values = SPACE["width"].values
    for value in values:
        for seed in range(20):
            moved = perturb({"width": value}, {"width": SPACE["width"]}, rng(seed))["width"]
            assert abs(values.index(moved) - values.index(value)) == 1
    assert perturb({"k": 1}, {"k": Choice([1], ordered=True)}, rng()) == {"k": 1}


def test_resampling_draws_from_the_prior():
    random, space = rng(), {"lr": SPACE["lr"]}
    afresh = [math.log10(perturb({"lr": 0.5}, space, random, resample_prob=1.0)["lr"]) for _ in range(2000)]
    assert stats.kstest(afresh, stats.uniform(-4, 4).cdf).pvalue > 1e-3
    some = [perturb({"lr": 0.1}, space, random, resample_prob=0.25)["lr"] for _ in range(4000)]
    kept = np.isin(np.round(some, 9), [0.08, 0.12]).mean()
    assert kept == pytest.approx(0.75, abs=0.03)


def test_what_a_user_explores_is_moved_into_range():
    assert confine({"x": 7, "n": 2.6}, {"x": Float(0, 1), "n": Integer(1, 9)}) == {"x": 1.0, "n": 3}
    for wrong in ({"x": "a"}, {"x": math.nan}, {"x": 0.5, "y": 1}, {}, None):
        with pytest.raises(DataError, match=r"explore returned|the configuration"):
            confine(wrong, {"x": Float(0, 1)})
