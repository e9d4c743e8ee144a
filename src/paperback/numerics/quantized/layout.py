"""Which entries of a tensor share a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from paperback.errors import DataError

Per = Literal["tensor", "channel", "bucket", "group"]


@dataclass(frozen=True)
class Layout:
    """Which entries of a tensor share a grid.

    Attributes:
        shape: of the tensor.
        per: "tensor": all of it; "channel": each index of the first axis; "group": runs of `size` entries
            inside each index of the first axis; "bucket": runs of `size` entries of the flattened tensor.
        size: of a run, for "group" and "bucket". The last run may be shorter.
    """

    shape: tuple[int, ...]
    per: Per = "tensor"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.per not in get_args(Per):
            raise DataError(f"per is {self.per!r}; it must be one of {', '.join(get_args(Per))}.")
        sized = self.per in ("group", "bucket")
        whole = isinstance(self.size, int) and not isinstance(self.size, bool)
        if sized and not (whole and self.size is not None and self.size > 0):
            raise DataError(f"size is {self.size!r}; per={self.per!r} needs a whole number above 0.")
        if not sized and self.size is not None:
            raise DataError(f"size is {self.size!r}, but per={self.per!r} has none; use 'group' or 'bucket'.")
        if math.prod(self.shape) == 0:
            raise DataError(f"a tensor of shape {self.shape} has no entries to quantize.")
        if self.per in ("channel", "group") and not self.shape:
            raise DataError(f"per={self.per!r} needs a tensor with an axis; use per='tensor' for a number.")

    @property
    def rows(self) -> int:
        """Parts that no run crosses."""
        return self.shape[0] if self.per in ("channel", "group") else 1

    @property
    def length(self) -> int:
        """Entries of such a part."""
        return math.prod(self.shape) // self.rows

    @property
    def width(self) -> int:
        """Entries that share a grid."""
        return min(self.size or self.length, self.length)

    @property
    def groups(self) -> int:
        """Number of grids."""
        return self.rows * math.ceil(self.length / self.width)

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor as (groups, width); a run that is shorter is filled up with its last entry."""
        parts = tensor.reshape(self.rows, self.length)
        missing = -self.length % self.width
        if missing:
            parts = torch.cat([parts, parts[:, -1:].expand(-1, missing)], dim=1)
        return parts.reshape(self.groups, self.width)

    def merge(self, groups: Tensor) -> Tensor:
        """The inverse of `split`."""
        return groups.reshape(self.rows, -1)[:, : self.length].reshape(self.shape)
