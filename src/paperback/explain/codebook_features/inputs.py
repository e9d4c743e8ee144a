"""Calling a model: with a tensor, with tensors by keyword, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from paperback.errors import DataError

Inputs = Tensor | Mapping[str, Tensor]


def first(value: Any) -> Any:
    """The first of a tuple or list, else the value itself."""
    return value[0] if isinstance(value, tuple | list) and value else value


def run(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, with several, or by keyword."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, dict) or hasattr(inputs, "keys"):
        return model(**inputs)
    return model(*inputs)


def batches(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """The rows of an input, some at a time.

    Raises:
        DataError: if there are no rows, or the tensors differ in them.
    """
    parts = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    rows = {len(part) for part in parts}
    if len(rows) != 1 or rows == {0}:
        raise DataError(f"the inputs have {sorted(rows)} rows; give equally many, at least one.")
    if size < 1:
        raise DataError(f"batch_size is {size}; it must be at least 1.")
    for begin in range(0, rows.pop(), size):
        part = slice(begin, begin + size)
        yield inputs[part] if isinstance(inputs, Tensor) else {n: t[part] for n, t in inputs.items()}
