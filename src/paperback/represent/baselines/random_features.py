"""Features of a network that was never trained: what the architecture alone is worth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paperback.represent.interface import Encoder

BATCH = 256


class RandomFeatures(Encoder):
    """An untrained backbone. `fit` sets the statistics of its batch norms, where it has some, and no weight.

    Args:
        backbone, in_channels, image_size, seed: see `Encoder`.
    """

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> None:
        norms = [m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        self.backbone.train()
        with torch.no_grad():
            for part in images.split(BATCH):
                if norms and (len(part) > 1 or len(images) == 1):
                    self.backbone(self.normalise(part.to(self.mean.device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
