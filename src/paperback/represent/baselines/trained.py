"""What baselines trained by AdamW along one cycle share: settings, checked, and the call of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.interface import Backbone, Encoder
from paperback.training import History, train


class TrainedEncoder(Encoder):
    """An encoder with the settings of an ordinary training.

    Args:
        backbone, in_channels, image_size, seed: see `Encoder`.
        epochs: passes over the images.
        batch_size: images of a step.
        lr: peak learning rate.
        weight_decay: of AdamW.

    Raises:
        DataError: if a setting is out of range.
    """

    def __init__(
        self,
        backbone: Backbone,
        in_channels: int,
        image_size: int,
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, seed)
        for name, value in (("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        self.epochs, self.batch_size, self.lr, self.weight_decay = epochs, batch_size, lr, weight_decay

    def _train(
        self, module: nn.Module, loss: Callable[..., Tensor], rows: tuple[Tensor, ...], progress: bool
    ) -> History:
        """Train a module that holds the backbone and what else the loss needs."""
        settings: dict[str, Any] = {"optimizer": "adamw", "schedule": "one-cycle", "clip_norm": 1.0}
        return train(
            module.to(self.mean.device),
            loss,
            rows,
            epochs=self.epochs,
            batch_size=min(self.batch_size, len(rows[0])),
            lr=self.lr,
            weight_decay=self.weight_decay,
            drop_last=True,  # batch norm cannot use a last batch of one image
            seed=self.seed,
            progress=progress,
            description=type(self).__name__,
            **settings,
        )
