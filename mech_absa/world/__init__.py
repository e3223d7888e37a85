"""The built-in review world: `lexicon.py` holds the words, `grammar.py` writes the reviews from them,
`files.py` writes and finds the shipped files."""

from .files import SIZES, builtin_path, record, write_world
from .grammar import (
    SPLITS,
    Continuation,
    Mention,
    Review,
    continuations,
    examples,
    review,
    vocabulary,
)
from .lexicon import ADJECTIVES, CONTINUATIONS, DOMAINS, FRAMES, FREE, LEXICON, Domain, Group

__all__ = [
    "ADJECTIVES",
    "CONTINUATIONS",
    "DOMAINS",
    "FRAMES",
    "FREE",
    "LEXICON",
    "SIZES",
    "SPLITS",
    "Continuation",
    "Domain",
    "Group",
    "Mention",
    "Review",
    "builtin_path",
    "continuations",
    "examples",
    "record",
    "review",
    "vocabulary",
    "write_world",
]
