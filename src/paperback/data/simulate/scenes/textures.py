"""Textures as functions of the place: how much of a second colour there is at each pixel, in 0..1."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEXTURES = ("plain", "stripes", "checks", "dots", "gradient", "marble")


def weave(texture: str, size: int, angle: Tensor, frequency: Tensor, phase: Tensor) -> Tensor:
    """The share of the second colour.

    Args:
        texture: one of `TEXTURES`.
        size: side of the image, pixels.
        angle: of each image, radians, ``(n,)``.
        frequency: periods to the side of the image, ``(n,)``.
        phase: two shifts, in periods, ``(n, 2)``.

    Returns:
        ``(n, size, size)`` in 0..1.
    """
    middle = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    cosine, sine = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    along, across = cosine * x + sine * y, cosine * y - sine * x  # turned coordinates, in sides
    f = frequency.view(-1, 1, 1)
    u, v = along * f + phase[:, 0].view(-1, 1, 1), across * f + phase[:, 1].view(-1, 1, 1)
    if texture == "plain":
        return torch.zeros_like(u)
    if texture == "stripes":
        return _edge(_wave(u))
    if texture == "checks":
        return _edge(_wave(u) * _wave(v))
    if texture == "dots":
        return _edge(_wave(u) + _wave(v) - 0.9)
    if texture == "gradient":  # from one end of the image to the other, whatever the angle
        reach = cosine.abs() + sine.abs()
        return ((along - (cosine + sine) / 2) / reach + 0.5).clamp(0, 1)
    return (_wave(u + 0.6 * _wave(0.7 * v) + 0.3 * _wave(1.9 * u + v)) + 1) / 2


def _wave(t: Tensor) -> Tensor:
    return torch.sin(2 * math.pi * t)


def _edge(t: Tensor) -> Tensor:
    """0 below and 1 above zero, with a short slope that keeps edges smooth."""
    return (4 * t + 0.5).clamp(0, 1)
