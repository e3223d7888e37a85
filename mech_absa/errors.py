"""Define one hierarchy of errors, written for the person who reads them.

Every message is one sentence that says what came, where it came from (`file:line`, a flag, a site)
and what is accepted. The commands print the sentence alone and exit with code 2. In Python, catch
`MechAbsaError` to get all of them.
"""

from __future__ import annotations

from collections.abc import Iterable


class MechAbsaError(Exception):
    """Base of everything this package raises on purpose.

    Example:
        >>> import mech_absa as ma
        >>> try:
        ...     ma.load_examples("missing.jsonl")
        ... except ma.MechAbsaError as error:
        ...     print(str(error).partition(";")[0])
        missing.jsonl: there is no such file
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(bounded(message))


class DataError(MechAbsaError):
    """A file, a line or a record that cannot be read as examples.

    Args:
        problem: what came in and what would be accepted.
        source: the file (or hub name) it came from.
        line: 1-based line, or None where the format has none.
    """

    def __init__(self, problem: str, source: str | None = None, line: int | None = None):
        self.problem, self.source, self.line = problem, source, line
        where = "" if source is None else f"{source}: " if line is None else f"{source}:{line}: "
        super().__init__(f"{where}{problem}")


class ConfigError(MechAbsaError):
    """A flag or an argument outside what is accepted."""


class PromptError(MechAbsaError):
    """A template or a set of labels that cannot ask the question."""


class PromptTooLong(PromptError):
    """A prompt with more tokens than the model reads."""


class AlignmentError(MechAbsaError):
    """A clean and a corrupted prompt that do not line up token by token."""


class SiteError(MechAbsaError):
    """A site that does not parse, or that the model does not have."""


class ModelError(MechAbsaError):
    """A model that cannot be found, loaded or run block by block."""


class HookError(MechAbsaError):
    """A hook that fired another number of times than planned; never a user's fault."""

    exit_code = 1


class RunFolderError(MechAbsaError):
    """An output folder that holds something else, or a run that cannot be resumed."""


class EditError(MechAbsaError):
    """An edit that does not fit its model, is damaged, or cannot be merged."""


class SelfCheckError(MechAbsaError):
    """An identity that must hold in every run did not; never a user's fault."""

    exit_code = 1


LONGEST = 2000
"""Characters of a message; a value of a hostile file may be a hundred megabytes long."""


def bounded(message: str) -> str:
    """Return a message of one line and at most `LONGEST` characters that can be printed.

    Args:
        message: of any length; where it is cut, its beginning and its end stay.

    Example:
        >>> len(bounded("x" * 10**7))
        2000
        >>> bounded("one" + chr(10) + "two")
        'one two'
    """
    if len(message) > LONGEST:
        half = LONGEST // 2
        message = f"{message[: half - 3]} ... {message[-half + 2 :]}"
    message = " ".join(message.splitlines())  # a line end of a quoted value would make it two lines
    return message.encode("utf-8", "backslashreplace").decode("utf-8")


def choices(options: Iterable[object]) -> str:
    """Return the accepted values, spelled for a message: `a, b or c`."""
    *most, last = [str(o) for o in options]
    return f"{', '.join(most)} or {last}" if most else last
