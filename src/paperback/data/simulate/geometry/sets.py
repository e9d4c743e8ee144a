"""Random sets of points with their answers, as a pointer network is taught them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.data.simulate.geometry.delaunay import delaunay
from paperback.data.simulate.geometry.hull import follow, hull_successors
from paperback.data.simulate.geometry.tours import canonical_tour, farthest_insertion, held_karp, two_opt
from paperback.errors import DataError

STOP, PAD = 0, -1  # in targets; the points are 1 .. n


class PointSets(NamedTuple):
    """A batch of point sets with their answers.

    Attributes:
        points: coordinates, uniform in the unit square, 0 beyond each set's length.
        targets: indices from 1, then 0 for "stop", then -1.
        lengths: number of points of each set.
    """

    points: Float[Tensor, "batch n 2"]
    targets: Int[Tensor, "batch m"]
    lengths: Int[Tensor, " batch"]


def hull_batch(n: int | tuple[int, int], size: int, seed: int | torch.Generator = 0) -> PointSets:
    """Random sets with their convex hulls: counter-clockwise from the vertex of lowest index.

    Args:
        n: points in each set, >= 3; or (fewest, most), and each set's number is drawn between them.
        size: number of sets.
        seed: of the draws, or a generator that they come from.

    Returns:
        The sets; a set with duplicate or collinear points on its hull is drawn again.

    Raises:
        DataError: if n or size is out of range.
    """
    generator = _generator(seed)
    points, lengths = _draw(n, size, generator, least=3)
    real = torch.arange(points.shape[1]) < lengths[:, None]
    successor, sound = hull_successors(points, real)
    while not sound.all():
        again = ~sound
        fresh = torch.rand(points[again].shape, generator=generator) * real[again][..., None]
        points[again] = fresh
        successor[again], sound[again] = hull_successors(fresh, real[again])
    return PointSets(points, to_targets(follow(successor)), lengths)


def delaunay_batch(n: int | tuple[int, int], size: int, seed: int | torch.Generator = 0) -> PointSets:
    """Random sets with their Delaunay triangulations, triple after triple; see `delaunay` for the order.

    Args:
        n: points in each set, >= 3; or (fewest, most).
        size: number of sets.
        seed: of the draws, or a generator that they come from.

    Raises:
        DataError: if n or size is out of range.
    """
    points, lengths = _draw(n, size, _generator(seed), least=3)
    return PointSets(points, to_targets(delaunay(points, lengths).flatten(1)), lengths)


def tsp_batch(
    n: int | tuple[int, int],
    size: int,
    seed: int | torch.Generator = 0,
    solver: Literal["exact", "two-opt"] = "exact",
) -> PointSets:
    """Random sets with a tour: from point 1 in the direction whose second point has the lower index.

    Args:
        n: points in each set; or (fewest, most).
        size: number of sets.
        seed: of the draws, or a generator that they come from.
        solver: "exact" takes Held and Karp's shortest tour, for at most 13 points; "two-opt" improves
            farthest insertion.

    Raises:
        DataError: if an argument is out of range.
    """
    points, lengths = _draw(n, size, _generator(seed), least=1)
    if solver == "exact":
        order = held_karp(points, lengths)
    elif solver == "two-opt":
        order = canonical_tour(two_opt(points, farthest_insertion(points, lengths)))
    else:
        raise DataError(f'solver is {solver!r}; it must be "exact" or "two-opt".')
    return PointSets(points, to_targets(order), lengths)


def to_targets(order: Int[Tensor, "batch m"]) -> Int[Tensor, "batch m+1"]:
    """An answer as a pointer network is taught it.

    Args:
        order: indices from 0, -1 after the last.

    Returns:
        Indices from 1, 0 for "stop" after the last, then -1.
    """
    ended = torch.nn.functional.pad(order + 1, (0, 1))
    after = (ended == STOP).cumsum(1) > 1
    return ended.masked_fill(after, PAD)


def _generator(seed: int | torch.Generator) -> torch.Generator:
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def _draw(
    n: int | tuple[int, int], size: int, generator: torch.Generator, least: int
) -> tuple[Tensor, Tensor]:
    low, high = (n, n) if isinstance(n, int) else n
    if not least <= low <= high:
        raise DataError(f"n is {n}; give a number >= {least}, or (fewest, most) with fewest <= most.")
    if size < 1:
        raise DataError(f"size is {size}; ask for at least one set.")
    lengths = torch.randint(low, high + 1, (size,), generator=generator)
    points = torch.rand(size, high, 2, generator=generator)
    return points * (torch.arange(high) < lengths[:, None])[..., None], lengths
