"""`python -m mech_absa.train.matrix`; see `commands/matrix.py`."""

import sys

from ...commands.cli import start


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("matrix", argv)


if __name__ == "__main__":
    sys.exit(cli())
