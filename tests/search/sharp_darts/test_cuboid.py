"""The HyperCuboid: the longest path by brute force, grouped steps against single operations, any kit."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.search.sharp_darts import Chain, ConvolutionKit, DenseKit, HyperCuboid, Mixing, read_chain
from paperback.search.sharp_darts.steps import (
    GroupedConvolutionStep,
    GroupedDenseStep,
    GroupedSharpSepConv,
    NestedStep,
)

WIDTHS, NAMES = (2, 3, 5), ("relu", "tanh", "gelu", "linear")
DENSE = HyperCuboid(WIDTHS, 2, NAMES, DenseKit(6, hidden=4), strides=(1,))
CONVOLUTIONS = ("sep_conv_3x3", "max_pool_3x3", "flood_conv_3x3", "dil_choke_conv_3x3", "avg_pool_3x3")


def total(weights, widths, names, chain):
    places = [widths.index(w) for w in chain.widths]
    return sum(
        weights[k, places[k], places[k + 1], names.index(name)] for k, name in enumerate(chain.operations)
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_longest_path_is_that_of_brute_force(seed):
    names = ("a", "b")
    weights = np.random.default_rng(seed).random((3, 3, 3, 2))
    chains = [Chain(w, o) for w in product(WIDTHS, repeat=4) for o in product(names, repeat=3)]
    best = max(chains, key=lambda chain: total(weights, WIDTHS, names, chain))
    found = read_chain(weights, WIDTHS, names)
    assert found == best
    for how in ("top_down", "bottom_up"):
        greedy = read_chain(weights, WIDTHS, names, how)
        assert total(weights, WIDTHS, names, greedy) <= total(weights, WIDTHS, names, found)


def test_greedy_reading_by_hand():
    weights = np.zeros((2, 2, 2, 1))
    weights[0, 0, 1, 0], weights[0, 1, 0, 0] = 0.6, 0.5
    weights[1, 0, 0, 0], weights[1, 1, 1, 0] = 0.4, 0.1
    assert read_chain(weights, (2, 3), ("a",)).widths == (3, 2, 2)  # 0.5 + 0.4
    assert read_chain(weights, (2, 3), ("a",), "top_down").widths == (2, 3, 3)  # 0.6 first, then 0.1
    weights[1, 1, 1, 0] = 0.45
    assert read_chain(weights, (2, 3), ("a",), "bottom_up").widths == (2, 3, 3)
    weights[1, 1, 1, 0], weights[0, 0, 1, 0] = 0.45, 0.1
    assert read_chain(weights, (2, 3), ("a",), "bottom_up").widths == (2, 3, 3)  # 0.45 first, then 0.1


def test_none_is_never_read():
    weights = np.zeros((2, 1, 1, 2))
    weights[..., 0] = 0.9
    assert read_chain(weights, (4,), ("none", "relu")).operations == ("relu", "relu")


def test_max_w_has_the_path_of_the_softmax():
    alpha = torch.randn(3, 3 * 3 * 4, generator=torch.Generator().manual_seed(0))
    chains = [
        read_chain(weights.view(3, 3, 3, 4).numpy(), WIDTHS, NAMES)
        for weights in (Mixing()(alpha), alpha.softmax(-1))
    ]
    assert chains[0] == chains[1]


def copy_dense(grouped, nested):
    """The weights of single layers into a grouped step."""
    starts = np.cumsum([0, *WIDTHS])
    with torch.no_grad():
        for (i, j, o), block in zip(nested.options, nested.blocks, strict=True):
            rows = slice(o * starts[-1] + starts[j], o * starts[-1] + starts[j + 1])
            grouped.products[i].weight[rows] = block[0][0].weight


def copy_convolutions(grouped, nested):
    """The weights of single operations into a grouped step."""
    n, starts = len(WIDTHS), np.cumsum([0, *WIDTHS])
    with torch.no_grad():
        for (i, j, o), block in zip(nested.options, nested.blocks, strict=True):
            bank = grouped.banks[o]
            if isinstance(bank, GroupedSharpSepConv):
                first, pointwise, second, last = (m for m in block.modules() if isinstance(m, nn.Conv2d))
                place = j * starts[-1] + starts[i]
                bank.first.weight[place : place + WIDTHS[i]] = first.weight
                bank.to_mid[j * n + i].weight[0] = pointwise.weight[..., 0, 0]
                place = n * sum(bank.mids[:j]) + i * bank.mids[j]
                bank.second.weight[place : place + bank.mids[j]] = second.weight
                bank.to_out[j].weight[i] = last.weight[..., 0, 0]
            elif i != j:
                mix = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
                place = starts[j] - (WIDTHS[i] if j > i else 0)
                bank.mixes[i][0].weight[0, place : place + WIDTHS[j]] = mix.weight[..., 0, 0]


def assert_steps_agree(nested, grouped, maps, weights):
    assert sum(p.numel() for p in nested.parameters()) == sum(p.numel() for p in grouped.parameters())
    for mode in (True, False):  # in evaluation by the running statistics
        nested.train(mode), grouped.train(mode)
        outputs = nested(maps, weights), grouped(maps, weights)
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one, other)
        gradients = [
            torch.autograd.grad(sum(m.square().sum() for m in out), [weights, *maps]) for out in outputs
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_a_grouped_dense_step_is_the_nested_one():
    nested = NestedStep(WIDTHS, NAMES, DenseKit(6), 1).double()
    grouped = DenseKit(6).grouped_step(WIDTHS, NAMES, 1).double()
    assert isinstance(grouped, GroupedDenseStep)
    copy_dense(grouped, nested)
    maps = [torch.randn(7, w, dtype=torch.float64, requires_grad=True) for w in WIDTHS]
    assert_steps_agree(nested, grouped, maps, torch.rand(3, 3, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_convolution_step_is_the_nested_one(stride):
    nested = NestedStep(WIDTHS, CONVOLUTIONS, ConvolutionKit(), stride).double()
    grouped = ConvolutionKit().grouped_step(WIDTHS, CONVOLUTIONS, stride).double()
    assert isinstance(grouped, GroupedConvolutionStep)
    copy_convolutions(grouped, nested)
    maps = [torch.randn(3, w, 6, 5, dtype=torch.float64, requires_grad=True) for w in WIDTHS]
    assert_steps_agree(nested, grouped, maps, torch.rand(3, 3, 5, dtype=torch.float64, requires_grad=True))


def test_one_width_and_equal_initialisation():
    space = HyperCuboid((4,), 2, ("max_pool_3x3", "sep_conv_3x3"), ConvolutionKit(1, 3, 8))
    assert space.supernet(Mixing())(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    torch.manual_seed(0)
    grouped = ConvolutionKit().grouped_step((16, 64), ("sep_conv_3x3",), 1).banks[0]
    for pointwise, channels in ((grouped.to_mid[1], 64), (grouped.to_out[1], 64)):
        deviation = nn.Conv2d(channels, 64, 1).weight.std().item()
        assert pointwise.weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_operations_that_cannot_be_grouped_are_computed_one_by_one():
    names = ("none", "skip_connect", "sep_conv_3x3")
    supernet = HyperCuboid((2, 4), 4, names, ConvolutionKit(1, 3, 8)).supernet(Mixing())
    assert all(isinstance(step, NestedStep) for step in supernet.steps)
    assert supernet(torch.randn(2, 1, 9, 9)).shape == (2, 3)


def test_strides_alternate():
    space = HyperCuboid((2, 4), 4, ("sep_conv_3x3",), ConvolutionKit(1, 3, 8))
    sizes = []
    chain = space.build(space.random(torch.Generator().manual_seed(0)))
    x = torch.randn(2, 1, 16, 16)
    for part in chain[:-1]:
        x = part(x)
        sizes.append(x.shape[-1])
    assert sizes == [16, 16, 8, 8, 4, 4]
    assert chain[-1](x).shape == (2, 3)


def test_what_weighs_little_is_left_out():
    space = HyperCuboid(WIDTHS, 1, NAMES, DenseKit(6), strides=(1,), skip_below="auto")
    supernet = space.supernet(Mixing("scalar"))
    step = supernet.steps[0]
    assert isinstance(step, NestedStep)
    called = []
    for option, block in zip(step.options, step.blocks, strict=True):
        block.register_forward_hook(lambda *_, option=option: called.append(option))
    supernet(torch.randn(4, 6))
    assert len(called) == space.options
    called.clear()
    with torch.no_grad():
        supernet.alphas["steps"].fill_(0.0)[0, :2] = 20.0
    supernet(torch.randn(4, 6))
    assert set(called) >= {(0, 0, 0), (0, 0, 1)}
    assert {j for _, j, _ in called} == {0, 1, 2}  # every width keeps its strongest
    assert (0, 0, 2) not in called


def test_computed_again_gradients_are_the_same():
    x, gradients = torch.randn(5, 6), []
    for recompute in (False, True):
        torch.manual_seed(0)
        space = HyperCuboid(WIDTHS, 2, NAMES, DenseKit(6), strides=(1,), recompute=recompute)
        supernet = space.supernet(Mixing())
        gradients.append(torch.autograd.grad(supernet(x).square().mean(), list(supernet.parameters())))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


class SequenceKit:
    """A user's kit: convolutions along a sequence, and attention."""

    def stem(self, width, affine):
        return nn.Conv1d(3, width, 1)

    def operation(self, name, width_in, width_out, stride, affine):
        if name == "wrong":
            return nn.Conv1d(width_in, width_out, 3)
        return nn.Conv1d(width_in, width_out, 3, padding=1)

    def end(self, width, affine):
        return nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 4))

    def head(self):
        return nn.Linear(4, 2)


def test_a_users_own_kit():
    space = HyperCuboid((2, 4), 3, ("convolution",), SequenceKit(), strides=(1,))
    supernet = space.supernet(Mixing())
    assert supernet(torch.randn(5, 3, 9)).shape == (5, 2)
    assert space.build(supernet.architecture())(torch.randn(5, 3, 9)).shape == (5, 2)


def test_an_operation_of_another_shape_is_named():
    space = HyperCuboid((2, 4), 3, ("convolution", "wrong"), SequenceKit(), strides=(1,))
    with pytest.raises(DataError, match="'wrong' from width 0 to width 0"):
        space.supernet(Mixing())(torch.randn(5, 3, 9))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"widths": ()}, "widths is"),
        ({"widths": (4, 0)}, "widths is"),
        ({"widths": (4, -2)}, "widths is"),
        ({"widths": (4, 4)}, "widths is"),
        ({"layers": 3, "strides": (1, 2)}, "layers is 3"),
        ({"layers": 0}, "layers is 0"),
        ({"operations": ()}, "operations is"),
        ({"operations": ("none",)}, "operations is"),
        ({"operations": ("relu", "relu")}, "operations is"),
        ({"operations": ("sigmoid",)}, "no dense operation 'sigmoid'"),
        ({"skip_below": 1.0}, "skip_below is 1.0"),
    ],
)
def test_bad_spaces(settings, words):
    with pytest.raises(DataError, match=words):
        HyperCuboid(
            **{"widths": (2, 4), "layers": 2, "operations": NAMES, "kit": DenseKit(6), "strides": (1,)}
            | settings
        )


def test_bad_chains_and_weights():
    with pytest.raises(DataError, match="2 widths and 1 operations"):
        DENSE.build(Chain((2, 3), ("relu",)))
    with pytest.raises(DataError, match="no dense operation"):
        DENSE.build(Chain((2, 3, 2), ("relu", "other")))
    with pytest.raises(DataError, match="weights has shape"):
        read_chain(np.zeros((2, 3, 2, 4)), WIDTHS, NAMES)
    with pytest.raises(DataError, match="how is 'best'"):
        read_chain(np.zeros((2, 3, 3, 4)), WIDTHS, NAMES, "best")
