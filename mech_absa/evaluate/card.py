"""`python -m mech_absa.evaluate.card`; see `commands/card.py`."""

import sys

from ..commands.card import cli

if __name__ == "__main__":
    sys.exit(cli())
