"""`python -m mech_absa.train`; see `commands/train.py`."""

import sys

from ..commands.train import cli

if __name__ == "__main__":
    sys.exit(cli())
