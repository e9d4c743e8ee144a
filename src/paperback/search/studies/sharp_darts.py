"""The study of sharpDARTS: the block, the schedule, and a search by gradient against random architectures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from paperback.data import images
from paperback.search.sharp_darts import (
    DARTS_PRIMITIVES,
    CellSpace,
    Chain,
    DenseKit,
    DifferentiableResult,
    DifferentiableSearch,
    Genotype,
    HyperCuboid,
    SepConv,
    SharpSepConv,
    accuracy,
    cosine_power,
    retrain,
)
from paperback.search.sharp_darts.mixing import Weighting
from paperback.study import Run, measure
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, style
from paperback.study.statistics import MeanInterval, mean_interval
from paperback.training import generator, seeded

SEEDS = (0, 1, 2, 3, 4)
Rows = tuple[Tensor, Tensor]
Searches = dict[tuple[float, Weighting], list[DifferentiableResult]]  # by the rate of the alphas; one a seed
WORDS: dict[Weighting, str] = {"scalar": "scalar weights", "max_w": "Max-W"}
NAMES: dict[str, str] = {"scalar": "scalar weights", "max_w": "Max-W", "widest": "widest, by hand"}
COLOURS: dict[Weighting, str] = {"scalar": BASELINE, "max_w": METHOD}
ARCH_LR = 3e-3  # rate of the alphas at which Max-W and scalar weights are compared

BLOCKS = {
    "single separable": lambda i, o, s: SepConv(i, o, stride=s),
    "single dilated": lambda i, o, s: SepConv(i, o, stride=s, dilation=2),
    "single separable, wider": lambda i, o, s: SepConv(i, o, stride=s),
    "SharpSepConv": lambda i, o, s: SharpSepConv(i, o, stride=s),
    "SharpSepConv, dilated": lambda i, o, s: SharpSepConv(i, o, stride=s, dilation=2),
    "flood (4 times as wide inside)": lambda i, o, s: SharpSepConv(i, o, stride=s, mid_mult=4),
    "choke (8 channels inside)": lambda i, o, s: SharpSepConv(i, o, stride=s, mid=8),
}
WIDER = 25  # channels, not 16: with them the single block has as many parameters as SharpSepConv
SCHEDULES = {"constant": None, "cosine": 1.0, "cosine power 2": 2.0, "cosine power 10": 10.0}


def study(run: Run) -> None:
    """Do block and schedule help by themselves, and does the search find better networks than chance?"""
    clothes = images.fashion_mnist(run.size(smoke=128, quick=1600, standard=6400), seed=0, n_val=1000)
    train, test = _halved(*clothes.train), _halved(*clothes.test)
    if run.budget == "smoke":
        test = test[0][:200], test[1][:200]
    plain = _blocks(run, train, test)
    _schedules(run, plain, train, test)
    searches = _flatness(run)
    _cuboid(run, searches)
    _two_edges(run)
    _cells(run, train, test)


# -- the block and the schedule -----------------------------------------------------------------------------


def _halved(x: Tensor, y: Tensor) -> Rows:
    """Images of 28 x 28 pixels in 0..255 as ``(n, 1, 14, 14)`` in -1..1."""
    return nn.functional.avg_pool2d(x[:, None].float() / 127.5 - 1, 2), y


def _three_blocks(name: str, seed: int) -> nn.Sequential:
    """A small network of one kind of block."""
    block, width = BLOCKS[name], WIDER if "wider" in name else 16
    with seeded(seed, "three blocks"):
        network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            block(width, width, 1),
            block(width, 2 * width, 2),
            block(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )
    # Channels last, which torch's types do not know of, takes two thirds of the time on a CPU.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _trained_accuracy(run: Run, name: str, power: float | None, seed: int, train: Rows, test: Rows) -> float:
    epochs = run.size(smoke=1, quick=2, standard=3)  # of 100 steps
    model = _three_blocks(name, seed)
    retrain(model, *train, epochs=epochs, lr=0.1, lr_min=1e-4, power=power, seed=seed, progress=False)
    return accuracy(model, *test)


def _blocks(run: Run, train: Rows, test: Rows) -> list[float]:
    """Returns the accuracies of SharpSepConv with the cosine schedule."""
    found = {
        name: [_trained_accuracy(run, name, 1.0, seed, train, test) for seed in run.seeds]
        for name in run.track(BLOCKS, "blocks")
    }
    rows = [
        {
            "block": name,
            "parameters": measure.parameters(_three_blocks(name, 0)),
            "accuracy": float(np.mean(values)),
            "least": min(values),
            "greatest": max(values),
        }
        for name, values in found.items()
    ]
    run.table(
        "blocks",
        rows,
        "Test accuracy of a network of three blocks on Fashion-MNIST at 14 x 14 pixels.",
    )
    run.claim(
        "SharpSepConv is better than a single separable convolution of the same width",
        paper="CIFAR-10 error 2.05 % with the block in the cells of DARTS, 2.76-3.00 % without",
        measured=found["SharpSepConv"], baseline=found["single separable"], at_least=0.015, unit="accuracy",
        note="It has twice the parameters; the table has both at equal parameters.",
    )  # fmt: skip
    gap, low, high = _lead(found["SharpSepConv, dilated"], found["SharpSepConv"])
    single = _lead(found["single dilated"], found["single separable"])
    run.claim(
        "with SharpSepConv dilated and plain are balanced: they differ little in accuracy",
        paper="separable and dilated convolutions get equal depth",
        measured=abs(gap), at_most=0.015, unit="accuracy",
        interval=(0.0 if low < 0 < high else min(abs(low), abs(high)), max(abs(low), abs(high))),
        note="Absolute value of the mean difference; its interval follows from that of the difference, "
        f"{low:+.3f} to {high:+.3f}. Of the single blocks the dilated one leads by {_words(single)}.",
    )  # fmt: skip
    even = _words(_lead(found["SharpSepConv"], found["single separable, wider"]))
    run.note(
        f"At equal parameters (single block of {WIDER} channels, SharpSepConv of 16) the block's lead is "
        f"{even} in accuracy; at equal width it is "
        f"{_words(_lead(found['SharpSepConv'], found['single separable']))}."
    )
    return found["SharpSepConv"]


def _lead(a: Sequence[float], b: Sequence[float]) -> MeanInterval:
    return mean_interval([x - y for x, y in zip(a, b, strict=True)])


def _words(lead: MeanInterval) -> str:
    return f"{lead.mean:+.3f} ({lead.low:+.3f} to {lead.high:+.3f})"


def _schedules(run: Run, cosine: list[float], train: Rows, test: Rows) -> None:
    found = {
        name: cosine
        if name == "cosine"
        else [_trained_accuracy(run, "SharpSepConv", power, seed, train, test) for seed in run.seeds]
        for name, power in run.track(SCHEDULES.items(), "schedules", len(SCHEDULES))
    }
    rows = [
        {"schedule": name, "accuracy": float(np.mean(v)), "least": min(v), "greatest": max(v)}
        for name, v in found.items()
    ]
    run.table(
        "schedules", rows, "Test accuracy of the SharpSepConv network of the blocks, rate 0.1 to 0.0001."
    )
    run.claim(
        "cosine power annealing of order 2 is no worse than cosine annealing",
        paper="a better optimised schedule; no comparison of its own",
        measured=found["cosine power 2"], baseline=found["cosine"], at_least=-0.01, unit="accuracy",
        note="That it is better is not claimed: the seeds differ by more than the schedules.",
    )  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        epochs = np.arange(1, 121)
        for (label, power, warmup), colour in zip(
            [("cosine", 1, 0), ("power 2", 2, 0), ("power 10", 10, 0), ("power 2, warm-up", 2, 20)],
            (REFERENCE, METHOD, BASELINE, PALETTE[2]),
            strict=True,
        ):
            rates = cosine_power(epochs, 120, 0.025, 1e-4, power=power, warmup=warmup)
            axes.plot(epochs, rates, label=label, color=colour)
        axes.set(xlabel="epoch", ylabel="learning rate", title="Cosine power annealing")
        axes.legend()
    run.figure(
        "schedules", figure,
        "The learning rate over 120 epochs, 0.025 to 0.0001: the greater the power, the earlier it falls.",
        "Four falling curves; those of greater power lie lower. One rises for 20 epochs first.",
    )  # fmt: skip


# -- the search ---------------------------------------------------------------------------------------------


def _digits() -> tuple[Rows, Rows, Rows]:
    """Training, validation and test part of the digits, features in -1..1."""
    data = images.digits()

    def rows(x: Tensor, y: Tensor) -> Rows:
        return x.flatten(1).float() / 8 - 1, y

    return rows(*data.train), rows(*data.val), rows(*data.test)


def _halves(rows: Rows, seed: int) -> tuple[Rows, Rows]:
    """Two halves, for weights and for alphas."""
    order = torch.randperm(len(rows[0]), generator=generator(seed, "halves"))
    first, second = order.tensor_split(2)
    return (rows[0][first], rows[1][first]), (rows[0][second], rows[1][second])


def _perceptrons() -> HyperCuboid:
    return HyperCuboid((4, 8, 16, 32), 3, ("relu", "tanh", "linear"), DenseKit(64), strides=(1,))


def _search(
    run: Run,
    space: HyperCuboid | CellSpace,
    weighting: Weighting,
    seed: int,
    data: Rows,
    arch_lr: float = ARCH_LR,
) -> DifferentiableResult:
    cells = isinstance(space, CellSpace)
    steps = run.size(smoke=2, quick=20, standard=60) if cells else run.size(smoke=5, quick=100, standard=200)
    search = DifferentiableSearch(
        space, weighting, steps=steps, batch_size=48 if cells else 128, arch_lr=arch_lr, seed=seed
    )
    with warnings.catch_warnings():  # of a large rate of the alphas; the table of flatness shows what it does
        warnings.simplefilter("ignore", UserWarning)
        return search.run(*_halves(data, seed), progress=False)


def _chain_found(result: DifferentiableResult) -> Chain:
    assert isinstance(result.architecture, Chain)
    return result.architecture


def _flatness(run: Run) -> Searches:
    """How unequal the weights of the perceptrons' space become, at several rates of the alphas."""
    data, _, _ = _digits()
    space, searches, rows = _perceptrons(), Searches(), []
    largest: dict[tuple[float, Weighting], np.ndarray] = {}  # (seeds, layers)
    for rate in run.track(run.size(smoke=(ARCH_LR,), standard=(3e-4, ARCH_LR, 0.02)), "searches"):
        for weighting, word in WORDS.items():
            seeds = run.seeds if rate == ARCH_LR else run.seeds[:2]  # the other rates are for the table only
            results = [_search(run, space, weighting, seed, data, rate) for seed in seeds]
            searches[rate, weighting] = results
            largest[rate, weighting] = np.array([r.history["steps"][-1].max(-1) for r in results])
            layers = largest[rate, weighting].mean(0)
            row = {"rate of the alphas": rate, "weighting": word}
            rows.append(row | {f"layer {k + 1}": value for k, value in enumerate(layers)})
    run.table(
        "flatness", rows,
        f"The largest of the {space.options} weights of each layer after the search, mean over seeds; "
        f"uniform weights are {1 / space.options:.4f}.",
    )  # fmt: skip
    ratios = {rate: largest[rate, "max_w"].mean(1) / largest[rate, "scalar"].mean(1) for rate, _ in searches}
    others = [f"{ratio.mean():.2f} at {rate}" for rate, ratio in ratios.items() if rate != ARCH_LR]
    run.claim(
        "Max-W leaves the weights flatter than scalar weights do, at a rate of 0.003",
        paper="largest of 32 weights 0.045 with Max-W, 0.67 with scalar weights (recorded searches)",
        measured=ratios[ARCH_LR].tolist(), at_most=0.9, unit="times",
        note="Mean over layers of the largest weight, Max-W by scalar. At other rates: "
        f"{', '.join(others) or 'not run'}.",
    )  # fmt: skip
    _draw_alphas(run, {word: searches[ARCH_LR, word][0].history["steps"] for word in WORDS}, space)
    return searches


def _draw_alphas(run: Run, histories: dict[Weighting, np.ndarray], space: HyperCuboid) -> None:
    with style():
        figure = Figure(figsize=(WIDE[0] * 1.2, WIDE[1]))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (weighting, history) in zip(panels, histories.items(), strict=True):
            last = history[:, -1]
            axes.plot(last, color=REFERENCE, alpha=0.35, linewidth=0.8)
            axes.plot(last[:, last[-1].argmax()], color=COLOURS[weighting])
            axes.axhline(1 / space.options, color=REFERENCE, linestyle="--", linewidth=0.8)
            axes.set(xlabel="step", title=WORDS[weighting][0].upper() + WORDS[weighting][1:])
        panels[0].set_ylabel("weight (softmax of alpha)")
    run.figure(
        "alphas", figure,
        f"The {space.options} weights of the last layer during the search (one seed, rate {ARCH_LR}); the "
        "strongest at the end in colour, uniform dashed.",
        "Two panels of many thin curves that spread from one value; with Max-W they spread less.",
    )  # fmt: skip


def _from_scratch(run: Run, model: nn.Module, seed: int, train: Rows, test: Rows) -> float:
    """Test accuracy after a short training from scratch."""
    retrain(model, *train, epochs=run.size(smoke=1, standard=8), lr=0.05, seed=seed, progress=False)
    return accuracy(model, *test)


def _chain_accuracy(
    run: Run, space: HyperCuboid, chain: Chain, seed: int, train: Rows, test: Rows
) -> tuple[float, int]:
    with seeded(seed, "chain", *map(str, chain.widths), *chain.operations):
        model = space.build(chain)
    return _from_scratch(run, model, seed, train, test), measure.parameters(model)


def _cuboid(run: Run, searches: Searches) -> None:
    """What the searches found, trained from scratch beside random chains and the widest one."""
    data, _, test = _digits()
    space, count = _perceptrons(), run.size(smoke=3, quick=20, standard=40)
    random: list[tuple[float, int]] = []
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in NAMES}
    for k, seed in enumerate(run.track(run.seeds, "seeds")):
        draw = generator(seed, "random chains")
        for chain in run.track([space.random(draw) for _ in range(count)], "random chains"):
            random.append(_chain_accuracy(run, space, chain, seed, data, test))
        chains = {weighting: _chain_found(searches[ARCH_LR, weighting][k]) for weighting in WORDS}
        for name, chain in (chains | {"widest": Chain((32,) * 4, ("relu",) * 3)}).items():
            found[name].append(_chain_accuracy(run, space, chain, seed, data, test))
    _report_cuboid(run, np.array(random), {name: np.array(pairs) for name, pairs in found.items()})


def _percentile(random: np.ndarray, value: float) -> float:
    """The share of random networks that are worse; those that are equal count half."""
    return float(((random < value).mean() + (random <= value).mean()) / 2)


def _report_cuboid(run: Run, random: np.ndarray, found: dict[str, np.ndarray]) -> None:
    """Accuracies and numbers of parameters, ``(networks, 2)`` each."""
    places = {name: [_percentile(random[:, 0], v) for v in pairs[:, 0]] for name, pairs in found.items()}
    quarters = np.quantile(random[:, 0], [0.25, 0.5, 0.75])
    rows = [
        {
            "architecture": NAMES.get(name, name),
            "median accuracy": np.median(pairs[:, 0]),
            "least": pairs[:, 0].min(),
            "greatest": pairs[:, 0].max(),
            "median percentile": float(np.median(places[name])) if name in places else 0.5,
            "mean parameters": pairs[:, 1].mean(),
        }
        for name, pairs in ({"random": random} | found).items()
    ]
    run.table(
        "perceptrons", rows,
        f"Perceptrons trained from scratch on digits: test accuracy, and its percentile among {len(random)} "
        f"random ones (quartiles {quarters[0]:.3f}, {quarters[1]:.3f}, {quarters[2]:.3f}).",
    )  # fmt: skip
    scalar, max_w = places["scalar"], places["max_w"]
    run.claim(
        "the search with scalar weights finds a network that is better than most random ones",
        paper="not compared with random networks of the same space",
        measured=float(np.median(scalar)), at_least=0.55, interval=(min(scalar), max(scalar)),
        unit="percentile",
        note="Median over seeds of the percentile among random networks. The interval is the range of the "
        "seeds, which covers the median with 94 % if there are five.",
    )  # fmt: skip
    better = sum(a > b for a, b in zip(max_w, scalar, strict=True))
    beaten = int((found["widest"][:, 0] > found["max_w"][:, 0]).sum())
    run.note(
        "The paper says that Max-W picks better networks than scalar weights and than people do. That is "
        f"reported here and not claimed: the median percentile is {np.median(max_w):.2f} with Max-W, "
        f"{np.median(scalar):.2f} with scalar weights, 0.50 for a network drawn at random, and "
        f"{np.median(places['widest']):.2f} for the widest one made by hand. Max-W is better than scalar "
        f"weights with {better} of {len(max_w)} seeds; the network made by hand is better than Max-W's with "
        f"{beaten}."
    )
    _draw_histogram(run, random[:, 0], {name: pairs[:, 0] for name, pairs in found.items()})


def _draw_histogram(run: Run, random: np.ndarray, found: dict[str, np.ndarray]) -> None:
    with style():
        figure = Figure(figsize=WIDE)
        axes = figure.subplots()
        low = float(min(random.min(), *(values.min() for values in found.values())))
        heights, _, _ = axes.hist(
            random,
            bins=np.linspace(low, 1, 30).tolist(),
            color="#C9CED6",
            label=f"{len(random)} random chains",
        )
        top = max(np.asarray(heights).max(), 1.0)
        colours = {"scalar": BASELINE, "max_w": METHOD, "widest": PALETTE[2]}
        for row, (name, values) in enumerate(found.items()):
            places = np.full(len(values), top * (1.08 + 0.09 * row))
            axes.plot(values, places, "o", color=colours[name], label=NAMES[name], alpha=0.8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="test accuracy, trained from scratch", ylabel="random chains",
                 title="What the search found, among random networks")  # fmt: skip
        axes.legend(loc="upper left")
    run.figure(
        "random_and_found", figure,
        "Test accuracies of random perceptrons of the space (bars), and above them those that the searches "
        "found, one point for each seed, and the widest one made by hand.",
        "A histogram with most of its mass to the right; points of the searches are spread over its range.",
    )  # fmt: skip


def _two_edges(run: Run) -> None:
    """A space so small that every network of it is trained."""
    data, _, test = _digits()
    names = run.size(smoke=("relu", "linear"), standard=("relu", "tanh", "gelu", "linear"))
    space = HyperCuboid((16,), 2, names, DenseKit(64), strides=(1,))
    every = [Chain((16, 16, 16), (a, b)) for a in names for b in names]
    rows = []
    for seed in run.track(run.seeds, "two edges"):
        scores = {chain: _chain_accuracy(run, space, chain, seed, data, test)[0] for chain in every}
        found = {
            word: scores[_chain_found(_search(run, space, weighting, seed, data))]
            for weighting, word in WORDS.items()
        }
        values = list(scores.values())
        rows.append({"seed": seed, "mean of all": np.mean(values), **found, "best of all": max(values)})
    run.table("two_edges", rows, f"All {len(every)} networks of two layers of 16 units; test accuracy.")
    means = {name: np.mean([row[name] for row in rows]) for name in rows[0] if name != "seed"}
    run.note(
        f"In the space of {len(every)} networks, mean test accuracies over seeds: "
        + ", ".join(f"{name} {value:.3f}" for name, value in means.items())
        + "."
    )


def _cells(run: Run, train: Rows, test: Rows) -> None:
    """The search of cells, and its genotypes trained from scratch beside random ones."""
    space = CellSpace(DARTS_PRIMITIVES, cells=3, nodes=2, width=4, channels=1)
    train = train[0][:3200], train[1][:3200]
    rows = []
    for seed in run.track(run.seeds[: run.size(smoke=1, standard=3)], "cells"):
        draw = generator(seed, "random genotypes")
        genotypes = [("random", space.random(draw)) for _ in range(run.size(smoke=1, standard=2))]
        for weighting, word in WORDS.items():
            genotype = _search(run, space, weighting, seed, train).architecture
            assert isinstance(genotype, Genotype)
            genotypes.append((word, genotype))
        for origin, genotype in genotypes:
            with seeded(seed, "cells"):
                network = space.build(genotype, width=8)
            epochs = run.size(smoke=1, standard=2)
            retrain(network, *train, epochs=epochs, lr=0.1, seed=seed, progress=False)
            rows.append(
                {
                    "seed": seed,
                    "found by": origin,
                    "test accuracy": accuracy(network, *test),
                    "parameters": measure.parameters(network),
                    "normal cell": ", ".join(f"{name} of {source}" for name, source in genotype.normal),
                }
            )
    run.model("network", network)  # the last that Max-W found
    run.table("cells", rows, "Cells for Fashion-MNIST at 14 x 14 pixels, trained from scratch.")
    means = [
        f"{origin} {np.mean([row['test accuracy'] for row in own]):.3f} with "
        f"{np.mean([row['parameters'] for row in own]):,.0f} parameters"
        for origin in ("random", *WORDS.values())
        if (own := [row for row in rows if row["found by"] == origin])
    ]
    run.note(f"Cells trained from scratch, mean test accuracies: {', '.join(means)}.")
