"""What all commands share: parse a dataclass, run, and turn errors into one sentence.

A command is a frozen dataclass (its fields are the flags, its docstring the help) and a function of it. Bad input prints one sentence on
the error stream and exits with code 2; nothing is half-written, because folders are opened only after everything was checked. What tyro
refuses (an unknown flag, a word where a number belongs) it says in a box of many lines; here it is one sentence like all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, MechAbsaError
from ..examples import Examples
from ..records import close_all

Config = TypeVar("Config")


def command(
    config: type[Config],
    main: Callable[[Config], Any],
    prog: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv` into `config`, run `main`, and give the exit code.

    Args:
        config: a dataclass.
        main: what to do with it.
        prog: the module, named in the help and before an error.
        argv: default the process's own.
    """
    import tyro

    # Nothing below needs a hub once its input is local, and a library's progress bars hide our own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parsed = tyro.cli(
                    config,
                    prog=f"python -m {prog}",
                    args=words,
                    description=inspect.cleandoc(config.__doc__ or ""),
                )
        except SystemExit as end:
            if end.code in (0, None):  # the help was asked for
                return 0
            raise ConfigError(_sentence(config, words, said.getvalue())) from None
        try:
            main(parsed)
        finally:
            close_all()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read the output has read enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MechAbsaError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
            print(f"{prog}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = (
            "; give the same flags with --resume to go on"
            if any(f.name == "resume" for f in dataclasses.fields(config))
            else ""
        )  # type: ignore[arg-type]
        print(f"{prog}: interrupted{again}", file=sys.stderr)
        return 130


def named(flag: str, words: Sequence[str]) -> dict[str, str]:
    """`name=value` words as a mapping, such as {"aspect": "Term"}.

    Raises:
        ConfigError: a word is none.
    """
    for word in words:
        if not re.fullmatch(r"[^=]+=.+", word):
            raise ConfigError(f"{flag} {word!r} was given; words such as aspect=Term are accepted")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def reading(config: Any) -> dict[str, Any]:
    """What the flags of a command say about reading its data: keyword arguments of `load_examples`.

    Raises:
        ConfigError: a word of --columns or --meaning is no pair.
    """
    return {
        "skip_bad": config.skip_bad, "columns": named("--columns", config.columns), "labels": named("--meaning", config.meaning),
    }  # fmt: skip


def report(config: Any) -> Callable[[Path], Any] | None:
    """Return what writes the report of a finished run; None where --no-report was given."""
    if not config.report:
        return None
    from ..report import leave_report

    return leave_report


def tell_left_out(data: Examples) -> None:
    """Say on the error stream what a reader left out, and where the first of it stands."""
    for problem in data.problems[:3]:
        print(f"left out: {problem}", file=sys.stderr)
    if data.left_out:
        print(
            f"{data.source}: left out {', '.join(f'{n} ({reason})' for reason, n in data.left_out.items())}",
            file=sys.stderr,
        )


def _sentence(config: type, words: Sequence[str], said: str) -> str:
    """Why the parser refused `words`: the first flag that there is not, or what stands above the rule in the parser's box."""
    known = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(config)]
    switches = ["--no-" + flag[2:] for flag in known]
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if re.fullmatch(r"--[a-z][\w-]*", flag) and flag not in (*known, *switches, "--help"):
            near = (
                difflib.get_close_matches(flag, known, 1)
                or [k for k in known if k.startswith(flag)][:1]
            )
            return f"there is no flag {flag}; " + (
                f"the nearest is {near[0]}" if near else "--help names those there are"
            )
    inside: list[
        str
    ] = []  # of the box: its title, perhaps a rule, what is wrong, a rule or the lower edge
    for line in said.splitlines()[1:]:
        if not re.fullmatch(r"[│|+╰╯\s]*[─-]{3,}[│|+╰╯\s]*", line):
            inside.append(line.strip("│| "))
        elif inside:
            break
    text = " ".join(filter(None, inside)).rstrip(". ")
    if missing := re.match(r"Missing from [^:]*: (--[\w-]+)", text):
        return f"{missing[1]} must be given; --help says what it takes"
    text = re.sub(r"^Error parsing (\S+): ", r"\1: ", text)
    text = re.sub(
        r"invalid literal for int\(\) with base 10: ('.*')",
        r"\1 was given; a whole number is needed",
        text,
    )
    text = re.sub(
        r"could not convert string to float: ('.*')", r"\1 was given; a number is needed", text
    )
    return f"{text}; --help names what is accepted"
