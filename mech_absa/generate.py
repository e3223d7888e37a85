"""`python -m mech_absa.generate`; see `commands/generate.py`."""

import sys

from .commands.generate import cli

if __name__ == "__main__":
    sys.exit(cli())
