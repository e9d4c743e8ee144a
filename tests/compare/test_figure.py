import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from paperback.compare.figure import alternative_text, draw, pareto_front, write_figure

numbers = st.integers(0, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8), st.sampled_from(["higher", "lower"]))
def test_the_front_is_exactly_what_no_other_point_beats(points, better):
    sign = 1 if better == "lower" else -1

    def beats(a, b):
        no_worse = a[0] <= b[0] and sign * a[1] <= sign * b[1]
        return no_worse and a != b

    front = pareto_front([cost for cost, _ in points], [quality for _, quality in points], better)
    assert set(front) == {i for i, p in enumerate(points) if not any(beats(q, p) for q in points)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_the_front_of_known_points():
    costs, losses = [1.0, 2.0, 3.0, 4.0], [9.0, 5.0, 6.0, 1.0]
    assert pareto_front(costs, losses, "lower") == [0, 1, 3]
    assert pareto_front(costs, losses, "higher") == [0]


def overlap(a: Bbox, b: Bbox) -> bool:
    return Bbox.intersection(a, b) is not None


@pytest.mark.parametrize(
    "points",
    [
        [(f"contender number {i}", 0.5 + 0.02 * (i % 3), 10.0 * 1.5**i) for i in range(6)],
        [
            ("independent categorical", 1.08, 0.004),
            ("mixture", 0.72, 3.0),
            ("RBM", 0.63, 14.0),
            ("DBM", 0.63, 44.0),
        ],
        [("only one", 0.5, 2.0)],
    ],
)
def test_labels_cover_neither_each_other_nor_points_nor_the_edge(make_board, make_row, points):
    board = make_board(
        [make_row(name, loss, loss * 1.01, loss * 0.99, cost=cost) for name, loss, cost in points]
    )
    figure = draw(board)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(name for name, _, _ in points)
    boxes = [label.get_window_extent() for label in labels]
    marks = [
        Bbox.from_bounds(x - 7, y - 7, 14, 14)
        for x, y in axes.transData.transform([(c, q) for _, q, c in points])
    ]
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    assert not any(overlap(box, mark) for box in boxes for mark in marks)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_figure_is_a_png_and_its_words_name_the_front(make_board, make_row):
    board = make_board(
        [make_row("cheap", 0.9, cost=1.0), make_row("good", 0.1, cost=9.0), make_row("bad", 0.9, cost=9.0)]
    )
    png = write_figure(board)
    assert png.startswith(b"\x89PNG")
    assert (board.folder / "quality-against-cost.png").read_bytes() == png
    words = alternative_text(board)
    assert words.endswith("from the cheapest: cheap, good.")
    assert "3 contenders" in words


def test_without_a_point_there_is_no_figure_not_even_an_old_one(make_board, make_row):
    board = make_board([make_row("broken", "it broke.")])
    (board.folder / "quality-against-cost.png").write_bytes(b"old")
    assert write_figure(board) is None
    assert not (board.folder / "quality-against-cost.png").exists()
