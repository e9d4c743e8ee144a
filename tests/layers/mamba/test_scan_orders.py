"""Scan orders: they lose nothing, go where their name says, and layers over them see what they should."""

from __future__ import annotations

import pytest
import torch

from paperback.errors import DataError, NotSupportedError
from paperback.layers.mamba import Mamba
from paperback.layers.mamba.directions import document_starts
from paperback.layers.mamba.scan_orders import GRID_SCANS, PATHS, TWO_WAY, ScanOrder, order_of, paths_of

NAMES = [*PATHS, *GRID_SCANS, *(name + TWO_WAY for name in GRID_SCANS)]


@pytest.mark.parametrize("name", NAMES)
def test_merge_after_scan_is_the_number_of_visits_times_the_identity(name):
    order = order_of(name, 24, (4, 6))
    x = torch.randn(3, 24, 5, dtype=torch.float64)
    visits = order.paths * order.indices.shape[-1] // 24
    assert order.paths == paths_of(name)
    torch.testing.assert_close(order.merge(order.scan(x)), visits * x)
    torch.testing.assert_close(order.merge(order.scan(x), "mean"), x)


def test_cross_merge_after_cross_scan_is_four_times_the_identity():
    for order in (ScanOrder.cross(3, 5), ScanOrder.cross_rot90(3, 5)):
        x = torch.randn(2, 15, 4, dtype=torch.float64)
        torch.testing.assert_close(order.merge(order.scan(x)), 4 * x)


@pytest.mark.parametrize("name", NAMES)
def test_the_inverse_is_what_sorting_finds(name):
    order = order_of(name, 24, (4, 6))
    again = ScanOrder.of_paths(order.indices)
    assert torch.equal(order.inverse.sort(-1).values, again.inverse.sort(-1).values)


def test_hilbert_curves_are_chains_of_neighbours_in_any_rectangle():
    for height in range(1, 18):
        for width in range(1, 18):
            path = ScanOrder.hilbert(height, width).indices[0]
            assert torch.equal(path.sort().values, torch.arange(height * width))
            rows, columns = path // width, path % width
            steps = rows.diff().abs() + columns.diff().abs()
            assert (steps == 1).all(), (height, width)


def test_hilbert_keeps_near_what_is_near():
    """In a square of 2^k, a quarter of the path is a quarter of the square."""
    path = ScanOrder.hilbert(8, 8).indices[0]
    quarters = (path // 8 // 4) * 2 + path % 8 // 4
    assert all(len(quarter.unique()) == 1 for quarter in quarters.split(16))


def test_snakes_are_chains_of_neighbours():
    path = ScanOrder.snake(3, 4).indices[0]
    assert path.tolist() == [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11]


def test_the_paths_of_cross_and_of_the_four_rotations():
    assert ScanOrder.cross(2, 3).indices.tolist() == [
        [0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0],
    ]  # fmt: skip
    assert ScanOrder.cross_rot90(2, 3).indices.tolist() == [
        [0, 1, 2, 3, 4, 5], [2, 5, 1, 4, 0, 3], [5, 4, 3, 2, 1, 0], [3, 0, 4, 1, 5, 2],
    ]  # fmt: skip


def test_local_goes_window_by_window_also_at_the_edges():
    assert ScanOrder.local(3, 3, 2).indices[0].tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]


def test_atrous_paths_keep_to_their_sub_grid_and_share_the_work():
    order = ScanOrder.atrous(4, 6, 2)
    assert order.indices.shape == (4, 6)
    for k, path in enumerate(order.indices):
        assert (path // 6 % 2 == k // 2).all()
        assert (path % 6 % 2 == k % 2).all()


def test_degree_puts_hubs_last_and_shuffles_ties_only():
    degrees = torch.tensor([[3, 1, 2, 1, 5, 1], [1, 1, 1, 1, 1, 0]])
    assert ScanOrder.degree(degrees).indices.tolist() == [[[1, 3, 5, 2, 0, 4]], [[5, 0, 1, 2, 3, 4]]]
    draws = set()
    for seed in range(20):
        path = ScanOrder.degree(degrees, torch.Generator().manual_seed(seed)).indices
        assert torch.equal(degrees.gather(1, path[:, 0]), degrees.sort(1).values)
        draws.add(tuple(path.flatten().tolist()))
    assert len(draws) > 10
    assert ScanOrder.degree(degrees, descending=True).indices[0, 0, 0] == 4


def test_join_and_both_ways():
    order = ScanOrder.join(ScanOrder.snake(2, 2), ScanOrder.hilbert(2, 2)).both_ways()
    assert order.paths == 4
    assert torch.equal(order.indices[:2].flip(1), order.indices[2:])


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (torch.tensor([0.0, 1.0]), "integers"),
        (torch.tensor([0, 2, 2]), "equally often"),
        (torch.tensor([-1, 0]), "equally often"),
        (torch.tensor([0, 2]), "equally often"),
        (torch.tensor(0), "shape"),
        ([0, 1], "list"),
    ],
)
def test_orders_that_are_none_are_refused(indices, words):
    with pytest.raises(DataError, match=words):
        ScanOrder.of_paths(indices)


def test_other_bad_input():
    with pytest.raises(DataError, match="one of forward"):
        order_of("zigzag", 4)
    with pytest.raises(DataError, match=r"grid=\(height, width\)"):
        order_of("cross", 16)
    with pytest.raises(DataError, match="15 positions, the input has 16"):
        order_of("cross", 16, (3, 5))
    with pytest.raises(DataError, match="divide"):
        ScanOrder.atrous(3, 4, 2)
    with pytest.raises(DataError, match="window"):
        ScanOrder.local(3, 4, 0)
    with pytest.raises(DataError, match="for 4 positions, the input has 5"):
        ScanOrder.forward(4).scan(torch.zeros(1, 5, 2))
    with pytest.raises(DataError, match="batch of 2"):
        ScanOrder.degree(torch.zeros(2, 4)).scan(torch.zeros(3, 4, 1))
    with pytest.raises(DataError, match="must agree"):
        ScanOrder.join(ScanOrder.forward(3), ScanOrder.forward(4))


# -- layers over several paths -----------------------------------------------------------------------------


def layer(scan, grid=None, kind="s6", **settings):
    torch.manual_seed(0)
    return Mamba(8, d_state=4, scan=scan, grid=grid, kind=kind, headdim=8, **settings).double()


def influence(module, length=12, target=5, **options):
    """Which inputs change the output at a position."""
    u = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    module(u, **options)[0, target].pow(2).sum().backward()
    return (u.grad.abs().sum(-1)[0] > 0).tolist()


def test_forward_sees_the_past_reverse_the_future_bidirectional_both():
    assert influence(layer("forward")) == [True] * 6 + [False] * 6
    assert influence(layer("reverse")) == [False] * 5 + [True] * 7
    assert influence(layer("bidirectional")) == [True] * 12


@pytest.mark.parametrize("kind", ["s6", "ssd", "mamba3"])
@pytest.mark.parametrize("scan", ["bidirectional", "cross", "hilbert", "atrous"])
def test_every_kind_runs_in_every_order_and_trains_all_it_has(kind, scan):
    module = layer(scan, None if scan == "bidirectional" else (4, 4), kind)
    module(torch.randn(2, 16, 8, dtype=torch.float64)).pow(2).sum().backward()
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_reverse_is_forward_on_the_flipped_sequence():
    forward, reverse = layer("forward"), layer("reverse")
    reverse.load_state_dict({
        name.replace("core.", "core.cores.0."): tensor for name, tensor in forward.state_dict().items()
    })  # fmt: skip
    u = torch.randn(2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(reverse(u), forward(u.flip(1)).flip(1))


def test_bidirectional_is_the_sum_of_its_directions():
    both, forward, reverse = layer("bidirectional"), layer("forward"), layer("reverse")
    weights = both.state_dict()
    outside = {name: tensor for name, tensor in weights.items() if "cores" not in name}
    forward.load_state_dict(outside | {
        name.replace("cores.0.", ""): t for name, t in weights.items() if "cores.0." in name
    })  # fmt: skip
    reverse.load_state_dict(outside | {
        name.replace("cores.1.", "cores.0."): t for name, t in weights.items() if "cores.1." in name
    })  # fmt: skip
    u = torch.randn(2, 9, 8, dtype=torch.float64)
    # The gate and the output projection are linear in what is merged.
    torch.testing.assert_close(both(u), forward(u) + reverse(u))


def test_share_all_but_a():
    shared, own = layer("bidirectional", share="all_but_A"), layer("bidirectional")
    names = {name for name, _ in shared.named_parameters() if ".cores.1." in name}
    assert names == {"core.cores.1.A_log"}
    assert sum(p.numel() for p in shared.parameters()) < sum(p.numel() for p in own.parameters())
    again = layer("bidirectional", share="all_but_A")
    again.load_state_dict(shared.state_dict())
    u = torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(again(u), shared(u))


def test_padding_does_not_reach_real_positions():
    module = layer("bidirectional")
    u = torch.randn(2, 10, 8, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [6]])
    out = module(u, mask=mask)
    torch.testing.assert_close(out[1, :6], module(u[1:, :6])[0])
    u[1, 6:] = 1e3
    torch.testing.assert_close(module(u, mask=mask)[mask], out[mask])
    left = module(u.flip(1), mask=mask.flip(1))
    torch.testing.assert_close(left[1, 4:], module(u[1:, :6].flip(1))[0])


def test_documents_are_kept_apart_in_both_directions():
    module = layer("bidirectional")
    u = torch.randn(1, 10, 8, dtype=torch.float64)
    reset = torch.zeros(1, 10, dtype=torch.bool)
    reset[0, 4] = True
    out = module(u, reset=reset)
    torch.testing.assert_close(out[:, :4], module(u[:, :4]))
    torch.testing.assert_close(out[:, 4:], module(u[:, 4:]))


def test_where_documents_start_along_the_paths():
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 2] = True
    starts = document_starts(ScanOrder.bidirectional(6), reset)[0]
    assert starts.nonzero().tolist() == [[0, 2], [1, 4]]


def test_an_order_for_each_sample():
    """Each graph in its own order is each graph alone in its order."""
    module = layer(ScanOrder.forward(6))
    u = torch.randn(2, 6, 8, dtype=torch.float64)
    degrees = torch.tensor([[3, 1, 2, 0, 5, 4], [0, 1, 2, 3, 4, 5]])
    together = module(u, order=ScanOrder.degree(degrees))
    for i in range(2):
        alone = module(u[i : i + 1], order=ScanOrder.degree(degrees[i]))
        torch.testing.assert_close(together[i], alone[0])
    torch.testing.assert_close(together[1], module(u[1:])[0])


def test_a_mean_merge_is_the_sum_over_the_paths_divided():
    summed, averaged = layer("bidirectional"), layer("bidirectional", merge="mean")
    averaged.load_state_dict(summed.state_dict())
    u = torch.randn(1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(2 * averaged(u), summed(u))


def test_bad_input_of_layers_over_paths():
    with pytest.raises(DataError, match="grid"):
        layer("cross")
    with pytest.raises(DataError, match="16 positions, the input has 12"):
        layer("cross", (4, 4))(torch.zeros(1, 12, 8, dtype=torch.float64))
    with pytest.raises(DataError, match="merge"):
        layer("bidirectional", merge="max")
    with pytest.raises(DataError, match="share"):
        layer("bidirectional", share="some")
    with pytest.raises(DataError, match="must be one of forward"):
        layer("sideways")
    module = layer("bidirectional")
    u = torch.zeros(1, 6, 8, dtype=torch.float64)
    with pytest.raises(NotSupportedError):
        module(u, return_state=True)
    with pytest.raises(NotSupportedError):
        module.init_state(1)
    with pytest.raises(DataError, match="1 paths"):
        module(u, order=ScanOrder.forward(6))
    with pytest.raises(DataError, match="order"):
        layer("forward")(u, order=ScanOrder.forward(6))
    with pytest.raises(DataError, match="for 7 positions"):
        layer(ScanOrder.forward(7))(u)


def test_a_layer_of_several_paths_can_be_exported():
    module = layer("cross", (3, 4)).float()
    u = torch.randn(2, 12, 8)
    exported = torch.export.export(module, (u,)).module()
    torch.testing.assert_close(exported(u), module(u), atol=1e-5, rtol=1e-5)
    both = layer("bidirectional").float()
    exported = torch.export.export(both, (u,)).module()
    torch.testing.assert_close(exported(u), both(u), atol=1e-5, rtol=1e-5)


def test_costs_count_the_paths_and_what_they_share_out():
    def core(scan, grid=(8, 8)):
        return layer(scan, grid).core.cost(64).flops

    one, four, shared = core("hilbert"), core("cross"), core("atrous")
    image = 2 * 9 * 16 * 64  # the 3x3 convolution of 16 channels
    assert four - image == 4 * (one - image)
    assert shared == one
