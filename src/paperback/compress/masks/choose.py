"""Which weights are kept: the best of a tensor, of each row, or of each block of M (N:M).

Ties go to the entry that stands first, so that a mask never depends on the machine.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.errors import DataError

MOST_PATTERNS = 20_000  # C(16, 8) = 12,870; beyond this an N:M pattern is not something to enumerate
_SLACK = 1e-9  # 0.7 * 10 is 6.999...: a product that close to a whole number is meant to be it


def topk_mask(scores: Float[Tensor, "..."], kept: int, *, name: str = "scores") -> Bool[Tensor, "..."]:
    """Keep exactly the `kept` largest scores of a tensor.

    Args:
        scores: finite, any shape.
        kept: how many, 0..scores.numel().
        name: of the layer, for messages.

    Returns:
        The mask, of the shape of scores.

    Raises:
        DataError: if kept is out of range, or a score is not finite.
    """
    return row_mask(scores.reshape(1, -1), kept, name=name).reshape(scores.shape)


def row_mask(
    scores: Float[Tensor, "rows columns"], kept: int, *, name: str = "scores"
) -> Bool[Tensor, "rows columns"]:
    """Keep exactly the `kept` largest scores of each row.

    Args:
        scores: finite.
        kept: how many of each row, 0..columns.
        name: of the layer, for messages.

    Returns:
        The mask.

    Raises:
        DataError: if kept is out of range, or a score is not finite.
    """
    _check_finite(scores, name)
    if not 0 <= kept <= scores.shape[-1]:
        raise DataError(f"{name}: {kept} weights cannot be kept of {scores.shape[-1]}.")
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if kept == 0:
        return mask
    # A stable sort would settle ties but costs more than a selection: everything above the kept-th value is
    # in, and of those equal to it the first ones fill what is missing.
    edge = scores.kthvalue(scores.shape[-1] - kept + 1, dim=-1, keepdim=True).values
    mask = scores > edge
    missing = kept - mask.sum(dim=-1, keepdim=True)
    tied = scores == edge
    return mask | (tied & (tied.cumsum(dim=-1) <= missing))


def nm_mask(
    scores: Float[Tensor, "rows columns"], n: int, m: int, *, name: str = "scores"
) -> Bool[Tensor, "rows columns"]:
    """Keep exactly the n largest scores of every m neighbours in a row.

    Args:
        scores: finite; columns must be a multiple of m.
        n: kept of each block, 1..m.
        m: size of a block.
        name: of the layer, for messages.

    Returns:
        The mask.

    Raises:
        DataError: if n:m is not a pattern, m does not divide the columns, or a score is not finite.
    """
    check_nm_fits(scores.shape[-1], n, m, name=name)
    return row_mask(scores.reshape(-1, m), n, name=name).reshape(scores.shape)


@lru_cache
def _patterns(n: int, m: int) -> Tensor:
    rows = torch.zeros(math.comb(m, n), m)
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        rows[row, list(kept)] = 1
    return rows


def nm_patterns(n: int, m: int) -> Float[Tensor, "patterns m"]:
    """All C(m, n) patterns of n kept among m, as rows of 0 and 1 in float32.

    They stand in lexicographic order of the kept positions: row 0 keeps the first n.

    Raises:
        DataError: if n:m is not a pattern, or there are more than 20,000 of them.
    """
    check_pattern(n, m)
    if math.comb(m, n) > MOST_PATTERNS:
        raise DataError(f"{n}:{m} has {math.comb(m, n):,} patterns, too many to list; choose a smaller M.")
    return _patterns(n, m).clone()


def row_kept(columns: int, density: float, *, name: str = "the layer") -> int:
    """How many weights of a row a density keeps: the whole part of density times columns.

    Args:
        columns: weights in a row.
        density: share of the weights that are kept, in (0, 1].
        name: of the layer, for messages.

    Returns:
        A count in 1..columns; less than columns when density < 1.

    Raises:
        DataError: if the density is out of range, or no weight of a row would be left.
    """
    check_density(density)
    kept = whole(density * columns)
    if kept < 1:
        raise DataError(
            f"{name} has {columns} weights in a row, of which a density of {density:g} keeps none; "
            f"give at least {1 / columns:.2g}."
        )
    return kept


def check_rows(mask: Bool[Tensor, "rows columns"], *, name: str = "mask") -> int:
    """How many weights every row keeps.

    Raises:
        DataError: if it is not a bool matrix, or two rows keep different numbers.
    """
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise DataError(f"{name} is {tuple(mask.shape)} {mask.dtype}; a mask is a bool matrix (out, in).")
    kept = mask.sum(dim=1)
    least, most = int(kept.min()), int(kept.max())
    if least != most:
        raise DataError(
            f"the rows of {name} keep between {least} and {most} weights; each must keep as many."
        )
    return least


def check_nm(mask: Bool[Tensor, "rows columns"], n: int, m: int, *, name: str = "mask") -> None:
    """Check that every block of m neighbours keeps exactly n.

    Raises:
        DataError: if it does not, or m does not divide the columns.
    """
    check_pattern(n, m)
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] % m:
        raise DataError(f"{name} is {tuple(mask.shape)} {mask.dtype}, not a bool matrix of blocks of {m}.")
    wrong = int((mask.reshape(-1, m).sum(dim=1) != n).sum())
    if wrong:
        raise DataError(f"{wrong} blocks of {name} do not keep exactly {n} of {m}.")


def check_pattern(n: int, m: int) -> None:
    """Check that n of m is a pattern.

    Raises:
        DataError: if not.
    """
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m):
        raise DataError(f"the pattern {n}:{m} does not exist; n of m weights are kept, 1 <= n <= m.")


def check_nm_fits(columns: int, n: int, m: int, *, name: str) -> None:
    """Check that rows of so many weights can be n:m.

    Raises:
        DataError: if n:m is not a pattern, or m does not divide the columns.
    """
    check_pattern(n, m)
    if columns % m:
        raise DataError(
            f"{name} has {columns} inputs, which blocks of {m} do not fill; "
            f"leave the layer out (ignore=) or choose an M that divides {columns}."
        )


def check_density(density: float) -> None:
    """Check that a density is one.

    Raises:
        DataError: if it is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise DataError(f"density is {density}; it is the share of weights kept, in (0, 1].")


def whole(number: float) -> int:
    """The whole part of a product that is exact up to rounding: 0.7 * 10 is 7."""
    return math.floor(number + _SLACK * max(1.0, number))


def _check_finite(scores: Tensor, name: str) -> None:
    if not bool(torch.isfinite(scores).all()):
        raise DataError(f"{name} has scores that are not finite; look for NaN in the weights or the data.")
