"""Wrapping models: where codebooks go, that they come off again, k-means, training, reports."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from paperback.errors import DataError
from paperback.explain.codebook_features import CodebookModel, Site, add_codebooks, ban, next_token_loss


def test_placements_of_known_transformers(transformer, ids):
    model = add_codebooks(transformer, n_codes=12, k=2)
    assert len(model.names) == 4
    shapes = {tuple(codes.shape) for codes in model.codes(ids).values()}
    assert shapes == {(6, 9, 4, 2), (6, 9, 1, 2)}
    for site in model.names:
        width = model.codebook(site).dim
        assert width == (24 if site.endswith("o_proj") else 16)  # Llama's heads are 6 wide here


@pytest.mark.parametrize("placement", ["auto", "attn_preproj", "mlp", "transformer_block", "preresidual"])
def test_removing_or_disabling_restores_the_model_exactly(transformer, ids, placement):
    plain = transformer(ids).logits
    model = add_codebooks(transformer, placement, n_codes=12)
    assert not torch.equal(model(ids).logits, plain)
    with model.disabled():
        assert torch.equal(model(ids).logits, plain)
    assert model.remove() is transformer
    assert torch.equal(transformer(ids).logits, plain)


def test_what_takes_an_activations_place(llama, ids):
    """The output of a block is its codes; with "preresidual" its input is still added."""
    model = add_codebooks(llama, "transformer_block", n_codes=12, layers=[1])
    out = []
    llama.model.norm.register_forward_pre_hook(lambda _, args: out.append(args[0]))
    model(ids)
    codes = model.codebook("model.layers.1").codes[0]
    assert distance(out[0], codes) < 1e-5
    model.remove()
    model = add_codebooks(llama, "preresidual", n_codes=12, layers=[1])
    taken = []
    llama.model.layers[1].register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    model(ids)
    assert distance(out[-1] - taken[0], model.codebook("model.layers.1").codes[0]) < 1e-5


def distance(x, codes):
    """The greatest distance of an activation from its nearest code."""
    return (x.flatten(0, 1)[:, None] - codes).norm(dim=-1).min(1).values.max()


def test_any_module_by_the_names_of_its_parts():
    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, "kept"

    body = nn.Sequential(OrderedDict(first=nn.Linear(5, 8), second=Pair()))
    x = torch.randn(7, 5)
    model = add_codebooks(body, ["first", Site("second", groups=2, n_codes=9, k=3)], n_codes=6, example=x)
    snapped, other = model(x)
    assert other == "kept"
    assert snapped.shape == (7, 8)
    codes = model.codes(x, batch_size=2)
    assert (codes["first"].shape, codes["second"].shape) == ((7, 1, 1), (7, 2, 3))


def test_rows_by_keyword_are_the_same_in_any_batches(llama, ids):
    model = add_codebooks(llama, n_codes=12)
    one = model.codes({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, batch_size=1)
    whole = model.codes(ids)
    assert all(torch.equal(one[site], whole[site]) for site in model.names)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("model.layers.0.mpl", "near to it are .*'model.layers.0.mlp'"),
        (["mlp", "model.layers.0.mlp"], "'model.layers.0.mlp' twice"),
        ([], "sites is empty"),
        ([Site("lm_head", "inside")], "output, input, update"),
    ],
)
def test_sites_that_cannot_be(llama, sites, message):
    with pytest.raises(DataError, match=message):
        add_codebooks(llama, sites)


def test_other_things_that_cannot_be(llama, ids):
    with pytest.raises(DataError, match="2 blocks"):
        add_codebooks(llama, "mlp", layers=[2])
    with pytest.raises(DataError, match="Sequential has no blocks"):
        add_codebooks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(DataError, match="give an example"):
        add_codebooks(nn.Sequential(nn.ReLU()), "0")
    model = add_codebooks(nn.Sequential(nn.Embedding(11, 4), nn.Flatten()), [Site("0", "input", dim=4)])
    with pytest.raises(DataError, match=r"input of site '0' is a tensor \(6, 9\)"):
        model(ids)
    model = add_codebooks(llama, n_codes=12)
    with pytest.raises(DataError, match="codebooks already"):
        add_codebooks(model)
    with pytest.raises(DataError, match=r"\[0\] rows"):
        model.codes(ids[:0])
    with pytest.raises(DataError, match="no codebook at 'lm_head'"):
        model.codebook("lm_head")


# -- learning ------------------------------------------------------------------------------------------------


def test_kmeans_lowers_the_error_of_reconstruction(llama, ids):
    model = add_codebooks(llama, "attn_preproj", n_codes=30, layers=[0])
    random = model.report(ids)
    model.init_kmeans(ids, progress=False)
    report = model.report(ids)
    assert len(report) == 4
    assert (report["mse"] < 0.2 * random["mse"]).all()
    assert (report["tokens"] == 54).all()
    assert (report["used"] + report["dead"] == 30).all()


def test_the_first_codes_have_the_scale_of_the_activations():
    """Where LayerNorm and a line can give the activations back, the first codes do."""
    z = nn.functional.layer_norm(torch.randn(40, 8, dtype=torch.float64), (8,))
    model = add_codebooks(nn.Sequential(nn.Identity()), [Site("0", dim=8)], n_codes=40).double()
    x = 7 * z  # LayerNorm gives z, and the line 7 z
    model.init_kmeans(x, tokens=40, progress=False)
    layer = model.codebook("0")
    torch.testing.assert_close(layer.weight[0], torch.full((8,), 7.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert layer.bias.abs().max() < 1e-4
    torch.testing.assert_close(layer.normalise(x)[:, 0], x, rtol=1e-3, atol=1e-3)


def test_kmeans_needs_as_many_activations_as_codes(llama, ids):
    with pytest.raises(DataError, match="54 activations for 60 codes"):
        add_codebooks(llama, n_codes=60).init_kmeans(ids, progress=False)


def test_training_lowers_the_loss_and_is_repeatable(llama, ids):
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    final = []
    for _ in range(2):
        llama.load_state_dict(weights)
        model = add_codebooks(llama, n_codes=20)
        model.init_kmeans(ids, progress=False)
        before = next_token_loss(model, (ids,), torch.Generator()).item()
        history = model.fit(ids, steps=40, batch_size=6, lr=1e-2, revive_every=10, seed=3, progress=False)
        after = next_token_loss(model, (ids,), torch.Generator()).item()
        assert after < before - 0.5
        final.append(history.train_loss)
        model.remove()
    assert final[0] == final[1]


def test_steps_are_rounded_up_to_whole_passes_and_many_rows_are_thinned(llama, ids):
    model = add_codebooks(llama, "mlp", n_codes=12)
    assert len(model.fit(ids, steps=4, batch_size=2, progress=False)) == 2  # three steps a pass
    counts = model.codebook(model.names[0]).counts
    model.fit(ids, steps=2, batch_size=1, progress=False)
    assert counts.sum() == 2 * 9


def test_the_model_can_stay_as_it_is(llama, ids):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    model = add_codebooks(llama, "mlp", n_codes=12)
    model.fit(ids, steps=3, train_model=False, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())
    assert all(p.requires_grad for p in llama.parameters())


def test_k_falls_to_its_number(llama, ids):
    model = add_codebooks(llama, "mlp", n_codes=12, k=2)
    seen = []

    def loss(m, batch, generator):
        seen.append(m.codebook(m.names[0]).k)
        return next_token_loss(m, batch, generator)

    model.fit(ids, loss, steps=10, batch_size=6, anneal_k_from=8, progress=False)
    assert seen == [8, 7, 6, 5, 4, 2, 2, 2, 2, 2]
    assert model.codebook(model.names[0]).k == 2


def test_a_penalty_draws_codes_to_zero_and_weight_decay_does_not(llama, ids):
    lengths = {}
    for penalty in (None, 2.0):
        model = add_codebooks(llama, "mlp", n_codes=50)
        model.fit(
            ids, steps=20, train_model=False, weight_decay=0.5, code_penalty=penalty, code_penalty_weight=1.0,
            lr=1e-2, progress=False,
        )  # fmt: skip
        codebook = model.codebook(model.names[0])
        never = codebook.counts[0] == 0  # moved by nothing else
        lengths[penalty] = codebook.codes[0][never].norm(dim=1).mean()
        model.remove()
    fresh = add_codebooks(llama, "mlp", n_codes=50).codebook("model.layers.0.mlp").codes[0]
    torch.testing.assert_close(lengths[None], fresh[never].norm(dim=1).mean(), rtol=0.02, atol=0)
    assert lengths[2.0] < lengths[None] - 0.1


def test_every_code_lives_when_dead_ones_are_revived(llama, ids):
    used = {}
    for every in (0, 5):
        model = add_codebooks(llama, "mlp", n_codes=40, layers=[0])
        model.fit(ids, steps=60, lr=1e-3, revive_every=every, progress=False)
        used[every] = int(model.report(ids)["used"].iloc[0])
        model.remove()
    assert used[5] > used[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "anneal_k_from": 13}, "anneal_k_from is 13"),
        ({"steps": 1, "code_lr_factor": -1.0}, "code_lr_factor is -1.0"),
        ({"steps": 1, "code_penalty": 0.0}, "code_penalty is 0.0"),
        ({"steps": 1, "lr": 0.0}, "lr is 0.0"),
    ],
)
def test_trainings_that_cannot_be(llama, ids, arguments, message):
    with pytest.raises(DataError, match=message):
        add_codebooks(llama, n_codes=12).fit(ids, progress=False, **arguments)


def test_nothing_to_fit(llama, ids):
    model = add_codebooks(llama, n_codes=12)
    with model.disabled(), pytest.raises(DataError, match="disabled"):
        model.fit(ids, steps=1, progress=False)
    for codebook in model.codebooks.values():
        codebook.codes.requires_grad_(False)
    with pytest.raises(DataError, match="nothing to fit"):
        model.fit(ids, steps=1, progress=False)


def test_a_copy_has_its_own_codebooks(llama, ids):
    model = add_codebooks(llama, n_codes=12)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    before = model(ids).logits
    with torch.no_grad():
        for codebook in twin.codebooks.values():
            codebook.codes.neg_()
    with twin.intervene({site: ban(0) for site in twin.names}):
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(twin(ids).logits, before)
    twin.remove()
    assert torch.equal(model(ids).logits, before)


def test_codes_are_read_without_gradients_and_leave_the_mode(llama, ids):
    model = add_codebooks(llama, n_codes=12).train()
    model.codes(ids)
    assert all(module.training for module in model.modules())
    assert isinstance(model, CodebookModel)
    assert all(codebook.counts.sum() == 0 for codebook in model.codebooks.values())
