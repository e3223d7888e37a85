"""Eight short reviews to train on, as examples and as a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from mech_absa.examples import Example, Polarity
from mech_absa.prompts import PromptTemplate

TEXT = "{sentence} aspect {aspect} :"
TEMPLATE = PromptTemplate(TEXT)
WORDING = [
    ("the food was great", "food", "positive"),
    ("awful service", "service", "negative"),
    ("the screen is fine", "screen", "neutral"),
    ("dreadful wine list", "wine list", "negative"),
    ("i loved the pizza", "pizza", "positive"),
    ("a cheap keyboard , awful", "keyboard", "negative"),
    ("the staff", "staff", "neutral"),
    ("excellent battery life", "battery life", "positive"),
]
EIGHT = [
    Example(s, a, Polarity(p), (s.index(a), s.index(a) + len(a)), id=str(i))
    for i, (s, a, p) in enumerate(WORDING)
]


def write(path: Path, rows: Iterable[tuple[str, str, str]]) -> str:
    """Write (sentence, aspect, label) rows as JSON lines; return the path as text."""
    path.write_text(
        "".join(json.dumps({"sentence": s, "aspect": a, "label": p}) + "\n" for s, a, p in rows)
    )
    return str(path)
