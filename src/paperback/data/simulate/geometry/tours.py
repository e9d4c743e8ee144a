"""Shortest tours through points: exact by Held and Karp, and the usual heuristics, a batch at a time.

Held and Karp (1962): with D(S, j) the length of the shortest path from point 0 through all of S to j in S,

    D(S, j) = min over i in S without j of  D(S without j, i) + d(i, j)

evaluated for all sets S of one size, all j and all rows of the batch in one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from paperback.data.simulate.geometry.hull import follow
from paperback.data.simulate.geometry.padding import ELEMENTS, check_index, real_points, take
from paperback.errors import DataError

LARGEST_EXACT = 13  # points; the table of partial paths doubles with each one


def tour_length(points: Float[Tensor, "batch n 2"], order: Int[Tensor, "batch m"]) -> Float[Tensor, " batch"]:
    """Length of closed tours, float64.

    Args:
        points: coordinates.
        order: indices of the points in order, -1 after the last.

    Raises:
        DataError: if an index is out of range.
    """
    check_index(order, points, "order")
    real = order >= 0
    following = order.roll(-1, 1)
    following = torch.where(following >= 0, following, order[:, :1])
    steps = take(points.double(), order) - take(points.double(), following)
    return (steps.norm(dim=2) * real).sum(1)


def canonical_tour(order: Int[Tensor, "batch m"]) -> Int[Tensor, "batch m"]:
    """The same tours from point 0, in the direction whose second point has the lower index.

    Args:
        order: permutations of 0 .. length-1, -1 after the last.

    Returns:
        Tours of the same cities and length.
    """
    count = (order >= 0).sum(1, keepdim=True)
    position = torch.arange(order.shape[1], device=order.device)[None]
    start = (order == 0).int().argmax(1, keepdim=True)
    last = order.shape[1] - 1

    def turned(sign: int) -> Tensor:
        index = ((start + sign * position) % count).clamp_max(last)
        return order.gather(1, index).masked_fill(position >= count, -1)

    forward, backward = turned(1), turned(-1)
    second = min(1, last)
    return torch.where((forward[:, second] <= backward[:, second])[:, None], forward, backward)


# -- exact ---------------------------------------------------------------------------------------------------


def held_karp(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch n"]:
    """Shortest tours, exact up to float64 rounding, in canonical order. O(2^n n^2) for each set.

    Args:
        points: coordinates.
        lengths: number of real points of each set, at most 13; all if not given.

    Returns:
        Indices from 0, -1 after the last; int64.

    Raises:
        DataError: if a set has more than 13 points.
    """
    counts = real_points(points, lengths).sum(1)
    largest = int(counts.max()) if len(counts) else 0
    if largest > LARGEST_EXACT:
        raise DataError(
            f"a set has {largest} points; held_karp's table of 2^n partial paths is kept for at most "
            f"{LARGEST_EXACT}; use two_opt(points, farthest_insertion(points)) for a good tour instead."
        )
    return canonical_tour(_by_length(_held_karp, points, counts))


def _by_length(solve: Callable[[Tensor], Tensor], points: Tensor, counts: Tensor) -> Tensor:
    """Solve sets of equal length together; the result is padded with -1."""
    order = points.new_full(points.shape[:2], -1, dtype=torch.int64)
    for n in counts.unique().tolist():
        rows = (counts == n).nonzero()[:, 0]
        order[rows, :n] = solve(points[rows, :n].double())
    return order


def _held_karp(points: Tensor) -> Tensor:
    """Sets of one length ``(batch, n, 2)``."""
    n = points.shape[1]
    if n <= 3:  # there is only one tour
        return torch.arange(n, device=points.device).expand(len(points), n)
    rows = max(1, ELEMENTS // (2 ** (n - 1) * (n - 1)))
    return torch.cat([_held_karp_rows(torch.cdist(part, part)) for part in points.split(rows)])


@cache
def _subsets(n: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """For each size k > 1 the subsets of n items: their bit masks ``(subsets,)``, their members ``(subsets,
    k)``, and the masks without each member ``(subsets, k)``.
    """
    tables = []
    for k in range(2, n + 1):
        members = torch.tensor(list(combinations(range(n), k)))
        masks = (1 << members).sum(1)
        tables.append((masks, members, masks[:, None] - (1 << members)))
    return tuple(tables)


def _held_karp_rows(distance: Float[Tensor, "batch n n"]) -> Tensor:
    batch, n, _ = distance.shape
    between, m = distance[:, 1:, 1:], n - 1  # point 0 is where tours begin; the others are 0 .. m-1 here
    shortest = distance.new_full((batch, 2**m, m), torch.inf)
    single = torch.arange(m, device=distance.device)
    shortest[:, 1 << single, single] = distance[:, 0, 1:]
    for table in _subsets(m):
        masks, members, without = (index.to(distance.device) for index in table)
        # (batch, subsets, k, m): paths that end in any i of S without j, and the way from i to j
        paths = shortest[:, without] + between[:, members]
        shortest[:, masks[:, None], members] = paths.amin(-1)
    mask = torch.full((batch,), 2**m - 1, device=distance.device)
    here = (shortest[:, -1] + distance[:, 0, 1:]).argmin(1)
    row, order = torch.arange(batch, device=distance.device), [here]
    for _ in range(m - 1):  # back through the table
        mask = mask - (1 << here)
        here = (shortest[row, mask] + between[row, here]).argmin(1)
        order.append(here)
    tour = torch.stack(order, 1) + 1
    return torch.cat([torch.zeros_like(tour[:, :1]), tour], 1)


# -- heuristics ----------------------------------------------------------------------------------------------


def nearest_neighbour(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch n"]:
    """Tours from point 0 that always go on to the nearest point not yet visited.

    Args:
        points: coordinates.
        lengths: number of real points of each set; all if not given.

    Returns:
        Indices from 0, -1 after the last; int64.
    """
    left = real_points(points, lengths)
    here = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    order, count = [here], left.sum(1, keepdim=True)
    for _ in range(points.shape[1] - 1):
        left = left.scatter(1, here[:, None], False)
        way = (points - take(points, here[:, None])).norm(dim=2)
        here = way.masked_fill(~left, torch.inf).argmin(1)
        order.append(here)
    tour = torch.stack(order, 1)
    return tour.masked_fill(torch.arange(tour.shape[1], device=tour.device) >= count, -1)


def farthest_insertion(
    points: Float[Tensor, "batch n 2"], lengths: Int[Tensor, " batch"] | None = None
) -> Int[Tensor, "batch n"]:
    """Tours that grow by the point farthest from them, put where it lengthens them least.

    Args:
        points: coordinates.
        lengths: number of real points of each set; all if not given.

    Returns:
        Indices from 0, from point 0, -1 after the last; int64.
    """
    left = real_points(points, lengths).clone()
    batch, n = left.shape
    distance, row = torch.cdist(points.double(), points.double()), torch.arange(batch, device=points.device)
    following = torch.full((batch, n), -1, device=points.device)
    following[:, 0], left[:, 0] = 0, False  # a tour of point 0 alone
    away = distance[:, 0]  # of each point from the tour
    for _ in range(n - 1):
        some = left.any(1)
        new = away.masked_fill(~left, -torch.inf).argmax(1)
        to_new = distance[row, new]
        detour = to_new + to_new.gather(1, following.clamp_min(0)) - distance.gather(
            2, following.clamp_min(0)[..., None]
        )[..., 0]  # fmt: skip
        before = detour.masked_fill(following < 0, torch.inf).argmin(1)
        r, new, before = row[some], new[some], before[some]
        following[r, new] = following[r, before]
        following[r, before] = new
        left[r, new] = False
        away = torch.minimum(away, to_new)
    return follow(following)


def two_opt(
    points: Float[Tensor, "batch n 2"], order: Int[Tensor, "batch n"], max_moves: int = 1000
) -> Int[Tensor, "batch n"]:
    """Improve tours by 2-opt: reverse the stretch that shortens a tour most, until none does.

    Args:
        points: coordinates.
        order: tours, -1 after the last point.
        max_moves: most reversals of each tour.

    Returns:
        Tours that are nowhere longer; int64.

    Raises:
        DataError: if an index is out of range.
    """
    check_index(order, points, "order")
    m = order.shape[1]
    count = (order >= 0).sum(1, keepdim=True)
    position = torch.arange(m, device=order.device)
    distance = torch.cdist(points.double(), points.double())
    order, active = order.clone(), torch.arange(len(order), device=order.device)
    for _ in range(max_moves):
        if len(active) == 0:
            break
        gain, first, last = _best_move(distance[active], order[active], count[active])
        better = gain > 1e-12
        active, first, last = active[better], first[better, None], last[better, None]
        inside = (position >= first) & (position <= last)
        source = torch.where(inside, first + last - position, position)
        order[active] = order[active].gather(1, source)
    return order


def _best_move(distance: Tensor, order: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What reversing positions first..last saves at most, and these positions, for each tour."""
    m = order.shape[1]
    position = torch.arange(m, device=order.device)
    here = order.clamp_min(0)
    after = here.gather(1, (position + 1) % count.clamp_min(1))
    pairs = distance.gather(1, here[..., None].expand(-1, -1, distance.shape[2]))
    along = pairs.gather(2, after[..., None])[..., 0]  # tour edge that leaves each position
    across = pairs.gather(2, here[:, None].expand(-1, m, -1))
    ends = distance.gather(1, after[..., None].expand(-1, -1, distance.shape[2]))
    ends = ends.gather(2, after[:, None].expand(-1, m, -1))
    # Edges (i, i+1) and (j, j+1) become (i, j) and (i+1, j+1).
    gain = along[:, :, None] + along[:, None] - across - ends
    allowed = (position[:, None] < position) & (position < count[:, None])
    gain = gain.masked_fill(~allowed, -torch.inf)
    best, where = gain.flatten(1).max(1)
    return best, where // m + 1, where % m
