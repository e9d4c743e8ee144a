"""The sequence tasks: every answer can be read off the sequence, and nothing else gives it away."""

from __future__ import annotations

import pytest
import torch

from paperback.errors import DataError
from paperback.layers.sequence_tasks import NO_TARGET, copying, induction, selective_copying


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_induction_asks_for_what_followed_the_trigger():
    task = induction(500, 12, source(), shortest=4, symbols=5)
    trigger, padding = 5, 6
    lengths = task.mask.sum(1)
    assert set(lengths.tolist()) == set(range(4, 13))
    places = set()
    for tokens, targets, mask in zip(task.tokens, task.targets, task.mask, strict=True):
        assert (tokens[~mask] == padding).all()
        assert (tokens[mask] != padding).all()
        first, last = (tokens == trigger).nonzero().flatten().tolist()
        assert last == 11
        assert targets[last] == tokens[first + 1]
        assert (targets[:last] == NO_TARGET).all()
        places.add(first)
    assert places == set(range(10))


def test_selective_copying_asks_for_the_symbols_in_order():
    task = selective_copying(300, 10, source(), items=3, symbols=4)
    for tokens, targets in zip(task.tokens, task.targets, strict=True):
        body = tokens[:10]
        assert torch.equal(targets[10:], body[body < 4])
        assert (tokens[10:] == 5).all()
        assert (targets[:10] == NO_TARGET).all()
    assert (task.tokens[:, :10] < 4).float().mean(0).min() > 0.1  # every place is used


def test_copying_has_its_symbols_first():
    task = copying(50, 10, source(), items=3, symbols=4)
    assert torch.equal(task.tokens[:, :3], task.targets[:, 10:])
    assert (task.tokens[:, 3:10] == 4).all()


def test_accuracy_counts_what_is_asked():
    task = selective_copying(200, 10, source(), items=4, symbols=8)
    assert task.accuracy(task.targets) == 1.0
    guess = torch.zeros_like(task.targets)
    assert abs(task.accuracy(guess) - 1 / task.answers) < 0.05
    wrong_elsewhere = task.targets.clone()
    wrong_elsewhere[:, 0] = 3
    assert task.accuracy(wrong_elsewhere) == 1.0


def test_the_same_generator_gives_the_same_sequences():
    for task in (induction, selective_copying, copying):
        assert torch.equal(task(5, 9, source(1)).tokens, task(5, 9, source(1)).tokens)
        assert not torch.equal(task(5, 9, source(1)).tokens, task(5, 9, source(2)).tokens)


def test_bad_sizes():
    with pytest.raises(DataError, match="induction"):
        induction(5, 2, source())
    with pytest.raises(DataError, match="shortest"):
        induction(5, 8, source(), shortest=9)
    with pytest.raises(DataError, match="items"):
        selective_copying(5, 3, source(), items=4)
    with pytest.raises(DataError, match="copying"):
        copying(0, 8, source())
