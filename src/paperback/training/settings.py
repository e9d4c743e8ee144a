"""The settings of a training, checked; and the optimizer that they name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.training.schedule import SCHEDULES, Schedule

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
PRECISIONS = (None, "no", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """What `paperback.training.train` was told, but for model, loss and data; the meanings stand there."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str | OptimizerFactory
    schedule: Schedule
    warmup_fraction: float
    weight_decay: float
    clip_norm: float | None
    patience: int | None
    min_delta: float
    keep_best: bool
    seed: int
    drop_last: bool
    gradient_accumulation: int
    mixed_precision: str | None
    checkpoint_every: int

    def check(self, rows: int, validates: bool, has_metric: bool) -> None:
        """Refuse what cannot be.

        Raises:
            DataError: naming the argument, its value and what it must be.
        """
        for name in ("epochs", "batch_size", "gradient_accumulation", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise DataError(f"{name} is {value}; it must be a positive number.")
        for name in ("min_delta", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise DataError(f"{name} is {value}; it must be at least 0.")
        if not 0 <= self.warmup_fraction < 1:
            raise DataError(f"warmup_fraction is {self.warmup_fraction}; it must lie in [0, 1).")
        if self.schedule not in SCHEDULES:
            raise DataError(f"schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}.")
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            names = ", ".join(OPTIMIZERS)
            raise DataError(f"optimizer is {self.optimizer!r}; it must be one of {names}, or a function.")
        if self.mixed_precision not in PRECISIONS:
            raise DataError(
                f'mixed_precision is {self.mixed_precision!r}; it must be "no", "bf16" or "fp16".'
            )
        if self.patience is not None and not validates:
            raise DataError("patience needs val_tensors: early stopping is decided on the validation part.")
        if has_metric and not validates:
            raise DataError("val_metric needs val_tensors to be measured on.")
        if self.drop_last and rows < self.rows_per_step:
            raise DataError(
                f"drop_last leaves nothing of {rows} rows, one step takes {self.rows_per_step}; "
                "lower batch_size or gradient_accumulation."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows that one step of the optimizer takes in."""
        return self.batch_size * self.gradient_accumulation

    def facts(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values."""
        facts = {key: value for key, value in vars(self).items() if key != "checkpoint_every"}
        if not isinstance(self.optimizer, str):
            facts["optimizer"] = getattr(self.optimizer, "__qualname__", type(self.optimizer).__qualname__)
        return facts

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer, with torch's fused kernels where there are some: half the time of a small step."""
        if not isinstance(self.optimizer, str):
            return self.optimizer(parameters)
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        kind = OPTIMIZERS[self.optimizer]
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=fused)


def check_tensors(tensors: Tensor | Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """Tensors of equally many rows, at least one.

    Raises:
        DataError: naming the tensor that does not fit.
    """
    rows = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    if not rows:
        raise DataError(f"{name} is empty; give at least one tensor.")
    for i, tensor in enumerate(rows):
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise DataError(
                f"{name}[{i}] is {type(tensor).__name__}; it must be a tensor with one row per sample."
            )
        if len(tensor) != len(rows[0]):
            raise DataError(
                f"{name}[{i}] has {len(tensor)} rows, {name}[0] has {len(rows[0])}; they must agree."
            )
    if len(rows[0]) == 0:
        raise DataError(f"{name} has no rows; there is nothing to learn from.")
    return rows
