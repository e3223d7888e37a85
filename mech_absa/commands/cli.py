"""Start and end every command: parse a dataclass, run, and turn errors into one sentence.

A command is a frozen dataclass (its fields are the flags, its docstring the help) and a function of
it. Bad input prints one sentence on the error stream and exits with code 2; nothing is
half-written, because folders are opened only after everything was checked. A full disk, a lack of
memory, Ctrl-C and a termination signal end with one sentence too, and leave a folder that --resume
takes up.

| code | meaning |
|---|---|
| 0 | done |
| 1 | a defect of this package: a self-check failed |
| 2 | bad input, or the machine refused (disk, memory, permission) |
| 130, 143 | interrupted (SIGINT), terminated (SIGTERM) |
| 141 | whoever read the output stopped reading |
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, MechAbsaError
from ..records import close_all, versions

Config = TypeVar("Config")


class Terminated(BaseException):
    """The process was asked to end (SIGTERM)."""


def command(
    config: type[Config],
    main: Callable[[Config], Any],
    prog: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv` into `config`, run `main`, and return the exit code.

    Args:
        config: a dataclass.
        main: what to do with it.
        prog: the module, named in the help and before an error.
        argv: default the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)

    def work() -> None:
        if words == ["--version"]:
            print(f"mech_absa {versions().get('mech-absa', 'of this folder')}")
            return
        parsed = parse(config, words, prog)
        if parsed is not None:
            main(parsed)

    return boundary(work, prog, any(f == "resume" for f in _names(config)))


def start(name: str, argv: Sequence[str] | None = None) -> int:
    """Import a command and run it; an interruption while it is imported ends with a sentence too."""
    codes: list[int] = []

    def work() -> None:
        codes.append(importlib.import_module(f".{name}", __package__).cli(argv))

    return boundary(work, f"mech_absa.{name}", False) or codes[0]


def boundary(work: Callable[[], None], prog: str, resumable: bool) -> int:
    """Run `work` and return an exit code; print one sentence where it fails."""
    code, sentence = 0, ""
    again = "; give the same flags with --resume to go on" if resumable else ""
    try:
        with _terminable():
            try:
                work()
            finally:
                close_all()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MechAbsaError as error:
        code, sentence = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, sentence = 130, f"interrupted{again}"
    except Terminated:
        code, sentence = 143, f"terminated{again}"
    except OSError as error:
        if not isinstance(error.errno, int):  # a library's own, such as a damaged parquet file
            raise
        code, sentence = 2, f"{_machine(error)}{again}"
    except (MemoryError, RuntimeError) as error:
        if not _no_memory(error):
            raise
        code, sentence = 2, f"the memory is not enough; lower --memory or --batch-size{again}"
    if sentence and os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(f"{prog}: {sentence}", file=sys.stderr)
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _machine(error: OSError) -> str:
    """Say what the operating system refused."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _no_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is lacking, on a CPU or a GPU."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "out of memory" in text
    )


def parse(config: type[Config], words: Sequence[str], prog: str) -> Config | None:
    """Return the configuration that the words of a command line name; None where the help was asked for.

    Raises:
        ConfigError: a word is not accepted.
    """
    import tyro

    from .flags import check_numbers, preset_defaults

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a library's bars hide our own
    words, preset = _preset(list(words))
    options: dict[str, Any] = {}
    if preset is not None:
        options["default"] = preset_defaults(config, preset, prog.removeprefix("mech_absa."))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed: Config = tyro.cli(
                config,
                prog=f"python -m {prog}",
                args=words,
                description=inspect.cleandoc(config.__doc__ or ""),
                **options,
            )
    except SystemExit as end:
        if end.code in (0, None):  # the help was asked for
            return None
        raise ConfigError(_sentence(config, words, printed.getvalue())) from None
    check_numbers(parsed)
    return parsed


def _preset(words: list[str]) -> tuple[list[str], str | None]:
    """Split `--preset-file PATH` from the words of a command line."""
    for i, word in enumerate(words):
        flag, equals, _ = word.replace("_", "-", 2).partition("=")
        if flag == "--preset-file":
            if equals:
                return words[:i] + words[i + 1 :], word.partition("=")[2]
            if i + 1 < len(words):
                return words[:i] + words[i + 2 :], words[i + 1]
            raise ConfigError("--preset-file needs a run folder or its run.json")
    return words, None


def report(config: Any) -> Callable[[Path], Any] | None:
    """Return what writes the report of a finished run; None where --no-report was given."""
    if not config.run.report:
        return None
    from ..report import leave_report

    return leave_report


def out_folder(config: Any, name: str) -> Path:
    """Return the folder of --out; runs/NAME-<time> where none was given."""
    import time

    given: Path | None = config.run.out
    return given or Path("runs") / time.strftime(f"{name}-%Y%m%d-%H%M%S")


def warn(notes: Sequence[str]) -> None:
    """Print warnings on the error stream."""
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)


def warn_of_crowd(quiet: bool) -> None:
    """Warn before long work where other processes use the cores that this one's threads wait for."""
    from . import machine

    if not quiet and (crowded := machine.crowded()) is not None:
        warn([crowded])


def tell_left_out(data: Any) -> None:
    """Print on the error stream what a reader left out, and where the first of it stands."""
    for problem in data.problems[:3]:
        print(f"left out: {problem}", file=sys.stderr)
    parts = [f"{n} ({reason})" for reason, n in data.left_out.items()]
    if parts:
        print(f"{data.source}: left out {', '.join(parts)}", file=sys.stderr)


def readable(
    config: Any,
    model: Any,
    examples: Any,
    *,
    templates: Sequence[Any] = (),
    verbalizer: Any = None,
    answers: bool = False,
) -> Any:
    """Return the examples whose prompts the model can read, and print how many it cannot.

    Args:
        config: with the groups `question` and `reading`.
        model: that is asked.
        examples: of one source.
        templates: the questions; the one that the flags name where there are none.
        verbalizer: the labels; those that the flags name by default.
        answers: whole answers must fit behind the prompts.

    Raises:
        PromptTooLong: a prompt is too long, with --strict.
        DataError: no example is left.
    """
    from ..scoring import TOO_LONG, fitting

    kept = fitting(
        model, examples, templates or [config.question.prompt], verbalizer or config.question.verbalizer,
        answers=answers, strict=config.reading.strict,
    )  # fmt: skip
    if lost := len(examples) - len(kept):
        print(f"{examples.source}: left out {lost} ({TOO_LONG}: {model.n_ctx})", file=sys.stderr)
    return kept


def _names(config: Any) -> list[str]:
    from .flags import flag_names

    return flag_names(config)


def _sentence(config: type, words: Sequence[str], printed: str) -> str:
    """Say why the parser refused `words`: the first flag that there is not, or what stands above the rule in its box."""
    known = ["--" + name.replace("_", "-") for name in _names(config)]
    switches = ["--no-" + flag[2:] for flag in known]
    for word in words:
        flag = word.split("=")[0].replace("_", "-")
        if re.fullmatch(r"--[a-z][\w-]*", flag) and flag not in (*known, *switches, "--help"):
            near = difflib.get_close_matches(flag, known, 1)
            near = near or [k for k in known if k.startswith(flag)][:1]
            hint = f"the nearest is {near[0]}" if near else "--help names those there are"
            return f"there is no flag {flag}; {hint}"
    inside: list[str] = []  # of the box: its title, what is wrong, a rule or the lower edge
    for line in printed.splitlines()[1:]:
        if not re.fullmatch(r"[│|+╰╯\s]*[─-]{3,}[│|+╰╯\s]*", line):
            inside.append(line.strip("│| "))
        elif inside:
            break
    return _plain_words(" ".join(filter(None, inside)).rstrip(". "))


KINDS = {"INT": "a whole number", "FLOAT": "a number", "PATH": "a path"}


def _plain_words(text: str) -> str:
    """Say what the parser's message means, without the names of Python's types."""
    if missing := re.match(r"Missing from [^:]*: (--[\w-]+)", text):
        return f"{missing[1]} must be given; --help says what it takes"
    if choice := re.match(
        r"invalid choice ('.*?') for argument '(.*?)'\. Expected.*?\((.*?)\)", text
    ):
        accepted = choice[3].strip(",").replace("'", "")
        return f"{choice[2]}: {choice[1]} was given; accepted: {accepted}"
    text = re.sub(r"^Error parsing (\S+): ", r"\1: ", text)
    union = re.match(r"(\S+): no type matching (\S+) could be instantiated from \[(.*?)\]", text)
    if union:
        kind = next((v for k, v in KINDS.items() if k in union[2]), "another value")
        return f"{union[1]}: {union[3]} was given; {kind} is needed; --help names what is accepted"
    for pattern, kind in (
        (r"invalid literal for int\(\) with base 10: ('.*')", "a whole number"),
        (r"could not convert string to float: ('.*')", "a number"),
    ):
        text = re.sub(pattern, rf"\1 was given; {kind} is needed", text)
    return f"{text}; --help names what is accepted"


__all__ = ["Terminated", "boundary", "command", "out_folder", "parse", "report", "start", "warn"]
