"""Structured state-space duality: the scan of Mamba-2, whose decay is one number per head.

h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t ⊗ B_t and y_t = h_t C_t + D x_t, with h of shape (headdim, state) and A a
scalar. Because the decay is a scalar, a chunk of Q positions is a masked attention with C as queries, B as
keys, Δx as values and the decays as mask; only the chunks follow one another. With Q = L this is masked
linear attention, with Q = 1 the recurrence.

Source: Dao and Gu, "Transformers are SSMs" (2024), section 6 (algorithm) and listing 1 (segment sums).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.errors import DataError
from paperback.layers.scan import decayed_attention


def ssd_scan(
    x: Float[Tensor, "batch length heads headdim"],
    dt: Float[Tensor, "batch length heads"],
    A: Float[Tensor, " heads"],
    B: Float[Tensor, "batch length groups state"],
    C: Float[Tensor, "batch length groups state"],
    D: Float[Tensor, " heads"] | None = None,
    h0: Float[Tensor, "batch heads headdim state"] | None = None,
    reset: Bool[Tensor, "batch length"] | None = None,
    mask: Bool[Tensor, "batch length"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch length heads headdim"], Float[Tensor, "batch heads headdim state"]]:
    """Scan with a scalar decay per head, chunk by chunk as matrix products (section 6).

    Heads are split evenly over the groups, and share B and C inside a group. It computes in float32, or in
    float64 where x is.

    Args:
        x: input of each head.
        dt: step sizes Δ >= 0 (after the softplus).
        A: decay rates, negative.
        B: input directions, per group.
        C: output directions, per group.
        D: skip connection, per head; none if not given.
        h0: state before the first position; zero if not given.
        reset: True where a document starts; nothing before it reaches it.
        mask: True at real positions; the others leave the state untouched.
        chunk: positions per chunk.

    Returns:
        The output, in the dtype of x, and the state after the last position.

    Raises:
        DataError: if heads do not divide over groups or A is positive.
    """
    heads, groups = x.shape[2], B.shape[2]
    if heads % groups:
        raise DataError(f"x has {heads} heads and B {groups} groups; the groups must divide the heads.")
    if not torch.compiler.is_compiling() and bool((A > 0).any()):
        raise DataError("A is positive somewhere; a decay rate must be negative, for example -exp(A_log).")
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        values, dt = x.to(wide), dt.to(wide)
        if mask is not None:
            dt = dt * mask[..., None]
        log_decay = dt * A.to(wide)
        if reset is not None:
            log_decay = log_decay.masked_fill(reset[..., None], float("-inf"))
        y, h = decayed_attention(
            queries=C.to(wide),
            keys=B.to(wide),
            values=values * dt[..., None],
            log_decay=log_decay,
            state=None if h0 is None else h0.to(wide).transpose(2, 3),
            chunk=chunk,
        )
        if D is not None:
            y = y + D.to(wide)[:, None] * values
        return y.to(x.dtype), h.transpose(2, 3)
