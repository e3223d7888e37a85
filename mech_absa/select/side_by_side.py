"""Do the trainings of a study in several processes.

Every process makes the study anew and trains each `jobs`-th place of it; finished trainings are
files in one folder, so that the process that asked reads them there. Which process trains a place
depends on the number of processes alone: a study that was killed goes on to the same bytes.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..errors import ConfigError, MechAbsaError
from .trainings import Layers, Trainings

LOOK = 0.2
"""Seconds between two looks at the folder."""


def train_side_by_side(
    make: Callable[[], Trainings],
    jobs: int,
    parts: Path,
    done: Callable[[int], None] = lambda n: None,
    must: Sequence[Layers] = (),
    seconds: float = float("inf"),
) -> list[int]:
    """Train what is missing in `jobs` processes, and wait for them.

    The threads of this process are divided among them. A process holds a model of its own, and
    `Settings.memory` counts for each.

    Args:
        make: returns the study; it is sent to the processes, so that it must be picklable.
        jobs: processes.
        parts: the folder of the trainings.
        done: told how many more files lie there.
        must, seconds: as of `Trainings.run`, counted by each process from its start.

    Returns:
        The exit code of each process: 0, or what ended it. What such a process did not train is
        missing in the folder.

    Raises:
        ConfigError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ConfigError(f"{jobs} processes were asked for; accepted: 1 or more")
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=_work, args=(make, (i, jobs), threads, tuple(must), seconds), daemon=True
        )
        for i in range(jobs)
    ]
    seen = 0
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(LOOK)
                seen = _tell(parts, seen, done)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
    _tell(parts, seen, done)
    return [int(worker.exitcode or 0) for worker in workers]


def _tell(parts: Path, seen: int, done: Callable[[int], None]) -> int:
    """Tell of the trainings that came since, and return how many there are."""
    now = sum(1 for _ in parts.glob("*.json"))
    if now > seen:
        done(now - seen)
    return now


def _work(
    make: Callable[[], Trainings],
    share: tuple[int, int],
    threads: int,
    must: tuple[Layers, ...],
    seconds: float,
) -> None:
    """Train one share; run in a process of its own.

    A refused study says nothing here: the process that asked meets the same refusal and says it.
    """
    torch.set_num_threads(threads)
    try:
        make().run(must=must, seconds=seconds, share=share)
    except MechAbsaError:
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["train_side_by_side"]
