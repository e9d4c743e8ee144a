"""Encoders onto the sphere: what the classifier and its rivals share, and the rivals, metric learning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.interface import Backbone, Encoder, ImagesOrArray
from paperback.training import History, seeded, train
from paperback.training.contrastive import sup_con
from paperback.training.metric_learning import contrastive_pairs, triplet_batch_hard, triplet_semi_hard


class UnitEncoder(Encoder):
    """A backbone and one linear layer onto ``dim`` numbers, whose direction is the feature.

    Args:
        backbone: see `Encoder`.
        dim: length of the embedding.
        in_channels: of the images, 1 or 3.
        image_size: of the images, for a "vit".
        seed: of everything drawn.

    Raises:
        DataError: if dim < 2, or the backbone cannot be made.
    """

    supervised: ClassVar[bool] = True

    def __init__(
        self,
        backbone: Backbone = "resnet",
        dim: int = 64,
        in_channels: int = 1,
        image_size: int = 28,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, in_channels, image_size, seed)
        if dim < 2:
            raise DataError(f"dim is {dim}; directions need at least 2.")
        with seeded(seed, "projection"):
            self.projection = nn.Linear(self.dim, dim)
        self.dim = dim

    def embed(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n dim"]:
        """Embeddings of images in 0..1, before they are normalised."""
        features = self.backbone(self.normalise(images))
        if features.ndim != 2:
            raise DataError(
                f"the backbone {type(self.backbone).__name__} gives features of shape "
                f"{tuple(features.shape)}; expected (n, features), so average over positions."
            )
        embeddings: Tensor = self.projection(features)
        return embeddings

    def _features(self, images: Tensor) -> Tensor:
        return F.normalize(self.embed(images), dim=1)

    def transform(self, images: ImagesOrArray, batch_size: int = 512) -> ImagesOrArray:
        """Unit vectors ``(n, dim)``, as `Encoder.transform`.

        Raises:
            DataError: if the images cannot be used, or an embedding is zero and has no direction.
        """
        features = super().transform(images, batch_size)
        lengths = torch.as_tensor(features).norm(dim=1)
        if not (lengths > 0.5).all():  # normalised ones have length 1, zero stays zero, NaN is neither
            rows = [int(i) for i in (~(lengths > 0.5)).nonzero()[:5, 0]]
            raise DataError(
                f"the embedding of image(s) {', '.join(map(str, rows))} is zero or not finite; it has no "
                "direction. Train with a lower learning rate, or another seed."
            )
        return features


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "batch_hard": triplet_batch_hard,
    "semi_hard": triplet_semi_hard,
    "pairs": contrastive_pairs,
    "sup_con": sup_con,
}
# Usual values; they were not searched for.
DEFAULTS = {"batch_hard": 0.2, "semi_hard": 0.2, "pairs": 1.0, "sup_con": 0.1}


class MetricLearner(UnitEncoder):
    """An embedding by plain softmax, triplets, pairs or supervised contrast: the classifier's rivals.

    Args:
        loss: "softmax" (a linear layer with bias on the embedding, which is thrown away), "batch_hard" or
            "semi_hard" triplets, "pairs", or "sup_con".
        margin: of triplets and pairs, or temperature of "sup_con"; None for .2, .2, 1 and .1.
        epochs: passes over the images.
        batch_size: images of a step.
        lr: learning rate of Adam.
        backbone, dim, in_channels, image_size, seed: see `UnitEncoder`.
    """

    def __init__(
        self,
        loss: str = "batch_hard",
        backbone: Backbone = "resnet",
        dim: int = 64,
        in_channels: int = 1,
        image_size: int = 28,
        margin: float | None = None,
        epochs: int = 10,
        batch_size: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, dim, in_channels, image_size, seed)
        if loss not in (*LOSSES, "softmax"):
            raise DataError(f"there is no loss {loss!r}; take one of softmax, {', '.join(LOSSES)}.")
        self.loss, self.margin = loss, margin
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr

    def _fit(self, images: Tensor, labels: Tensor | None, progress: bool) -> History:
        assert labels is not None
        images, codes = with_labels(images, labels)[:2]
        with seeded(self.seed, "softmax"):
            pretext = _Pretext(self, self._objective(int(codes.max()) + 1))
        return train(
            pretext, _loss, (images, codes), epochs=self.epochs, batch_size=self.batch_size, lr=self.lr,
            seed=self.seed, progress=progress, description=self.loss, drop_last=len(images) > self.batch_size,
        )  # fmt: skip

    def _objective(self, n_classes: int) -> nn.Module | Loss:
        if self.loss == "softmax":
            return _Softmax(self.dim, n_classes)
        strength = DEFAULTS[self.loss] if self.margin is None else self.margin
        name = "temperature" if self.loss == "sup_con" else "margin"
        return partial(LOSSES[self.loss], **{name: strength})


def with_labels(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images that have a label, classes as numbers from 0, and the labels that they stand for.

    Raises:
        DataError: if there are fewer than two classes.
    """
    labelled = labels >= 0
    classes, codes = labels[labelled].unique(return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"labels have {len(classes)} class(es); at least two are needed.")
    return images if labelled.all() else images[labelled], codes, classes


class _Softmax(nn.Module):
    def __init__(self, dim: int, n_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, n_classes)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.layer(embeddings), labels)


class _Pretext(nn.Module):
    """Encoder and loss in one module, so that the weights of a softmax are trained too."""

    def __init__(self, encoder: UnitEncoder, objective: nn.Module | Loss) -> None:
        super().__init__()
        self.encoder, self.objective = encoder, objective

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.objective(self.encoder.embed(images), labels)
        return loss


def _loss(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    loss: Tensor = model(*batch)
    return loss
