"""The text of constraints: what it means, how it is written back, and what is refused, where."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paperback.density.constrained_tabular import LinearConstraints
from paperback.density.constrained_tabular.grammar import parse_constraint
from paperback.density.constrained_tabular.inequality import Inequality
from paperback.errors import DataError, NotSupportedError


@pytest.mark.parametrize(
    ("text", "weights", "constant", "strict"),
    [
        ("x - y >= 0", {"x": 1, "y": -1}, 0, False),
        ("2*a + b <= 10", {"a": -2, "b": -1}, 10, False),
        ("z > .275*(x + y)", {"z": 1, "x": Fraction(-11, 40), "y": Fraction(-11, 40)}, 0, True),
        ("x / 3 + 1 < y - -2", {"y": 1, "x": Fraction(-1, 3)}, 1, True),
        ("(x + 1) * 2 ≥ 1e-1", {"x": 2}, Fraction(19, 10), False),
        ("`unit price` * 12 >= `or`", {"unit price": 12, "or": -1}, 0, False),
        ("x + y - x >= 3", {"y": 1}, -3, False),
        ("größe >= 1", {"größe": 1}, -1, False),
    ],
)
def test_meaning(text, weights, constant, strict):
    (row,) = parse_constraint(text, 1)
    assert (dict(row.weights), row.constant, row.strict) == (weights, constant, strict)


def test_numbers_are_exact():
    (row,) = parse_constraint("0.1*x >= 0.3", 1)
    assert row.weights["x"] == Fraction(1, 10)
    assert row.constant == Fraction(-3, 10)


def test_equality_and_chain_are_several_inequalities():
    assert [str(row) for row in parse_constraint("x + y == 1", 1)] == ["x + y - 1 >= 0", "-x - y + 1 >= 0"]
    assert [str(row) for row in parse_constraint("50 <= depth < 75", 1)] == [
        "depth - 50 >= 0",
        "-depth + 75 > 0",
    ]


NAMES = st.sampled_from(["x", "y", "unit price", "or", "größe", "a_1", "1st"])
NUMBERS = st.fractions(max_denominator=10**6).filter(bool)


@given(st.dictionaries(NAMES, NUMBERS, min_size=1), st.fractions(max_denominator=10**6), st.booleans())
def test_parsing_what_was_printed_gives_it_back(weights, constant, strict):
    row = Inequality(weights, constant, strict)
    assert parse_constraint(str(row), 1) == [row]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("x*y >= 0", 2, "product of two columns"),
        ("x >=", 5, "the constraint ends here"),
        ("2x >= 1", 2, "write \\* between"),
        ("xx >= 0", 1, "no column 'xx'; perhaps x is meant"),
        ("`x >= 0", 1, "not closed"),
        ("x != 3", 3, "not linear"),
        ("abs(x) >= 1", 1, "is a function"),
        ("1 >= 0", 3, "no column is left"),
        ("x - x >= 1", 7, "no column is left"),
        ("x/0 >= 1", 2, "divides by zero"),
        ("1/x >= 2", 2, "dividing by a column"),
        ("(x >= 1", 4, "opened at character 1"),
        ("x) >= 1", 2, "not expected"),
        ("x >= 1e999", 6, "beyond 1e300"),
        ("1e200*1e200*x >= 1", 15, "beyond 1e300"),
        ("x and y >= 1", 3, "two constraints"),
        ("x^2 >= 1", 2, "powers are not linear"),
        ("x >= 1,5", 7, "comma"),
        ("x + 1", 6, "comparison is missing"),
        ("", 1, "ends here"),
        ("x >= nan", 6, "no column 'nan'"),
        ("x >= 1; y >= 2", 7, "no meaning here"),
        ("-" * 60 + "x >= 1", 51, "deep"),
        ("x >= " + "1" * 20_000, 10_000, "at most"),
    ],
)
def test_refused_with_the_place(text, place, words):
    with pytest.raises(DataError, match=f"(?s)constraint 2, .*character {place}: .*{words}"):
        LinearConstraints.parse(["x >= 0", text], ["x", "y"])


@pytest.mark.parametrize("text", ["x >= 1 or y >= 2", "x >= 1 | y >= 2", "or x >= 1"])
def test_disjunctions_are_refused_with_advice(text):
    with pytest.raises(NotSupportedError, match="split the table"):
        LinearConstraints.parse([text])


@given(st.text(alphabet="xy0123456789.e+-*/()<>=` |&or", max_size=40))
def test_any_text_is_read_or_refused(text):
    message = ""
    try:
        rows = parse_constraint(text, 1, ["x", "y"])
    except (DataError, NotSupportedError) as error:
        rows, message = [], str(error)
    assert "character" in message if not rows else all(row.weights for row in rows)


def test_a_file_of_constraints():
    rules = LinearConstraints.parse("# sizes\nx >= 1\n\ny >= x  # y is the longer side\n")
    assert rules.texts == ("x >= 1", "y >= x")
    assert str(rules) == "x >= 1\ny >= x"
    assert LinearConstraints.parse(str(rules)).rows == rules.rows
