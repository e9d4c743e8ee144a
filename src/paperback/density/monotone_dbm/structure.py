"""Which variables there are and which of them are coupled.

The variables stand in tiers; the rows of A, which couple them, stand in row blocks. All states of all
variables form one flat vector of length N. Inside it a tier is laid out as ``(groups, states, positions)``:
positions innermost, so that sums over the states of a variable are vectorised over positions, and so that a
spatial tier is an image ``(groups * states, height, width)`` without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError

ROLES = ("visible", "hidden", "class")


class Tier(NamedTuple):
    """A group of variables with the same number of states.

    Attributes:
        role: "visible" (the data), "hidden", or "class" (one variable, the label).
        states: number of states of each variable, k >= 2.
        variables: number of variables; in a spatial tier, at each location.
        height, width: the grid of a spatial tier, which is coupled by convolutions; both 0 for a tier without
            geometry.
    """

    role: str
    states: int
    variables: int
    height: int = 0
    width: int = 0

    @property
    def spatial(self) -> bool:
        return self.height > 0

    @property
    def groups(self) -> int:
        """Variables at one location; a tier without geometry lays its variables out as positions."""
        return self.variables if self.spatial else 1

    @property
    def positions(self) -> int:
        return self.height * self.width if self.spatial else self.variables

    @property
    def channels(self) -> int:
        return self.groups * self.states

    @property
    def size(self) -> int:
        """Length of the tier's part of the flat vector."""
        return self.channels * self.positions

    @property
    def n_variables(self) -> int:
        """Number of variables in the whole tier."""
        return self.groups * self.positions


class Rows(NamedTuple):
    """A block of rows of A: units that see several tiers and thereby couple all pairs of their variables,
    inner pairs included.

    Attributes:
        channels: number of rows, at each location if the block is spatial.
        kernels: for each tier the size of the convolution from it, 0 for none. A block that sees a tier
            without geometry has none
            itself: it sees its spatial tiers whole, and any non-zero number means "connected".
    """

    channels: int
    kernels: tuple[int, ...]


def padding(stride: int, kernel: int) -> int:
    """Padding with which every pixel meets every tap that its position modulo the stride allows, also at the
    border.
    """
    return -((stride * (kernel - 2) + kernel) // -2)


class Structure:
    """Tiers, row blocks and what follows from them: slices of the flat vector, strides, which X column stands
    where.

    Args:
        tiers: at least one visible tier, at most one class tier (with one variable).
        connections: row blocks; each lists one kernel per tier.

    Raises:
        DataError: if a role, a number, a stride or a kernel does not fit.
    """

    def __init__(self, tiers: Sequence[Sequence[int | str]], connections: Sequence[Sequence]) -> None:
        self.tiers = tuple(Tier(*tier) for tier in tiers)  # type: ignore[arg-type]
        self.rows = tuple(
            Rows(int(channels), tuple(int(k) for k in kernels)) for channels, kernels in connections
        )
        self._check_tiers()
        ends = torch.tensor([tier.size for tier in self.tiers]).cumsum(0).tolist()
        self.slices = tuple(slice(end - tier.size, end) for tier, end in zip(self.tiers, ends, strict=True))
        self.size = ends[-1]
        self.visible = tuple(t for t, tier in enumerate(self.tiers) if tier.role == "visible")
        self.class_tier = next((t for t, tier in enumerate(self.tiers) if tier.role == "class"), None)
        self.strides = tuple(self._check_rows(index) for index in range(len(self.rows)))
        self.periods = tuple(self._period(t) for t in range(len(self.tiers)))

    def _check_tiers(self) -> None:
        for index, tier in enumerate(self.tiers):
            if tier.role not in ROLES:
                raise DataError(f"tier {index} has role {tier.role!r}; it must be one of {', '.join(ROLES)}.")
            if tier.states < 2 or tier.variables < 1 or (tier.height > 0) != (tier.width > 0):
                raise DataError(
                    f"tier {index} is {tuple(tier)}; it needs states >= 2, variables >= 1, "
                    "and both height and width or neither."
                )
        roles = [tier.role for tier in self.tiers]
        if "visible" not in roles:
            raise DataError("there is no visible tier; give the data one.")
        classes = [tier for tier in self.tiers if tier.role == "class"]
        if len(classes) > 1 or any(tier.n_variables != 1 for tier in classes):
            raise DataError("there may be one class tier at most, with one variable.")

    def dense_rows(self, index: int) -> bool:
        """Whether a row block has no geometry, because it sees a tier that has none."""
        return any(
            kernel and not tier.spatial
            for tier, kernel in zip(self.tiers, self.rows[index].kernels, strict=True)
        )

    def _check_rows(self, index: int) -> tuple[int, ...]:
        """Strides of the convolutions into a row block, 0 where there is none."""
        channels, kernels = self.rows[index]
        if channels < 1 or len(kernels) != len(self.tiers) or not any(kernels) or min(kernels) < 0:
            raise DataError(
                f"row block {index} is {tuple(self.rows[index])}; it needs channels >= 1 "
                "and one kernel size >= 0 per tier, not all 0."
            )
        if self.dense_rows(index):
            return (0,) * len(self.tiers)
        seen = [tier for tier, kernel in zip(self.tiers, kernels, strict=True) if kernel]
        coarsest = min(seen, key=lambda tier: tier.height)
        strides, grids = [], set()
        for t, (tier, kernel) in enumerate(zip(self.tiers, kernels, strict=True)):
            if not kernel:
                strides.append(0)
                continue
            stride = tier.height // coarsest.height
            if (coarsest.height * stride, coarsest.width * stride) != (tier.height, tier.width):
                raise DataError(
                    f"row block {index}: tier {t} is {tier.height}x{tier.width}, which is no whole multiple "
                    f"of {coarsest.height}x{coarsest.width}."
                )
            strides.append(stride)
            grids.add((tier.height + 2 * padding(stride, kernel) - kernel) // stride + 1)
        if len(grids) > 1:
            raise DataError(
                f"row block {index}: kernels {kernels} give grids of different sizes {sorted(grids)}; "
                "use kernels of one size."
            )
        return tuple(strides)

    def _period(self, t: int) -> tuple[int, int]:
        """Period (height, width) with which the diagonal blocks of a tier repeat over its positions."""
        tier = self.tiers[t]
        if not tier.spatial:
            return (1, tier.positions)
        if any(rows.kernels[t] and self.dense_rows(index) for index, rows in enumerate(self.rows)):
            return (tier.height, tier.width)
        strides = [self.strides[index][t] for index, rows in enumerate(self.rows) if rows.kernels[t]]
        period = math.lcm(*strides)  # 1 if the tier is not coupled at all
        return (
            (period, period)
            if tier.height % period == 0 and tier.width % period == 0
            else (tier.height, tier.width)
        )

    # -- the flat vector ------------------------------------------------------------------------------------

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views ``(batch, groups, states, positions)`` of the tiers in a flat tensor ``(batch, N)``."""
        return [
            flat[:, part].unflatten(1, (tier.groups, tier.states, tier.positions))
            for tier, part in zip(self.tiers, self.slices, strict=True)
        ]

    def softmax(self, logits: Float[Tensor, "batch N"]) -> Float[Tensor, "batch N"]:
        """Softmax over the states of every variable."""
        return torch.cat([tier.softmax(2).flatten(1) for tier in self.split(logits)], 1)

    def one_hot(self, states: Sequence[Int[Tensor, "batch variables"]]) -> Float[Tensor, "batch N"]:
        """Flat one-hot vector from the states of each tier, variables in the order (groups, positions)."""
        parts = []
        for tier, index in zip(self.tiers, states, strict=True):
            grid = index.unflatten(1, (tier.groups, tier.positions))
            parts.append(nn.functional.one_hot(grid, tier.states).movedim(-1, 2).flatten(1))
        return torch.cat(parts, 1).to(torch.get_default_dtype())

    def spread(self, mask: Sequence[Bool[Tensor, "batch variables"]]) -> Bool[Tensor, "batch N"]:
        """A mask over variables, given for each tier, as a flat mask over states."""
        parts = []
        for tier, known in zip(self.tiers, mask, strict=True):
            grid = known.unflatten(1, (tier.groups, 1, tier.positions))
            parts.append(grid.expand(-1, -1, tier.states, -1).flatten(1))
        return torch.cat(parts, 1)

    def sum_states(self, flat: Float[Tensor, "batch N"]) -> Float[Tensor, "batch variables"]:
        """Sum over the states of every variable, tiers one after the other."""
        return torch.cat([tier.sum(2).flatten(1) for tier in self.split(flat)], 1)
