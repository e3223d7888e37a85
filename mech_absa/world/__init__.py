"""The built-in review world: `lexicon.py` holds the words, `grammar.py` writes reviews from them,
`harder.py` writes those of the second version, `files.py` writes and finds the shipped files."""

from .files import SIZES, VERSIONS, builtin_path, record, write_world
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
from .harder import SCALES, harder_examples, harder_review, harder_vocabulary
from .lexicon import ADJECTIVES, CONTINUATIONS, DOMAINS, FRAMES, FREE, LEXICON, Domain, Group

__all__ = [
    "ADJECTIVES",
    "CONTINUATIONS",
    "DOMAINS",
    "FRAMES",
    "FREE",
    "LEXICON",
    "SCALES",
    "SIZES",
    "SPLITS",
    "VERSIONS",
    "Continuation",
    "Domain",
    "Group",
    "Mention",
    "Review",
    "builtin_path",
    "continuations",
    "examples",
    "harder_examples",
    "harder_review",
    "harder_vocabulary",
    "record",
    "review",
    "vocabulary",
    "write_world",
]
