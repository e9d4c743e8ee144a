"""Residual blocks, and stacks of them that mix Mamba with attention (survey, section 4.1: block design).

    MambaBlock(u) = u + Mamba(RMSNorm(u))

A pattern such as "MMAM" names the blocks of a stack from below: M a Mamba block, A attention with rotary
positions, F a gated feed-forward network. Every block takes and returns ``(batch, length, d_model)`` and has
a state, so that a hybrid runs token by token as a whole; that of attention is its cache and grows.

Sources: Gu and Dao, Mamba (2023) for the block and the scaling of residual outputs by 1/√(number of blocks);
Jamba and the hybrids of the survey (arXiv 2408.01129) for the patterns; Su et al., RoFormer (2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError, NotSupportedError
from paperback.layers.interface import Cost, SequenceLayer, check_sequence
from paperback.layers.mamba.mixer import Mamba

NORM_EPS = 1e-5
ROTARY_BASE = 10_000.0
PADDING = -1  # number of the document that padding belongs to


class MambaBlock(SequenceLayer):
    """``u + Mamba(RMSNorm(u))``.

    Args:
        d_model: width.
        **settings: of `Mamba`.

    Attributes:
        norm: the RMSNorm.
        mixer: the `Mamba`.
    """

    def __init__(self, d_model: int, **settings: Any) -> None:
        super().__init__(d_model)
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.mixer = Mamba(d_model, **settings)
        self.causal, self.recurrent = self.mixer.causal, self.mixer.recurrent

    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: Any = None,
        return_state: bool = False,
        **settings: Any,
    ) -> Any:
        """As `Mamba.forward`, with the residual; further arguments are the mixer's."""
        mixed = self.mixer(
            self.norm(u), mask=mask, reset=reset, state=state, return_state=return_state, **settings
        )
        return (u + mixed[0], mixed[1]) if return_state else u + mixed

    def init_state(self, batch: int) -> Any:
        """The state before the first position."""
        return self.mixer.init_state(batch)

    def step(self, u_t: Float[Tensor, "batch dim"], state: Any) -> tuple[Tensor, Any]:
        """Feed one position."""
        mixed, state = self.mixer.step(self.norm(u_t), state)
        return u_t + mixed, state

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence; the norm saves its input."""
        return self.mixer.cost(length) + _norm_cost(self.norm.weight, length)


class AttentionState(NamedTuple):
    """What attention has seen.

    Attributes:
        keys: ``(batch, heads, seen, head_dim)``, turned by their positions.
        values: ``(batch, heads, seen, head_dim)``.
        documents: ``(batch, seen)`` int64, the document of each position; `PADDING` for padding.
    """

    keys: Tensor
    values: Tensor
    documents: Tensor


class AttentionBlock(SequenceLayer):
    """``u + Attention(RMSNorm(u))``, softmax attention with rotary positions.

    Positions enter only as differences, so that padding on the left changes nothing. Its state is a cache
    that grows by one position a step: `recurrent` is False, which promises constant size, yet `step` works
    where the block is causal.

    Args:
        d_model: width, a multiple of 2 * num_heads.
        num_heads: attention heads.
        causal: look at no later position.

    Raises:
        DataError: if d_model and num_heads do not fit.
    """

    def __init__(self, d_model: int, num_heads: int = 4, causal: bool = True) -> None:
        super().__init__(d_model)
        if num_heads < 1 or d_model % (2 * num_heads):
            raise DataError(
                f"d_model is {d_model}, num_heads {num_heads}; d_model must be a multiple of 2 * num_heads, "
                "since rotary positions turn pairs of features."
            )
        self.num_heads, self.causal = num_heads, causal
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: AttentionState | None = None,
        return_state: bool = False,
    ) -> Any:
        """Map whole sequences; see `SequenceLayer.forward`.

        Args:
            u: the input.
            mask: True at real positions.
            reset: True where a document begins; positions attend to their own document only.
            state: what was seen before (causal blocks).
            return_state: also return what has been seen now.

        Raises:
            DataError: if u or mask does not fit.
            NotSupportedError: if a block that is not causal is given a state, or asked for one.
        """
        check_sequence(u, self.d_model, mask)
        if not self.causal and (state is not None or return_state):
            raise self._stateless("state")
        seen = 0 if state is None else state.keys.shape[2]
        queries, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.in_proj(self.norm(u)).chunk(3, -1)
        )
        positions = torch.arange(seen, seen + u.shape[1], device=u.device)
        queries, keys = rotate(queries, positions), rotate(keys, positions)
        plain = mask is None and reset is None and state is None
        documents = None if plain and not return_state else _documents(u, mask, reset, state)
        if state is not None:
            keys, values = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
        if plain:
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        else:
            assert documents is not None
            allowed = self._allowed(documents, u.shape[1])
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        out = u + self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not return_state:
            return out
        assert documents is not None
        return out, AttentionState(keys, values, documents)

    def init_state(self, batch: int) -> AttentionState:
        """An empty cache.

        Raises:
            NotSupportedError: if the block is not causal.
        """
        if not self.causal:
            raise self._stateless("init_state")
        weight = self.in_proj.weight
        empty = weight.new_zeros(batch, self.num_heads, 0, self.d_model // self.num_heads)
        return AttentionState(empty, empty, torch.zeros(batch, 0, dtype=torch.int64, device=weight.device))

    def step(self, u_t: Float[Tensor, "batch dim"], state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Feed one position; it costs as much as positions were seen."""
        out, state = self(u_t.unsqueeze(1), state=state, return_state=True)
        return out[:, 0], state

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence: two products of length² * d_model, softmax, projections."""
        products = 2 * length * length * self.d_model * 2
        projections = 2 * length * 4 * self.d_model**2
        # Saved: the three projections and the output of the fused kernel, and its log-sum-exp.
        saved = length * (5 * self.d_model + self.num_heads) * self.in_proj.weight.element_size()
        return Cost(products + projections, saved) + _norm_cost(self.norm.weight, length)

    def _allowed(self, documents: Tensor, new: int) -> Bool[Tensor, "batch 1 new seen"]:
        """What each of the last `new` positions may look at: its document and, if causal, what came before.

        Every position sees itself, padding too: a row without any entry has no softmax.
        """
        total = documents.shape[1]
        asking = documents[:, total - new :]
        allowed = (asking[:, :, None] == documents[:, None, :]) & (documents != PADDING)[:, None, :]
        place = torch.arange(total, device=documents.device)
        rows = place[total - new :, None]
        if self.causal:
            allowed = allowed & (place <= rows)
        return (allowed | (place == rows)).unsqueeze(1)


class MLPBlock(SequenceLayer):
    """``u + W_down(SiLU(W_gate n) ⊙ W_up n)`` with n = RMSNorm(u), position by position.

    Args:
        d_model: width.
        expand: hidden width in multiples of d_model.
    """

    causal, recurrent = True, True

    def __init__(self, d_model: int, expand: int = 3) -> None:
        super().__init__(d_model)
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.in_proj = nn.Linear(d_model, 2 * expand * d_model, bias=False)
        self.out_proj = nn.Linear(expand * d_model, d_model, bias=False)

    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: tuple[()] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Map whole sequences; mask, reset and state mean nothing to a layer that mixes no positions."""
        check_sequence(u, self.d_model, mask)
        out = u + self._update(u)
        return (out, ()) if return_state else out

    def init_state(self, batch: int) -> tuple[()]:
        """Nothing: the empty tuple."""
        return ()

    def step(self, u_t: Float[Tensor, "batch dim"], state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        """Feed one position."""
        return u_t + self._update(u_t), state

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence."""
        hidden = self.out_proj.in_features
        saved = length * (self.d_model + 4 * hidden) * self.in_proj.weight.element_size()
        return Cost(2 * length * 3 * self.d_model * hidden, saved) + _norm_cost(self.norm.weight, length)

    def _update(self, u: Tensor) -> Tensor:
        gate, up = self.in_proj(self.norm(u)).chunk(2, -1)
        return self.out_proj(F.silu(gate) * up)


Block = MambaBlock | AttentionBlock | MLPBlock


class BlockStack(nn.ModuleList):
    """Residual blocks one above the other, by a pattern string.

    Args:
        pattern: one letter for each block from below: M Mamba, A attention, F feed-forward.
        d_model: width.
        num_heads: of attention.
        causal: whether attention looks at no later position; for Mamba its `scan` says so.
        **settings: of `Mamba`.

    The projections that write into the residual stream are scaled by 1/√(number of blocks).

    Raises:
        DataError: if the pattern is empty or has another letter.
        NotSupportedError: if it has E, a mixture of experts.
    """

    def __init__(
        self, pattern: str, d_model: int, num_heads: int = 4, causal: bool = True, **settings: Any
    ) -> None:
        _check_pattern(pattern)
        super().__init__()
        for letter in pattern:
            if letter == "M":
                self.append(MambaBlock(d_model, **settings))
            elif letter == "A":
                self.append(AttentionBlock(d_model, num_heads, causal))
            else:
                self.append(MLPBlock(d_model))
        with torch.no_grad():
            for block in self:
                out = block.mixer.out_proj if isinstance(block, MambaBlock) else block.out_proj
                out.weight.div_(math.sqrt(len(self)))

    def __iter__(self) -> Iterator[Block]:
        """The blocks from below."""
        return cast("Iterator[Block]", super().__iter__())

    def forward(
        self,
        u: Float[Tensor, "batch length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: tuple[Any, ...] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Through all blocks; the state has one entry for each."""
        if state is not None and len(state) != len(self):
            raise DataError(f"state has {len(state)} entries; these are {len(self)} blocks, one for each.")
        states = []
        for i, block in enumerate(self):
            before = None if state is None else state[i]
            result = block(u, mask=mask, reset=reset, state=before, return_state=return_state)
            u, after = result if return_state else (result, None)
            states.append(after)
        return (u, tuple(states)) if return_state else u

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first position."""
        return tuple(block.init_state(batch) for block in self)

    def step(self, u_t: Float[Tensor, "batch dim"], state: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Feed one position."""
        states = []
        for block, before in zip(self, state, strict=True):
            u_t, after = block.step(u_t, before)
            states.append(after)
        return u_t, tuple(states)

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence."""
        return sum((block.cost(length) for block in self), Cost(0, 0))


def _check_pattern(pattern: str) -> None:
    if not pattern:
        raise DataError('layers is empty; give a pattern such as "MM" or "MMAM".')
    for i, letter in enumerate(pattern):
        if letter == "E":
            raise NotSupportedError(
                f"layers={pattern!r} asks for a mixture of experts (E) at place {i}; its router comes with "
                "widenet (method 46), which is not here yet. Use F, a dense feed-forward block."
            )
        if letter not in "MAF":
            raise DataError(
                f"layers={pattern!r} has {letter!r} at place {i}; the letters are M (Mamba), A (attention) "
                "and F (feed-forward)."
            )


def rotate(x: Float[Tensor, "batch heads length dim"], positions: Int[Tensor, " length"]) -> Tensor:
    """Turn feature pairs (i, i + dim / 2) by position * base^(-2 i / dim): rotary positions.

    Args:
        x: queries or keys.
        positions: of the entries along the third axis.

    Returns:
        The same shape and dtype; the product of a query and a key depends on positions by difference only.
    """
    half = x.shape[-1] // 2
    rates = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions.float()[:, None] * rates
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _documents(
    u: Tensor, mask: Tensor | None, reset: Tensor | None, state: AttentionState | None
) -> Int[Tensor, "batch seen"]:
    """The document of every position seen so far; numbers go on from those in the state."""
    numbers = torch.zeros(u.shape[:2], dtype=torch.int64, device=u.device)
    if reset is not None:
        numbers = reset.cumsum(1)
    if state is not None and state.documents.shape[1]:
        numbers = numbers + state.documents.amax(1, keepdim=True).clamp_min(0)
    if mask is not None:
        numbers = numbers.masked_fill(~mask, PADDING)
    return numbers if state is None else torch.cat([state.documents, numbers], 1)


def _norm_cost(weight: Tensor, length: int) -> Cost:
    """RMSNorm keeps its input and one number per position."""
    return Cost(0, length * (weight.numel() + 1) * weight.element_size())
