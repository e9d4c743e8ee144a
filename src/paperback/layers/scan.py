"""Linear recurrences h_t = a_t ⊙ h_{t-1} + b_t with a carried state: the ground of recurrent layers.

- `sequential_recurrence` is the definition, a loop that autograd records.
- `associative_recurrence` is the same by a tree: steps compose as (a, b)(a', b') = (a a', a' b + b').
- `scan_` and `scan_back_` are the loop and its adjoint in place, for layers that write their own backward.
- `linear_recurrence` is the same with that backward, for decays that many entries of a state share.
- `decayed_attention` is the recurrence of a matrix state with a scalar decay, by matrix products in chunks.

Sources: Blelloch, "Prefix sums and their applications" (1990); Martin and Cundy, "Parallelizing linear
recurrent neural nets over sequence length" (2018); Dao and Gu, "Transformers are SSMs" (2024), section 6.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def sequential_recurrence(
    a: Float[Tensor, "batch length *state"],
    b: Float[Tensor, "batch length *state"],
    h0: Float[Tensor, " batch *state"] | None = None,
) -> Float[Tensor, "batch length *state"]:
    """All states of h_t = a_t ⊙ h_{t-1} + b_t, one position after the other.

    Args:
        a: decays; may broadcast against b behind the length.
        b: inputs.
        h0: state before the first position; zero if not given.

    Returns:
        The state after each position, in the shape of b.
    """
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim=1)


def associative_recurrence(
    a: Float[Tensor, "batch length *state"],
    b: Float[Tensor, "batch length *state"],
    h0: Float[Tensor, " batch *state"] | None = None,
) -> Float[Tensor, "batch length *state"]:
    """The same as `sequential_recurrence` in 2 log2(length) rounds, each over all positions at once.

    Args:
        a: decays, in the shape of b.
        b: inputs.
        h0: state before the first position; zero if not given.

    Returns:
        The state after each position, in the shape of b.
    """
    if h0 is not None:
        b = torch.cat([b[:, :1] + a[:, :1] * h0[:, None], b[:, 1:]], dim=1)
    return _compose(a, b)[1]


def _compose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Every prefix of the steps composed into one: halve by composing pairs, recur, fill in between."""
    length = a.shape[1]
    if length == 1:
        return a, b
    left_a, right_a = a[:, 0 : length - 1 : 2], a[:, 1::2]
    left_b, right_b = b[:, 0 : length - 1 : 2], b[:, 1::2]
    odd_a, odd_b = _compose(left_a * right_a, right_a * left_b + right_b)
    rest_a, rest_b = a[:, 2::2], b[:, 2::2]
    before_a, before_b = odd_a[:, : rest_a.shape[1]], odd_b[:, : rest_b.shape[1]]
    even_a = torch.cat([a[:, :1], before_a * rest_a], dim=1)
    even_b = torch.cat([b[:, :1], rest_a * before_b + rest_b], dim=1)
    return _interleave(even_a, odd_a), _interleave(even_b, odd_b)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even_0, odd_0, even_1, odd_1, ...; there may be one more even."""
    woven = torch.stack([even[:, : odd.shape[1]], odd], dim=2).flatten(1, 2)
    return torch.cat([woven, even[:, odd.shape[1] :]], dim=1)


def scan_(a: Float[Tensor, " length *state"], b: Float[Tensor, " length *state"], h0: Tensor) -> None:
    """Turn b into the states h_t = a_t ⊙ h_{t-1} + b_t, in place. Time is the first axis; no gradient."""
    h = h0
    for a_t, b_t in zip(a.unbind(0), b.unbind(0), strict=True):
        h = b_t.addcmul_(a_t, h)


def scan_back_(
    a: Float[Tensor, " length *state"], g: Float[Tensor, " length *state"], after: Tensor
) -> Tensor:
    """The adjoint of `scan_`: turn g into g_t + a_{t+1} ⊙ g_{t+1}, in place.

    Args:
        a: the decays of `scan_`.
        g: gradients of the states.
        after: what comes back from behind the last position.

    Returns:
        The gradient of h0, a_0 ⊙ g_0.
    """
    decays, gradients = a.unbind(0), g.unbind(0)
    following = gradients[-1].add_(after)
    for t in range(len(gradients) - 2, -1, -1):
        following = gradients[t].addcmul_(decays[t + 1], following)
    return decays[0] * following


# An operator of torch, so that torch.export and torch.compile keep it whole, for any length.
@torch.library.custom_op("paperback::linear_recurrence", mutates_args=())
def linear_recurrence(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    """All states of h_t = a_t h_{t-1} + b_t, where a state of many entries decays as a whole.

    Args:
        a: decays, ``(length, rows)``.
        b: inputs, ``(length, rows, width)``.
        h0: state before the first position, ``(rows, width)``.

    Returns:
        The state after each position, ``(length, rows, width)``.
    """
    h = b.clone(memory_format=torch.contiguous_format)
    scan_(a[..., None], h, h0)
    return h


@torch.library.custom_op("paperback::linear_recurrence_backward", mutates_args=())
def linear_recurrence_backward(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h0."""
    grad_b = grad.clone(memory_format=torch.contiguous_format)
    grad_h0 = scan_back_(a[..., None], grad_b, torch.zeros_like(h0))
    grad_a = torch.cat([(grad_b[:1] * h0).sum(-1), (grad_b[1:] * h[:-1]).sum(-1)])
    return grad_a, grad_b, grad_h0


@linear_recurrence.register_fake
def _(a: Tensor, b: Tensor, h0: Tensor) -> Tensor:
    return b.new_empty(b.shape)


@linear_recurrence_backward.register_fake
def _(grad: Tensor, a: Tensor, h: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), h.new_empty(h.shape), h0.new_empty(h0.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output, inputs[2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return linear_recurrence_backward(grad, *ctx.saved_tensors)


linear_recurrence.register_autograd(_backward, setup_context=_remember)


def segment_sums(x: Float[Tensor, "... length"]) -> Float[Tensor, "... length length"]:
    """Entry (i, j) is x_{j+1} + ... + x_i for j <= i, and minus infinity above the diagonal.

    Each sum is added up by itself. The difference of two running sums would cancel where the sums are long,
    and would be not a number where an entry is minus infinity.
    """
    length = x.shape[-1]
    below = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    sums = x[..., None].expand(*x.shape, length).masked_fill(~below, 0.0).cumsum(-2)
    return sums.masked_fill(below.mT, float("-inf"))


def decayed_attention(
    queries: Float[Tensor, "batch length groups key"],
    keys: Float[Tensor, "batch length groups key"],
    values: Float[Tensor, "batch length heads value"],
    log_decay: Float[Tensor, "batch length heads"] | None = None,
    state: Float[Tensor, "batch heads key value"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads value"], Float[Tensor, "batch heads key value"]]:
    """S_t = exp(log_decay_t) S_{t-1} + key_t ⊗ value_t and y_t = S_tᵀ query_t, without any normalisation.

    Inside a chunk it is attention with the decays as mask, from chunk to chunk a recurrence. It costs
    O(length · chunk) and keeps one state per chunk.

    Args:
        queries: shared by the heads of a group.
        keys: shared by the heads of a group.
        values: one per head; groups divide heads, and a group's heads stand side by side.
        log_decay: <= 0; minus infinity forgets all that was before; no decay if not given.
        state: S before the first position; zero if not given.
        chunk: positions per chunk.

    Returns:
        y, and S after the last position.
    """
    batch, length, heads, width = values.shape
    groups, size = keys.shape[2:]
    per_group = heads // groups
    if log_decay is None:
        log_decay = values.new_zeros(batch, length, heads)
    if isinstance(length, int):  # torch.export may trace any multiple of the chunk
        chunk = min(chunk, length)
    chunks = -(-length // chunk)
    missing = chunks * chunk - length  # added positions have no value and no decay

    def in_chunks(x: Tensor) -> Tensor:
        """(batch, length, heads or groups, ...) to (batch, groups, heads per group, chunks, chunk, ...)."""
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
        x = x.unflatten(2, (groups, -1)).unflatten(1, (chunks, chunk))
        return x.movedim((3, 4), (1, 2))

    q, k, v, decay = map(in_chunks, (queries, keys, values, log_decay))
    within = segment_sums(decay).exp()
    y = (q @ k.mT * within) @ v
    to_end = within[..., -1, :, None]
    added = k.mT @ (v * to_end)  # (batch, groups, heads per group, chunks, key, value)
    since_start = decay.cumsum(-1).exp()[..., None]

    rows = batch * heads
    start = values.new_zeros(batch, heads, size, width) if state is None else state
    leaving = linear_recurrence(
        since_start[..., -1, 0].movedim(3, 0).flatten(1),
        added.movedim(3, 0).flatten(4).flatten(1, 3),
        start.reshape(rows, size * width),
    )
    leaving = leaving.unflatten(2, (size, width)).unflatten(1, (batch, groups, per_group))
    entering = torch.cat([start.reshape(1, batch, groups, per_group, size, width), leaving[:-1]]).movedim(
        0, 3
    )
    y = y + (q @ entering) * since_start
    y = y.movedim((1, 2), (3, 4)).flatten(3, 4).flatten(1, 2)
    return y[:, :length], leaving[-1].flatten(1, 2)
