"""Our contrastive learners beside lightly's modules: loss values, images per second, accuracy.

    python benchmarks/represent/contrastive.py [--steps 20] [--rounds 5] [--accuracy-steps 200]

lightly comes from an environment of its own (`tools/setup-peers represent`), whose packages are put behind
our own, so that both run in this process, with this torch, on the same network, batch and optimizer. Three
loops are timed in turn:

1. ours, `SimCLR.fit` as a user calls it: augmentation, both views as one batch, convolutions in channels-last
   order;
2. lightly's projection head and loss in the loop of its documentation, fed with our augmented tensors;
3. the same with lightly's own transforms (PIL, image by image), which are torchvision's.

Seconds are those of this process's CPU on one thread; the ratio is that of the medians over the rounds.
solo-learn pins pytorch-lightning 1.6.4 and torchmetrics 0.6.0 of 2022 and is not in the environment; lightly
stands for both. Without the environment the script says so and prints our own numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paperback.data import images
from paperback.data.augment import Views
from paperback.networks.resnet import ResNet
from paperback.represent.contrastive import SimCLR, barlow_twins_loss
from paperback.represent.contrastive.learner import Shuffle
from paperback.represent.evaluate import linear_probe
from paperback.training import seeded
from paperback.training.contrastive import info_nce, nt_xent

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers-represent"
WIDTH, BATCH, TEMPERATURE, LR = 16, 256, 0.2, 6e-3
PROJECTION = (256, 128)


def load_lightly() -> Any | None:
    """lightly's package, or None where its environment is missing."""
    found = sorted(PEERS.glob("lib/python*/site-packages"))
    if not found:
        return None
    sys.path.append(str(found[-1]))  # behind our own packages: torch and numpy are ours
    operators = torch.library.Library("torchvision", "DEF")  # PyPI's torchvision is built for another torch
    for name in ("nms", "qnms"):
        operators.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import lightly
    import lightly.loss
    import lightly.models.modules
    import lightly.transforms

    return lightly


def compare_losses(lightly: Any) -> None:
    """The same embeddings into both; the largest relative difference over ten draws."""
    draws = torch.Generator().manual_seed(0)
    queue = nn.functional.normalize(torch.randn(512, 64, generator=draws), dim=1)
    bank = lightly.loss.NTXentLoss(TEMPERATURE, memory_bank_size=(512, 64))
    worst = {"nt_xent": 0.0, "info_nce with a queue": 0.0, "barlow_twins_loss": 0.0}
    for _ in range(10):
        a, b = torch.randn(2, 128, 64, generator=draws)
        bank.memory_bank.bank = queue.T.clone() if bank.memory_bank.bank.shape[0] == 64 else queue.clone()
        bank.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
        pairs = {
            "nt_xent": (nt_xent(a, b, TEMPERATURE), lightly.loss.NTXentLoss(TEMPERATURE)(a, b)),
            "info_nce with a queue": (info_nce(a, b, queue, TEMPERATURE), bank.eval()(a, b)),
            "barlow_twins_loss": (
                barlow_twins_loss(a, b, 5e-3), lightly.loss.BarlowTwinsLoss(lambda_param=5e-3)(a, b)
            ),
        }  # fmt: skip
        for name, (ours, theirs) in pairs.items():
            worst[name] = max(worst[name], abs(float(ours - theirs)) / abs(float(theirs)))
    for name, difference in worst.items():
        print(f"{name:24s} differs from lightly's by at most {difference:.1e} (relative)")


class LightlyLoop:
    """The training loop of lightly's documentation, on our network."""

    def __init__(self, lightly: Any, x: Tensor, seed: int, transforms: bool) -> None:
        with seeded(seed, "backbone"):
            self.backbone = ResNet(width=WIDTH)
        with seeded(seed, "pretext"):
            head = lightly.models.modules.SimCLRProjectionHead
            self.head = head(self.backbone.dim, *PROJECTION, num_layers=2, batch_norm=False)
        self.loss = lightly.loss.NTXentLoss(TEMPERATURE)
        self.x, self.shuffle, self.draws = x, Shuffle(len(x), seed), torch.Generator().manual_seed(seed)
        std, self.mean = torch.std_mean(x.float() / 255)
        self.std = std
        parameters = [*self.backbone.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=1e-4, fused=True)
        self.batches = self._with_transforms(lightly) if transforms else self._with_tensors()

    def _with_tensors(self) -> Any:
        views = Views.of("simclr")
        while True:
            batch = self.x[self.shuffle.take(BATCH)][:, None].float() / 255
            yield tuple((view - self.mean) / self.std for view in views(batch, self.draws))

    def _with_transforms(self, lightly: Any) -> Any:
        from PIL import Image

        normalise = {"mean": [float(self.mean)] * 3, "std": [float(self.std)] * 3}
        transform = lightly.transforms.SimCLRTransform(
            input_size=28, cj_strength=1.0, gaussian_blur=0.5, normalize=normalise
        )
        while True:
            rows = self.x[self.shuffle.take(BATCH)].numpy()
            pairs = [transform(Image.fromarray(image).convert("RGB")) for image in rows]
            yield tuple(torch.stack([pair[i][:1] for pair in pairs]) for i in range(2))

    def run(self, steps: int, total: int | None = None) -> None:
        """Some steps; with `total` along the schedule of ours: 5 % warm-up, then a cosine."""
        from paperback.training.schedule import factor

        self.backbone.train()
        for step in range(steps):
            if total is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = LR * factor("cosine", step, total, 0.05)
            first, second = next(self.batches)
            z0, z1 = self.head(self.backbone(first)), self.head(self.backbone(second))
            loss = self.loss(z0, z1)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Features, as `Encoder.transform` gives them."""
        self.backbone.eval()
        return torch.cat([
            self.backbone((part[:, None].float() / 255 - self.mean) / self.std) for part in x.split(512)
        ])  # fmt: skip


def ours(x: Tensor, steps: int, seed: int = 0) -> SimCLR:
    """Our learner as a user calls it."""
    encoder = SimCLR(
        {"name": "resnet", "width": WIDTH}, steps=steps, batch_size=BATCH, lr=LR,
        temperature=TEMPERATURE, projection=PROJECTION, seed=seed,
    )  # fmt: skip
    return encoder.fit(x, progress=False)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of this process's CPU."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accuracy-steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = images.fashion_mnist()
    x = dataset.train.x
    loops: dict[str, Callable[[], object]] = {"paperback": lambda: ours(x, options.steps)}
    lightly = load_lightly()
    if lightly is None:
        print(f"lightly is not run: there is no {PEERS.name}; make it with `tools/setup-peers represent`")
    else:
        compare_losses(lightly)
        tensors, transforms = (LightlyLoop(lightly, x, 0, own) for own in (False, True))
        loops["lightly's modules, our views"] = lambda: tensors.run(options.steps)
        loops["lightly's modules and transforms"] = lambda: transforms.run(options.steps)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            seconds[name].append(cpu_seconds(loop))
    rates = {name: BATCH * options.steps / statistics.median(found) for name, found in seconds.items()}
    print(f"\nSimCLR, ResNet of width {WIDTH}, batches of {BATCH} images of 28x28, one thread:")
    for name, rate in rates.items():
        ratio = (
            f"   paperback is {rates['paperback'] / rate:.2f} times as fast" if name != "paperback" else ""
        )
        print(f"  {name:34s} {rate:7.0f} images a second{ratio}")
    print(f"\nlinear probe after {options.accuracy_steps} steps, 3,000 labels, test part, three seeds:")
    for name in ("paperback", *(["lightly's modules, our views"] if lightly else [])):
        found = []
        for seed in range(3):
            if name == "paperback":
                encoder: Any = ours(x, options.accuracy_steps, seed)
            else:
                encoder = LightlyLoop(lightly, x, seed, transforms=False)
                encoder.run(options.accuracy_steps, options.accuracy_steps)
            features, tested = encoder.transform(x[:3000]), encoder.transform(dataset.test.x)
            found.append(linear_probe(features, dataset.train.y[:3000], tested, dataset.test.y).accuracy)
        print(f"  {name:34s} {statistics.mean(found):.3f} ({', '.join(f'{a:.3f}' for a in found)})")


if __name__ == "__main__":
    main()
