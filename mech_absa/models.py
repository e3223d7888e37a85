"""`python -m mech_absa.models`; see `commands/models.py`."""

import sys

from .commands.cli import start


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("models", argv)


if __name__ == "__main__":
    sys.exit(cli())
