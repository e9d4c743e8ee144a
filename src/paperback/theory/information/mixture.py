"""Information through Gaussian noise: pairwise bounds on the entropy of a Gaussian mixture.

With noise N(0, s^2 I) added, a layer's output T over N inputs is a mixture of N Gaussians. Kolchinsky and
Tracey (2017, section 4) bound its entropy from pairwise distances:

    upper (KL):             H <= d/2 - mean_i [ log sum_j exp(-|t_i - t_j|^2 / 2 s^2) - log N
                                                 - d/2 log(2 pi s^2) ]
    lower (Bhattacharyya):  the same with 4 s^2 in place of s^2, plus d/2 log(1/4).

From both, H(T|X) = d/2 (log(2 pi s^2) + 1) is taken. Everything with d or pi cancels:

    -mean_i log mean_j exp(-|t_i - t_j|^2 / 8 s^2)  <=  I(X;T)
                                                    <=  -mean_i log mean_j exp(-|t_i - t_j|^2 / 2 s^2).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from paperback.errors import DataError

_ENTRIES_AT_A_TIME = 2**18  # of the N x N table of distances: what a cache holds


class MixtureInformation(NamedTuple):
    """Bounds in bits on the information that noisy rows carry about which row, and which group, they are.

    Attributes:
        lower: of I(row; T + noise), by the Bhattacharyya distance.
        upper: of the same, by the KL divergence.
        within_lower: of I(row; T + noise | group).
        within_upper: of the same. I(group; T + noise) is the difference of the two informations.
    """

    lower: float
    upper: float
    within_lower: float
    within_upper: float


def mixture_information(
    T: Float[np.ndarray, "n d"], variance: float, groups: Int[np.ndarray, " n"] | None = None
) -> MixtureInformation:
    """How much of its row, and of its row given the group, a noisy output tells.

    The n x n distances are made in chunks; the memory does not grow with n^2.

    Args:
        T: ``(n, d)``, the centres of the mixture, all of the same weight.
        variance: s^2 of the noise, > 0.
        groups: ``(n,)`` integers; one group if not given.

    Returns:
        The bounds, in bits.

    Raises:
        DataError: if the variance is not a positive number.

    Source:
        Kolchinsky and Tracey, Estimating Mixture Entropy with Pairwise Distances (2017), section 4.
    """
    if not (np.isfinite(variance) and variance > 0):
        raise DataError(f"the noise variance is {variance}; it must be a positive number.")
    codes = np.zeros(len(T), np.int64) if groups is None else np.asarray(groups)
    order = np.argsort(codes, kind="stable")
    rows: NDArray[np.float64] = np.asarray(T, np.float64)[order]
    _, starts, members, sizes = np.unique(
        codes[order], return_index=True, return_inverse=True, return_counts=True
    )
    sums = np.zeros(4)
    step = max(1, _ENTRIES_AT_A_TIME // len(rows))
    for start in range(0, len(rows), step):
        chunk = slice(start, min(start + step, len(rows)))
        own, own_size = members[chunk], sizes[members[chunk]]
        kernel = np.exp(
            cdist(rows[chunk], rows, "sqeuclidean") / (-8 * variance)
        )  # its row has a 1: no log(0)
        for i in (0, 1):
            in_group = np.add.reduceat(kernel, starts, axis=1)[np.arange(len(own)), own]
            sums[i] -= np.log(kernel.mean(axis=1)).sum()
            sums[2 + i] -= np.log(in_group / own_size).sum()
            if i == 0:
                kernel = np.square(np.square(kernel, out=kernel), out=kernel)  # from 8 s^2 to 2 s^2
    lower, upper, within_lower, within_upper = np.clip(
        sums / (len(rows) * np.log(2)), 0.0, np.log2(len(rows))
    )
    return MixtureInformation(float(lower), float(upper), float(within_lower), float(within_upper))
