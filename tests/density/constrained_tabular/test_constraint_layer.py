"""The layer: compliant, idempotent, minimal moves, gradients, and the same as row by row in fractions."""

import itertools
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from paperback.density.constrained_tabular import ConstraintLayer, LinearConstraints
from paperback.density.constrained_tabular.constraints import rest
from paperback.errors import DataError


def polytope(seed, n_columns=5, n_rows=12):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n_rows, n_columns)).round(2)
    inside = rng.normal(size=n_columns).round(2)
    b = -A @ inside + rng.uniform(0.5, 1.5, n_rows).round(2)
    return LinearConstraints.from_arrays(A, b, [f"x{i}" for i in range(n_columns)])


def random_rows(n, columns, seed=0, scale=5.0):
    return scale * torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_row_exactly(rules, levels, row):
    """The layer in fractions, a row at a time."""
    point = dict(zip(rules.columns, map(Fraction, row), strict=True))
    settled = {}
    for level in levels:
        low = [-rest(r, settled) / r.weights[level.column] for r in level.lower]
        high = [-rest(r, settled) / r.weights[level.column] for r in level.upper]
        value = max([point[level.column], *low])
        settled[level.column] = min([value, *high])
    return [settled[name] for name in rules.columns]


@pytest.mark.parametrize("seed", range(2))
def test_every_row_complies_in_any_order(seed):
    rules = polytope(seed)
    A, b, _ = rules.arrays
    rng = np.random.default_rng(seed)
    for _ in range(3):
        layer = ConstraintLayer(rules, order=[str(name) for name in rng.permutation(rules.columns)])
        moved = layer(random_rows(10_000, 5, seed))
        assert float((moved.numpy() @ A.T + b).min()) >= -1e-9
        assert layer.moved_.max() > 0.1


def test_exact_arithmetic_leaves_no_violation_at_all():
    rules = polytope(3)
    order = rules.columns[::-1]
    rows = random_rows(30, 5).tolist()
    levels = rules.levels(order)
    exact = [one_row_exactly(rules, levels, row) for row in rows]
    for point in exact:
        values = dict(zip(rules.columns, point, strict=True))
        assert all(rest(row, values) >= 0 for row in rules.rows)
    layer = ConstraintLayer(rules, order=order)
    expected = torch.tensor([[float(v) for v in point] for point in exact], dtype=torch.float64)
    torch.testing.assert_close(layer(torch.tensor(rows, dtype=torch.float64)), expected, rtol=1e-9, atol=1e-9)


def test_compliant_rows_come_back_bit_for_bit():
    layer = ConstraintLayer(polytope(2))
    moved = layer(random_rows(2_000, 5))
    assert torch.equal(layer(moved), moved)
    assert layer.moved_.max() == 0


def test_each_column_moves_as_little_as_the_earlier_ones_allow():
    rules = LinearConstraints.parse(["x + y >= 4", "x <= 3", "y <= 5"])
    row = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    assert ConstraintLayer(rules, order=["x", "y"])(row).tolist() == [[0.0, 4.0]]
    assert ConstraintLayer(rules, order=["y", "x"])(row).tolist() == [[3.0, 1.0]]


def test_bounds_leave_room_at_every_level():
    layer = ConstraintLayer(polytope(1))
    moved = layer(random_rows(2_000, 5))
    lower, upper = layer.bounds(moved)
    assert (upper - lower).min() >= -1e-9
    assert ((moved >= lower - 1e-9) & (moved <= upper + 1e-9)).all()


def test_clipping_one_constraint_after_the_other_is_not_enough():
    rules = LinearConstraints.parse(["x <= y", "y <= z", "z <= 1", "x >= 0"])
    moved = ConstraintLayer(rules, order=["z", "y", "x"])(torch.tensor([[5.0, 3.0, -2.0]]))
    assert moved.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("order", list(itertools.permutations(["x", "y", "z"])))
def test_equalities(order):
    rules = LinearConstraints.parse(["x + 2*y == z", "x >= 0", "y >= 0", "z <= 10"])
    moved = ConstraintLayer(rules, order=order)(random_rows(500, 3))
    x, y, z = moved.unbind(1)
    torch.testing.assert_close(x + 2 * y, z, rtol=0, atol=1e-12)
    assert min(x.min(), y.min()) >= 0


def test_strict_constraints_hold_strictly():
    rules = LinearConstraints.parse(["x > y", "y > 2*z", "x < 1"])
    for dtype in (torch.float32, torch.float64):
        moved = ConstraintLayer(rules, order=["z", "x", "y"])(random_rows(2_000, 3).to(dtype))
        x, y, z = moved.unbind(1)
        assert ((x > y) & (y > 2 * z) & (x < 1)).all()
    with pytest.raises(DataError, match="lower eps"):
        ConstraintLayer(LinearConstraints.parse(["x > 0", "x < 1e-9"]))


def test_gradient():
    rules = polytope(2)
    layer = ConstraintLayer(rules)
    rows = random_rows(200, 5, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (rows[:20].detach().requires_grad_(),))
    moved = layer(rows)
    (gradient,) = torch.autograd.grad(moved[:, 0].sum(), rows)
    still = moved[:, 0] == rows[:, 0]
    assert still.any()
    assert (gradient[still, 0] == 1).all()
    assert (gradient[~still, 0] == 0).all()


def test_gradient_goes_to_the_columns_that_made_the_bound():
    rules = LinearConstraints.parse(["z >= 0.5*x + 0.25*y"])
    row = torch.tensor([[4.0, 8.0, 0.0]], requires_grad=True)
    moved = ConstraintLayer(rules, columns=["x", "y", "z"], order=["x", "y", "z"])(row)
    moved[0, 2].backward()
    assert moved[0, 2] == 4.0
    assert row.grad.tolist() == [[0.5, 0.25, 0.0]]


def test_other_columns_and_their_missing_cells_pass_through():
    layer = ConstraintLayer(LinearConstraints.parse(["b >= 0"]), columns=["a", "b", "c"])
    row = torch.tensor([[torch.nan, -1.0, 1.0]])
    assert layer(row)[0, 1:].tolist() == [0.0, 1.0]
    assert layer(row)[0, 0].isnan()


def test_missing_cells_stay_missing_and_leave_the_others_compliant():
    rules = LinearConstraints.parse(["a <= b", "b <= c", "c <= 10", "a >= 0"])
    layer = ConstraintLayer(rules, order=["c", "b", "a"])
    moved = layer(torch.tensor([[20.0, torch.nan, -5.0], [3.0, 2.0, torch.nan]], dtype=torch.float64))
    assert moved.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert 0 <= moved[0, 0] <= moved[0, 2] <= 10
    assert 0 <= moved[1, 0] <= moved[1, 1]


def test_float32_in_float32_out_and_moving_the_module_keeps_precision():
    layer = ConstraintLayer(polytope(0)).to(torch.float32)
    assert layer.weights.dtype == torch.float64
    assert layer(random_rows(5, 5).float()).dtype == torch.float32


@pytest.mark.parametrize("order", list(itertools.permutations(["x", "y", "z"])))
def test_rounded_values_comply_too(order):
    texts = ["z >= .275*(x+y)", ".35*(x+y) >= z", "1.05*x >= y", "1.05*y >= x", "x >= 3.5", "z <= 8"]
    rules = LinearConstraints.parse(texts)
    layer = ConstraintLayer(rules, ["x", "y", "z"], order, decimals={"x": 2, "y": 2, "z": 2})
    moved = layer(5 + random_rows(5_000, 3))
    assert layer.unrounded_ == 0
    assert torch.equal(moved, (moved * 100).round() / 100)
    assert rules.violation_rate(pd.DataFrame(moved.numpy(), columns=["x", "y", "z"])) == 0
    assert torch.equal(layer(moved), moved)


def test_whole_numbers_beside_continuous_ones():
    rules = LinearConstraints.parse(["n <= x", "x <= n + 0.5", "n >= m", "m >= 1"])
    for order in itertools.permutations(["n", "x", "m"]):
        layer = ConstraintLayer(rules, order=order, decimals={"n": 0, "m": 0})
        moved = layer(random_rows(2_000, 3))
        frame = pd.DataFrame(moved.numpy(), columns=rules.columns)
        assert rules.violation_rate(frame) == 0
        rounded = (frame[["n", "m"]] == frame[["n", "m"]].round()).all().all()
        assert rounded or layer.unrounded_ > 0
        assert rounded or order.index("x") < order.index("n")


def test_cells_that_cannot_be_rounded_are_counted():
    rules = LinearConstraints.parse(["2*n == m"])
    layer = ConstraintLayer(rules, ["n", "m"], ["m", "n"], decimals={"n": 0, "m": 0})
    moved = layer(torch.tensor([[0.0, 3.0], [0.0, 4.0]], dtype=torch.float64))
    assert moved.tolist() == [[1.5, 3.0], [2.0, 4.0]]
    assert layer.unrounded_ == 1


def test_bad_arguments():
    rules = LinearConstraints.parse(["x >= y"])
    with pytest.raises(DataError, match="no column 'y'"):
        ConstraintLayer(rules, columns=["x"])
    with pytest.raises(DataError, match="each of x, y once"):
        ConstraintLayer(rules, order=["x", "x"])
    with pytest.raises(DataError, match="eps"):
        ConstraintLayer(rules, eps=0)
    with pytest.raises(DataError, match="expected \\(batch, 2\\)"):
        ConstraintLayer(rules)(torch.zeros(3, 4))
