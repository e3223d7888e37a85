"""`mech-absa generate`, or `python -m mech_absa.generate`: write the built-in review world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..world import write_world
from .cli import command


@dataclass(frozen=True)
class Config:
    """Write the built-in review world as JSON lines.

    Examples:
      mech-absa generate --out world
    """

    out: Path
    """A new or empty folder, which will hold {domain}/{train,test}.jsonl."""
    seed: int = 0
    """The same seed writes the same bytes."""


def run(config: Config) -> None:
    """Write the files and name them."""
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ConfigError(f"--out {config.out} is not an empty folder; give a new or an empty one")
    for path in write_world(config.out, config.seed):
        print(path)
    first = config.out / "restaurant" / "train.jsonl"
    print(f"Wrote the built-in reviews; trace some: mech-absa patch --data {first} --limit 40")


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, run, "mech_absa.generate", argv)
