"""Compare the methods of a task: the one function that a user calls.

It finds the bench of the task, checks the user's data, makes one job for every contender and seed, runs those
that have no result yet, and sums up. All state is in the output folder, so that a comparison that was
interrupted, in whatever way, goes on where it was when it is started again with the same folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from paperback.compare.bench import Bench, Contender, bench_of, load_bench
from paperback.compare.engine import Engine, open_engine, run_all
from paperback.compare.job import Job, Result, content_hash, fingerprint, read_result, write_json
from paperback.compare.leaderboard import DataNote, Leaderboard, Row, build_rows, note_on, write_tables
from paperback.compare.runner import Limits
from paperback.compare.terminal import Display, print_estimate, print_leaderboard
from paperback.compare.worker import load_data
from paperback.errors import DataError, PaperbackError
from paperback.study.budget import Budget, check_budget, for_budget
from paperback.study.environment import describe_environment
from paperback.study.finding import Environment
from paperback.study.wording import one_sentence

GIGABYTE = 1_000_000_000
SPECIFICATION = "comparison.json"


@dataclass(frozen=True)
class Plan:
    """A comparison that has been checked and can start.

    Attributes:
        bench: of the task.
        contenders: who takes part.
        refused: rows of those that get no job, by name.
        jobs: one per other contender and seed, in the order in which they start.
        seeds: of the fits.
        budget: of every job.
        data: what it runs on.
        environment: versions and machine.
        folder: where everything goes.
        specification: what must be equal for results in the folder to be used.
    """

    bench: Bench
    contenders: tuple[Contender, ...]
    refused: dict[str, Row]
    jobs: tuple[Job, ...]
    seeds: tuple[int, ...]
    budget: Budget
    data: DataNote
    environment: Environment
    folder: Path
    specification: dict[str, Any]


def compare(
    task: str,
    *,
    data: str | Path | None = None,
    target: str | None = None,
    model: str | Path | None = None,
    methods: Sequence[str] | None = None,
    budget: str = "quick",
    sizes: Sequence[float] | None = None,
    seeds: int | Sequence[int] = 3,
    engine: str = "local",
    jobs: int | None = None,
    time_limit: float | None = None,
    memory_limit: float | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    estimate: bool = False,
    bench: str | None = None,
) -> Leaderboard:
    """Run the methods of a task on the same data and rank them.

    Each contender and seed runs in its own process; one that fails, hangs or needs too much memory becomes a
    row that says why. Started again with the same `out`, only what has no result, or a failed one, is run.

    Args:
        task: one of the ten tasks, such as "density".
        data: the user's data; the shipped ones if not given. The bench of the task says which files it takes.
        target: name of the target column, for tables.
        model: the user's model, for tasks that act on one: a folder or file, or "module:function".
        methods: names of the methods to compare; all if not given. Baselines are always there.
        budget: "smoke", "quick", "standard" or "full".
        sizes: for tasks that make models smaller: the sizes to compare at, shares of the original in (0, 1];
            the bench's own if not given.
        seeds: how many (0, 1, 2, ...), or which.
        engine: "local", "ray" or "ray:ADDRESS".
        jobs: how many jobs run at once; if not given one here, and as many as there are CPUs on Ray.
        time_limit: seconds per job; if not given 120 (smoke), 300 (quick), 1800 (standard), 24 hours (full).
        memory_limit: gigabytes per job; if not given 80 % of what is available, divided by the jobs at once.
        out: output folder; a new one under ``runs/`` if not given.
        progress: print progress, and the leaderboard at the end.
        estimate: only print what would be run, its limits, and about how long it takes.
        bench: import path "module:NAME" of another bench than the task's own.

    Returns:
        The leaderboard; its files are in `Leaderboard.folder`.

    Raises:
        PaperbackError: if an argument, the folder or the engine cannot be used.
        DataError: if the data cannot be used; nothing has been started then.
    """
    bench = bench or bench_of(task)
    if sizes is not None:
        bench = f"{bench}@{','.join(map(str, sizes))}"
    plan = _plan(task, data, target, model, methods, check_budget(budget), _seeds(seeds), out, bench)
    limits = _limits(plan.budget, time_limit, memory_limit, jobs)
    if estimate:
        known = _known(plan)
        leaderboard = _leaderboard(plan, known)
        if progress:
            at_once = jobs or (1 if engine == "local" else None)
            print_estimate(leaderboard, _expected_seconds(plan, known), len(plan.jobs), limits, at_once)
        return leaderboard
    with open_engine(engine, jobs, limits) as place, _owned(plan):
        leaderboard = _run(plan, place, progress)
    if progress:
        print_leaderboard(leaderboard)
    return leaderboard


def _run(plan: Plan, engine: Engine, progress: bool) -> Leaderboard:
    """Run the jobs that have no result, or a failed one, and write the leaderboard; also when interrupted."""
    known = _known(plan)
    waiting = [job for job in plan.jobs if job not in known or known[job].status == "failed"]
    done_before = len(plan.jobs) - len(waiting)
    with Display(progress, len(plan.jobs), done_before, plan.bench.primary) as display:
        try:
            # Closed at once when the loop is left, not when the traceback is gone: what still runs must end.
            with closing(run_all(waiting, plan.folder / "jobs", engine, display.start)) as ended:
                for job, result in ended:
                    known[job] = result
                    display.end(job, result)
        except KeyboardInterrupt:
            display.interrupted(plan.folder)
            raise
        finally:
            leaderboard = write_leaderboard(_leaderboard(plan, known))
    return leaderboard


def write_leaderboard(leaderboard: Leaderboard) -> Leaderboard:
    """Write the JSON, CSV, figure and HTML of a leaderboard into its folder, and return it."""
    from paperback.compare.figure import write_figure
    from paperback.compare.report import write_report

    write_tables(leaderboard)
    write_report(leaderboard, write_figure(leaderboard))
    return leaderboard


def _plan(
    task: str,
    data: str | Path | None,
    target: str | None,
    model: str | Path | None,
    methods: Sequence[str] | None,
    budget: Budget,
    seeds: tuple[int, ...],
    out: str | Path | None,
    bench_path: str,
) -> Plan:
    """Check everything that can be checked before a job starts."""
    bench = load_bench(bench_path)
    contenders = bench.choose(methods.split(",") if isinstance(methods, str) else methods)
    path = Path(data).expanduser().resolve() if data is not None else None
    model_path, model_hash = _check_model(bench, model)
    environment = describe_environment()
    specification = {
        "task": task,
        "bench": bench_path,
        "data": content_hash(path) if path is not None else None,
        "files beside the data": _companions(bench, path),
        "target": target,
        "model": model_hash,
        "budget": budget,
        "paperback": environment.versions["paperback"],
        "commit": environment.commit,
    }
    template = Job(bench_path, "", 0, budget, str(path) if path is not None else None, target, model_path, "")
    loaded = load_data(bench, template)
    refused = {
        contender.name: row for contender in contenders if (row := _refusal(contender, loaded)) is not None
    }
    jobs = tuple(
        replace(
            template,
            contender=contender.name,
            seed=seed,
            fingerprint=fingerprint(**specification, contender=contender.name, seed=seed),
        )
        for seed in seeds  # seed by seed, so that a comparison that is cut short has something of everybody
        for contender in contenders
        if contender.name not in refused
    )
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(out).expanduser() if out is not None else Path("runs", f"compare-{task}-{budget}-{stamp}")
    _check_folder(folder, specification)
    return Plan(
        bench,
        contenders,
        refused,
        jobs,
        seeds,
        budget,
        note_on(loaded, path),
        environment,
        folder,
        specification,
    )


def _companions(bench: Bench, path: Path | None) -> dict[str, str] | None:
    """Name and hash of the files that are read with the user's data; None where there are none."""
    found = bench.companions(path) if path is not None else ()
    return {file.name: content_hash(file) for file in found} or None


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise PaperbackError(
            f"seeds is {seeds}; give a number of at least 1, or different numbers of at least 0."
        )
    return chosen


def _limits(budget: Budget, time_limit: float | None, memory_limit: float | None, jobs: int | None) -> Limits:
    for name, value in (("time_limit", time_limit), ("memory_limit", memory_limit), ("jobs", jobs)):
        if value is not None and not value > 0:
            raise PaperbackError(f"{name} is {value}; it must be above zero.")
    seconds = for_budget(budget, smoke=120.0, quick=300.0, standard=1800.0, full=86_400.0)
    memory = round(memory_limit * GIGABYTE) if memory_limit is not None else None
    return Limits(time_limit if time_limit is not None else seconds, memory, side_by_side=jobs or 1)


def _check_model(bench: Bench, model: str | Path | None) -> tuple[str | None, str | None]:
    """The user's model as the jobs get it, and what its identity is: the hash of its files, or the name of
    its function.
    """
    if model is None:
        return None, None
    if not bench.takes_model:
        raise PaperbackError(f"{bench.task} is compared on data, it takes no model; leave --model out.")
    if str(model) in bench.models:
        return str(model), str(model)
    path = Path(model).expanduser().resolve()
    if path.exists():
        return str(path), content_hash(path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", str(model)):
        return str(model), str(model)
    ships = f"one that ships ({', '.join(bench.models)}), " if bench.models else ""
    raise DataError(f"there is no model at {model}; give {ships}a folder, a file, or module:function.")


def _refusal(contender: Contender, data: Any) -> Row | None:
    """The row of a contender that gets no job, because it does not apply to the data or cannot say whether it
    does.
    """
    try:
        reason = contender.applies(data)
    except Exception as error:  # one contender's mistake must not take the others down
        return Row(contender.name, contender.label, contender.kind, "failed", one_sentence(error))
    if reason is None:
        return None
    return Row(contender.name, contender.label, contender.kind, "does not apply", reason)


def _check_folder(folder: Path, specification: dict[str, Any]) -> None:
    """Refuse a folder that holds something else, or a comparison of another specification."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise PaperbackError(f"{folder} is a file; give a folder for the results.")
    if all(path.name.startswith(".") for path in folder.iterdir()):
        return
    try:
        earlier = json.loads((folder / SPECIFICATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict):
        raise PaperbackError(
            f"{folder} holds something that is not a comparison; give a new or empty folder."
        )
    different = [name for name in specification if earlier.get(name) != specification[name]]
    if different:
        raise PaperbackError(
            f"{folder} holds a comparison that differs in {' and '.join(different)}; "
            "give another folder, or the same arguments to resume."
        )


@contextmanager
def _owned(plan: Plan) -> Iterator[None]:
    """Own the output folder, for two comparisons in one would remove each other's files; a lock ends with its
    process.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(plan.folder / ".lock", timeout=0):
            write_json(plan.folder / SPECIFICATION, plan.specification)
            yield
    except Timeout:
        raise PaperbackError(
            f"another comparison is running in {plan.folder}; wait for it, or give another folder."
        ) from None


def _known(plan: Plan) -> dict[Job, Result]:
    """The results that the folder already holds."""
    results = {job: read_result(plan.folder / "jobs" / job.name, job.fingerprint) for job in plan.jobs}
    return {job: result for job, result in results.items() if result is not None}


def _leaderboard(plan: Plan, known: dict[Job, Result]) -> Leaderboard:
    by_contender: dict[str, dict[int, Result]] = {}
    for job, result in known.items():
        by_contender.setdefault(job.contender, {})[job.seed] = result
    return Leaderboard(
        task=plan.bench.task,
        budget=plan.budget,
        seeds=plan.seeds,
        complete=len(known) == len(plan.jobs),
        data=plan.data,
        metrics=plan.bench.metrics,
        rows=build_rows(plan.bench, plan.contenders, plan.seeds, plan.refused, by_contender),
        environment=plan.environment,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        folder=plan.folder,
    )


def _expected_seconds(plan: Plan, known: dict[Job, Result]) -> dict[str, float | None]:
    """About how long the jobs that wait will take, by contender: as its done jobs took, or as the bench says;
    None if nobody knows.
    """
    expected: dict[str, float | None] = {}
    for contender in plan.contenders:
        own = [job for job in plan.jobs if job.contender == contender.name]
        done = [
            result.seconds
            for job in own
            if (result := known.get(job)) and result.status == "done" and result.seconds
        ]
        waiting = len(own) - len(done)
        each = sum(done) / len(done) if done else plan.bench.seconds.get(plan.budget)
        if own:
            expected[contender.name] = waiting * each if each is not None else None if waiting else 0.0
    return expected
