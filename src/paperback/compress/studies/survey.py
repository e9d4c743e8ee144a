"""The study of the survey: one method a class on the language model that ships, judged on three texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, cat, nn

from paperback.compress import Budget, Compressor, Data, text_rows
from paperback.compress.pruning import Magnitude, SparseGPT, Wanda
from paperback.compress.survey import (
    AWQ,
    GPTQ,
    RTN,
    Distil,
    DropBlocks,
    EarlyExit,
    FakeQuantTune,
    GroupedQueries,
    Healing,
    Leaderboard,
    QLoRA,
    SmoothQuant,
    leaderboard,
    methods,
)
from paperback.compress.survey.leaderboard import Row, marked
from paperback.compress.svd import SVD
from paperback.data import text
from paperback.networks import pretrained, pretrained_tokenizer
from paperback.networks.surgery import find_layers, weight_matrix
from paperback.study import Run
from paperback.study.figures import BASELINE, METHOD, PALETTE, WIDE, style

SEEDS = (0, 1, 2)
GROUP = 32
IN_DOMAIN = ("King James Bible", "WordNet")  # what is calibrated on, too
OUTSIDE = "Python manual"
HEADERS = 65_536  # bytes that names, shapes and the configuration may take beside the numbers


@dataclass
class Texts:
    """Token rows: calibration and validation of the texts in the domain, and what is judged on."""

    train: Tensor
    val: Tensor
    judged: dict[str, Tensor]


def study(run: Run) -> None:
    """What does each class of compression cost a language model, and does it cost other texts more than
    those that it was calibrated on?

    Quantizers, pruners, low rank, distillation, merged heads and early exits act on the same model; those
    that calibrate see the same rows of the Bible and of WordNet's definitions, drawn anew with each seed.
    Everything is judged on the test parts of both and on the Python manual, which no method sees. Bytes are
    those of the files. The claims are false if rounding to 4 bits costs more than 3 %, if second-order
    methods do not beat first-order ones, if tuning does not beat rounding, or if the foreign text does not
    lose more.
    """
    model = pretrained("lm-tiny")
    if run.budget != "smoke":
        run.table("classes", _records(methods().reset_index()), "The survey's classes and their methods.")
    boards = [_compare(run, model, _texts(run, seed), seed) for seed in run.track(run.seeds, "seeds")]
    _report(run, boards[0])
    _claim_quantizers(run, boards)
    _claim_pruners(run, boards)
    _claim_bytes_and_generality(run, model, boards)


# -- one seed ------------------------------------------------------------------------------------------------


def _texts(run: Run, seed: int) -> Texts:
    tokenizer = pretrained_tokenizer("lm-tiny")
    kjv, glosses, manual = text.kjv(), text.wordnet_glosses(), text.python_manual()
    start, length = "<|endoftext|>", run.size(smoke=32, standard=256)  # tokens of a row

    def definitions(part: str) -> str:
        x = getattr(glosses, part).x
        return start + start.join(f"{w}: {t}" for w, t in zip(x["words"], x["text"], strict=True))

    def rows(source: str, n: int) -> Tensor:
        return text_rows(tokenizer, source[: n * length * 12], length, n, seed)

    n_train, n_test = run.size(smoke=2, quick=16, standard=32), run.size(smoke=1, quick=16, standard=32)
    n_val, n_chars = run.size(smoke=1, standard=16), n_test * length * 12
    return Texts(
        cat([rows(kjv.train.x, n_train), rows(definitions("train"), n_train)]),
        cat([rows(kjv.val.x, n_val), rows(definitions("val"), n_val)]),
        {
            IN_DOMAIN[0]: text_rows(tokenizer, kjv.test.x[:n_chars], length, n_test),
            IN_DOMAIN[1]: text_rows(tokenizer, definitions("test")[:n_chars], length, n_test),
            OUTSIDE: text_rows(tokenizer, manual.test.x[:n_chars], length, n_test),
        },
    )


def _compare(run: Run, model: nn.Module, texts: Texts, seed: int) -> Leaderboard:
    """Every method with the first seed; with the others those that a bar names and that calibrate or
    train."""
    first = seed == run.seed
    healing = Healing(run.size(smoke=1, quick=20, standard=100), run.size(smoke=1, standard=4), 1e-3)
    bits: tuple[int, ...] = run.size(smoke=(2,), quick=(4, 2), standard=(4, 3, 2))
    densities: tuple[float, ...] = run.size(smoke=(0.4,), standard=(0.4, 0.3))
    masks = [*(Budget(density=d) for d in densities), *run.size(smoke=[], standard=[Budget(nm=(2, 4))])]
    tuned = FakeQuantTune(2, GROUP, healing=healing, seed=seed)
    parts: list[tuple[list[Compressor], list[Budget]]] = [
        ([GPTQ(group=GROUP)], [Budget(bits=b) for b in bits if first or b < 4]),
        ([Wanda(pack=True), SparseGPT(pack=True)], masks),
        ([tuned], [Budget(bits=2)]),
    ]
    if first:
        parts += _the_others(healing, bits, masks)
        half = [Budget(density=0.5)]
        parts += run.size(
            smoke=[], standard=[([Magnitude(pack=True), Wanda(pack=True), SparseGPT(pack=True)], half)]
        )
    # One row as the example of a pass: operations and latency are measured on it.
    data = Data(texts.train, texts.val, example_input=texts.train[:1])
    boards = [
        leaderboard(
            model,
            data,
            texts.judged,
            budgets,
            contenders,
            progress=False,
            latency_runs=run.size(smoke=0, standard=10) if first else 0,
        )
        for contenders, budgets in run.track(parts, "classes")
    ]
    if first:
        _early_exit(run, model, texts)
    rows = tuple(row for board in boards for row in board.rows)
    for row in rows:
        run.log(f"seed {seed}: {row.method}, {row.budget}: {row.failure or _percent(row.worst_drop)}")
    return marked(Leaderboard(rows, boards[0].original, _original_bytes(boards), boards[0].metric))


def _the_others(
    healing: Healing, bits: Sequence[int], masks: list[Budget]
) -> list[tuple[list[Compressor], list[Budget]]]:
    """Methods without a draw in them, and those that no bar names."""
    with_states = replace(healing, hidden_weight=0.1)
    by_bits = [Budget(bits=b) for b in bits]
    return [
        ([RTN(group=GROUP), AWQ(group=GROUP)], by_bits),
        ([SmoothQuant(), SmoothQuant(None, GROUP)], [Budget(bits=8)]),
        ([Magnitude(pack=True)], masks),
        ([QLoRA(healing=healing)], [Budget(ratio=0.4)]),
        ([SVD(), DropBlocks(), Distil(healing=with_states)], [Budget(ratio=0.7)]),
        ([GroupedQueries(healing=healing)], [Budget(ratio=0.97)]),
    ]


def _original_bytes(boards: Sequence[Leaderboard]) -> int:
    return max(board.original_bytes for board in boards)


def _early_exit(run: Run, model: nn.Module, texts: Texts) -> None:
    """Depth against agreement; its size in bytes does not change, so that it has no place in the table."""
    rows = []
    for agreement in run.size(smoke=(0.9,), standard=(0.99, 0.95, 0.9)):
        result = EarlyExit(agreement).compress(
            model, Data(None, texts.val, texts.judged[IN_DOMAIN[0]]), latency_runs=0, progress=False
        )
        rows.append(
            {
                "asked for, on validation": agreement,
                "agreement on the Bible's test part": result.report.quality_after["agreement"],
                "blocks a token needs, of 6": result.extras["depth"],
                "perplexity": result.report.quality_after["perplexity"],
            }
        )
    run.table(
        "early-exit",
        rows,
        "Early exit: the threshold is chosen on the validation part for the agreement that is asked for.",
    )


# -- what is reported ----------------------------------------------------------------------------------------


def _report(run: Run, board: Leaderboard) -> None:
    table = board.to_frame()
    table["latency"] = 1000 * table["latency"].astype(float)
    table["peak memory"] = table["peak memory"].astype(float) / 1e6
    table = table.rename(columns={"latency": "latency, ms", "peak memory": "peak memory, MB"})
    original = ", ".join(f"{name} {value:.1f}" for name, value in board.original.items())
    run.table(
        "leaderboard",
        _records(table),
        f"Every method with the first seed. The original has {board.original_bytes:,} bytes and perplexities "
        f"{original}. Latency is of one row on this machine: packed layers are unpacked at every "
        "pass, and slower.",
    )
    run.figure(
        "leaderboard",
        board.figure(),
        "The worst rise of perplexity over three texts against bytes really written; at the lower "
        "left is best.",
        "A scatter of methods by family: quantizers at the left and low, pruners and factors to the "
        "right and higher.",
    )
    _draw_texts(run, board)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The lines of a table, with None where there is nothing."""
    lines = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(column): value for column, value in line.items()} for line in lines]


def _draw_texts(run: Run, board: Leaderboard) -> None:
    done = sorted((r for r in board.rows if r.drop), key=lambda r: r.worst_drop or 0.0)
    with style():
        figure = Figure(figsize=(WIDE[0], 0.2 * len(done) + 1.2))
        axes = figure.subplots()
        for name, colour in zip((*IN_DOMAIN, OUTSIDE), (METHOD, PALETTE[2], BASELINE), strict=True):
            drops = [100 * max(row.drop[name], 1e-4) for row in done]  # type: ignore[index]
            axes.plot(drops, range(len(done)), "o", color=colour, label=name, markersize=4)
        axes.set_yticks(range(len(done)), [_label(row) for row in done], fontsize=7)
        axes.set(xscale="log", xlabel="rise of perplexity, %")
        axes.grid(True, axis="both")
        axes.legend(fontsize=8)
    run.figure(
        "generality",
        figure,
        "What each method costs on the two texts that it was calibrated on and "
        "on a foreign one. A dot at the left "
        "edge is a text whose perplexity did not rise.",
        "A dot plot with a line a method and three dots a line: one for each text, on a logarithmic axis.",
    )


def _label(row: Row) -> str:
    name = row.method.split("(")[0]
    return f"{name}, {row.budget}"


def _claim_quantizers(run: Run, boards: list[Leaderboard]) -> None:
    if run.budget != "smoke":
        run.claim(
            "rounding to 4 bits in groups of 32 is nearly free",
            paper="4 bits without tuning are nearly lossless",
            measured=1 + max(_find(boards[0], "RTN", "bits 4").drop[t] for t in IN_DOMAIN),  # type: ignore[index]
            at_most=1.03,
            unit="times",
            note="Perplexity over that of the dense model, the worse of both texts in the domain; "
            "no seed is in it.",
        )
    for bits in run.size(smoke=(2,), quick=(2,), standard=(3, 2)):
        for name in IN_DOMAIN:
            run.claim(
                f"GPTQ beats rounding at {bits} bits on {name}",
                paper="second-order rounding is the better one",
                measured=[_find(b, "GPTQ", f"bits {bits}").quality[name] for b in boards],  # type: ignore[index]
                baseline=_find(boards[0], "RTN", f"bits {bits}").quality[name],  # type: ignore[index]
                at_most=0.0,
                note="Perplexity on the test part, one calibration draw a seed; rounding has none.",
            )
    run.claim(
        "tuning at 2 bits beats GPTQ at 2 bits",
        paper="tuning closes the gap that is left, at a cost",
        measured=[_mean(_find(b, "FakeQuantTune", "bits 2")) for b in boards],
        baseline=[_mean(_find(b, "GPTQ", "bits 2")) for b in boards],
        at_most=0.0,
        note="Geometric mean of the perplexities of both texts in the domain; straight-through "
        "training with learned "
        "steps, distilled from the dense model.",
    )


def _claim_pruners(run: Run, boards: list[Leaderboard]) -> None:
    budgets = run.size(smoke=("density 0.4",), standard=("density 0.4", "density 0.3", "nm (2, 4)"))
    words = {"density 0.4": "60 % zeros", "density 0.3": "70 % zeros", "nm (2, 4)": "2:4"}
    for budget in budgets:
        for rival in ("Magnitude", "Wanda"):
            run.claim(
                f"SparseGPT beats {rival} at {words[budget]}",
                paper="the weight update is worth its cost",
                measured=[_mean(_find(b, "SparseGPT", budget)) for b in boards],
                baseline=[
                    _mean(_find(boards[0] if rival == "Magnitude" else b, rival, budget)) for b in boards
                ],
                at_most=0.0,
                note="Geometric mean of the perplexities of both texts in the domain.",
            )


def _claim_bytes_and_generality(run: Run, model: nn.Module, boards: list[Leaderboard]) -> None:
    original = boards[0].original_bytes
    shares = [
        max((r.bytes or 0) / _limit(model, r, original) for r in b.rows if not r.failure) for b in boards
    ]
    run.claim(
        "every row's files are within its budget",
        paper="sizes are those of files",
        measured=shares,
        at_most=1.0,
        unit="times",
        note="The largest ratio of bytes to budget. A budget in bits or density is turned into "
        "bytes by the formulas "
        f"of the taxonomy, with {HEADERS:,} bytes for names, shapes and the configuration.",
    )
    worse = []
    for board in boards:
        rows = [r for r in board.rows if r.drop]
        domain = [float(np.mean([r.drop[t] for t in IN_DOMAIN])) for r in rows]  # type: ignore[index]
        worse.append(
            float(np.mean([r.drop[OUTSIDE] >= d for r, d in zip(rows, domain, strict=True)]))  # type: ignore[index]
        )
    run.claim(
        "the foreign text loses more than the texts in the domain",
        paper="generality is lost unevenly",
        measured=worse,
        at_least=2 / 3,
        unit="of all rows",
        note="Share of rows whose relative rise of perplexity on the Python manual is at least the "
        "mean rise on the "
        "two others. (That the worst of all three texts is at least that mean "
        "is true of any numbers.) The model "
        "hardly knows the manual (perplexity about 1,100), and damage that "
        "flattens its guesses can lower that.",
    )
    failed = [f"{row.method} at {row.budget}: {row.failure}" for row in boards[0].rows if row.failure]
    if failed:
        run.note("Rows that failed: " + "; ".join(failed))
    run.note(
        "Bars come from a prototype with another model of the same size. On a model this small Wanda "
        "has no outlier "
        "channels to find, and is about as good as magnitude."
    )


def _limit(model: nn.Module, row: Row, original: int) -> float:
    """The budget of a row in bytes."""
    unit, _, value = row.budget.partition(" ")
    if unit == "ratio":
        return float(value) * original
    layers = [weight_matrix(layer) for layer in find_layers(model).layers.values()]
    weights = sum(w.numel() for w in layers)
    rest = original - 4 * weights + HEADERS
    if unit == "bits":
        bits = float(value)
        grouped = not row.method.startswith("SmoothQuant()")
        lines = sum(len(w) * (math.ceil(w.shape[1] / GROUP) if grouped else 1) for w in layers)
        return rest + weights * bits / 8 + lines * (2 + bits / 8)
    if unit == "density":
        return rest + weights * (4 * float(value) + 1 / 8)
    return rest + weights * (4 * 0.5 + 3 / 32)  # 2:4: two of four values, and one of six patterns in 3 bits


def _find(board: Leaderboard, method: str, budget: str) -> Row:
    row = next(r for r in board.rows if r.method.startswith(f"{method}(") and r.budget == budget)
    if row.failure:
        raise RuntimeError(f"{row.method} at {budget} failed: {row.failure}")
    return row


def _mean(row: Row) -> float:
    """Geometric mean of the perplexities in the domain."""
    assert row.quality is not None
    return math.exp(float(np.mean([math.log(row.quality[t]) for t in IN_DOMAIN])))


def _percent(share: float | None) -> str:
    return "" if share is None else f"worst rise {100 * share:.1f} %"
