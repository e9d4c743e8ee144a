"""DSnoT: its swaps against a plain loop, what never changes, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tests.compress.models import cnn, gpt2, llama, picture_data, token_data
from torch import nn

from paperback.compress import Data
from paperback.compress.dsnot import DSnoT, cycles_for, exact_swaps, refine_mask
from paperback.compress.masks import nm_mask, row_mask
from paperback.compress.pruning import Magnitude, SparseGPT, Wanda, wanda_scores
from paperback.compress.statistics import LayerStatistics
from paperback.errors import DataError
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.testing import check_compressor


def layer(seed: int, rows: int = 20, columns: int = 24, nm: tuple[int, int] | None = None):
    """Weight, mask and statistics of a layer whose inputs have means."""
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draws)
    x = torch.randn(8, 16, columns, generator=draws) + 2 * torch.randn(columns, generator=draws)
    statistics = LayerStatistics(frozenset({"moments", "sequence_sums", "gram"}))
    statistics.update(x)
    scores = wanda_scores(weight, statistics.square_sum)
    return weight, nm_mask(scores, *nm) if nm else row_mask(scores, columns // 2), statistics


def by_hand(weight, mask, stats, cycles, eps, p, same_sign, nm=None):
    """The sheet's description of one row, written down literally."""
    d = (weight.double() * stats.sequence_sum).tolist()
    variance = stats.variance.clamp(min=1e-12).tolist()
    wanda = (weight.double().abs() * stats.square_sum.sqrt()).tolist()
    kept, start = mask.tolist(), mask.tolist()
    back, gone = set(), set()
    e = first = sum(d[j] for j in range(len(d)) if not kept[j])
    for _ in range(cycles):
        if abs(e) <= eps:
            break
        sign = 1 if e > 0 else -1
        candidates = [j for j in range(len(d)) if not start[j] and j not in back and sign * d[j] > 0]
        if not candidates:
            break
        grow = max(candidates, key=lambda j: sign * d[j] / variance[j] ** p)
        block = range(len(d)) if nm is None else range(grow // nm[1] * nm[1], grow // nm[1] * nm[1] + nm[1])
        leaving = [j for j in block if start[j] and j not in gone and (nm is not None or sign * d[j] < 0)]
        if not leaving:
            break
        prune = min(leaving, key=lambda j: wanda[j])
        new = e + d[prune] - d[grow]
        if same_sign and math.copysign(1, new) != math.copysign(1, first):
            break
        kept[grow], kept[prune], e = True, False, new
        back.add(grow)
        gone.add(prune)
    return kept


@pytest.mark.parametrize("nm", [None, (2, 4)])
@pytest.mark.parametrize("same_sign", [False, True])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_swaps_are_those_of_a_plain_loop(nm, same_sign, p):
    weight, mask, stats = layer(0, nm=nm)
    found = refine_mask(
        weight, mask, stats, max_cycles=8, update_threshold=0.5, pow_of_var=p, same_sign=same_sign, nm=nm
    )
    for row in range(len(weight)):
        assert found.mask[row].tolist() == by_hand(weight[row], mask[row], stats, 8, 0.5, p, same_sign, nm)
    assert int(found.swaps.max()) > (0 if same_sign else 1)


@pytest.mark.parametrize("nm", [None, (2, 4), (1, 4)])
def test_every_row_or_block_keeps_as_many(nm):
    weight, mask, stats = layer(1, nm=nm)
    for cycles in (1, 5, 100):
        new = refine_mask(weight, mask, stats, max_cycles=cycles, nm=nm).mask
        assert torch.equal(new.sum(1), mask.sum(1))
        if nm is not None:
            assert (new.view(-1, nm[1]).sum(1) == nm[0]).all()


def test_the_errors_are_those_of_the_masks():
    weight, mask, stats = layer(2, columns=512)
    found = refine_mask(weight, mask, stats, max_cycles=12, same_sign=True)
    contribution = weight.double() * stats.sequence_sum
    torch.testing.assert_close(found.error_before, (contribution * ~mask).sum(1))
    torch.testing.assert_close(found.error_after, (contribution * ~found.mask).sum(1))
    assert (found.error_after.abs() <= found.error_before.abs() + 1e-9).all()
    assert float(found.error_after.abs().mean()) < 0.5 * float(found.error_before.abs().mean())


def test_nothing_is_done_without_cycles_or_above_the_threshold():
    weight, mask, stats = layer(3)
    assert torch.equal(refine_mask(weight, mask, stats, max_cycles=0).mask, mask)
    assert torch.equal(refine_mask(weight, mask, stats, update_threshold=math.inf).mask, mask)


def test_a_constant_feature_is_no_infinity():
    weight, mask, _ = layer(4)
    x = torch.randn(4, 8, 24)
    x[:, :, 0] = 3.0
    stats = LayerStatistics(frozenset({"moments", "sequence_sums"}))
    stats.update(x)
    found = refine_mask(weight, mask, stats, max_cycles=5)
    assert bool(found.error_after.isfinite().all())


def test_the_cap_on_swaps_follows_the_width():
    assert (cycles_for(4096), cycles_for(128), cycles_for(11008)) == (50, 2, 135)


def test_exact_swaps_are_the_best_single_swaps():
    weight, mask, stats = layer(5, rows=4, columns=10)
    gram = stats.gram.double()

    def error(m: torch.Tensor, row: int) -> float:
        lost = (weight[row] * ~m).double()
        return float(lost @ gram @ lost)

    one = exact_swaps(weight, mask, stats.gram, 1)
    for row in range(4):
        best = error(mask[row], row)
        for j in (~mask[row]).nonzero()[:, 0]:
            for k in mask[row].nonzero()[:, 0]:
                tried = mask[row].clone()
                tried[j], tried[k] = True, False
                best = min(best, error(tried, row))
        assert error(one[row], row) == pytest.approx(best, rel=1e-9)
    many = exact_swaps(weight, mask, stats.gram, 50)
    assert all(error(many[r], r) <= error(one[r], r) + 1e-9 for r in range(4))


def test_kept_weights_are_those_of_the_dense_model():
    model = llama()
    result = DSnoT(0.6, skip=(), max_cycles=4).compress(model, token_data(), latency_runs=0, progress=False)
    plain = Wanda(0.6).compress(model, token_data(), latency_runs=0, progress=False)
    changed = 0
    for name, layer_ in find_layers(model).layers.items():
        new = weight_matrix(result.model.get_submodule(name))
        mask = result.extras["masks"][name]
        assert torch.equal(new, weight_matrix(layer_) * mask)
        assert torch.equal(mask.sum(1), plain.extras["masks"][name].sum(1))
        changed += int((mask != plain.extras["masks"][name]).sum())
    assert changed > 0
    assert len(result.extras["repaired"]) == 14
    assert "14 layers were repaired" in result.report.notes[0]


def test_skipped_layers_keep_their_first_mask():
    model = llama(layers=2)
    result = DSnoT(0.5, max_cycles=4).compress(model, token_data(), latency_runs=0, progress=False)
    assert all("self_attn" in name for name in result.extras["repaired"])


@pytest.mark.parametrize(
    "init", ["magnitude", "sparsegpt", SparseGPT(0.3, update=False), Magnitude(0.3, allocation="global")]
)
def test_any_pruner_can_start(init):
    data = token_data()
    masks = {}
    for cycles in (0, 3):
        method = DSnoT(0.5, init=init, skip=(), max_cycles=cycles)
        masks[cycles] = method.compress(llama(), data, latency_runs=0, progress=False).extras["masks"]
    assert all(torch.equal(masks[0][n].sum(1), masks[3][n].sum(1)) for n in masks[0])
    assert any(not torch.equal(masks[0][n], masks[3][n]) for n in masks[0])
    assert isinstance(init, str) or init.sparsity == 0.3  # the user's pruner is left alone


def test_kept_weights_can_make_up_for_the_rest():
    data = token_data()
    plain = DSnoT(0.7, init="sparsegpt", skip=()).compress(llama(), data, latency_runs=0, progress=False)
    updated = DSnoT(0.7, init="sparsegpt", skip=(), update=True).compress(
        llama(), data, latency_runs=0, progress=False
    )
    name = "model.layers.0.mlp.down_proj"
    a, b = (weight_matrix(r.model.get_submodule(name)) for r in (plain, updated))
    assert not torch.equal(a, b)
    assert torch.equal(b == 0, ~updated.extras["masks"][name])


@pytest.mark.parametrize("build", [llama, gpt2])
def test_dsnot_keeps_to_the_contract(build):
    check_compressor(lambda: DSnoT(0.5, skip=(), max_cycles=2), build, token_data())


def test_what_cannot_be_used_is_named():
    weight, mask, stats = layer(6)
    uneven = mask.clone()
    uneven[0, mask[0].nonzero()[0]] = False
    with pytest.raises(DataError, match="each must keep as many"):
        refine_mask(weight, uneven, stats)
    alone = LayerStatistics(frozenset({"moments", "sequence_sums"}))
    alone.update(torch.randn(1, 1, 24))
    with pytest.raises(DataError, match="at least two"):
        refine_mask(weight, mask, alone)
    with pytest.raises(DataError, match="do not keep exactly 2 of 4"):
        refine_mask(weight, mask, stats, nm=(2, 4))
    for settings, words in (
        ({"sparsity": 1.0}, "sparsity"),
        ({"init": "random"}, "init is 'random'"),
        ({"max_cycles": -1}, "max_cycles"),
        ({"skip": "mlp"}, "skip"),
        ({"update_threshold": -1.0}, "update_threshold"),
    ):
        with pytest.raises(DataError, match=words):
            DSnoT(**settings)
    with pytest.raises(DataError, match="convolution"):
        DSnoT().compress(cnn(), picture_data(), latency_runs=0, progress=False)
    with pytest.raises(DataError, match=r"layers\.0\.self_attn.*blocks of 5"):
        DSnoT(nm=(2, 5)).compress(llama(), token_data(), latency_runs=0, progress=False)
    linear = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(DataError, match="not finite"):
        DSnoT().compress(linear, Data(torch.full((4, 8), math.inf)), latency_runs=0, progress=False)
