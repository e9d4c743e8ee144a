"""Streams of random numbers: repeatable, independent, and without a trace."""

import numpy as np
import pytest
import torch
from torch import nn

from paperback.training import derive, generator, seeded


def test_a_stream_is_the_same_everywhere_and_always() -> None:
    assert derive(0, "order", 3) == 1009649997
    assert derive(np.int64(0), "order", np.int32(3)) == 1009649997  # type: ignore[arg-type]
    assert torch.equal(torch.rand(4, generator=generator(5, "a")), torch.rand(4, generator=generator(5, "a")))


def test_seeds_and_names_make_different_streams() -> None:
    names = [
        (seed, *stream)
        for seed in range(20)
        for stream in (("a",), ("b",), ("a", 1), ("a", "1"), ("a1",), ())
    ]
    seeds = {derive(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_neighbouring_streams_are_not_correlated() -> None:
    draws = torch.stack([torch.randn(2000, generator=generator(0, "mask", i)) for i in range(8)]).numpy()
    correlations = np.corrcoef(draws)[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 0.1


def test_seeded_makes_modules_reproducible_and_leaves_the_global_state() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    with seeded(4, "weights"):
        first = nn.Linear(3, 3)
    with seeded(4, "weights"):
        second = nn.Linear(3, 3)
    with seeded(5, "weights"):
        third = nn.Linear(3, 3)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, third.weight)
    assert torch.equal(torch.rand(3), expected)


def test_seeded_restores_the_state_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(IndexError), seeded(0):
        torch.rand(2)[2]
    assert torch.equal(torch.get_rng_state(), state)
