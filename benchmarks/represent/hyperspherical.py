"""The hyperspherical classifier beside pytorch-metric-learning: loss values, novel classes, time of an epoch.

    python benchmarks/represent/hyperspherical.py [--seeds 3] [--rounds 3]

pytorch-metric-learning comes from an environment of its own (`tools/setup-peers represent`), whose packages
are put behind our own, so that both run in this process, with this torch, on the same network, batches and
optimizer. It has losses and miners, but no classifier that takes up classes; novel classes are therefore
classified by class means of both. Seconds are of this process's CPU on one thread. Without the environment
the script says so and prints our own numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperback.data import images
from paperback.represent.evaluate import novel_classes
from paperback.represent.hyperspherical import HypersphericalClassifier, MetricLearner, normalized_softmax
from paperback.represent.hyperspherical.embedding import UnitEncoder
from paperback.represent.interface import as_images
from paperback.training import derive, train
from paperback.training.contrastive import sup_con
from paperback.training.metric_learning import triplet_batch_hard

PEERS = Path(__file__).resolve().parents[2] / ".venv-peers-represent"
DIM, SCALE, MARGIN, EPOCHS = 64, 10.0, 0.2, 5
TARGET_VALUE, TARGET_TIME = 1e-5, 0.6


def load_peer() -> Any | None:
    """The package, or None where its environment is missing."""
    found = sorted(PEERS.glob("lib/python*/site-packages"))
    if not found:
        return None
    sys.path.append(str(found[-1]))  # behind our own packages: torch and numpy are ours
    import pytorch_metric_learning
    import pytorch_metric_learning.losses
    import pytorch_metric_learning.miners

    return pytorch_metric_learning


def compare_values(peer: Any) -> None:
    """The same inputs and weights, the same losses."""
    draws = torch.Generator().manual_seed(0)
    z, y = torch.randn(256, DIM, generator=draws), torch.randint(0, 24, (256,), generator=draws)
    theirs = peer.losses.NormalizedSoftmaxLoss(24, DIM, temperature=1 / SCALE)
    triplets = peer.losses.TripletMarginLoss(margin=MARGIN)
    mined = peer.miners.BatchHardMiner()(z, y)
    contrast = peer.losses.SupConLoss(temperature=0.1)
    pairs = {
        "normalised softmax": (normalized_softmax(z, theirs.W.detach().T, y, SCALE), theirs(z, y)),
        "batch-hard triplets": (_over_active(z, y), triplets(z, y, mined)),
        "SupCon": (sup_con(z, y, temperature=0.1), contrast(z, y)),
    }
    for name, (a, b) in pairs.items():
        a, b = a.detach(), b.detach()
        error = abs(float(a) - float(b))
        verdict = "equal" if error <= TARGET_VALUE else "DIFFERENT"
        print(f"  {name:22s} ours {float(a):.6f}  theirs {float(b):.6f}  difference {error:.1e}  {verdict}")


def _over_active(z: Tensor, y: Tensor) -> Tensor:
    """Our batch-hard loss as the peer averages it: over triplets that cost something."""
    single = torch.stack([_one_anchor(z, y, i) for i in range(len(z))])
    assert torch.isclose(single.mean(), triplet_batch_hard(z, y, MARGIN), atol=1e-6)
    return single[single > 0].mean()


def _one_anchor(z: Tensor, y: Tensor, i: int) -> Tensor:
    distances = (F.normalize(z, dim=1) - F.normalize(z[i : i + 1], dim=1)).norm(dim=1)
    others = torch.arange(len(z)) != i
    positive, negative = distances[(y == y[i]) & others].max(), distances[y != y[i]].min()
    return F.relu(positive - negative + MARGIN)


class PeerEncoder(UnitEncoder):
    """Our network and loop with a loss of the peer."""

    def __init__(
        self, peer: Any, kind: str, batch_size: int = 128, epochs: int = EPOCHS, seed: int = 0
    ) -> None:
        super().__init__(dim=DIM, seed=seed)
        self.peer, self.kind, self.batch_size, self.epochs = peer, kind, batch_size, epochs

    def _fit(self, images_: Tensor, labels: Tensor | None, progress: bool) -> Any:
        assert labels is not None
        classes, codes = labels.unique(return_inverse=True)
        if self.kind == "normalised softmax":
            objective = self.peer.losses.NormalizedSoftmaxLoss(len(classes), DIM, temperature=1 / SCALE)
        else:
            objective = self.peer.losses.TripletMarginLoss(margin=MARGIN)
        miner = self.peer.miners.BatchHardMiner()

        class Pretext(nn.Module):
            def __init__(self, encoder: UnitEncoder) -> None:
                super().__init__()
                self.encoder, self.objective = encoder, objective

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                z = self.encoder.embed(x)
                found: Tensor = objective(z, y, miner(z, y)) if "triplets" in kind else objective(z, y)
                return found

        kind = self.kind
        return train(
            Pretext(self), lambda model, batch, _: model(*batch), (images_, codes), epochs=self.epochs,
            batch_size=self.batch_size, lr=1e-3, seed=self.seed, progress=False, drop_last=True,
        )  # fmt: skip


def novel_split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]:
    """Garments in four rotations: 24 classes seen, 16 novel."""
    data = images.fashion_mnist(seed=seed)
    rng = np.random.default_rng(derive(seed, "split"))

    def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        quarters = torch.from_numpy(rng.integers(0, 4, len(x)))
        return torch.stack([torch.rot90(x, k, (1, 2)) for k in range(4)])[quarters, torch.arange(len(x))], (
            4 * y + quarters
        )

    return *turned(*data.train), *turned(*data.test), rng.permutation(40)[24:]


def compare_accuracy(peer: Any | None, seeds: int) -> None:
    """Novel classes by class means of both, the same network, passes and optimizer."""
    makers: dict[str, Callable[[int], UnitEncoder]] = {
        "ours, normalised softmax": lambda s: HypersphericalClassifier(epochs=EPOCHS, holdout=0.0, seed=s),
        "ours, batch-hard": lambda s: MetricLearner("batch_hard", epochs=EPOCHS, seed=s),
    }
    if peer is not None:
        makers["theirs, normalised softmax"] = lambda s: PeerEncoder(peer, "normalised softmax", seed=s)
        makers["theirs, batch-hard"] = lambda s: PeerEncoder(peer, "batch-hard triplets", seed=s)
    for name, make in makers.items():
        found = []
        for seed in range(seeds):
            x, y, x_test, y_test, novel = novel_split(seed)
            seen = ~torch.isin(y, torch.from_numpy(novel))
            encoder = make(seed).fit(x[seen], y[seen], progress=False)
            scores = novel_classes(encoder.transform(x), y, encoder.transform(x_test), y_test, novel=novel)
            found.append((scores.disjoint, scores.joint))
        disjoint, joint = np.mean(found, axis=0)
        print(f"  {name:28s} disjoint {disjoint:.3f}  joint {joint:.3f}  (mean of {seeds} splits)")


def compare_time(peer: Any | None, rounds: int) -> None:
    """CPU seconds of an epoch of 4,096 images at 512 a batch: half the difference of fits of 3 and of 1."""
    data = images.fashion_mnist(4096)
    x, y = as_images(data.train.x), 4 * data.train.y + torch.arange(4096) % 4
    makers: dict[str, Callable[[int], UnitEncoder]] = {
        "ours, normalised softmax": lambda n: HypersphericalClassifier(epochs=n, batch_size=512, holdout=0.0),
        "ours, batch-hard": lambda n: MetricLearner("batch_hard", epochs=n, batch_size=512),
    }
    if peer is not None:
        makers["theirs, batch-hard"] = lambda n: PeerEncoder(peer, "batch-hard triplets", 512, n)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            taken = []
            for epochs in (1, 3):
                encoder = make(epochs)
                start = time.process_time()
                encoder.fit(x, y, progress=False)
                taken.append(time.process_time() - start)
            seconds[name].append((taken[1] - taken[0]) / 2)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"  {name:28s} {value:.2f} s")
    for name in list(medians)[1:]:
        ratio = medians["ours, normalised softmax"] / medians[name]
        reached = "reached" if ratio <= TARGET_TIME else "NOT reached: the network takes most of both"
        print(f"  ratio to {name}: {ratio:.2f} (bar {TARGET_TIME}, {reached})")


def main() -> None:
    """Run all three comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer = load_peer()
    if peer is None:
        print(f"pytorch-metric-learning is left out: no {PEERS} (tools/setup-peers represent)")
    else:
        print(f"pytorch-metric-learning {peer.__version__}: loss values")
        compare_values(peer)
    print("epoch at 512 images a batch, CPU seconds")
    compare_time(peer, arguments.rounds)
    print("novel classes of 16 garment rotations")
    compare_accuracy(peer, arguments.seeds)


if __name__ == "__main__":
    main()
