"""The progress bar of a training: epoch, loss, rows per second, time remaining."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int, str], None]
PERIOD = 0.1  # seconds between two updates of the bar


@cache
def console() -> Console:
    """The console that bars are drawn on, stderr. Bars nest when all of them use this one."""
    return Console(stderr=True)


@contextmanager
def bar(
    description: str, steps: int, rows_per_step: float, done: int = 0, show: bool = True
) -> Iterator[Advance]:
    """A bar over the steps of a training; nothing is printed where the output is not a terminal.

    Args:
        description: what is trained, a word or two.
        steps: number of steps of the whole training.
        rows_per_step: rows that one step takes in, over all processes.
        done: steps that a checkpoint has already.
        show: False makes a bar that shows nothing.

    Yields:
        A function of the number of steps done so far and a text such as the loss.
    """
    if not (show and console().is_terminal):
        yield lambda step, text: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TextColumn("{task.fields[rate]}", style="dim"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(description, total=steps, completed=done, text="", rate="")
        start = last = time.perf_counter()

        def advance(step: int, text: str) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= PERIOD:
                last = now
                rate = (step - done) * rows_per_step / (now - start)
                progress.update(task, completed=step, text=text, rate=f"{rate:,.0f} rows/s")

        yield advance
