"""The constraint layer: any row in, a row that satisfies the constraints out.

Columns are taken in an order. The columns before x_i are settled; the rows of elimination's level i turn into

    lb_i = max over rows with w_i > 0 of -(sum_{k<i} w_k x_k + b) / w_i,
    ub_i = min over rows with w_i < 0 of  (sum_{k<i} w_k x_k + b) / |w_i|,        x_i <- min(max(x_i, lb_i),
    ub_i),

and lb_i <= ub_i always, because elimination kept room. Each column moves as little as it can given those
before it; the order decides who moves. It is not the Euclidean projection, and costs one small matrix product
a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.density.constrained_tabular.constraints import LinearConstraints
from paperback.density.constrained_tabular.elimination import Level
from paperback.errors import DataError

ROUNDING = 16 * torch.finfo(torch.float64).eps  # of the size of a sum's terms
ON_GRID = 1e-9  # of a grid's step: a bound so near a grid point is on it


class ConstraintLayer(nn.Module):
    """Moves rows into the set that linear constraints describe; rows inside it come back unchanged.

    It has no parameters, is differentiable almost everywhere, and computes in float64 whatever it is given.
    Where a coordinate was not moved its gradient is 1; where it was, the gradient goes to the coordinates
    that made its bound.

    Args:
        constraints: what holds.
        columns: the columns of the input, in order; those of the constraints if not given. What no
            constraint names passes through.
        order: which column moves least freely, first to last: a permutation of the constrained columns; in
            the order of the constraints if not given.
        eps: how far inside a strict constraint a row is put, relative to the spread of its terms.
        spread: size of each column, such as its standard deviation; 1 where not given. For `eps` only.
        decimals: columns whose values are to be rounded to so many decimals (0: whole numbers). Rows are
            rounded first, and bounds inwards. Rounding has no gradient.
        prune_above: rows of a level of the elimination above which redundant ones are left out.

    Attributes:
        order: the order that is used.
        moved_: share of the rows of the last batch in which each column was moved, rounding aside,
            ``(columns,)``.
        unrounded_: number of cells of the last batch for which no rounded value satisfied the constraints;
            they satisfy them unrounded. Only constraints that tie rounded columns together as tightly as an
            equality can leave such cells.

    Raises:
        DataError: if the order is no permutation of the constrained columns, or the constraints leave no
            room for `eps`.
    """

    def __init__(
        self,
        constraints: LinearConstraints,
        columns: Sequence[str] | None = None,
        order: Sequence[str] | None = None,
        *,
        eps: float = 1e-6,
        spread: Mapping[str, float] | None = None,
        decimals: Mapping[str, int] | None = None,
        prune_above: int = 50,
    ) -> None:
        super().__init__()
        self.constraints = constraints
        self.columns = tuple(constraints.columns if columns is None else columns)
        self.order = tuple(constraints.columns if order is None else order)
        absent = [name for name in constraints.columns if name not in self.columns]
        if absent:
            raise DataError(
                f"the input has no column {absent[0]!r}, which the constraints name; add it to columns."
            )
        if not eps > 0:
            raise DataError(f"eps is {eps}; it must be greater than 0.")
        self.decimals = {name: int(places) for name, places in (decimals or {}).items()}
        margins = [_margin(row.weights, spread or {}, eps) for row in constraints.rows]
        compiled = self._compile(margins, eps, prune_above)
        self.positions = [self.columns.index(name) for name in self.order]
        self.levels = nn.ModuleList(_Bounds(level, self.order[:i]) for i, level in enumerate(compiled))
        self.moved_ = torch.zeros(len(self.columns))
        self.unrounded_ = 0
        A, b, strict = constraints.arrays
        places = [self.columns.index(name) for name in constraints.columns]
        weights = torch.zeros(len(A), len(self.columns), dtype=torch.float64)
        weights[:, places] = torch.from_numpy(A)
        closed = torch.tensor(
            [float(m) if s else 0.0 for m, s in zip(margins, strict, strict=True)], dtype=torch.float64
        )
        feasible = constraints.feasible_point()
        point = torch.tensor([float(feasible.get(name, 0)) for name in self.columns], dtype=torch.float64)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("constants", torch.from_numpy(b) - closed, persistent=False)
        self.register_buffer("point", point, persistent=False)
        self.register_buffer("sizes", weights.abs(), persistent=False)
        scales = torch.tensor(
            [10.0 ** self.decimals.get(name, 0) for name in self.columns], dtype=torch.float64
        )
        self.register_buffer("scales", scales, persistent=False)
        rounded = torch.tensor([name in self.decimals for name in self.columns])
        self.register_buffer("rounded", rounded, persistent=False)

    weights: Tensor
    constants: Tensor
    point: Tensor
    sizes: Tensor
    scales: Tensor
    rounded: Tensor

    def _compile(self, margins: list[Fraction], eps: float, prune_above: int) -> list[Level]:
        """The levels: with room for rounded values, where the constraints leave it."""
        constraints = self.constraints
        try:
            closed = constraints.levels(self.order, margins, prune_above)
        except DataError as error:
            raise DataError(
                f"the strict constraints leave no room for eps = {eps}; lower eps ({error})"
            ) from None
        steps = {name: Fraction(10) ** -places for name, places in self.decimals.items()}
        if not steps:
            return closed
        try:
            return constraints.levels(self.order, margins, prune_above, steps)
        except DataError:  # equalities, for example; cells without a rounded value are counted in unrounded_
            return closed

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move to a device, but stay in float64: float32 bounds would break the constraints by 1e-7."""
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def forward(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch columns"]:
        """Rows that satisfy the constraints.

        Args:
            x: rows in the units of the constraints, any floating-point type. A missing cell (NaN) stays
                missing, and the other cells are such that some value of it satisfies the constraints.

        Returns:
            The corrected rows, of x's type.

        Raises:
            DataError: if x has another number of columns.
        """
        rows, missing = self._prepare(x)
        outside = (~self._inside(rows)).nonzero()[:, 0]
        before = rows[outside]
        after = self._correct(before)
        self.moved_ = (after.detach() != before.detach()).sum(0) / max(len(rows), 1)
        result = rows.index_copy(0, outside, after).to(x.dtype)
        return result if missing is None else torch.where(missing, x, result)

    def _correct(self, rows: Tensor) -> Tensor:
        """One pass over the columns in their order."""
        cells = list(rows.unbind(1))
        self.unrounded_ = 0
        for place, (position, bounds) in enumerate(zip(self.positions, self.levels, strict=True)):
            settled = [cells[k] for k in self.positions[:place]]
            low, high = bounds(settled)
            cells[position] = self._settle(cells[position], low, high, self.columns[position])
        return torch.stack(cells, 1)

    def bounds(
        self, x: Float[Tensor, "batch columns"]
    ) -> tuple[Float[Tensor, "batch columns"], Float[Tensor, "batch columns"]]:
        """The room of each column, given the values in x of the columns before it in the order.

        Args:
            x: rows without missing cells; corrected ones, if the bounds are to be those of the layer.

        Returns:
            Lower and upper bounds, float64; infinite where there is none.
        """
        cells = list(x.double().unbind(1))
        lower, upper = (
            torch.full_like(x, -torch.inf, dtype=torch.float64),
            torch.full_like(x, torch.inf, dtype=torch.float64),
        )
        for place, (position, bounds) in enumerate(zip(self.positions, self.levels, strict=True)):
            low, high = bounds([cells[k] for k in self.positions[:place]])
            if low is not None:
                lower[:, position] = low
            if high is not None:
                upper[:, position] = high
        return lower, upper

    def _prepare(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows in float64, rounded, missing cells filled in; and which cells were missing, or None."""
        if x.ndim != 2 or x.shape[1] != len(self.columns):
            raise DataError(f"the rows have shape {tuple(x.shape)}; expected (batch, {len(self.columns)}).")
        rows = x.double()
        missing = torch.isnan(rows) if torch.isnan(rows.sum()) else None
        if missing is not None:
            rows = torch.where(missing, self.point, rows)
        if self.decimals:
            rows = torch.where(self.rounded, (rows * self.scales).round() / self.scales, rows)
        return rows, missing

    def _inside(self, rows: Tensor) -> Tensor:
        """Rows that satisfy the constraints up to the rounding of the sums."""
        with torch.no_grad():
            slack = rows @ self.weights.T + self.constants
            size = rows.abs() @ self.sizes.T + self.constants.abs()
            return (slack >= -ROUNDING * size).all(1)

    def _settle(self, cell: Tensor, low: Tensor | None, high: Tensor | None, name: str) -> Tensor:
        """The nearest value of one column between its bounds, rounded if the column is."""
        if low is not None:
            cell = torch.maximum(cell, low)
        if high is not None:
            cell = torch.minimum(cell, high)
        if name not in self.decimals:
            return cell
        scale = 10.0 ** self.decimals[name]
        rounded = (cell * scale).round()
        if low is not None:
            rounded = torch.maximum(rounded, (low * scale - ON_GRID).ceil())
        if high is not None:
            rounded = torch.minimum(rounded, (high * scale + ON_GRID).floor())
        fits = torch.ones_like(cell, dtype=torch.bool)
        if low is not None and high is not None:
            fits = rounded >= (low * scale - ON_GRID).ceil()
            self.unrounded_ += int((~fits).sum())
        return torch.where(fits, rounded / scale, cell)


class _Bounds(nn.Module):
    """Lower and upper bounds of one column as functions of the columns before it."""

    def __init__(self, level: Level, before: Sequence[str]) -> None:
        super().__init__()
        for side, rows in (("low", level.lower), ("high", level.upper)):
            # x_i against -(sum_k w_k x_k + b) / w_i, for either sign of w_i.
            matrix = [
                [float(-row.weights.get(n, Fraction(0)) / row.weights[level.column]) for n in before]
                for row in rows
            ]
            vector = [float(-row.constant / row.weights[level.column]) for row in rows]
            weights = torch.tensor(matrix, dtype=torch.float64).reshape(len(rows), len(before))
            used = [k for k in range(len(before)) if weights[:, k].any()]
            setattr(self, f"{side}_used", used)
            self.register_buffer(f"{side}_weights", weights[:, used], persistent=False)
            self.register_buffer(
                f"{side}_constants", torch.tensor(vector, dtype=torch.float64)[:, None], persistent=False
            )

    def forward(self, settled: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Bounds ``(batch,)``, or of one element where they are constant; None where there is none."""
        low, high = self._side("low", settled), self._side("high", settled)
        return None if low is None else low.amax(0), None if high is None else high.amin(0)

    def _side(self, side: str, settled: Sequence[Tensor]) -> Tensor | None:
        weights, constants = getattr(self, f"{side}_weights"), getattr(self, f"{side}_constants")
        used = getattr(self, f"{side}_used")
        if len(constants) == 0:
            return None
        if not used:
            return constants
        return weights @ torch.stack([settled[k] for k in used]) + constants


def _margin(weights: Mapping[str, Fraction], spread: Mapping[str, float], eps: float) -> Fraction:
    """How far inside a strict constraint rows are put: eps of the size of its terms."""
    sizes = (abs(weight) * Fraction(repr(float(spread.get(name, 1.0)))) for name, weight in weights.items())
    return Fraction(repr(float(eps))) * sum(sizes, Fraction(0))
