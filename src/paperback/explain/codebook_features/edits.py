"""Interventions: codes that are forced, banned, dropped or passed over, at all tokens or at some positions.

A user writes an `Edit` (by `force`, `ban`, `zero` or `pass_over`); it speaks of positions in a sequence. For
each forward pass `resolve` turns it into a `TokenEdit`, which speaks of the rows of that pass: in generation
with a cache a pass sees one position only, at an offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from paperback.errors import DataError

Kind = Literal["force", "ban", "zero", "pass over"]
Codes = int | Sequence[int] | Tensor


@dataclass(frozen=True)
class Edit:
    """One intervention at one site; made by `force`, `ban`, `zero` and `pass_over`.

    Attributes:
        kind: what is done.
        codes: ids. ``(r,)``: the same at every token; of "force" also ``(batch, positions, groups, r)``.
        positions: where, counted from 0 at the beginning of the sequence; None is everywhere.
        group: of the codebook's groups (heads) the one that is meant; None is all.
        count: of "pass over", how many codes.
    """

    kind: Kind
    codes: Int[Tensor, "*shape"]
    positions: tuple[int, ...] | None = None
    group: int | None = None
    count: int = 0


def force(codes: Codes, positions: Iterable[int] | int | None = None, group: int | None = None) -> Edit:
    """Make the model use these codes.

    Fewer than k of them take the places of the least similar ones. A code that the model has chosen anyway
    keeps its place.

    Args:
        codes: one id, several, or a tensor ``(batch, positions, groups, r)`` of ids as `CodebookModel.codes`
            gives them (batch may be 1; groups is 1 with a `group`).
        positions: where, counted from 0; everywhere if not given.
        group: one of the codebook's groups; all if not given.
    """
    return _edit("force", codes, positions, group)


def ban(codes: Codes, positions: Iterable[int] | int | None = None, group: int | None = None) -> Edit:
    """Make the model do without these codes: the next best take their places. Arguments as of `force`."""
    return _edit("ban", codes, positions, group)


def zero(codes: Codes, positions: Iterable[int] | int | None = None, group: int | None = None) -> Edit:
    """Drop these codes where they are chosen, without replacement; the others keep their weight 1/k.

    Arguments as of `force`.
    """
    return _edit("zero", codes, positions, group)


def pass_over(count: int, positions: Iterable[int] | int | None = None, group: int | None = None) -> Edit:
    """Do without the `count` most similar codes, whichever they are: the next best take their places."""
    if count < 1:
        raise DataError(f"count is {count}; pass over at least one code.")
    edit = _edit("pass over", (), positions, group)
    return Edit(edit.kind, edit.codes, edit.positions, group, count)


def _edit(kind: Kind, codes: Codes, positions: Iterable[int] | int | None, group: int | None) -> Edit:
    ids = torch.as_tensor(codes, dtype=torch.long) if not isinstance(codes, Tensor) else codes.long()
    ids = ids.reshape(1) if ids.ndim == 0 else ids
    if ids.ndim not in (1, 4) or (ids.ndim == 4 and kind != "force"):
        raise DataError(
            f"codes to {kind} have shape {tuple(ids.shape)}; give ids (r,)"
            + (", or (batch, positions, groups, r)." if kind == "force" else ".")
        )
    places = (positions,) if isinstance(positions, int) else positions
    places = None if places is None else tuple(int(p) for p in places)
    if places is not None and (not places or min(places) < 0 or len(set(places)) < len(places)):
        raise DataError(f"positions are {list(places)}; give different ones, counted from 0.")
    return Edit(kind, ids, places, group)


def check(edit: Edit, site: str, n_codes: int, k: int, groups: int) -> None:
    """Refuse an edit that the codebook of a site cannot follow.

    Raises:
        DataError: if an id or the group does not exist, or too few codes would be left.
    """
    if edit.codes.numel() and not 0 <= int(edit.codes.min()) <= int(edit.codes.max()) < n_codes:
        wrong = edit.codes[(edit.codes < 0) | (edit.codes >= n_codes)].flatten()[0]
        raise DataError(f"site {site!r} has no code {int(wrong)}; its ids are 0 to {n_codes - 1}.")
    if edit.group is not None and not 0 <= edit.group < groups:
        raise DataError(f"site {site!r} has no group {edit.group}; it has {groups}, counted from 0.")
    if edit.kind == "force" and edit.codes.shape[-1] > k:
        raise DataError(
            f"site {site!r} has {k} codes per token and {edit.codes.shape[-1]} are forced; force at most {k}."
        )
    if edit.codes.ndim == 4 and edit.codes.shape[2] != (groups if edit.group is None else 1):
        raise DataError(
            f"the codes forced at {site!r} are of {edit.codes.shape[2]} groups; it has {groups} "
            "(1 where a group is named)."
        )
    lost = edit.count + (len(edit.codes.unique()) if edit.kind == "ban" else 0)
    if n_codes - lost < k:
        raise DataError(f"site {site!r} would have {n_codes - lost} codes left, and needs {k}; ban fewer.")


@dataclass(frozen=True)
class TokenEdit:
    """An edit for one forward pass, whose tokens are numbered row by row.

    Attributes:
        kind: as of `Edit`.
        rows: which tokens, ``(tokens,)``.
        groups: which groups.
        codes: ids ``(r,)``, or of "force" ``(chosen tokens, chosen groups, r)``.
        passed_over: how many of the best codes are passed over.
    """

    kind: Kind
    rows: Bool[Tensor, " tokens"]
    groups: slice
    codes: Int[Tensor, "*shape"]
    passed_over: int = 0


def resolve(edit: Edit, shape: Sequence[int], offset: int, device: torch.device) -> TokenEdit | None:
    """What an edit means for the tokens of one forward pass; None if it is about none of them.

    Args:
        edit: the edit.
        shape: of the tokens, ``(batch,)`` or ``(batch, ..., length)``.
        offset: position of the first token of the pass.
        device: of the result.

    Raises:
        DataError: if the edit names positions and there are none, or is of another batch.
    """
    groups = slice(None) if edit.group is None else slice(edit.group, edit.group + 1)
    codes = edit.codes.to(device)
    if edit.positions is None and codes.ndim == 1:
        rows = torch.ones(shape, dtype=torch.bool, device=device).flatten()
        return TokenEdit(edit.kind, rows, groups, codes, edit.count)
    if len(shape) != 2:
        raise DataError(
            f"an edit names positions, and the activation has the dimensions {tuple(shape)} before its last; "
            "positions are of activations (batch, length, dim)."
        )
    batch, length = shape
    places = torch.tensor(edit.positions if edit.positions is not None else range(offset, offset + length))
    here = (places >= offset) & (places < offset + length)
    if not here.any():
        return None
    mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
    mask[:, (places[here] - offset).to(device)] = True
    if codes.ndim == 4:
        if len(codes) not in (1, batch) or codes.shape[1] not in (1, len(places)):
            raise DataError(
                f"the forced codes are {tuple(codes.shape)} for a batch of {batch} and {len(places)} "
                "positions; give (batch, positions, groups, r), with 1 for what is the same."
            )
        wanted = codes.expand(batch, len(places), -1, -1)[:, here.to(device)]
        codes = wanted[:, places[here].argsort().to(device)].flatten(0, 1)
    return TokenEdit(edit.kind, mask.flatten(), groups, codes, edit.count)


# -- what the layer does with them ---------------------------------------------------------------------------


def apply_bans(scores: Tensor, edits: Sequence[TokenEdit], start: int, first: int) -> None:
    """Set the scores ``(groups, rows, codes)`` of banned codes to -inf, in place.

    The rows are those from `start`, the codes those from `first`.
    """
    _, rows, codes = scores.shape
    for edit in edits:
        if edit.kind == "ban":
            mine = edit.codes[(edit.codes >= first) & (edit.codes < first + codes)] - first
            banned = torch.zeros(codes, dtype=torch.bool, device=scores.device)
            banned[mine] = True
            mask = edit.rows[start : start + rows, None] & banned
            scores[edit.groups] = scores[edit.groups].masked_fill(mask, -torch.inf)


def apply_forces(
    ranked: Int[Tensor, "tokens groups more"], k: int, edits: Sequence[TokenEdit]
) -> Int[Tensor, "tokens groups k"]:
    """Of the best codes the k that are used: without those passed over, and with those forced."""
    ids = ranked[..., :k].clone() if edits else ranked[..., :k]
    for edit in edits:
        if edit.passed_over:
            later = ranked[..., edit.passed_over : edit.passed_over + k]
            ids[edit.rows, edit.groups] = later[edit.rows, edit.groups]
    for edit in edits:
        if edit.kind == "force":
            chosen = ids[edit.rows, edit.groups]
            wanted = edit.codes.expand(*chosen.shape[:2], -1)
            ids[edit.rows, edit.groups] = _place(chosen, wanted)
    return ids


def _place(chosen: Tensor, wanted: Tensor) -> Tensor:
    """Put each wanted code that was not chosen into the last place that holds no wanted one."""
    k = chosen.shape[-1]
    for j in range(wanted.shape[-1]):
        code = wanted[..., j : j + 1]
        free = (chosen[..., None] != wanted[..., None, :]).all(-1)
        last = k - 1 - free.flip(-1).long().argmax(-1, keepdim=True)
        absent = (chosen != code).all(-1, keepdim=True)
        chosen = torch.where(absent, chosen.scatter(-1, last, code), chosen)
    return chosen


def kept_slots(ids: Int[Tensor, "tokens groups k"], edits: Sequence[TokenEdit]) -> Tensor | None:
    """Which of the chosen codes are not dropped; None if nothing is to be dropped."""
    drops = [edit for edit in edits if edit.kind == "zero"]
    if not drops:
        return None
    kept = torch.ones_like(ids, dtype=torch.bool)
    for edit in drops:
        dropped = edit.rows[:, None, None] & torch.isin(ids[:, edit.groups], edit.codes)
        kept[:, edit.groups] &= ~dropped
    return kept
