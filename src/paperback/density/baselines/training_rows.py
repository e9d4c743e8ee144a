"""The training rows themselves in random order: what a generator of tables is measured against from above.

It learns nothing and copies everything, so its scores are those of real rows. None comes twice before all
have come once: a classifier would know repeated rows by that alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import torch

from paperback.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class TrainingRows:
    """Real rows. A `TabularGenerator`."""

    def __init__(self) -> None:
        self._frame: pd.DataFrame | None = None

    def fit(self, frame: pd.DataFrame, *, seed: int = 0, progress: bool = True, **training: Any) -> Self:
        """Keep the rows.

        Args:
            frame: the training rows, at least one.
            seed: ignored; nothing is drawn here.
            progress: ignored.
            **training: there is no setting.

        Returns:
            The model itself.

        Raises:
            DataError: if there is no row, or a setting is given.
        """
        if training:
            raise DataError(f"TrainingRows.fit has no setting {next(iter(training))!r}; leave it out.")
        if len(frame) == 0:
            raise DataError("the table has no rows; give at least one.")
        self._frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
        return self

    def sample(self, n: int, generator: torch.Generator | None = None) -> pd.DataFrame:
        """Draw training rows, in a random order that begins anew when it ends.

        Args:
            n: how many, >= 1.
            generator: source of randomness; a fresh one with seed 0 if not given.

        Returns:
            A table with the columns and types of the training rows.

        Raises:
            DataError: if n < 1 or the model is not fitted.
        """
        if n < 1 or self._frame is None:
            raise DataError(f"n is {n}; ask for at least one row, of a model that fit was called for.")
        generator = generator if generator is not None else torch.Generator().manual_seed(0)
        size, device = len(self._frame), generator.device
        orders = [
            torch.randperm(size, generator=generator, device=device) for _ in range(math.ceil(n / size))
        ]
        return self._frame.iloc[torch.cat(orders)[:n].cpu().numpy()].reset_index(drop=True)
