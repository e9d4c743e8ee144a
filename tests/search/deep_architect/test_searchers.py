"""The searchers: trees by hand, the surrogate against scikit-learn, restarts, several proposals at once."""

import json
import math

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from paperback.errors import DataError
from paperback.search import InvalidTrial, Proposal, search
from paperback.search.deep_architect import (
    MCTS,
    SMBO,
    Affine,
    Concat,
    Evolution,
    Or,
    RandomSearch,
    ReLU,
    Repeat,
    RidgeSurrogate,
    Space,
    UserHyperparams,
    from_dict,
    mutate,
)
from paperback.search.replay import LEARNING_RATES, replay_space

MAKERS = {
    "random": lambda space, seed: RandomSearch(space, seed=seed),
    "leaves": lambda space, seed: RandomSearch(space, weight="leaves", seed=seed),
    "evolution": lambda space, seed: Evolution(space, 8, 3, seed=seed),
    "mcts": lambda space, seed: MCTS(space, seed=seed),
    "bisect": lambda space, seed: MCTS(space, bisect=True, seed=seed),
    "smbo": lambda space, seed: SMBO(space, seed=seed),
    "ngram": lambda space, seed: SMBO(space, features="ngram", seed=seed),
    "smbo over mcts": lambda space, seed: SMBO(space, acquisition="mcts", num_samples=20, seed=seed),
}


def replay_score(config):
    """Smooth in the learning rate, with a little of every other choice."""
    others = sum(len(str(value)) % 3 for value in config.values()) / 40
    return 0.8 - 0.1 * abs(LEARNING_RATES.index(config["lr"]) - 4) + others


def score_of(config):
    """Failures too, by a rule that depends on the model only."""
    return None if config["lr"] == 0.3 else replay_score(config)


@pytest.fixture(params=list(MAKERS))
def make(request):
    return MAKERS[request.param]


def run(searcher, n):
    for _ in range(n):
        proposal = searcher.ask()
        searcher.tell(proposal, score_of(proposal.config))
    return [config for _, config, _ in searcher.told]


def test_a_restart_continues_alike(make):
    space = replay_space()
    whole = run(make(space, 3), 30)
    first = make(space, 3)
    run(first, 17)
    second = make(replay_space(), 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, 13) == whole
    assert run(make(space, 4), 30) != whole


def test_a_restart_within_a_round_continues_alike(make, tmp_path):
    def evaluate(config, seed):
        if config["optimizer"] == "sgd":
            raise InvalidTrial("no such optimizer.")
        return replay_score(config)

    def stop(config, seed):
        if len(seen) == 13:
            raise KeyboardInterrupt
        seen.append(config)
        return evaluate(config, seed)

    seen = []
    settings = {"batch": 5, "progress": False}
    whole = search(make(replay_space(), 0), evaluate, 25, **settings)
    with pytest.raises(KeyboardInterrupt):
        search(make(replay_space(), 0), stop, 25, store=tmp_path, **settings)
    again = search(make(replay_space(), 0), evaluate, 25, store=tmp_path, **settings)
    assert [t.config for t in again] == [t.config for t in whole]
    assert any(t.status == "invalid" for t in whole)


def test_several_proposals_at_once_are_not_one_leaf(make):
    searcher = make(replay_space(), 0)
    run(searcher, 40)
    at_once = [json.dumps(searcher.ask().config) for _ in range(8)]
    assert len(set(at_once)) >= 6


# -- tree search ---------------------------------------------------------------------------------------------


def bandit(k):
    return from_dict({"arm": list(range(k))})


def tell(searcher, score, **config):
    searcher.tell(Proposal(searcher.asked, config), score)


def test_upper_bounds_are_those_worked_out_by_hand():
    mcts = MCTS(from_dict({"a": ["x", "y"]}), c=0.5)
    tell(mcts, 0.8, a="x")
    tell(mcts, 0.4, a="y")
    tell(mcts, 0.6, a="x")
    # x: .7 + .5 sqrt(2 ln 3 / 2) = 1.2241; y: .4 + .5 sqrt(2 ln 3 / 1) = 1.1412
    assert mcts.choose(mcts.root, 2, np.random.default_rng(0)) == 0
    tell(mcts, 0.6, a="x")
    # x: .6667 + .5 sqrt(2 ln 4 / 3) = 1.1474; y: .4 + .5 sqrt(2 ln 4) = 1.2326
    assert mcts.choose(mcts.root, 2, np.random.default_rng(0)) == 1
    assert mcts.ask().config == {"a": "y"}


def test_scores_are_backed_up_along_the_tree_only():
    space = from_dict({"a": [0, 1], "b": [0, 1], "c": [0, 1]})
    mcts = MCTS(space)
    tell(mcts, 0.5, a=0, b=1, c=1)
    assert (mcts.root.visits, mcts.root.total) == (1, 0.5)
    assert list(mcts.root.children) == [0]
    node = mcts.root.children[0]
    assert (node.visits, node.total, node.children) == (1, 0.5, {})  # b and c were the rollout
    tell(mcts, 0.25, a=0, b=1, c=0)
    assert (node.visits, node.total) == (2, 0.75)
    assert (node.children[1].visits, node.children[1].total, node.children[1].children) == (1, 0.25, {})


def test_without_exploration_the_best_tried_arm_is_kept():
    mcts = MCTS(bandit(5), c=0.0)
    values = [0.2, 0.9, 0.4, 0.6, 0.1]
    for _ in range(5):
        proposal = mcts.ask()
        mcts.tell(proposal, values[proposal.config["arm"]])
    assert {config["arm"] for _, config, _ in mcts.told} == {0, 1, 2, 3, 4}  # each once before any twice
    assert {mcts.ask().config["arm"]} == {1}


def test_pending_trials_leave_no_trace():
    def state(node):
        return node.visits, node.scored, node.total, {i: state(child) for i, child in node.children.items()}

    mcts = MCTS(replay_space(), bisect=True)
    run(mcts, 20)
    before = state(mcts.root)
    for _ in range(7):
        mcts.ask()
    assert state(mcts.root) == before


def test_arms_at_once_are_all_different():
    mcts = MCTS(bandit(6))
    assert {mcts.ask().config["arm"] for _ in range(6)} == set(range(6))


def test_losses_are_rescaled_and_failures_are_the_worst():
    mcts = MCTS(bandit(3), c=0.1)
    for arm, loss in ((0, -40.0), (1, -10.0), (2, None)):
        tell(mcts, loss, arm=arm)
    assert [mcts._mean(mcts.root.children[i]) for i in range(3)] == [0.0, 1.0, 0.0]
    assert mcts.ask().config == {"arm": 1}


def test_bisection_shares_between_neighbours():
    """The better half of 16 arms is found after fewer trials than there are arms."""
    mcts = MCTS(bandit(16), c=0.2, bisect=True)
    for _ in range(12):
        proposal = mcts.ask()
        mcts.tell(proposal, float(proposal.config["arm"] >= 8))
    right = [config["arm"] >= 8 for _, config, _ in mcts.told]
    assert sum(right) >= 8
    assert mcts.root.children.keys() == {0, 1}


# -- surrogate -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [1, 3])
def test_the_surrogate_is_scikit_learns_ridge(least):
    rng = np.random.default_rng(0)
    rows = [
        {f"f{j}": float(rng.integers(1, 4)) for j in rng.choice(90, 6, replace=False)} for _ in range(150)
    ]
    targets = rng.normal(size=150)
    model = RidgeSurrogate(ridge=0.7, least=least)
    for row, target in zip(rows, targets, strict=True):
        model.add(row, target)
    model.fit()
    counts = {name: sum(name in row for row in rows) for row in rows for name in row}
    names = [name for name, n in counts.items() if n >= least]
    assert set(model.columns) == set(names)
    X = np.array([[row.get(name, 0.0) for name in names] for row in rows])
    reference = Ridge(alpha=0.7).fit(X, targets)
    predicted = [model.predict(row) for row in rows]
    np.testing.assert_allclose(predicted, reference.predict(X), atol=1e-9)


def test_features_are_counted_as_they_should_be():
    space = Space(Concat([UserHyperparams(lr=[1, 2]), Repeat(Concat([Affine([3]), ReLU()]), [1, 2])]), (3,))
    walk = space.replay({"lr": 2, "Concat/1:Repeat/copies": 2})
    grams = walk.features("ngram")
    affine, relu = ("Affine", 3, "default"), ("ReLU",)
    assert grams["modules"] == 5
    assert grams[(affine,)] == grams[(affine, relu)] == 2
    assert grams[(("UserHyperparams", 2), affine, relu, affine)] == 1
    assert max(len(gram) for gram in grams if gram != "modules") == 4
    choices = walk.features("choices")
    lr, copies = ("lr", 2), ("Concat/1:Repeat/copies", 2)
    assert choices == {lr: 1, copies: 1, (lr, copies): 1}


def test_an_ngram_is_a_feature_from_its_third_model_on():
    space = Space(Or([ReLU(), Affine([2, 3, 4, 5])]), (2,))
    smbo = SMBO(space, features="ngram")
    config = {"Or/branch": "1:Affine", "Or/1:Affine/units": 2}
    gram = (("Affine", 2, "default"),)
    for n in range(3):
        assert gram not in smbo.surrogate.columns
        smbo.tell(Proposal(n, config), 0.5)
    assert gram in smbo.surrogate.columns


def test_the_best_predicted_of_the_pool_is_tried():
    space = replay_space()
    smbo = SMBO(space, explore=0.0, pool=600, initial=0)
    told = [space.sample(np.random.default_rng(i)).config for i in range(30)]
    for n, config in enumerate(told):
        smbo.tell(Proposal(n, config), replay_score(config))
    chosen = smbo.ask().config
    assert chosen not in told
    better = [walk.config for walk in space.enumerate() if smbo.predict(walk.config) > smbo.predict(chosen)]
    assert len([config for config in better if config not in told]) < 40  # those that 600 draws left out


def test_full_exploration_never_asks_the_surrogate(monkeypatch):
    monkeypatch.setattr(SMBO, "predict", lambda self, config: pytest.fail("asked"))
    smbo = SMBO(replay_space(), explore=1.0)
    tried = [json.dumps(config) for config in run(smbo, 40)]
    assert len(set(tried)) == 40


def test_a_space_that_is_used_up_is_gone_through_again():
    smbo = SMBO(bandit(3), initial=0)
    for _ in range(9):
        proposal = smbo.ask()
        smbo.tell(proposal, 0.1 * proposal.config["arm"])
    assert {config["arm"] for _, config, _ in smbo.told[:3]} == {0, 1, 2}
    assert len(smbo.told) == 9


# -- evolution -----------------------------------------------------------------------------------------------


def test_a_mutation_changes_one_choice_and_keeps_what_is_valid():
    space = replay_space()
    rng = np.random.default_rng(0)
    for _ in range(50):
        parent = space.sample(rng).config
        child = mutate(space, parent, rng)
        assert child.keys() == parent.keys()
        assert sum(child[name] != parent[name] for name in parent) == 1


def test_a_mutation_of_a_branch_keeps_the_rest():
    space = Space(Concat([Or([Affine([1, 2]), Affine([3, 4])], names=["a", "b"]), Affine([5, 6])]), (2,))
    parent = {"Concat/0:Or/branch": "a", "Concat/0:Or/a/units": 2, "Concat/1:Affine/units": 6}
    children = [mutate(space, parent, np.random.default_rng(i)) for i in range(30)]
    other = [child for child in children if child["Concat/0:Or/branch"] == "b"]
    assert other
    assert all(child["Concat/1:Affine/units"] == 6 for child in other)
    assert {child["Concat/0:Or/b/units"] for child in other} == {3, 4}


def test_the_oldest_dies_and_the_parent_is_named():
    evolution = Evolution(bandit(50), population=3, tournament=3)
    for score, arm in ((0.9, 1), (0.1, 2), (0.5, 3)):
        tell(evolution, score, arm=arm)
    assert evolution.ask().parent == 0
    tell(evolution, None, arm=4)
    assert evolution.ask().parent == 2  # trial 0, though the best, is gone


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda space: MCTS(space, c=-1.0), "c is -1.0"),
        (lambda space: MCTS({"a": [1]}), "make one by from_dict"),
        (lambda space: RandomSearch(space, weight="x"), "weight is 'x'"),
        (lambda space: Evolution(space, 2, 3), "tournament <= population"),
        (lambda space: SMBO(space, explore=1.5), "explore 1.5"),
        (lambda space: SMBO(space, pool=0), "pool is 0"),
        (lambda space: SMBO(space, ridge=0.0), "ridge is 0.0"),
        (lambda space: SMBO(space, features="x"), "features is 'x'"),
        (lambda space: SMBO(space, acquisition="x"), "acquisition 'x'"),
        (lambda space: MCTS(space).tell(Proposal(0, {"arm": 0}), math.nan), "not finite|is nan"),
        (lambda space: MCTS(space).tell(Proposal(0, {"arm": 9}), 0.0), "sets 'arm' to 9"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make(bandit(3))
