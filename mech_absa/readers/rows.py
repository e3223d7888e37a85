"""Provide what all readers share: the account of one reading, and examples from flat records.

A reader turns bytes into records and says on which line each of them stands. `Reading` does the
rest: it finds the aspect in the sentence, parses the label, counts what is left out, keeps ids
unique, and turns every complaint into one sentence with file and line.

Three rules live here and nowhere else:

* **Rows without offsets.** The n-th row about the same aspect of the same sentence takes the n-th
  place where the aspect stands as a whole term (no letter, mark or digit beside it). If there is no
  such place, it takes the n-th place of its characters. A row after the last place takes the last
  place. A row is *ambiguous* if the aspect's characters occur more than once in the sentence, as a
  whole term or not.
* **Labels that are bare numbers.** -1, 0, 1 mean negative, neutral, positive, but other files write
  0, 1, 2 for the same. So numbers are accepted only if a -1 is among them; otherwise the caller
  must say what they mean (`meaning={"0": "negative", ...}`).
* **Bad records.** They raise at once, before anything is returned. With `skip_bad` their messages
  are kept and counted instead.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, choices
from ..examples import Example, Examples, Polarity, Span

FIELDS: dict[str, tuple[str, ...]] = {
    "sentence": ("sentence", "text", "review", "raw_text", "content"),
    "aspect": ("aspect", "aspect_term", "aspectterm", "term", "target", "span"),
    "polarity": ("polarity", "label", "sentiment"),
    "from": ("from", "start", "begin"),
    "to": ("to", "end"),
    "domain": ("domain",),
}
"""Field of a flat record -> the names it may have. Case, outer blanks, and blank or underscore do
not matter.
"""

NULL = "NULL"
"""The target that SemEval 2015/16 gives an opinion without words in the sentence."""

REQUIRED = ("sentence", "aspect", "polarity")

CATEGORY_ONLY = ("no aspect term", "aspect category", "opinion on a whole text")
"""Reasons of `left_out` for opinions that can be asked about by their category."""

LONGEST = 600
"""Characters of the longest message about a record."""

_DOMAINS = {
    "rest": "restaurant", "restaurant": "restaurant", "restaurants": "restaurant", "mams": "restaurant",
    "laptop": "laptop", "laptops": "laptop", "lap": "laptop", "device": "device", "devices": "device",
    "service": "service", "services": "service",
}  # fmt: skip


def guess_domain(path: Path) -> str:
    """Return the domain named by the file, or else by its folder; empty if neither names one."""
    for name in (path.stem, path.parent.name):
        words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
        if found := [_DOMAINS[w] for w in words if w in _DOMAINS]:
            return found[0]
    return ""


@dataclass
class Reading:
    """Hold one source while it is read: the examples so far and the account of everything else.

    Attributes:
        source: the source as the user wrote it; stands in every message.
        stem: the beginning of generated ids.
        domain: the domain of examples that do not name their own.
        skip_bad: keep the messages of bad records and go on, instead of raising the first.
        null_targets: `drop` leaves out aspects without words; `category` asks about their category.
        columns: field (a key of `FIELDS`, or `id`) -> its name in this source, if the guess would
            be wrong.
        labels: label in the source -> the polarity it means, if the usual spellings do not say.
        signed: the format itself says that its numbers are -1, 0 and 1.
        ignore_case: accept an aspect that differs in case from its words in the sentence, and ask
            about it as the sentence writes it.
    """

    source: str
    stem: str
    domain: str = ""
    skip_bad: bool = False
    null_targets: str = "drop"
    columns: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    signed: bool = False
    ignore_case: bool = False

    items: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    ambiguous: int = 0
    _ids: set[str] = field(default_factory=set)
    _repeated: dict[str, int] = field(default_factory=dict)
    _asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    _numbers: set[str] = field(default_factory=set)
    _resolved: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [*FIELDS, "id"]
        for name in self.columns:
            if name not in known:
                raise ConfigError(f"columns names a field {name!r}; accepted: {choices(known)}")

    # Records ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def at(self, line: int) -> Iterator[None]:
        """Add source and `line` to complaints raised inside; with `skip_bad`, keep them and go
        on.
        """
        try:
            yield
        except (DataError, RecursionError) as e:
            deep = "the record is nested too deeply; a flat record is accepted"
            problem = e.problem if isinstance(e, DataError) else deep
            placed = DataError(shortened(problem, LONGEST), self.source, line)
            if not self.skip_bad:
                raise placed from e
            self.problems.append(str(placed))
            self.left_out["bad line"] += 1

    def text(self, data: bytes) -> str:
        """Decode `data` as UTF-8, with or without a byte-order mark.

        Raises:
            DataError: it is not UTF-8; names the line.
        """
        try:
            text = data.decode("utf-8-sig")
            # Old Macintosh files end their lines with a carriage return alone.
            return text if "\n" in text else text.replace("\r", "\n")
        except UnicodeDecodeError as e:
            problem = f"the byte 0x{data[e.start]:02x} is not UTF-8; only UTF-8 text is accepted, so convert the file first"
            raise DataError(problem, self.source, data.count(b"\n", 0, e.start) + 1) from None

    def resolve(
        self, names: Collection[str], required: Collection[str] = REQUIRED
    ) -> dict[str, str]:
        """Return the fields that came, each with the name under which it came.

        Raises:
            DataError: a required field is missing, or two names could be the same field.
        """
        key = (*required, "", *names)
        if key not in self._resolved:
            self._resolved[key] = self._resolve(names, required)
        return self._resolved[key]

    def _resolve(self, names: Collection[str], required: Collection[str]) -> dict[str, str]:
        came = shortened(", ".join(names) or "no field at all", 200)
        for name, column in self.columns.items():
            if column not in names:
                raise DataError(
                    f"the field {shortened(column)!r}, given with --columns as the {name}, is missing; "
                    f"there are: {came}"
                )
        found = dict(self.columns)
        for name, known_as in FIELDS.items():
            if name in found:
                continue
            fits = [
                n
                for n in names
                if n.strip().lower().replace(" ", "_") in known_as
                and n not in self.columns.values()
            ]
            if len(fits) > 1:
                raise DataError(
                    f"{choices(fits)} could be the {name}; name one, as in "
                    f"columns={{{name!r}: {fits[0]!r}}} or --columns {name}={fits[0]}"
                )
            if fits:
                found[name] = fits[0]
            elif name in required:
                raise DataError(
                    f"the field {name!r} is missing; there are: {came}; accepted names: "
                    f"{choices(known_as)}, or any other with --columns {name}=NAME "
                    f"(columns={{{name!r}: 'NAME'}} in Python)"
                )
        return found

    def add_row(self, row: Mapping[str, Any], line: int, id: str = "", **more: Any) -> None:
        """Add the example of a flat record, or count why there is none; `more` goes to `Example`
        unchanged.

        Raises:
            DataError: the record is not a question with an answer.
        """
        names = self.resolve(tuple(row))
        sentence, aspect = (string(row[names[f]], names[f]) for f in ("sentence", "aspect"))
        if not aspect.strip():
            raise DataError(
                "the aspect is empty; an aspect term of at least one character is needed"
            )
        if aspect == NULL and NULL not in sentence:
            self.add_null_target(
                sentence, string(row.get("category"), "category"), row[names["polarity"]], line, id
            )
            return
        ends = {f: row[names[f]] for f in ("from", "to") if f in names}
        if "id" in self.columns:
            id = str(row[names["id"]])
        domain = row.get(names.get("domain", ""))
        span: Span | None
        if len(ends) == 1:
            raise DataError(f"offsets need both 'from' and 'to'; only {choices(ends)} came")
        if ends and all(v is None for v in ends.values()):
            span = None  # said outright: no words of the sentence stand for this aspect
        elif ends and not all(v == "" for v in ends.values()):
            span = (whole(ends["from"], names["from"]), whole(ends["to"], names["to"]))
        else:
            span = self._find(sentence, aspect)
        self.add(
            sentence,
            aspect,
            row[names["polarity"]],
            span,
            line,
            id=id,
            domain=str(domain or ""),
            **more,
        )

    def add(
        self,
        sentence: str,
        aspect: str,
        label: object,
        span: Span | None,
        line: int,
        *,
        id: str = "",
        domain: str = "",
        opinion: Span | None = None,
        counterfactuals: tuple[Example, ...] = (),
    ) -> None:
        """Add one example from its parts; leave out and count it if its label is no single
        polarity.

        Counterfactuals take their ids and their domain from the example.
        """
        if self.ignore_case and span is not None:
            found = sentence[slice(*span)] if 0 <= span[0] <= span[1] else ""
            aspect = found if found.casefold() == aspect.casefold() else aspect
        # Offsets are checked even where the row is left out.
        try:
            asked = Example(sentence, aspect, Polarity.NEUTRAL, span, opinion)
        except DataError as e:
            if span is None or sentence[slice(*span)].casefold() != aspect.casefold():
                raise
            hint = "; case differs, which --ignore-case (ignore_case=True) accepts"
            raise DataError(e.problem + hint) from None
        polarity = self.polarity(label)
        if polarity is None:
            self.left_out[shortened(str(label).strip().lower())] += 1
            return
        if any(c.polarity is polarity for c in counterfactuals):
            raise DataError(
                f"a counterfactual is as {polarity} as its example; another polarity is accepted"
            )
        for name, value in (("id", id), ("domain", domain)):
            string(value, name)
        id, domain = self._unique(id or f"{self.stem}:{line}"), domain or self.domain
        edited = tuple(
            replace(c, id=f"{id}~{n}", domain=domain) for n, c in enumerate(counterfactuals, 1)
        )
        self.items.append(
            replace(
                asked,
                polarity=polarity,
                domain=domain,
                source=self.source,
                line=line,
                id=id,
                counterfactuals=edited,
            )
        )

    def add_null_target(
        self,
        sentence: str,
        category: str,
        label: object,
        line: int,
        id: str = "",
        reason: str = "no aspect term",
    ) -> None:
        """Add or count an opinion without words in the sentence.

        With `null_targets="category"` the question names the words of its category
        (`FOOD#STYLE_OPTIONS`: "food style options"). Otherwise the opinion is counted under
        `reason`.
        """
        words = category.lower().replace("_", " ").split("#")
        aspect = " ".join(w for w in words if w != "general" or len(words) == 1)
        if self.null_targets == "category":
            self.add(sentence, aspect, label, None, line, id=id)
        else:
            self.polarity(label)  # an unknown label is an error even where the opinion is left out
            self.left_out[reason] += 1

    def polarity(self, label: object) -> Polarity | None:
        """Return the polarity that `label` means here; None for `conflict` and `mixed`."""
        text = label.strip() if isinstance(label, str) else shown(label)
        if text in self.labels:
            return Polarity.parse(self.labels[text])
        if text.lstrip("+-").isdigit():
            self._numbers.add(text)
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise DataError(f"unknown label {shown(label)}; a word or a number is accepted")
        try:
            return Polarity.parse(text)
        except DataError:
            accepted = "positive/pos/1, negative/neg/-1, neutral/neu/0 or conflict/mixed (left out)"
            raise DataError(
                f"unknown label {shown(label)}; accepted: {accepted}; say what another label means "
                f"with --meaning {shortened(text, 20) or 'LABEL'}=negative (meaning={{...}} in Python)"
            ) from None

    def _find(self, sentence: str, aspect: str) -> Span:
        places = occurrences(sentence, aspect)
        if not places:
            other_case = occurrences(sentence, aspect, ignore_case=True)
            if not other_case:
                raise DataError(
                    f"the aspect {shown(aspect)} does not stand in the sentence {shown(sentence)}"
                )
            if not self.ignore_case:
                raise DataError(
                    f"the aspect {shown(aspect)} does not stand in the sentence {shown(sentence)}; "
                    f"only {shown(sentence[slice(*other_case[0])])} does, which --ignore-case (ignore_case=True) accepts"
                )
            places = other_case
        self.ambiguous += len(places) > 1
        terms = [p for p in places if is_whole_term(sentence, p)] or places
        nth = self._asked[sentence, aspect]
        self._asked[sentence, aspect] += 1
        return terms[min(nth, len(terms) - 1)]

    def _unique(self, id: str) -> str:
        candidate, n = id, self._repeated.get(id, 1)
        while candidate in self._ids:
            n += 1
            candidate = f"{id}.{n}"
        self._ids.add(candidate)
        self._repeated[id] = n  # one id for all rows must not take time that grows with its square
        return candidate

    # The end ---------------------------------------------------------------------------------------------------------------

    def examples(self, sha256: str) -> Examples:
        """Return everything that was read, with its account.

        Raises:
            DataError: there is not one example, or the labels are numbers that could mean anything.
        """
        if self._numbers and "-1" not in self._numbers and not self.signed:
            came = shortened(choices(sorted(self._numbers)), 200)
            raise DataError(
                f"the labels are bare numbers ({came}) and none is -1, so what they mean is a guess; "
                "say it, as in meaning={'0': 'negative', '1': 'neutral', '2': 'positive'} or --meaning 0=negative 1=neutral 2=positive",
                self.source,
            )
        if not self.items:
            why = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
            first = f"; the first: {self.problems[0]}" if self.problems else ""
            if any(self.left_out[reason] for reason in CATEGORY_ONLY):
                first += "; --null-targets category (null_targets='category') asks about categories"
            raise DataError(
                f"no example could be read ({why or 'there are no records'}); at least one is needed{first}",
                self.source,
            )
        return Examples(
            tuple(self.items),
            self.source,
            sha256,
            dict(self.left_out),
            self.ambiguous,
            tuple(self.problems),
        )


def occurrences(sentence: str, aspect: str, ignore_case: bool = False) -> list[Span]:
    """Return every place of the characters of `aspect` in `sentence`, overlapping ones too."""
    if len(aspect) > len(sentence):  # an expression of megabytes takes minutes to compile
        return []
    if ignore_case:
        # A lookahead finds overlapping places; lower() may change lengths and so shift offsets.
        pattern = re.compile(f"(?=({re.escape(aspect)}))", re.IGNORECASE)
        return [m.span(1) for m in pattern.finditer(sentence)]
    places, start = [], sentence.find(aspect)
    while start >= 0:
        places.append((start, start + len(aspect)))
        start = sentence.find(aspect, start + 1)
    return places


def is_whole_term(sentence: str, span: Span) -> bool:
    """Return whether no word continues over either end of `span`."""
    start, end = span
    return not (start > 0 and _in_word(sentence[start - 1])) and not (
        end < len(sentence) and _in_word(sentence[end])
    )


def _in_word(c: str) -> bool:
    # Marks too: in decomposed or Indic text they belong to the letter before them, which \w does not know.
    return c == "_" or unicodedata.category(c)[0] in "LMN"


def string(value: object, name: str) -> str:
    """Return `value` if it is text that can be written."""
    if not isinstance(value, str):
        raise DataError(f"the field {name!r} holds {shown(value)}; a string is accepted")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(
            f"the field {name!r} holds half of a surrogate pair, {shortened(ascii(value))}; whole characters are accepted"
        )
    return value


def whole(value: object, name: str) -> int:
    """Return `value` as a whole number, given as a number or as digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) < 20 and re.fullmatch(r"\s*-?[0-9]+\s*", value):
        return int(value)
    raise DataError(
        f"the field {name!r} holds {shown(value)}; a whole number of characters is accepted"
    )


def shown(value: object) -> str:
    """Return a short form of a value from a file, for a message."""
    try:
        return shortened(repr(value[:200] if isinstance(value, str) else value))
    except (RecursionError, ValueError):
        return "a value nested or long beyond all bounds"


def shortened(text: str, width: int = 80) -> str:
    """Return `text` cut to at most `width` characters, so that messages stay readable.

    Half of a surrogate pair, which no file can hold, is written as its escape.
    """
    text = text[: width + 1].encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= width else text[: width - 1] + "…"
