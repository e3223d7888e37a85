"""`python -m mech_absa.verify`; see `commands/verify.py`."""

import sys

from .commands.cli import start


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("verify", argv)


if __name__ == "__main__":
    sys.exit(cli())
