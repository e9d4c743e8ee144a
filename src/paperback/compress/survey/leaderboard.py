"""All methods head to head: every one that can be told a budget, at every budget, judged on several texts.

A method that fails is a row with its reason. Settings that a method chooses are chosen on the validation
part; the table shows the texts that are given, which no method sees. Generality is part of the table: the
worst relative drop over the texts stands beside the numbers.

Source: Wang et al. (2024), arXiv 2402.09748, section 1: tuning-free first, and generality measured.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from paperback.compress.budget import Budget
from paperback.compress.data import Batches, Data, Metric, evaluate
from paperback.compress.interface import Compressor
from paperback.compress.report import latencies
from paperback.compress.survey.smoothing import small_batch
from paperback.compress.survey.taxonomy import ENTRIES, find_method
from paperback.errors import DataError
from paperback.study.encoding import write_atomically
from paperback.study.progress import Bars

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Tier = Literal["tuning-free", "tuned"]
HIGHER_IS_BETTER = ("accuracy", "agreement")


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: name and settings.
        family: of the method.
        tuning_free: whether it trains nothing.
        budget: in words.
        bytes: of the files really written.
        ratio: of those to the original's.
        quality: by text, the first number of `evaluate`.
        drop: by text, relative: how much worse than the original, 0.1 for 10 %.
        latency: median seconds of one row.
        seconds: of the compression.
        peak_memory: bytes of the process during it.
        failure: why there is nothing else; "" where there is.
        on_front: no other row has fewer bytes and a smaller worst drop.
    """

    method: str
    family: str
    tuning_free: bool
    budget: str
    bytes: int | None = None
    ratio: float | None = None
    quality: Mapping[str, float] | None = None
    drop: Mapping[str, float] | None = None
    latency: float | None = None
    seconds: float | None = None
    peak_memory: int | None = None
    failure: str = ""
    on_front: bool = False

    @property
    def worst_drop(self) -> float | None:
        """The largest relative drop over the texts."""
        return max(self.drop.values()) if self.drop else None


@dataclass(frozen=True)
class Leaderboard:
    """The table of a comparison.

    Attributes:
        rows: in the order in which they were run.
        original: of the model before: the first number of `evaluate`, by text.
        original_bytes: of its files.
        metric: name of that number.
    """

    rows: tuple[Row, ...]
    original: Mapping[str, float]
    original_bytes: int
    metric: str

    def to_frame(self) -> pd.DataFrame:
        """One line a row; failed ones have their reason and nothing else."""
        import pandas as pd

        lines = []
        for row in self.rows:
            line: dict[str, Any] = {
                "method": row.method, "budget": row.budget, "family": row.family,
                "training": not row.tuning_free, "bytes": row.bytes, "ratio": row.ratio,
            }  # fmt: skip
            line |= {f"{self.metric}, {text}": value for text, value in (row.quality or {}).items()}
            line |= {
                "worst drop": row.worst_drop, "latency": row.latency, "seconds": row.seconds,
                "peak memory": row.peak_memory, "on the front": row.on_front, "failure": row.failure,
            }  # fmt: skip
            lines.append(line)
        return pd.DataFrame(lines)

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(asdict(self), indent=2)

    def save(self, path: str | Path) -> None:
        """Write `to_json` to a file."""
        write_atomically(Path(path), self.to_json() + "\n")

    def figure(self) -> Figure:
        """The worst relative drop against bytes, with the front; failed rows are left out."""
        from matplotlib.figure import Figure

        from paperback.study.figures import PALETTE, REFERENCE, WIDE, style

        done = [row for row in self.rows if row.drop and row.bytes is not None]
        with style():
            figure = Figure(figsize=WIDE)
            axes = figure.subplots()
            families = list(dict.fromkeys(row.family for row in done))
            for colour, family in zip(PALETTE, families, strict=False):
                for trained in (False, True):
                    mine = [r for r in done if r.family == family and r.tuning_free is not trained]
                    if mine:
                        axes.scatter(
                            [(r.bytes or 0) / 1e6 for r in mine], [100 * _shown(r) for r in mine], s=34,
                            marker="^" if trained else "o", color=colour,
                            label=family + (", trained" if trained else ""),
                        )  # fmt: skip
            front = sorted((r for r in done if r.on_front), key=lambda r: r.bytes or 0)
            axes.plot(
                [(r.bytes or 0) / 1e6 for r in front], [100 * _shown(r) for r in front],
                color=REFERENCE, linewidth=1, zorder=0, label="best at its size",
            )  # fmt: skip
            axes.set(
                yscale="log", xlabel="megabytes on disk", ylabel=f"worst rise of {self.metric}, %"
                if self.metric not in HIGHER_IS_BETTER else f"worst loss of {self.metric}, %",
            )  # fmt: skip
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return figure


def leaderboard(
    model: nn.Module,
    data: Data | Batches,
    texts: Mapping[str, Batches],
    budgets: Sequence[Budget],
    methods: Sequence[str | type[Compressor] | Compressor] | None = None,
    tier: Tier = "tuning-free",
    *,
    metric: Metric | None = None,
    seed: int = 0,
    latency_runs: int = 20,
    progress: bool = True,
) -> Leaderboard:
    """Compress a model with every method at every budget that the method can be told, and judge the results.

    Args:
        model: any module; left as it is.
        data: calibration and training part, and a validation part for methods that choose.
        texts: what is judged on, by name; more than one shows what is lost outside the calibration data.
        budgets: sizes.
        methods: names of `methods()`, classes or instances; by default those of the tier.
        tier: "tuning-free", or "tuned" for those that train as well.
        metric: ``(model, batches) -> {name: number}``, of which the first counts; see `data.evaluate`.
        seed: of methods that are given by name or class.
        latency_runs: runs of which latency is the median; 0 measures none.
        progress: show a bar.

    Returns:
        The table.

    Raises:
        DataError: if there is no budget, no text, or a method is unknown.
    """
    if not budgets or not texts:
        raise DataError("give at least one budget and one text to judge on.")
    if tier not in ("tuning-free", "tuned"):
        raise DataError(f"tier is {tier!r}; it must be 'tuning-free' or 'tuned'.")
    given = Data.of(data)
    calibration = Data(given.train, given.val, None, given.example(), given.batch_size)
    parts = {name: Data(test=text, batch_size=given.batch_size) for name, text in texts.items()}
    contenders = [_made(method, seed) for method in (_of_tier(tier) if methods is None else methods)]
    pairs = [(method, budget) for budget in budgets for method in contenders if budget.unit in method.budgets]
    original = {name: _first(evaluate(model, part.batches("test"), metric)) for name, part in parts.items()}
    name = next(iter(original.values()))[0]
    before = {text: value for text, (_, value) in original.items()}
    rows, original_bytes = [], 0
    for method, budget in Bars(progress).track(pairs, "comparing"):
        row, bytes_before = _row(
            method, budget, model, calibration, parts, before, name, metric, latency_runs
        )
        rows.append(row)
        original_bytes = bytes_before or original_bytes
    return marked(Leaderboard(tuple(rows), before, original_bytes, name))


def _row(
    method: Compressor, budget: Budget, model: nn.Module, data: Data, parts: Mapping[str, Data],
    before: Mapping[str, float], name: str, metric: Metric | None, latency_runs: int,
) -> tuple[Row, int]:  # fmt: skip
    """One compression judged on every text, or why there is none; and the bytes of the original."""
    head = (repr(method), method.family, method.tuning_free, str(budget))
    try:
        result = method.compress(model, _for(method, data), budget, latency_runs=0, progress=False)
        quality = {
            text: _first(evaluate(result.model, part.batches("test"), metric))[1]
            for text, part in parts.items()
        }
        latency = None
        if latency_runs:
            latency = median(latencies(result.model, small_batch(data.example(), 1), latency_runs))
    except Exception as error:  # one method's failure is a row of the table, not the end of it
        return Row(*head, failure=f"{type(error).__name__}: {error}"), 0
    report = result.report
    sign = -1 if name in HIGHER_IS_BETTER else 1
    drop = {text: sign * (value / before[text] - 1) for text, value in quality.items()}
    row = Row(
        report.method, *head[1:], report.after.bytes_on_disk, report.ratio, quality, drop,
        latency, report.seconds, report.peak_memory,
    )  # fmt: skip
    return row, report.before.bytes_on_disk


def _for(method: Compressor, data: Data) -> Data:
    """The data without a validation part that the method does not use, which would only be judged on."""
    if "validation" in method.needs:
        return data
    return Data(data.train, None, None, data.example_input, data.batch_size)


def _made(method: str | type[Compressor] | Compressor, seed: int) -> Compressor:
    if isinstance(method, Compressor):
        return method
    cls = find_method(method) if isinstance(method, str) else method
    # Pruned layers are packed: what counts here are bytes, and zeros in dense storage have as many.
    packs = {"pack": True} if "pack" in inspect.signature(cls).parameters else {}
    return cls(seed=seed, **packs)  # type: ignore[arg-type]


def _of_tier(tier: Tier) -> list[type[Compressor]]:
    classes = [entry.load() for entry in ENTRIES]
    return [cls for cls in classes if cls.tuning_free or tier == "tuned"]


def _first(numbers: Mapping[str, float]) -> tuple[str, float]:
    return next(iter(numbers.items()))


def _shown(row: Row) -> float:
    """The worst drop on a logarithmic axis: an improvement counts as a hundredth of a percent."""
    return max(row.worst_drop or 0.0, 1e-4)


def marked(board: Leaderboard) -> Leaderboard:
    """The table with its front marked: the rows that no other beats in bytes and worst drop at once."""
    done = [(r.bytes, r.worst_drop) for r in board.rows if r.bytes is not None and r.worst_drop is not None]

    def beaten(row: Row) -> bool:
        mine = row.bytes, row.worst_drop
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in done)  # type: ignore[operator]

    rows = [replace(row, on_front=row.bytes is not None and not beaten(row)) for row in board.rows]
    return replace(board, rows=tuple(rows))
