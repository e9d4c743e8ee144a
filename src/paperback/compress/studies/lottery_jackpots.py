"""The study of lottery jackpots: a tenth of a trained network's weights, chosen without changing one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from paperback.compress.data import Data, evaluate
from paperback.compress.interface import Compressed
from paperback.compress.lottery_jackpots import LotteryJackpots
from paperback.compress.masks import masks_to_bytes
from paperback.data import images
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, direct_labels, style
from paperback.study.statistics import mean_interval
from paperback.training import seeded, train

SEEDS = (0, 1, 2)
KEEP = 0.1
SEARCH_RATES = (0.1, 1.0, 3.0, 10.0)
TUNING_RATES = (1e-3, 3e-3, 1e-2)
BATCH = 128


@dataclass
class Outcome:
    """What one seed gave."""

    accuracy: dict[str, float] = field(default_factory=dict)  # of each contender on the test part
    overlap: dict[str, float] = field(default_factory=dict)  # with the magnitude mask
    chance: float = 0.0  # overlap of two unrelated masks with the same counts
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # epochs -> accuracy
    layers: list[tuple[str, int, int]] = field(default_factory=list)  # name, weights, kept
    exchanges: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)  # of the masks


def study(run: Run) -> None:
    """Does a search of the mask alone nearly recover a trained network from a tenth of its weights, are
    trained weights needed for it, and does the magnitude mask make it cheaper?

    A convolutional network learns Fashion-MNIST. A tenth of its weights, those of the classifier among
    them, is kept: by magnitude in one shot, by searches from the magnitude mask and from a random one, in
    trained and in random weights. Beside them stands the magnitude mask whose weights are trained on for
    as long, which the paper's method need not beat. Learning rates of the searches and of the training
    are each the best of a few on the validation part, with the first seed. The claim is false if the
    search does not leave the one-shot accuracy, or if random weights do as well.
    """
    rates: dict[str, float] = {}
    outcomes = [_one_seed(run, seed, rates) for seed in run.track(run.seeds, "seeds")]
    _report(run, outcomes, rates)
    _claims(run, outcomes)
    _draw(run, outcomes)


# -- one seed ------------------------------------------------------------------------------------------------


def _one_seed(run: Run, seed: int, rates: dict[str, float]) -> Outcome:
    data, model = _trained(run, seed)
    epochs = run.size(smoke=1, standard=6)
    short = max(1, epochs // 3)
    common: dict[str, Any] = {
        "sparsity": 1 - KEEP,
        "keep_classifier": False,
        "batch_size": BATCH,
        "seed": seed,
    }
    contenders: dict[str, dict[str, Any]] = {
        "search": {"epochs": epochs},
        "search, a third as long": {"epochs": short},
        "search from a random mask": {"epochs": epochs, "init": "random"},
        # Random weights share the budget out by shape: by magnitude the scales of the initialisation would
        # decide, and the search reaches 0.46 in place of 0.76 on the first seed.
        "search in random weights": {
            "epochs": epochs, "init": "random", "weights": "random", "restriction": None, "alloc": "erk",
        },
        "magnitude, weights trained on": {"epochs": 0, "finetune_epochs": epochs},
    }  # fmt: skip
    outcome = Outcome({"dense": evaluate(model, data.batches("test"))["accuracy"]})
    found: dict[str, Compressed] = {}
    for name, settings in contenders.items():
        found[name] = _at_best_rate(run, model, data, name, common | settings, rates)
    rate = {"lr": rates["search"]}
    found["magnitude, one shot"] = _compress(model, data, common | {"epochs": 0})
    found["search, no restriction"] = _compress(
        model, data, common | rate | {"epochs": epochs, "restriction": None}
    )
    found["search, cosine"] = _compress(
        model, data, common | rate | {"epochs": epochs, "restriction": "cosine"}
    )
    found["search, classifier kept"] = _compress(
        model, data, common | rate | {"epochs": epochs, "keep_classifier": True}
    )
    for name, result in found.items():
        outcome.accuracy[name] = _accuracy(result)
        outcome.overlap[name] = result.extras["overlap"]
        outcome.exchanges[name] = result.extras["history"]["exchanges"]
    recalibrated = _recalibrated(found["magnitude, one shot"].model, data)
    outcome.accuracy["magnitude, statistics renewed"] = evaluate(recalibrated, data.batches("test"))[
        "accuracy"
    ]
    _sizes(outcome, found["search"])
    if seed == run.seed:
        _curves(run, model, data, common, rates, outcome, epochs, short)
    return outcome


def _trained(run: Run, seed: int) -> tuple[Data, nn.Module]:
    """Fashion-MNIST or the user's images, and a network that has learned them."""
    if run.data is not None:
        dataset = images.read(run.data, seed=seed, channels="grey")
    else:
        dataset = images.fashion_mnist(run.size(smoke=300, standard=9000), seed)
    parts = {}
    for name, most in (("train", 9000), ("val", 1000), ("test", run.size(smoke=200, standard=2000))):
        part = getattr(dataset, name)
        parts[name] = (part.x[:most].float().unsqueeze(1) / 255, torch.as_tensor(part.y[:most]))
    classes = int(max(labels.max() for _, labels in parts.values())) + 1
    data = Data(**parts, batch_size=500)
    with seeded(seed, "network"):
        model = network(classes, parts["train"][0].shape[-2:])
    train(
        model, lambda m, batch, _: F.cross_entropy(m(batch[0]), batch[1]), parts["train"],
        epochs=run.size(smoke=2, standard=8), batch_size=BATCH, lr=5e-3, schedule="one-cycle", seed=seed,
        progress=run.progress, description="training the network",
    )  # fmt: skip
    return data, model


def network(classes: int, shape: tuple[int, int]) -> nn.Sequential:
    """Three convolutions of 16, 32 and 64 channels with stride 2 and batch norms, and a linear classifier."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    features = 64 * -(-shape[0] // 8) * -(-shape[1] // 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes))


def _compress(model: nn.Module, data: Data, settings: dict[str, Any]) -> Compressed:
    return LotteryJackpots(**settings).compress(model, data, latency_runs=0, progress=False)


def _accuracy(result: Compressed) -> float:
    return result.report.quality_after["accuracy"]


def _at_best_rate(
    run: Run, model: nn.Module, data: Data, name: str, settings: dict[str, Any], rates: dict[str, float]
) -> Compressed:
    """At the rate that was best on the validation part with the first seed."""
    tuned = "finetune_lr" if settings.get("finetune_epochs") else "lr"
    if name in rates:
        return _compress(model, data, settings | {tuned: rates[name]})
    candidates: tuple[float, ...] = TUNING_RATES if tuned == "finetune_lr" else SEARCH_RATES
    candidates = run.size(smoke=candidates[:1], quick=candidates[1:2], standard=candidates)
    tried = {rate: _compress(model, data, settings | {tuned: rate}) for rate in candidates}
    scores = {rate: evaluate(result.model, data.batches("val"))["accuracy"] for rate, result in tried.items()}
    run.log(f"{name}: accuracy on the validation part by rate: {scores}")
    rates[name] = max(scores, key=scores.__getitem__)
    return tried[rates[name]]


def _recalibrated(model: nn.Module, data: Data) -> nn.Module:
    """The same network with the batch norms' statistics of one pass over the training part."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over batches
    model.train()
    with torch.no_grad():
        for x, _ in data.batches("train"):
            model(x)
    return model.eval()


def _sizes(outcome: Outcome, result: Compressed) -> None:
    """Layers, the overlap that chance gives, and what the masks weigh."""
    masks: dict[str, Tensor] = result.extras["masks"]
    outcome.layers = [(name, mask.numel(), int(mask.sum())) for name, mask in masks.items()]
    kept = sum(k for *_, k in outcome.layers)
    outcome.chance = sum(k * k / n for _, n, k in outcome.layers) / kept
    outcome.bytes = {
        "weights, float32": 4 * sum(n for _, n, _ in outcome.layers),
        "mask, one bit a weight": len(masks_to_bytes(masks, "bitmap")),
        "mask, entropy coded": len(masks_to_bytes(masks, "entropy")),
        "statistics of batch norms": sum(
            t.numel() * t.element_size() for t in result.extras["buffers"].values()
        ),
    }


def _curves(
    run: Run, model: nn.Module, data: Data, common: dict[str, Any], rates: dict[str, float], outcome: Outcome,
    epochs: int, short: int,
) -> None:  # fmt: skip
    """Accuracy after searches of several lengths, each with its own cosine."""
    starts: dict[str, dict[str, Any]] = {"search": {}, "search from a random mask": {"init": "random"}}
    for name, settings in starts.items():
        curve = {epochs: outcome.accuracy[name]}
        for length in run.size(smoke=(), quick=(1,), standard=(1, 2, 4)):
            if name == "search" and length == short:
                curve[length] = outcome.accuracy["search, a third as long"]
            elif length < epochs:
                rate = rates["search, a third as long" if name == "search" and length <= short else name]
                given = common | settings | {"epochs": length, "lr": rate}
                curve[length] = _accuracy(_compress(model, data, given))
        outcome.curves[name] = dict(sorted(curve.items()))
    outcome.curves["search"] = {0: outcome.accuracy["magnitude, one shot"]} | outcome.curves["search"]


# -- what is told --------------------------------------------------------------------------------------------


def _report(run: Run, outcomes: list[Outcome], rates: dict[str, float]) -> None:
    rows = []
    for name in outcomes[0].accuracy:
        values = [outcome.accuracy[name] for outcome in outcomes]
        overlaps = [o.overlap[name] for o in outcomes if name in o.overlap]
        rows.append(
            {
                "network": name,
                "accuracy": mean_interval(values).mean,
                "lowest": min(values),
                "highest": max(values),
                "overlap with the magnitude mask": mean_interval(overlaps).mean if overlaps else None,
                "rate": rates.get(name),
            }
        )
    run.table(
        "accuracy", rows,
        f"Accuracy on the test part, {len(outcomes)} seeds. All but the dense network keep {KEEP:.0%} of the "
        "weights. 'Statistics renewed' is the one-shot mask with the batch norms' running statistics "
        "estimated again: much of what one-shot pruning loses is lost there.",
    )  # fmt: skip
    run.table(
        "bytes", [{"what": name, "bytes": size} for name, size in outcomes[0].bytes.items()],
        "What one more task costs beside one set of weights; batch norms' statistics belong to a mask.",
    )  # fmt: skip
    run.note(
        "The released code never restricts the exchanges (its ceiling makes the share 1); 'no restriction' "
        "is what it does, 'search' is what the paper writes."
    )


def _claims(run: Run, outcomes: list[Outcome]) -> None:
    def values(name: str) -> list[float]:
        return [outcome.accuracy[name] for outcome in outcomes]

    tuned, renewed = (
        mean_interval(values(name)).mean
        for name in ("magnitude, weights trained on", "magnitude, statistics renewed")
    )
    run.claim(
        "a mask over a tenth of frozen trained weights comes near the dense network",
        paper="ResNet-32, CIFAR-10: 93.70 % at 90 % sparsity",
        measured=values("search"),
        baseline=values("dense"),
        at_least=-0.035,
        note=f"The magnitude mask whose weights are trained on for as long reaches {tuned:.3f}.",
    )
    run.claim(
        "the search leaves the one-shot magnitude mask far behind",
        paper="the search recovers what one-shot pruning loses",
        measured=values("search"),
        baseline=values("magnitude, one shot"),
        at_least=0.30,
        note=f"With the batch norms' statistics estimated again the one-shot mask reaches {renewed:.3f}.",
    )
    run.claim(
        "trained weights matter: the same search in random weights does worse",
        paper="jackpots lie in pre-trained models",
        measured=values("search"),
        baseline=values("search in random weights"),
        at_least=0.05,
        note="In random weights the layers' shares are those of Erdos-Renyi-Kernel, far better there than "
        "those of global magnitude.",
    )
    run.claim(
        "from the magnitude mask a third of the epochs does what a random mask needs all for",
        paper="magnitude initialisation makes the search at least 3 times cheaper",
        measured=values("search, a third as long"),
        baseline=values("search from a random mask"),
        at_least=-0.015,
    )
    run.claim(
        "a search from a random mask ends nearer to the magnitude mask than chance, in multiples of chance",
        paper="searched masks overlap most with the magnitude mask",
        measured=[o.overlap["search from a random mask"] / o.chance for o in outcomes],
        at_least=2.0,
        note=f"Chance is {outcomes[0].chance:.2f}, from the counts of each layer.",
    )


def _draw(run: Run, outcomes: list[Outcome]) -> None:
    first = outcomes[0]
    with style():
        figure = Figure(figsize=(WIDE[0] + 1.6, WIDE[1]))
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        names = {"search": "from the magnitude mask", "search from a random mask": "from a random mask"}
        for (name, label), colour in zip(names.items(), (METHOD, PALETTE[2]), strict=True):
            curve = first.curves[name]
            left.plot(list(curve), list(curve.values()), marker="o", color=colour, label=label)
        for name, label, colour in (
            ("dense", "dense", REFERENCE),
            ("magnitude, weights trained on", "weights trained on", BASELINE),
            ("search in random weights", "in random weights", PALETTE[3]),
        ):
            left.plot(
                (0, max(first.curves["search"])),
                [first.accuracy[name]] * 2,
                linestyle="--",
                linewidth=1.2,
                color=colour,
                label=label,
            )
        left.set(xlabel="epochs of the search", title=f"Accuracy at {KEEP:.0%} of the weights")
        direct_labels(left)
        bars = ["search from a random mask", "search", "search, no restriction"]
        right.barh(
            range(4), [first.chance, *(mean_interval([o.overlap[b] for o in outcomes]).mean for b in bars)],
            color=[REFERENCE, PALETTE[2], METHOD, METHOD],
        )  # fmt: skip
        right.set_yticks(range(4), ["chance", "random start", "magnitude start", "no restriction"])
        right.set(title="Shared with magnitude", xlim=(0, 1))
        right.grid(False)
    run.figure(
        "search", figure,
        caption="Left: accuracy after searches of several lengths (first seed); dashed lines are the dense "
        "network, the magnitude mask whose weights are trained on for the longest search's time, and the "
        "search in random weights. Right: the share of kept weights that the magnitude mask keeps too.",
        alt="Accuracy rises from chance at no epoch to near the dense line after a few; random weights stay "
        "below. Bars show overlaps above chance.",
    )  # fmt: skip
    with style():
        figure = Figure(figsize=WIDE)
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        kept = [k / n for _, n, k in first.layers]
        left.bar(range(len(kept)), kept, color=METHOD)
        left.set_xticks(range(len(kept)), [f"{i + 1}\n{n:,}" for i, (_, n, _) in enumerate(first.layers)])
        left.set(title="Share of weights kept", xlabel="layer, and its weights")
        for name, colour in (("search, no restriction", BASELINE), ("search", METHOD)):
            smooth = torch.tensor(first.exchanges[name]).float()
            right.plot(
                smooth.numpy(), color=colour, linewidth=0.9,
                label={"search": "restricted"}.get(name, "not restricted"),
            )  # fmt: skip
        right.set(xlabel="step", title="Exchanges of a step")
        direct_labels(right)
    run.figure(
        "layers", figure,
        caption="Left: what the global threshold leaves of each layer, with its number of weights. Right: "
        "how many weights change places at each step of the search (first seed).",
        alt="Thin layers keep most of their weights, wide ones few. Exchanges fall to none during the "
        "search, sooner where they are restricted.",
    )  # fmt: skip
