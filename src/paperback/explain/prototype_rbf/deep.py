"""The deep network: components are channels of a feature map, detected where they are strongest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.explain.prototype_rbf.heads import make_head, margin_loss
from paperback.training import History, derive, train

ALIGNED = 1e-6  # inner products are kept above, so that their logarithm is finite
UNIFORMITY = 5.0  # its weight, with that of the alignment rising to 1
HEAD_LR = 5e-3
FADED = 0.25  # of a picture outside the patch

Images = Float[Tensor, "B c H W"]
Maps = Float[Tensor, "B K h w"]


class Patch(NamedTuple):
    """Where a component is strongest in the training images.

    Attributes:
        image: index of the image.
        row: of the feature map.
        column: of the feature map.
        activation: the softmax there.
        picture: the image, faded outside the part that lies under the place, ``(c, H, W)``.
    """

    image: int
    row: int
    column: int
    activation: float
    picture: Tensor


class DeepCBC(nn.Module):
    """A backbone, a 1x1 convolution to K channels, a softmax over channels, a maximum over places, a head.

    The softmax of inner products is an RBF kernel between a place's features and a component, normalised over
    the components.

    Args:
        backbone: ``(B, channels, height, width) -> (B, features, h, w)``.
        n_features: channels of its output.
        n_components: K; None to take the channels of the backbone as they are.
        n_classes: C.
        negative, vectors_per_class, head: see `RBFPrototypeClassifier`.
        least: detections below it are set to 0 when not training; the official code has 0.1.

    Raises:
        DataError: if there are fewer components than classes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        n_features: int,
        n_components: int | None,
        n_classes: int,
        *,
        negative: bool = True,
        vectors_per_class: int = 1,
        head: str = "cbc",
        least: float = 0.0,
    ) -> None:
        super().__init__()
        n = n_features if n_components is None else n_components
        if n < n_classes:
            raise DataError(f"there are {n} components for {n_classes} classes; give at least one for each.")
        self.backbone = backbone
        self.project = nn.Identity() if n_components is None else nn.Conv2d(n_features, n, 1)
        self.head = make_head(head, n, n_classes, negative=negative, vectors_per_class=vectors_per_class)
        self.least = least

    def maps(self, images: Images) -> Maps:
        """Softmax over the components at each place."""
        features = self.backbone(images)
        if features.ndim != 4:
            raise DataError(
                f"the backbone gives {tuple(features.shape)}; it must keep a map, (rows, features, h, w)."
            )
        result: Tensor = self.project(features).softmax(1)
        return result

    def detections(self, images: Images) -> Float[Tensor, "B K"]:
        """The greatest activation of each component."""
        d = self.maps(images).amax((2, 3))
        return d if self.training or self.least == 0 else d.where(d >= self.least, 0.0)

    def forward(self, images: Images) -> Float[Tensor, "B C"]:
        """Class agreements."""
        scores: Tensor = self.head(self.detections(images))
        return scores


def alignment_loss(first: Maps, second: Maps) -> Float[Tensor, ""]:
    """-mean log <p, p'> over the places of two views: a place keeps its component."""
    return -(first * second).sum(1).clamp_min(ALIGNED).log().mean()


def uniformity_loss(maps: Maps) -> Float[Tensor, ""]:
    """-mean_k log tanh(sum over the batch of the pooled activation): every component is used somewhere."""
    return -maps.amax((2, 3)).sum(0).tanh().clamp_min(ALIGNED).log().mean()


def view(images: Images, generator: torch.Generator) -> Images:
    """A view: another brightness and some noise. Geometry is kept, so that places of two views correspond.

    The official code also changes colours, by policies for photographs that other images do not bear.
    """
    scale = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    noise = 0.05 * torch.randn(images.shape, generator=generator, device=images.device)
    return images * scale + noise


class Pretraining:
    """The loss of the first stage, whose alignment gains weight epoch by epoch.

    Args:
        epochs: of the stage.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs, self.done = epochs, 0

    def __call__(self, model: DeepCBC, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        first, second = (model.maps(view(batch[0], generator)) for _ in range(2))
        uniformity = (uniformity_loss(first) + uniformity_loss(second)) / 2
        return (self.done + 1) / self.epochs * alignment_loss(first, second) + UNIFORMITY * uniformity

    def count(self, epoch: int, model: nn.Module, history: History) -> None:
        """The callback after each epoch."""
        self.done = epoch


def fit(
    model: DeepCBC,
    images: Images,
    y: Int[Tensor, " B"],
    *,
    epochs: tuple[int, int, int],
    margin: float,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> None:
    """Pretrain the components without labels, train end to end with the margin loss, then the head alone.

    Args:
        model: trained in place.
        images: training images.
        y: class indices.
        epochs: of the three stages, each may be 0; the official ones are 12, 84 and 48.
        margin: of the loss; .025 for 200 classes.
        batch_size: rows of a step.
        lr: of backbone and components; the head has 5e-3.
        seed: of everything drawn.
        progress: show bars.
    """

    def labelled(net: DeepCBC, batch: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        return margin_loss(net(view(batch[0], generator)), batch[1], margin)

    def rates(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        head = {id(p) for p in model.head.parameters()}
        own: list[nn.Parameter] = []
        body: list[nn.Parameter] = []
        for parameter in parameters:
            (own if id(parameter) in head else body).append(parameter)
        groups = [{"params": own, "lr": HEAD_LR}, {"params": body, "lr": lr}]
        return torch.optim.Adam([group for group in groups if group["params"]])

    stage = partial(train, model, batch_size=batch_size, lr=lr, progress=progress)
    if epochs[0]:
        first = Pretraining(epochs[0])
        stage(first, images, epochs=epochs[0], seed=derive(seed, "components"), callbacks=(first.count,))
    rows = (images, y)
    if epochs[1]:
        stage(labelled, rows, epochs=epochs[1], seed=derive(seed, "network"), optimizer=rates)
    body = [p for p in (*model.backbone.parameters(), *model.project.parameters()) if p.requires_grad]
    for parameter in body:
        parameter.requires_grad_(False)
    if epochs[2]:
        stage(labelled, rows, epochs=epochs[2], seed=derive(seed, "head"), optimizer=rates)
    for parameter in body:
        parameter.requires_grad_(True)


@torch.no_grad()
def ground(model: DeepCBC, images: Images, batch_size: int = 256) -> tuple[Patch, ...]:
    """For each component the training image, and the place in it, where it is strongest."""
    values, places, size, width = [], [], 1, 1
    for part in images.split(batch_size):
        maps = model.maps(part)
        size, width = maps.shape[2] * maps.shape[3], maps.shape[3]
        value, place = maps.flatten(2).max(2)
        values.append(value)
        places.append(place)
    best, image = torch.cat(values).max(0)
    place = torch.cat(places).gather(0, image[None])[0]
    spots = zip(image.tolist(), place.tolist(), best.tolist(), strict=True)
    height = size // width
    return tuple(
        Patch(i, p // width, p % width, v, _faded(images[i], p // width, p % width, height, width))
        for i, p, v in spots
    )


def _faded(image: Tensor, row: int, column: int, height: int, width: int) -> Tensor:
    """An image, faded but for the part that a place of a map of that size stands for."""
    mask = torch.full((1, 1, height, width), FADED)
    mask[0, 0, row, column] = 1.0
    return image * nn.functional.interpolate(mask, size=image.shape[-2:], mode="nearest")[0]
