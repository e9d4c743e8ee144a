"""Searching for the most probable output, and drawing outputs, under constraints.

A constraint is asked before every step which indices may come next. Greedy search is beam search with one
beam. All beams of all inputs advance together: one step of the decoder on ``batch * beam`` rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.errors import DataError
from paperback.layers.pointer_network.checks import PAD, STOP

if TYPE_CHECKING:
    from paperback.layers.pointer_network.model import Memory, PointerNetwork

# (prefix (rows, i), lengths (rows,), n) -> allowed (rows, n+1), boolean. The prefix holds what was chosen:
# indices 1 .. n, then 0 for "stop", then -1; rows that have ended are not looked at.
Constraint = Callable[[Tensor, Tensor, int], Tensor]


class Decoded(NamedTuple):
    """Outputs that were decoded.

    Attributes:
        indices: elements from 1, then 0 for "stop", then -1; an output that was cut has no "stop".
        log_prob: of each output under the model, its constraint included (the allowed indices share all
            probability).
        finished: False where an output was cut at its greatest length.
    """

    indices: Int[Tensor, "batch m"]
    log_prob: Float[Tensor, " batch"]
    finished: Bool[Tensor, " batch"]


def permutation(prefix: Tensor, lengths: Tensor, n: int) -> Tensor:
    """Each element once, then stop."""
    left = _real(lengths, n) & ~_chosen(prefix, n)
    return torch.cat([~left.any(1, keepdim=True), left], 1)


def triangles(prefix: Tensor, lengths: Tensor, n: int) -> Tensor:
    """Triples of different elements; stop only between two triples."""
    begun = prefix.shape[1] % 3
    current = prefix[:, prefix.shape[1] - begun :]
    stop = torch.full((len(prefix), 1), begun == 0, device=prefix.device)
    return torch.cat([stop, _real(lengths, n) & ~_chosen(current, n)], 1)


CONSTRAINTS: dict[str, Constraint] = {"permutation": permutation, "triangles": triangles}


def _real(lengths: Tensor, n: int) -> Tensor:
    return torch.arange(n, device=lengths.device) < lengths[:, None]


def _chosen(prefix: Tensor, n: int) -> Tensor:
    """Which elements stand in the prefix, ``(rows, n)``."""
    found = torch.zeros(len(prefix), n + 1, dtype=torch.bool, device=prefix.device)
    return found.scatter(1, prefix.clamp_min(STOP), True)[:, 1:]


# -- search --------------------------------------------------------------------------------------------------


def beam_search(
    model: PointerNetwork,
    points: Tensor,
    lengths: Tensor,
    beam: int,
    constraint: Constraint | Literal["permutation", "triangles"] | None,
    max_len: int | None,
    length_normalised: bool,
) -> Decoded:
    """See `PointerNetwork.decode`."""
    if beam < 1:
        raise DataError(f"beam is {beam}; it must be at least 1.")
    limits = _limits(model, lengths, points.shape[1], max_len)
    allowed, memory = resolve(constraint), model.encode(points, lengths)
    best = _search(model, memory, lengths, limits, 1, allowed, length_normalised)
    if beam == 1:
        return best
    wide = _search(model, memory, lengths, limits, beam, allowed, length_normalised)
    better = _value(wide.log_prob, wide.indices, length_normalised) > _value(
        best.log_prob, best.indices, length_normalised
    )
    width = max(best.indices.shape[1], wide.indices.shape[1])
    one, other = (F.pad(d.indices, (0, width - d.indices.shape[1]), value=PAD) for d in (wide, best))
    return Decoded(
        torch.where(better[:, None], one, other),
        torch.where(better, wide.log_prob, best.log_prob),
        torch.where(better, wide.finished, best.finished),
    )


def _search(
    model: PointerNetwork, memory: Memory, lengths: Tensor, limits: Tensor, beam: int,
    constraint: Constraint | None, length_normalised: bool,
) -> Decoded:  # fmt: skip
    batch, size, device = len(lengths), memory.allowed.shape[1], lengths.device
    memory = memory.rows(torch.arange(batch, device=device).repeat_interleave(beam))
    lengths, limits = lengths.repeat_interleave(beam), limits.repeat_interleave(beam)
    first = torch.arange(batch, device=device)[:, None] * beam  # row of each input's first beam
    total = torch.full((batch, beam), -torch.inf, device=device)
    total[:, 0] = 0.0  # all beams begin equal: only one of them may go on
    prefix = torch.empty(batch * beam, 0, dtype=torch.int64, device=device)
    choice, state = prefix.new_full((batch * beam,), STOP), memory.start
    ended = torch.zeros(batch * beam, dtype=torch.bool, device=device)
    while not ended.all():
        log_probs, state = model.advance(choice, state, memory)
        log_probs = constrain(log_probs, prefix, lengths, ended, memory.allowed, constraint)
        # A beam that has ended stays as it is: one way on, which costs nothing.
        log_probs[ended] = -torch.inf
        log_probs[ended, STOP] = 0.0
        candidates = total[:, :, None] + log_probs.unflatten(0, (batch, beam))
        worth = candidates
        if length_normalised:
            entries = (prefix != PAD).sum(1) + (~ended).int()
            worth = candidates / entries.view(batch, beam, 1)
        place = worth.flatten(1).topk(beam).indices
        total = candidates.flatten(1).gather(1, place)
        source = (first + place // size).flatten()
        choice, was_over = (place % size).flatten(), ended[source]
        state = (state[0][:, source], state[1][:, source])
        prefix = torch.cat([prefix[source], choice.masked_fill(was_over, PAD)[:, None]], 1)
        impossible = total.flatten() == -torch.inf  # more beams than outputs
        ended = was_over | impossible | ((choice == STOP) & model.stop) | (prefix.shape[1] >= limits)
    best = _value(total.flatten(), prefix, length_normalised).view(batch, beam).argmax(1)
    row = first[:, 0] + best
    return Decoded(prefix[row], total.flatten()[row], _finished(prefix[row], model.stop))


def sample(
    model: PointerNetwork, memory: Memory, lengths: Tensor, constraint: Constraint | None,
    generator: torch.Generator, max_len: int | None = None,
) -> Decoded:  # fmt: skip
    """Draw one output for each input from the model.

    Args:
        model: the network.
        memory: of the inputs.
        lengths: of the inputs.
        constraint: which indices may come next.
        generator: of the draws.
        max_len: most entries; n+1 if not given (n without "stop").

    Returns:
        The outputs.
    """
    limits = _limits(model, lengths, memory.allowed.shape[1] - 1, max_len)
    prefix = lengths.new_empty(len(lengths), 0)
    choice, state = torch.full_like(lengths, STOP), memory.start
    ended, total = torch.zeros_like(lengths, dtype=torch.bool), memory.elements.new_zeros(len(lengths))
    while not ended.all():
        log_probs, state = model.advance(choice, state, memory)
        log_probs = constrain(log_probs, prefix, lengths, ended, memory.allowed, constraint)
        choice = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
        total = total + log_probs.gather(1, choice[:, None])[:, 0].masked_fill(ended, 0.0)
        prefix = torch.cat([prefix, choice.masked_fill(ended, PAD)[:, None]], 1)
        ended = ended | ((choice == STOP) & model.stop) | (prefix.shape[1] >= limits)
    return Decoded(prefix, total, _finished(prefix, model.stop))


def constrain(
    log_probs: Float[Tensor, "rows n+1"],
    prefix: Int[Tensor, "rows i"],
    lengths: Int[Tensor, " rows"],
    ended: Bool[Tensor, " rows"],
    existing: Bool[Tensor, "rows n+1"],
    constraint: Constraint | None,
) -> Float[Tensor, "rows n+1"]:
    """Log-probabilities among what a constraint allows.

    Raises:
        DataError: if nothing is allowed, naming the step.
    """
    if constraint is None:
        return log_probs
    allowed = constraint(prefix, lengths, existing.shape[1] - 1)
    if allowed.shape != existing.shape or allowed.dtype != torch.bool:
        raise DataError(
            f"the constraint returned shape {tuple(allowed.shape)} and dtype {allowed.dtype}; expected "
            f"boolean {tuple(existing.shape)}: stop, then one for each element."
        )
    nothing = ~(allowed & existing).any(1) & ~ended
    if nothing.any():
        row = int(nothing.nonzero()[0])
        raise DataError(
            f"the constraint allows nothing at step {prefix.shape[1] + 1} of row {row}, after "
            f"{prefix[row].tolist()}; it must leave an element, or stop (index 0)."
        )
    allowed = (allowed & existing) | ended[:, None]
    return log_probs.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def resolve(constraint: Constraint | str | None) -> Constraint | None:
    """A constraint by name."""
    if not isinstance(constraint, str):
        return constraint
    if constraint not in CONSTRAINTS:
        raise DataError(
            f"constraint is {constraint!r}; it must be one of {', '.join(CONSTRAINTS)}, or a function."
        )
    return CONSTRAINTS[constraint]


def _limits(model: PointerNetwork, lengths: Tensor, n: int, max_len: int | None) -> Tensor:
    """Most entries of each output."""
    if max_len is not None and max_len < 1:
        raise DataError(f"max_len is {max_len}; it must be at least 1.")
    if max_len is not None:
        return torch.full_like(lengths, max_len)
    return torch.full_like(lengths, n + 1) if model.stop else lengths


def _value(log_prob: Tensor, indices: Tensor, length_normalised: bool) -> Tensor:
    """What outputs are compared by."""
    return log_prob / (indices != PAD).sum(1) if length_normalised else log_prob


def _finished(indices: Tensor, stop: bool) -> Tensor:
    """Whether an output ended by itself; without "stop" its length is given and every one does."""
    return (indices == STOP).any(1) if stop else torch.ones_like(indices[:, 0], dtype=torch.bool)
