"""One-shot pruners against slow references, and their budgets."""

from __future__ import annotations

import pytest
import torch
from tests.compress.models import bert, cnn, gpt2, llama, picture_data, token_data
from torch import Tensor

from paperback.compress import Budget
from paperback.compress.pruning import (
    Magnitude,
    SparseGPT,
    Wanda,
    prune_matrix,
    sparsegpt_scores,
    update_matrix,
    wanda_scores,
)
from paperback.compress.storage import SparseLinear
from paperback.errors import BudgetError, DataError
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.testing import check_compressor


def problem(rows: int = 12, columns: int = 160, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, correlated inputs, and their Gram matrix."""
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draws)
    mix = torch.randn(columns, columns, generator=draws) / columns**0.5 + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=draws) @ mix
    return weight, x, x.T @ x


def sparsegpt_by_hand(weight, gram, density, nm=None, block=128, damping=0.01):
    """Algorithm 1 of SparseGPT, column by column in float64, with the inverse taken anew for every column."""
    w, h = weight.double().clone(), gram.double().clone()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    rows, columns = w.shape
    mask = torch.zeros_like(w, dtype=torch.bool)
    size = block if nm is None else nm[1]
    for j in range(columns):
        inverse = torch.linalg.inv(h[j:, j:])  # of the columns that are left
        if j % size == 0:
            end = min(j + size, columns)
            upper = torch.linalg.cholesky(inverse, upper=True)
            scores = (w[:, j:end] / upper.diagonal()[: end - j]).square()
            if nm is None:
                kept = int(density * end * rows + 1e-9) - int(density * j * rows + 1e-9)
                chosen = scores.flatten().topk(kept).indices
                mask[:, j:end] = (
                    torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, chosen, True).view_as(scores)
                )
            else:
                mask[:, j:end] = (
                    torch.zeros_like(scores).scatter(1, scores.topk(nm[0], 1).indices, 1.0).bool()
                )
        error = w[:, j] * ~mask[:, j] / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w * mask, mask


@pytest.mark.parametrize("nm", [None, (2, 4), (1, 4)])
def test_sparsegpt_is_its_algorithm_column_by_column(nm):
    weight, _, gram = problem()
    ours, mask = prune_matrix(weight, gram, 0.4, nm=nm)
    theirs, their_mask = sparsegpt_by_hand(weight, gram, 0.4, nm)
    assert (mask == their_mask).double().mean() > 0.999  # float32 may settle a tie otherwise
    same = (mask == their_mask).all(1)
    torch.testing.assert_close(ours[same].double(), theirs[same], atol=2e-3, rtol=1e-2)
    assert same.sum() >= 10


def test_sparsegpt_without_correlations_is_magnitude_in_each_block():
    weight, _, _ = problem()
    pruned, mask = prune_matrix(weight, 3.0 * torch.eye(160), 0.5)
    for start, end in ((0, 128), (128, 160)):
        part = weight[:, start:end].abs()
        assert float(part[mask[:, start:end]].min()) >= float(part[~mask[:, start:end]].max())
    torch.testing.assert_close(pruned, weight * mask)


def test_updates_lower_the_error_of_the_output():
    for seed in range(5):
        weight, x, gram = problem(seed=seed)
        pruned, mask = prune_matrix(weight, gram, 0.5)
        updated, plain = (float(((w - weight) @ x.T).square().sum()) for w in (pruned, weight * mask))
        assert updated < 0.8 * plain
        torch.testing.assert_close(update_matrix(weight, gram, mask), pruned, atol=1e-4, rtol=1e-3)


def test_the_update_of_one_row_is_least_squares_at_last():
    """With all of a row's pruned columns before its kept ones, the kept weights solve the least squares."""
    weight, _, gram = problem(rows=3, columns=32)
    mask = torch.zeros(3, 32, dtype=torch.bool)
    mask[:, 16:] = True
    ours = update_matrix(weight, gram, mask, damping=1e-9).double()
    g = gram.double()
    exact = weight[:, 16:].double() + weight[:, :16].double() @ g[:16, 16:] @ torch.linalg.inv(g[16:, 16:])
    torch.testing.assert_close(ours[:, 16:], exact, atol=1e-3, rtol=1e-3)


def test_scores_are_what_the_formulas_say():
    weight, x, gram = problem(columns=24)
    torch.testing.assert_close(
        wanda_scores(weight, x.double().square().sum(0)), weight.abs() * x.norm(dim=0), rtol=1e-4, atol=1e-5
    )
    damped = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(24)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = weight.double().square() / upper.diagonal().square()
    torch.testing.assert_close(sparsegpt_scores(weight, gram).double(), expected, rtol=1e-3, atol=1e-3)


def test_wanda_is_a_topk_of_each_row():
    model, data = llama(), token_data()
    result = Wanda(0.5).compress(model, data, latency_runs=0, progress=False)
    name = "model.layers.0.self_attn.q_proj"  # its input is that of the dense model
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in data.batches("train"):
            model(batch)
    handle.remove()
    scores = weight_matrix(model.get_submodule(name)).abs() * torch.cat(seen).norm(dim=0)
    best = torch.zeros_like(scores).scatter(1, scores.topk(16, dim=1).indices, 1.0).bool()
    assert torch.equal(result.extras["masks"][name], best)


def test_a_dead_input_is_pruned_first():
    weight, _, gram = problem(columns=32)
    gram[5], gram[:, 5] = 0.0, 0.0
    pruned, mask = prune_matrix(weight, gram, 0.5)
    assert not mask[:, 5].any()
    assert bool(pruned.isfinite().all())


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
@pytest.mark.parametrize(("build", "data"), [(llama, token_data), (cnn, picture_data)])
def test_pruners_keep_to_the_contract(method, build, data):
    check_compressor(lambda: method(0.5), build, data())


@pytest.mark.parametrize("build", [gpt2, bert])
def test_other_families_are_pruned_too(build):
    model = build()
    result = SparseGPT(nm=(2, 4)).compress(model, token_data().train, latency_runs=0, progress=False)
    for name in find_layers(
        model, ignore=["lm_head", "embed", "pooler", "classifier"] if build is bert else ["lm_head"]
    ).layers:
        weight = weight_matrix(result.model.get_submodule(name))
        assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


@pytest.mark.parametrize("allocation", ["uniform", "global", "erk", "row"])
def test_magnitude_keeps_the_density(allocation):
    result = Magnitude(0.7, allocation=allocation).compress(llama(), latency_runs=0, progress=False)
    masks = result.extras["masks"].values()
    density = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
    assert density == pytest.approx(0.3, abs=0.03)


def test_budgets_are_met_in_every_unit():
    data = token_data()
    settings = {"latency_runs": 0, "progress": False}
    half = Wanda().compress(llama(), data, Budget(density=0.25), **settings)
    assert all(int(m.sum()) == m.numel() // 4 for m in half.extras["masks"].values())
    packed = Wanda().compress(llama(), data, Budget(bytes=60_000), **settings)
    assert packed.report.after.bytes_on_disk <= 60_000
    assert any(isinstance(m, SparseLinear) for m in packed.model.modules())
    nm = Wanda().compress(llama(), data, Budget(nm=(1, 4)), **settings)
    assert all(int(m.sum()) == m.numel() // 4 for m in nm.extras["masks"].values())
    with pytest.raises(BudgetError, match="give more than that, up to"):
        Wanda().compress(llama(), data, Budget(bytes=9000), **settings)
    with pytest.raises(BudgetError, match=r"reaches densities from 0\.03"):
        Wanda().compress(llama(), data, Budget(density=0.001), **settings)
    with pytest.raises(BudgetError, match="cannot be told bits"):
        Wanda().compress(llama(), data, Budget(bits=4), **settings)


def test_packed_layers_answer_like_those_with_zeros():
    data = token_data()
    for settings in ({"sparsity": 0.6}, {"nm": (2, 4)}):
        dense = SparseGPT(**settings).compress(llama(), data, latency_runs=0, progress=False)
        packed = SparseGPT(**settings, pack=True).compress(llama(), data, latency_runs=0, progress=False)
        with torch.no_grad():
            a, b = dense.model(data.train).logits, packed.model(data.train).logits
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert packed.report.after.bytes_in_memory < dense.report.after.bytes_in_memory


def test_settings_out_of_range_are_named():
    for settings, words in (
        ({"sparsity": 0.5, "nm": (2, 4)}, "give one of them"),
        ({"sparsity": 1.0}, "sparsity is 1"),
        ({"nm": (5, 4)}, "5:4"),
    ):
        with pytest.raises(DataError, match=words):
            Wanda(**settings)
    with pytest.raises(DataError, match="damping"):
        SparseGPT(damping=0.0)
    with pytest.raises(DataError, match="'fair'"):
        Magnitude(allocation="fair")
    with pytest.raises(DataError, match=r"not finite|inverted"):
        prune_matrix(torch.randn(2, 4), torch.full((4, 4), float("nan")), 0.5)
