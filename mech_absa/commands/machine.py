"""Describe the machine, and whether others use it: for `doctor`, and for the warning before a
sweep.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from ..records import versions

BUSY = 0.5
"""Cores that other processes may use before a thread per core stops paying."""


@dataclass(frozen=True)
class Machine:
    """A machine as this process sees it.

    Attributes:
        system: operating system and processor.
        versions: of Python and of the packages that a result depends on.
        cores: that this process may use.
        threads: that PyTorch uses for one operation.
        others: cores that other processes are using now.
        memory_gib, free_gib: of the machine.
        devices: accelerators, each with its memory.
    """

    system: str
    versions: dict[str, str]
    cores: int
    threads: int
    others: float
    memory_gib: float
    free_gib: float
    devices: tuple[str, ...]

    @classmethod
    def here(cls) -> Machine:
        """Return this machine, watched for a fifth of a second."""
        memory = psutil.virtual_memory()
        return cls(
            f"{platform.system()} {platform.machine()}",
            versions(),
            cores(),
            torch.get_num_threads(),
            others(),
            memory.total / 2**30,
            memory.available / 2**30,
            devices(),
        )

    def record(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return asdict(self)


def cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


def devices() -> tuple[str, ...]:
    """Return the accelerators that PyTorch can use."""
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)


def others(seconds: float = 0.2) -> float:
    """Return how many cores other processes use, watched for so many seconds."""
    own = psutil.Process()
    before = own.cpu_times()
    share: float = psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)
    after = own.cpu_times()
    mine: float = (after.user + after.system - before.user - before.system) / seconds
    return max(0.0, share - mine)


def crowding(threads: int, available: int, used_by_others: float) -> str | None:
    """Return a warning where threads wait for cores that others use; None where there is room.

    One thread that waits for its core holds up all others at the end of every operation, so that two
    threads on two cores, one of them busy, are several times slower than one.

    Args:
        threads: of PyTorch, in this process.
        available: cores.
        used_by_others: cores that other processes use.

    Example:
        >>> crowding(threads=1, available=2, used_by_others=1.9) is None
        True
        >>> crowding(threads=2, available=2, used_by_others=1.0)
        'other processes use 1.0 of 2 cores, and PyTorch runs 2 threads that wait for each other; \
OMP_NUM_THREADS=1 is faster here'
    """
    if threads == 1 or used_by_others < BUSY or threads + used_by_others <= available + BUSY:
        return None
    free = max(1, int(available - used_by_others))
    return (
        f"other processes use {used_by_others:.1f} of {available} cores, and PyTorch runs {threads} "
        f"threads that wait for each other; OMP_NUM_THREADS={free} is faster here"
    )


def crowded() -> str | None:
    """Return `crowding` of this machine now."""
    threads = torch.get_num_threads()
    return None if threads == 1 else crowding(threads, cores(), others())
