"""Padded batches of point sets: the checks, and the mask of the real points."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.errors import DataError

ELEMENTS = 2**22  # of the largest intermediate tensor: 32 MB in float64


def real_points(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None, least: int = 1
) -> Bool[Tensor, "batch n"]:
    """Check a batch of point sets and say which of its points are real.

    Args:
        points: finite coordinates, floating point.
        lengths: number of real points of each set, the first ones; all are real if not given.
        least: fewest points that make sense.

    Returns:
        True at real points.

    Raises:
        DataError: naming what does not fit.
    """
    if points.ndim != 3 or points.shape[2] != 2 or not points.is_floating_point():
        raise DataError(
            f"points have shape {tuple(points.shape)} and dtype {points.dtype}; expected floating point "
            "(batch, n, 2); for a single set give points[None]."
        )
    batch, n, _ = points.shape
    if lengths is None:
        lengths = torch.full((batch,), n, device=points.device)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise DataError(f"lengths have shape {tuple(lengths.shape)}; expected one integer for each set.")
    bad = (lengths < least) | (lengths > n)
    if bad.any():
        i = int(bad.nonzero()[0])
        raise DataError(f"set {i} has {int(lengths[i])} points; it must have {least} to {n}, n of the batch.")
    real = torch.arange(n, device=points.device) < lengths[:, None]
    broken = ~points.isfinite().all(2) & real
    if broken.any():
        i, j = broken.nonzero()[0].tolist()
        raise DataError(f"point {j} of set {i} is {points[i, j].tolist()}; coordinates must be finite.")
    return real


def take(points: Tensor, index: Tensor) -> Tensor:
    """Points by index, ``(batch, m, 2)``; what an index of -1 gives has no meaning."""
    return points.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, 2))


def check_index(index: Tensor, points: Tensor, name: str) -> None:
    """Refuse indices that are not one row per set, in -1 .. n-1."""
    if index.ndim != 2 or len(index) != len(points) or index.is_floating_point():
        raise DataError(f"{name} has shape {tuple(index.shape)}; expected integers ({len(points)}, m).")
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < points.shape[1]:
        raise DataError(
            f"{name} holds indices {int(index.min())} to {int(index.max())}; they must lie in "
            f"0..{points.shape[1] - 1}, or be -1 after the last."
        )
