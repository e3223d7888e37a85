"""What the explorer's page shows, checked and small enough for a link.

A link holds what differs from the defaults, by name: `sentence=...&aspect=food&corruption=noise`.
Whoever opens it on the same model sees the same numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from ..errors import ConfigError, choices
from ..examples import Polarity, Span
from ..metrics import METRICS
from ..patch.corruption import NoiseSpan
from ..patch.request import DEFAULT_SITES, Direction
from ..sites import Site
from ..words import Choice, shown

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")
"""Kinds of state that a map can show."""
METRIC_WORDS = tuple(name for name, m in METRICS.items() if m.need != "vocabulary")
"""Metrics of labels."""
LONGEST = 4000
"""Characters of a review."""
MOST_SITES = 64
AUTO = "auto"


class Corruptions(Choice):
    """How the corrupted run differs from the clean one."""

    EDIT = "edit", "the review with other words"
    SWAP = "swap", "the same review, asked about another aspect"
    NOISE = "noise", "the same review, noise on its embeddings"


@dataclass(frozen=True)
class State:
    """All that the page's results depend on, apart from the model.

    Attributes:
        sentence: the review.
        aspect: the words that are asked about.
        start: first character of the aspect in the review; -1 for its first occurrence.
        gold: a polarity, or `auto` for the answer of the clean run.
        corruption: one of `Corruptions`.
        edited: for `edit`, the review as the corrupted run reads it.
        other: for `swap`, the aspect that the corrupted run asks about.
        foil: the polarity that the corrupted run should give, or `auto` for its best label but gold.
        scale, draws, span, seed: of `GaussianNoise`.
        kinds: of state.
        metric: of labels.
        direction: denoise, noise or both.
        sites: where an edit is trained.
        epochs, examples: of the training.
        cell: the open cell of the map, such as `L3.resid_post@12`.
        layer: whose attention is shown; -1 for none.

    Raises:
        ConfigError: a value that is not accepted.

    Example:
        >>> state = State("The food was great.", "food", corruption="noise", draws=2)
        >>> state.link()
        'sentence=The+food+was+great.&aspect=food&corruption=noise&draws=2'
        >>> State.from_link(state.link()) == state
        True
    """

    sentence: str = ""
    aspect: str = ""
    start: int = -1
    gold: str = AUTO
    corruption: str = "edit"
    edited: str = ""
    other: str = ""
    foil: str = AUTO
    scale: float = 3.0
    draws: int = 4
    span: str = "all"
    seed: int = 0
    kinds: tuple[str, ...] = DEFAULT_SITES
    metric: str = "prob"
    direction: str = "denoise"
    sites: tuple[str, ...] = ()
    epochs: int = 4
    examples: int = 200
    cell: str = ""
    layer: int = -1

    def __post_init__(self) -> None:
        for name in ("sentence", "edited", "aspect", "other"):
            if len(text := getattr(self, name)) > LONGEST:
                raise ConfigError(
                    f"{name} has {len(text):,} characters; at most {LONGEST:,} are accepted"
                )
        Corruptions.parse(self.corruption, "corruption")
        NoiseSpan.parse(self.span, "noise span")
        Direction.parse(self.direction, "direction")
        polarities = (AUTO, *(p.value for p in Polarity))
        for name, value, accepted in (
            ("gold", self.gold, polarities),
            ("foil", self.foil, polarities),
            ("metric", self.metric, METRIC_WORDS),
        ):
            if value not in accepted:
                raise ConfigError(f"{name} is {shown(value)}; accepted: {choices(accepted)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"kinds holds {shown(kind)}; accepted: {choices(KINDS)}")
        if not self.kinds:
            raise ConfigError(f"kinds is empty; accepted: one or more of {choices(KINDS)}")
        if not (math.isfinite(self.scale) and 0 <= self.scale <= 1000):
            raise ConfigError(f"scale is {self.scale:g}; accepted: 0 to 1000")
        for name, low, high in (
            ("start", -1, LONGEST), ("draws", 1, 50), ("seed", 0, 2**32 - 1), ("layer", -1, 10**4),
            ("epochs", 1, 50), ("examples", 8, 5000),
        ):  # fmt: skip
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name} is {value}; accepted: {low} to {high}")
        if len(self.sites) > MOST_SITES:
            raise ConfigError(
                f"{len(self.sites)} sites were given; at most {MOST_SITES} are accepted"
            )
        for site in (*self.sites, *filter(None, [self.cell])):
            Site.parse(site)

    # ---- the aspect in its review ---------------------------------------------------------------

    @property
    def at(self) -> Span:
        """Return the characters of the review that are the aspect.

        Raises:
            ConfigError: there is no review or no aspect, or it is not in the review.
        """
        if not self.sentence.strip():
            raise ConfigError("there is no review yet; type one, or pick one of the list")
        if not self.aspect.strip():
            raise ConfigError("no aspect is marked; type words of the review, such as food")
        return place(self.sentence, self.aspect, self.start)

    # ---- links and messages ---------------------------------------------------------------------

    def link(self) -> str:
        """Return what differs from the defaults, as the query of an address."""
        words = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                words[f.name] = ",".join(value) if isinstance(value, tuple) else str(value)
        return urlencode(words)

    @classmethod
    def from_link(cls, text: str) -> State:
        """Return the state of a link.

        Raises:
            ConfigError: a name or a value is not accepted.
        """
        try:
            given = parse_qsl(
                text, keep_blank_values=True, strict_parsing=bool(text), max_num_fields=64
            )
        except ValueError:
            raise ConfigError(f"the link {shown(text)} holds no state of the explorer") from None
        if len(given) > len(dict(given)):
            raise ConfigError("the link gives a name twice; every name may stand there once")
        return cls.of(dict(given))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> State:
        """Return the state of a message: JSON values, or their spelling in a link.

        Raises:
            ConfigError: a name or a value is not accepted.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                raise ConfigError(
                    f"{shown(name)} is no part of a state; accepted: {choices(fields)}"
                )
        return cls(**{name: _as(name, fields[name].default, v) for name, v in values.items()})


def _as(name: str, default: Any, value: Any) -> Any:
    """Return a value with the type of the default, from JSON or from text."""
    if isinstance(default, tuple):
        words = value.split(",") if isinstance(value, str) else value
        if isinstance(words, (list, tuple)) and all(isinstance(w, str) for w in words):
            return tuple(w for w in words if w)
        raise ConfigError(f"{name} is {shown(value)}; accepted: a list of words")
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise ConfigError(f"{name} is {shown(value)}; accepted: text")
    kind = float if isinstance(default, float) else int
    try:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        number = kind(value)
        if not isinstance(value, str) and number != value:
            raise ValueError
    except (ValueError, OverflowError):
        what = "a number" if kind is float else "a whole number"
        raise ConfigError(f"{name} is {shown(value)}; accepted: {what}") from None
    return number


def place(sentence: str, aspect: str, start: int = -1) -> Span:
    """Return where an aspect stands in a sentence: at `start`, or at its nearest occurrence.

    Raises:
        ConfigError: it does not stand there at all.

    Example:
        >>> place("food, and more food", "food", 12)
        (15, 19)
    """
    found, at = [], sentence.find(aspect)
    while at >= 0:
        found.append(at)
        at = sentence.find(aspect, at + 1)
    if not found:
        raise ConfigError(f"the aspect {shown(aspect)} is not in the text {shown(sentence)}")
    at = found[0] if start < 0 else min(found, key=lambda i: abs(i - start))
    return at, at + len(aspect)


__all__ = ["KINDS", "METRIC_WORDS", "Corruptions", "State", "place"]
