"""Twelve bits on the corners of an icosahedron: all 4,096 inputs, and a label that no rotation changes.

It stands in for the 12-bit task of Shwartz-Ziv and Tishby (2017), whose rule is invariant under O(3) too but
comes from a file. A pattern of bits x on the corners p_i has the score

    f(x) = sum_k lambda_k sum_ij x_i x_j P_k(p_i . p_j) + 0.05 |x|,  k = 1 .. 4,

with Legendre polynomials P_k, the power of the pattern's spherical harmonics of each degree (addition
theorem), and |x| the number of bits set. The label is whether f is above its median. Every input is distinct
and all of them are there, so that H(X) = 12 bits and I(X;Y) = H(Y) are known exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CORNERS = 12
DEGREE_WEIGHTS = (1.0, 0.7, 0.5, 0.3)  # lambda_1 .. lambda_4
WEIGHT_OF_COUNT = 0.05
DECIMALS = 9  # rotated patterns have scores that differ by rounding only; this makes them equal


class IcosahedronTask(NamedTuple):
    """All inputs of the task, in the order of the binary numbers (bit i of the row number is column i).

    Attributes:
        x: ``(4096, 12)`` float32, zeros and ones.
        y: ``(4096,)`` int64, 0 or 1.
        score: ``(4096,)`` float64, f(x), rounded to 9 decimals; 64 values are distinct.
    """

    x: Float[Tensor, "inputs corners"]
    y: Int[Tensor, " inputs"]
    score: Float[Tensor, " inputs"]


def icosahedron_task() -> IcosahedronTask:
    """The whole task; there is nothing random in it.

    Returns:
        Inputs, labels (49.7 % are 1) and scores.
    """
    corners = icosahedron_corners()
    cosines = np.clip(corners @ corners.T, -1.0, 1.0)
    kernel = np.polynomial.legendre.legval(cosines, (0.0, *DEGREE_WEIGHTS))
    bits = (np.arange(2**CORNERS)[:, None] >> np.arange(CORNERS)) & 1
    score = np.einsum("ni,ij,nj->n", bits, kernel, bits, optimize=True) + WEIGHT_OF_COUNT * bits.sum(1)
    score = score.round(DECIMALS)
    label = score > np.median(score)
    return IcosahedronTask(
        torch.from_numpy(bits).float(), torch.from_numpy(label).long(), torch.from_numpy(score)
    )


def icosahedron_corners() -> Float[np.ndarray, "corners 3"]:
    """The corners of a regular icosahedron on the unit sphere: (0, +-1, +-golden ratio) and its cyclic
    shifts.
    """
    golden = (1 + np.sqrt(5)) / 2
    face = np.array([(0.0, one, golden * sign) for one in (-1.0, 1.0) for sign in (-1.0, 1.0)])
    corners = np.concatenate([np.roll(face, shift, axis=1) for shift in range(3)])
    return corners / np.sqrt(1 + golden**2)
