"""What inflation costs: nothing per step, and no copy of the images.

    python benchmarks/represent/adaptive_inflation.py [--steps 20] [--rounds 5]

lightly and solo-learn train contrastive learners but have no inflation; the authors' code (PKU-ML/adainf)
changes solo-learn's data module, with pytorch-lightning pinned to 2.0.2 and two GPUs; it is not run here.
In its place stands a transcription of how it inflates: the generated images are appended to the list of
items, the real items are repeated `dup` times, and a data loader collates single items.

1. Images a second of SimCLR on the real images alone, and on real and generated ones by `InflatedDataset`;
   lightly's step on the same network is in benchmarks/represent/contrastive.py.
2. Images a second of the two ways to read batches, and the bytes that each holds beside the images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from paperback.data import images
from paperback.represent.adaptive_inflation import InflatedDataset, MixtureGenerator, inflate
from paperback.represent.contrastive import SimCLR
from paperback.represent.contrastive.learner import Shuffle

BATCH, REPLICATE = 256, 5


def cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of this process's CPU."""
    start = time.process_time()
    work()
    return time.process_time() - start


def read_by_index(data: InflatedDataset, batches: int) -> None:
    """Batches as our loop takes them."""
    shuffle = Shuffle(len(data), 0)
    for _ in range(batches):
        data[shuffle.take(BATCH)]


def read_by_item(data: InflatedDataset, batches: int) -> None:
    """Batches as a data loader collates them from repeated and appended items."""
    real, made = (TensorDataset(torch.as_tensor(x)) for x in (data.real, data.generated))
    items = ConcatDataset([real] * data.replicate + [made])
    loader = iter(DataLoader(items, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0)))
    for _ in range(batches):
        (batch,) = next(loader)
        batch[:, None].float() / 255


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = images.fashion_mnist(1000).train.x
    data = inflate(real, MixtureGenerator(20).fit(real).sample(10_000), replicate=REPLICATE)

    def train(source: object) -> None:
        x = source if isinstance(source, InflatedDataset) else real[:, None].float() / 255
        SimCLR(steps=options.steps, batch_size=BATCH).learn_from(x, progress=False)

    batches = min(10 * options.steps, len(data) // BATCH)
    works: dict[str, tuple[Callable[[], object], int]] = {
        "SimCLR on real images": (lambda: train(real), options.steps),
        "SimCLR on the inflated set": (lambda: train(data), options.steps),
        "read by index": (lambda: read_by_index(data, batches), batches),
        "read by item (transcription)": (lambda: read_by_item(data, batches), batches),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, (work, _) in works.items():
            seconds[name].append(cpu_seconds(work))
    rates = {name: BATCH * works[name][1] / statistics.median(found) for name, found in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:30s} {rate:9.0f} images a second")
    first, second, third, fourth = rates.values()
    print(f"\na step on the inflated set takes {first / second:.2f} of the time of one on real images alone")
    print(f"reading by index is {third / fourth:.1f} times as fast as by item")
    own = np.asarray(data.real).nbytes + np.asarray(data.generated).nbytes
    copied = data.images().numel() * 4
    print(f"bytes held: {own:,} as uint8 without copies; {copied:,} if the set were built as floats")


if __name__ == "__main__":
    main()
