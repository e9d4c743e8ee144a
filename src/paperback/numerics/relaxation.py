"""Discrete choices that gradients pass through: straight-through estimators and Gumbel-softmax.

With g_k = -log(-log U_k) independent standard Gumbel noise, argmax_k (l_k + g_k) is a draw from softmax(l).
The Gumbel-softmax replaces the argmax by a softmax at temperature tau,

    p = softmax((l + g) / tau),

which has a gradient and becomes the draw itself as tau goes to 0. The noise is given or comes from a
generator, never from torch's global state, so that a relaxation can be repeated.

Source: Jang, Gu and Poole (2017) and Maddison, Mnih and Teh (2017) for the Gumbel-softmax; Bengio, Leonard
and Courville (2013) for the straight-through estimator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from paperback.errors import DataError


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """The first tensor's value with the second tensor's gradient.

    Args:
        value: what goes forward, for instance a rounded or binary tensor; bool counts as 0 and 1.
        surrogate: finite, of the same shape; what gradients are passed to, unchanged.

    Returns:
        A tensor equal to `value`, bit for bit, in the type of `surrogate`.

    Raises:
        DataError: if the shapes differ.
    """
    if value.shape != surrogate.shape:
        raise DataError(
            f"value has shape {tuple(value.shape)} and surrogate {tuple(surrogate.shape)}; they must agree."
        )
    return value.detach().to(surrogate.dtype) + (surrogate - surrogate.detach())


def gumbel_noise(
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "..."]:
    """Independent draws from the standard Gumbel law.

    Args:
        shape: of the result.
        generator: where the draws come from; they are made on its device.
        dtype: floating point, of the result.

    Returns:
        Noise with mean 0.577 (Euler's constant) and variance pi^2 / 6.
    """
    # A uniform of exactly 0 or 1 would give infinite noise. (Torch's exponential_ takes 6 times as long.)
    limits = torch.finfo(dtype)
    uniform = torch.rand(tuple(shape), dtype=dtype, device=generator.device, generator=generator)
    return uniform.clamp_(limits.tiny, 1 - limits.eps).log_().neg_().log_().neg_()


def gumbel_softmax(
    logits: Float[Tensor, "..."],
    temperature: float = 1.0,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    hard: bool = False,
    dim: int = -1,
) -> Float[Tensor, "..."]:
    """A relaxed draw of one of several categories: softmax((logits + noise) / temperature).

    Args:
        logits: of the categories along `dim`, not necessarily normalised.
        temperature: tau > 0; small is close to a draw, large is close to uniform.
        noise: standard Gumbel noise of the shape of the logits; zeros give the plain softmax.
        generator: makes the noise. Exactly one of noise and generator is given.
        hard: give a one-hot draw, with the gradient of the relaxed one (straight-through).
        dim: of the categories.

    Returns:
        Non-negative weights that sum to 1 along `dim`.

    Raises:
        DataError: if the temperature is not positive, the noise has another shape, or there are both or
            neither of noise and generator.
    """
    if not temperature > 0:
        raise DataError(f"temperature is {temperature}; it must be positive.")
    if (noise is None) == (generator is None):
        raise DataError("give exactly one of noise and generator, so that the draw can be repeated.")
    if noise is None:
        assert generator is not None
        noise = gumbel_noise(logits.shape, generator, dtype=logits.dtype).to(logits.device)
    elif noise.shape != logits.shape:
        raise DataError(f"noise has shape {tuple(noise.shape)}, logits {tuple(logits.shape)}.")
    soft = ((logits + noise) / temperature).softmax(dim)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(dim), logits.shape[dim]).movedim(-1, dim)
    return straight_through(one_hot, soft)
