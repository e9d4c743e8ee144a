"""Trains the two classifiers of Fashion-MNIST that ship: a ResNet and a vision transformer.

    python recipes/fashion_networks.py [resnet-fashion|vit-fashion [FOLDER]]

Without a name both are trained, each in about six minutes on one core. They learn from the training part of
`paperback.data.images.fashion_mnist()` (9,000 images, values in 0..1) under random crops and flips, and end
with the weights of the last epoch; neither the validation nor the test part is trained on. (The second of two
settings of the transformer ships; the first had been measured on both parts, too.) MANIFEST.json beside a
network holds the SHA-256 of each file, the names of the classes and the accuracies.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.data import images
from paperback.data.augment import Augment
from paperback.data.dataset import Split
from paperback.networks import ResNet, ViT
from paperback.networks.shipped import FOLDER, MANIFEST
from paperback.saving import CONFIG, WEIGHTS
from paperback.study.measure import Stopwatch, parameters
from paperback.training import seeded, train

SEED = 0
EPOCHS = {"resnet-fashion": 36, "vit-fashion": 30}
BATCH = {"resnet-fashion": 128, "vit-fashion": 64}
# A transformer learns more slowly and has not yet learned the images by heart.
AUGMENT = {
    "resnet-fashion": Augment(crop_scale=(0.7, 1.0), flip=0.5, cutout=0.5, cutout_size=0.4),
    "vit-fashion": Augment(crop_scale=(0.85, 1.0), flip=0.5),
}


def main(name: str, folder: Path) -> None:
    """Train, measure, and write the folder."""
    torch.set_num_threads(1)
    data = images.fashion_mnist()
    model = untrained(name)
    print(f"{name}: {parameters(model):,} parameters", flush=True)
    with Stopwatch() as watch:
        train(
            model, augmented_cross_entropy(AUGMENT[name]), as_tensors(data.train),
            val_tensors=as_tensors(data.val),
            val_metric=errors, keep_best=False, epochs=EPOCHS[name], batch_size=BATCH[name], lr=2e-3,
            optimizer="adamw", weight_decay=0.05, schedule="one-cycle", clip_norm=1.0, seed=SEED,
            drop_last=True, description=name,
            callbacks=[lambda epoch, _, history: print(epoch, history.val_metric[-1], flush=True)],
        )  # fmt: skip
    accuracy = {part: measure(model, getattr(data, part)) for part in ("train", "val", "test")}
    facts = {"classes": list(data.classes), "accuracy": accuracy, "seconds": round(watch.seconds)}
    print(json.dumps(facts, indent=2), flush=True)
    write(folder, model, facts)


def untrained(name: str) -> ResNet | ViT:
    """Widths of 32, 64 and 128; or four blocks of width 64 on 7x7 patches."""
    with seeded(SEED, name):
        return ResNet(width=32, classes=10) if name == "resnet-fashion" else ViT(classes=10)


def as_tensors(part: Split) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, 28, 28)`` in 0..1 and their classes."""
    return part.x.unsqueeze(1).float() / 255, part.y


def augmented_cross_entropy(augment: Augment) -> Callable[..., Tensor]:
    """Cross-entropy of augmented images; a tenth of the label is spread over all classes."""

    def loss(model: nn.Module, batch: tuple[Tensor, ...], draws: torch.Generator) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(augment(x, draws)), y, label_smoothing=0.1)

    return loss


def errors(model: nn.Module, batch: tuple[Tensor, ...], _: torch.Generator) -> Tensor:
    """The share of images whose class is not recognised."""
    x, y = batch
    return (model(x).argmax(1) != y).float().mean()


def measure(model: nn.Module, part: Split) -> float:
    """Accuracy on a part."""
    x, y = as_tensors(part)
    with torch.no_grad():
        predicted = torch.cat([model(rows).argmax(1) for rows in x.split(500)])
    return round(float((predicted == y).float().mean()), 4)


def write(folder: Path, model: ResNet | ViT, facts: dict) -> None:
    """The saved network with its manifest, written beside the folder and moved into its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fashion-") as temporary:
        whole = Path(temporary) / folder.name
        model.save_pretrained(whole)
        for path in whole.iterdir():
            if path.name not in (CONFIG, WEIGHTS):  # the card, which says where to find these two
                path.unlink()
        files = {
            path.name: {
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in sorted(whole.iterdir())
        }
        manifest = {
            "files": files,
            "recipe": "recipes/fashion_networks.py",
            "seed": SEED,
            "torch": torch.__version__,
            "parameters": parameters(model),
        } | facts
        (whole / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(whole, folder)
    total = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {total:,} bytes", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    if given and given[0] not in EPOCHS:
        sys.exit(__doc__)
    for network in given[:1] or EPOCHS:
        main(network, Path(given[1]) if len(given) > 1 else FOLDER / network)
