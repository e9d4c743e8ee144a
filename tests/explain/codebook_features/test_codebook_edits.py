"""Interventions: forced, banned, dropped and passed over; at positions, in groups, in generation."""

from __future__ import annotations

import pytest
import torch

from paperback.errors import DataError
from paperback.explain.codebook_features import add_codebooks, ban, force, pass_over, zero

MLP, HEADS = "model.layers.0.mlp", "model.layers.0.self_attn.o_proj"


@pytest.fixture
def model(llama):
    return add_codebooks(llama, n_codes=20, k=3)


def test_forcing_the_codes_that_were_chosen_changes_nothing(model, ids):
    plain, codes = model(ids).logits, model.codes(ids)
    with model.intervene({site: force(codes[site]) for site in model.names}):
        assert torch.equal(model(ids).logits, plain)
    first = {site: force(codes[site][:, [2, 5], :, :1], positions=[2, 5]) for site in model.names}
    with model.intervene(first):
        assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(ids).logits, plain)


def test_forced_codes_take_the_places_of_the_least_similar(model, ids):
    before = model.codes(ids)[MLP]
    absent = next(c for c in range(20) if not (before == c).any(-1).all())
    with model.intervene({MLP: force(absent)}):
        after = model.codes(ids)[MLP]
    had = (before == absent).any(-1, keepdim=True)
    expected = torch.where(
        had, before, torch.cat((before[..., :2], torch.full_like(before[..., :1], absent)), -1)
    )
    assert torch.equal(after, expected)


def test_as_many_codes_as_there_are_places_can_be_forced(model, ids):
    with model.intervene({MLP: force([4, 11, 7])}):
        assert (model.codes(ids)[MLP].sort(-1).values == torch.tensor([4, 7, 11])).all()


def test_banning_the_best_code_brings_up_the_next(model, ids):
    before = model.codes(ids[:1, :1])[MLP].flatten()
    with model.intervene({MLP: ban(int(before[0]))}):
        after = model.codes(ids[:1, :1])[MLP].flatten()
    assert after[:2].tolist() == before[1:].tolist()
    assert int(before[0]) not in after.tolist()


def test_passing_over_is_banning_whatever_is_best(model, ids):
    before = model.codes(ids)[MLP]
    with model.intervene({MLP: pass_over(2, positions=[3])}):
        after = model.codes(ids)[MLP]
    assert torch.equal(after[:, 3, :, 0], before[:, 3, :, 2])
    assert torch.equal(after[:, :3], before[:, :3])


def test_a_dropped_code_is_taken_out_without_replacement(model, ids):
    codebook, before = model.codebook(MLP), model.codes(ids)[MLP]
    dropped = int(before[0, 4, 0, 1])
    seen = []
    with model.intervene({MLP: zero(dropped)}), model.watched(lambda *call: seen.append(call)):
        model.run(ids)
    _, _, out, after = next(call for call in seen if call[0] == MLP)
    assert torch.equal(after, before.masked_fill(before == dropped, -1))
    kept = (before != dropped)[..., None]
    expected = (codebook.codes[0][before[..., 0, :]] * kept[..., 0, :, :]).sum(-2) / 3
    torch.testing.assert_close(out, expected)


def test_only_later_positions_change(model, ids):
    plain, before = model(ids).logits, model.codes(ids)
    with model.intervene({MLP: force([1, 2, 3], positions=[5])}):
        changed, after = model(ids).logits, model.codes(ids)
    assert torch.equal(changed[:, :5], plain[:, :5])
    assert not torch.equal(changed[:, 5:], plain[:, 5:])
    for site in model.names:
        assert torch.equal(after[site][:, :5], before[site][:, :5])


def test_an_edit_of_one_head_leaves_the_others(model, ids):
    before = model.codes(ids)[HEADS]
    with model.intervene({HEADS: [force([0, 1, 2], group=1), ban(int(before[0, 0, 3, 0]), group=3)]}):
        after = model.codes(ids)[HEADS]
    assert (after[..., 1, :].sort(-1).values == torch.arange(3)).all()
    assert torch.equal(after[..., [0, 2], :], before[..., [0, 2], :])
    assert int(before[0, 0, 3, 0]) not in after[..., 3, :]


def test_positions_may_come_in_any_order(model, ids):
    codes = model.codes(ids)[MLP].flip(0)  # each row gets the codes of another
    with model.intervene({MLP: force(codes[:, [6, 2]], positions=[6, 2])}):
        after = model.codes(ids)[MLP]
    for position in (2, 6):
        assert torch.equal(after[:, position].sort(-1).values, codes[:, position].sort(-1).values)


def test_nested_contexts_both_hold_and_end(model, ids):
    plain = model.codes(ids)[MLP]
    with model.intervene({MLP: ban(3)}):
        with model.intervene({MLP: force(5)}):
            both = model.codes(ids)[MLP]
        only_ban = model.codes(ids)[MLP]
    assert (both == 5).any(-1).all()
    assert not (both == 3).any()
    assert not (only_ban == 3).any()
    assert torch.equal(model.codes(ids)[MLP], plain)


@pytest.mark.parametrize("positions", [None, [1, 4, 7], [10]])
def test_generation_with_a_cache_is_that_without(model, ids, positions):
    edits = {MLP: force([2, 9], positions), HEADS: [ban(4, positions), pass_over(1, positions, group=2)]}
    with model.intervene(edits):
        arguments = {"max_new_tokens": 8, "do_sample": False}
        cached = model.generate(ids[:, :3], **arguments)
        whole = model.generate(ids[:, :3], use_cache=False, **arguments)
        assert torch.equal(cached, whole)
        if positions != [10]:  # the last token that is made, so never one that is read
            assert torch.equal(model(whole).logits[:, 2:-1].argmax(-1), whole[:, 3:])


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"model.layers.7.mlp": ban(0)}, "no codebook at 'model.layers.7.mlp'"),
        ({MLP: force(20)}, "no code 20; its ids are 0 to 19"),
        ({MLP: ban(-1)}, "no code -1"),
        ({MLP: force([1, 2, 3, 4])}, "3 codes per token and 4 are forced"),
        ({MLP: ban(0, group=1)}, "no group 1"),
        ({MLP: ban(range(18))}, "2 codes left, and needs 3"),
        ({MLP: pass_over(18)}, "2 codes left"),
        ({HEADS: force(torch.zeros(1, 1, 1, 1))}, "of 1 groups; it has 4"),
    ],
)
def test_edits_that_cannot_be_followed(model, edits, message):
    with pytest.raises(DataError, match=message), model.intervene(edits):
        pass


def test_a_position_beyond_the_end_is_refused(model, ids):
    with model.intervene({MLP: ban(0, positions=[9])}), pytest.raises(DataError, match="names position 9"):
        model(ids)


def test_codes_of_another_batch_are_refused(model, ids):
    edit = force(torch.zeros(2, 1, 1, 1), positions=0)
    with model.intervene({MLP: edit}), pytest.raises(DataError, match="for a batch of 6"):
        model(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: force(torch.zeros(2, 2)), "shape"),
        (lambda: ban(torch.zeros(1, 1, 1, 1)), "give ids"),
        (lambda: force(1, positions=[-1]), "counted from 0"),
        (lambda: force(1, positions=[]), "positions"),
        (lambda: pass_over(0), "count is 0"),
    ],
)
def test_edits_that_cannot_be(make, message):
    with pytest.raises(DataError, match=message):
        make()
