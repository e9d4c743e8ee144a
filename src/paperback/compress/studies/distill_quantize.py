"""The study of distillation and quantization: a small student of a large teacher, at two to four bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from paperback.compress.data import Data
from paperback.compress.distill_quantize import DifferentiableQuantization, QuantizedDistillation
from paperback.compress.interface import Compressed
from paperback.data import images
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, style
from paperback.study.statistics import mean_interval
from paperback.training import seeded, train

SEEDS = (0, 1, 2)
RATE = 3e-3
BATCH = 64


@dataclass
class Outcome:
    """What one seed gave, by contender."""

    accuracy: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    huffman: dict[str, float] = field(default_factory=dict)
    points: dict[str, Tensor] = field(default_factory=dict)  # of one layer: first, learned


def study(run: Run) -> None:
    """Do a small student's weights survive at 2 to 4 bits if it is trained with the rounding, or only the
    points are, where rounding it afterwards fails?

    A convolutional teacher and a much smaller student learn Fashion-MNIST (5,000 images).
    The student is distilled in full precision; rounded afterwards, per layer and in buckets; trained with
    rounded weights, with the teacher and without; and given points that are learned. All trainings of
    weights have the same epochs and rate. The claim is false if training with the rounding does not beat
    rounding afterwards at 2 bits.
    """
    outcomes = [_one_seed(run, seed) for seed in run.track(run.seeds, "seeds")]
    _report(run, outcomes)
    _claims(run, outcomes)
    _draw(run, outcomes[0], outcomes)


def _one_seed(run: Run, seed: int) -> Outcome:
    data = _data(run, seed)
    x, y = data.train
    epochs = run.size(smoke=1, standard=6)
    with seeded(seed, "teacher"):
        teacher = network(24, 128, int(y.max()) + 1, x.shape[-2:])
    train(
        teacher, lambda m, batch, _: F.cross_entropy(m(batch[0]), batch[1]), data.train, epochs=epochs,
        batch_size=BATCH, lr=RATE, seed=seed, progress=run.progress, description="training the teacher",
    )  # fmt: skip

    def student() -> nn.Module:
        return network(6, 32, int(y.max()) + 1, x.shape[-2:])

    outcome = Outcome()
    common: dict[str, Any] = {"epochs": epochs, "lr": RATE, "batch_size": BATCH, "seed": seed}

    def keep(name: str, result: Compressed) -> Compressed:
        outcome.accuracy[name] = result.report.quality_after["accuracy"]
        outcome.bytes[name] = result.report.after.bytes_on_disk
        outcome.huffman[name] = result.extras.get("huffman_bits", 32.0)
        return result

    def distil(name: str, start: Any = student, **settings: Any) -> Compressed:
        method = QuantizedDistillation(start, **(common | settings))
        return keep(name, method.compress(teacher, data, latency_runs=0, progress=False))

    whole = distil("student, distilled", bits=None)
    outcome.accuracy["teacher"] = whole.report.quality_before["accuracy"]
    outcome.bytes["teacher"] = whole.report.before.bytes_on_disk
    distil("student, no teacher", bits=None, weight=0.0)
    for bits in run.size(smoke=(2, 4), standard=(2, 3, 4)):
        distil(f"rounded afterwards, {bits} bits", whole.model, bits=bits, epochs=0)
        distil(f"rounded afterwards, no buckets, {bits} bits", whole.model, bits=bits, epochs=0, bucket=None)
        distil(f"quantized training, {bits} bits", bits=bits, weight=0.0)
        distil(f"quantized distillation, {bits} bits", bits=bits)
        learned = DifferentiableQuantization(
            bits, allocate=False, epochs=run.size(smoke=1, standard=3), batch_size=BATCH, seed=seed
        )
        result = keep(
            f"differentiable quantization, {bits} bits",
            learned.compress(whole.model, data, teacher=teacher, latency_runs=0, progress=False),
        )
        if bits == 4:
            hidden = list(result.extras["points"])[-2]  # the wide linear layer
            outcome.points = {
                "quantiles": result.extras["first_points"][hidden],
                "learned": result.extras["points"][hidden],
            }
    return outcome


def _data(run: Run, seed: int) -> Data:
    """Fashion-MNIST or the user's images."""
    if run.data is not None:
        dataset = images.read(run.data, seed=seed, channels="grey")
    else:
        dataset = images.fashion_mnist(run.size(smoke=400, standard=6000), seed)
    parts = {}
    for name, most in (("train", 5000), ("val", 1000), ("test", run.size(smoke=200, standard=2000))):
        part = getattr(dataset, name)
        parts[name] = (part.x[:most].float().unsqueeze(1) / 255, torch.as_tensor(part.y[:most]))
    return Data(**parts, batch_size=500)


def network(channels: int, hidden: int, classes: int, shape: tuple[int, int]) -> nn.Sequential:
    """Two convolutions with norms and pools, and two linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, channels), (channels, 2 * channels)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)
        ]  # fmt: skip
    features = 2 * channels * (shape[0] // 4) * (shape[1] // 4)
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def _report(run: Run, outcomes: list[Outcome]) -> None:
    rows = []
    for name in outcomes[0].accuracy:
        values = [outcome.accuracy[name] for outcome in outcomes]
        rows.append(
            {
                "network": name, "accuracy": mean_interval(values).mean, "lowest": min(values),
                "highest": max(values), "bytes": outcomes[0].bytes[name],
                "Huffman bits": outcomes[0].huffman.get(name),
            }
        )  # fmt: skip
    run.table(
        "accuracy", rows,
        f"Accuracy on the test part, {len(outcomes)} seeds; bytes are those of the files, scales, points and "
        "the recipe among them; the mean length of a Huffman code is of the first seed.",
    )  # fmt: skip


def _claims(run: Run, outcomes: list[Outcome]) -> None:
    def values(name: str) -> list[float]:
        return [outcome.accuracy[name] for outcome in outcomes]

    for method, short, gain in (
        ("quantized distillation", "training with the rounding", 0.10),
        ("differentiable quantization", "learning the points", 0.05),
    ):
        run.claim(
            f"at 2 bits {short} beats rounding afterwards",
            paper="CIFAR-10, 2 bits: 82.4 % and 80.4 %, rounded afterwards 10.5 %",
            measured=values(f"{method}, 2 bits"),
            baseline=values("rounded afterwards, 2 bits"),
            at_least=gain,
        )
        run.claim(
            f"at 4 bits {short} is near the full-precision student",
            paper="CIFAR-10, 4 bits: 88.0 % and 88.3 % of 88.8 %",
            measured=values(f"{method}, 4 bits"),
            baseline=values("student, distilled"),
            at_least=-0.015,
        )
    untaught = mean_interval(values("quantized training, 2 bits")).mean
    run.claim(
        "at 2 bits the quantized student stays near the full-precision one",
        paper="CIFAR-10, 2 bits: 82.4 % of 88.8 %",
        measured=values("quantized distillation, 2 bits"),
        baseline=values("student, distilled"),
        at_least=-0.04,
        note=f"Quantized training without a teacher reaches {untaught:.3f}.",
    )
    run.claim(
        "the 4-bit student is at most 3 points below its teacher",
        paper="near the full-precision teacher",
        measured=values("quantized distillation, 4 bits"),
        baseline=values("teacher"),
        at_least=-0.03,
    )
    run.claim(
        "the teacher's file is ten times the 4-bit student's, or more",
        paper="an order of magnitude of compression",
        measured=[o.bytes["teacher"] / o.bytes["quantized distillation, 4 bits"] for o in outcomes],
        at_least=10.0,
    )


def _draw(run: Run, first: Outcome, outcomes: list[Outcome]) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        families = {
            "rounded afterwards": BASELINE, "quantized training": PALETTE[3],
            "quantized distillation": METHOD, "differentiable quantization": PALETTE[2],
        }  # fmt: skip
        for family, colour in families.items():
            names = [name for name in first.accuracy if name.startswith(f"{family}, ") and "no b" not in name]
            left.plot(
                [first.bytes[name] / 1000 for name in names],
                [mean_interval([o.accuracy[name] for o in outcomes]).mean for name in names],
                marker="o", color=colour, label=family,
            )  # fmt: skip
        for name, marker in (("student, distilled", "s"), ("teacher", "^")):
            left.plot(
                first.bytes[name] / 1000, mean_interval([o.accuracy[name] for o in outcomes]).mean,
                marker=marker, color=REFERENCE, linestyle="none", label=name,
            )  # fmt: skip
        left.set(xscale="log", xlabel="kilobytes on disk", title="Accuracy on the test part")
        left.legend(fontsize=7, loc="lower right")
        uniform = torch.linspace(0, 1, len(first.points["learned"]))
        for level, points in enumerate((uniform, *first.points.values())):
            right.plot(points.numpy(), [level] * len(points), "|", markersize=16, color=PALETTE[level])
        right.set_yticks(range(3), ["uniform", *first.points])
        right.set(ylim=(-0.6, 2.6), title="16 points of a layer", xlabel="scaled weight")
        right.grid(False)
    run.figure(
        "sizes", figure,
        caption="Left: accuracy (mean over seeds) against bytes on disk, at each number of bits. Right: the "
        "points of the hidden linear layer at 4 bits before and after learning (first seed).",
        alt="The methods that train with rounding stay near the full student as files shrink; rounding "
        "afterwards falls away at 2 bits. Learned points lie near the quantiles, denser in the middle.",
    )  # fmt: skip
