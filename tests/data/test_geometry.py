"""Geometry with exact answers: against scipy, brute force and definitions."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from paperback.data.simulate import geometry
from paperback.data.simulate.geometry import (
    canonical_tour,
    convex_hull,
    delaunay,
    delaunay_batch,
    farthest_insertion,
    held_karp,
    hull_batch,
    is_simple,
    nearest_neighbour,
    polygon_area,
    to_targets,
    tour_length,
    tsp_batch,
    two_opt,
)
from paperback.errors import DataError


def draw(batch, n, seed=0):
    return torch.rand(batch, n, 2, generator=torch.Generator().manual_seed(seed))


# -- hulls ---------------------------------------------------------------------------------------------------


def test_hulls_are_those_of_scipy_and_canonical():
    points, targets, lengths = hull_batch((3, 14), 200, seed=1)
    hull = convex_hull(points, lengths)
    assert torch.equal(to_targets(hull), targets)
    for p, vertices, n in zip(points, hull, lengths, strict=True):
        expected = ConvexHull(p[:n].double().numpy()).vertices  # counter-clockwise in the plane
        expected = np.roll(expected, -int(expected.argmin()))
        assert vertices[vertices >= 0].tolist() == expected.tolist()


def test_the_area_of_a_hull_is_that_of_scipy():
    points = draw(20, 30)
    areas = polygon_area(points, convex_hull(points))
    expected = [ConvexHull(p.double().numpy()).volume for p in points]
    assert areas.numpy() == pytest.approx(expected, rel=1e-12)


def test_hulls_of_large_sets_in_pieces(monkeypatch):
    points = draw(7, 300)
    whole = convex_hull(points)
    monkeypatch.setattr(geometry.hull, "ELEMENTS", 300**2)  # one set at a time
    assert torch.equal(convex_hull(points), whole)


@pytest.mark.parametrize(
    "bad",
    [
        [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]],  # a line
        [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 1.0]],  # three of the hull on a line
        [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],  # a vertex twice
        [[0.5, 0.5]] * 4,
    ],
)
def test_a_set_that_is_not_in_general_position_is_explained(bad):
    points = torch.cat([draw(1, len(bad)), torch.tensor([bad])])
    with pytest.raises(DataError, match="set 1 is not in general position"):
        convex_hull(points)


def test_duplicates_inside_the_hull_do_no_harm():
    points = torch.tensor([[[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [1.0, 1.0], [1.0, 1.0]]])
    assert convex_hull(points).tolist() == [[0, 1, 2]]


def test_degenerate_draws_are_drawn_again(monkeypatch):
    calls = []
    true = geometry.sets.hull_successors

    def first_is_bad(points, real):
        successor, sound = true(points, real)
        if not calls:
            sound = sound.clone()
            sound[3] = False
        calls.append(len(points))
        return successor, sound

    monkeypatch.setattr(geometry.sets, "hull_successors", first_is_bad)
    points, targets, lengths = hull_batch((4, 6), 10, seed=5)
    assert calls == [10, 1]
    assert torch.equal(to_targets(convex_hull(points, lengths))[3], targets[3])


def test_which_polygons_are_simple():
    square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.4, 0.5]]])

    def simple(*polygon):
        return bool(is_simple(square, torch.tensor([polygon])))

    assert simple(0, 1, 2, 3)
    assert simple(3, 2, 1, 0)
    assert simple(0, 1, 2, 4, 3)  # with a dent
    assert simple(0, 1, 2, -1, -1)
    assert not simple(0, 2, 1, 3)  # a bow tie
    assert not simple(0, 1, 2, 3, 0)  # a vertex twice
    assert not simple(0, 1, -1)
    assert not simple(-1, -1, -1)
    assert float(polygon_area(square, torch.tensor([[0, 1, 2, -1]]))) == 0.5
    assert float(polygon_area(square, torch.tensor([[0, 1, -1]]))) == 0.0


# -- triangulations ------------------------------------------------------------------------------------------


def test_delaunay_circles_are_empty_and_the_order_is_canonical():
    points, targets, lengths = delaunay_batch((3, 9), 30, seed=2)
    triangles = delaunay(points, lengths)
    assert torch.equal(to_targets(triangles.flatten(1)), targets)
    for p, triples, n in zip(points.double(), triples_of(triangles), lengths.tolist(), strict=True):
        hull = int((convex_hull(p[None, :n]) >= 0).sum())
        assert len(triples) == 2 * n - 2 - hull  # Euler
        centres = []
        for triple in triples:
            assert triple == sorted(triple)
            a, b, c = (p[i] for i in triple)
            sides = torch.stack([(b - c).norm(), (c - a).norm(), (a - b).norm()])
            centres.append(tuple(((sides[:, None] * torch.stack([a, b, c])).sum(0) / sides.sum()).tolist()))
            middle = torch.linalg.solve(
                2 * torch.stack([b - a, c - a]), torch.stack([b @ b - a @ a, c @ c - a @ a])
            )
            others = [i for i in range(n) if i not in triple]
            assert ((p[others] - middle).norm(dim=1) > (a - middle).norm() - 1e-12).all()
        assert centres == sorted(centres)


def triples_of(triangles):
    return [[t for t in row.tolist() if t[0] >= 0] for row in triangles]


@pytest.mark.parametrize("bad", [[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], [[0.0, 0.0]] * 3])
def test_no_triangulation_is_explained(bad):
    with pytest.raises(DataError, match="general position"):
        delaunay(torch.tensor([bad]))


def test_a_duplicate_is_named():
    with pytest.raises(DataError, match=r"point \d of set 0 stands twice"):
        delaunay(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))


# -- tours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_held_karp_equals_brute_force(n):
    points = draw(6, n)
    tours = held_karp(points)
    every = [torch.tensor((0, *rest)).expand(6, -1) for rest in permutations(range(1, n))]
    best = torch.stack([tour_length(points, tour) for tour in every]).amin(0)
    assert torch.allclose(tour_length(points, tours), best, rtol=0, atol=1e-12)
    assert torch.equal(canonical_tour(tours), tours)


def test_sets_of_several_lengths_are_solved_as_if_alone():
    points, lengths = draw(9, 8), torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 5])
    for solve in (held_karp, nearest_neighbour, farthest_insertion):
        together = solve(points, lengths)
        for i, n in enumerate(lengths.tolist()):
            assert together[i, :n].tolist() == solve(points[i : i + 1, :n])[0].tolist()
            assert (together[i, n:] == -1).all()


@pytest.mark.parametrize("heuristic", [nearest_neighbour, farthest_insertion])
def test_two_opt_never_lengthens_and_ends_without_a_better_reversal(heuristic):
    points, lengths = draw(40, 14), torch.randint(1, 15, (40,), generator=torch.Generator().manual_seed(0))
    before = heuristic(points, lengths)
    after = two_opt(points, before)
    assert torch.equal(after.sort(1).values, before.sort(1).values)
    length = tour_length(points, after)
    assert (length <= tour_length(points, before) + 1e-12).all()
    for i in range(14):
        for j in range(i + 1, 14):
            turned = after.clone()
            turned[:, i : j + 1] = turned[:, i : j + 1].flip(1)
            whole = lengths > j  # the others would have padding in between
            assert (tour_length(points, turned) >= length - 1e-9)[whole].all()


def test_no_heuristic_beats_the_shortest_tour():
    points = draw(50, 9)
    best = tour_length(points, held_karp(points))
    for heuristic in (nearest_neighbour, farthest_insertion):
        assert (tour_length(points, heuristic(points)) >= best - 1e-12).all()


def test_canonical_tours_keep_the_cycle():
    order = torch.tensor([[3, 1, 0, 2, -1], [2, 0, 1, -1, -1], [0, -1, -1, -1, -1]])
    assert canonical_tour(order).tolist() == [[0, 1, 3, 2, -1], [0, 1, 2, -1, -1], [0, -1, -1, -1, -1]]


def test_held_karp_refuses_a_table_that_is_too_large():
    with pytest.raises(DataError, match=r"14 points.*two_opt"):
        held_karp(draw(1, 14))
    tours = tsp_batch(14, 3, solver="two-opt").targets
    assert tours[:, :14].sort(1).values.tolist() == [list(range(1, 15))] * 3


# -- samplers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [hull_batch, delaunay_batch, tsp_batch])
def test_samplers_are_functions_of_their_seed(sampler):
    one, again, other = sampler((4, 7), 20, 3), sampler((4, 7), 20, 3), sampler((4, 7), 20, 4)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.points, other.points)
    assert set(one.lengths.tolist()) == {4, 5, 6, 7}
    assert ((one.targets == 0).sum(1) == 1).all()
    assert (one.targets <= one.lengths[:, None]).all()
    assert (one.points[torch.arange(7) >= one.lengths[:, None]] == 0).all()


def test_targets_end_with_stop():
    assert to_targets(torch.tensor([[2, 0, -1], [0, 1, 2]])).tolist() == [[3, 1, 0, -1], [1, 2, 3, 0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: convex_hull(torch.rand(4, 2)), r"points\[None\]"),
        (lambda: convex_hull(torch.rand(1, 2, 2)), "set 0 has 2 points; it must have 3"),
        (lambda: convex_hull(draw(2, 5), torch.tensor([5, 6])), "set 1 has 6 points"),
        (lambda: convex_hull(torch.full((1, 3, 2), torch.nan)), "point 0 of set 0 .* finite"),
        (lambda: held_karp(draw(2, 5), torch.tensor([5])), "one integer for each set"),
        (lambda: tour_length(draw(1, 3), torch.tensor([[0, 1, 3]])), r"order holds indices 0 to 3"),
        (lambda: hull_batch(2, 5), "n is 2"),
        (lambda: hull_batch((6, 5), 5), r"n is \(6, 5\)"),
        (lambda: tsp_batch(5, 0), "size is 0"),
        (lambda: tsp_batch(5, 2, solver="magic"), "exact"),
    ],
)
def test_bad_input_is_one_clear_sentence(call, words):
    with pytest.raises(DataError, match=words):
        call()
