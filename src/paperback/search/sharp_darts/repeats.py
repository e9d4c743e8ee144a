"""The same search with several seeds, on any engine of the wing; and architectures out of stored trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from paperback.errors import DataError
from paperback.search.engine import Engine, open_engine
from paperback.search.interface import SearchResult, Trial
from paperback.search.sharp_darts.cells import Genotype
from paperback.search.sharp_darts.cuboid import Chain
from paperback.search.sharp_darts.search import DifferentiableSearch
from paperback.search.sharp_darts.unrolled import Loss, Rows


def search_seeds(
    search: DifferentiableSearch,
    seeds: Sequence[int],
    train: Rows,
    val: Rows,
    loss: Loss = nn.functional.cross_entropy,
    *,
    engine: str | Engine = "local",
    workers: int | None = None,
) -> SearchResult:
    """The same search with several seeds, on any engine; a seed that fails costs only itself.

    Args:
        search: its own seed is not used.
        seeds: one search each, at least one.
        train: as in `DifferentiableSearch.start`.
        val: as there.
        loss: as there.
        engine: see `paperback.search.engine.open_engine`.
        workers: searches at once.

    Returns:
        A trial for each seed. Its configuration has the seed and the architecture as plain JSON, which
        `architecture_from` reads; its score is the accuracy of the supernet on the validation half.

    Raises:
        DataError: if there are no seeds.
    """
    if not seeds:
        raise DataError("seeds is empty; give at least one.")
    with open_engine(engine, workers or len(seeds)) as place:
        tasks = [place.submit(_found, search, seed, train, val, loss) for seed in seeds]
        waiting = list(tasks)
        while waiting:
            waiting.remove(place.wait(waiting))
    trials = []
    for number, (seed, task) in enumerate(zip(seeds, tasks, strict=True)):
        assert task.outcome is not None
        if task.outcome.error is None:
            trials.append(replace(task.outcome.value, number=number))
        else:
            error, seconds = task.outcome.error, task.outcome.seconds
            trials.append(Trial(number, {"seed": seed}, "failed", None, error, seconds))
    return SearchResult(tuple(trials), "max", sum(trial.seconds for trial in trials))


def architecture_from(config: Mapping[str, Any]) -> Genotype | Chain:
    """The architecture that a trial's configuration describes; lists of JSON become tuples.

    Raises:
        DataError: if it describes none.
    """
    if "normal" in config and "reduce" in config:
        edges = {k: tuple((str(n), int(s)) for n, s in config[k]) for k in ("normal", "reduce")}
        return Genotype(**edges)
    if "widths" in config and "operations" in config:
        return Chain(tuple(config["widths"]), tuple(config["operations"]))
    raise DataError(
        f"the configuration has {', '.join(config)}; normal and reduce, or widths and operations."
    )


def _found(search: DifferentiableSearch, seed: int, train: Rows, val: Rows, loss: Loss) -> Trial:
    """Searched in whatever process this is."""
    return replace(search, seed=seed).run(train, val, loss, progress=False).best
