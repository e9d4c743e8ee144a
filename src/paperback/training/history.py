"""What a training reports: one number per epoch in each column."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class History:
    """The course of a training. Lists have one entry per epoch.

    Attributes:
        train_loss: mean loss over the training rows, as they were met.
        val_metric: mean metric over the validation rows; empty without a validation part.
        terms: the means of what else the loss returned, by name.
        lr: learning rate of the epoch's last step.
        seconds: wall time, validation included.
        samples_per_second: training rows per second, over all processes, validation not included.
        best_epoch: the epoch, counted from 1, with the lowest validation metric; None without a validation
            part.
        stopped_early: whether patience ran out.
    """

    train_loss: list[float] = field(default_factory=list)
    val_metric: list[float] = field(default_factory=list)
    terms: dict[str, list[float]] = field(default_factory=dict)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples_per_second: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False

    def __len__(self) -> int:
        """Number of epochs."""
        return len(self.train_loss)
