"""What all contrastive learners share: two views of each image of a batch, a pretext task, and the loop.

A pretext is a module that holds the encoder's backbone and whatever the method trains beside it (projector,
target network, queue); from two batches of normalised views it gives the loss. Afterwards only the backbone
is kept, as in all of these papers: features are taken before the projector.

The budget is a number of passes over the images, or a number of steps that does not depend on how many images
there are. Every batch holds different images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from paperback.data.augment import Views
from paperback.errors import DataError
from paperback.represent.interface import Backbone, Encoder
from paperback.training import History, derive, seeded, train
from paperback.training.contrastive import process_rank
from paperback.training.task import Loss

STEPS_OF_A_ROUND = 50  # of a training by steps: about so many make one entry of the history
WARMUP = 0.05  # part of the steps


class ImageSource(Protocol):
    """Images that are taken by their numbers: a tensor, or more than fit into one."""

    def __len__(self) -> int:
        """Number of images of a pass."""

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Images ``(k, c, h, w)``, float32 in 0..1, for the numbers ``(k,)``."""


class Shuffle:
    """The numbers 0 .. n - 1 in random order, again and again, in batches without repetition.

    Numbers at the end of a pass that do not fill a batch are left out of it.
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.long)

    def take(self, k: int) -> Tensor:
        """The next k different numbers, 1 <= k <= n."""
        if len(self._left) < k:
            self._left = torch.randperm(self._n, generator=self._generator)
        batch, self._left = self._left[:k], self._left[k:]
        return batch


class ContrastiveLearner(Encoder):
    """The loop of the contrastive learners; a subclass writes `pretext`.

    Args:
        backbone: see `Encoder`.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        augment: how views are made: a preset of `paperback.data.augment`, or a dict of settings.
        epochs: passes over the images; left out when `steps` is given.
        steps: steps of the optimizer, whatever the number of images.
        batch_size: images of a step; all of them, where there are fewer.
        lr: peak learning rate of AdamW, with a warm-up over 5 % of the steps and a cosine down to 0.
        weight_decay: of matrices and kernels; biases and norms have none.
        seed: of weights, order and views.

    Raises:
        DataError: if an argument is out of range, or the augmentation is not known.
    """

    # The presets of its usual views, and of the weaker ones that AdaInf gives it.
    presets: ClassVar[tuple[str, str]] = ("standard", "adainf")

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
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, seed)
        for name, value, least in (("epochs", epochs, 1), ("steps", steps, 1), ("batch_size", batch_size, 2)):
            if value is not None and value < least:
                raise DataError(f"{name} is {value}; it must be at least {least}.")
        self.views = Views.of(augment)
        self.epochs, self.steps, self.batch_size = epochs, steps, batch_size
        self.lr, self.weight_decay = lr, weight_decay

    @abstractmethod
    def pretext(self, total_steps: int) -> nn.Module:
        """A fresh module that holds `self.backbone`; ``(first, second)`` normalised views to the loss.

        Args:
            total_steps: of the training to come, for schedules of its own.
        """

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        return self.learn_from(images, progress=progress)

    def learn_from(self, source: Tensor | ImageSource, *, progress: bool = True) -> History:
        """Train on images that are taken by their numbers. Mean and deviation of the images are left alone.

        `fit` does this with its images. A source that does not hold them all in memory, such as an
        `InflatedDataset`, may be given here.

        Args:
            source: images, float32 in 0..1.
            progress: show a bar.

        Returns:
            The course of the training: one entry a pass, or one about every 50 steps of a budget in steps.

        Raises:
            DataError: if there are fewer than two images.
        """
        if len(source) < 2:
            raise DataError(f"images hold {len(source)}; a contrastive learner needs at least two.")
        batch_size = min(self.batch_size, len(source))
        rounds, steps = self.epochs, len(source) // batch_size
        if self.steps is not None:
            rounds = _divisor(self.steps, self.steps // STEPS_OF_A_ROUND)
            steps = self.steps // rounds
        with seeded(self.seed, "pretext"):
            pretext = self.pretext(rounds * steps).to(self.mean.device)
        slots = torch.empty(steps * batch_size, dtype=torch.bool)  # `Shuffle` says which images they hold
        # Convolutions in this layout take a fifth to a third less time on a CPU.
        pretext.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            return train(
                pretext,
                self._loss(source),
                slots,
                epochs=rounds,
                batch_size=batch_size,
                lr=self.lr,
                optimizer=self._optimizer,
                schedule="cosine",
                warmup_fraction=WARMUP,
                seed=self.seed,
                progress=progress,
                description=type(self).__name__,
            )
        finally:
            self.backbone.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def _loss(self, source: Tensor | ImageSource) -> Loss:
        """The pretext's loss on two views of the next images, in each process its own."""
        shuffle: list[Shuffle] = []  # made at the first batch, when the processes have their ranks

        def loss(pretext: nn.Module, slots: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
            if not shuffle:
                shuffle.append(Shuffle(len(source), derive(self.seed, "images", process_rank())))
            batch = source[shuffle[0].take(len(slots[0]))].to(generator.device)
            first, second = self.views(batch, generator)
            value: Tensor = pretext(self._prepared(first), self._prepared(second))
            return value

        return loss

    def _prepared(self, views: Tensor) -> Tensor:
        return self.normalise(views).contiguous(memory_format=torch.channels_last)

    def _optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW; vectors (biases, norms) do not decay."""
        trained = list(parameters)
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, fused=True)


def projector(dims: Sequence[int], *, norm: bool = False) -> nn.Sequential:
    """Linear layers with rectifiers between them, and batch normalisation before these where asked for."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(dims)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(n_in, n_out, bias=last or not norm))
        if not last:
            layers += [nn.BatchNorm1d(n_out), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(*layers)


def _divisor(number: int, about: int) -> int:
    """The largest divisor of a number that does not exceed another one."""
    return next(d for d in range(max(about, 1), 0, -1) if number % d == 0)
