"""`python -m mech_absa.evaluate`; see `commands/evaluate.py`."""

import sys

from ..commands.evaluate import cli

if __name__ == "__main__":
    sys.exit(cli())
