"""Progress bars of a run: nested, on stderr, gone when done, and silent where nobody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


class Bars:
    """The bars of one run on one display; a bar begun inside another stands below it.

    Args:
        enabled: False for no output at all.
        console: where to draw; stderr if not given. Bars are drawn on terminals only, lines of text
            everywhere.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        if console is None:
            # The bar of a training nests in the bars of a study only where both draw on one console.
            from paperback.training.progress import console as shared_console

            console = shared_console()
        self.console = console
        self.enabled = enabled
        self._display: Progress | None = None

    def track(self, iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
        """Yield from an iterable under a bar.

        Args:
            iterable: what to go through.
            description: what is being done, a few words.
            total: how many items; its length if not given, an open end if it has none.
        """
        if not (self.enabled and self.console.is_terminal):
            yield from iterable
            return
        outermost = self._display is None
        display = self._display if self._display is not None else self._begin()
        task = display.add_task(
            description, total=total if total is not None else length_hint(iterable) or None
        )
        try:
            for item in iterable:
                yield item
                display.advance(task)
        finally:
            display.remove_task(task)
            if (
                outermost
            ):  # the display lives only while something is tracked, so that a study may draw its own between
                display.stop()
                self._display = None

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        if self.enabled:
            self.console.print(text, style="dim", markup=False, highlight=False)

    def _begin(self) -> Progress:
        self._display = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._display.start()
        return self._display
