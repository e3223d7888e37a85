"""`mech-absa report`, or `python -m mech_absa.report`: one page from the folders of runs.

mech-absa report runs/trace                              report.html in that folder
mech-absa report runs/seed0 runs/seed1 --out both.html   side by side
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..errors import ConfigError
from ..report.page import write_report
from .cli import command
from .flags import OptionalPath, OptionalPaths

PAGES = (".html", ".htm")


@dataclass(frozen=True)
class Config:
    """Write one self-contained page about a run, or about several side by side.

    Examples:
      mech-absa report runs/trace
      mech-absa report runs/seed0 runs/seed1 --out both.html
    """

    folders: Positional[OptionalPaths]
    """Folders that commands left (--out)."""
    out: OptionalPath = None
    """The page. Default: report.html in the folder, or comparison.html in the first of several."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ConfigError(
                "no folder was given; at least one --out folder of a finished run is needed"
            )
        if self.out is not None and self.out.is_dir():
            raise ConfigError(
                f"--out {self.out} is a folder; a file such as {self.out / 'report.html'} is needed"
            )
        if self.out is not None and self.out.suffix.lower() not in PAGES:
            raise ConfigError(
                f"--out {self.out} is no page; a file that ends in .html is needed, so that no record is overwritten"
            )


def main(config: Config) -> Path:
    """Write the page and say where it is."""
    path = write_report(config.folders, config.out)
    print(f"{path}  ({path.stat().st_size / 2**20:.1f} MiB)")
    what = "one run" if len(config.folders) == 1 else f"{len(config.folders)} runs side by side"
    print(f"Wrote {what} as one page; open it in a browser, it needs no network.")
    return path


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.report", argv)
