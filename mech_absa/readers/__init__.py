"""Load ABSA files of any usual format as `Examples`.

    load_examples("reviews.xml")                     # the format follows from name and content
    load_examples("builtin:restaurant+laptop/test")  # the built-in world; builtin:test is all of it
    load_examples("builtin:v2/restaurant/test")      # its harder version
    load_examples("hf:owner/name:validation")        # a split of a Hugging Face data set
    load_examples("hf:folder:test")                  # the same of a local folder

| format      | what it is                                                                    | module      |
|-------------|-------------------------------------------------------------------------------|-------------|
| `jsonl`     | JSON lines, an array, or `{id: record}`: the paper's, ARTS, this project's    | `jsonl`     |
| `semeval`   | SemEval XML 2014 (also MAMS), 2015 and 2016                                   | `semeval`   |
| `seg`       | three lines per example, `$T$` for the aspect                                 | `seg`       |
| `table`     | CSV and TSV with column names                                                 | `table`     |
| `tsa`       | TSA JSON: texts with located targets                                          | `tsa`       |
| `triplets`  | ASTE, DMASTE, ASQP, ACOS: triplets and quads with opinion words               | `triplets`  |
| `tags`      | E2E-TBSA and CoNLL: words with tags                                           | `tags`      |
| `sentihood` | SentiHood JSON                                                                | `sentihood` |
| `hf`        | Hugging Face `datasets`                                                       | `hub`       |

A file is read and checked whole before anything is returned. The first bad record raises an error
with file and line. With `skip_bad` bad records are left out, and their messages are kept and
counted. Text is UTF-8, with or without a byte-order mark, with any line ends. Offsets count
characters, not bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ConfigError, DataError, choices
from ..examples import Examples, content_hash
from ..words import expect
from . import hub, jsonl, seg, semeval, sentihood, table, tags, triplets, tsa
from .jsonl import json_records, write_jsonl
from .rows import Reading, guess_domain

__all__ = ["FORMATS", "load_examples", "write_jsonl"]

FORMATS: dict[str, Callable[[bytes, Reading], None]] = {
    "jsonl": jsonl.read, "semeval": semeval.read, "seg": seg.read, "table": table.read, "tsa": tsa.read,
    "triplets": triplets.read, "tags": tags.read, "sentihood": sentihood.read,
}  # fmt: skip
"""Format of a file -> its reader. `hf` is the only format that is not a single file."""

_SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".xml": "semeval", ".seg": "seg", ".csv": "table", ".tsv": "table",
}  # fmt: skip

NULL_TARGETS = ("drop", "category")


def load_examples(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    skip_bad: bool = False,
    null_targets: str = "drop",
    columns: Mapping[str, str] | None = None,
    meaning: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    ignore_case: bool = False,
    limit: int | None = None,
    seed: int = 0,
    head: bool = False,
    labels: Mapping[str, str] | None = None,
) -> Examples:
    """Load the examples of one source.

    Args:
        source: a file; `builtin:DOMAINS/SPLIT` (domains joined by `+`, all if none is named;
            `builtin:v2/DOMAINS/SPLIT` is the harder version); or a Hugging Face data set, as
            `hf:OWNER/NAME` or `hf:FOLDER`, followed by `:SPLIT` if it has several splits.
        format: a key of `FORMATS`, or `hf`; None recognises it from the source.
        skip_bad: leave bad records out and keep their messages in `Examples.problems`, instead of
            raising the first.
        null_targets: how to treat SemEval opinions whose target is NULL: `drop` leaves them out and
            counts them, `category` asks about the words of their category, without a span.
        columns: for JSON lines, tables and data sets: field (`sentence`, `aspect`, `polarity`,
            `from`, `to`, `domain`, `id`) -> its name in the source, if it would not be recognised.
        meaning: label in the source -> the polarity it means. Needed if labels are numbers other
            than -1, 0, 1.
        split: split of a Hugging Face data set; needed if it has several.
        subset: configuration of a Hugging Face data set.
        ignore_case: accept an aspect that differs in case from its words in the sentence, and ask
            about it as the sentence writes it.
        limit: keep at most this many examples, drawn without replacement from everything that was
            read, in its order.
        seed: of this draw.
        head: keep the first `limit` examples instead.
        labels: the older name of `meaning`.

    Returns:
        Examples in the order of the source, each with span, polarity, line and a unique id, and the
        account of what was left out.

    Raises:
        DataError: the source, or a record of it, cannot be read; the message says where and what is
            accepted.
        ConfigError: an argument is outside what is accepted.

    Examples:
        >>> import mech_absa as ma
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> len(examples), examples[0].aspect, examples[0].polarity.value
        (642, 'grilled fish', 'neutral')
    """
    expect(source, (str, os.PathLike), "load_examples(source=...)", "a file or another source")
    file = os.fsdecode(source)
    # A file name that is no UTF-8 can be opened, but not written into a record.
    source = file.encode("utf-8", "backslashreplace").decode()
    _check(format, null_targets, limit)
    means = _means(meaning, labels)

    def reading(path: Path, source: str = source, stem: str | None = None) -> Reading:
        stem = path.stem if stem is None else stem
        stem = stem.encode("utf-8", "backslashreplace").decode()
        return Reading(
            source, stem, guess_domain(path), skip_bad, null_targets, columns or {}, means,
            ignore_case=ignore_case,
        )  # fmt: skip

    if source.startswith("builtin:"):
        _refuse(split=split, subset=subset)
        examples = _join(
            source,
            [
                _read_file(path, "jsonl", reading(path, s, s.removeprefix("builtin:")))
                for s, path in _builtin(source)
            ],
        )
    elif source.startswith("hf:") or format == "hf" or os.path.isdir(source):
        if format not in (None, "hf"):
            raise ConfigError(f"format is {format!r}, but {source} is no file; accepted: hf")
        examples = _read_hub(source, split, subset, reading)
    else:
        _refuse(split=split, subset=subset)
        path = Path(file)
        examples = _read_file(path, format, reading(path))
    if limit is None:
        return examples
    return examples[:limit] if head else examples.sample(limit, seed)


def _check(format: str | None, null_targets: str, limit: int | None) -> None:
    """Raise a ConfigError for the first argument that is outside what is accepted."""
    if null_targets not in NULL_TARGETS:
        raise ConfigError(f"null_targets is {null_targets!r}; accepted: {choices(NULL_TARGETS)}")
    if format not in (None, *FORMATS, "hf"):
        raise ConfigError(f"there is no format {format!r}; accepted: {choices([*FORMATS, 'hf'])}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; a number of examples of at least 1 is accepted")


def _means(
    meaning: Mapping[str, str] | None, labels: Mapping[str, str] | None
) -> Mapping[str, str]:
    """Return what labels mean, given by its name or its older one."""
    if meaning is not None and labels is not None:
        raise ConfigError("meaning and labels were given, which are one thing; give meaning alone")
    return meaning or labels or {}


def _read_file(path: Path, format: str | None, reading: Reading) -> Examples:
    try:
        if path.exists() and not path.is_file():
            raise DataError("no regular file (a pipe or a device); copy it first", reading.source)
        data = path.read_bytes()
    except FileNotFoundError:
        hub_id = len(path.parts) == 2 and not path.suffix and not path.parent.exists()
        hint = f"; a data set on the hub is written hf:{path}" if hub_id else ""
        raise DataError(f"there is no such file; {_near(path)}{hint}", reading.source) from None
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise DataError(
            f"the file cannot be read ({why}); a readable file is accepted", reading.source
        ) from None
    if not data.removeprefix(b"\xef\xbb\xbf").strip() or _is_blank(data):
        raise DataError("the file is empty; at least one example is needed", reading.source)
    format = format or _format_of(path, data, reading)
    if reading.columns and format not in ("jsonl", "table"):
        raise ConfigError(
            f"columns were named, but the format {format} has none; accepted with: jsonl, table or hf"
        )
    FORMATS[format](data, reading)
    return reading.examples(hashlib.sha256(data).hexdigest())


def _is_blank(data: bytes) -> bool:
    """Return whether a file holds only blanks, including those beyond ASCII."""
    return len(data) < 1_000_000 and not data.decode("utf-8-sig", "replace").strip()


def _format_of(path: Path, data: bytes, reading: Reading) -> str:
    """Return the format that the suffix names, or else the one that the content shows."""
    suffix = path.suffix.lower()
    if suffix != ".tsv" and (format := _SUFFIXES.get(suffix)):
        return format
    text = reading.text(data).lstrip()
    first, _, rest = text.partition("\n")
    if triplets.is_line(first):  # before the suffix, for ACOS calls its files .tsv
        return "triplets"
    if suffix == ".tsv":
        return "table"
    if not text:
        return "jsonl"
    if text[0] in "[{":
        return _json_format(text)
    if text[0] == "<":
        return "semeval"
    if path.suffix.lower() == ".json":
        return "jsonl"
    if tags.is_line(first):
        return "tags"
    if seg.MARK in first or seg.MARK in rest.partition("\n")[0]:
        return "seg"
    if any(mark in first for mark in "\t,;|"):
        try:
            Reading(reading.source, "", columns=reading.columns).resolve(_header(first))
        except DataError:
            pass
        else:
            return "table"
    raise DataError(
        f"the format cannot be told from the name or the content; say it with format=, one of {choices(FORMATS)}",
        reading.source,
    )


def _json_format(text: str) -> str:
    """Recognise TSA and SentiHood by the lists in their records; all other JSON holds flat
    records.
    """
    try:
        _, parse = next(json_records(text, Reading("", "")))
        record = parse()
    except (DataError, StopIteration, RecursionError):
        return "jsonl"
    if "targets" in record:
        return "tsa"
    return "sentihood" if isinstance(record.get("opinions"), list) else "jsonl"


def _header(line: str) -> tuple[str, ...]:
    return tuple(cell.strip().strip('"') for cell in line.split(table.delimiter_of(line)))


def _read_hub(
    source: str, split: str | None, subset: str | None, reading: Callable[..., Reading]
) -> Examples:
    name = source.removeprefix("hf:")
    if source.startswith("hf:") and not os.path.isdir(name):
        name, _, named = name.partition(":")
        if named and split and named != split:
            raise ConfigError(
                f"{source} names the split {named!r} and split names {split!r}; give one"
            )
        split = split or named or None
        parts = name.split("/")
        if not os.path.isdir(name) and not (1 <= len(parts) <= 2 and all(parts)):
            raise DataError(
                "no id of a data set; accepted: hf:OWNER/NAME or hf:OWNER/NAME:SPLIT", source
            )
    elif not os.path.isdir(name):
        raise DataError(
            f"there is no such folder; {_near(Path(name))}; accepted too: hf:OWNER/NAME", source
        )
    stem = "/".join(
        [p for p in (name if source.startswith("hf:") else Path(name).name, subset, split) if p]
    )
    account = reading(Path(name), source, stem)
    hub.read(name, account, split, subset)
    examples = account.examples("")
    return replace(examples, sha256=content_hash(examples))


def _builtin(source: str) -> list[tuple[str, Path]]:
    """Return the shipped files that `builtin:...` means, each with the name of that file alone."""
    from ..world import DOMAINS, SPLITS, builtin_path

    name = source.removeprefix("builtin:")
    version = "v2/" if name.startswith("v2/") else ""
    *named, split = name.removeprefix(version).split("/")
    domains = named[0].split("+") if named else list(DOMAINS)
    if (
        len(named) > 1
        or split not in SPLITS
        or not set(domains) <= set(DOMAINS)
        or len(set(domains)) < len(domains)
    ):
        accepted = (
            f"builtin:DOMAINS/SPLIT with domains of {', '.join(DOMAINS)} joined by +, and "
            f"{choices(SPLITS)}; builtin:SPLIT; and builtin:v2/... for the harder version"
        )
        raise DataError(f"there are no such built-in examples; accepted: {accepted}", source)
    files = [f"{version}{d}/{split}" for d in domains]
    return [(f"builtin:{f}", builtin_path(f)) for f in files]


def _join(source: str, parts: Sequence[Examples]) -> Examples:
    """Join several readings. Ids that two of them share get the name of their part in front."""
    if len(parts) == 1:
        return replace(parts[0], source=source)
    shared = {id for id, n in Counter(e.id for part in parts for e in part).items() if n > 1}
    items = tuple(
        replace(e, id=f"{e.source}:{e.id}") if e.id in shared else e for part in parts for e in part
    )
    left_out: Counter[str] = sum((Counter(p.left_out) for p in parts), Counter())
    digest = hashlib.sha256("".join(p.sha256 for p in parts).encode()).hexdigest()
    return Examples(
        items,
        source,
        digest,
        dict(left_out),
        sum(p.ambiguous for p in parts),
        tuple(m for p in parts for m in p.problems),
    )


def _near(path: Path) -> str:
    """Return what exists near a `path` that does not exist, for a message."""
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    same_kind = [n for n in names if path.suffix and Path(n).suffix == path.suffix][:3]
    close = difflib.get_close_matches(path.name, names, n=3) or same_kind or names[:3]
    return f"near it there is {choices(close)}" if close else f"the folder {folder} is empty"


def _refuse(**options: str | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name} is {value!r}, but only a Hugging Face data set has one; leave it out"
            )
