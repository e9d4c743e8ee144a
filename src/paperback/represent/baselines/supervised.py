"""Features of a network trained on labels by cross-entropy: the upper bound, where it sees all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.baselines.trained import TrainedEncoder
from paperback.represent.interface import Backbone
from paperback.training import History, seeded


class Supervised(TrainedEncoder):
    """The features before the last layer of a classifier. Images without a label (-1) are left out.

    Args:
        backbone, in_channels, image_size, seed: see `Encoder`.
        augment: a preset of `paperback.data.augment`, or a dict of settings.
        epochs, batch_size, lr, weight_decay: see `TrainedEncoder`.

    Raises:
        DataError: if a setting is out of range.
    """

    supervised: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        augment: str | Mapping[str, Any] = "weak",
        epochs: int = 20,
        batch_size: int = 128,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, epochs, batch_size, lr, weight_decay, seed)
        self.views = Views.of(augment)

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        assert labels is not None
        labelled = labels.to(images.device) >= 0
        classes, codes = labels.to(images.device)[labelled].unique(return_inverse=True)
        if len(classes) < 2:
            raise DataError(
                f"labels hold {len(classes)} class(es) beside -1; a classifier needs two or more."
            )
        with seeded(self.seed, "head"):
            model = nn.Sequential(self.backbone, nn.Linear(self.dim, len(classes)))

        def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
            x, y = batch
            return F.cross_entropy(model(self.normalise(self.views.first(x, draws))), y)

        return self._train(model, loss, (images[labelled], codes), progress)
