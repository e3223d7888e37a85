"""Define closed sets of words: settings with a few accepted values, each with a sentence that
explains it.

A `Choice` is also a string, so that it compares with, prints as and is written to JSON as its word.
"""

from __future__ import annotations

import reprlib
from enum import Enum
from typing import TypeVar, cast

from .errors import ConfigError, choices

C = TypeVar("C", bound="Choice")


class Choice(str, Enum):
    """Base of an enumeration of words.

    Example:
        >>> class Fruit(Choice):
        ...     APPLE = "apple", "Grows on trees."
        ...     MELON = "melon", "Grows on the ground."
        >>> Fruit.parse("melon", "fruit").sentence
        'Grows on the ground.'
        >>> Fruit.MELON == "melon"
        True
    """

    sentence: str

    def __new__(cls, word: str, sentence: str = "") -> Choice:
        member = str.__new__(cls, word)
        member._value_ = word
        member.sentence = sentence
        return member

    __str__ = str.__str__

    def __repr__(self) -> str:
        return repr(self.value)

    @classmethod
    def parse(cls: type[C], value: object, what: str) -> C:
        """Return the member that `value` names.

        Args:
            value: a member or its word.
            what: what the word stands for, named in the message.

        Raises:
            ConfigError: no member has that name.
        """
        try:
            return cls(cast(str, value))  # the look-up takes any value, unlike __new__
        except ValueError:
            raise ConfigError(
                f"unknown {what} {shown(value)}; accepted: {choices(cls.words())}"
            ) from None

    @classmethod
    def words(cls) -> tuple[str, ...]:
        """Return all words, in the order of their definition."""
        return tuple(member.value for member in cls)

    @classmethod
    def explained(cls) -> str:
        """Return all words with their sentences, for help texts."""
        return "; ".join(f"{member.value}: {member.sentence}" for member in cls)


def shown(value: object) -> str:
    """Return a short representation of any value, for messages: its type where the value says
    little.

    Example:
        >>> shown("banana")
        "'banana'"
        >>> shown(int)
        'the class int'
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return reprlib.repr(value)
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def expect(value: object, types: type | tuple[type, ...], where: str, accepted: str) -> None:
    """Reject an argument of the wrong type with one sentence.

    Args:
        value: the argument.
        types: its accepted types.
        where: the function and the argument, such as `trace(pairs=...)`.
        accepted: what to give instead.

    Raises:
        ConfigError: `value` has another type.
    """
    if not isinstance(value, types):
        raise ConfigError(f"{where} got {shown(value)}; accepted: {accepted}")


__all__ = ["Choice", "expect", "shown"]
