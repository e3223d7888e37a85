"""`python -m mech_absa.patch`; see `commands/patch.py`."""

import sys

from ..commands.patch import cli

if __name__ == "__main__":
    sys.exit(cli())
