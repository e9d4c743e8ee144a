"""Bijections of integer data: a circuit fitted to what one gives codes the data through it.

    predicted = median_edge((28, 28), 256)
    model.fit(X, transform=predicted)
    data = PCCompressor(model, transform=predicted).compress(X)

For a bijection T of integers, p(X = x) = p(T(X) = T(x)): the bits of the residuals are the bits of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from paperback.errors import DataError


class Transform(NamedTuple):
    """A bijection: integers ``(batch, *event)`` to integers of the same shape, and back."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def transformed(X: Int[Tensor, " batch *event"], transform: Transform | None) -> Tensor:
    """What the model sees, after a check that X comes back.

    Raises:
        DataError: if the transform changes the shape, or does not give X back.
    """
    if transform is None:
        return X
    if X.dtype.is_floating_point or X.dtype.is_complex or X.dtype == torch.bool:
        raise DataError(f"X has dtype {X.dtype}; a transform takes integer states.")
    Z = transform.forward(X)
    if Z.shape != X.shape:
        raise DataError(
            f"the transform makes {tuple(Z.shape)} of {tuple(X.shape)}; it has to keep the shape."
        )
    if not torch.equal(transform.inverse(Z).long(), X.long()):
        raise DataError("the transform does not give X back from what it makes of it; give a bijection.")
    return Z


def median_edge(shape: tuple[int, int], n_states: int) -> Transform:
    """Residuals of the median edge detector: each pixel minus its prediction, modulo the number of states.

    With a the pixel to the left, b the one above and c the one above a, the prediction is
    median(a, b, a + b - c): b at a vertical edge, a at a horizontal one, a plane elsewhere. Outside of the
    image a pixel is 0, which makes the prediction a in the first row and b in the first column.

    Args:
        shape: height and width of the images, each >= 1; rows may also be given flat.
        n_states: states of a pixel, >= 2.

    Returns:
        The transform, for states of any shape ``(batch, ...)`` with height * width entries each.

    Raises:
        DataError: if an argument is out of range, or (when it is used) X does not fit.

    Source: Weinberger, Seroussi and Sapiro, The LOCO-I lossless image compression algorithm (2000).
    """
    height, width = shape
    if height < 1 or width < 1 or n_states < 2:
        raise DataError(f"shape is {shape} and n_states {n_states}; give at least 1 by 1 and 2.")
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    # Pixels of one diagonal depend on earlier diagonals only.
    diagonals = [(row[row + column == d], column[row + column == d]) for d in range(height + width - 1)]

    def framed(X: Tensor) -> Tensor:
        if X[0:1].numel() != height * width * min(len(X), 1):
            raise DataError(f"X has shape {tuple(X.shape)}; expected {height} x {width} pixels in each row.")
        return torch.nn.functional.pad(X.reshape(len(X), height, width).long(), (1, 0, 1, 0))

    def forward(X: Tensor) -> Tensor:
        image = framed(X)
        left, above, corner = image[:, 1:, :-1], image[:, :-1, 1:], image[:, :-1, :-1]
        return (image[:, 1:, 1:] - predicted(left, above, corner)).remainder(n_states).view(X.shape)

    def inverse(Z: Tensor) -> Tensor:
        residual = framed(Z)
        image = torch.zeros_like(residual)
        for r, c in diagonals:  # in the frame the pixel itself stands at (r + 1, c + 1)
            guess = predicted(image[:, r + 1, c], image[:, r, c + 1], image[:, r, c])
            image[:, r + 1, c + 1] = (residual[:, r + 1, c + 1] + guess).remainder(n_states)
        return image[:, 1:, 1:].reshape(Z.shape)

    return Transform(forward, inverse)


def predicted(left: Tensor, above: Tensor, corner: Tensor) -> Tensor:
    """The median of left, above and left + above - corner."""
    low, high = torch.minimum(left, above), torch.maximum(left, above)
    return (left + above - corner).clamp(low, high)
