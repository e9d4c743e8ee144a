"""The study of SparK: what pre-training on unlabelled images is worth when there are few labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from paperback.data import images, splits
from paperback.represent.contrastive import SimCLR
from paperback.represent.evaluate import fine_tune, linear_probe
from paperback.represent.interface import Encoder, as_images
from paperback.represent.spark import SparK, active_shares, dense_to_sparse, random_mask
from paperback.study import Run
from paperback.study.figures import (
    BASELINE,
    METHOD,
    PALETTE,
    REFERENCE,
    WIDE,
    direct_labels,
    pixel_grid,
    style,
)
from paperback.training import derive, generator

SEEDS = (0, 1, 2)  # of labels, heads and order in fine-tuning; each encoder is pre-trained once
STRIDE = 8  # of the ResNet of three stages; images are padded to a multiple of it
RATES = (1e-3, 3e-3, 1e-2)  # learning rates of fine-tuning, chosen on the validation part
EPOCHS, BATCH = 25, 32  # of fine-tuning
SCRATCH, SPARK, ZERO_OUT, LAST, SIMCLR = (
    "from scratch", "SparK", "zeros, dense network", "last scale only", "SimCLR, equal CPU time",
)  # fmt: skip
COLOURS = {SPARK: METHOD, SCRATCH: BASELINE, ZERO_OUT: PALETTE[2], LAST: PALETTE[3], SIMCLR: PALETTE[5]}


@dataclass
class Data:
    """Images 0..1 with sides that are multiples of the stride, and what is known about them."""

    pool: Tensor
    pool_labels: Tensor
    unlabelled: Tensor
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Outcome:
    """What one encoder gave: accuracy by number of labels, one for each seed."""

    encoder: Encoder
    seconds: float
    rates: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, list[float]] = field(default_factory=dict)
    probe: float = 0.0

    def mean(self) -> list[float]:
        """Over the numbers of labels, seed by seed."""
        return [float(x) for x in np.mean(list(self.accuracy.values()), axis=0)]


def study(run: Run) -> None:
    """Does a convolutional network that was pre-trained on images without labels, by predicting what it did
    not see, need fewer labels? And is it the sparse convolution and the hierarchy that do it?

    A small ResNet is pre-trained once in each way, then fine-tuned with few labels, several times. Beside
    SparK stand the same network from scratch, the same pre-training with zeros in a dense network, the same
    with the last feature map only, and SimCLR with the same CPU time, which is the strong one. The claims are
    false if SparK is not better than scratch with 100 labels, or not better than its ablations.
    """
    data = _load(run)
    sizes = run.size(smoke=(20,), quick=(100, 500), standard=(100, 500), full=(100, 500, 2000))
    outcomes = _pretrain(run, data)
    for name, outcome in run.track(outcomes.items(), "encoders"):
        _fine_tune(run, data, outcome, sizes)
        run.log(f"{name}: {outcome.accuracy}")
    _report(run, data, outcomes, sizes)
    _draw_reconstructions(run, data, outcomes[SPARK].encoder)
    _report_erosion(run, data, outcomes)
    _claims(run, outcomes, sizes)
    run.model("model", outcomes[SPARK].encoder)


def _load(run: Run) -> Data:
    dataset = images.fashion_mnist(seed=run.seed) if run.data is None else images.read(
        run.data, seed=run.seed, labels="required"
    )  # fmt: skip
    train_labels, val_labels, test_labels = (p.y for p in (dataset.train, dataset.val, dataset.test))
    assert train_labels is not None
    assert val_labels is not None
    assert test_labels is not None
    pool, val, test = (_whole_patches(as_images(p.x)) for p in (dataset.train, dataset.val, dataset.test))
    n = run.size(smoke=96, quick=2000, standard=5000, full=9000)
    n_test = run.size(smoke=100, quick=1000, standard=2000)
    return Data(
        pool, train_labels, pool[:n],
        (val[:n_test], val_labels[:n_test]), (test[:n_test], test_labels[:n_test]),
    )  # fmt: skip


def _whole_patches(x: Tensor) -> Tensor:
    down, right = -x.shape[-2] % STRIDE, -x.shape[-1] % STRIDE
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


# -- pre-training --------------------------------------------------------------------------------------------


def _pretrain(run: Run, data: Data) -> dict[str, Outcome]:
    epochs = run.size(smoke=1, quick=5, standard=8, full=40)
    channels = data.pool.shape[1]
    kinds = {SPARK: {}, ZERO_OUT: {"sparse": False}, LAST: {"hierarchical": False}}
    outcomes = {}
    for name, changes in run.track(kinds.items(), "pre-training"):
        encoder = SparK(in_channels=channels, seed=run.seed, epochs=epochs, **changes)  # type: ignore[arg-type]
        start = time.process_time()
        encoder.fit(data.unlabelled, progress=False)
        outcomes[name] = Outcome(encoder, time.process_time() - start)
    scratch = SparK(in_channels=channels, seed=run.seed)
    scratch.mean.copy_(outcomes[SPARK].encoder.mean)
    scratch.std.copy_(outcomes[SPARK].encoder.std)
    outcomes[SCRATCH] = Outcome(scratch, 0.0)
    outcomes[SIMCLR] = _simclr(run, data, outcomes[SPARK].seconds)
    return outcomes


def _simclr(run: Run, data: Data, seconds: float) -> Outcome:
    """As many steps as SparK's CPU time allows, after a few that say how long one takes."""

    def make(steps: int) -> SimCLR:
        encoder = SimCLR(in_channels=data.pool.shape[1], steps=steps, seed=run.seed)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder

    tried = run.size(smoke=1, standard=10)
    start = time.process_time()
    make(tried).fit(data.unlabelled, progress=False)
    each = (time.process_time() - start) / tried
    encoder = make(max(1, round(seconds / each)))
    start = time.process_time()
    encoder.fit(data.unlabelled, progress=False)
    return Outcome(encoder, time.process_time() - start)


# -- fine-tuning ---------------------------------------------------------------------------------------------


def _fine_tune(run: Run, data: Data, outcome: Outcome, sizes: tuple[int, ...]) -> None:
    """Accuracy on the test part, with the learning rate that is best on the validation part for that size."""
    epochs = run.size(smoke=1, standard=EPOCHS)

    def score(n: int, seed: int, test: tuple[Tensor, Tensor], rate: float) -> float:
        part = _labelled(data, n, seed)
        return fine_tune(
            outcome.encoder, part, test, lr=rate, epochs=epochs, batch_size=BATCH, seed=seed
        ).accuracy

    rates = run.size(smoke=RATES[:1], quick=RATES[1:2], standard=RATES)
    for size in sizes:
        tried = {rate: score(size, derive(run.seed, "tuning"), data.val, rate) for rate in rates}
        best = outcome.rates[size] = max(tried, key=lambda rate: tried[rate])
        outcome.accuracy[size] = [score(size, seed, data.test, best) for seed in run.seeds]
    outcome.probe = _probe(run, data, outcome.encoder.transform)


def _labelled(data: Data, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with labels, stratified by class."""
    rng, labels = np.random.default_rng(seed), data.pool_labels.numpy()
    rows = torch.from_numpy(splits.draw(np.arange(len(labels)), n, rng, labels)[0])
    return data.pool[rows], data.pool_labels[rows]


def _probe(run: Run, data: Data, features: Callable[[Tensor], Tensor]) -> float:
    """Accuracy of a ridge on frozen features."""
    n = run.size(smoke=100, standard=3000)
    train, test = features(data.pool[:n]), features(data.test[0])
    return linear_probe(train, data.pool_labels[:n], test, data.test[1]).accuracy


# -- the report ----------------------------------------------------------------------------------------------


def _report(run: Run, data: Data, outcomes: dict[str, Outcome], sizes: tuple[int, ...]) -> None:
    rows: list[dict[str, str | float | None]] = []
    for name, outcome in outcomes.items():
        row: dict[str, str | float | None] = {"encoder": name}
        for size, found in outcome.accuracy.items():
            row |= {f"{size} labels": float(np.mean(found)), f"s.d. {size}": float(np.std(found))}
        rows.append(
            row
            | {
                "mean": float(np.mean(outcome.mean())),
                "linear probe": outcome.probe,
                "pre-training CPU s": outcome.seconds,
                "fine-tuning rates": ", ".join(f"{rate:g}" for rate in outcome.rates.values()),
            }
        )
    pixels: dict[str, str | float | None] = {"encoder": "pixels, ridge"}
    x_test = data.test[0].flatten(1)
    for size in sizes:
        found = [
            linear_probe(part.flatten(1), y, x_test, data.test[1]).accuracy
            for part, y in (_labelled(data, size, seed) for seed in run.seeds)
        ]
        pixels[f"{size} labels"] = float(np.mean(found))
    rows.append(pixels | {"linear probe": _probe(run, data, lambda x: x.flatten(1))})
    if run.budget in ("standard", "full"):
        scratch = outcomes[SCRATCH]
        everything = fine_tune(
            scratch.encoder,
            (data.pool, data.pool_labels),
            data.test,
            lr=max(scratch.rates.values()),
            epochs=10,
            batch_size=128,
        ).accuracy
        rows.append({"encoder": f"supervised on {len(data.pool):,} labels", "all labels": everything})
    run.table(
        "accuracy", rows,
        "Accuracy on the test part after fine-tuning with few labels: mean and deviation over seeds. "
        "The linear probe is fitted to frozen, globally pooled features of up to 3,000 images. "
        "Pixels have no pre-training and no fine-tuning.",
    )  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for name, outcome in outcomes.items():
            means = [np.mean(outcome.accuracy[size]) for size in sizes]
            spread = [np.std(outcome.accuracy[size]) for size in sizes]
            colour = COLOURS[name]
            axes.errorbar(sizes, means, spread, color=colour, elinewidth=0.8, fmt="none")
            axes.plot(sizes, means, color=colour, label=name, marker="o")
        axes.set(xscale="log", xlabel="labelled images", ylabel="test accuracy")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.minorticks_off()
        direct_labels(axes)
    run.figure(
        "label_efficiency", figure,
        "Accuracy after fine-tuning against the number of labels. Bars are the deviation over seeds.",
        "Lines that rise with the number of labels, one for each way of pre-training; the numbers are in the "
        "table of accuracy.",
    )  # fmt: skip


def _draw_reconstructions(run: Run, data: Data, encoder: Encoder) -> None:
    assert isinstance(encoder, SparK)
    first = [int((data.test[1] == label).nonzero()[0]) for label in data.test[1].unique()[:8]]
    shown = data.test[0][first]
    guess, mask = encoder.reconstruct(shown, seed=run.seed)
    up = F.interpolate(mask.float(), shown.shape[-2:]).expand_as(shown) > 0
    hidden = torch.where(up, shown, torch.nan)
    grid = torch.stack([shown, hidden, guess])[:, :, 0]
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        pixel_grid(figure.subplots(), grid.numpy(), row_labels=("image", "seen", "SparK"), limits=(0, 1))
    run.figure(
        "reconstructions", figure,
        "Test images, the patches that the network saw (6 of 16), and its guess at the others. Mean and "
        "contrast of a hidden patch are taken from the true one: the network predicts normalised patches.",
        "Three rows of garments: whole, with most patches coloured as hidden, and completed; the completed "
        "ones are blurred versions of the originals.",
    )  # fmt: skip


def _report_erosion(run: Run, data: Data, outcomes: dict[str, Outcome]) -> None:
    """Share of positions that hold something of the image, after each convolution."""
    x = outcomes[SPARK].encoder.normalise(data.test[0][:256])
    grid = (x.shape[-2] // STRIDE, x.shape[-1] // STRIDE)
    mask = random_mask(len(x), grid, 0.6, generator(run.seed, "erosion"))
    kept = float(mask.float().mean())
    sparse = active_shares(dense_to_sparse(outcomes[SPARK].encoder.backbone), x, mask)
    dense = active_shares(outcomes[ZERO_OUT].encoder.backbone, x, mask)
    main = [name for name in sparse if "shortcut" not in name]
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        for shares, name in ((sparse, SPARK), (dense, ZERO_OUT)):
            axes.plot([shares[layer] for layer in main], marker="o", color=COLOURS[name], label=name)
        axes.axhline(kept, color=REFERENCE, linewidth=0.8, linestyle=":")
        axes.set(xlabel="convolution", ylabel="share of positions", ylim=(0, 1.05))
        axes.set_xticks(range(len(main)), [str(i + 1) for i in range(len(main))])
        direct_labels(axes)
    run.figure(
        "erosion", figure,
        f"Share of positions that depend on visible pixels, layer by layer; {kept:.3f} of the patches are "
        "visible (dotted). In a dense network the mask is gone after a few convolutions.",
        "A flat line for the sparse network at the share of visible patches, and one for the dense network "
        "that rises to one.",
    )  # fmt: skip
    run.claim(
        "the sparse network keeps the mask at every layer",
        paper="figure 3: the mask pattern is the same at every depth",
        measured=max(abs(share - kept) for share in sparse.values()),
        at_most=0.0,
        note=f"largest difference between the share of active positions after a convolution and {kept:.3f}.",
    )
    run.claim(
        "in a dense network with zeros the mask is gone at the last stage",
        paper="figure 3: the mask pattern erodes with depth",
        measured=min(share for name, share in dense.items() if name.startswith("stages.2.")),
        at_least=0.9,
        note="least share of positions that depend on visible pixels, over the convolutions of that stage.",
    )


def _claims(run: Run, outcomes: dict[str, Outcome], sizes: tuple[int, ...]) -> None:
    spark = outcomes[SPARK]
    once = "each encoder is pre-trained once; seeds are those of labels, head and order."
    comparisons = (
        (0.02, "better by 0.02 or more than", "ResNet-50 on ImageNet: 80.6 fine-tuned, 79.8 supervised"),
        (0.0, "no worse than", "the gain is there with all labels of ImageNet too"),
    )
    for size, (bar, words, paper) in zip(sizes, comparisons, strict=False):
        run.claim(
            f"fine-tuned with {size} labels SparK is {words} training from scratch",
            paper=paper,
            measured=spark.accuracy[size],
            baseline=outcomes[SCRATCH].accuracy[size],
            at_least=bar,
            note=once,
        )
    for name, statement in (
        (ZERO_OUT, "sparse convolution is better than zeros in a dense network"),
        (LAST, "all scales are better than the last alone"),
    ):
        run.claim(
            statement,
            paper="ablation (table 6): both lose part of the gain",
            measured=spark.mean(),
            baseline=outcomes[name].mean(),
            at_least=0.003,
            note=f"mean accuracy over {', '.join(map(str, sizes))} labels; {once}",
        )
    run.note(
        "SimCLR learns invariances of whole images, which suits centred garments; it is shown as the strong "
        "baseline and SparK is not claimed to beat it."
    )
