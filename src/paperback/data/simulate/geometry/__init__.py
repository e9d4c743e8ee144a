"""Sets of points in the plane with exact answers: convex hulls, Delaunay triangulations, shortest tours.

The solvers are the truth of a study and the engine of its training data. They work on padded batches, points
``(batch, n, 2)`` with ``lengths`` real ones per set, and answer with indices from 0, -1 after the last. The
samplers (`hull_batch`, `delaunay_batch`, `tsp_batch`) give the answers as a pointer network is taught them:
indices from 1, 0 for "stop", -1 after it, in one canonical order.

    points, targets, lengths = hull_batch((5, 10), size=128, seed=0)

Source of the tasks and of their canonical orders: Vinyals, Fortunato and Jaitly, Pointer networks (NeurIPS
2015, arXiv 1506.03134), section 3.
"""

from paperback.data.simulate.geometry.delaunay import delaunay
from paperback.data.simulate.geometry.hull import convex_hull, is_simple, polygon_area
from paperback.data.simulate.geometry.sets import (
    PAD,
    STOP,
    PointSets,
    delaunay_batch,
    hull_batch,
    to_targets,
    tsp_batch,
)
from paperback.data.simulate.geometry.tours import (
    canonical_tour,
    farthest_insertion,
    held_karp,
    nearest_neighbour,
    tour_length,
    two_opt,
)

__all__ = [
    "PAD",
    "STOP",
    "PointSets",
    "canonical_tour",
    "convex_hull",
    "delaunay",
    "delaunay_batch",
    "farthest_insertion",
    "held_karp",
    "hull_batch",
    "is_simple",
    "nearest_neighbour",
    "polygon_area",
    "to_targets",
    "tour_length",
    "tsp_batch",
    "two_opt",
]
