"""The language: conditional choices, shapes, ties, residuals, bisection, replay, and spaces with errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paperback.errors import DataError
from paperback.search import Choice, Float, Integer, InvalidTrial
from paperback.search.deep_architect import (
    Affine,
    AvgPooling2D,
    Basic,
    BatchNormalization,
    ChoiceBisection,
    Concat,
    Conv2D,
    Dropout,
    Empty,
    Flatten,
    MaxPooling2D,
    MaybeSwap,
    Module,
    Nonlinearity,
    Optional,
    Or,
    Pooling2D,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    Sigmoid,
    Space,
    Split,
    Tanh,
    UserHyperparams,
    When,
    from_dict,
)
from paperback.search.replay import replay_space


def convolutional():
    block = Concat(
        [
            Conv2D([4, 6], [1, 3], [1, 2], ["same", "valid"], ["default", "kaiming"]),
            MaybeSwap(Nonlinearity(["relu", "tanh"]), BatchNormalization()),
            Optional(Dropout([0.5, 0.9])),
        ]
    )
    return Space(
        Concat(
            [
                Repeat(block, [1, 2]),
                Optional(Residual(Conv2D([5], [3]))),
                Pooling2D(["max", "mean"], [2], [1, 2]),
                Affine([3]),
            ]
        ),
        (2, 9, 8),
    )


def names(space, take=0):
    """Decisions met when always the same place is chosen."""
    walk, met = space.walk(), []
    while walk.open is not None:
        met.append(walk.open.name)
        walk.choose(min(take, len(walk.open.values) - 1))
    return met


@pytest.mark.parametrize(
    "space",
    [
        replay_space(),
        Space(Or([Empty(), Concat([Affine([1, 2]), Repeat(Affine([3, 4, 5]), [1, 3])])]), (2,)),
        Space(RepeatTied(Or([Empty(), Affine([1, 2])]), [1, 2, 5]), (2,)),
        Space(ChoiceBisection(Repeat(Affine([1, 2, 3]), [1, 2])), (2,)),
        Space(
            UserHyperparams(
                momentum=When([0.5, 0.9], "optimizer", ["sgd"]),
                optimizer=["adam", "sgd", "lion"],
                nesterov=When([True, False], "momentum", [0.9]),
                lr=[1, 2, 3],
            )
        ),
    ],
)
def test_count_is_the_number_of_different_models(space):
    walks = list(space.enumerate())
    assert space.count() == len(walks) == len({walk.key for walk in walks})


def test_the_replay_space_has_576_models():
    assert replay_space().count() == 576


def test_enumeration_is_limited():
    with pytest.raises(DataError, match="576 models, more than the limit of 100"):
        list(replay_space().enumerate(100))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_every_sample_compiles_to_what_it_says_and_replays(seed):
    space = convolutional()
    walk = space.sample(np.random.default_rng(seed))
    again = space.replay(walk.key)
    assert again.config == walk.config
    assert again.modules == walk.modules
    try:
        model = walk.compile()
    except InvalidTrial:
        with pytest.raises(InvalidTrial):
            again.compile()
        return
    x = torch.randn(3, *space.input_shape)
    assert model(x).shape == (3, *walk.out_shape)
    assert repr(again.compile()) == repr(model)
    shapes = [{name: p.shape for name, p in m.state_dict().items()} for m in (model, again.compile())]
    assert shapes[0] == shapes[1]


def test_only_the_chosen_branch_is_entered():
    entered = []

    class Spy(Affine):
        def specify(self, shape, scope):
            entered.append(scope)
            return (yield from super().specify(shape, scope))

    space = Space(Or([Spy([1, 2]), Spy([3, 4])], names=["a", "b"]), (2,))
    entered.clear()
    space.prefixes.__init__()  # forget what building the space has met
    walk = space.walk()
    assert entered == []
    walk.choose(1)
    assert entered == ["Or/b"]
    assert walk.open.values == (3, 4)


def test_single_values_are_no_choices():
    space = Space(Concat([Conv2D([4], [3]), UserHyperparams(lr=[0.1]), Affine([2, 3])]), (1, 4, 4))
    assert names(space) == ["Concat/2:Affine/units"]
    walk = space.sample(np.random.default_rng(0))
    assert walk.hyperparameters == {"lr": 0.1}


def test_tied_copies_share_values_but_not_weights():
    tied = Space(RepeatTied(Concat([Affine([2, 3, 4, 5]), ReLU()]), [3]), (4,))
    for walk in tied.enumerate():
        units = [values[0] for name, *values in walk.modules if name == "Affine"]
        assert len(units) == 3
        assert len(set(units)) == 1
    square = tied.replay({"RepeatTied/tied:Concat/0:Affine/units": 4}).compile()
    layers = [module for module in square.modules() if isinstance(module, nn.Linear)]
    assert len({id(layer.weight) for layer in layers}) == 3
    assert not torch.equal(layers[0].weight, layers[1].weight)


def test_copies_of_repeat_choose_by_themselves():
    space = Space(Repeat(Affine([2, 3]), [2]), (4,))
    assert {tuple(m[1] for m in walk.modules) for walk in space.enumerate()} == {
        (2, 2),
        (2, 3),
        (3, 2),
        (3, 3),
    }


def test_a_residual_pads_channels_on_the_far_side():
    model = Space(Residual(Conv2D([12], [3])), (8, 5, 5)).walk().compile()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    out = model(x)
    inner = model.branches[1](x)
    assert out.shape == (2, 12, 5, 5)
    torch.testing.assert_close(out[:, :8], inner[:, :8] + x)
    torch.testing.assert_close(out[:, 8:], inner[:, 8:])


def test_a_residual_of_other_rank_is_flattened_and_both_paths_have_gradients():
    space = Space(Residual(Affine([5])), (2, 3, 3))
    model = space.walk().compile()
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    out = model(x)
    assert out.shape == (4, 18) == (4, *space.walk().out_shape)
    torch.testing.assert_close(out[:, 5:], x.flatten(1)[:, 5:])
    out[:, 5:].sum().backward()  # reaches x by the shortcut only
    assert x.grad.flatten(1)[:, 5:].eq(1).all()
    out = model(x)
    out[:, :5].square().sum().backward()
    assert model.branches[1][1].weight.grad.abs().sum() > 0


def test_branches_are_concatenated_along_channels():
    space = Space(Split([Conv2D([3], [1]), MaxPooling2D([2], [1])], join="concatenate"), (2, 4, 4))
    walk = space.walk()
    model, x = walk.compile(), torch.randn(2, 2, 4, 4)
    assert walk.out_shape == (5, 4, 4) == model(x).shape[1:]
    torch.testing.assert_close(model(x)[:, 3:, :3, :3], nn.MaxPool2d(2, 1)(x))
    assert model(x)[:, 3:, 3, :].eq(0).all()


@pytest.mark.parametrize("k", [2, 3, 5, 8, 13])
def test_bisection_has_the_same_leaves_in_as_many_bits(k):
    plain = Space(Affine(list(range(1, k + 1))), (2,))
    halved = plain.bisected()
    walks = list(halved.enumerate())
    assert [walk.modules for walk in walks] == [walk.modules for walk in plain.enumerate()]
    assert max(len(walk.config) for walk in walks) == math.ceil(math.log2(k))
    assert all(name.startswith("ChoiceBisection/units/bit") for walk in walks for name in walk.config)


def test_bisection_works_over_composites_and_with_walks():
    space = convolutional()
    halved = space.bisected()
    assert halved.count() == space.count()
    for seed in range(20):
        walk = halved.sample(np.random.default_rng(seed))
        bits = space.walk(bisect=True)
        for index in walk.indices:
            assert len(bits.open.values) == 2
            bits.choose(index)
        assert bits.modules == walk.modules
        plain = space.replay(bits.config)
        assert plain.modules == walk.modules
        back = space.walk(bisect=True)
        while back.open is not None:
            back.choose(back.toward(bits.config))
        assert back.config == bits.config


def test_leaf_weights_make_all_models_equally_probable():
    space = Space(Or([Empty(), Concat([Affine([1, 2, 3]), Repeat(Affine([4, 5]), [1, 2])])]), (2,))
    n = 3800
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng, "leaves").key for _ in range(n)]
    expected = n / space.count()
    assert space.count() == 19
    counts = np.array([drawn.count(walk.key) for walk in space.enumerate()])
    assert ((counts - expected) ** 2 / expected).sum() < 42.3  # chi-squared with 18 degrees, p = .001
    shallow = [space.sample(rng).key for _ in range(400)]
    assert 150 < shallow.count((("Or/branch", "0:Empty"),)) < 250


def test_large_spaces_are_counted_and_drawn_from():
    space = Space(Repeat(Affine(list(range(1, 101))), [50]), (2,))
    assert space.count() == 100**50
    assert len(space.sample(np.random.default_rng(0), "leaves").config) == 50


def test_conditions_bring_a_parameter_up_only_when_they_hold():
    space = from_dict({"momentum": When([0.5, 0.9], "optimizer", ["sgd"]), "optimizer": ["adam", "sgd"]})
    configs = [walk.config for walk in space.enumerate()]
    assert configs == [
        {"optimizer": "adam"},
        {"optimizer": "sgd", "momentum": 0.5},
        {"optimizer": "sgd", "momentum": 0.9},
    ]


def test_a_dictionary_becomes_a_space_and_comes_back():
    space = from_dict(
        {"lr": Float(1e-4, 1.0, log=True), "n": Integer(1, 100), "k": Integer(1, 3), "c": Choice(["a", "b"])},
        points=4,
    )
    flat = space.to_dict()
    assert flat["lr"].values == pytest.approx([10**-3.5, 10**-2.5, 10**-1.5, 10**-0.5])
    assert flat["n"].values == (13, 38, 63, 88)
    assert flat["k"].values == (1, 2, 3)
    assert flat["lr"].ordered
    assert not flat["c"].ordered
    assert space.count() == 4 * 4 * 3 * 2


def test_any_torch_module_is_a_layer():
    def recurrent(shape, units):
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), units))

    def embedding(shape, units):
        return nn.Embedding(10, units)

    space = Space(Basic(recurrent, units=[3, 4]), (5, 2))
    assert {walk.out_shape for walk in space.enumerate()} == {(3,), (4,)}
    with pytest.raises(DataError, match=r"cannot take float inputs.*out_shape"):
        Space(Basic(embedding, units=[3]), (5,))
    text = Space(
        Concat([Basic(embedding, lambda shape, units: (*shape, units), units=[3]), Flatten(), Affine([2])]),
        (5,),
    )
    assert text.walk().compile()(torch.zeros(4, 5, dtype=torch.long)).shape == (4, 2)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shapes_of_windows_are_those_of_torch(padding, size, stride):
    for layer in (
        Conv2D([3], [size], [stride], [padding]),
        MaxPooling2D([size], [stride], [padding]),
        AvgPooling2D([size], [stride], [padding]),
    ):
        walk = Space(layer, (2, 7, 6)).walk()
        assert walk.compile()(torch.randn(1, 2, 7, 6)).shape[1:] == walk.out_shape


def test_what_is_too_small_or_too_large_is_invalid():
    space = Space(Concat([Conv2D([2], [3, 7], [1], ["valid"]), Affine([2])]), (1, 5, 5))
    invalid = space.replay({"Concat/0:Conv2D/sizes": 7})
    with pytest.raises(InvalidTrial, match="size 7 is given only 5 x 5 pixels"):
        invalid.compile()
    space.replay({"Concat/0:Conv2D/sizes": 3}).compile()
    small = Space(Affine([1, 100]), (10,), max_params=50)
    small.replay({"Affine/units": 1}).compile()
    with pytest.raises(InvalidTrial, match=r"1,100 parameters, more than max_params = 50"):
        small.replay({"Affine/units": 100}).compile()


def endless():
    class Loop(Module):
        children = ()

        def specify(self, shape, scope):
            yield

        def count(self):
            return 1

    loop = Loop()
    loop.children = (Concat([loop]),)
    return loop


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concat([]), "Concat has no modules"),
        (lambda: Or([]), "Or has no modules"),
        (lambda: Or([Empty(), Empty()], names=["a", "a"]), "a name of its own"),
        (lambda: Concat([nn.ReLU()]), "wrap a torch factory in Basic"),
        (lambda: Affine([]), "units of Affine: the list of values is empty"),
        (lambda: Affine(3), "units of Affine: 3 is no list"),
        (lambda: Affine([2, 2]), "the value 2 stands twice"),
        (lambda: Affine([0]), "whole numbers >= 1"),
        (lambda: Affine([1], ["magic"]), "'magic' is unknown; use default"),
        (lambda: Conv2D([1], [3], [1], ["full"]), "'full' is unknown; use same, valid"),
        (lambda: Dropout([0.0]), r"probabilities in \(0, 1\]"),
        (lambda: Repeat(Empty(), [0, 1]), "whole numbers >= 1"),
        (lambda: Repeat(Empty(), []), "the list of values is empty"),
        (lambda: RepeatTied(Empty(), [0]), "RepeatTied may have"),
        (lambda: UserHyperparams(), "has no names"),
        (lambda: UserHyperparams(**{"a/b": [1]}), "slash"),
        (lambda: UserHyperparams(lr=[float("nan")]), "lr: nan is not"),
        (lambda: UserHyperparams(a=When([1], "b", [1])), "'a' depends on 'b', which is not among"),
        (lambda: UserHyperparams(a=When([1], "b", [7]), b=[1, 2]), "'a' is unreachable"),
        (
            lambda: UserHyperparams(a=When([1, 2], "b", [1]), b=When([1, 2], "a", [1])),
            "in a circle: a -> b -> a",
        ),
        (lambda: Space(Concat([UserHyperparams(lr=[1]), UserHyperparams(lr=[2])]), ()), "'lr' stands in two"),
        (lambda: Space(Repeat(UserHyperparams(lr=[1, 2]), [1, 2]), ()), "lr stand inside a Repeat"),
        (lambda: Space(Conv2D([1], [3]), (4,)), "Conv2D is given inputs of shape"),
        (
            lambda: Space(Concat([Or([Empty(), Or([Empty(), Flatten()])]), MaxPooling2D([2])]), (1, 4, 4)),
            "Pooling2D is given inputs of shape",
        ),
        (lambda: Space(endless(), (1,)), "contains itself"),
        (lambda: Space(nn.ReLU(), (1,)), "give a module of the language"),
        (lambda: Space(Empty(), (0,)), "input_shape"),
        (lambda: Space(Empty(), (1,), max_params=0), "max_params is 0"),
        (lambda: from_dict({}), "at least one parameter"),
        (lambda: from_dict({"a": []}), "a: the list of values is empty"),
        (lambda: from_dict({"a": [1]}, points=0), "points is 0"),
        (lambda: Space(Affine([1]), (1,)).to_dict(), "flat"),
    ],
)
def test_errors_of_a_space_are_found_before_anything_runs(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_branches_may_use_one_name_as_they_never_meet():
    space = Space(Or([UserHyperparams(lr=[1, 2]), UserHyperparams(lr=[3, 4])]))
    assert {walk.hyperparameters["lr"] for walk in space.enumerate()} == {1, 2, 3, 4}


def test_walks_say_what_is_wrong():
    space = Space(Affine([1, 2]), (2,))
    walk = space.walk()
    with pytest.raises(DataError, match="'Affine/units' is still open"):
        walk.compile()
    with pytest.raises(DataError, match="index 2 is out of range"):
        walk.choose(2)
    walk.choose(0)
    with pytest.raises(DataError, match="every choice"):
        walk.choose(0)
    with pytest.raises(DataError, match="does not set 'Affine/units'"):
        space.replay({})
    with pytest.raises(DataError, match="to 5; it may be"):
        space.replay({"Affine/units": 5})
    with pytest.raises(DataError, match="sets 'x', which this model does not ask for"):
        space.replay({"Affine/units": 1, "x": 1})


def test_activations_and_the_empty_module():
    space = Space(Concat([Nonlinearity(["sigmoid"]), Or([Sigmoid(), Tanh(), Empty()])]), (2,))
    x = torch.randn(3, 2)
    wanted = [x.sigmoid().sigmoid(), x.sigmoid().tanh(), x.sigmoid()]
    for walk, expected in zip(space.enumerate(), wanted, strict=True):
        torch.testing.assert_close(walk.compile()(x), expected)
