"""SimCLR: a view finds the other view of its image among all other views of the batch.

With embeddings z = g(f(view)) of the 2n views of n images, cosine similarity s and temperature t,

    L = -1/(2n) sum_i log( exp(s(z_i, z_j(i)) / t) / sum_{k != i} exp(s(z_i, z_k) / t) ).

Both views go through the network as one batch, which is faster than two and gives batch normalisation the
statistics of both.

Source: T. Chen, S. Kornblith, M. Norouzi and G. Hinton, A simple framework for contrastive learning of visual
representations, ICML 2020; equation 1. Temperature and projector are AdaInf's (2048 -> 256 for a ResNet-18),
scaled to small backbones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paperback.represent.contrastive.learner import ContrastiveLearner, projector
from paperback.represent.interface import Backbone
from paperback.training.contrastive import nt_xent


class SimCLR(ContrastiveLearner):
    """Features by telling the views of an image from those of all others in the batch.

    Args:
        backbone: see `Encoder`.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        projection: widths of the projector's hidden and output layers.
        temperature: of the loss, > 0.
        augment, epochs, steps, batch_size, lr, weight_decay, seed: see `ContrastiveLearner`.
    """

    def __init__(
        self,
        backbone: Backbone = "resnet",
        in_channels: int = 1,
        image_size: int = 28,
        augment: str | Mapping[str, Any] = "simclr",
        epochs: int = 50,
        steps: int | None = None,
        batch_size: int = 256,
        lr: float = 6e-3,
        weight_decay: float = 1e-4,
        projection: Sequence[int] = (256, 128),
        temperature: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, in_channels, image_size, augment, epochs, steps, batch_size, lr, weight_decay, seed
        )
        self.projection, self.temperature = tuple(projection), temperature

    def pretext(self, total_steps: int) -> nn.Module:
        """Backbone, projector and NT-Xent."""
        return _Pretext(self.backbone, projector((self.dim, *self.projection)), self.temperature)


class _Pretext(nn.Module):
    def __init__(self, backbone: nn.Module, head: nn.Module, temperature: float) -> None:
        super().__init__()
        self.backbone, self.head, self.temperature = backbone, head, temperature

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.head(self.backbone(torch.cat([first, second]))).chunk(2)
        return nt_xent(a, b, self.temperature)
