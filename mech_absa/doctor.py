"""`python -m mech_absa.doctor`; see `commands/doctor.py`."""

import sys

from .commands.cli import start


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("doctor", argv)


if __name__ == "__main__":
    sys.exit(cli())
