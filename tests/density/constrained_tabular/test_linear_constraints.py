"""Elimination against linear programming and by hand; contradictions; measuring a table."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import linprog

from paperback.density.constrained_tabular import LinearConstraints
from paperback.density.constrained_tabular.elimination import eliminate, levels, prune, red, simplify
from paperback.density.constrained_tabular.grammar import parse_constraint
from paperback.errors import DataError


def polytope(seed, n_columns=5, n_rows=12):
    """Random half-spaces about a point that is strictly inside all of them."""
    rng = np.random.default_rng(seed)
    A = rng.integers(-3, 4, (n_rows, n_columns)).astype(float)
    A[~A.any(1), 0] = 1.0
    inside = rng.integers(-4, 5, n_columns).astype(float)
    b = -A @ inside + rng.integers(1, 6, n_rows)
    return LinearConstraints.from_arrays(A, b, [f"x{i}" for i in range(n_columns)]), inside


def rows_of(*texts):
    return [row for i, text in enumerate(texts) for row in parse_constraint(text, i + 1)]


def test_reduction_scales_constants_and_takes_strictness_from_either():
    p, q = rows_of("2*x + y >= 6", "-3*x + 5*y > -12")
    row = red(p, q, "x")  # y/2 - 3 + 5/3 y + 4 > 0
    assert row.weights == {"y": Fraction(1, 2) + Fraction(5, 3)}
    assert row.constant == 1
    assert row.strict
    assert red(*rows_of("2*x >= 6 + y", "x <= 10 + y"), "x").weights == {"y": Fraction(1, 2)}


def test_duplicates_go_and_the_tightest_stays():
    rows = simplify(rows_of("x - y >= 1", "2*x - 2*y >= 4", "x >= y + 2", "x > y + 2", "x - y >= -5"))
    assert [str(row) for row in rows] == ["x - y - 2 > 0"]
    assert simplify(rows_of("x - x + y >= 0")) == simplify(rows_of("y >= 0"))


@pytest.mark.parametrize("seed", range(6))
def test_elimination_is_the_projection(seed):
    rules, inside = polytope(seed)
    rng = np.random.default_rng(seed)
    projected = eliminate(eliminate(rules.rows, "x4"), "x3")
    A, b, _ = rules.arrays
    for point in inside[:3] + rng.normal(0, 4, (40, 3)):
        values = dict(zip(("x0", "x1", "x2"), point, strict=True))
        slack = [
            sum(float(w) * values[n] for n, w in r.weights.items()) + float(r.constant) for r in projected
        ]
        if min(slack, default=1) ** 2 < 1e-12:
            continue
        extension = linprog(np.zeros(2), A_ub=-A[:, 3:], b_ub=A[:, :3] @ point + b, bounds=(None, None))
        assert (min(slack, default=1) > 0) == (extension.status == 0)


@pytest.mark.parametrize("seed", range(4))
def test_pruning_leaves_the_same_set(seed):
    rules, _ = polytope(seed, 4, 10)
    rows = eliminate(rules.rows, "x3")
    kept = prune(rows)
    assert len(kept) < len(rows)
    for row in rows:  # whatever was left out follows from what stayed
        A = np.array([[float(r.weights.get(f"x{i}", 0)) for i in range(3)] for r in kept])
        c = [float(row.weights.get(f"x{i}", 0)) for i in range(3)]
        least = linprog(c, A_ub=-A, b_ub=[float(r.constant) for r in kept], bounds=(None, None))
        assert least.fun + float(row.constant) >= -1e-9


def test_pruning_keeps_strictness():
    rows = rows_of("x >= 0", "y >= 0", "x + y > 0")
    assert prune(rows) == rows
    assert len(prune(rows_of("x > 0", "y >= 0", "x + y > 0"))) == 2
    assert len(prune(rows_of("x >= 0", "y >= 0", "x + y >= -1"))) == 2


def test_pruning_keeps_elimination_small():
    rules, _ = polytope(0, 4, 10)
    sizes = {}
    for prune_above in (10, 10**9):
        compiled = levels(rules.rows, rules.columns, prune_above)
        sizes[prune_above] = max(len(level.lower) + len(level.upper) for level in compiled)
    assert sizes[10] < 0.5 * sizes[10**9]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["x >= 1", "-x >= 0"], r"\(x >= 1\) plus \(-x >= 0\) gives 0 >= 1"),
        (["x - y >= 1", "y - z >= 0", "2*z - 2*x >= 0"], r"0\.5 x \(2\*z - 2\*x >= 0\)"),
        (["x > 0", "x <= 0"], "gives 0 > 0"),
        (["x == 1", "x == 2"], "gives 0 >= 1"),
        (["x + y == 1", "x + y > 1"], "gives 0 > 0"),
    ],
)
def test_contradictions_are_named(texts, words):
    with pytest.raises(DataError, match=words):
        LinearConstraints.parse(texts)


@pytest.mark.parametrize("seed", range(5))
def test_feasible_point_satisfies_every_row_exactly(seed):
    rules, _ = polytope(seed)
    point = rules.feasible_point()
    for row in rules.rows:
        assert sum(w * point[n] for n, w in row.weights.items()) + row.constant >= 0


def test_measures_of_violation():
    rules = LinearConstraints.parse(["a >= b", "0 <= b <= 1"])
    frame = pd.DataFrame({"a": [1, 0, 0, 5], "b": [0.5, 0.5, 2.0, np.nan]})
    assert rules.check(frame).tolist() == [[True, True], [False, True], [False, False], [True, True]]
    assert rules.violation_rate(frame) == 0.5
    assert rules.violation_coverage(frame) == 1.0
    assert rules.violation_mean(frame) == 3 / 8


def test_tolerance_is_relative_to_the_terms():
    rules = LinearConstraints.parse(["a - b >= 0"])
    assert rules.check(pd.DataFrame({"a": [1e9], "b": [1e9 + 0.1]}))[0, 0]
    assert not rules.check(pd.DataFrame({"a": [1.0], "b": [1.1]}))[0, 0]
    assert not rules.check(pd.DataFrame({"a": [1e9], "b": [1e9 + 0.1]}), rtol=0)[0, 0]


def test_strict_is_strict_without_tolerance():
    rules = LinearConstraints.parse(["a > b"])
    assert not rules.check(pd.DataFrame({"a": [1.0], "b": [1.0]}), rtol=0)[0, 0]


@pytest.mark.parametrize(
    ("A", "b", "words"),
    [
        ([[np.nan]], [0], "row 0 .* not finite"),
        ([[1.0], [1.0]], [0, np.inf], "row 1 .* not finite"),
        ([[0.0]], [1], "row 0 .* zero"),
        ([[1.0, 2.0]], [1], "shape"),
    ],
)
def test_bad_arrays(A, b, words):
    with pytest.raises(DataError, match=words):
        LinearConstraints.from_arrays(A, b, ["x"])


def test_from_arrays_equals_text():
    rules = LinearConstraints.from_arrays([[2, -1], [0, 1]], [0, 3], ["x", "y"], strict=[True, False])
    assert rules.texts == ("2*x - y > 0", "y + 3 >= 0")


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"b": [1]}), "no column 'a'"),
        (pd.DataFrame({"a": ["1"]}), "needs numbers"),
        (pd.DataFrame({"a": [True]}), "needs numbers"),
        (pd.DataFrame({"a": [1.0, np.inf]}), "row 1 is infinite"),
    ],
)
def test_tables_that_do_not_fit(frame, words):
    with pytest.raises(DataError, match=words):
        LinearConstraints.parse(["a >= 0"]).check(frame)


@pytest.mark.parametrize("texts", [[], ""])
def test_no_constraints(texts):
    with pytest.raises(DataError, match="no constraints"):
        LinearConstraints.parse(texts)


def test_order_must_be_a_permutation():
    with pytest.raises(DataError, match="each of a, b once"):
        LinearConstraints.parse(["a >= b"]).levels(["a"])
