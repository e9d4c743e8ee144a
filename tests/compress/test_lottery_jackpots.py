"""Lottery jackpots: exact budgets at every step, the stated gradient, hand-made exchanges, frozen weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.compress.models import cnn, gpt2, picture_data, pictures, token_data
from torch import Tensor, nn
from torch.nn.utils import prune

from paperback.compress import Budget, Compressed, Data
from paperback.compress.data import run
from paperback.compress.lottery_jackpots import (
    LotteryJackpots,
    MaskSearch,
    exchange,
    restriction_at,
)
from paperback.compress.masked import apply_masks, masking, remove_masks
from paperback.compress.masks import bytes_to_masks, masks_to_bytes, topk_mask
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import weight_matrix
from paperback.testing.compress import check_compressor
from paperback.training import generator

QUIET = {"latency_runs": 0, "progress": False}
LAYERS = ("0", "3")  # of the small network; 6 is its classifier


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return cnn()


@pytest.fixture(scope="module")
def result(dense: nn.Module) -> Compressed:
    method = LotteryJackpots(0.8, epochs=4, batch_size=6, alloc="uniform")
    return method.compress(dense, picture_data(), **QUIET)


# -- exchanges -----------------------------------------------------------------------------------------------


def test_four_weights_by_hand() -> None:
    mask = torch.tensor([True, True, False, False])
    scores = torch.tensor([0.1, 0.2, 0.4, 0.3])
    new, count = exchange(mask, scores, 1.0)
    assert new.tolist() == [False, False, True, True]
    assert count == 2
    new, count = exchange(mask, scores, 0.5)  # the best comes (third), the worst goes (first)
    assert new.tolist() == [False, True, True, False]
    assert count == 1
    assert exchange(mask, scores, 0.01)[1] == 1  # a ceiling: one exchange of two
    new, count = exchange(mask, scores, 0.0)
    assert torch.equal(new, mask)
    assert count == 0


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.9, 1.0])
def test_the_budget_is_exact_for_any_share(share: float) -> None:
    draws = generator(0)
    mask = topk_mask(torch.rand(30, 40, generator=draws), 123)
    for _ in range(5):
        scores = torch.rand(30, 40, generator=draws)
        wanted = topk_mask(scores, 123)
        inside, outside = wanted & ~mask, mask & ~wanted
        assert int(inside.sum()) == int(outside.sum())
        new, count = exchange(mask, scores, share)
        assert int(new.sum()) == 123
        assert count == math.ceil(share * int(inside.sum()))
        came, went = new & ~mask, mask & ~new
        assert bool((came <= inside).all())
        assert bool((went <= outside).all())
        if 0 < count < int(inside.sum()):
            assert float(scores[came].min()) >= float(scores[inside & ~came].max())
            assert float(scores[went].max()) <= float(scores[outside & ~went].min())
        if share == 1:
            assert torch.equal(new, wanted)
        mask = new


def test_restrictions() -> None:
    assert [restriction_at("power4", u) for u in (0.0, 0.5, 1.0)] == [1.0, 0.0625, 0.0]
    assert [restriction_at("cosine", u) for u in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])
    assert restriction_at(None, 0.99) == 1.0
    with pytest.raises(DataError, match="share"):
        exchange(torch.ones(3, dtype=torch.bool), torch.ones(3), 1.5)


def test_gradient_of_the_scores_is_straight_through() -> None:
    layer = nn.Conv2d(3, 5, 3).double()
    x = torch.randn(2, 3, 6, 6, generator=generator(1)).double()
    mask = topk_mask(torch.rand(5, 27, generator=generator(2)), 40)
    search = MaskSearch(mask).double()
    with masking({"layer": layer}) as places:
        places["layer"].mask = search()
        layer(x).square().sum().backward()
    product = (weight_matrix(layer) * mask).view_as(layer.weight).requires_grad_()
    F.conv2d(x, product, layer.bias).square().sum().backward()
    expected = product.grad.flatten(1) * weight_matrix(layer)
    assert float((search.scores.grad - expected).abs().max()) < 1e-10
    assert search.scores.detach().unique().tolist() == pytest.approx([0.99, 1.0])


# -- a whole search ------------------------------------------------------------------------------------------


def test_only_the_mask_and_the_running_statistics_change(dense: nn.Module, result: Compressed) -> None:
    old, new = dict(dense.named_parameters()), dict(result.model.named_parameters())
    for name in LAYERS:
        mask = result.extras["masks"][name]
        assert torch.equal(
            weight_matrix(result.model.get_submodule(name)), old[f"{name}.weight"].flatten(1) * mask
        )
    for name in old.keys() - {f"{layer}.weight" for layer in LAYERS}:
        assert torch.equal(old[name], new[name]), name  # biases, the norm's factors, the classifier
    assert set(result.extras["buffers"]) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    rows = {row.name: row.what for row in result.report.layers}
    assert "classifier" in rows["6"]


def test_the_budget_is_exact_and_exchanges_shrink(result: Compressed) -> None:
    masks, history = result.extras["masks"], result.extras["history"]
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == math.floor(0.2 * total + 1e-9)
    assert len(history["exchanges"]) == 16
    assert history["share"][0] == 1.0
    assert history["share"][-1] == pytest.approx((1 / 16) ** 4)
    assert sum(history["exchanges"]) > 0
    assert 0 < result.extras["overlap"] < 1


def test_masks_and_statistics_are_all_that_a_task_needs(result: Compressed) -> None:
    model, batch = cnn(), pictures()
    model.load_state_dict(result.extras["buffers"], strict=False)
    with torch.no_grad():
        assert torch.equal(run(apply_masks(model, result.extras["masks"]), batch), run(result.model, batch))
        remove_masks(model)
    assert torch.equal(model[3].weight, cnn()[3].weight)


def test_no_epoch_is_one_shot_magnitude(dense: nn.Module) -> None:
    method = LotteryJackpots(0.75, epochs=0, alloc="uniform", targets=["3"], keep_classifier=False)
    ours = method.compress(dense, picture_data(), **QUIET)
    reference = cnn()
    prune.l1_unstructured(reference[3], "weight", amount=0.75)
    assert torch.equal(ours.model[3].weight, reference[3].weight)
    assert ours.extras["overlap"] == 1.0


def test_sparsity_zero_is_the_identity(dense: nn.Module) -> None:
    same = LotteryJackpots(0.0, epochs=2).compress(dense, picture_data(), **QUIET)
    assert torch.equal(run(same.model, pictures()), run(dense, pictures()))


def test_global_allocation_is_exact_and_leaves_every_output_a_weight() -> None:
    model = cnn()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)  # by magnitude alone the first layer would vanish
    result = LotteryJackpots(0.9, epochs=1, keep_classifier=False).compress(model, picture_data(), **QUIET)
    kept = {name: int(mask.sum()) for name, mask in result.extras["masks"].items()}
    total = sum(mask.numel() for mask in result.extras["masks"].values())
    assert sum(kept.values()) == math.floor(0.1 * total + 1e-9)
    assert kept["0"] == 8
    with pytest.raises(BudgetError, match="0\\.0"):
        LotteryJackpots(0.99, epochs=1).compress(model, picture_data(), **QUIET)


@pytest.mark.parametrize("init", ["random", "snip", "movement", "function"])
def test_first_masks(dense: nn.Module, init: str) -> None:
    start = (lambda name, weight: weight) if init == "function" else init
    method = LotteryJackpots(0.8, epochs=0, init=start, alloc="uniform", batch_size=24, targets=["0", "3"])
    mask = method.compress(dense, picture_data(), **QUIET).extras["masks"]["3"]
    weight = weight_matrix(dense[3])
    x, y = pictures()
    gradient = torch.autograd.grad(F.cross_entropy(dense(x), y), dense[3].weight)[0].flatten(1)
    scores = {"snip": (weight * gradient).abs(), "movement": -weight * gradient, "function": weight}
    if init == "random":
        assert int(mask.sum()) == int(0.2 * weight.numel())
        assert not torch.equal(mask, topk_mask(weight.abs(), int(mask.sum())))
    else:
        expected = topk_mask(scores[init], int(mask.sum()))
        assert float((expected == mask).float().mean()) > 0.995  # rounding of the gradient may swap a pair


def test_random_weights_are_drawn_by_the_seed(dense: nn.Module) -> None:
    settings = {"epochs": 1, "weights": "random", "init": "random", "restriction": None, "alloc": "erk"}
    first, again, other = (
        LotteryJackpots(0.5, seed=seed, **settings).compress(dense, picture_data(), **QUIET)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.model[3].weight, again.model[3].weight)
    assert not torch.equal(first.model[6].weight, other.model[6].weight)
    assert any("drawn at random" in note for note in first.report.notes)


def test_tuning_keeps_the_mask_and_is_said(dense: nn.Module) -> None:
    tuned = LotteryJackpots(0.8, epochs=1, finetune_epochs=2).compress(dense, picture_data(), **QUIET)
    mask = tuned.extras["masks"]["3"]
    weight = weight_matrix(tuned.model[3])
    assert not bool(weight[~mask].any())
    assert not torch.equal(weight, weight_matrix(dense[3]) * mask)
    assert any("not a lottery jackpot" in note for note in tuned.report.notes)


def test_searching_finds_a_better_mask_than_the_first() -> None:
    draws = generator(3)
    x = torch.randn(512, 16, generator=draws)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():
        for layer, seed in zip(model[::2], range(3), strict=True):
            nn.init.kaiming_normal_(layer.weight, generator=generator(seed))
    data = Data((x, y), test=(x, y), batch_size=64)
    found = {
        epochs: LotteryJackpots(0.7, epochs=epochs, batch_size=64).compress(model, data, **QUIET)
        for epochs in (0, 15)
    }
    accuracy = {epochs: result.report.quality_after["accuracy"] for epochs, result in found.items()}
    assert accuracy[15] > accuracy[0] + 0.2


def test_transformers_conv1d(dense: nn.Module) -> None:
    result = LotteryJackpots(0.5, epochs=1, init="snip", alloc="uniform").compress(
        gpt2(), token_data(), **QUIET
    )
    mask = result.extras["masks"]["transformer.h.0.attn.c_attn"]
    assert torch.equal(result.model.transformer.h[0].attn.c_attn.weight.T != 0, mask)


def test_tied_layers_share_their_mask() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).relu()))

    x = (torch.randn(16, 8), torch.randint(0, 3, (16,)))
    result = LotteryJackpots(0.5, epochs=2).compress(Twice(), Data(x), **QUIET)
    assert result.model.a.weight is result.model.b.weight
    assert torch.equal(result.model.b.weight != 0, result.extras["masks"]["a"])


def test_bytes_of_masks() -> None:
    mask = topk_mask(torch.rand(100, 1001, generator=generator(4)), 5005)
    n, share = mask.numel(), 0.05
    entropy = -n * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    bitmap, coded = masks_to_bytes({"w": mask}, "bitmap"), masks_to_bytes({"w": mask}, "entropy")
    empty = len(masks_to_bytes({"w": mask[:0]}, "bitmap"))
    assert math.ceil(n / 8) <= len(bitmap) <= math.ceil(n / 8) + empty + 50
    assert len(coded) - empty <= 1.02 * entropy
    assert torch.equal(bytes_to_masks(coded)["w"], mask)


def test_behaviour_of_a_compressor() -> None:
    check_compressor(
        lambda: LotteryJackpots(epochs=1, batch_size=8), cnn, picture_data(), Budget(density=0.2)
    )


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"alloc": "best"}, "alloc"),
        ({"init": "best"}, "init"),
        ({"restriction": "linear"}, "restriction"),
        ({"weights": "none"}, "weights"),
    ],
)
def test_bad_settings(settings: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        LotteryJackpots(**settings)


def test_bad_models_and_data(dense: nn.Module) -> None:
    empty = cnn()
    nn.init.zeros_(empty[3].weight)
    with pytest.raises(DataError, match="all weights of 3"):
        LotteryJackpots().compress(empty, picture_data(), **QUIET)
    with pytest.raises(DataError, match="labels"):
        LotteryJackpots(epochs=1).compress(dense, pictures()[0], **QUIET)
    with pytest.raises(DataError, match="no layer"):
        LotteryJackpots().compress(nn.Sequential(nn.ReLU()), picture_data(), **QUIET)
    sparse = cnn()
    with torch.no_grad():
        for name in LAYERS:
            sparse.get_submodule(name).weight.view(-1)[10:] = 0
    again = LotteryJackpots(0.5, epochs=1, alloc="uniform").compress(sparse, picture_data(), **QUIET)
    assert any("were 0 already" in note for note in again.report.notes)
