"""MoCo v2+: a view finds the other view of its image among a queue of views of earlier batches.

Queries q come from the trained network, keys k from a slowly moving average of it, so that keys of different
batches fit each other. With the queue K and temperature t,

    L = -1/n sum_i log( exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_{u in K} exp(q_i.u / t)) ),

for both views as queries. The keys then take the place of the oldest in the queue. Its size sets the number
of negatives, not the batch. On few images a long queue holds views of the anchor's own image.

Source: K. He, H. Fan, Y. Wu, S. Xie and R. Girshick, Momentum contrast for unsupervised visual representation
learning, CVPR 2020, equations 1 and 2; X. Chen et al. 2020 (v2: projector, augmentation). The symmetric loss
and momentum 0.99 -> 0.999 are those of AdaInf's setting (solo-learn's mocov2plus).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.contrastive.learner import ContrastiveLearner, projector
from paperback.represent.contrastive.momentum import MomentumCopy
from paperback.represent.interface import Backbone
from paperback.training.contrastive import gather, info_nce


class MoCo(ContrastiveLearner):
    """Features by telling the other view of an image from a queue of earlier views.

    Args:
        backbone: see `Encoder`.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        projection: widths of the projector's hidden and output layers.
        temperature: of the loss, > 0.
        queue_size: number of negatives, >= 1.
        momentum: of the key network, at the first and the last step, in 0..1.
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
        queue_size: int = 4096,
        momentum: Sequence[float] = (0.99, 0.999),
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, in_channels, image_size, augment, epochs, steps, batch_size, lr, weight_decay, seed
        )
        if queue_size < 1:
            raise DataError(f"queue_size is {queue_size}; it must be at least 1.")
        self.projection, self.temperature = tuple(projection), temperature
        self.queue_size, self.momentum = queue_size, check_momentum(momentum)

    def pretext(self, total_steps: int) -> nn.Module:
        """Backbone and projector, their moving average, and the queue."""
        trained = nn.Sequential(self.backbone, projector((self.dim, *self.projection)))
        keys = MomentumCopy(trained, *self.momentum, total_steps)
        return _Pretext(trained, keys, self.queue_size, self.projection[-1], self.temperature)


class _Pretext(nn.Module):
    queue: Tensor
    place: Tensor

    def __init__(
        self, queries: nn.Module, keys: MomentumCopy, queue_size: int, dim: int, temperature: float
    ) -> None:
        super().__init__()
        self.queries, self.keys, self.temperature = queries, keys, temperature
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # of the oldest entry

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        views = torch.cat([first, second])
        queries = self.queries(views)
        if self.training:
            self.keys.follow(self.queries)
        keys = F.normalize(self.keys(views), dim=1)
        other = torch.cat([keys[len(first) :], keys[: len(first)]])  # the key of the other view
        loss = info_nce(queries, other, self.queue.clone(), self.temperature)
        if self.training:
            self._enqueue(gather(keys)[0])
        return loss

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        size = len(self.queue)
        newest = keys[-size:]
        rows = (self.place + torch.arange(len(newest), device=keys.device)) % size
        self.queue[rows] = newest.to(self.queue.dtype)
        self.place.copy_((self.place + len(newest)) % size)


def check_momentum(momentum: Sequence[float]) -> tuple[float, float]:
    """Two numbers in 0..1.

    Raises:
        DataError: if they are not.
    """
    if len(momentum) != 2 or not all(0 <= m <= 1 for m in momentum):
        raise DataError(
            f"momentum is {tuple(momentum)}; give two numbers in 0..1, at the first and last step."
        )
    return float(momentum[0]), float(momentum[1])
