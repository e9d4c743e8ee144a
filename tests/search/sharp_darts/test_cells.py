"""The cell space: genotypes from weights, sizes, and the supernet as the mixture that it should be."""

import pytest
import torch

import paperback
from paperback.errors import DataError
from paperback.search.sharp_darts import (
    DARTS_PRIMITIVES,
    PRIMITIVES,
    SHARPSEPCONV_DARTS_MAX_W,
    CellNetwork,
    CellSpace,
    Genotype,
    Mixing,
    parse_cell,
)
from paperback.study import measure

NAMES = ("none", "skip_connect", "sep_conv_3x3")
SMALL = CellSpace(NAMES, cells=3, nodes=2, width=2, channels=1)


def test_genotype_from_hand_made_weights():
    weights = torch.tensor(
        [
            [0.90, 0.06, 0.04],  # node 0
            [0.10, 0.20, 0.70],
            [0.98, 0.01, 0.01],  # node 1: the weakest, whatever "none" weighs
            [0.30, 0.40, 0.30],
            [0.20, 0.10, 0.70],
        ]
    )
    assert parse_cell(weights, NAMES) == (
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 2),
        ("skip_connect", 1),
    )
    assert parse_cell(weights, NAMES, skip_primitive=None) == (
        ("none", 0),
        ("sep_conv_3x3", 1),
        ("none", 0),
        ("sep_conv_3x3", 2),
    )


def test_a_cell_of_four_nodes_has_fourteen_edges():
    genotype = parse_cell(torch.rand(14, len(PRIMITIVES)), PRIMITIVES)
    assert len(genotype) == 8
    with pytest.raises(DataError, match="13 rows"):
        parse_cell(torch.rand(13, len(PRIMITIVES)), PRIMITIVES)


def test_nothing_is_left_of_none():
    with pytest.raises(DataError, match="only primitive is 'none'"):
        parse_cell(torch.ones(2, 1), ("none",))


def test_the_published_network_has_3_6_million_parameters():
    with torch.device("meta"):
        network = CellSpace(DARTS_PRIMITIVES).build(SHARPSEPCONV_DARTS_MAX_W, cells=20, width=36)
    assert measure.parameters(network) == pytest.approx(3.6e6, abs=0.3e6)


@pytest.mark.parametrize("weighting", ["max_w", "scalar"])
def test_an_edge_is_the_weighted_sum_of_its_operations(weighting):
    supernet = SMALL.supernet(Mixing(weighting)).double()
    edge, x = supernet.cells[0].edges[3], torch.randn(4, 2, 5, 5, dtype=torch.float64)
    weights = Mixing(weighting)(torch.randn(len(NAMES), dtype=torch.float64))
    expected = sum(w * operation(x) for w, operation in zip(weights, edge.operations, strict=True))
    torch.testing.assert_close(edge(x, weights), expected)


def test_norms_have_no_parameters_in_the_search_and_have_them_after():
    def affine(model):
        return {m.affine for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}

    supernet = SMALL.supernet(Mixing())
    supernet.stem = torch.nn.Identity()
    assert affine(supernet) == {False}
    assert affine(SMALL.build(supernet.architecture())) == {True}


def test_pools_are_normalised_in_the_search():
    supernet = CellSpace(("max_pool_3x3", "avg_pool_3x3"), cells=3, nodes=1, width=2).supernet(Mixing())
    for operation in supernet.cells[0].edges[0].operations:
        assert isinstance(operation[-1], torch.nn.BatchNorm2d)


def test_two_cells_reduce_and_double():
    supernet = CellSpace(NAMES, cells=8, nodes=4, width=4).supernet(Mixing())
    assert [cell.kind == "reduce" for cell in supernet.cells] == [i in (2, 5) for i in range(8)]
    assert supernet.alphas["normal"].shape == supernet.alphas["reduce"].shape == (14, 3)
    assert supernet(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    assert supernet.classifier.in_features == 4 * 4 * 4


def test_alphas_begin_near_uniform():
    alphas = CellSpace().supernet(Mixing()).alphas["normal"]
    assert 5e-4 < alphas.std() < 2e-3


def test_a_built_network_is_what_its_genotype_says():
    genotype = Genotype(
        normal=(("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 2), ("max_pool_3x3", 0)),
        reduce=(("max_pool_3x3", 0), ("skip_connect", 1), ("skip_connect", 2), ("sep_conv_3x3", 1)),
    )
    network = SMALL.build(genotype).eval()
    cell = network.cells[0]
    before, last = torch.randn(2, 2, 6, 6, 6).unbind()
    a, b = cell.inputs[0](before), cell.inputs[1](last)
    first = a + b
    second = first + torch.nn.functional.max_pool2d(a, 3, 1, 1)
    torch.testing.assert_close(cell(before, last), torch.cat([first, second], 1))


def test_drop_path_drops_images_and_keeps_the_mean():
    genotype = Genotype(
        (("max_pool_3x3", 0), ("skip_connect", 1)), (("max_pool_3x3", 0), ("max_pool_3x3", 1))
    )
    cell = CellSpace(NAMES, cells=3, nodes=1, width=2, channels=1).build(genotype).cells[0]
    cell.inputs = torch.nn.ModuleList([torch.nn.Identity()] * 2)
    x, zero = torch.ones(4000, 2, 3, 3), torch.zeros(4000, 2, 3, 3)
    torch.manual_seed(0)
    y = cell(x, zero, drop_path=0.25)[:, 0, 0, 0]
    torch.testing.assert_close(y.unique(), torch.tensor([0, 4 / 3]))
    assert y.mean() == pytest.approx(1.0, abs=0.05)
    assert (cell(zero, x, drop_path=0.9) == 1).all()  # a skip is never dropped
    assert (cell.eval()(x, zero, drop_path=0.25) == 1).all()


def test_auxiliary_classifier():
    genotype = SMALL.random(torch.Generator().manual_seed(0))
    network = SMALL.build(genotype, auxiliary=True)
    logits, beside = network(torch.randn(2, 1, 32, 32))
    assert logits.shape == beside.shape == (2, 10)
    assert network.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    with pytest.raises(DataError, match="too small for the auxiliary"):
        network.train()(torch.randn(2, 1, 14, 14))


def test_computed_again_gradients_are_the_same():
    x, outputs = torch.randn(4, 1, 6, 6), []
    for recompute in (False, True):
        torch.manual_seed(0)
        space = CellSpace(NAMES, cells=3, nodes=2, width=2, channels=1, recompute=recompute)
        supernet = space.supernet(Mixing())
        loss = supernet(x).square().mean()
        outputs.append(torch.autograd.grad(loss, list(supernet.parameters())))
    for plain, again in zip(*outputs, strict=True):
        torch.testing.assert_close(plain, again)


def test_random_genotypes_can_be_built():
    draw = torch.Generator().manual_seed(3)
    space = CellSpace(PRIMITIVES, cells=3, nodes=4, width=4, channels=1)
    for _ in range(3):
        genotype = space.random(draw)
        for cell in (genotype.normal, genotype.reduce):
            assert "none" not in {name for name, _ in cell}
            assert all(cell[2 * i][1] != cell[2 * i + 1][1] for i in range(4))
        assert space.build(genotype)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_saved_and_loaded(tmp_path):
    network = SMALL.build(SMALL.random(torch.Generator().manual_seed(0)), drop_path=0.2).eval()
    network.save_pretrained(tmp_path / "network")
    x = torch.randn(3, 1, 8, 8)
    for loaded in (CellNetwork.from_pretrained(tmp_path / "network"), paperback.load(tmp_path / "network")):
        assert torch.equal(loaded(x), network(x))
        assert loaded.greatest_drop_path == 0.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"primitives": ("none",)}, "besides"),
        ({"primitives": ()}, "besides"),
        ({"primitives": ("sep_conv_3x3", "sep_conv_3x3")}, "different names"),
        ({"primitives": ("sep_conv", "none")}, "no primitive 'sep_conv'"),
        ({"cells": 2}, "cells=2"),
        ({"nodes": 0}, "nodes=0"),
        ({"width": 3}, "width is 3"),
        ({"width": 0}, "width is 0"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_bad_spaces(settings, words):
    with pytest.raises(DataError, match=words):
        CellSpace(**settings)


@pytest.mark.parametrize(
    ("normal", "reduce", "settings", "words"),
    [
        ((), (), {}, "0 normal"),
        ((("none", 0),), (("none", 0),), {}, "1 normal"),
        ((("none", 0), ("none", 2)), (("none", 0), ("none", 1)), {}, "edge 1 .* comes from 2"),
        ((("none", 0), ("none", 1)), (("none", -1), ("none", 1)), {}, "reducing cell comes from -1"),
        ((("none", 0), ("none", 1)), (("none", 0), ("none", 1)), {"drop_path": 1.0}, "drop_path"),
        ((("none", 0), ("none", 1)), (("none", 0), ("none", 1)), {"width": 0}, "width 0"),
        ((("nothing", 0), ("none", 1)), (("none", 0), ("none", 1)), {}, "no primitive 'nothing'"),
    ],
)
def test_bad_genotypes(normal, reduce, settings, words):
    with pytest.raises(DataError, match=words):
        SMALL.build(Genotype(normal, reduce), **settings)
