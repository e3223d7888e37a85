"""`python -m mech_absa.report`; see `commands/report.py`."""

import sys

from ..commands.report import cli

if __name__ == "__main__":
    sys.exit(cli())
