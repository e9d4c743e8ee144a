"""The finite-state machine: its strings can be read back, and follow its transitions."""

from __future__ import annotations

import pytest
import torch

from paperback.data.simulate.tokfsm import tokfsm
from paperback.errors import DataError


def walk(fsm, n=500, length=7, seed=0):
    return fsm.walk(n, length, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("base", "edges", "digits"), [(6, 4, 2), (10, 10, 2), (3, 2, 4)])
def test_every_state_has_its_successors_and_walks_take_them(base, edges, digits):
    fsm = tokfsm(base, edges, digits, seed=3)
    assert fsm.n_states == base**digits
    assert (fsm.transitions.sum(1) == edges).all()
    states = walk(fsm)
    assert fsm.transitions[states[:, :-1], states[:, 1:]].all()
    tokens = fsm.write(states)
    assert tokens.shape == (500, 1 + 7 * digits)
    assert (tokens[:, 0] == fsm.bos).all()
    assert tokens[:, 1:].max() < base
    assert torch.equal(fsm.read(tokens), states)
    assert torch.equal(fsm.read(tokens[:, :-1]), states[:, :-1])


def test_numbers_are_written_with_the_highest_digit_first():
    assert tokfsm(10, 1).write(torch.tensor([[40, 7]])).tolist() == [[10, 4, 0, 0, 7]]


def test_successors_are_equally_likely():
    fsm = tokfsm(4, 3)
    states = walk(fsm, 30_000, 2)
    counts = torch.zeros(16, 16).index_put_((states[:, 0], states[:, 1]), torch.ones(30_000), accumulate=True)
    share = counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(share, fsm.transitions / 3, atol=0.05, rtol=0)


def test_the_next_digit_sums_over_successors():
    fsm = tokfsm(5, 6, seed=1)
    expected = torch.zeros(25, 5, dtype=torch.float64)
    for state, successor in fsm.transitions.nonzero().tolist():
        expected[state, successor // 5] += 1 / 6
    torch.testing.assert_close(fsm.next_digit(), expected)
    torch.testing.assert_close(fsm.next_digit().sum(1), torch.ones(25, dtype=torch.float64))


@pytest.mark.parametrize("digits", [2, 3])
def test_contexts_are_the_last_state_and_the_digits_since(digits):
    fsm = tokfsm(3, 3, digits)
    tokens = fsm.write(walk(fsm, 40, 4))
    contexts = fsm.contexts(tokens)
    assert (contexts[:, :digits] == -1).all()
    meaning = {}
    for row, numbers in zip(tokens.tolist(), contexts.tolist(), strict=True):
        for position in range(digits, len(row)):
            since = position % digits
            known = tuple(row[position - since - digits + 1 : position + 1])
            assert meaning.setdefault(numbers[position], known) == known
    assert len(set(meaning.values())) == len(meaning)


def test_the_same_seed_gives_the_same_machine():
    assert torch.equal(tokfsm(6, 4, seed=5).transitions, tokfsm(6, 4, seed=5).transitions)
    assert not torch.equal(tokfsm(6, 4, seed=5).transitions, tokfsm(6, 4, seed=6).transitions)


@pytest.mark.parametrize("arguments", [(1, 1), (4, 0), (4, 17), (4, 2, 1)])
def test_machines_that_cannot_be(arguments):
    with pytest.raises(DataError):
        tokfsm(*arguments)
