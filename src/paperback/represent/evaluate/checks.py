"""Features and labels as the functions of this package take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from paperback.errors import DataError

Array = NDArray[np.float64]
Labels = NDArray[Any]

ZERO = 1e-12  # a norm below it has no direction


def checked(features: Any, labels: Any, name: str = "features") -> tuple[Array, Labels]:
    """Features ``(n, dim)`` as float64 with their labels ``(n,)``.

    Raises:
        DataError: naming what does not fit.
    """
    x = numbers(features, name)
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if y.shape != (len(x),):
        raise DataError(f"{name} has {len(x)} rows and its labels shape {y.shape}; give one label for each.")
    return x, y


def numbers(features: Any, name: str = "features") -> Array:
    """Features ``(n, dim)`` as finite float64, at least one row."""
    x = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if x.ndim != 2 or len(x) == 0 or x.dtype.kind not in "fiu":
        raise DataError(f"{name} has shape {x.shape} and dtype {x.dtype}; expected numbers (rows, features).")
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise DataError(
            f"{name} has a value that is not finite in row {int(finite.argmin())}; remove the row."
        )
    return x.astype(np.float64)


def check_width(x: Array, y: Array, names: tuple[str, str]) -> None:
    """Both have one number of features."""
    if x.shape[1] != y.shape[1]:
        raise DataError(f"{names[0]} has {x.shape[1]} features and {names[1]} {y.shape[1]}; they must agree.")


def unit(x: Array, name: str = "features") -> Array:
    """Rows of length one.

    Raises:
        DataError: if a row has no direction.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if (norms < ZERO).any():
        rows = np.flatnonzero(norms[:, 0] < ZERO)
        raise DataError(
            f"{name} is zero in row(s) {', '.join(map(str, rows[:5]))}; a cosine needs a direction."
        )
    return x / norms
