"""The codebook layer: what it gives, which codes it chooses, its four backward passes, dead codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from paperback.errors import DataError
from paperback.explain.codebook_features import CodebookLayer, layer


def make(dim=6, n_codes=10, seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    return CodebookLayer(dim, n_codes, **settings).to(dtype)


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
def test_all_codes_give_their_mean_whatever_the_input(similarity):
    codebook = make(n_codes=7, k=7, similarity=similarity)
    out, ids = codebook(draw(3, 4, 6))
    torch.testing.assert_close(out, codebook.codes[0].mean(0).expand(3, 4, 6))
    assert (ids.sort(-1).values == torch.arange(7)).all()


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
def test_codes_are_the_most_similar_ones_best_first(similarity):
    codebook = make(n_codes=50, k=4, similarity=similarity, groups=2)
    x = draw(5, 3, 6)
    _, ids = codebook(x)
    for group in range(2):
        u = F.layer_norm(x[..., 3 * group : 3 * group + 3], (3,))
        c = codebook.codes[group]
        score = u @ (c / c.norm(dim=1, keepdim=True)).T if similarity == "inner" else -torch.cdist(u, c)
        assert (ids[:, :, group] == score.topk(4).indices).all()


def test_an_activation_that_is_a_code_is_kept():
    codebook = make(n_codes=8)
    with torch.no_grad():  # codes that LayerNorm leaves as they are
        codebook.codes.copy_(F.layer_norm(codebook.codes, (6,), eps=0.0))
    out, ids = codebook(codebook.codes[0])
    assert (ids.flatten() == torch.arange(8)).all()
    torch.testing.assert_close(out, codebook.codes[0])


def test_codes_do_not_depend_on_the_scale_of_the_input_or_the_length_of_a_code():
    codebook = make(n_codes=40, k=3)
    x = draw(20, 6)
    _, ids = codebook(x)
    assert (codebook(7.5 * x)[1] == ids).all()
    with torch.no_grad():
        codebook.codes *= torch.rand(1, 40, 1) + 0.5
    assert (codebook(x)[1] == ids).all()


def test_a_group_sees_its_own_slice_only():
    codebook = make(dim=8, groups=4, k=2)
    x = draw(10, 8)
    _, before = codebook(x)
    changed = x.clone()
    changed[:, 2:4] = draw(10, 2) * 3
    out, after = codebook(changed)
    assert (after[:, [0, 2, 3]] == before[:, [0, 2, 3]]).all()
    assert (after[:, 1] != before[:, 1]).any()
    torch.testing.assert_close(out[:, 4:], codebook(x)[0][:, 4:], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 6)])
def test_any_number_of_dimensions(shape):
    out, ids = make(k=2, groups=3)(draw(*shape))
    assert out.shape == shape
    assert ids.shape == (*shape[:-1], 3, 2)


def test_half_precision_is_compared_in_single():
    codebook = make(dim=16, n_codes=300, k=4, dtype=torch.bfloat16)
    x = draw(50, 16, dtype=torch.bfloat16)
    out, ids = codebook(x)
    wide = make(dim=16, n_codes=300, k=4, dtype=torch.bfloat16).float()
    u = codebook.normalise(x).float().transpose(0, 1)
    assert out.dtype == torch.bfloat16
    assert (ids == (u @ F.normalize(wide.codes, dim=-1).mT).topk(4).indices.transpose(0, 1)).all()


# -- many codes, many tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("n", [600, 1000, 4099])
def test_two_stage_top_k_is_top_k(k, n):
    scores = draw(2, 30, n)
    values, ids = layer.top_k(scores, k)
    expected = scores.topk(k)
    assert (values == expected.values).all()
    assert (ids == expected.indices).all()


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
def test_parts_of_codes_and_tokens_change_nothing(similarity, monkeypatch):
    codebook = make(n_codes=97, k=3, groups=2, similarity=similarity)
    x = draw(40, 6)
    whole = codebook(x)[1]
    monkeypatch.setattr(layer, "CODES_AT_ONCE", 10)
    monkeypatch.setattr(layer, "SCORES_AT_ONCE", 100)
    assert (codebook(x)[1] == whole).all()


# -- gradients -----------------------------------------------------------------------------------------------


def gradients(loss, k=2, beta=0.25, groups=2):
    """Of u and codes, for a linear task loss, as the layer has them and by autograd of the formulas."""
    codebook = make(n_codes=12, k=k, groups=groups, loss=loss, beta=beta)
    u = codebook.normalise(draw(9, 6)).detach().requires_grad_()
    g = draw(9, groups, 6 // groups) + 0.5
    ids = codebook.choose(u)
    layer._Snap.apply(u, codebook.codes, ids, None, loss, beta).backward(g)
    ours = u.grad.clone(), codebook.codes.grad.clone()

    codes = codebook.codes.detach().requires_grad_()
    out = torch.stack([codes[i][ids[:, i]].mean(1) for i in range(groups)], 1)
    task = torch.autograd.grad((out * g).sum(), codes, retain_graph=True)[0]
    error = (out - u.detach()).square().sum(-1).mean(0).sum()
    auto = torch.autograd.grad(error, codes, retain_graph=True)[0]
    free = u.detach().requires_grad_()
    commitment = (out.detach() - free).square().sum(-1).mean(0).sum()
    commit = torch.autograd.grad(commitment, free)[0]
    return ours, g, task, auto, commit


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("loss", "of_task", "of_error", "committed"),
    [("base", 1, 0, 0), ("vqvae", 0, 1, 1), ("ae", 1, 1, 0), ("fullae", 1, 1, 1)],
)
def test_the_backward_pass_of_each_loss(loss, of_task, of_error, committed, k):
    (to_u, to_codes), g, task, auto, commit = gradients(loss, k, beta=0.4)
    torch.testing.assert_close(to_codes, of_task * task + of_error * auto, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(to_u, g + 0.4 * committed * commit, rtol=1e-12, atol=1e-12)


def test_the_input_learns_through_its_layer_norm():
    codebook = make(loss="ae")
    x = draw(5, 6).requires_grad_()
    g = draw(5, 6)
    codebook(x)[0].backward(g)
    other = x.detach().requires_grad_()
    F.layer_norm(other, (6,)).backward(g)
    torch.testing.assert_close(x.grad, other.grad)
    assert codebook.weight.grad.abs().sum() > 0


# -- dead codes ----------------------------------------------------------------------------------------------


def test_counts_add_up_to_all_choices():
    codebook = make(n_codes=20, k=3, groups=2).train()
    codebook(draw(4, 5, 6))
    codebook(draw(2, 5, 6))
    assert codebook.counts.sum(1).tolist() == [90, 90]
    codebook.eval()(draw(4, 5, 6))
    assert codebook.counts.sum() == 180


def test_revival_sets_dead_codes_to_activations_and_leaves_the_others():
    codebook = make(n_codes=30, groups=2).train()
    codebook.remember()
    x = draw(10, 6)
    codebook(x)
    before, dead, u = codebook.codes.detach().clone(), codebook.counts == 0, codebook.normalise(x)
    assert codebook.revive(0.0, torch.Generator().manual_seed(0)) == int(dead.sum()) > 0
    assert (codebook.codes[~dead] == before[~dead]).all()
    assert codebook.counts.sum() == 0
    for group in range(2):
        fresh = codebook.codes[group][dead[group]]
        assert torch.cdist(fresh, u[:, group]).min(1).values.max() < 1e-6


def test_revived_codes_are_noisy_copies():
    codebook = make(n_codes=200).train()
    codebook.remember()
    x = draw(3, 6)
    codebook(x)
    dead = codebook.counts[0] == 0
    codebook.revive(0.01, torch.Generator().manual_seed(0))
    distance = torch.cdist(codebook.codes[0][dead], codebook.normalise(x)[:, 0]).min(1).values
    assert distance.min() > 0
    assert 0.01 < distance.mean() < 0.12  # 0.01 |u| |noise|, with |u| and |noise| near the root of 6


def test_without_a_batch_to_take_codes_from_nothing_is_set():
    codebook = make()
    before = codebook.codes.detach().clone()
    codebook.revive(0.1, torch.Generator())
    assert (codebook.codes == before).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_codes": 3, "k": 4}, "k is 4 and n_codes 3"),
        ({"groups": 4}, "groups is 4 and dim 6"),
        ({"groups": 6}, "slices of at least two"),
        ({"k": 0}, "k is 0"),
        ({"similarity": "cosine"}, "inner, euclidean"),
        ({"loss": "mse"}, "base, vqvae, ae, fullae"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": float("nan")}, "beta is nan"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message):
        make(**arguments)


@pytest.mark.parametrize("x", [draw(4, 7), torch.ones(4, 6, dtype=torch.long)])
def test_activations_that_do_not_fit(x):
    with pytest.raises(DataError, match="width 6"):
        make()(x)


def test_a_code_that_another_process_uses_is_alive(monkeypatch):
    codebook = make(n_codes=30).train()
    codebook.remember()
    codebook(draw(5, 6))
    elsewhere = torch.zeros(1, 30, dtype=torch.long)
    elsewhere[0, 10:] = 1
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts: counts.add_(elsewhere))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda codes, source: sent.append(source))
    before = codebook.codes.detach().clone()
    alive = (codebook.counts + elsewhere)[0] > 0
    codebook.revive(0.1, torch.Generator().manual_seed(0))
    assert torch.equal(codebook.codes[0, alive], before[0, alive])
    assert not (codebook.codes[0, ~alive] == before[0, ~alive]).all(1).any()
    assert sent == [0]
