"""`python -m mech_absa.compare`; see `commands/compare.py`.

`mech_absa.compare` is also the function that compares two systems on the same rows
(`mech_absa.evaluate.compare`). Importing this module keeps it callable.
"""

import sys
from types import ModuleType
from typing import Any

from .commands.cli import start


class _Callable(ModuleType):
    """`ma.compare(a, b)` stays the function of `mech_absa.evaluate` once this module is imported."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from .evaluate import compare

        return compare(*args, **options)


def cli(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return start("compare", argv)


if __name__ == "__main__":
    sys.exit(cli())
sys.modules[__name__].__class__ = _Callable
