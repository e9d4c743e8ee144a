"""Cosine power annealing: a learning rate between cosine and exponential decay.

With ``c_t = (1 + cos(pi t / T)) / 2`` at epoch t = 1 .. T, the rate is ``lr_min + (lr_max - lr_min) q_t``,
where ``q_t`` is ``p^(c_t + 1)`` scaled to run from 1 at the first epoch to 0 at the last. Since
``(p^(c+1) - p) / (p^2 - p) = (p^c - 1) / (p - 1)``, that is ``f(c_t) / f(c_1)`` with
``f(c) = (p^c - 1) / (p - 1)``, and f(c) = c for p = 1, the cosine.

With a warm-up of W epochs the first W + 1 rise linearly to the maximum, and the curve of T - W epochs
follows from its second epoch on; its scale is then f(1) = 1, as in the reference code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paperback.errors import DataError


def cosine_power(
    t: ArrayLike, T: int, lr_max: float, lr_min: float = 0.0, *, power: float = 2.0, warmup: int = 0
) -> NDArray[np.float64]:
    """The learning rate at given epochs.

    Args:
        t: epochs from 1; what lies beyond T is taken as T. Any shape. To resume, ask for the rest of them.
        T: number of epochs, >= 1.
        lr_max: rate of the first epoch after the warm-up.
        lr_min: rate of the last epoch.
        power: p >= 1; 1 is the cosine, 2 what the paper has for CIFAR-10, 10 for ImageNet.
        warmup: W, in 0 .. T - 1.

    Returns:
        Rates, float64, of the shape of t.

    Raises:
        DataError: if T, power, warmup or an epoch is out of range.
    """
    _check(T, power, warmup)
    epochs = np.minimum(np.asarray(t, dtype=np.float64), T)
    if (epochs < 1).any():
        raise DataError(f"t holds {epochs.min():g}; epochs count from 1.")
    part = np.vectorize(_part, otypes=[float])(epochs, T, power, warmup)
    return np.asarray(lr_min + (lr_max - lr_min) * part)


class CosinePowerAnnealing(LRScheduler):
    """Cosine power annealing as a scheduler of torch, called once an epoch (or once a step, with T steps).

    Each group of parameters begins at its own rate. After T epochs the rate stays at `lr_min`.

    Args:
        optimizer: whose rates are set.
        T: number of epochs, >= 1.
        lr_min: rate of the last epoch.
        power: p >= 1.
        warmup: epochs before the maximum, in 0 .. T - 1.
        last_epoch: epochs done, less one, to resume; -1 to begin.

    Raises:
        DataError: if T, power or warmup is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T: int,
        lr_min: float = 0.0,
        power: float = 2.0,
        warmup: int = 0,
        last_epoch: int = -1,
    ) -> None:
        _check(T, power, warmup)
        self.T = T
        self.lr_min = lr_min
        self.power = power
        self.warmup = warmup
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The rates of the epoch that comes, one for each group; `step` asks for them."""
        part = _part(self.last_epoch + 1, self.T, self.power, self.warmup)
        return [self.lr_min + (float(rate) - self.lr_min) * part for rate in self.base_lrs]


def _check(T: int, power: float, warmup: int) -> None:
    if T < 1:
        raise DataError(f"T is {T}; the number of epochs is at least 1.")
    if not (math.isfinite(power) and power >= 1):
        raise DataError(f"power is {power}; it must be at least 1, which is the cosine.")
    if not 0 <= warmup < T:
        raise DataError(f"warmup is {warmup}; it must lie in 0..{T - 1}, less than the {T} epochs of all.")


def _part(epoch: float, T: int, power: float, warmup: int) -> float:
    """Where between lr_min (0) and lr_max (1) the rate stands at an epoch."""
    if epoch <= warmup + 1:
        return epoch / (warmup + 1)
    first = 1.0 if warmup else _powered(1, T, power)
    return _powered(min(epoch, T) - warmup, T - warmup, power) / first


def _powered(epoch: float, T: int, power: float) -> float:
    """f(c): the cosine from 1 at epoch 0 to 0 at epoch T, through the power."""
    c = (1.0 + math.cos(math.pi * epoch / T)) / 2.0
    # expm1 keeps its digits as p goes to 1, where p^c - 1 loses them.
    return c if power == 1 else math.expm1(c * math.log(power)) / (power - 1.0)
