"""One seed, many independent streams of random numbers.

Every random draw of a training belongs to a named stream: the order of the rows, the masks of the loss, the
initial weights. A stream's seed is a hash of the user's seed and the stream's name, so that streams do not
overlap, a new stream leaves the others as they were, and a stream of a given epoch can be had without
replaying the epochs before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *stream: str | int) -> int:
    """The seed of a named stream, for generators of any library.

    Args:
        seed: the user's seed, any integer.
        *stream: the name of the stream, such as ``"order", epoch``. "1" and 1 are different names.

    Returns:
        An integer in 0 .. 2**32 - 1, the same on every machine.
    """
    name = json.dumps([seed, *stream], default=int).encode()  # NumPy's integers too
    return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")


def generator(seed: int, *stream: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A `torch.Generator` for a named stream of a seed.

    Args:
        seed: the user's seed.
        *stream: the name of the stream.
        device: where the numbers are drawn.

    Returns:
        The generator, at the beginning of its stream.
    """
    return torch.Generator(device).manual_seed(derive(seed, *stream))


@contextmanager
def seeded(seed: int, *stream: str | int) -> Iterator[None]:
    """Inside this context torch's global random numbers are those of a named stream; afterwards they are as
    before.

    It makes the initial weights of modules and dropout reproducible without touching the user's random state.

    Args:
        seed: the user's seed.
        *stream: the name of the stream.

    Yields:
        Nothing.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *stream))
        yield
