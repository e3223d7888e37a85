"""What all commands share: parse a dataclass, run, and turn errors into one sentence.

A command is a frozen dataclass (its fields are the flags, its docstring the help) and a function of it. Bad input prints one sentence on
the error stream and exits with code 2; nothing is half-written, because folders are opened only after everything was checked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from .errors import MechAbsaError

Config = TypeVar("Config")


def command(config: type[Config], main: Callable[[Config], Any], prog: str, argv: Sequence[str] | None = None) -> int:
    """Parse `argv` into `config`, run `main`, and give the exit code.

    Args:
        config: a dataclass.
        main: what to do with it.
        prog: the name shown in the help.
        argv: default the process's own.
    """
    import tyro

    # Nothing below needs a hub once its input is local, and a library's progress bars hide our own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        parsed = tyro.cli(config, prog=prog, args=list(sys.argv[1:] if argv is None else argv), description=config.__doc__)
        main(parsed)
        return 0
    except MechAbsaError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; give the same flags with --resume to go on", file=sys.stderr)
        return 130
