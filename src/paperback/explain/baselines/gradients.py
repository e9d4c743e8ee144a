"""Integrated gradients: how much of a score each column owes, along the straight way from a reference.

    contribution_j = (x_j - r_j) * integral_0^1 ds(r + t (x - r))/dx_j dt,     sum_j = s(x) - s(r)

Source: Sundararajan, Taly and Yan, ICML 2017, arXiv 1703.01365; by the library captum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError, MissingExtraError

STEPS = 32  # of Gauss and Legendre
BATCH = 8192  # points on all ways at once


def integrated_gradients(
    scores: Callable[..., Tensor],
    X: Float[Tensor, "rows features"],
    reference: Float[Tensor, " features"],
    *,
    steps: int = STEPS,
    arguments: tuple[Any, ...] = (),
) -> Float[Tensor, "rows features"]:
    """Contributions of the columns to one score of each row.

    Args:
        scores: differentiable, ``(n, features), *arguments -> (n,)``.
        X: rows.
        reference: where the ways begin: what stands for nothing, such as the mean.
        steps: nodes of the integral.
        arguments: tensors ``(rows, ...)`` that go with the rows.

    Returns:
        Contributions, which add up to the difference of the scores of the row and the reference, but for the
        error of the integral.

    Raises:
        MissingExtraError: if captum is not installed.
        DataError: if shapes do not fit or steps < 1.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise MissingExtraError(
            "integrated gradients need captum; install it with: pip install 'paperback[explain]'."
        ) from error
    if X.ndim != 2 or reference.shape != X.shape[1:] or steps < 1:
        raise DataError(
            f"X is {tuple(X.shape)}, the reference {tuple(reference.shape)} and steps {steps}; give rows, "
            "a reference as long as a row, and at least 1 step."
        )
    if len(X) == 0:
        return torch.zeros_like(X)
    found: Tensor = IntegratedGradients(scores).attribute(
        X.detach(),
        baselines=reference.to(X)[None],
        additional_forward_args=arguments or None,
        n_steps=steps,
        method="gausslegendre",
        internal_batch_size=BATCH,
    )
    return found.detach()
