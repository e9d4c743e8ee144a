"""How answers are measured: the paper's numbers for hulls, triangulations and tours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from paperback.data.simulate.geometry import is_simple, polygon_area, tour_length
from paperback.errors import DataError
from paperback.layers.pointer_network.checks import PAD, STOP, check_targets
from paperback.layers.pointer_network.learning import to_order

if TYPE_CHECKING:
    from paperback.layers.pointer_network.model import PointerNetwork

# (points, decoded, targets) -> numbers; decoded and targets hold indices 1 .. n, 0 for "stop", -1 after it.
Measure = Callable[[Tensor, Tensor, Tensor], dict[str, float]]
Metric = Literal["hull", "delaunay", "tsp"] | Measure

ROWS = 1000  # inputs decoded at a time
FAIL = 0.01  # share of polygons that may cross themselves before the paper calls an area a failure


def score(
    model: PointerNetwork, points: Tensor, targets: Tensor, metric: Metric, lengths: Tensor | None,
    **decoding: Any,
) -> dict[str, float]:  # fmt: skip
    """Decode inputs and compare with their true outputs.

    Args:
        model: the network.
        points: the elements of each input.
        targets: the true outputs.
        metric: "hull", "delaunay" or "tsp" (see the functions of this module), or a function ``(points,
            decoded, targets) -> numbers``.
        lengths: real elements of each input; all if not given.
        **decoding: arguments of `PointerNetwork.decode`. For "tsp" the constraint is "permutation" and for
            "delaunay" "triangles", if not given.

    Returns:
        The numbers of the metric, and "unfinished", the share of outputs without end.

    Raises:
        DataError: if there is no such metric, or the inputs do not fit.
    """
    if isinstance(metric, str) and metric not in MEASURES:
        raise DataError(f"metric is {metric!r}; it must be one of {', '.join(MEASURES)}, or a function.")
    measure = MEASURES[metric] if isinstance(metric, str) else metric
    lengths = model.check(points, lengths)
    check_targets(targets, lengths, model.stop)
    if metric == "tsp":
        decoding = {"constraint": "permutation"} | decoding
    if metric == "delaunay":  # n points have 2n - 5 triangles at most
        decoding = {"constraint": "triangles", "max_len": 3 * max(1, 2 * points.shape[1] - 5) + 1} | decoding
    parts = [
        model.decode(p, n, **decoding) for p, n in zip(points.split(ROWS), lengths.split(ROWS), strict=True)
    ]
    decoded = joined([part.indices for part in parts])
    finished = torch.cat([part.finished for part in parts])
    return measure(points, decoded, targets) | {"unfinished": 1 - float(finished.double().mean())}


def joined(parts: list[Tensor]) -> Tensor:
    """Outputs of several batches as one tensor, padded with -1."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[1]), value=PAD) for part in parts])


def hull_measures(points: Tensor, decoded: Tensor, targets: Tensor) -> dict[str, float]:
    """The paper's measures of convex hulls.

    Returns:
        "accuracy": share of inputs whose polygon is right, wherever it begins; "area": area of the predicted
        polygons over that of the true ones, over inputs whose predicted polygon is simple (NaN if none is);
        "not_simple": share of the others, where edges cross or vertices are fewer than three or stand twice;
        "fail": 1 if that is more than 1 %, for which the paper prints FAIL.
    """
    predicted, true = to_order(decoded), to_order(targets)
    right = rotated(predicted) == rotated(true) if predicted.shape[1] == true.shape[1] else None
    if right is None:
        width = max(predicted.shape[1], true.shape[1])
        predicted, true = (F.pad(x, (0, width - x.shape[1]), value=-1) for x in (predicted, true))
        right = rotated(predicted) == rotated(true)
    ended = (decoded == STOP).any(1) | ~(targets == STOP).any(1)
    exact = right.all(1) & ended
    simple = is_simple(points, predicted)
    areas = polygon_area(points, predicted)[simple].sum(), polygon_area(points, true)[simple].sum()
    crossed = 1 - float(simple.double().mean())
    return {
        "accuracy": float(exact.double().mean()),
        "area": float(areas[0] / areas[1]),
        "not_simple": crossed,
        "fail": float(crossed > FAIL),
    }


def rotated(order: Tensor) -> Tensor:
    """Cycles of indices from 0, -1 after the last, turned so that the lowest index comes first."""
    count = (order >= 0).sum(1, keepdim=True).clamp_min(1)
    lowest = order.masked_fill(order < 0, order.shape[1] + int(order.max()) + 1).argmin(1, keepdim=True)
    position = torch.arange(order.shape[1], device=order.device)[None]
    return order.gather(1, (lowest + position) % count).masked_fill(order < 0, -1)


def delaunay_measures(points: Tensor, decoded: Tensor, targets: Tensor) -> dict[str, float]:
    """The paper's measures of triangulations.

    Returns:
        "accuracy": share of inputs whose set of triangles is right; "coverage": share of the true triangles
        that are found.
    """
    n = points.shape[1]
    found, true = _triangle_table(decoded, n), _triangle_table(targets, n)
    return {
        "accuracy": float((found == true).all(1).double().mean()),
        "coverage": int((found & true).sum()) / int(true.sum()),
    }


def _triangle_table(targets: Tensor, n: int) -> Tensor:
    """Which triangles of n points an output names, ``(batch, n^3)``; an odd rest counts as a wrong one."""
    order = to_order(targets)
    order = F.pad(order, (0, -order.shape[1] % 3), value=-1).unflatten(1, (-1, 3))
    corners = order.sort(-1).values
    code = (corners[..., 0] * n + corners[..., 1]) * n + corners[..., 2]
    whole, some = (order >= 0).all(-1), (order >= 0).any(-1)
    index = torch.where(whole, code, torch.where(some, n**3, n**3 + 1))
    table = torch.zeros(len(targets), n**3 + 2, dtype=torch.bool, device=targets.device)
    return table.scatter(1, index, True)[:, : n**3 + 1]


def tsp_measures(points: Tensor, decoded: Tensor, targets: Tensor) -> dict[str, float]:
    """Measures of tours.

    Returns:
        "length": mean length of the decoded tours that visit every point; "gap": by how much their mean
        exceeds that of the true tours of the same inputs, as a fraction; "invalid": share of the others.
    """
    order, true = to_order(decoded), to_order(targets)
    width = max(order.shape[1], true.shape[1])
    order, true = (F.pad(x, (0, width - x.shape[1]), value=-1) for x in (order, true))
    valid = (order.sort(1).values == true.sort(1).values).all(1)
    lengths, best = tour_length(points, order)[valid], tour_length(points, true)[valid]
    return {
        "length": float(lengths.mean()),
        "gap": float(lengths.mean() / best.mean() - 1),
        "invalid": 1 - float(valid.double().mean()),
    }


MEASURES: dict[str, Measure] = {"hull": hull_measures, "delaunay": delaunay_measures, "tsp": tsp_measures}
