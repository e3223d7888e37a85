"""Draw a progress bar with an estimate of the time left, on the error stream.

If the error stream is no terminal, nothing is drawn, so output can be piped; a log file gets a line
now and then instead.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Return a function that takes how much was done.

    Args:
        what: the work, in a word or two.
        total: how much there is.
        quiet: draw nothing.
    """
    if quiet:
        yield lambda n: None
        return
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
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


def _lines(what: str, total: int, every: float = 15.0) -> Callable[[int], None]:
    """Print a line at most every so many seconds."""
    started = last = time.monotonic()
    done = 0

    def tick(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= every and done:
            last = now
            left = (now - started) / done * (total - done)
            print(f"{what}: {done} of {total}, {left:.0f} s left", file=sys.stderr, flush=True)

    return tick
