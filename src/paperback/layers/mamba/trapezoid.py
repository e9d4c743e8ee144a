"""The scan of Mamba-3: a trapezoidal rule, and states that rotate.

With α_t = exp(Δ_t A_t) and a learned weight λ_t in (0, 1),
    h_t = α_t h_{t-1} + (1 - λ_t) Δ_t α_t x_{t-1} ⊗ k_{t-1} + λ_t Δ_t x_t ⊗ k_t,     y_t = h_t q_t + D x_t:
the input is integrated over a step by both of its ends, where Mamba-1 and 2 take the right end (λ = 1). A
complex state is a real one whose pairs rotate; here keys and queries are rotated by the angles summed up so
far instead, φ_t = Σ_{s<=t} Δ_s π tanh(θ_s), which is the same since only differences of angles matter.

A pair (k_s, x_s) enters with λ_s Δ_s at its own position and with λ_s Δ_s + (1 - λ_{s+1}) Δ_{s+1} from the
next one on, so the scan is a `decayed_attention` with the second weight, corrected on the diagonal.

Source: Mamba-3 (2025), trapezoidal discretisation and data-dependent rotary embedding; the code of
state-spaces/mamba (mamba_ssm/modules/mamba3.py, single input and single output) where the two differ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from paperback.layers.scan import decayed_attention


class TrapezoidState(NamedTuple):
    """Where a sequence stands.

    Attributes:
        h: the recurrent state, ``(batch, heads, headdim, state)``.
        angle: the angles summed up so far, in radians modulo 2π, ``(batch, heads, angles)``.
        key: the last rotated key, ``(batch, heads, state)``.
        value: the last input, ``(batch, heads, headdim)``.
    """

    h: Tensor
    angle: Tensor
    key: Tensor
    value: Tensor


def trapezoid_scan(
    x: Float[Tensor, "batch length heads headdim"],
    dt: Float[Tensor, "batch length heads"],
    A: Float[Tensor, "batch length heads"],
    weight: Float[Tensor, "batch length heads"],
    keys: Float[Tensor, "batch length heads state"],
    queries: Float[Tensor, "batch length heads state"],
    angles: Float[Tensor, "batch length angles"],
    D: Float[Tensor, " heads"] | None = None,
    state: TrapezoidState | None = None,
    reset: Bool[Tensor, "batch length"] | None = None,
    mask: Bool[Tensor, "batch length"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads headdim"], TrapezoidState]:
    """Scan by the trapezoidal rule. It computes in float32, or in float64 where x is.

    A masked position is empty: it leaves the state untouched, and the position after it has no left end.

    Args:
        x: input of each head.
        dt: step sizes Δ >= 0.
        A: decay rates, negative, one per position and head.
        weight: λ in (0, 1), the weight of the right end.
        keys: B, before the rotation.
        queries: C, before the rotation.
        angles: θ, one per rotating pair of state entries, shared by the heads; the other pairs stand still.
        D: skip connection, per head; none if not given.
        state: where the sequences go on from; from nothing if not given.
        reset: True where a document starts; nothing before it reaches it.
        mask: True at real positions.
        chunk: positions per chunk.

    Returns:
        The output, in the dtype of x, and the state after the last real position.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        values, dt, weight, keys, queries = (t.to(wide) for t in (x, dt, weight, keys, queries))
        if mask is not None:
            dt = dt * mask[..., None]
            values = values * mask[..., None, None]
        turned = (dt[..., None] * (math.pi * torch.tanh(angles.to(wide)))[:, :, None]).cumsum(1)
        if state is not None:
            turned = turned + state.angle.to(wide)[:, None]
        keys, queries = rotate(keys, turned), rotate(queries, turned)
        left = (1 - weight) * dt  # of the left end of each step, before its decay
        right = weight * dt
        left_after = F.pad(left[:, 1:], (0, 0, 0, 1))
        log_decay = dt * A.to(wide)
        start = None
        if state is not None:
            entering = (
                left[:, 0, :, None, None] * state.key.to(wide)[..., None] * state.value.to(wide)[:, :, None]
            )
            start = state.h.to(wide).transpose(2, 3) + entering
        if reset is not None:
            log_decay = log_decay.masked_fill(reset[..., None], float("-inf"))
        y, h = decayed_attention(
            queries, keys, values * (right + left_after)[..., None], log_decay, state=start, chunk=chunk
        )
        y = y - (left_after * (queries * keys).sum(-1))[..., None] * values
        if D is not None:
            y = y + D.to(wide)[:, None] * values
        last = TrapezoidState(
            h.transpose(2, 3), turned[:, -1] % math.tau, *_last_real(keys, values, mask, reset, state)
        )
        return y.to(x.dtype), last


def rotate(vectors: Float[Tensor, "... state"], angle: Float[Tensor, "... angles"]) -> Tensor:
    """Rotate the first pairs (0, 1), (2, 3), ... of the last axis by these angles; the others stay."""
    turning = 2 * angle.shape[-1]
    first, second = vectors[..., :turning].unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    pairs = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return torch.cat([pairs.flatten(-2), vectors[..., turning:]], dim=-1)


def _last_real(
    keys: Tensor, values: Tensor, mask: Tensor | None, reset: Tensor | None, state: TrapezoidState | None
) -> tuple[Tensor, Tensor]:
    """The key and the value of the last real position, or of the state before where there is none."""
    if mask is None:
        return keys[:, -1], values[:, -1]
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = (mask * position).amax(1)  # 0: no real position
    before_key = torch.zeros_like(keys[:, 0]) if state is None else state.key.to(keys)
    before_value = torch.zeros_like(values[:, 0]) if state is None else state.value.to(values)
    index = last[:, None, None, None]
    key = torch.cat([before_key[:, None], keys], 1).take_along_dim(index, 1)[:, 0]
    value = torch.cat([before_value[:, None], values], 1).take_along_dim(index, 1)[:, 0]
    if reset is not None:  # a document may have started in the padding behind it
        started = (reset & (position > last[:, None])).any(1)
        value = value.masked_fill(started[:, None, None], 0.0)
    return key, value
