"""Delaunay triangulations of many sets, by scipy's Qhull, in the canonical order of the pointer networks."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import Delaunay, QhullError
from torch import Tensor

from paperback.data.simulate.geometry.padding import real_points
from paperback.errors import DataError


def delaunay(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch m 3"]:
    """The triangles of each set's Delaunay triangulation.

    Each triple is in increasing order; triangles are ordered by their in-centres, first by x, then by y.

    Args:
        points: coordinates, at least 3 points in each set, no two at the same place, not all on a line. Where
            four lie on an empty circle the triangulation is not unique; one of them is returned.
        lengths: number of real points of each set; all if not given.

    Returns:
        Indices from 0, -1 after the last triangle; int64 on the device of the points.

    Raises:
        DataError: if a set is too small, or has duplicates, or lies on a line.
    """
    counts = real_points(points, lengths, least=3).sum(1).tolist()
    sets = points.detach().cpu().double().numpy()
    found = [
        _triangles(coordinates[:n], i) for i, (coordinates, n) in enumerate(zip(sets, counts, strict=True))
    ]
    result = np.full((len(found), max((len(t) for t in found), default=0), 3), -1)
    for i, triangles in enumerate(found):
        result[i, : len(triangles)] = triangles
    return torch.from_numpy(result).to(points.device)


def _triangles(coordinates: np.ndarray, i: int) -> np.ndarray:
    try:
        triangulation = Delaunay(coordinates)
    except QhullError as error:
        raise DataError(
            f"set {i} has no Delaunay triangulation: its points lie on a line or at one place; give points "
            "in general position."
        ) from error
    if len(triangulation.coplanar):
        twice = int(triangulation.coplanar[0, 0])
        raise DataError(f"point {twice} of set {i} stands twice, or nearly so; remove duplicates.")
    triples = np.sort(triangulation.simplices, axis=1).astype(np.int64)
    x, y = _incentres(coordinates[triples]).T
    return triples[np.lexsort((y, x))]


def _incentres(corners: np.ndarray) -> np.ndarray:
    """Centres of inscribed circles ``(triangles, 2)``: corners weighted by the opposite side's length."""
    opposite = np.linalg.norm(np.roll(corners, -1, 1) - np.roll(corners, -2, 1), axis=2)
    centres: np.ndarray = (opposite[..., None] * corners).sum(1) / opposite.sum(1)[:, None]
    return centres
