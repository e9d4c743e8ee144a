"""The deep linear kernel machine, whose Gram matrices are known in closed form.

With linear kernels, equal degrees of freedom, as many outputs as they, no noise, and a target Gram matrix
G_{L+1} = Y Y^T / nu of full rank, the objective is a sum of equal divergences along a path from K_0 to
G_{L+1}. Its maximum is the geometric path G_l = K_0 (K_0^-1 G_{L+1})^(l / (L+1)).

Source: Yang et al. (2023), the deep linear case.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.numerics.linear_algebra import cholesky


def deep_linear_grams(
    kernel: Float[Tensor, "points points"], target: Float[Tensor, "points points"], depth: int
) -> list[Float[Tensor, "points points"]]:
    """The Gram matrices of the layers.

    Args:
        kernel: K_0, of the inputs, positive definite.
        target: G_{L+1}, positive definite.
        depth: L >= 1.

    Returns:
        G_1 to G_L.

    Raises:
        DataError: if K_0 is not positive definite.
    """
    lower = cholesky(kernel, "kernel of the inputs").lower
    left = torch.linalg.solve_triangular(lower, target, upper=False)
    middle = torch.linalg.solve_triangular(lower, left.mT, upper=False)  # similar to K_0^-1 G_{L+1}
    values, vectors = torch.linalg.eigh((middle + middle.mT) / 2)
    root = lower @ vectors
    powers = (values ** (layer / (depth + 1)) for layer in range(1, depth + 1))
    return [(root * power) @ root.mT for power in powers]
