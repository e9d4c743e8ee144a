"""Attention as a layer that returns its scores: pointing at elements of an input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paperback.errors import DataError

BLOCK = 2**17  # elements of the tensor of pairs worked on at a time: 512 kB in float32, the size of a cache
KEPT = 2**24  # of a tensor of pairs that is kept for the backward pass: 64 MB; a larger one is made again


class PointerAttention(nn.Module):
    """Additive attention whose scores are the output: u_ij = v . tanh(W1 e_j + W2 d_i), eq. 3 of the paper.

    The softmax of a row is a distribution over the keys, of which there may be any number. The tensor of all
    pairs, ``(batch, m, n, hidden)``, is worked on in blocks; up to 64 MB of it are kept for the backward
    pass, a larger one is computed again.

    Args:
        query_dim: width of the queries d_i.
        key_dim: width of the keys e_j.
        hidden: width of the layer between.

    Raises:
        DataError: if a width is below 1.
    """

    def __init__(self, query_dim: int, key_dim: int, hidden: int) -> None:
        super().__init__()
        for name, width in (("query_dim", query_dim), ("key_dim", key_dim), ("hidden", hidden)):
            if width < 1:
                raise DataError(f"{name} is {width}; it must be at least 1.")
        self.of_keys = nn.Linear(key_dim, hidden, bias=False)  # W1
        self.of_query = nn.Linear(query_dim, hidden, bias=False)  # W2
        self.direction = nn.Parameter(torch.empty(hidden).uniform_(-(hidden**-0.5), hidden**-0.5))  # v

    def forward(
        self,
        query: Float[Tensor, "batch m query_dim"],
        keys: Float[Tensor, "batch n key_dim"],
        mask: Bool[Tensor, "batch n"] | Bool[Tensor, "batch m n"] | None = None,
    ) -> Float[Tensor, "batch m n"]:
        """Scores of every key for every query.

        Args:
            query: decoder states, or whatever asks.
            keys: what is pointed at.
            mask: True where a key may be pointed at; all, if not given.

        Returns:
            Logits, -inf at masked keys.

        Raises:
            DataError: if the shapes do not fit each other.
        """
        if query.ndim != 3 or keys.ndim != 3 or len(query) != len(keys):
            raise DataError(
                f"query has shape {tuple(query.shape)} and keys {tuple(keys.shape)}; expected (batch, m, "
                "dim) and (batch, n, dim) with the same batch."
            )
        return self.score(query, self.of_keys(keys), mask)

    def score(self, query: Tensor, projected: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `forward`, for keys that went through ``of_keys`` before; a decoder projects them once.

        Args:
            query: ``(batch, m, query_dim)``.
            projected: ``(batch, n, hidden)``.
            mask: ``(batch, n)`` or ``(batch, m, n)``.

        Returns:
            Logits ``(batch, m, n)``.
        """
        asked = self.of_query(query)
        direction = self.direction.to(asked.dtype)  # autocast gives the products another dtype
        if torch.compiler.is_exporting():
            logits = (projected[:, None] + asked[:, :, None]).tanh() @ direction
        else:
            logits = _Pairs.apply(projected, asked, direction)
        if mask is None:
            return logits
        if mask.ndim == 2:
            mask = mask[:, None]
        return logits.masked_fill(~mask, -torch.inf)

    def glimpse(
        self, query: Tensor, projected: Tensor, keys: Tensor, mask: Tensor | None = None
    ) -> Float[Tensor, "batch m key_dim"]:
        """The mean of the keys under the distribution: what ordinary attention returns.

        Args:
            query: ``(batch, m, query_dim)``.
            projected: the keys after ``of_keys``.
            keys: the keys themselves.
            mask: True where a key counts.
        """
        return self.score(query, projected, mask).softmax(-1) @ keys


class _Pairs(torch.autograd.Function):
    """u_bij = v . t_bij with t_bij = tanh(k_bj + q_bi), for all pairs.

    With w the gradient of u, that of q_bi is v * sum_j w_bij (1 - t_bij^2), that of k_bj the same summed over
    i, and that of v is sum w_bij t_bij. Block by block this stays in the cache; autograd's own graph goes
    through memory six times.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, queries: Tensor, direction: Tensor) -> Tensor:
        whole = len(keys) * queries.shape[1] * keys.shape[1] * keys.shape[2]
        keep = whole <= KEPT and any(ctx.needs_input_grad)
        scores = keys.new_empty(len(keys), queries.shape[1], keys.shape[1])
        kept = []
        for rows, outputs in _blocks(keys, queries):
            t = _tanh(keys, queries, rows, outputs)
            torch.matmul(t, direction, out=scores[rows, outputs])
            if keep:
                kept.append(t)
        ctx.save_for_backward(keys, queries, direction, *kept)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (w,) = gradients
        keys, queries, direction, *kept = ctx.saved_tensors
        of_keys, of_queries = torch.zeros_like(keys), torch.empty_like(queries)
        of_direction = torch.zeros_like(direction)
        for block, (rows, outputs) in enumerate(_blocks(keys, queries)):
            t = kept[block] if kept else _tanh(keys, queries, rows, outputs)
            part = w[rows, outputs]
            of_direction += part.reshape(-1) @ t.flatten(0, 2)
            weighted = t.square().mul_(part[..., None])
            of_queries[rows, outputs] = part.sum(2)[..., None] - weighted.sum(2)
            of_keys[rows] += part.sum(1)[..., None] - weighted.sum(1)
        return of_keys.mul_(direction), of_queries.mul_(direction), of_direction


def _blocks(keys: Tensor, queries: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch and outputs whose pairs fit in a block together."""
    (batch, n, hidden), m = keys.shape, queries.shape[1]
    rows = max(1, BLOCK // (m * n * hidden))
    outputs = m if rows > 1 else max(1, BLOCK // (n * hidden))
    for row in range(0, batch, rows):
        for output in range(0, m, outputs):
            yield slice(row, row + rows), slice(output, output + outputs)


def _tanh(keys: Tensor, queries: Tensor, rows: slice, outputs: slice) -> Tensor:
    return (keys[rows, None] + queries[rows, outputs, None]).tanh_()
