"""JSON lines of prompt pairs: `clean`, `corrupted`, `answer`, `foil`, `spans`, and `id` if wanted."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import DataError, SiteError, choices
from ..own import PromptPair, PromptPairs
from ..words import shown

FIELDS = ("clean", "corrupted", "answer", "foil", "spans", "id")


def holds_prompt_pairs(source: str | os.PathLike[str]) -> bool:
    """Return whether a source is a file whose first record is a prompt pair.

    Example:
        >>> holds_prompt_pairs("builtin:restaurant/test")
        False
    """
    path = Path(source)
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json") or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "clean" in record


def load_prompt_pairs(source: str | os.PathLike[str]) -> PromptPairs:
    """Load prompt pairs from JSON lines.

    Args:
        source: the file. `corrupted` may be missing or null; `spans` maps names to words of `clean`
            or to `[start, end]`.

    Raises:
        DataError, SiteError: the file or a line cannot be read; says which and what is accepted.

    Example:
        >>> import json, tempfile, mech_absa as ma
        >>> row = {"clean": "The Louvre is in", "corrupted": "The Prado is in", "answer": " Paris",
        ...        "foil": " Madrid", "spans": {"subject": "Louvre"}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "facts.jsonl"
        ...     _ = path.write_text(json.dumps(row))
        ...     ma.load_prompt_pairs(path)[0].id
        'facts:1'
    """
    path = Path(source)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", str(path)) from None
    except UnicodeDecodeError:
        raise DataError("the file is no UTF-8; save it as UTF-8", str(path)) from None
    rows = [
        _pair(line, str(path), path.stem, n)
        for n, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not rows:
        raise DataError("the file is empty; at least one prompt pair is needed", str(path))
    pairs = PromptPairs.of(rows, str(path))
    return replace(pairs, sha256=hashlib.sha256(data).hexdigest())


def _pair(line: str, source: str, stem: str, number: int) -> PromptPair:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("no JSON; one object a line is needed", source, number) from None
    if not isinstance(record, dict):
        raise DataError(f"{shown(record)} is no object with {choices(FIELDS)}", source, number)
    if missing := [name for name in ("clean", "answer", "foil") if name not in record]:
        raise DataError(
            f"{missing[0]!r} is missing; a prompt pair has {choices(FIELDS)}", source, number
        )
    if unknown := [name for name in record if name not in FIELDS]:
        raise DataError(
            f"unknown field {unknown[0]!r}; accepted: {choices(FIELDS)}", source, number
        )
    spans = record.get("spans") or {}
    if not isinstance(spans, dict):
        raise DataError(f"spans are {shown(spans)}; an object of names is needed", source, number)
    places = {k: tuple(v) if isinstance(v, list) else v for k, v in spans.items()}
    try:
        return PromptPair(
            record["clean"], record.get("corrupted"), record["answer"], record["foil"], places,
            str(record.get("id") or f"{stem}:{number}"), source, number,
        )  # fmt: skip
    except SiteError as error:
        raise SiteError(f"{source}:{number}: {error}") from None
