"""Draw a progress bar with an estimate of the time left.

| where | what is drawn |
|---|---|
| terminal | a bar on the error stream |
| notebook | a bar under the cell, which goes when the work is done |
| elsewhere (a pipe, a log file) | a line on the error stream now and then |
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from html import escape

Advance = Callable[[int], None]
"""Takes how much was done since the last call."""
REDRAW = 0.25
"""Seconds between two states of a notebook's bar."""


def wanted(progress: bool | None) -> bool:
    """Return whether a function of Python draws a bar; None draws in a terminal and in a notebook."""
    return sys.stderr.isatty() or _in_notebook() if progress is None else progress


@contextlib.contextmanager
def bar(what: str, total: int, quiet: bool = False) -> Iterator[Advance]:
    """Return a function that takes how much was done.

    Args:
        what: the work, in a word or two.
        total: how much there is.
        quiet: draw nothing.
    """
    if quiet:
        yield lambda n: None
    elif _in_notebook():
        with _under_the_cell(what, total) as advance:
            yield advance
    elif sys.stderr.isatty():
        with _on_the_terminal(what, total) as advance:
            yield advance
    else:
        yield _lines(what, total)


@contextlib.contextmanager
def _on_the_terminal(what: str, total: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


@contextlib.contextmanager
def _under_the_cell(what: str, total: int) -> Iterator[Advance]:
    from IPython.display import HTML, display

    clock, handle = _Clock(what, total, REDRAW), display(HTML(""), display_id=True)
    assert handle is not None

    def advance(n: int) -> None:
        if (words := clock.tick(n)) is not None:
            share = f'<progress value="{clock.done}" max="{max(1, total)}"></progress>'
            handle.update(HTML(f"<div>{share} {escape(words)}</div>"))

    try:
        yield advance
    finally:
        handle.update(HTML(""))


class _Clock:
    """Count what was done, and say at most every so many seconds how much is left."""

    def __init__(self, what: str, total: int, every: float):
        self.what, self.total, self.every, self.done = what, total, every, 0
        self.started = self.told = time.monotonic()

    def tick(self, n: int) -> str | None:
        """Return what to show; None where the last words are fresh."""
        self.done += n
        now = time.monotonic()
        if now - self.told < self.every or not self.done:
            return None
        self.told = now
        left = (now - self.started) / self.done * (self.total - self.done)
        return f"{self.what}: {self.done} of {self.total}, {left:.0f} s left"


def _lines(what: str, total: int, every: float = 15.0) -> Advance:
    """Print a line at most every so many seconds."""
    clock = _Clock(what, total, every)

    def tick(n: int) -> None:
        if (words := clock.tick(n)) is not None:
            print(words, file=sys.stderr, flush=True)

    return tick


__all__ = ["Advance", "bar", "wanted"]
