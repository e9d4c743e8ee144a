"""Eight named colours: hues of the colour circle that a person tells apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Shares of the colour circle, from red.
COLOURS = {
    "red": 0.0, "orange": 0.08, "yellow": 0.16, "green": 0.33, "cyan": 0.5, "blue": 0.62, "purple": 0.76,
    "pink": 0.9,
}  # fmt: skip
SPREAD = 0.015  # hues of a name lie within this of the middle


def draw_colours(
    n: int, rng: np.random.Generator, but: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """n names, by number, and hues.

    Args:
        n: how many.
        rng: source of the draws.
        but: a number for each that must not be taken.
    """
    names = rng.integers(0, len(COLOURS), n)
    if but is not None:
        names = (but + rng.integers(1, len(COLOURS), n)) % len(COLOURS)
    middles = np.array(list(COLOURS.values()))
    return names, (middles[names] + rng.uniform(-SPREAD, SPREAD, n)) % 1.0


def rgb(hue: NDArray[Any], saturation: NDArray[Any], value: float) -> NDArray[np.float32]:
    """Red, green and blue in 0..1, ``(n, 3)``."""
    from matplotlib.colors import hsv_to_rgb

    hsv = np.stack([hue, saturation, np.full(len(hue), value)], axis=1)
    return np.asarray(hsv_to_rgb(hsv), dtype=np.float32)
