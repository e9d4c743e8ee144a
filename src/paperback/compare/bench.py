"""What a task writes down so that its methods can be compared: the bench.

A wing's ``bench``, a module or a folder of them, holds one constant, ``BENCH``. It says which data are used
(the shipped ones or the user's), who is compared, and how one fitted model is measured. Everything else
(processes, limits, seeds, resuming, tables) is the same for every task and lives in this package. A bench is
data and functions; nothing in it runs before a comparison starts.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from paperback.catalogue import TASKS, check_task
from paperback.errors import PaperbackError
from paperback.study.budget import Budget

Kind = Literal["method", "baseline"]
READING = "reading.txt"  # of an artefact: sentences for the report, one a line


@dataclass(frozen=True)
class Metric:
    """One number that is measured for every contender.

    Attributes:
        name: key in the results, such as ``completion_nll``.
        label: what a person reads, such as "completion, nats per hidden variable".
        unit: "s", "B", "nats", ...; empty for a fraction or a count. Seconds and bytes are printed in the
            size that suits.
        better: whether "higher" or "lower" is better; "neither" for what only describes a contender, which is
            neither primary nor a cost.
        primary: the one metric that the leaderboard is sorted by.
        cost: what a contender costs rather than how good it is. The first cost is the horizontal axis of the
            figure.
    """

    name: str
    label: str
    unit: str = ""
    _: KW_ONLY
    better: Literal["higher", "lower", "neither"]
    primary: bool = False
    cost: bool = False


@dataclass(frozen=True)
class Contender:
    """One method or baseline of a comparison.

    Attributes:
        name: the slug of the method in the catalogue, or the name of a baseline.
        label: what a person reads.
        kind: "method" or "baseline"; baselines stand in every table.
        applies: given the data, None, or in a few words why this contender cannot be used on them.
        build: ``(data, budget, seed) -> model``, not yet fitted. It imports the method only when it is
            called.
    """

    name: str
    label: str
    kind: Kind
    applies: Callable[[Any], str | None]
    build: Callable[[Any, Budget, int], Any]


@dataclass(frozen=True)
class Bench:
    """How the methods of one task are compared.

    Attributes:
        task: one of the ten tasks.
        metrics: what is measured; exactly one is primary, and a primary is not a cost.
        contenders: who is compared; at least one is a baseline.
        load: ``(path, target, budget, seed) -> data``: the shipped data where path is None, else the user's,
            checked and split. Raises `DataError` with one clear sentence. With `takes_model` it is also
            passed ``model=``, a path or a "module:function". Data that are a `paperback.data` `Dataset`, or
            have one as their `dataset`, are described in the leaderboard.
        evaluate: ``(contender, data, budget, seed, out) -> {metric name: number or None}``: builds, fits,
            measures, and saves what came out under the folder `out`. Every metric has its key; None means
            that this contender does not have the quantity. What it has to say in words, it writes to
            `READING` in that folder, one sentence a line; the report shows the first seed's.
        seconds: about how long one job takes under a budget, for ``estimate=True``; may be left empty.
        takes_model: whether the user may bring a model (``--model``).
        models: names of models that ship, which ``--model`` takes too.
        companions: given the path of the user's data, the files beside it that `load` also reads. A change of
            one is a change of the data.
        sized: for tasks whose methods can be asked for results of several sizes: given the sizes, shares in
            (0, 1], the bench with a contender for each method and size. None where there are no sizes.
    """

    task: str
    metrics: tuple[Metric, ...]
    contenders: tuple[Contender, ...]
    load: Callable[..., Any]
    evaluate: Callable[[Contender, Any, Budget, int, Path], Mapping[str, float | None]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    takes_model: bool = False
    models: tuple[str, ...] = ()
    companions: Callable[[Path], Sequence[Path]] = lambda path: ()
    sized: Callable[[tuple[float, ...]], Bench] | None = None

    def __post_init__(self) -> None:
        primaries = [metric.name for metric in self.metrics if metric.primary and not metric.cost]
        if len(primaries) != 1:
            raise PaperbackError(
                f"the bench of {self.task} has primary metrics {primaries}; mark one that is not a cost."
            )
        for metric in self.metrics:
            if metric.better == "neither" and (metric.primary or metric.cost):
                raise PaperbackError(
                    f"the metric {metric.name!r} of the bench of {self.task} has no better side; "
                    "it can be neither primary nor a cost."
                )
        for what, names in (
            ("metric", [metric.name for metric in self.metrics]),
            ("contender", [contender.name for contender in self.contenders]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise PaperbackError(
                    f"the bench of {self.task} has two {what}s called {twice[0]!r}; names must differ."
                )
        if not any(contender.kind == "baseline" for contender in self.contenders):
            raise PaperbackError(
                f"the bench of {self.task} has no baseline; a comparison needs at least one."
            )

    @property
    def primary(self) -> Metric:
        """The metric that the leaderboard is sorted by."""
        return next(metric for metric in self.metrics if metric.primary)

    @property
    def cost(self) -> Metric | None:
        """The cost that quality is drawn against; None where the bench has none (then it is the seconds of
        the whole job).
        """
        return next((metric for metric in self.metrics if metric.cost), None)

    def contender(self, name: str) -> Contender:
        """The contender of this name.

        Raises:
            PaperbackError: naming close matches, if there is none.
        """
        for contender in self.contenders:
            if contender.name == name:
                return contender
        names = [contender.name for contender in self.contenders]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}."
        raise PaperbackError(f"the comparison of {self.task} has no method {name!r}; {hint}")

    def choose(self, methods: Sequence[str] | None) -> tuple[Contender, ...]:
        """The contenders of a comparison: the named methods (all, if None), and every baseline, in the order
        of the bench.

        Raises:
            PaperbackError: if a name is unknown.
        """
        if methods is None:
            return self.contenders
        wanted: set[str] = set()
        for name in methods:  # of a method at several sizes, "gptq@0.25", the name alone means all of them
            sizes = {each.name for each in self.contenders if each.name.startswith(f"{name}@")}
            wanted |= sizes or {self.contender(name).name}
        return tuple(
            contender
            for contender in self.contenders
            if contender.kind == "baseline" or contender.name in wanted
        )


def bench_of(task: str) -> str:
    """The import path of a task's bench.

    Args:
        task: one of the ten tasks of the catalogue.

    Returns:
        "paperback.<task>.bench:BENCH".

    Raises:
        PaperbackError: if there is no such task, or the task has no bench yet.
    """
    check_task(task)
    if not _has_bench(task):
        ready = [name for name in TASKS if _has_bench(name)]
        raise PaperbackError(
            f"{task} cannot be compared yet; what can is {', '.join(ready) or 'nothing so far'}."
        )
    return f"paperback.{task}.bench:BENCH"


def load_bench(path: str) -> Bench:
    """Import a bench from its path, "module:NAME", or "module:NAME@0.5,0.25" at these sizes.

    Raises:
        PaperbackError: if the bench has no sizes, or they are not different numbers in (0, 1].
    """
    address, _, sizes = path.partition("@")
    module, _, name = address.partition(":")
    bench = cast(Bench, getattr(importlib.import_module(module), name))
    return bench if not sizes else _at_sizes(bench, sizes)


def _at_sizes(bench: Bench, sizes: str) -> Bench:
    if bench.sized is None:
        raise PaperbackError(
            f"{bench.task} is not compared at sizes; give a budget of smoke, quick, standard or full."
        )
    try:
        shares = tuple(float(size) for size in sizes.split(","))
    except ValueError:
        shares = ()
    if not shares or len(set(shares)) < len(shares) or not all(0 < share <= 1 for share in shares):
        raise PaperbackError(f"the sizes {sizes} must be different numbers above 0 and at most 1.")
    return bench.sized(shares)


def _has_bench(task: str) -> bool:
    """Whether the wing of this task has a bench; nothing is imported to find out."""
    wing = importlib.resources.files("paperback") / task
    return (wing / "bench.py").is_file() or (wing / "bench" / "__init__.py").is_file()
