"""The text of a linear constraint, read by recursive descent.

    constraint := sum comparison sum { comparison sum }      50 <= depth <= 75
    comparison := ">=" | "<=" | ">" | "<" | "==" | "="
    sum        := product { ("+" | "-") product }
    product    := factor { ("*" | "/") factor }              at most one factor has columns; none stands below
    "/" factor     := number | name | "`" any characters "`" | "(" sum ")" | ("+" | "-") factor

Numbers are exact: .1 is one tenth. Every message says which constraint, and at which of its characters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

from paperback.density.constrained_tabular.inequality import RESERVED, Inequality
from paperback.errors import DataError, NotSupportedError

MAX_CHARACTERS = 10_000
MAX_DEPTH = 50  # of brackets and signs
MAX_EXPONENT = 300  # numbers must be finite as float64 too

_TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<name>[^\W\d]\w*)
      | (?P<quoted>`[^`]+`)
      | (?P<comparison>>=|<=|==|≥|≤|>|<|=)
      | (?P<mark>[-+*/()])""",
    re.VERBOSE,
)
_COMPARISONS = {"≥": ">=", "≤": "<=", "=": "=="}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    position: int  # of its first character, counted from 1


@dataclass
class _Linear:
    """A sum of columns with coefficients and a constant."""

    weights: dict[str, Fraction]
    constant: Fraction

    def plus(self, other: _Linear, sign: int) -> _Linear:
        weights = dict(self.weights)
        for name, weight in other.weights.items():
            weights[name] = weights.get(name, Fraction(0)) + sign * weight
        return _Linear(weights, self.constant + sign * other.constant)

    def times(self, factor: Fraction) -> _Linear:
        return _Linear({name: factor * w for name, w in self.weights.items()}, factor * self.constant)


def parse_constraint(text: str, number: int, columns: Collection[str] | None = None) -> list[Inequality]:
    """Read one constraint.

    Args:
        text: such as ``"max_price - min_price >= 0"``.
        number: of the constraint in its list, counted from 1, for messages.
        columns: the columns that there are; any name is taken if not given.

    Returns:
        Its inequalities: one for a comparison, two for an equality. ``origin`` is left empty.

    Raises:
        DataError: naming the constraint, the character and the remedy.
        NotSupportedError: for disjunctions.
    """
    return _Parser(text, number, columns).constraint()


class _Parser:
    def __init__(self, text: str, number: int, columns: Collection[str] | None) -> None:
        self.text, self.number, self.columns = text, number, columns
        self.depth = 0
        if len(text) > MAX_CHARACTERS:
            self.fail(MAX_CHARACTERS, f"a constraint has at most {MAX_CHARACTERS:,} characters")
        self.tokens = self.scan()
        self.next = 0

    def fail(self, position: int, problem: str) -> NoReturn:
        shown = self.text if len(self.text) <= 120 else self.text[:117] + "..."
        raise DataError(f'constraint {self.number}, "{shown}", character {position}: {problem}.')

    # -- tokens --------------------------------------------------------------------------------------------

    def scan(self) -> list[_Token]:
        tokens, start = [], 0
        while start < len(self.text):
            match = _TOKEN.match(self.text, start)
            if match is None:
                self.fail_on_character(start)
            kind = str(match.lastgroup)
            if kind != "space":
                tokens.append(_Token(kind, match.group(), start + 1))
            start = match.end()
        tokens.append(_Token("end", "", len(self.text) + 1))
        return tokens

    def fail_on_character(self, start: int) -> NoReturn:
        mark = self.text[start]
        if mark == "|":
            self.refuse_disjunction(start + 1)
        advice = {
            "`": "a column name in backticks is not closed; add the closing backtick",
            "!": '"!=" is not linear; say on which side of the number the values must lie',
            "&": "write the two sides of & as two constraints",
            "^": "powers are not linear; add a column with the power and constrain that",
            ",": "a comma has no meaning here; write numbers with a point, and constraints as separate texts",
            '"': "write column names plainly, or in backticks",
            "'": "write column names plainly, or in backticks",
        }
        self.fail(
            start + 1,
            advice.get(mark, f"{mark!r} has no meaning here; column names with such signs go in backticks"),
        )

    def refuse_disjunction(self, position: int) -> NoReturn:
        raise NotSupportedError(
            f'constraint {self.number}, "{self.text[:120]}", character {position}: "or" describes a set '
            "that is not convex, which this layer cannot project on; split the table by case and constrain "
            "each part, or keep the rule by rejection sampling."
        )

    def peek(self) -> _Token:
        return self.tokens[self.next]

    def take(self) -> _Token:
        token = self.tokens[self.next]
        self.next += 1
        return token

    # -- rules ---------------------------------------------------------------------------------------------

    def constraint(self) -> list[Inequality]:
        sides, comparisons = [self.sum()], []
        while self.peek().kind == "comparison":
            comparisons.append(self.take())
            sides.append(self.sum())
        token = self.peek()
        if token.kind != "end":
            self.fail_on_rest(token)
        if not comparisons:
            self.fail(token.position, "a comparison is missing; write >=, <=, >, < or == and another side")
        rows: list[Inequality] = []
        for left, token, right in zip(sides, comparisons, sides[1:], strict=False):
            rows += self.compare(left, token, right)
        return rows

    def fail_on_rest(self, token: _Token) -> NoReturn:
        if token.text == "or":
            self.refuse_disjunction(token.position)
        if token.text == "and":
            self.fail(token.position, 'write the two sides of "and" as two constraints')
        if token.kind in ("name", "quoted") or token.text == "(":
            self.fail(
                token.position,
                f'a sign is missing before "{token.text}"; write * between a number and a column',
            )
        self.fail(token.position, f'"{token.text}" is not expected here; write +, -, * or a comparison')

    def compare(self, left: _Linear, token: _Token, right: _Linear) -> list[Inequality]:
        comparison = _COMPARISONS.get(token.text, token.text)
        difference = left.plus(right, -1)
        if comparison in ("<", "<="):
            difference = difference.times(Fraction(-1))
        weights = {name: weight for name, weight in difference.weights.items() if weight}
        if not weights:
            self.fail(token.position, "no column is left in this comparison; remove it or name a column")
        numbers = [*weights.values(), difference.constant]
        if any(abs(value) > Fraction(10) ** MAX_EXPONENT for value in numbers):
            self.fail(token.position, f"a coefficient is beyond 1e{MAX_EXPONENT}; rescale the constraint")
        row = Inequality(weights, difference.constant, comparison in ("<", ">"))
        if comparison != "==":
            return [row]
        return [row, Inequality({name: -w for name, w in weights.items()}, -difference.constant)]

    def sum(self) -> _Linear:
        result = self.product()
        while self.peek().text in ("+", "-"):
            sign = 1 if self.take().text == "+" else -1
            result = result.plus(self.product(), sign)
        return result

    def product(self) -> _Linear:
        result = self.factor()
        while self.peek().text in ("*", "/"):
            token = self.take()
            other = self.factor()
            if token.text == "/":
                if other.weights:
                    self.fail(token.position, "dividing by a column is not linear; multiply both sides by it")
                if not other.constant:
                    self.fail(token.position, "this divides by zero; correct the number")
                result = result.times(1 / other.constant)
            elif result.weights and other.weights:
                self.fail(
                    token.position,
                    "the product of two columns is not linear; only a number may multiply a column, so add "
                    "a column with the product and constrain that",
                )
            else:
                scaled, factor = (result, other) if not other.weights else (other, result)
                result = scaled.times(factor.constant)
        return result

    def factor(self) -> _Linear:
        token = self.take()
        if token.kind == "number":
            return _Linear({}, self.number_of(token))
        if token.kind == "name" and self.peek().text == "(" and token.text not in RESERVED:
            self.fail(
                token.position,
                f"{token.text}(...) is a function; only sums of columns with coefficients are linear",
            )
        if token.kind in ("name", "quoted"):
            return _Linear({self.column_of(token): Fraction(1)}, Fraction(0))
        if token.text not in ("(", "+", "-"):
            what = "the constraint ends here" if token.kind == "end" else f'"{token.text}" stands here'
            self.fail(token.position, f"{what}, but a number or a column is expected")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(
                token.position,
                f"brackets and signs stand more than {MAX_DEPTH} deep; simplify the constraint",
            )
        result = self.sum() if token.text == "(" else self.factor()
        self.depth -= 1
        if token.text == "(":
            closing = self.take()
            if closing.text != ")":
                problem = f"the bracket opened at character {token.position} is not closed"
                self.fail(closing.position, problem)
        return result.times(Fraction(-1)) if token.text == "-" else result

    def number_of(self, token: _Token) -> Fraction:
        mantissa, _, exponent = token.text.lower().partition("e")
        if len(mantissa) > MAX_EXPONENT or abs(int(exponent[:9] or 0)) > MAX_EXPONENT:
            self.fail(
                token.position,
                f"the number is beyond 1e{MAX_EXPONENT} or has too many digits; rescale the constraint",
            )
        return Fraction(token.text)

    def column_of(self, token: _Token) -> str:
        if token.kind == "name" and token.text in RESERVED:
            if token.text == "or":
                self.refuse_disjunction(token.position)
            self.fail(
                token.position, f'"{token.text}" is not a column; a column of that name goes in backticks'
            )
        name = token.text.strip("`") if token.kind == "quoted" else token.text
        if self.columns is not None and name not in self.columns:
            close = difflib.get_close_matches(name, self.columns, n=3, cutoff=0.6)
            hint = (
                f"perhaps {' or '.join(close)} is meant"
                if close
                else f"there are {', '.join(list(self.columns)[:12])}"
            )
            self.fail(token.position, f"there is no column {name!r}; {hint}")
        return name
