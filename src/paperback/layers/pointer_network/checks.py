"""What inputs and targets of a pointer network have to be; a message names the place and the remedy."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.errors import DataError

STOP, PAD = 0, -1  # in outputs; elements are 1 .. n


def check_points(
    points: Float[Tensor, "batch n dim"], lengths: Int[Tensor, " batch"] | None, dim: int
) -> Int[Tensor, " batch"]:
    """Check inputs and return their lengths.

    Raises:
        DataError: if the shape, a length or a feature does not fit.
    """
    if points.ndim != 3 or points.shape[2] != dim or not points.is_floating_point():
        raise DataError(
            f"points have shape {tuple(points.shape)} and dtype {points.dtype}; expected floating point "
            f"(batch, n, {dim})."
        )
    batch, n, _ = points.shape
    if n == 0 or batch == 0:
        raise DataError(f"points have shape {tuple(points.shape)}; there must be something to point at.")
    if lengths is None:
        lengths = torch.full((batch,), n, device=points.device)
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise DataError(f"lengths have shape {tuple(lengths.shape)}; expected {batch} integers, one per row.")
    bad = (lengths < 1) | (lengths > n)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise DataError(f"row {row} has length {int(lengths[row])}; it must lie in 1..{n}, n of the batch.")
    if not points.isfinite().all():
        row, element, feature = (~points.isfinite()).nonzero()[0].tolist()
        raise DataError(
            f"element {element} of row {row} has feature {float(points[row, element, feature])}; features "
            "must be finite, at padding too: remove such rows, or put 0 there."
        )
    return lengths


def check_targets(targets: Int[Tensor, "batch m"], lengths: Int[Tensor, " batch"], stop: bool) -> None:
    """Check outputs against the lengths of their inputs.

    Raises:
        DataError: if an index is out of range, "stop" is missing or not the last entry, or padding is
            followed by something.
    """
    if targets.ndim != 2 or len(targets) != len(lengths) or targets.shape[1] == 0:
        raise DataError(f"targets have shape {tuple(targets.shape)}; expected ({len(lengths)}, m), m >= 1.")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise DataError(f"targets have dtype {targets.dtype}; expected integers (0 is stop, 1..n elements).")
    outside = (targets < PAD) | (targets > lengths[:, None])
    if outside.any():
        row, i = outside.nonzero()[0].tolist()
        raise DataError(
            f"target {i} of row {row} is {int(targets[row, i])}; it must lie in 0..{int(lengths[row])} "
            "(0 is stop, elements count from 1), or be -1 after the end."
        )
    padded = targets == PAD
    if stop:
        wrong = (targets == STOP).sum(1) != 1
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"row {row} of the targets has {int((targets[row] == STOP).sum())} stops; it must have one 0 "
                "after the last element (or build the network with stop=False)."
            )
        ended = (targets == STOP).int().cumsum(1) - (targets == STOP).int() > 0
        wrong = (ended != padded).any(1)
    else:
        if (targets == STOP).any():
            row = int((targets == STOP).any(1).nonzero()[0])
            raise DataError(f"row {row} of the targets has a stop, 0; this network was built without one.")
        wrong = padded[:, 0] | (padded[:, :-1] & ~padded[:, 1:]).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise DataError(f"row {row} of the targets goes on after its end; put -1 there, and only there.")
