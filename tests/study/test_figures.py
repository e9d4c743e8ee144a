from __future__ import annotations

import io
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from paperback.errors import DataError
from paperback.study.figures import HIDDEN, PALETTE, direct_labels, pixel_grid, spread, style


def test_the_style_ends_with_its_block() -> None:
    before = dict(matplotlib.rcParams)
    with style():
        figure = Figure()
        axes = figure.subplots()
        assert axes.plot([1])[0].get_color() == PALETTE[0]
        assert not axes.spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0, 20))
def test_spread_positions_keep_their_order_and_distance(positions: list[float], gap: float) -> None:
    moved = spread(positions, gap)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(moved[order]) >= gap - 1e-9).all()
    assert moved.sum() == pytest.approx(sum(positions), abs=1e-6)  # least squares moves the whole not at all


def test_positions_far_enough_apart_stay() -> None:
    assert spread([30.0, 0.0, 10.0], 10) == pytest.approx([30, 0, 10])
    assert spread([0.0, 0.0], 10) == pytest.approx([-5, 5])


def test_labels_stand_at_the_lines_and_do_not_overlap() -> None:
    with style():
        figure = Figure()
        axes = figure.subplots()
        for end in (1.0, 1.001, 1.002, np.nan):
            axes.plot([0, 1, 2], [0.0, end, end], label=f"to {end}")
        axes.plot([0, 2], [np.nan, np.nan], label="not to be seen")
        axes.axhline(0.5)
        limits = axes.get_xlim(), axes.get_ylim()
        direct_labels(axes)
        figure.savefig(io.BytesIO(), format="png")
    assert (axes.get_xlim(), axes.get_ylim()) == limits
    assert [text.get_text() for text in axes.texts] == ["to 1.0", "to 1.001", "to 1.002", "to nan"]
    boxes = sorted((t.get_window_extent() for t in axes.texts), key=lambda box: box.y0)
    assert all(above.y0 >= below.y1 for below, above in pairwise(boxes))
    assert all(box.x0 < figure.bbox.x1 for box in boxes)


def test_hidden_pixels_are_told_from_dark_and_light_ones() -> None:
    images = np.zeros((2, 3, 4, 4))
    images[0, 0, 0, 0] = np.nan
    images[1, 2, 3, 3] = 1.0
    axes = Figure().subplots()
    pixel_grid(axes, images, row_labels=("a", "b"), column_labels=("x", "y", "z"))
    canvas = np.asarray(axes.images[0].get_array())
    assert canvas.shape == (2 * 4 + 1, 3 * 4 + 2, 4)
    assert canvas[0, 0] == pytest.approx(matplotlib.colors.to_rgba(HIDDEN))
    assert canvas[-1, -1] == pytest.approx((0, 0, 0, 1))
    assert canvas[1, 1] == pytest.approx((1, 1, 1, 1))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["x", "y", "z"]


@pytest.mark.parametrize(("shape", "labels"), [((2, 3, 4), ()), ((2, 0, 4, 4), ()), ((2, 3, 4, 4), ("a",))])
def test_grids_that_do_not_fit_are_refused(shape: tuple[int, ...], labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError):
        pixel_grid(Figure().subplots(), np.zeros(shape), row_labels=labels)
