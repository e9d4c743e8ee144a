"""The study of CompactifAI: do chains of cores beat a truncated SVD of as many parameters?"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from paperback.compress.compactifai import CompactifAI
from paperback.compress.data import Data, default_loss, evaluate, text_rows
from paperback.compress.factors import FactorCompressor, FactorLayer, packed_bytes
from paperback.compress.storage import save_model, stored_layers
from paperback.compress.svd import SVD
from paperback.data import text
from paperback.errors import DataError, MissingExtraError
from paperback.networks import pretrained, pretrained_tokenizer
from paperback.networks.surgery import find_layers, swap, weight_matrix
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, REFERENCE, WIDE, style
from paperback.study.measure import size_on_disk
from paperback.study.statistics import mean_interval
from paperback.training import generator

SEEDS = (0, 1)
TEXTS = {"kjv": "King James Bible", "glosses": "WordNet definitions"}
LENGTH, TEST_LENGTH, BATCH = 128, 256, 8
RATIO = 0.4  # of the parameters of the layers, in the table
RATIOS = (0.25, RATIO)  # in the curves
PROBES = 32  # training rows that sensitivities are measured on
CHARACTERS = 12  # of text read for each token that is used
SVD_NAME, SVD_X, TWO, THREE, TWO_X = (
    "SVD", "SVD, activation metric", "MPO, 2 cores", "MPO, 3 cores", "MPO, 2 cores, activation metric",
)  # fmt: skip
COLOURS = {SVD_NAME: BASELINE, TWO: METHOD, THREE: PALETTE[2]}
# LLaMA-2 7B: 32 blocks of these matrices, and twice an embedding of 32,000 tokens.
LLAMA_BLOCKS, LLAMA_WIDTH, LLAMA_FEED_FORWARD, LLAMA_TOKENS = 32, 4096, 11008, 32000


@dataclass
class Outcome:
    """What one seed gave: by model, perplexities by text before and after healing, and bytes."""

    dense: dict[str, float]
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    healed: dict[str, dict[str, float]] = field(default_factory=dict)
    packed: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # model, "int8" or "int4"
    size: dict[str, int] = field(default_factory=dict)
    planted: dict[str, float] = field(default_factory=dict)


def study(run: Run) -> None:
    """Does a matrix product operator keep more of a language model than a truncated SVD of as many
    parameters, and does a short healing bring back what either lost?

    The paper never sets its chains beside plain low rank. Here both, with one solver for sizes, one healing
    and one storage, replace all matrices of the small language model that ships at 40 % of their parameters;
    a matrix that is a sum of Kronecker products by construction is the positive control, where the chain must
    win. The claim that the chain is the better form is false if the healed perplexity is not below that of
    the SVD.
    """
    model, tokenizer = pretrained("lm-tiny"), pretrained_tokenizer("lm-tiny")
    parts = _texts(run, tokenizer)
    _errors(run, model)
    outcomes = [_one_seed(run, model, parts, seed) for seed in run.track(run.seeds, "seeds")]
    curves = _curves(run, model, parts, outcomes[0])
    _report(run, outcomes)
    tolerance = _sensitivity(run, model, parts)
    _smollm(run, tokenizer)
    _claims(run, outcomes, tolerance)
    _draw_curves(run, curves, outcomes)


def _texts(run: Run, tokenizer: Any) -> dict[str, dict[str, Tensor]]:
    """Rows of tokens by part and text."""
    if run.data is not None:
        raise DataError("this study runs on the texts that ship; leave out --data.")
    train = max(_steps(run) * BATCH, PROBES) // 2
    held_out = run.size(smoke=2, quick=20, standard=30)
    glosses = text.wordnet_glosses()
    rows: dict[str, dict[str, Tensor]] = {}
    for part, length, count in (("train", LENGTH, train), ("test", TEST_LENGTH, held_out)):
        entries = getattr(glosses, part).x
        documents = zip(entries["words"], entries["text"], strict=True)
        whole = {
            "kjv": getattr(text.kjv(), part).x,
            "glosses": "".join(f"<|endoftext|>{words}: {gloss}\n" for words, gloss in documents),
        }
        enough = CHARACTERS * count * length
        rows[part] = {name: text_rows(tokenizer, whole[name][:enough], length, count) for name in TEXTS}
    return rows


def _steps(run: Run) -> int:
    return run.size(smoke=2, quick=30, standard=100, full=150)


def _mixed(parts: dict[str, dict[str, Tensor]], seed: int) -> Tensor:
    both = torch.cat(list(parts["train"].values()))
    return both[torch.randperm(len(both), generator=generator(seed, "mixed"))]


# -- errors of single matrices -------------------------------------------------------------------------------


def _errors(run: Run, model: nn.Module) -> None:
    """Relative Frobenius errors at equal parameters: the matrices of lm-tiny, and a random one."""
    kinds: dict[str, list[nn.Module]] = {}
    for name, layer in find_layers(model).layers.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(layer)
    noise = nn.Linear(128, 128, bias=False)
    with torch.no_grad():
        noise.weight.copy_(torch.randn(128, 128, generator=generator(0, "noise")))
    kinds["a random matrix, 128 x 128"] = [noise]
    blocks = run.size(smoke=1, standard=None)
    rows: list[dict[str, Any]] = [
        {"matrix": kind} | _relative_errors(layers[:blocks]) for kind, layers in kinds.items()
    ]
    run.table(
        "errors", rows,
        "Relative Frobenius error of lm-tiny's matrices (mean over its 6 blocks) at equal shares of "
        "parameters. The chains do about as well on trained matrices as on a random one: trained weights "
        "have low-rank structure and hardly any Kronecker structure.",
    )  # fmt: skip
    pairs = list(product(rows[:-1], (TWO, THREE), (0.5, 0.3)))
    wins = sum(row[f"{name} at {ratio:g}"] < row[f"SVD at {ratio:g}"] for row, name, ratio in pairs)
    run.note(
        f"At equal parameters a chain has a smaller Frobenius error than the truncated SVD in {wins} of "
        f"{len(pairs)} comparisons on the matrices of lm-tiny (means by type)."
    )


def _relative_errors(layers: Sequence[nn.Module]) -> dict[str, float]:
    methods: dict[str, FactorCompressor] = {SVD_NAME: SVD(), TWO: CompactifAI(2), THREE: CompactifAI(3)}
    return {
        f"{name} at {ratio:g}": sum(_error(method, layer, ratio) for layer in layers) / len(layers)
        for ratio in (0.5, 0.3)
        for name, method in methods.items()
    }


@torch.no_grad()
def _error(method: FactorCompressor, layer: nn.Module, ratio: float) -> float:
    weight = weight_matrix(layer)
    size = method.size_for((weight.shape[0], weight.shape[1]), int(ratio * weight.numel()))
    return float((method.factorize("weight", layer, size).dense() - weight).norm() / weight.norm())


@torch.no_grad()
def _planted(seed: int, terms: int = 8, side: int = 16) -> dict[str, float]:
    """Errors on a sum of Kronecker products with 1 % noise, of a chain with as many bonds and of the SVD."""
    draws = generator(seed, "planted")
    pairs = torch.randn(terms, 2, side, side, generator=draws)
    weight = sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in pairs)
    assert isinstance(weight, Tensor)
    noise = torch.randn(weight.shape, generator=draws)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.copy_(weight + 0.01 * noise * weight.norm() / noise.norm())
    chain = CompactifAI(2).factorize("planted", layer, terms)
    shape = (weight.shape[0], weight.shape[1])
    low_rank = SVD().factorize("planted", layer, max(1, SVD().size_for(shape, chain.numbers)))
    return {
        name: float((factors.dense() - layer.weight).norm() / layer.weight.norm())
        for name, factors in ((TWO, chain), (SVD_NAME, low_rank))
    }


# -- whole models --------------------------------------------------------------------------------------------


def _method(name: str, ratio: float, seed: int) -> FactorCompressor:
    """Without healing, which comes afterwards."""
    metric: Any = "activation" if name in (SVD_X, TWO_X) else "frobenius"
    if name in (SVD_NAME, SVD_X):
        return SVD(ratio=ratio, metric=metric, seed=seed)
    return CompactifAI(3 if name == THREE else 2, ratio=ratio, metric=metric, heal_steps=0, seed=seed)


def _pair(run: Run, model: nn.Module, name: str, ratio: float, rows: Tensor, seed: int) -> tuple[Any, Any]:
    """A factorised model, and the same with its factors healed."""
    method = _method(name, ratio, seed)
    healing = copy.copy(method)
    healing.heal_steps, healing.heal_batch_size = _steps(run), BATCH
    before, healed = (
        each.compress(model, Data(train=rows, batch_size=BATCH), latency_runs=0, progress=run.progress)
        for each in (method, healing)
    )
    return before, healed


def _perplexities(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    return {name: evaluate(model, part.split(20))["perplexity"] for name, part in rows.items()}


def _one_seed(run: Run, model: nn.Module, parts: dict[str, dict[str, Tensor]], seed: int) -> Outcome:
    rows, test = _mixed(parts, seed), parts["test"]
    outcome = Outcome(_perplexities(model, test), planted=_planted(seed))
    names = run.size(
        smoke=(SVD_NAME, TWO),
        quick=(SVD_NAME, TWO),
        standard=(SVD_NAME, SVD_X, TWO, THREE),
        full=(SVD_NAME, SVD_X, TWO, TWO_X, THREE),
    )
    for name in names:
        before, healed = _pair(run, model, name, RATIO, rows, seed)
        outcome.before[name] = _perplexities(before.model, test)
        outcome.healed[name] = _perplexities(healed.model, test)
        outcome.size[name] = healed.report.after.bytes_on_disk
        outcome.size["dense"] = healed.report.before.bytes_on_disk
        for bits in (8, 4):
            packed = copy.deepcopy(healed.model)
            for layer in stored_layers(packed).values():
                assert isinstance(layer, FactorLayer)
                layer.quantize(bits)
            outcome.packed[name, f"int{bits}"] = _perplexities(packed, test)
            outcome.size[f"{name}, int{bits}"] = _written(packed)
    return outcome


def _written(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model", loadable=False)
        return size_on_disk(Path(folder) / "model")


def _curves(
    run: Run, model: nn.Module, parts: dict[str, dict[str, Tensor]], first: Outcome
) -> dict[str, list[tuple[int, float, float]]]:
    """By method: bytes, and perplexity before and after healing (mean of the texts), with the first seed."""
    rows, test = _mixed(parts, run.seed), parts["test"]
    ratios = run.size(smoke=(RATIO,), quick=(RATIO,), standard=RATIOS)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for name, ratio in run.track([(n, r) for n in COLOURS if n in first.healed for r in ratios], "curves"):
        if ratio == RATIO:
            point = first.size[name], _mean(first.before[name]), _mean(first.healed[name])
        else:
            before, healed = _pair(run, model, name, ratio, rows, run.seed)
            qualities = [_mean(_perplexities(result.model, test)) for result in (before, healed)]
            point = healed.report.after.bytes_on_disk, qualities[0], qualities[1]
        curves.setdefault(name, []).append(point)
    return curves


def _mean(by_text: dict[str, float]) -> float:
    return sum(by_text.values()) / len(by_text)


# -- sensitivity ---------------------------------------------------------------------------------------------


def _sensitivity(run: Run, model: nn.Module, parts: dict[str, dict[str, Tensor]]) -> float:
    """The profile of lm-tiny; returns Spearman's correlation of a block's depth with its tolerance."""
    ratios = run.size(smoke=(0.25,), quick=(0.25,), standard=(0.5, 0.25))
    layers = run.size(smoke=("0.self_attn.q_proj", "5.self_attn.q_proj"), standard=("",))
    names = [name for name in find_layers(model).layers if name.endswith(tuple(layers))]
    method = CompactifAI(heal_steps=0)
    data = Data(train=_mixed(parts, 0)[:PROBES], batch_size=BATCH)
    with torch.no_grad():
        profile = method.profile(model, data, ratios, layers=names, progress=run.progress)
    run.table(
        "sensitivity",
        [
            {
                "layer": r.name.removeprefix("model.layers."),
                "chi": r.size,
                "share of parameters": r.numbers / r.weights,
                "increase of the loss, nats": r.increase,
            }
            for r in profile
        ],
        "Each layer of lm-tiny replaced alone by a chain of two cores; loss on training rows.",
    )  # fmt: skip
    least = {
        (r.depth, r.type): r.increase for r in profile
    }  # at the smallest of the ratios, which comes last
    depths = sorted({depth for depth, _ in least if depth is not None})
    mean = {d: sum(v for (depth, _), v in least.items() if depth == d) / len(least) for d in depths}
    with style():
        figure = Figure(figsize=WIDE)
        panel = figure.subplots()
        kinds = list(dict.fromkeys(kind for _, kind in least))
        for i, kind in enumerate(kinds):
            heights = [least[depth, kind] for depth in depths]
            places = [d + (i - (len(kinds) - 1) / 2) * 0.11 for d in depths]
            panel.bar(places, heights, width=0.1, label=kind, color=(*PALETTE, REFERENCE)[i])
        panel.set(
            xlabel="block",
            ylabel="increase of the loss, nats",
            title="One layer at a quarter of its parameters",
        )
        panel.set_xticks(depths)
        panel.grid(axis="x", visible=False)
        panel.legend(ncols=2)
    run.figure(
        "sensitivity", figure,
        caption="What the loss of lm-tiny rises by when one layer is replaced by a chain of two cores at a "
        "quarter of its parameters, by block and type, without healing.",
        alt="Groups of bars, one for each block, with a bar for each of the seven types of layers.",
    )  # fmt: skip
    return float(spearmanr(depths, [-mean[depth] for depth in depths]).statistic)


def _smollm(run: Run, tokenizer: Any) -> None:
    """Errors and a profile by block of a real language model, where its weights are installed."""
    if run.budget in ("smoke", "quick"):
        return
    try:
        model = pretrained("smollm2-135m")
        tokens = pretrained_tokenizer("smollm2-135m")
    except MissingExtraError as error:
        run.note(f"SmolLM2-135M was left out: {error}")
        return
    layers = find_layers(model).layers
    chosen = [f"model.layers.{d}.{k}" for d in (1, 14, 28) for k in ("self_attn.q_proj", "mlp.down_proj")]
    run.table(
        "errors_smollm2",
        [{"matrix": name[len("model.layers.") :]} | _relative_errors([layers[name]]) for name in chosen],
        "Relative Frobenius error on matrices of SmolLM2-135M at equal shares of parameters.",
    )  # fmt: skip
    ids = text_rows(tokens, text.kjv().test.x[:4000], 128, 2)
    blocks = run.size(standard=(0, 1, 7, 14, 21, 29), full=tuple(range(30)))
    losses = {depth: _without_block(model, layers, depth, ids) for depth in run.track(blocks, "SmolLM2")}
    with torch.no_grad():
        dense = float(default_loss(model, ids))
    run.table(
        "sensitivity_smollm2",
        [{"block": depth, "increase of the loss, nats": loss - dense} for depth, loss in losses.items()],
        "All seven matrices of one block of SmolLM2-135M replaced by chains of two cores at a quarter of "
        f"their parameters; loss on {ids.numel()} tokens of the King James Bible, {dense:.2f} nats dense.",
    )
    correlation = spearmanr(list(losses), [-loss for loss in losses.values()]).statistic
    run.note(
        f"SmolLM2-135M: Spearman's correlation of a block's depth with its tolerance is {correlation:.2f}."
    )


@torch.no_grad()
def _without_block(model: nn.Module, layers: dict[str, nn.Module], depth: int, ids: Tensor) -> float:
    """The loss with the matrices of one block replaced; the model is as before afterwards."""
    mine = {name: layer for name, layer in layers.items() if name.startswith(f"model.layers.{depth}.")}
    method = CompactifAI(heal_steps=0)
    try:
        for name, layer in mine.items():
            out, inputs = weight_matrix(layer).shape
            swap(
                model, name, method.factorize(name, layer, method.size_for((out, inputs), out * inputs // 4))
            )
        return float(default_loss(model, ids))
    finally:
        for name, layer in mine.items():
            swap(model, name, layer)


# -- what is told --------------------------------------------------------------------------------------------


def _report(run: Run, outcomes: list[Outcome]) -> None:
    first = outcomes[0]
    rows: list[dict[str, Any]] = [
        {"model": "dense", "bytes on disk": first.size["dense"]}
        | {f"healed, {label}": first.dense[name] for name, label in TEXTS.items()}
    ]

    def means(tables: list[dict[str, float]], what: str) -> dict[str, float]:
        return {
            f"{what}, {label}": mean_interval([table[name] for table in tables]).mean
            for name, label in TEXTS.items()
        }

    for name in first.healed:
        rows.append(
            {"model": name, "bytes on disk": first.size[name]}
            | means([o.before[name] for o in outcomes], "before")
            | means([o.healed[name] for o in outcomes], "healed")
        )
        for kind in ("int8", "int4"):
            packed = means([o.packed[name, kind] for o in outcomes], "healed")
            rows.append({"model": f"{name}, {kind}", "bytes on disk": first.size[f"{name}, {kind}"]} | packed)
    run.table(
        "perplexity", rows,
        f"Perplexity on the test parts, mean over {len(outcomes)} seeds, with the layers at {RATIO:.0%} of "
        f"their parameters; {_steps(run)} healing steps of {BATCH} x {LENGTH} tokens train the factors "
        "alone. int8 and int4 pack the healed factors. Embeddings stay in float32.",
    )  # fmt: skip
    run.note(
        "Width pruning at equal parameters (Minitron, or Taylor groups) is not in this table; it is a "
        "method of its own."
    )


def _ratios(outcomes: list[Outcome], ours: str, theirs: str) -> list[float]:
    """Perplexity over perplexity, healed, the mean of the texts, seed by seed."""
    return [
        sum(o.healed[ours][name] / o.healed[theirs][name] for name in TEXTS) / len(TEXTS) for o in outcomes
    ]


def _llama_saving(ratio: float = 0.3, bits: int = 4) -> float:
    """Share of LLaMA-2 7B's float32 bytes saved by chains in a few bits, its embeddings in float16."""
    shapes = [(LLAMA_WIDTH, LLAMA_WIDTH)] * 4 + [(LLAMA_FEED_FORWARD, LLAMA_WIDTH)] * 2
    shapes.append((LLAMA_WIDTH, LLAMA_FEED_FORWARD))
    method = CompactifAI(2)
    weights = sum(math.prod(shape) for shape in shapes)
    sizes = [method.sizes_of_factors(s, method.size_for(s, int(ratio * math.prod(s)))) for s in shapes]
    embeddings = 2 * LLAMA_TOKENS * LLAMA_WIDTH
    before = 4 * (LLAMA_BLOCKS * weights + embeddings)
    return 1 - (LLAMA_BLOCKS * sum(packed_bytes(s, bits) for s in sizes) + 2 * embeddings) / before


def _claims(run: Run, outcomes: list[Outcome], tolerance: float) -> None:
    run.claim(
        "relative error of a chain with 8 bonds on a planted sum of 8 Kronecker products with 1 % noise",
        paper="no such control", measured=[o.planted[TWO] for o in outcomes], at_most=0.02,
    )  # fmt: skip
    run.claim(
        "relative error of the truncated SVD with as many parameters on the same matrix",
        paper="no such control", measured=[o.planted[SVD_NAME] for o in outcomes], at_least=0.5,
    )  # fmt: skip
    run.claim(
        "share of the perplexity lost by the chain of two cores that healing brings back, mean of both texts",
        paper="a short retraining restores most of the accuracy",
        measured=[
            sum((o.before[TWO][n] - o.healed[TWO][n]) / (o.before[TWO][n] - o.dense[n]) for n in TEXTS)
            / len(TEXTS)
            for o in outcomes
        ],
        at_least=0.8,
    )  # fmt: skip
    run.claim(
        "bytes of LLaMA-2 7B saved by chains at 30 % of the parameters in int4, by the closed form",
        paper="93 %: 27.1 GB to 2.1 GB", measured=_llama_saving(), at_least=0.93,
        note="Most of it is float32 to 4 bits: the same int4 without chains saves "
        f"{1 - (4 + 16 / 32) / 32:.0%} of the matrices. Embeddings count in float16, scales of codes too.",
    )  # fmt: skip
    others = "".join(
        f" {ours} over {theirs}: {mean_interval(_ratios(outcomes, ours, theirs)).mean:.3f}."
        for ours, theirs in ((THREE, SVD_NAME), (TWO_X, SVD_X), (SVD_X, SVD_NAME))
        if ours in outcomes[0].healed
    )
    ratio = _ratios(outcomes, TWO, SVD_NAME)
    plainly = "does not beat" if mean_interval(ratio).mean >= 1 else "beats"
    run.claim(
        "healed perplexity of the chain of two cores over that of the SVD with as many parameters, mean of "
        "both texts",
        paper="truncating correlations is better than truncating rank; not measured",
        measured=ratio, at_most=1.0,
        note=f"The matrix product operator {plainly} the truncated SVD here.{others}",
    )  # fmt: skip
    run.claim(
        "Spearman's correlation of a block's depth with its tolerance, lm-tiny's blocks",
        paper="deeper layers compress better", measured=tolerance, at_least=0.0,
        note="Tolerance is minus the mean increase of the loss over the types of layers, each replaced alone "
        "at a quarter of its parameters.",
    )  # fmt: skip


def _draw_curves(
    run: Run, curves: dict[str, list[tuple[int, float, float]]], outcomes: list[Outcome]
) -> None:
    first = outcomes[0]
    with style():
        figure = Figure(figsize=WIDE)
        panel = figure.subplots()
        for name, points in curves.items():
            sizes = [size / 1e6 for size, *_ in points]
            colour = COLOURS[name]
            panel.plot(
                sizes,
                [p for _, p, _ in points],
                marker="o",
                linestyle=":",
                color=colour,
                label=f"{name}, before",
            )
            panel.plot(sizes, [p for *_, p in points], marker="o", color=colour, label=f"{name}, healed")
            packed = [
                (first.size[f"{name}, {k}"] / 1e6, _mean(first.packed[name, k])) for k in ("int8", "int4")
            ]
            panel.plot(*zip(*packed, strict=True), marker="s", markersize=4, linestyle="", color=colour)
        panel.plot([], [], marker="s", linestyle="", color=REFERENCE, label="healed, factors in int8, int4")
        panel.axhline(_mean(first.dense), color=REFERENCE, linestyle="--", linewidth=1)
        panel.annotate(
            f"dense, {first.size['dense'] / 1e6:.1f} MB", (0.01, _mean(first.dense)),
            xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points", color=REFERENCE,
        )  # fmt: skip
        panel.set_yscale("log")
        panel.set(xlabel="MB on disk", ylabel="perplexity, mean of both texts", title="Size and perplexity")
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    run.figure(
        "size", figure,
        caption="Perplexity on test text against bytes really written, for truncated SVD and chains of 2 and "
        "3 cores, before and after the same healing (first seed). Squares: the healed factors packed.",
        alt="Dotted curves before healing lie far above the solid ones after it; in both the SVD lies below "
        "the chains at the same size.",
    )  # fmt: skip
