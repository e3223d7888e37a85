"""`python -m mech_absa.train.matrix`; see `commands/matrix.py`."""

import sys

from ...commands.matrix import cli

if __name__ == "__main__":
    sys.exit(cli())
