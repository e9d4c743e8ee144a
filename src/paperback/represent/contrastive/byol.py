"""BYOL: from one view a network predicts what a moving average of itself makes of the other view.

There are no negatives. With the trained projection z = g(f(v)), a predictor q, and the target projection z'
of the other view,

    L = 2 - 2 <q(z), z'> / (|q(z)| |z'|),

summed over both directions. The predictor, and that the target gets no gradient, keep the features from
becoming constant.

Source: J.-B. Grill et al., Bootstrap your own latent, NeurIPS 2020, equation 2. Momentum 0.99 -> 1 is
AdaInf's setting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.represent.contrastive.learner import ContrastiveLearner, projector
from paperback.represent.contrastive.moco import check_momentum
from paperback.represent.contrastive.momentum import MomentumCopy
from paperback.represent.interface import Backbone


class BYOL(ContrastiveLearner):
    """Features by predicting a moving average's projection of another view.

    Args:
        backbone: see `Encoder`.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        projection: widths of the hidden and output layers of the projector; the predictor has them too.
        momentum: of the target network, at the first and the last step, in 0..1.
        augment, epochs, steps, batch_size, lr, weight_decay, seed: see `ContrastiveLearner`.
    """

    presets = ("standard_asym", "adainf_asym")

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        augment: str | Mapping[str, Any] = "standard_asym",
        epochs: int = 50,
        steps: int | None = None,
        batch_size: int = 256,
        lr: float = 6e-3,
        weight_decay: float = 1e-5,
        projection: Sequence[int] = (256, 128),
        momentum: Sequence[float] = (0.99, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, in_channels, image_size, augment, epochs, steps, batch_size, lr, weight_decay, seed
        )
        self.projection, self.momentum = tuple(projection), check_momentum(momentum)

    def pretext(self, total_steps: int) -> nn.Module:
        """Backbone, projector and predictor, and the moving average of the first two."""
        online = nn.Sequential(self.backbone, projector((self.dim, *self.projection), norm=True))
        predictor = projector((self.projection[-1], *self.projection), norm=True)
        return _Pretext(online, predictor, MomentumCopy(online, *self.momentum, total_steps))


class _Pretext(nn.Module):
    def __init__(self, online: nn.Module, predictor: nn.Module, target: MomentumCopy) -> None:
        super().__init__()
        self.online, self.predictor, self.target = online, predictor, target

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        if self.training:  # at the first step the two are equal and nothing moves
            self.target.follow(self.online)
        views = torch.cat([first, second])
        predicted = self.predictor(self.online(views))
        ours, theirs = self.target(views).chunk(2)
        cosine = F.cosine_similarity(predicted, torch.cat([theirs, ours]), dim=1)
        return 2 * (2 - 2 * cosine).mean()  # the sum over both directions of the mean over images
