"""Search for codes, neurons beside them, and code cards, against counting by hand."""

from __future__ import annotations

import pytest
import torch

from paperback.errors import DataError
from paperback.explain.codebook_features import (
    add_codebooks,
    ban,
    best_neuron,
    code_card,
    count_codes,
    zero,
)


@pytest.fixture
def model(llama):
    return add_codebooks(llama, n_codes=12, k=2)


def test_search_agrees_with_counting_by_hand(model, ids):
    mask = ids % 3 == 0
    table = model.search(ids, mask, min_recall=0.0, batch_size=4)
    codes, seen = model.codes(ids), 0
    for site in model.names:
        for group in range(codes[site].shape[2]):
            for code in range(12):
                active = [[code in row for row in rows] for rows in codes[site][:, :, group].tolist()]
                active = torch.tensor(active)
                hits, total = int((active & mask).sum()), int(active.sum())
                found = table[(table["site"] == site) & (table["group"] == group) & (table["code"] == code)]
                assert len(found) == (hits > 0)
                if hits:
                    seen += 1
                    line = found.iloc[0]
                    assert (line["hits"], line["activations"]) == (hits, total)
                    assert line["precision"] == pytest.approx(hits / total)
                    assert line["recall"] == pytest.approx(hits / int(mask.sum()))
                    elsewhere = (total - hits) / int((~mask).sum())
                    ratio = line["recall"] / elsewhere if elsewhere else float("inf")
                    assert line["ratio"] == pytest.approx(ratio)
    assert seen == len(table) > 20
    assert table["precision"].is_monotonic_decreasing


def test_limits_of_a_search(model, ids):
    mask = ids == 4
    everything = model.search(ids, mask, min_recall=0.0)
    some = model.search(ids, mask, min_recall=0.2, min_precision=0.3, sites=[model.names[0]])
    wanted = everything[
        (everything["recall"] > 0.2)
        & (everything["precision"] >= 0.3)
        & (everything["site"] == model.names[0])
    ]
    assert some.to_dict("list") == wanted.to_dict("list")


def test_several_masks_are_looked_for_in_one_pass(model, ids):
    tables = model.search(ids, {"three": ids == 3, "four": ids == 4})
    for name, value in (("three", 3), ("four", 4)):
        assert tables[name].equals(model.search(ids, ids == value))


def test_dropped_codes_are_not_counted():
    codes = torch.tensor([[[0, -1]], [[1, 0]], [[-1, -1]]])
    active, hits = count_codes(codes, torch.tensor([True, False, True]), 3)
    assert active.tolist() == [[2, 1, 0]]
    assert hits.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(6, 9, dtype=torch.bool), "no token"),
        (torch.ones(6, 8, dtype=torch.bool), "one truth value per token"),
        (torch.ones(7, 9, dtype=torch.bool), "has 7 rows and the inputs 6"),
        (torch.ones(6, 9), "float32"),
    ],
)
def test_masks_that_do_not_fit(model, ids, mask, message):
    with pytest.raises(DataError, match=message):
        model.search(ids, mask)


# -- neurons -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.05, 0.3, 0.8, 1.0])
def test_the_best_neuron_is_the_best_of_all_thresholds(recall):
    draws = torch.Generator().manual_seed(0)
    activations = torch.randn(60, 5, generator=draws).round(decimals=1)  # with ties
    mask = torch.rand(60, generator=draws) < 0.4
    neuron = best_neuron(activations, mask, recall)
    best = 0.0
    for unit in range(5):
        for sign in (1, -1):
            for threshold in (sign * activations[:, unit]).unique():
                fires = sign * activations[:, unit] >= threshold
                if (fires & mask).sum() >= recall * mask.sum():
                    precision = float((fires & mask).sum() / fires.sum())
                    highest = not ((sign * activations[mask, unit] > threshold).sum() >= recall * mask.sum())
                    best = max(best, precision) if highest else best
    fires = neuron.active(activations)
    assert neuron.precision == pytest.approx(best) == pytest.approx(float((fires & mask).sum() / fires.sum()))
    assert neuron.recall == pytest.approx(float((fires & mask).sum() / mask.sum()))
    assert neuron.recall >= recall


def test_a_neuron_that_is_low_is_found():
    activations = torch.tensor([[0.0, 3.0], [0.1, -2.0], [0.3, -5.0], [0.2, 1.0]])
    neuron = best_neuron(activations, torch.tensor([False, True, True, False]), 1.0)
    assert (neuron.unit, neuron.sign, neuron.threshold, neuron.precision) == (1, -1, 2.0, 1.0)


def test_neurons_need_a_mask_and_a_recall():
    with pytest.raises(DataError, match="not be empty"):
        best_neuron(torch.ones(3, 2), torch.zeros(3, dtype=torch.bool), 0.5)
    with pytest.raises(DataError, match="recall is 0"):
        best_neuron(torch.ones(3, 2), torch.ones(3, dtype=torch.bool), 0)


# -- cards ---------------------------------------------------------------------------------------------------


def test_a_card_says_where_a_code_is_active_and_what_it_does(model, ids):
    site = "model.layers.1.mlp"
    codes = model.codes(ids)[site][:, :, 0]
    code = int(codes[0, 3, 0])
    active = (codes == code).any(-1)
    card = code_card(model, ids, site, code, spell="<{}>".format, batch_size=2)
    assert card.activations == (int(active.sum()), 54)
    token, precision, recall = card.tokens[0]
    number = int(token[1:-1])
    assert precision == pytest.approx(float((ids[active] == number).float().mean()))
    assert recall == pytest.approx(float(active[ids == number].float().mean()))
    with torch.no_grad():
        plain = model(ids).logits.log_softmax(-1)
        with model.intervene({site: zero(code)}):
            effect = (plain - model(ids).logits.log_softmax(-1))[active].mean(0)
    assert card.promotes[0] == (f"<{int(effect.argmax())}>", pytest.approx(float(effect.max()), rel=1e-4))
    assert card.suppresses[0][1] == pytest.approx(float(effect.min()), rel=1e-4)
    assert all("[<" in example for example in card.examples)
    assert f"code {code} of {site}" in str(card)


def test_cards_of_codes_that_are_not_there(model, ids):
    site = "model.layers.1.mlp"
    with pytest.raises(DataError, match="no code 12 in group 0"):
        code_card(model, ids, site, 12)
    with pytest.raises(DataError, match="active nowhere"), model.intervene({site: ban(5)}):
        code_card(model, ids, site, 5)
