"""Convex hulls of many sets at once, areas of polygons, and whether a polygon crosses itself.

The hull is found in O(n^2) for each set, without a loop over sets or points: seen from a vertex i of the
hull, the next vertex counter-clockwise is the first point that a ray meets when it turns from the outward
direction. Whether i -> j is an edge is then decided by its definition, all other points strictly to the left:

    (P_j - P_i) x (P_k - P_i) > 0   for all k

in float64, which is exact for float32 coordinates of like size.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from paperback.data.simulate.geometry.padding import ELEMENTS, check_index, real_points, take
from paperback.errors import DataError


def convex_hull(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch m"]:
    """The vertices of each set's convex hull, counter-clockwise from the vertex of lowest index.

    Args:
        points: coordinates, any floating dtype; at least 3 points in general position in each set.
        lengths: number of real points of each set; all if not given.

    Returns:
        Indices from 0, -1 after the last vertex; int64.

    Raises:
        DataError: if a set is too small, or its hull has duplicate or collinear points.
    """
    successor, sound = hull_successors(points, real_points(points, lengths, least=3))
    if not sound.all():
        i = int((~sound).nonzero()[0])
        raise DataError(
            f"set {i} is not in general position: on its hull two points coincide or three lie on a line, so "
            "its vertices are ambiguous; remove duplicates, or move the points by a little noise."
        )
    return follow(successor)


def hull_successors(
    points: Float[Tensor, "batch n 2"], real: Bool[Tensor, "batch n"]
) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, " batch"]]:
    """The next vertex counter-clockwise from each vertex of the hull.

    Args:
        points: coordinates.
        real: which points count.

    Returns:
        Indices, -1 at points inside; and for each set whether its hull is a closed polygon (it is not where
        points coincide or lie on a line).
    """
    rows = max(1, ELEMENTS // points.shape[1] ** 2)
    parts = [_successors(p.double(), r) for p, r in zip(points.split(rows), real.split(rows), strict=True)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _successors(points: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    n = points.shape[1]
    centre = (points * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
    outward = (points - centre)[:, :, None]
    edge = points[:, None] - points[:, :, None]  # (batch, i, j): from i to j
    angle = torch.atan2(cross(outward, edge), (outward * edge).sum(-1)) % math.tau
    itself = torch.eye(n, dtype=torch.bool, device=points.device)
    successor = angle.masked_fill(itself | ~real[:, None], torch.inf).argmin(-1)
    along = edge.gather(2, successor[..., None, None].expand(-1, -1, -1, 2))
    here = torch.arange(n, device=points.device) == successor[..., None]
    vertex = ((cross(along, edge) > 0) | here | itself | ~real[:, None]).all(-1) & real
    # A missing edge leaves the vertex before it with a successor that has none.
    closed = vertex.gather(1, successor) | ~vertex
    sound = (vertex.sum(1) >= 3) & closed.all(1)
    return torch.where(vertex, successor, -1), sound


def follow(successor: Int[Tensor, "batch n"]) -> Int[Tensor, "batch m"]:
    """Cycles as lists: from the lowest index that has a successor, until it comes back; -1 afterwards."""
    count = (successor >= 0).sum(1)
    here = (successor >= 0).int().argmax(1)
    order = []
    for _ in range(int(count.max())):
        order.append(here)
        here = successor.gather(1, here[:, None])[:, 0]
    cycle = torch.stack(order, 1)
    return cycle.masked_fill(torch.arange(cycle.shape[1], device=cycle.device) >= count[:, None], -1)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """z component of the cross product of vectors in the plane, which broadcast."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def polygon_area(
    points: Float[Tensor, "batch n 2"], polygon: Int[Tensor, "batch m"]
) -> Float[Tensor, " batch"]:
    """Area of polygons by the shoelace formula, float64; 0 for fewer than three vertices.

    Args:
        points: coordinates.
        polygon: indices of the vertices in order, -1 after the last. The area has a meaning only where
            `is_simple`.

    Raises:
        DataError: if an index is out of range.
    """
    check_index(polygon, points, "polygon")
    here, there, _ = _edges(points.double(), polygon)
    return cross(here, there).sum(1).abs() / 2


def is_simple(points: Float[Tensor, "batch n 2"], polygon: Int[Tensor, "batch m"]) -> Bool[Tensor, " batch"]:
    """Whether polygons have three vertices or more, none of them twice, and no two edges that meet.

    Args:
        points: coordinates in general position.
        polygon: indices of the vertices in order, -1 after the last.

    Raises:
        DataError: if an index is out of range.
    """
    check_index(polygon, points, "polygon")
    here, there, real = _edges(points.double(), polygon)
    count, m = real.sum(1), polygon.shape[1]
    position = torch.arange(m, device=points.device)
    pair = real[:, :, None] & real[:, None] & (position[:, None] < position)
    twice = (pair & (polygon[:, :, None] == polygon[:, None])).flatten(1).any(1)
    apart = (position[None] - position[:, None])[None]
    neighbours = (apart == 1) | (apart == count[:, None, None] - 1)
    a, b, c, d = here[:, :, None], there[:, :, None], here[:, None], there[:, None]
    astride = cross(b - a, c - a) * cross(b - a, d - a) <= 0
    crossed = astride & (cross(d - c, a - c) * cross(d - c, b - c) <= 0) & pair & ~neighbours
    return (count >= 3) & ~twice & ~crossed.flatten(1).any(1)


def _edges(points: Tensor, polygon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends of each edge ``(batch, m, 2)``, zero where there is none, and where there is one."""
    real = polygon >= 0
    following = polygon.roll(-1, 1)
    following = torch.where(following >= 0, following, polygon[:, :1])  # the last one closes the polygon
    here, there = (take(points, index) * real[..., None] for index in (polygon, following))
    return here, there, real
