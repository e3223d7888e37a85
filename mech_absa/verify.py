"""`python -m mech_absa.verify`; see `commands/verify.py`."""

import sys

from .commands.verify import cli

if __name__ == "__main__":
    sys.exit(cli())
