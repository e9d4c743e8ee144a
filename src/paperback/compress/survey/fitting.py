"""Which of several settings meets a size in bytes or parameters: the largest whose files, really written,
do."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from paperback.compress.budget import Budget
from paperback.compress.report import counts
from paperback.compress.storage import save_model
from paperback.errors import BudgetError
from paperback.study.measure import size_on_disk

Setting = TypeVar("Setting")


def largest_that_fits(
    budget: Budget,
    model: nn.Module,
    settings: Sequence[Setting],
    shrink: Callable[[nn.Module, Setting], None],
    method: str,
) -> Setting:
    """The first setting with which the model meets a budget.

    Args:
        budget: in bytes, ratio or parameters.
        model: left as it is; each setting is tried on a copy.
        settings: from the largest model to the smallest.
        shrink: gives a copy of the model the size that the method would give it; its weights do not matter.
        method: for the error.

    Returns:
        The setting.

    Raises:
        BudgetError: if even the last one does not fit, with the range that can be reached.
    """
    if budget.unit == "parameters":
        measure: Callable[[nn.Module], int] = _parameters
        limit = float(budget.value)
    else:
        measure = bytes_on_disk
        limit = budget.value * bytes_on_disk(model) if budget.unit == "ratio" else float(budget.value)
    sizes = []
    for setting in settings:
        trial = copy.deepcopy(model)
        shrink(trial, setting)
        sizes.append(measure(trial))
        if sizes[-1] <= limit:
            return setting
    unit = "parameters" if budget.unit == "parameters" else "bytes"
    raise BudgetError(
        f"{method} reaches {min(sizes):,} to {max(sizes):,} {unit} for this model; the budget is "
        f"{limit:,.0f}."
    )


def bytes_on_disk(model: nn.Module) -> int:
    """Bytes of a model's folder, really written."""
    with tempfile.TemporaryDirectory(prefix="paperback-size-") as folder:
        save_model(model, Path(folder) / "model", loadable=False)
        return size_on_disk(Path(folder) / "model")


def _parameters(model: nn.Module) -> int:
    return counts(model)[0]
