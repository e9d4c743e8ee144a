"""Masks: exact counts, allocations, changes, a training inside a mask, and bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from paperback.compress.masks import (
    allocate,
    bytes_to_masks,
    check_nm,
    check_rows,
    grow,
    hold_masks,
    kept_of,
    masks_to_bytes,
    nm_mask,
    nm_patterns,
    prune,
    row_kept,
    row_mask,
    swap,
    topk_mask,
)
from paperback.errors import ArtefactError, DataError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"thin": noise(4, 5), "wide": 2 * noise(30, 40, seed=1), "kernel": noise(8, 3, 3, 3, seed=2)}


@given(st.integers(1, 6), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_exactly_the_largest_are_kept_with_ties_to_the_first(rows, columns, data):
    kept = data.draw(st.integers(0, columns))
    scores = noise(rows, columns, seed=columns).round()  # many ties
    mask = row_mask(scores, kept)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :kept]
    assert torch.equal(mask, torch.zeros_like(mask).scatter(1, order, True))
    assert torch.equal(topk_mask(scores, kept).sum(), torch.tensor(kept))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3)])
def test_blocks_keep_their_n(n, m):
    scores = noise(6, 24)
    mask = nm_mask(scores, n, m)
    check_nm(mask, n, m)
    best = scores.view(-1, m).topk(n, dim=1).indices
    assert torch.equal(mask.view(-1, m), torch.zeros(36 * 4 // m, m).scatter(1, best, 1.0).bool())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_patterns_are_all_and_each_once(n, m):
    patterns = nm_patterns(n, m)
    assert patterns.shape == (math.comb(m, n), m)
    assert (patterns.sum(1) == n).all()
    assert len({tuple(row.tolist()) for row in patterns}) == len(patterns)


@pytest.mark.parametrize("rule", ["uniform", "global", "erk"])
@pytest.mark.parametrize("density", [0.03, 0.1, 0.5, 0.731, 1.0])
def test_allocations_sum_to_the_budget(rule, density):
    if rule == "global" and density < 0.3:
        with pytest.raises(DataError, match="the layer thin would keep none"):
            allocate(WEIGHTS, density, rule)
        return
    kept = allocate(WEIGHTS, density, rule)
    total = sum(w.numel() for w in WEIGHTS.values())
    assert sum(kept.values()) == kept_of(total, density) <= density * total + 1e-6
    assert all(0 < kept[name] <= w.numel() for name, w in WEIGHTS.items())


def test_the_global_allocation_is_one_threshold():
    kept = allocate(WEIGHTS, 0.3, "global")
    everything = torch.cat([w.abs().flatten() for w in WEIGHTS.values()])
    edge = everything.topk(kept_of(len(everything), 0.3)).values[-1]
    assert kept == {name: int((w.abs() >= edge).sum()) for name, w in WEIGHTS.items()}


def test_the_uniform_magnitude_mask_is_that_of_torch():
    layer = nn.Linear(40, 30)
    mask = topk_mask(layer.weight.detach().abs(), allocate({"w": layer.weight}, 0.25)["w"])
    torch_prune.l1_unstructured(layer, "weight", amount=0.75)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_thin_layers_keep_more_by_erk():
    kept = allocate(WEIGHTS, 0.2, "erk")
    share = {name: kept[name] / w.numel() for name, w in WEIGHTS.items()}
    assert share["thin"] > share["kernel"] > share["wide"]
    free = [name for name in WEIGHTS if share[name] < 0.99]
    constants = [share[name] * WEIGHTS[name].numel() / sum(WEIGHTS[name].shape) for name in free]
    assert max(constants) / min(constants) < 1.05


def test_rows_keep_whole_numbers():
    assert allocate(WEIGHTS, 0.5, "row") == {"thin": 8, "wide": 600, "kernel": 8 * 13}
    assert row_kept(10, 0.7) == 7  # 0.7 * 10 is 6.999...


def test_masks_change_by_exact_numbers():
    mask, scores = topk_mask(noise(6, 7), 20), noise(6, 7, seed=3)
    fewer, more = prune(mask, scores, 5), grow(mask, scores, 5)
    assert (int(fewer.sum()), int(more.sum())) == (15, 25)
    assert (mask | fewer).equal(mask)
    assert scores[mask & ~fewer].max() <= scores[fewer].min()
    assert scores[more & ~mask].min() >= scores[~more].max()
    swapped = swap(mask, scores, scores, 4)
    assert int(swapped.sum()) == 20
    assert int((swapped & ~mask).sum()) == 4
    with pytest.raises(DataError, match="21 kept weights are asked for"):
        prune(mask, scores, 21)
    with pytest.raises(DataError, match="pruned weights"):
        grow(mask, scores, 23)


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_training_stays_inside_its_mask(make):
    layer = nn.Linear(8, 8, bias=False)
    mask = topk_mask(noise(8, 8), 20)
    optimizer = make([layer.weight], lr=0.1)
    handle = hold_masks(optimizer, {layer.weight: mask})
    for step in range(5):
        optimizer.zero_grad()
        layer(noise(4, 8, seed=step)).square().sum().backward()
        optimizer.step()
        assert (layer.weight[~mask] == 0).all()
    for value in optimizer.state[layer.weight].values():
        assert not isinstance(value, torch.Tensor) or value.shape != mask.shape or (value[~mask] == 0).all()
    handle.remove()
    layer(noise(4, 8)).square().sum().backward()
    optimizer.step()
    assert (layer.weight[~mask] != 0).any()


MASKS = {
    "sparse": topk_mask(noise(100, 300), 1500),
    "half": noise(64, 64) > 0,
    "2:4": nm_mask(noise(64, 64), 2, 4),
    "8:16": nm_mask(noise(8, 64), 8, 16),
    "full": torch.ones(3, 5, dtype=torch.bool),
    "empty": torch.zeros(0, 5, dtype=torch.bool),
    "one": torch.tensor(True),
}


def test_masks_come_back_from_their_bytes():
    data = masks_to_bytes(MASKS)
    back = bytes_to_masks(data)
    assert back.keys() == MASKS.keys()
    assert all(torch.equal(back[name], mask) for name, mask in MASKS.items())
    assert masks_to_bytes(MASKS) == data


def test_masks_take_the_bytes_that_they_must():
    def size(name: str, **form: str) -> int:
        return len(masks_to_bytes({name: MASKS[name]}, **form)) - len(masks_to_bytes({"one": MASKS["one"]}))

    total, kept = 30_000, 1500
    p = kept / total
    entropy = -total * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert size("sparse", form="entropy") < 1.02 * entropy + 60
    assert abs(size("sparse", form="bitmap") - total / 8) < 60
    assert size("2:4") < 64 * 64 / 4 * math.log2(6) / 8 * 1.01 + 80


def test_long_masks_are_written_in_pieces():
    mask = nm_mask(noise(8, 8192), 8, 16)  # 4,096 blocks, 12,870 patterns
    data = masks_to_bytes({"mask": mask})
    assert torch.equal(bytes_to_masks(data)["mask"], mask)


def test_damaged_masks_are_refused():
    data = masks_to_bytes({name: MASKS[name] for name in ("sparse", "2:4")})
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = int(torch.randint(len(data), (1,), generator=generator))
        broken = bytearray(data)
        broken[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        with pytest.raises(ArtefactError):
            bytes_to_masks(bytes(broken))
    for cut in (0, 3, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtefactError):
            bytes_to_masks(data[:cut])


def test_what_cannot_be_is_named():
    scores = noise(4, 10)
    refusals = [
        (lambda: row_mask(scores, 11), "11 weights cannot be kept of 10"),
        (lambda: nm_mask(scores, 2, 4, name="fc1"), "fc1 has 10 inputs"),
        (lambda: nm_mask(scores, 5, 4), "5:4 does not exist"),
        (lambda: nm_patterns(20, 40), "too many to list"),
        (lambda: topk_mask(scores.fill_(math.nan), 1), "not finite"),
        (lambda: allocate(WEIGHTS, 0.0), "density is 0"),
        (lambda: allocate({}, 0.5), "no weights"),
        (lambda: allocate(WEIGHTS, 0.5, "fair"), "'fair'"),
        (lambda: allocate(WEIGHTS, 0.01, "row"), "keeps none"),
        (lambda: check_rows(torch.eye(3).bool().tril() | torch.ones(3, 3).triu(2).bool()), "as many"),
        (lambda: masks_to_bytes({"a": noise(3)}), "torch.bool"),
        (lambda: masks_to_bytes({}, form="zip"), "'zip'"),
    ]
    for call, words in refusals:
        with pytest.raises(DataError, match=words):
            call()
    foreign = nn.Linear(2, 2)
    with pytest.raises(DataError, match="not among the optimizer's"):
        hold_masks(torch.optim.SGD(foreign.parameters(), 0.1), {nn.Parameter(noise(2)): torch.ones(2)})
