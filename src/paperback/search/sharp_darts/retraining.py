"""Training from scratch what a search found, with the paper's schedule and regularisers.

AutoAugment, which the paper's best numbers have, is not here: give augmented images.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.search.sharp_darts.annealing import cosine_power
from paperback.search.sharp_darts.cells import CellNetwork
from paperback.training import train
from paperback.training.history import History

# The final training of CIFAR-10 (the commands of the reference code), for `retrain` and
# `CellSpace.build`. It takes days on a GPU.
PAPER_TRAINING: dict[str, Any] = {
    "epochs": 2000,
    "batch_size": 64,
    "lr": 0.025,
    "lr_min": 1e-8,
    "power": 2.0,
    "warmup": 5,
    "cutout": 16,
}
PAPER_NETWORK: dict[str, Any] = {"cells": 20, "width": 36, "drop_path": 0.2, "auxiliary": True}


def retrain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 0.025,
    lr_min: float = 1e-4,
    power: float | None = 2.0,
    warmup: float = 0,
    clip_norm: float = 5.0,
    weight_decay: float = 3e-4,
    cutout: int = 0,
    auxiliary_weight: float = 0.4,
    val: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train a classifier in place by SGD with momentum; it is left in evaluation mode.

    Args:
        model: gives logits, or in training logits and those of an auxiliary classifier. A `CellNetwork`'s
            drop-path rises from epoch to epoch, linearly from 0.
        x: inputs, ``(rows, ...)``.
        y: classes, int64 ``(rows,)``.
        epochs: >= 1.
        batch_size: rows of a step; those that do not fill one are left out of that epoch.
        lr: greatest rate.
        lr_min: last rate.
        power: of the cosine power annealing, which goes on from step to step; None keeps the rate constant.
        warmup: epochs before the greatest rate.
        clip_norm: gradients are scaled down to this norm.
        weight_decay: of all parameters.
        cutout: side of the square that is set to 0 in each image, in pixels; 0 for none.
        auxiliary_weight: of the auxiliary classifier's loss.
        val: inputs and classes; the weights of the epoch with the least loss on them are kept.
        seed: of the order of rows, cutout and drop-path. The weights are as they are given.
        progress: show a bar.

    Returns:
        The course of the training.

    Raises:
        DataError: if an argument is out of range.
        PaperbackError: if the loss is not finite.
    """
    if cutout < 0:
        raise DataError(f"cutout is {cutout}; it must be at least 0.")
    size = min(batch_size, len(x))
    per_epoch = len(x) // max(1, size)
    steps = max(1, epochs * per_epoch)

    def loss(network: nn.Module, batch: tuple[Tensor, ...], draw: torch.Generator) -> Tensor:
        images, labels = batch
        outputs = network(cut_out(images, cutout, draw) if cutout and network.training else images)
        logits, beside = outputs if isinstance(outputs, tuple) else (outputs, None)
        total = nn.functional.cross_entropy(logits, labels)
        if beside is not None:
            total = total + auxiliary_weight * nn.functional.cross_entropy(beside, labels)
        return total

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
        if power is not None:
            ahead = round(warmup * per_epoch)
            _anneal(sgd, cosine_power(range(1, steps + 1), steps, lr, lr_min, power=power, warmup=ahead))
        return sgd

    def raise_drop_path(epoch: int, network: nn.Module, history: History) -> None:
        if isinstance(network, CellNetwork):
            network.drop_path = network.greatest_drop_path * epoch / epochs

    raise_drop_path(0, model, History())
    return train(
        model,
        loss,
        (x, y),
        val_tensors=val,
        epochs=epochs,
        batch_size=size,
        lr=lr,
        optimizer=optimizer,
        clip_norm=clip_norm,
        callbacks=[raise_drop_path],
        drop_last=True,
        seed=seed,
        progress=progress,
        description="retraining",
    )


def _anneal(optimizer: torch.optim.Optimizer, rates: Any) -> None:
    """Have the optimizer take the next of some rates before each step.

    A scheduler would do, but the training loop sets rates by itself, just before it steps.
    """
    ahead = iter(rates.tolist())

    def set_rate(*_: Any) -> None:
        rate = next(ahead)
        for group in optimizer.param_groups:
            group["lr"] = rate

    optimizer.register_step_pre_hook(set_rate)


def cut_out(images: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """Each image with a square of zeros about a random pixel, cut off at the border.

    Args:
        images: ``(batch, channels, H, W)``.
        side: of the square in pixels, >= 1.
        draw: where the centres come from.
    """
    batch, _, height, width = images.shape
    inside = []
    for length in (height, width):
        centre = torch.randint(length, (batch, 1), generator=draw, device=draw.device)
        offset = torch.arange(length, device=draw.device) - centre + side // 2
        inside.append((offset >= 0) & (offset < side))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return images.masked_fill(hole[:, None].to(images.device), 0.0)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows whose class has the greatest logit, in evaluation mode."""
    model.eval()
    predicted = torch.cat([model(rows).argmax(1) for rows in x.split(512)])
    return float((predicted == y).double().mean())
