"""Finite networks whose readout's variance is drawn, and the laws of wide ones that were trained.

Training by gradient descent on the squared error does not move the scale: the function that a wide trained
network ends with is a mixture over the *prior* H of s2, not over its posterior. An ensemble of such networks
samples from these laws.

Source: Lee et al., Scale mixtures of neural network Gaussian processes (2022), section 3.2, theorems 3.2 and
3.3; the integral over H is by quadrature here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from paperback.bayes.distributions import NormalMixture
from paperback.bayes.kernels import ConvNNGPKernel, NNGPKernel, NTKKernel
from paperback.bayes.scale_mixture_nngp.gram import REMEDY
from paperback.bayes.scale_mixture_nngp.scale_prior import Spec, posterior_nodes, scale_prior
from paperback.errors import DataError
from paperback.numerics.linear_algebra import cholesky

Gram = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def scale_prior_init(
    network: nn.Module,
    prior: Spec = ("inverse-gamma", 2.0, 2.0),
    *,
    weight_variance: float = 2.0,
    bias_variance: float = 0.1,
    generator: torch.Generator,
) -> float:
    """Draw the weights of a network whose wide limit is the scale mixture.

    Hidden linear and convolutional layers get weights N(0, weight_variance / fan-in) and biases N(0,
    bias_variance); the last one gets weights N(0, s2 / fan-in), with one s2 ~ H for all of them, and biases
    of zero.

    Args:
        network: its linear and convolutional layers, in the order of its modules, are drawn anew.
        prior: H, as for `ScaleMixtureNNGP`.
        weight_variance: > 0.
        bias_variance: >= 0.
        generator: of the draws.

    Returns:
        The s2 that was drawn.

    Raises:
        DataError: if the network has no such layer.
    """
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        raise DataError("the network has no linear or convolutional layer to draw.")
    s2 = float(scale_prior(prior).sample(1, generator))
    for layer in layers:
        last = layer is layers[-1]
        fan_in = layer.weight[0].numel()
        variance = (s2 if last else weight_variance) / fan_in
        layer.weight.copy_(variance**0.5 * torch.randn(layer.weight.shape, generator=generator))
        if layer.bias is not None:
            spread = 0.0 if last else bias_variance**0.5
            layer.bias.copy_(spread * torch.randn(layer.bias.shape, generator=generator))
    return s2


def ensemble_law(
    kernel: NNGPKernel,
    prior: Spec,
    x: Float[Tensor, "rows features"],
    y: Float[Tensor, "rows outputs"],
    points: Float[Tensor, "points features"],
    train: Literal["last", "all"] = "last",
) -> NormalMixture:
    """The law of the values that wide networks have after training on data to zero error.

    Args:
        kernel: the NNGP kernel with unit readout.
        prior: H.
        x: training rows.
        y: their targets.
        points: where.
        train: "last", only the readout is trained; "all", all layers are, in the NTK parameterisation: then
            for given s2 the tangent kernel is Theta = K + s2 T with T the part of the layers below.

    Returns:
        Batch ``(points, outputs)``.

    Raises:
        DataError: if the prior has no density, the kernel no tangent kernel, or `train` is none of the two.
    """
    if train not in ("last", "all"):
        raise DataError(f'train is {train!r}; it is "last" or "all".')
    no_data = torch.tensor(0.0, dtype=torch.float64)
    prior_points = posterior_nodes(scale_prior(prior), no_data, no_data)  # of no data: the prior itself
    scales, log_weights = prior_points.points, prior_points.log_weights
    gram, cross = kernel.forward(x, x), kernel.forward(x, points)
    own = kernel.forward(points, points, diag=True)
    if train == "last":
        gain = torch.cholesky_solve(cross, _lower(gram))  # K^-1 k*
        mean = gain.mT @ y
        variance = own - (cross * gain).sum(0)
        means, variances = mean.expand(len(scales), *mean.shape), scales[:, None] * variance
    else:
        tangent = _tangent(kernel)
        below, below_cross = tangent(x, x) - gram, tangent(x, points) - cross  # T
        pairs = [
            _fully_trained(gram, cross, own, gram + s2 * below, cross + s2 * below_cross, y) for s2 in scales
        ]
        means = torch.stack([mean for mean, _ in pairs])
        variances = scales[:, None] * torch.stack([variance for _, variance in pairs])
    smallest = torch.finfo(torch.float64).eps  # at training points the networks agree
    std = variances.clamp_min(smallest).sqrt()[..., None].expand_as(means)
    return NormalMixture(means, std, log_weights)


def _fully_trained(
    gram: Tensor, cross: Tensor, own: Tensor, theta: Tensor, theta_cross: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean, and variance for unit readout variance, of networks of one scale."""
    gain = torch.cholesky_solve(theta_cross, _lower(theta))  # Theta^-1 theta*
    return gain.mT @ y, own + (gain * (gram @ gain)).sum(0) - 2 * (gain * cross).sum(0)


def _lower(gram: Tensor) -> Tensor:
    return cholesky(gram, "kernel matrix of the trained networks", remedy=REMEDY).lower


def _tangent(kernel: NNGPKernel) -> Gram:
    """The neural tangent kernel of the same network."""
    if isinstance(kernel, ConvNNGPKernel):
        raise DataError("the law of fully trained networks is there for fully connected kernels only.")
    tangent = NTKKernel(kernel.depth, kernel.activation, readout="unit", residual=kernel.residual).double()
    tangent.load_state_dict(kernel.state_dict())
    return tangent.requires_grad_(False).forward
