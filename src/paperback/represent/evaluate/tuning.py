"""Fine-tuning: the encoder and a linear head on top of it are trained on labels together."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.represent.evaluate.checks import Labels
from paperback.represent.evaluate.features import as_module
from paperback.represent.interface import Images, as_images, as_labels
from paperback.training import History, seeded, train

Part = tuple[Images, Any]


@dataclass(frozen=True, eq=False)
class FineTuned:
    """What fine-tuning made.

    Attributes:
        accuracy: on the test images, in [0, 1].
        model: images ``(n, c, h, w)`` in 0..1 to logits of `classes`; the encoder that was given is as
            before.
        classes: labels in the order of the logits.
        history: of the training.
    """

    accuracy: float
    model: nn.Module
    classes: Labels
    history: History


def fine_tune(
    source: Any,
    train_part: Part,
    test_part: Part,
    *,
    val_part: Part | None = None,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 128,
    weight_decay: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> FineTuned:
    """Train a copy of an encoder with a linear head, by AdamW with warm-up and a cosine schedule.

    Args:
        source: an `Encoder`, a vision model of `transformers`, or any module from images in 0..1 to features.
        train_part: images and integer labels.
        test_part: images and labels that accuracy is measured on.
        val_part: images and labels; with them the best epoch's weights are kept.
        epochs: passes over the training images.
        lr: peak learning rate.
        batch_size: images of a step.
        weight_decay: of all weights.
        seed: of the head's initial weights and the order of the images.
        progress: show a bar.

    Returns:
        Accuracy and the model.

    Raises:
        DataError: if the source has no parameters, or images and labels do not fit.
    """
    module = as_module(source)
    if not isinstance(module, nn.Module) or not any(True for _ in module.parameters()):
        raise DataError("a function without parameters cannot be fine-tuned; give an encoder or a module.")
    x, y = _checked(train_part)
    classes, codes = y.unique(return_inverse=True)
    x_test, y_test = _checked(test_part)
    held = None
    if val_part is not None:
        x_val, y_val = _checked(val_part)
        if not torch.isin(y_val, classes).all():
            raise DataError("val_part has a label that train_part has not; leave its rows out.")
        held = (x_val, torch.searchsorted(classes, y_val))
    encoder = copy.deepcopy(module).requires_grad_(True)
    encoder.eval()
    with torch.no_grad():
        dim = encoder(x[:2]).shape[1]
    with seeded(seed, "head"):
        model = nn.Sequential(encoder, nn.Linear(dim, len(classes)))
    history = train(
        model, _cross_entropy, (x, codes), epochs=epochs, batch_size=batch_size, lr=lr, val_tensors=held,
        val_metric=None if held is None else _errors, optimizer="adamw", schedule="cosine",
        warmup_fraction=0.1, weight_decay=weight_decay, clip_norm=1.0, seed=seed, progress=progress,
        description="fine-tuning",
    )  # fmt: skip
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x_test.split(512)])
    accuracy = float((classes[logits.argmax(1)] == y_test).double().mean())
    return FineTuned(accuracy, model, classes.numpy(), history)


def _checked(part: Part) -> tuple[Tensor, Tensor]:
    x = as_images(part[0])
    if len(x) == 0:
        raise DataError("a part has no images; fine-tuning needs some to train and to test on.")
    return x, as_labels(part[1], len(x))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _errors(model: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
    return (model(batch[0]).argmax(1) != batch[1]).float().mean()
