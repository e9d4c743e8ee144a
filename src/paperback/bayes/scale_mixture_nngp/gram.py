"""Kernel matrices of one data set or of many, and what inference needs of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from paperback.bayes.kernels import ConvNNGPKernel, NNGPKernel
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

REMEDY = "remove rows that are nearly equal, or raise the noise"
KERNELS = ("relu", "erf", "resnet", "conv")


def build_kernel(
    kernel: str, depth: int, weight_variance: float, bias_variance: float, image_shape: Sequence[int] | None
) -> NNGPKernel:
    """The kernel of a network with a readout of unit variance and without readout bias, in float64.

    Args:
        kernel: "relu" or "erf", fully connected; "resnet", fully connected ReLU blocks; "conv", ReLU
            convolutions without pooling.
        depth: hidden layers.
        weight_variance: of the weights times fan-in.
        bias_variance: of the biases.
        image_shape: of "conv".

    Returns:
        The kernel.

    Raises:
        DataError: if there is no such kernel, or an image shape is missing.
    """
    if kernel not in KERNELS:
        raise DataError(f"kernel is {kernel!r}; it is one of {', '.join(KERNELS)}.")
    if kernel == "conv":
        if image_shape is None:
            raise DataError("the convolutional kernel needs image_shape, such as (28, 28).")
        made: NNGPKernel = ConvNNGPKernel(image_shape, depth)
    else:
        activation: Any = "erf" if kernel == "erf" else "relu"
        made = NNGPKernel(depth, activation, readout="unit", residual=kernel == "resnet")
    made = made.double()
    made.weight_variance, made.bias_variance = weight_variance, bias_variance
    return made


class Tasks(NamedTuple):
    """Data sets of different sizes as one tensor.

    Attributes:
        x: ``(tasks, rows, features)``, zeros behind the rows of a task.
        y: ``(tasks, rows, outputs)``, likewise.
        mask: which rows are there.
    """

    x: Float[Tensor, "tasks rows features"]
    y: Float[Tensor, "tasks rows outputs"]
    mask: Bool[Tensor, "tasks rows"]

    @classmethod
    def of(cls, sets: Sequence[tuple[Tensor, Tensor]]) -> Tasks:
        """Pad data sets to the longest."""
        x, y = (
            torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            for parts in zip(*sets, strict=True)
        )
        sizes = torch.tensor([len(part) for part, _ in sets])
        return cls(x, y, torch.arange(x.shape[1]) < sizes[:, None])

    @property
    def observations(self) -> Float[Tensor, " tasks"]:
        """Numbers observed in each: rows times outputs."""
        return self.mask.sum(1).double() * self.y.shape[-1]


def sufficient_statistics(
    gram: Float[Tensor, "*tasks rows rows"], y: Float[Tensor, "*tasks rows outputs"]
) -> tuple[Tensor, Tensor]:
    """q = sum over outputs of y^T K^-1 y, and log|K| counted once for each output, ``(*tasks,)``."""
    lower = cholesky(gram, "kernel matrix of the scale mixture", remedy=REMEDY).lower
    white = torch.linalg.solve_triangular(lower, y, upper=False)
    log_det = 2 * lower.diagonal(dim1=-1, dim2=-2).log().sum(-1)
    return white.square().sum((-1, -2)), y.shape[-1] * log_det


def noiseless_grams(kernel: NNGPKernel, tasks: Tasks) -> Float[Tensor, "tasks rows rows"]:
    """K of every task, zero where rows are not there."""
    there = tasks.mask.double()
    return kernel.forward(tasks.x, tasks.x) * there[:, :, None] * there[:, None, :]


def task_grams(kernel: NNGPKernel, noise: Tensor, tasks: Tasks) -> Float[Tensor, "tasks rows rows"]:
    """K + noise I of every task; rows that are not there have a one on the diagonal and zeros beside it."""
    there = tasks.mask.double()
    return noiseless_grams(kernel, tasks) + torch.diag_embed(noise * there + (1 - there))


def additive_evidence(
    log_prior: Tensor, u: Tensor, log_step: Tensor, gram: Tensor, noise: Tensor, tasks: Tasks
) -> Tensor:
    """log of the integral of N(y; 0, s2 K + noise I) H(d s2), by a sum over nodes u = log s2.

    Args:
        log_prior: log density of u at the nodes, ``(tasks, nodes)``.
        u: nodes, ``(tasks, nodes)``.
        log_step: logarithm of their weights.
        gram: K without noise, ``(tasks, rows, rows)``.
        noise: variance.
        tasks: the data sets.

    Returns:
        ``(tasks,)``.
    """
    there = tasks.mask.double()
    scaled = u.exp()[..., None, None] * gram[:, None]  # (tasks, nodes, rows, rows)
    full = scaled + torch.diag_embed(noise * there + (1 - there))[:, None]
    y = tasks.y[:, None].expand(-1, u.shape[1], -1, -1)
    q, log_det = sufficient_statistics(full, y)
    n = tasks.observations[:, None]
    values = -0.5 * (n * math.log(2 * math.pi) + log_det + q)
    return (log_prior + values + log_step).logsumexp(-1)
