"""Lottery jackpots beside the training of weights, torch.nn.utils.prune, and edge-popup.

    python benchmarks/compress/lottery_jackpots.py [--epochs 3] [--repeats 3] [--threads 1]

All keep a tenth of the weights of the study's network on Fashion-MNIST, in equal epochs.
1. Seconds of an epoch of the search over those of training the surviving weights. Bar: at most 1.4.
2. torch.nn.utils.prune.global_unstructured, one shot: the same mask as a search of no epoch (ties and the
   least number of weights of a layer aside), and its accuracy.
3. Edge-popup (Ramanujan et al. 2020): masks in random weights, the best scores anew at every step. The
   transcription is ours, from the paper; allenai/hidden-networks is not on PyPI. Beside it our own
   ``weights="random", init="random", restriction=None``, which is the same idea with uniform scores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from paperback.compress import Data, evaluate
from paperback.compress.lottery_jackpots import LotteryJackpots
from paperback.compress.studies.lottery_jackpots import BATCH, KEEP, network
from paperback.data import images
from paperback.study.measure import Stopwatch
from paperback.training import seeded, train

BAR = 1.4
RATES = {"search": 0.1, "random": 3.0, "weights": 3e-3, "edge-popup": 0.1}


def load() -> tuple[Data, nn.Module]:
    """Fashion-MNIST, and the network that has learned it."""
    dataset = images.fashion_mnist(9000, 0)
    parts = {
        name: (getattr(dataset, name).x.float().unsqueeze(1) / 255, torch.as_tensor(getattr(dataset, name).y))
        for name in ("train", "val")
    }
    with seeded(0, "network"):
        model = network(10, (28, 28))
    train(
        model, lambda m, batch, _: F.cross_entropy(m(batch[0]), batch[1]), parts["train"], epochs=8,
        batch_size=BATCH, lr=5e-3, schedule="one-cycle", progress=False,
    )  # fmt: skip
    return Data(**parts, batch_size=500), model


def compressed(model: nn.Module, data: Data, **settings: Any) -> tuple[float, float, dict[str, Tensor]]:
    """Accuracy, seconds, masks."""
    method = LotteryJackpots(1 - KEEP, keep_classifier=False, batch_size=BATCH, **settings)
    result = method.compress(model, data, latency_runs=0, progress=False)
    return result.report.quality_after["accuracy"], result.report.seconds, result.extras["masks"]


def one_shot(model: nn.Module, data: Data, masks: dict[str, Tensor]) -> tuple[float, float]:
    """Accuracy of torch's global pruning, and the share of weights on which its mask agrees with ours."""
    pruned = copy.deepcopy(model)
    layers = [(pruned.get_submodule(name), "weight") for name in masks]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=1 - KEEP)
    same = [
        (layer.weight_mask.flatten(1).bool() == masks[name]).flatten()
        for (layer, _), name in zip(layers, masks, strict=True)
    ]
    return evaluate(pruned, data.batches("val"))["accuracy"], float(torch.cat(same).float().mean())


class PopUp(torch.autograd.Function):
    """The best scores of a tensor as 1, the others as 0, with the gradient passed through."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        order = scores.flatten().argsort()
        mask = torch.ones_like(order, dtype=scores.dtype)
        mask[order[: int((1 - KEEP) * len(order))]] = 0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class PopUpLayer(nn.Module):
    """A layer whose random weights stay and whose scores are trained."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        weight = torch.empty_like(layer.weight)
        deviation = (2 / weight[0].numel() / KEEP) ** 0.5  # signed constants, scaled for what is kept
        self.weight = nn.Parameter(nn.init.normal_(weight).sign_() * deviation, requires_grad=False)
        self.scores = nn.Parameter(nn.init.kaiming_uniform_(torch.empty_like(weight), a=5**0.5))
        self.stride = layer.stride if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * PopUp.apply(self.scores.abs())
        return F.linear(x, weight) if self.stride is None else F.conv2d(x, weight, None, self.stride, 1)


def edge_popup(data: Data, epochs: int) -> tuple[float, float]:
    """Accuracy and seconds of edge-popup in a network of the same widths."""
    with seeded(0, "edge-popup"):
        layers = [PopUpLayer(m) if isinstance(m, nn.Conv2d | nn.Linear) else m for m in network(10, (28, 28))]
    norms = [
        nn.BatchNorm2d(m.num_features, affine=False) if isinstance(m, nn.BatchNorm2d) else m for m in layers
    ]
    model = nn.Sequential(*norms)
    with Stopwatch() as watch:
        train(
            model, lambda m, batch, _: F.cross_entropy(m(batch[0]), batch[1]), data.train, epochs=epochs,
            batch_size=BATCH, lr=RATES["edge-popup"], schedule="cosine", progress=False,
            optimizer=lambda p: torch.optim.SGD(p, lr=RATES["edge-popup"], momentum=0.9, weight_decay=1e-4),
        )  # fmt: skip
    return evaluate(model, data.batches("val"))["accuracy"], watch.seconds


def main() -> None:
    """Run and print accuracies on validation images and the ratio of seconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    epochs = arguments.epochs
    data, model = load()
    print(f"dense: {evaluate(model, data.batches('val'))['accuracy']:.3f}")
    searches, trainings = [], []
    for _ in range(arguments.repeats):
        searches.append(compressed(model, data, epochs=epochs, lr=RATES["search"]))
        trainings.append(
            compressed(model, data, epochs=0, finetune_epochs=epochs, finetune_lr=RATES["weights"])
        )
    ratio = statistics.median(s[1] / t[1] for s, t in zip(searches, trainings, strict=True))
    for name, runs in (("search", searches), ("magnitude, weights trained on", trainings)):
        seconds = statistics.median(r[1] for r in runs) / epochs
        print(f"{name}: {runs[0][0]:.3f}, {seconds:.2f} s an epoch")
    verdict = "reached" if ratio <= BAR else "missed"
    print(f"seconds of an epoch, ratio {ratio:.2f}, bar at most {BAR}: {verdict}")
    accuracy, _, masks = compressed(model, data, epochs=0)
    theirs, same = one_shot(model, data, masks)
    print(f"one shot: ours {accuracy:.3f}, torch.nn.utils.prune {theirs:.3f}, masks agree on {same:.2%}")
    settings = {"weights": "random", "init": "random", "restriction": None, "lr": RATES["random"]}
    accuracy, seconds, _ = compressed(model, data, epochs=epochs, **settings)
    print(f"search in random weights: {accuracy:.3f}, {seconds / epochs:.2f} s an epoch")
    accuracy, seconds = edge_popup(data, epochs)
    print(f"edge-popup (transcribed): {accuracy:.3f}, {seconds / epochs:.2f} s an epoch")


if __name__ == "__main__":
    main()
