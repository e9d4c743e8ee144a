"""The command line: parse, call, print.

Every command imports what it needs inside its function, so that `list`, `show` and `cite` answer at once:
they read the catalogue and the recorded results and import no torch. Errors that a user can mend are printed
as one sentence on stderr, with exit code 2; an interrupted command exits with 130, and `verify` exits with 1
when a claim fails.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

import paperback
from paperback import catalogue
from paperback.errors import PaperbackError

if TYPE_CHECKING:
    from rich.console import Console

    from paperback.catalogue import Method
    from paperback.study.finding import Finding

# Columns where the output is not a terminal: a summary stays on one line, so that grep finds it whole.
PIPE_WIDTH: Final = 200


class _Commands(TyperGroup):
    """The group of all commands. It turns what a user can mend into a sentence instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PaperbackError as error:
            typer.echo(f"paperback: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("paperback: interrupted.", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Published deep-learning methods behind one interface per task, side by side on your own data.",
)


def _slugs(incomplete: str) -> list[str]:
    return [method.slug for method in catalogue.methods() if method.slug.startswith(incomplete)]


def _tasks(incomplete: str) -> list[str]:
    return [task for task in catalogue.TASKS if task.startswith(incomplete)]


_Method = Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method.", autocompletion=_slugs)]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Budget = Annotated[
    str, typer.Option(metavar="BUDGET", help="How much is done: smoke, quick, standard or full.")
]
_Data = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Your own data: a CSV or Parquet file, an .npz, a folder of images."),
]
_Target = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column to predict, in a table.")]
_Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Where to write; a new folder if not given.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(paperback.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options of the program itself."""


@app.command("list")
def list_methods(
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Only the methods of this task.", autocompletion=_tasks)
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            metavar="WORDS", help="Only methods with all of these words in title, summary or keywords."
        ),
    ] = "",
    as_json: _Json = False,
) -> None:
    """List the methods by task, with their state."""
    found = catalogue.search(search, task)
    recorded = {method.slug: _recorded(method) for method in found}
    if as_json:
        typer.echo(_dump([_summary(method, recorded[method.slug]) for method in found]))
        return
    if not found:
        where = f" in {task}" if task else ""
        raise PaperbackError(
            f"no method{where} has the words {search!r}; `paperback list` shows all of them."
        )
    console = _console()
    for name, description in catalogue.TASKS.items():
        if of_task := [method for method in found if method.task == name]:
            console.print(f"\n[bold]{name}[/bold]  [dim]{description}[/dim]", highlight=False)
            console.print(_method_table(of_task, recorded))
    listed = f"{len(found)} of {len(catalogue.methods())} methods listed"
    built = f"{sum(method.available for method in found)} built"
    console.print(f"\n{listed}, {built}. `paperback show METHOD` tells more.", highlight=False)
    if any(recorded.values()):
        console.print(
            "[dim]n of m held: the claims of its paper that the recorded study confirmed.[/dim]",
            highlight=False,
        )


@app.command()
def show(method: _Method, as_json: _Json = False) -> None:
    """Show one method: its paper, its code, how to run it, what it found."""
    entry = catalogue.find(method)
    finding = _recorded(entry)
    if as_json:
        recorded = None if finding is None else json.loads(finding.to_json())
        typer.echo(_dump(_summary(entry, finding) | {"code": _code(entry), "recorded": recorded}))
        return
    console = _console()
    console.print(f"\n{entry.title}", style="bold", highlight=False, markup=False)
    console.print(f"{', '.join(entry.authors)} · {entry.venue} {entry.year}\n", highlight=False, markup=False)
    console.print(entry.summary + "\n", highlight=False, markup=False)
    console.print(_facts(entry))
    if finding is not None:
        _print_claims(finding, console)


@app.command()
def cite(method: _Method) -> None:
    """Print the BibTeX entry of a method's paper."""
    typer.echo(catalogue.find(method).bibtex())


@app.command()
def run(
    method: _Method,
    budget: _Budget = "quick",
    data: _Data = None,
    target: _Target = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many seeds; the study's own if not given.")
    ] = None,
    out: _Out = None,
    quiet: _Quiet = False,
) -> None:
    """Run the study of a method and write its report."""
    from paperback.study import run_study
    from paperback.study.budget import check_budget

    run_study(
        method,
        budget=check_budget(budget),
        seeds=seeds,
        out=out,
        data=data,
        target=target,
        progress=not quiet,
    )


@app.command()
def verify(
    methods: Annotated[
        list[str] | None,
        typer.Argument(metavar="METHOD", help="Methods; all that work if none.", autocompletion=_slugs),
    ] = None,
    budget: _Budget = "standard",
    record: Annotated[
        bool, typer.Option("--record", help="Write results/METHOD.json from complete standard runs.")
    ] = False,
    out: _Out = None,
    quiet: _Quiet = False,
) -> None:
    """Rerun studies: claimed, recorded, measured.

    Exits with 1 when a claim fails.
    """
    from paperback.study import verify as verify_studies
    from paperback.study.budget import check_budget

    code = verify_studies(
        methods or None, budget=check_budget(budget), record=record, out=out, progress=not quiet
    )
    raise typer.Exit(code)


@app.command()
def compare(
    task: Annotated[str, typer.Argument(metavar="TASK", help="One of the ten tasks.", autocompletion=_tasks)],
    data: _Data = None,
    target: _Target = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Your own model: a checkpoint folder or module:function."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Only these methods, besides the baselines; all if not given."),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="BUDGET",
            help="How much is done: smoke, quick, standard or full; or, for tasks that make models smaller, "
            "the sizes, such as 0.5,0.25; or both, such as standard:0.5,0.25.",
        ),
    ] = "quick",
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="How many seeds per method.")] = 3,
    engine: Annotated[str, typer.Option(metavar="ENGINE", help="local, ray, or ray:ADDRESS.")] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How many jobs at once; if not given one, on Ray one per CPU."),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Limit of one job; by budget if not given.")
    ] = None,
    memory_limit: Annotated[
        float | None,
        typer.Option(min=0, metavar="GB", help="Limit of one job; a share of what is free if not given."),
    ] = None,
    out: _Out = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what would run and about how long it takes.")
    ] = False,
    quiet: _Quiet = False,
) -> None:
    """Rank the methods of a task on the same data, by quality and cost."""
    catalogue.check_task(task)
    from paperback.compare import compare as compare_methods

    effort, sizes = _effort_and_sizes(budget)
    compare_methods(
        task,
        data=data,
        target=target,
        model=model,
        methods=None if methods is None else [name.strip() for name in methods.split(",") if name.strip()],
        budget=effort,
        sizes=sizes,
        seeds=seeds,
        engine=engine,
        jobs=jobs,
        time_limit=time_limit,
        memory_limit=memory_limit,
        out=out,
        progress=not quiet,
        estimate=estimate,
    )


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="lm-tiny, resnet-fashion, a checkpoint folder, or module:function."
        ),
    ],
    method: Annotated[str, typer.Option(metavar="NAME", help="Which method, such as gptq or dsnot.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the compressed model goes.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A text to calibrate on, or images with labels; shipped if none."),
    ] = None,
    sparsity: Annotated[float | None, typer.Option(metavar="S", help="Share of zeros, of pruners.")] = None,
    bits: Annotated[int | None, typer.Option(metavar="B", help="Bits of a weight, of quantizers.")] = None,
    nm: Annotated[str | None, typer.Option(metavar="N:M", help="Keep N of every M weights.")] = None,
    ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Share of the original's bytes, as a budget.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another setting of the method.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of calibration text.")] = 128,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the choice of rows.")] = 0,
    quiet: _Quiet = False,
) -> None:
    """Make a trained model smaller, and report what it cost."""
    from paperback.compress import Budget
    from paperback.compress.command import compress_command, settings_from

    settings = settings_from(setting or [])
    settings |= {name: v for name, v in (("sparsity", sparsity), ("bits", bits)) if v is not None}
    if nm is not None:
        try:
            settings["nm"] = tuple(int(part) for part in nm.split(":"))
        except ValueError:
            raise PaperbackError(f"--nm {nm}: give two numbers, such as 2:4.") from None
    budget = Budget(ratio=ratio) if ratio is not None else None
    result = compress_command(
        model, method, settings, out, data=data, budget=budget, rows=rows, seed=seed, progress=not quiet
    )
    _console().print(_size_table(result.report))
    for note in result.report.notes:
        typer.echo(note)
    typer.echo(f"{out}: model, report.json and report.md with a row for each layer.")


def _size_table(report: Any) -> Any:
    """What a compression did, without the layers."""
    from rich.table import Table

    from paperback.study.wording import size

    table = Table("", "before", "after", box=None)
    table.add_row("on disk", size(report.before.bytes_on_disk), size(report.after.bytes_on_disk))
    table.add_row("non-zero weights", f"{report.before.nonzeros:,}", f"{report.after.nonzeros:,}")
    if report.before.latency is not None:
        latencies = (report.before.latency, report.after.latency)
        table.add_row("latency of one row", *(f"{1000 * seconds:.3g} ms" for seconds in latencies))
    for name, after in report.quality_after.items():
        before = report.quality_before.get(name)
        table.add_row(name, "" if before is None else f"{before:.4g}", f"{after:.4g}")
    return table


def _effort_and_sizes(budget: str) -> tuple[str, list[float] | None]:
    """ "quick", "0.5,0.25" or "quick:0.5,0.25" as how much is done and the sizes that are asked for."""
    effort, colon, sizes = budget.partition(":")
    if not colon and effort[:1] in "0123456789.":
        effort, sizes = "quick", budget
    if not sizes:
        return effort, None
    try:
        return effort, [float(size) for size in sizes.split(",")]
    except ValueError:
        raise PaperbackError(f"--budget {budget}: {sizes} must be numbers, such as 0.5,0.25.") from None


# -- what list and show print ----------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _recorded(method: Method) -> Finding | None:
    """The recorded finding of a method that works; a method that is not there has none to look for."""
    if not method.available:
        return None
    from paperback.study.record import read

    return read(method.slug)


def _summary(method: Method, finding: Finding | None) -> dict[str, Any]:
    """The entry for JSON, with how many of its recorded claims got which verdict."""
    verdicts = None if finding is None else dict(Counter(claim.verdict for claim in finding.claims))
    return asdict(method) | {"available": method.available, "verdicts": verdicts}


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _state(method: Method, finding: Finding | None) -> str:
    """What a method's row says of it: "not yet", "works", or how many of its recorded claims held."""
    if not method.available:
        return "[dim]not yet[/dim]"
    if finding is None:
        return "[green]works[/green]"
    held = sum(claim.verdict == "held" for claim in finding.claims)
    colour = "green" if held == len(finding.claims) else "yellow"
    return f"[{colour}]{held} of {len(finding.claims)} held[/]"


def _method_table(methods: Iterable[Method], recorded: dict[str, Finding | None]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    longest = max(len(method.slug) for method in catalogue.methods())
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(justify="right", width=2, style="dim")
    table.add_column(width=longest, no_wrap=True, style="bold")
    table.add_column(width=4, style="dim")
    table.add_column(ratio=1, overflow="fold")
    table.add_column(min_width=7, no_wrap=True)
    for method in methods:
        state = _state(method, recorded[method.slug])
        table.add_row(str(method.number), method.slug, str(method.year), escape(method.summary), state)
    return table


def _code(method: Method) -> dict[str, str]:
    """Where the parts of a method lie on this machine; only those that are there."""
    package = Path(paperback.__file__).resolve().parent
    module = Path(*method.module.split(".")[1:])
    wing, name = module.parts[0], module.parts[-1]
    places = {
        "method": package / module,
        "study": package / wing / "studies" / name,
        "tests": package.parents[1] / "tests" / wing / f"test_{name}",
        "benchmark": package.parents[1] / "benchmarks" / wing / name,
    }
    candidates = {part: (path.with_suffix(".py"), path) for part, path in places.items()}
    found = {
        part: next((path for path in paths if path.exists()), None) for part, paths in candidates.items()
    }
    return {part: str(path) for part, path in found.items() if path is not None}


def _facts(method: Method) -> Any:
    from rich.markup import escape
    from rich.table import Table

    extras = f'pip install "paperback[{",".join(method.needs)}]"' if method.needs else "no extras"
    facts = {
        "number": str(method.number),
        "task": f"{method.task}: {catalogue.TASKS[method.task]}",
        "paper": f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else "",
        "published code": f"https://github.com/{method.reference}" if method.reference else "",
        "keywords": ", ".join(method.keywords),
        "needs": extras,
        "import": "from {} import {}".format(*method.object.split(":")) if method.available else "",
        **_code(method),
        "run": f"paperback run {method.slug}" if method.available else "not yet: this method is not built",
        "compare": f"paperback compare {method.task} --methods {method.slug}" if _in_bench(method) else "",
        "cite": f"paperback cite {method.slug}",
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            table.add_row(name, escape(value))
    return table


def _in_bench(method: Method) -> bool:
    """Whether the bench of the method's task compares it; some methods have nothing to compete in there.

    The names of contenders are looked for in the bench's text: importing it would import torch.
    """
    if not method.available:
        return False
    wing = resources.files("paperback") / method.task
    folder = wing / "bench"
    files = list(folder.iterdir()) if folder.is_dir() else [wing / "bench.py"]
    texts = [
        file.read_text(encoding="utf-8") for file in files if file.name.endswith(".py") and file.is_file()
    ]
    return any(f'"{method.slug}"' in text for text in texts)


def _print_claims(finding: Finding, console: Console) -> None:
    """The recorded claims, as a run prints its own."""
    from rich.markup import escape
    from rich.table import Table

    from paperback.study.terminal import bar_text, measured_text, verdict_text
    from paperback.study.wording import count, duration

    commit = f", commit {finding.environment.commit}" if finding.environment.commit else ""
    seeds, took = count(len(finding.seeds), "seed"), duration(finding.seconds)
    console.print(f"\nRecorded on {finding.started[:10]}: {seeds}, {took}{commit}\n", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for claim in finding.claims:
        paper = f"; paper: {claim.paper}" if claim.paper else ""
        numbers = f"{measured_text(claim)}; bar: {bar_text(claim)}{paper}"
        table.add_row(verdict_text(claim), f"{escape(claim.statement)}\n[dim]{escape(numbers)}[/]")
    console.print(table, highlight=False)
