"""How compressors are compared: one model, several sizes, quality against the bytes that are really written.

By default the tiny language model that ships, on the books that ship; else the user's model and data. Every
method that can be told a share of the original's bytes makes a model of at most that share; it is judged on
the test part, timed, saved, loaded again and asked again. Calibration and training use the training part; the
validation part is for methods that choose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from paperback.compare.bench import READING, Bench, Contender, Kind, Metric
from paperback.compress.budget import Budget as Size
from paperback.compress.data import Data, evaluate, run
from paperback.compress.interface import Compressed, Compressor
from paperback.compress.loading import SHIPPED, Subject, load_data, load_subject
from paperback.compress.report import measure
from paperback.errors import BudgetError, DataError, PaperbackError
from paperback.study.budget import Budget, for_budget
from paperback.study.encoding import write_atomically

SIZES = (0.5, 0.3)  # shares of the original's bytes
RELOADED = 1e-5  # by how much the outputs of the saved and loaded model may differ

METRICS = (
    Metric("loss", "loss on the test part, nats", better="lower", primary=True),
    Metric("perplexity", "perplexity", better="lower"),
    Metric("accuracy", "accuracy", better="higher"),
    Metric("agreement", "agreement with the original", better="higher"),
    Metric("bytes", "on disk", "B", better="lower", cost=True),
    Metric("latency", "latency of one row", "s", better="lower", cost=True),
    Metric("seconds", "compression", "s", better="lower", cost=True),
)


@dataclass(frozen=True, eq=False)
class CompressData:
    """A model and its data.

    Attributes:
        subject: what is compressed.
        data: training, validation and test part.
    """

    subject: Subject
    data: Data


def load(
    path: Path | None, target: str | None, budget: Budget, seed: int, model: str | None = None
) -> CompressData:
    """The model and data of a comparison.

    Args:
        path: a text, an ``.npz``, or a folder of images; None for what ships.
        target: must be None.
        budget: larger budgets use more rows.
        seed: of the choice of rows.
        model: as of `load_subject`; "lm-tiny" if None.

    Raises:
        PaperbackError: in one sentence.
    """
    if target is not None:
        raise DataError(f"models are compressed on texts or images, which have no column {target!r}.")
    subject = load_subject(model or "lm-tiny")
    rows = for_budget(
        budget, smoke=(4, 2, 2), quick=(64, 16, 32), standard=(128, 64, 128), full=(1024, 256, 512)
    )
    return CompressData(subject, load_data(subject, path, rows=rows, seed=seed))


# -- who is compared -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One method of the table.

    Attributes:
        name: of the contender.
        label: what a person reads.
        kind: "method" for those of the catalogue.
        make: ``(budget, seed) -> Compressor``.
    """

    name: str
    label: str
    kind: Kind
    make: Callable[[Budget, int], Compressor]


def _rtn(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.survey import RTN

    return RTN(seed=seed)


def _gptq(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.survey import GPTQ

    return GPTQ(seed=seed)


def _awq(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.survey import AWQ

    return AWQ(seed=seed)


def _magnitude(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.pruning import Magnitude

    return Magnitude(pack=True, seed=seed)


def _wanda(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.pruning import Wanda

    return Wanda(pack=True, seed=seed)


def _sparsegpt(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.pruning import SparseGPT

    return SparseGPT(pack=True, seed=seed)


def _dsnot(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.dsnot import DSnoT

    return DSnoT(pack=True, seed=seed)


def _healing(budget: Budget) -> int:
    return for_budget(budget, smoke=2, quick=60, standard=150, full=1000)


def _svd(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.svd import SVD

    return SVD(metric="activation", heal_steps=_healing(budget), seed=seed)


def _compactifai(budget: Budget, seed: int) -> Compressor:
    from paperback.compress.compactifai import CompactifAI

    return CompactifAI(heal_steps=_healing(budget), seed=seed)


METHODS = (
    Method("rtn", "round to nearest", "baseline", _rtn),
    Method("gptq", "GPTQ", "baseline", _gptq),
    Method("awq", "AWQ", "baseline", _awq),
    Method("magnitude", "magnitude pruning", "baseline", _magnitude),
    Method("wanda", "Wanda", "baseline", _wanda),
    Method("sparsegpt", "SparseGPT", "baseline", _sparsegpt),
    Method("svd", "truncated SVD", "baseline", _svd),
    Method("compactifai", "CompactifAI", "method", _compactifai),
    Method("dsnot", "DSnoT", "method", _dsnot),
)


@dataclass(frozen=True)
class Sized:
    """A method at one size; what `Contender.build` gives."""

    method: Compressor
    share: float


def _contender(method: Method, share: float) -> Contender:
    return Contender(
        name=f"{method.name}@{share:g}",
        label=f"{method.label}, {share:.0%}",
        kind=method.kind,
        applies=lambda data: _reason_against(method, share, data),
        build=lambda data, budget, seed: Sized(method.make(budget, seed), share),
    )


def _reason_against(method: Method, share: float, data: CompressData) -> str | None:
    """None, or why a method cannot make this model this small."""
    made = method.make("smoke", 0)
    model = data.subject.model
    found = made._find(model)
    if not found.layers:
        return "the model has no layer that it handles."
    if "ratio" not in made.budgets:
        return "it cannot be told a share of the bytes."
    try:
        made._settle(Size(ratio=share), found.layers, model)
    except (BudgetError, DataError) as error:
        return str(error)
    return None


def _original(data: CompressData, budget: Budget, seed: int) -> None:
    return None


ORIGINAL = Contender("original", "the original", "baseline", lambda data: None, _original)


# -- what is measured ----------------------------------------------------------------------------------------


def evaluate_contender(
    contender: Contender, data: CompressData, budget: Budget, seed: int, out: Path
) -> Mapping[str, float | None]:
    """Compress, judge, save, load again and compare the outputs.

    Args:
        contender: who.
        data: from `load`.
        budget: how long the methods that train do so.
        seed: of the method.
        out: folder for the compressed model and the sentences of the report.

    Returns:
        Metric name to number.

    Raises:
        PaperbackError: if the saved model answers differently, or is larger than was asked for.
    """
    measured: dict[str, float | None] = dict.fromkeys(metric.name for metric in METRICS)
    runs = for_budget(budget, smoke=2, quick=20, standard=20, full=50)
    sized = contender.build(data, budget, seed)
    model, batches = data.subject.model, data.data
    if sized is None:
        quality = evaluate(model, batches.batches("test"), original=model)
        from paperback.compress.storage import save_model

        size = measure(model, batches.example(), lambda folder: save_model(model, folder), runs)
        return measured | quality | {"bytes": size.bytes_on_disk, "latency": size.latency, "seconds": 0.0}
    result = sized.method.compress(model, batches, Size(ratio=sized.share), latency_runs=runs, progress=False)
    report = result.report
    _check_reloaded(result, data, out)
    if report.after.bytes_on_disk > sized.share * report.before.bytes_on_disk:
        raise PaperbackError(
            f"it takes {report.ratio:.3f} of the original's bytes, more than the {sized.share:g} asked for."
        )
    write_atomically(out / READING, "\n".join([report.method, *report.notes]) + "\n")
    write_atomically(out / "report.md", report.to_markdown())
    known = {name: value for name, value in report.quality_after.items() if name in measured}
    return measured | known | {
        "bytes": report.after.bytes_on_disk,
        "latency": report.after.latency,
        "seconds": report.seconds,
    }  # fmt: skip


def _check_reloaded(result: Compressed, data: CompressData, out: Path) -> None:
    folder = out / "model"
    result.save(folder)
    if data.subject.tokenizer is not None:
        data.subject.tokenizer.save_pretrained(folder)
    again = Compressed.load(folder, copy.deepcopy(data.subject.model)).model
    batch = next(data.data.batches("test"))
    with torch.no_grad():
        error = float((run(result.model, batch) - run(again, batch)).abs().max())
    if not error <= RELOADED:
        raise PaperbackError(f"saved and loaded again, its outputs differ by {error:.3g}.")


def sized(shares: tuple[float, ...]) -> Bench:
    """The bench with a contender for each method and share of the original's bytes."""
    return Bench(
        task="compress",
        metrics=METRICS,
        contenders=(ORIGINAL, *(_contender(method, share) for share in shares for method in METHODS)),
        load=load,
        evaluate=evaluate_contender,
        seconds={"smoke": 5, "quick": 20, "standard": 90, "full": 600},
        takes_model=True,
        models=SHIPPED,
        sized=sized,
    )


BENCH = sized(SIZES)
