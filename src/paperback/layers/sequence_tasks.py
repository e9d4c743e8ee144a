"""Sequence tasks whose answers are known: copying, selective copying, induction.

Each is drawn without end from a generator, at any length, so that a layer can be trained on short sequences
and tested on long ones. What they ask of a layer: copying, to remember in order; selective copying, to
remember some inputs and forget others, which nothing linear and time-invariant does; induction, to look up
what followed a token before.

Source: Gu and Dao, Mamba (2023), section 4.1 (selective copying, induction heads); Arjovsky, Shah and Bengio
(2016) for copying.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperback.errors import DataError

NO_TARGET = -100  # positions that nothing is asked at: what `torch.nn.functional.cross_entropy` ignores


@dataclass(frozen=True)
class SequenceTask:
    """Sequences and what should come out.

    Attributes:
        tokens: ``(n, length)`` int64, 0 .. vocab - 1.
        targets: ``(n, length)`` int64, the right answer at each position, `NO_TARGET` where none is asked.
        mask: ``(n, length)``, True at real positions; sequences are padded on the left.
        vocab: number of tokens, markers and padding included.
        answers: number of tokens that can be an answer; guessing is right once in so many.
    """

    tokens: Int[Tensor, "n length"]
    targets: Int[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]
    vocab: int
    answers: int

    def accuracy(self, predicted: Int[Tensor, "n length"]) -> float:
        """Share of right answers among all that are asked."""
        asked = self.targets != NO_TARGET
        return float((predicted == self.targets)[asked].float().mean())


def induction(
    n: int, length: int, generator: torch.Generator, *, shortest: int | None = None, symbols: int = 8
) -> SequenceTask:
    """Induction heads: a trigger, the answer behind it, much else, the trigger again: what followed it?

    Tokens 0 .. symbols - 1 are drawn evenly, `symbols` is the trigger, ``symbols + 1`` padding. The trigger
    stands at a random place and at the end; the answer is asked at the end.

    Args:
        n: number of sequences.
        length: of the longest, >= 3.
        generator: of the draws.
        shortest: lengths are drawn evenly from here to `length`; all are `length` if not given.
        symbols: number of possible answers.

    Raises:
        DataError: if a size is too small.
    """
    shortest = length if shortest is None else shortest
    if min(n, symbols) < 1 or not 3 <= shortest <= length:
        raise DataError(
            f"induction with n={n}, symbols={symbols}, lengths {shortest} to {length}: n and symbols must "
            "be at least 1, lengths at least 3, the shortest first."
        )
    tokens = torch.randint(symbols, (n, length), generator=generator)
    lengths = torch.randint(shortest, length + 1, (n,), generator=generator)
    first = length - lengths
    # The trigger has room for its answer before the last position.
    place = first + (torch.rand(n, generator=generator) * (lengths - 2)).long()
    rows = torch.arange(n)
    answer = tokens[rows, place + 1]
    tokens[rows, place] = symbols
    tokens[:, -1] = symbols
    mask = torch.arange(length) >= first[:, None]
    tokens = tokens.masked_fill(~mask, symbols + 1)
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, -1] = answer
    return SequenceTask(tokens, targets, mask, symbols + 2, symbols)


def selective_copying(
    n: int, length: int, generator: torch.Generator, *, items: int = 4, symbols: int = 8
) -> SequenceTask:
    """Selective copying: some symbols at random places among blanks, then as many questions: which, in order?

    Tokens 0 .. symbols - 1 are the symbols, `symbols` the blank, ``symbols + 1`` the question.

    Args:
        n: number of sequences.
        length: of the part with symbols and blanks, >= items; `items` questions follow it.
        generator: of the draws.
        items: number of symbols to copy.
        symbols: number of different ones.

    Raises:
        DataError: if a size is too small.
    """
    if min(n, symbols, items) < 1 or length < items:
        raise DataError(
            f"selective copying with n={n}, symbols={symbols}, items={items}, length={length}: all must be "
            "at least 1, the length at least as large as items."
        )
    places = torch.rand(n, length, generator=generator).argsort(1)[:, :items].sort(1).values
    return _copy_from(places, length, symbols, generator)


def copying(
    n: int, length: int, generator: torch.Generator, *, items: int = 4, symbols: int = 8
) -> SequenceTask:
    """Copying: symbols at the beginning, blanks, then as many questions: which, in order?

    Tokens and arguments as in `selective_copying`; that the places are known is all the difference.
    """
    if min(n, symbols, items) < 1 or length < items:
        raise DataError(
            f"copying with n={n}, symbols={symbols}, items={items}, length={length}: all must be at least 1, "
            "the length at least as large as items."
        )
    return _copy_from(torch.arange(items).expand(n, items), length, symbols, generator)


def _copy_from(places: Tensor, length: int, symbols: int, generator: torch.Generator) -> SequenceTask:
    n, items = places.shape
    content = torch.randint(symbols, (n, items), generator=generator)
    tokens = torch.full((n, length + items), symbols)
    tokens.scatter_(1, places, content)
    tokens[:, length:] = symbols + 1
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, length:] = content
    return SequenceTask(tokens, targets, torch.ones_like(tokens, dtype=torch.bool), symbols + 2, symbols)
