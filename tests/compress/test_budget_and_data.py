"""Budgets, batches, losses and judging."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tests.compress.models import bert, cnn, llama, pictures, tokens
from torch import nn

from paperback.compress import Budget, Data, evaluate, text_rows
from paperback.compress.data import default_loss, evaluating, run
from paperback.errors import BudgetError, DataError


def test_a_budget_has_exactly_one_unit():
    assert Budget(density=0.5).unit == "density"
    assert Budget(nm=(2, 4)).value == (2, 4)
    for mistake in ({}, {"density": 0.5, "bytes": 10}):
        with pytest.raises(BudgetError, match="one unit"):
            Budget(**mistake)
    for mistake in ({"density": 1.5}, {"ratio": 0.0}, {"bytes": 0}, {"nm": (4, 4)}, {"bits": -1}):
        with pytest.raises(BudgetError):
            Budget(**mistake)


@pytest.mark.parametrize(
    "source",
    [
        tokens(),
        list(tokens().split(4)),
        lambda: iter(tokens().split(4)),
        torch.utils.data.DataLoader(tokens(), 4),
    ],
    ids=["tensor", "list", "function", "loader"],
)
def test_every_kind_of_part_is_passed_over_again_and_again(source):
    data = Data(source, batch_size=4)
    for _ in range(2):
        assert torch.equal(torch.cat(list(data.batches("train"))), tokens())


def test_parts_that_cannot_be_used_are_named():
    with pytest.raises(DataError, match="iterator"):
        Data(iter([tokens()]))
    with pytest.raises(DataError, match="no val part"):
        next(Data(tokens()).batches("val"))
    with pytest.raises(DataError, match="no batch"):
        next(Data([]).batches("train"))
    with pytest.raises(DataError, match="24 rows of inputs and 3 labels"):
        next(Data((pictures()[0], pictures()[1][:3])).batches("train"))


def test_the_language_loss_is_that_of_transformers():
    model, ids = llama(), tokens()
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(default_loss(model, ids), theirs)
        torch.testing.assert_close(default_loss(model, {"input_ids": ids}), theirs)
    assert evaluate(model, ids.split(4))["perplexity"] == pytest.approx(math.exp(float(theirs)), rel=1e-5)


def test_padding_does_not_count():
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    padded = default_loss(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded, default_loss(model, ids[:, :10]))


def test_labelled_batches_are_judged_by_accuracy():
    model, (x, y) = cnn(), pictures()
    with torch.no_grad():
        logits = model(x)
    judged = evaluate(model, Data((x, y), batch_size=5).batches("train"), original=model)
    assert judged["accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert judged["loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert judged["agreement"] == 1.0


def test_a_dict_with_class_labels_is_a_labelled_batch():
    labels = torch.zeros(8, dtype=torch.long)
    judged = evaluate(bert(), [{"input_ids": tokens(), "labels": labels}])
    assert set(judged) == {"accuracy", "loss"}


def test_a_metric_of_the_users_takes_the_place_of_ours():
    judged = evaluate(cnn(), [pictures()], metric=lambda model, batches: {"rows": len(batches[0][0])})
    assert judged == {"rows": 24.0}


def test_what_cannot_be_judged_says_so():
    with pytest.raises(DataError, match="metric="):
        evaluate(cnn(), [pictures()[0]])
    with pytest.raises(DataError, match="loss="):
        default_loss(cnn(), pictures()[0])
    with pytest.raises(DataError, match="tensor"):
        run(nn.Identity(), ["text"])


def test_modes_come_back_part_by_part():
    model = cnn().train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model[0].training
    assert not model[1].training


class Words:
    """A tokenizer that knows a token for each letter."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_text_becomes_rows_in_order():
    rows = text_rows(Words(), "abcdefgh", 3)
    assert rows.tolist() == [[97, 98, 99], [100, 101, 102]]
    drawn = text_rows(Words(), "abcdefgh" * 20, 4, rows=5, seed=3)
    assert drawn.shape == (5, 4)
    assert torch.equal(drawn, text_rows(Words(), "abcdefgh" * 20, 4, rows=5, seed=3))
    with pytest.raises(DataError, match="need more"):
        text_rows(Words(), "abc", 4)
