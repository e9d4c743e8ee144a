"""The codebook layer: an activation becomes the mean of the k codes that resemble it most.

    u = LayerNorm(x),    S = the k codes of greatest <u, c_i> / |c_i|,    out = (1/k) sum_{i in S} c_i

`out` takes the place of x; nothing bypasses it. The choice of codes has no gradient, so the backward pass is
stated: gradients pass straight through to u, and codes learn from the task and from an auto-encoder's term,
the mean over tokens of |out - u|^2 with u held fixed.

A layer of several groups is one codebook per slice of the activation (per head of an attention layer), each
with its own LayerNorm and codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.codebook_features.edits import TokenEdit, apply_bans, apply_forces, kept_slots

Similarity = Literal["inner", "euclidean"]
Loss = Literal["base", "vqvae", "ae", "fullae"]

EPS = 1e-5  # of the LayerNorm
SCORES_AT_ONCE = 2**22  # similarities that are held at a time
CODES_AT_ONCE = 2**16  # codes that a token is compared with at a time
BLOCK, LONG = 8, 800  # codes of a block of the two-stage top-k, and of a row that it is worth it for


class CodebookLayer(nn.Module):
    """Replaces vectors by means of k codes (section 2 of the paper).

    Args:
        dim: width of the activation.
        n_codes: codes of each group, >= k.
        k: codes of a vector, >= 1. It may be changed later.
        similarity: "inner" compares with the inner product with codes of length one, "euclidean" with the
            distance.
        loss: how codes and input learn. "base": the task only. "ae": codes also from the auto-encoder's term.
            "vqvae": codes from that term only, and the input is drawn to its codes (commitment, weight
            `beta`). "fullae": "ae" with the commitment.
        beta: weight of the commitment, >= 0. It is a mean over tokens, as the codes' term is (the authors'
            code divides only the latter by the number of tokens).
        groups: equal slices of the activation with a codebook each; divides `dim`.

    Attributes:
        codes: ``(groups, n_codes, dim / groups)``, drawn from N(0, 1).
        counts: how often each code was chosen in training since the counts were last cleared,
            ``(groups, n_codes)``; not saved.
        snap: False makes the layer the identity.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        n_codes: int,
        k: int = 1,
        similarity: Similarity = "inner",
        loss: Loss = "ae",
        beta: float = 0.25,
        groups: int = 1,
    ) -> None:
        super().__init__()
        _check_arguments(dim, n_codes, k, similarity, loss, beta, groups)
        self.dim, self.n_codes, self.k, self.groups = dim, n_codes, k, groups
        self.similarity, self.loss, self.beta = similarity, loss, beta
        self.snap = True
        width = dim // groups
        self.codes = nn.Parameter(torch.randn(groups, n_codes, width))
        self.weight = nn.Parameter(torch.ones(groups, width))
        self.bias = nn.Parameter(torch.zeros(groups, width))
        # Not a buffer: data-parallel training would overwrite it with that of the first process.
        self.counts: Int[Tensor, "groups codes"] = torch.zeros(groups, n_codes, dtype=torch.long)
        self._remembers = False
        self._last: Float[Tensor, "tokens groups width"] | None = None

    def forward(
        self, x: Float[Tensor, "*batch dim"], edits: Sequence[TokenEdit] = ()
    ) -> tuple[Float[Tensor, "*batch dim"], Int[Tensor, "*batch groups k"]]:
        """The snapped activation and its codes.

        Args:
            x: the activation.
            edits: what is forced, banned or dropped at which tokens; see `edits.resolve`.

        Returns:
            The mean of the chosen codes, in the type of x, and their ids in the order of their similarity; an
            id of -1 is a code that was dropped.

        Raises:
            DataError: if x has another width.
        """
        if x.shape[-1] != self.dim or not x.is_floating_point():
            raise DataError(
                f"the codebook of width {self.dim} was given a tensor {tuple(x.shape)} of {x.dtype}; "
                "the last dimension must be that width."
            )
        u = self.normalise(x)
        ids = self.choose(u, edits)
        kept = kept_slots(ids, edits)
        if self.training:
            self._note_use(u, ids)
        out = _Snap.apply(u, self.codes, ids, kept, self.loss, self.beta)
        ids = ids if kept is None else ids.masked_fill(~kept, -1)
        return out.reshape(x.shape).to(x.dtype), ids.view(*x.shape[:-1], self.groups, self.k)

    def normalise(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "tokens groups width"]:
        """Each group's LayerNorm of its slice, in the precision of the codes."""
        slices = x.to(self.codes.dtype).reshape(-1, self.groups, self.dim // self.groups)
        return F.layer_norm(slices, slices.shape[-1:], eps=EPS) * self.weight + self.bias

    @torch.no_grad()
    def choose(
        self, u: Float[Tensor, "tokens groups width"], edits: Sequence[TokenEdit] = ()
    ) -> Int[Tensor, "tokens groups k"]:
        """Ids of the k most similar codes, best first, after bans and forces.

        Half precision is compared in float32. Only a bounded number of similarities exists at a time.
        """
        passed = max((edit.passed_over for edit in edits), default=0)
        wide = torch.promote_types(u.dtype, torch.float32)
        u, codes = u.to(wide).transpose(0, 1), self.codes.to(wide)
        if self.similarity == "inner":
            keys, shift = F.normalize(codes, dim=-1), None
        else:  # -|u - c|^2 = 2 <u, c> - |c|^2 - |u|^2, whose last term is the same for all codes
            keys, shift = 2 * codes, -codes.square().sum(-1)
        rows = max(1, SCORES_AT_ONCE // (self.groups * min(self.n_codes, CODES_AT_ONCE)))
        ids = [
            self._best(u[:, start : start + rows], keys, shift, edits, start, self.k + passed)
            for start in range(0, u.shape[1], rows)
        ]
        ranked = torch.cat(ids, 1).transpose(0, 1) if ids else u.new_empty(0, self.groups, self.k + passed)
        return apply_forces(ranked.long(), self.k, edits)

    def _best(
        self, u: Tensor, keys: Tensor, shift: Tensor | None, edits: Sequence[TokenEdit], start: int, k: int
    ) -> Int[Tensor, "groups rows k"]:
        """The k best codes of some rows; the codes are gone through in parts where there are very many."""
        best_scores, best_ids = [], []
        for first in range(0, self.n_codes, CODES_AT_ONCE):
            part = slice(first, first + CODES_AT_ONCE)
            scores = u @ keys[:, part].mT
            if shift is not None:
                scores += shift[:, None, part]
            apply_bans(scores, edits, start, first)
            values, ids = top_k(scores, min(k, scores.shape[-1]))
            best_scores.append(values)
            best_ids.append(ids + first)
        if len(best_ids) == 1:
            return best_ids[0]
        _, order = torch.cat(best_scores, -1).topk(k, -1)
        return torch.cat(best_ids, -1).gather(-1, order)

    # -- the codes -------------------------------------------------------------------------------------------

    def remember(self, on: bool = True) -> None:
        """Keep the normalised activations of the last training batch, which `revive` takes codes from."""
        self._remembers, self._last = on, None

    @torch.no_grad()
    def revive(self, rho: float, generator: torch.Generator) -> int:
        """Set codes that were never chosen since the last clearing to activations of the last batch.

        A dead code becomes a random u + rho |u| times noise from N(0, 1); the counts are cleared. In several
        processes their counts are added, and all take the codes of the first.

        Args:
            rho: size of the noise, relative.
            generator: of the draws, on the CPU.

        Returns:
            The number of codes that were set, over all groups.
        """
        many = torch.distributed.is_available() and torch.distributed.is_initialized()
        if many:
            torch.distributed.all_reduce(self.counts)
        dead = (self.counts == 0).to(self.codes.device)
        if self._last is not None and len(self._last):
            for group in dead.any(1).nonzero().flatten().tolist():
                n = int(dead[group].sum())
                u = self._last[torch.randint(len(self._last), (n,), generator=generator), group]
                noise = torch.randn(u.shape, generator=generator).to(u)
                self.codes[group, dead[group]] = u + rho * u.norm(dim=-1, keepdim=True) * noise
        if many:
            torch.distributed.broadcast(self.codes.data, 0)
        self.counts.zero_()
        return int(dead.sum())

    @torch.no_grad()
    def _note_use(self, u: Tensor, ids: Tensor) -> None:
        offsets = torch.arange(self.groups, device=ids.device)[:, None] * self.n_codes
        used = torch.bincount((ids + offsets).flatten(), minlength=self.counts.numel())
        self.counts = self.counts.to(ids.device)
        self.counts += used.view_as(self.counts)
        if self._remembers:
            self._last = u.detach()

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"dim={self.dim}, n_codes={self.n_codes}, k={self.k}, similarity={self.similarity!r}, "
            f"loss={self.loss!r}, groups={self.groups}"
        )


class _Snap(torch.autograd.Function):
    """The mean of the chosen codes, with the backward passes of the four losses."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Float[Tensor, "tokens groups width"],
        codes: Float[Tensor, "groups codes width"],
        ids: Int[Tensor, "tokens groups k"],
        kept: Bool[Tensor, "tokens groups k"] | None,
        loss: Loss,
        beta: float,
    ) -> Float[Tensor, "tokens groups width"]:
        groups, n_codes, width = codes.shape
        k = ids.shape[-1]
        places = (ids + torch.arange(groups, device=ids.device)[:, None] * n_codes).reshape(-1, k)
        weights = None if kept is None else kept.view(-1, k).to(codes.dtype) / k
        out = F.embedding_bag(
            places,
            codes.reshape(-1, width),
            mode="mean" if kept is None else "sum",
            per_sample_weights=weights,
        ).view_as(u)
        ctx.save_for_backward(u, out, places, weights)
        ctx.shape, ctx.loss, ctx.beta = codes.shape, loss, beta
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (g,) = gradients
        u, out, places, weights = ctx.saved_tensors
        tokens, k = max(len(u), 1), places.shape[-1]
        residual = (out - u) * (2 / tokens)  # of the mean over tokens of |out - u|^2, to out
        to_out = {"base": g, "vqvae": residual}.get(ctx.loss, g + residual).reshape(-1, u.shape[-1])
        share = torch.full_like(places, 1, dtype=u.dtype) / k if weights is None else weights
        rows = (to_out[:, None] * share[..., None]).view(-1, u.shape[-1])
        to_codes = rows.new_zeros(math.prod(ctx.shape[:2]), u.shape[-1])
        to_codes.index_add_(0, places.flatten(), rows)
        to_u = g - ctx.beta * residual if ctx.loss in ("vqvae", "fullae") else g
        return to_u, to_codes.view(ctx.shape), None, None, None, None


def top_k(scores: Float[Tensor, "*batch codes"], k: int) -> tuple[Tensor, Tensor]:
    """The k greatest entries of each row and their places, best first.

    Of a long row the k blocks with the greatest maxima are looked at only, in which the k greatest entries
    lie; that is up to three times as fast as `torch.topk` over the row. A block is every m-th entry, so that
    its maximum is taken along contiguous memory.
    """
    n = scores.shape[-1]
    if k == 1:
        values, ids = scores.max(-1, keepdim=True)
        return values, ids
    m = n // BLOCK
    if n < LONG or 8 * k > m:
        return scores.topk(k, -1)
    blocks = scores[..., : m * BLOCK].unflatten(-1, (BLOCK, m))
    chosen = blocks.amax(-2).topk(k, -1).indices
    places = (chosen[..., None] + m * torch.arange(BLOCK, device=scores.device)).flatten(-2)
    if m * BLOCK < n:
        rest = torch.arange(m * BLOCK, n, device=scores.device).expand(*places.shape[:-1], -1)
        places = torch.cat((places, rest), -1)
    values, order = scores.gather(-1, places).topk(k, -1)
    return values, places.gather(-1, order)


def _check_arguments(
    dim: int, n_codes: int, k: int, similarity: str, loss: str, beta: float, groups: int
) -> None:
    for name, value in (("dim", dim), ("n_codes", n_codes), ("k", k), ("groups", groups)):
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1.")
    if k > n_codes:
        raise DataError(f"k is {k} and n_codes {n_codes}; a vector cannot have more codes than there are.")
    if dim % groups or dim // groups < 2:
        raise DataError(
            f"groups is {groups} and dim {dim}; groups must divide dim into slices of at least two."
        )
    if similarity not in get_args(Similarity):
        raise DataError(f"similarity is {similarity!r}; it must be one of {', '.join(get_args(Similarity))}.")
    if loss not in get_args(Loss):
        raise DataError(f"loss is {loss!r}; it must be one of {', '.join(get_args(Loss))}.")
    if not beta >= 0 or not math.isfinite(beta):
        raise DataError(f"beta is {beta}; it must be a number of at least 0.")
