"""`python -m mech_absa.explore`; see `commands/explore.py`."""

import sys

from ..commands.cli import start


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("explore", argv)


if __name__ == "__main__":
    sys.exit(cli())
