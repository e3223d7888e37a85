"""Clean and corrupted runs, aligned token by token.

A `Pair` is one example with both runs ready; it refuses to exist when they do not line up.
`make_pairs` builds pairs, scores both runs, and applies the paper's filter: only examples that the
clean run answers rightly and the corrupted run wrongly are traced. Everything dropped is counted by
reason. How the corrupted run is made is the business of `corruption.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import AlignmentError, ConfigError, DataError, PromptTooLong
from ..examples import Example, Examples, marked, mixed_polarity
from ..model import Model
from ..model.forward import last
from ..own import Asked
from ..prompts import Continuation, PromptTemplate, Tokenised, Tokens, Verbalizer
from ..records import About
from ..scoring import (
    TOO_LONG,
    by_label,
    extend,
    label_scores,
    positions_read,
    question,
    read_labels,
    room_for,
)
from ..sites import spans_of
from ..words import Choice, expect
from .corruption import (
    AspectSwap,
    Corruption,
    Counterfactual,
    GaussianNoise,
    Lexicon,
    MeanAblation,
    NoiseSpan,
    OpinionSwap,
    Resample,
    ZeroAblation,
    as_corruption,
)


class Keep(Choice):
    """Name the pairs that are traced."""

    PAPER = "paper", "the clean answer is right and the corrupted answer wrong"
    CLEAN = "clean", "the clean answer is right"
    ALL = "all", "no filter"


CLEAN_WRONG = "clean run wrong"
CORRUPTED_RIGHT = "corrupted run right"
NOT_FOLLOWING = "answer does not follow the swap"
FILTERED = (CLEAN_WRONG, CORRUPTED_RIGHT, NOT_FOLLOWING)
"""Reasons that `keep="all"` switches off."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One example, its clean run and its corrupted run.

    Attributes:
        example: what is asked: an `Example`, or a `PromptPair`.
        clean: prompt tokens with roles.
        corrupted: tokens of the corrupted run; the clean ones where the text stays as it is.
        gold: index of the right label.
        foil: index of the label that the corrupted text asks for; None where it asks for none.
        corruption: how the corrupted run is made.
        sigma: standard deviation of the noise; 0 without noise.
        first: first position at which the two runs can differ.
        other: the example that the corrupted run asks about, where it reads another text.
        clean_scores: log-probabilities of the labels, `[label]`.
        corrupted_scores: the same, `[draw label]`; None for ablations, which have no corrupted run.
        answers: token ids of answer and foil, which are the two labels of a prompt pair; None where
            all pairs share the labels of a verbalizer.
        partner: the token of the corrupted prompt that each clean token is aligned with; None where
            both stand at the same position.

    Raises:
        AlignmentError: the two prompts do not line up.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> pairs[0].clean.ids.shape == pairs[0].corrupted.ids.shape
        True
    """

    example: Asked
    clean: Tokenised
    corrupted: Tokenised
    gold: int
    foil: int | None
    corruption: Corruption
    sigma: float = 0.0
    first: int = 0
    other: Example | None = None
    clean_scores: Float[Tensor, " label"] | None = None
    corrupted_scores: Float[Tensor, "draw label"] | None = None
    answers: tuple[int, ...] | None = None
    partner: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.corrupted is not self.clean:
            self.corruption.align(self.clean, self.corrupted, self.example)

    @property
    def id(self) -> str:
        """Return the id of the example."""
        return self.example.id

    @property
    def length(self) -> int:
        """Return the number of tokens of the prompt."""
        return self.clean.length

    @property
    def source_ids(self) -> tuple[int, ...]:
        """Return the token of the corrupted prompt that each clean token is aligned with."""
        ids = self.corrupted.token_ids
        return ids if self.partner is None else tuple(ids[i] for i in self.partner)

    @property
    def draws(self) -> int:
        """Return the number of corrupted runs."""
        return self.corruption.draws

    def noise_positions(self) -> list[int]:
        """Return the positions whose embeddings are noised."""
        return self.corruption.positions(self.clean) if self.sigma else []

    def noise(self, d_model: int) -> Float[Tensor, "draw pos d_model"]:
        """Draw the noise to add to the embeddings; the same whenever it is asked for.

        Raises:
            ConfigError: the corruption adds none.
        """
        return self.corruption.noise(self, d_model)

    def __repr__(self) -> str:
        foil = f", foil={self.foil}" if self.foil is not None else ""
        return (
            f"Pair({self.id!r}: {self.example.aspect!r} in {self.length} tokens, "
            f"gold={self.gold}{foil}, {self.corruption})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        run = ""
        if self.other is not None:
            run = f"<div><small>corrupted run: {marked(self.other)}</small></div>"
        if self.clean_scores is None:
            return self.example._repr_html_() + run
        runs = [f"clean {_probabilities(self.clean_scores)}"]
        if self.corrupted_scores is not None:
            draws = f" (mean of {self.draws} draws)" if self.draws > 1 else ""
            runs.append(f"corrupted {_probabilities(self.corrupted_scores)}{draws}")
        head = (
            f"{self.example._repr_html_()}{run}<div><small>P(label), in the order of the labels: "
        )
        return f"{head}{escape('; '.join(runs))}</small></div>"


def _probabilities(scores: Float[Tensor, "*draw label"]) -> str:
    """Return label probabilities, the mean over draws."""
    mean = scores.double().exp().reshape(-1, scores.shape[-1]).mean(0)
    return ", ".join(f"{p:.3f}" for p in mean.tolist())


@dataclass(frozen=True, repr=False)
class Pairs(Sequence[Pair]):
    """Pairs with the account of how they were chosen.

    Attributes:
        items: the pairs kept, in the order of the examples.
        corruption: how corrupted runs are made.
        continuations: how the labels are scored.
        verbalizer, template: what was asked; None for prompt pairs, which bring both.
        sigma: standard deviation of the noise, measured; 0 without noise.
        considered: examples looked at.
        dropped: reason -> count.
        draw_sd: mean over pairs of the standard deviation of P(gold) over noise draws.
        model_name, model_sha256: the model they were made on; empty where unknown.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> len(pairs)
        2
    """

    items: tuple[Pair, ...]
    corruption: Corruption
    continuations: tuple[Continuation, ...]
    verbalizer: Verbalizer | None
    template: PromptTemplate | None
    sigma: float = 0.0
    considered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    draw_sd: float = 0.0
    model_name: str = ""
    model_sha256: str = ""

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index: int | slice) -> Pair | Pairs:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)

    def __repr__(self) -> str:
        where = f" on {self.model_name}" if self.model_name else ""
        return (
            f"Pairs({len(self)} pairs, {self.sentences} sentences, of {self.considered} examples; "
            f"{self.corruption}{where})"
        )

    @property
    def sentences(self) -> int:
        """Return the number of different sentences; intervals and tests count these, not pairs."""
        return len({p.example.cluster for p in self.items})

    @property
    def spans(self) -> list[str]:
        """Return the named spans of own prompts, whose roles sites may name; none for reviews."""
        return spans_of(role for p in self.items for role in p.clean.vocabulary)

    @property
    def labels(self) -> list[str]:
        """Return the words of the labels; `answer` and `foil` for prompt pairs."""
        if self.verbalizer is None:
            return ["answer", "foil"]
        return [word for _, word in self.verbalizer.words]

    def words_of(self, pair: Pair) -> list[str]:
        """Return the words of the labels of one pair."""
        own = pair.example
        return self.labels if isinstance(own, Example) else [own.answer, own.foil]

    def account(self) -> About:
        """Return how many were considered, kept and dropped, and how strong the corruption is."""
        return {
            "considered": self.considered,
            "kept": len(self),
            "sentences": self.sentences,
            "dropped": self.dropped,
            "sigma": self.sigma,
            "draw_sd": self.draw_sd,
            "classes_kept": dict(Counter(p.example.answer for p in self)),
            "mixed_polarity": len(
                mixed_polarity([p.example for p in self.items if isinstance(p.example, Example)])
            ),
        }

    def check_model(self, model: Model) -> None:
        """Refuse a model other than the one the pairs were made on.

        Raises:
            ConfigError: its weights have another hash.
        """
        if self.model_sha256 and model.sha256 != self.model_sha256:
            raise ConfigError(
                f"the pairs were made on {self.model_name} (weights {self.model_sha256[:12]}), and "
                f"{model.name} (weights {model.sha256[:12]}) was given; make pairs on the model that "
                "is traced: make_pairs(model, examples)"
            )

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(p._repr_html_() for p in self.items[:3])
        dropped = "; ".join(f"{n} dropped: {reason}" for reason, n in self.dropped.items())
        more = f"<div>&hellip; {len(self) - 3} more</div>" if len(self) > 3 else ""
        first = (
            f"<b>{len(self)} pairs</b> of {self.considered} examples, "
            f"{escape(str(self.corruption))}; {escape(dropped) or 'none dropped'}"
        )
        return f"<div>{first}</div>{head}{more}"


def expect_pairs(pairs: object, where: str) -> None:
    """Refuse anything but `Pairs`.

    Raises:
        ConfigError: with a hint where examples came instead.
    """
    expect(pairs, Pairs, where, "Pairs, from make_pairs(model, examples)")


def make_pairs(
    model: Model,
    examples: Examples | Sequence[Example],
    corruption: Corruption | str | None = None,
    *,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    keep: Keep | str = Keep.PAPER,
    limit: int | None = None,
    batch_size: int = 32,
    strict: bool = False,
) -> Pairs:
    """Make clean and corrupted runs of the examples, filtered and counted.

    Args:
        model: what is traced.
        examples: what is asked.
        corruption: a corruption or its word (`noise`, `counterfactual`, `aspect-swap`, `mean`,
            `zero`, `resample`); default `GaussianNoise()`, the paper's.
        template, verbalizer: default the paper's.
        keep: a `Keep` or its word.
        limit: stop when this many pairs are kept.
        batch_size: prompts per forward pass while scoring.
        strict: refuse prompts that are longer than the model reads, instead of dropping them.

    Raises:
        ConfigError: an argument of another type, or outside what is accepted.
        DataError: no pair is left.
        PromptTooLong: a prompt is too long, with `strict`.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> ma.make_pairs(model, examples, "counterfactual", keep="all").sentences
        2
    """
    expect(model, Model, "make_pairs(model=...)", "a Model, from load_model()")
    if isinstance(examples, str) or not all(isinstance(e, Example) for e in examples):
        expect(examples, Examples, "make_pairs(examples=...)", "examples, from load_examples(...)")
    if template is not None:
        expect(template, PromptTemplate, "make_pairs(template=...)", "a PromptTemplate")
    if verbalizer is not None:
        expect(verbalizer, Verbalizer, "make_pairs(verbalizer=...)", "a Verbalizer")
    if limit is not None:
        expect(limit, int, "make_pairs(limit=...)", "a whole number of pairs")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} pairs was given; it must be 1 or more")
    template, verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
    chosen = as_corruption(corruption)
    if isinstance(chosen, GaussianNoise) and chosen.own_span is not None:
        NoiseSpan.parse(chosen.span, "noise span")  # reviews have no spans of that name
    maker = _Maker(
        model,
        chosen,
        template,
        verbalizer,
        verbalizer.continuations(model.tokenizer, template),
        Keep.parse(keep, "filter"),
        batch_size,
    )
    return maker.make(list(examples), limit, strict)


@dataclass(eq=False)
class _Maker:
    """One call of `make_pairs`: tokenise, build, score, filter, count."""

    model: Model
    corruption: Corruption
    template: PromptTemplate
    verbalizer: Verbalizer
    continuations: tuple[Continuation, ...]
    keep: Keep
    batch_size: int
    sigma: float = 0.0
    dropped: Counter[str] = field(default_factory=Counter)
    pool: dict[str, list[Example]] = field(default_factory=dict)

    def make(self, examples: list[Example], limit: int | None, strict: bool) -> Pairs:
        prompts = [self.prompt(e, strict) for e in examples]
        for e in examples:
            self.pool.setdefault(e.cluster, []).append(e)
        asked = [t for t in prompts if t is not None]
        self.sigma = self.corruption.sigma(self.model, asked) if asked else 0.0
        kept: list[Pair] = []
        considered = start = 0
        while start < len(prompts) and (limit is None or len(kept) < limit):
            # With a limit, no more pairs are scored at a time than are still wanted.
            step = 4 * self.batch_size
            if limit is not None:
                step = min(step, max(8, limit - len(kept)))
            rows = slice(start, start + step)
            for pair, reason in self.judged(examples[rows], prompts[rows]):
                if limit is not None and len(kept) == limit:
                    break
                considered += 1
                if pair is not None:
                    kept.append(pair)
                else:
                    self.dropped[reason] += 1
            start += step
        if not kept:
            raise DataError(self.nothing_left(len(prompts)))
        return Pairs(
            tuple(kept),
            self.corruption,
            self.continuations,
            self.verbalizer,
            self.template,
            self.sigma,
            considered,
            dict(self.dropped),
            draw_sd(kept),
            self.model.name,
            self.model.sha256,
        )

    def prompt(self, example: Example, strict: bool) -> Tokenised | None:
        """Return the prompt of an example; None where it and its labels exceed the context."""
        try:
            room = room_for(self.continuations)
            return question(self.model, example, self.template, room)
        except PromptTooLong:
            if strict:
                raise
            return None

    def judged(
        self, examples: Sequence[Example], prompts: Sequence[Tokenised | None]
    ) -> list[tuple[Pair | None, str]]:
        """Return for every example its scored pair, or None and the reason to drop it."""
        built = [self.build(e, t) for e, t in zip(examples, prompts, strict=True)]
        scored = iter(self.scored([p for p in built if isinstance(p, Pair)]))
        rows: list[tuple[Pair | None, str]] = []
        for candidate in built:
            if isinstance(candidate, str):
                rows.append((None, candidate))
                continue
            pair = next(scored)
            reason = reason_to_drop(pair, self.keep)
            rows.append((None, reason) if reason else (pair, ""))
        return rows

    def build(self, example: Example, clean: Tokenised | None) -> Pair | str:
        """Return the pair of an example, not yet scored, or the reason why there is none."""
        if clean is None:
            return TOO_LONG
        reason = self.corruption.lacking
        for other in self.corruption.corrupted(example, self.pool):
            try:
                return self.pair(example, clean, other)
            except (AlignmentError, PromptTooLong):
                reason = self.corruption.misfit
        return reason

    def pair(self, example: Example, clean: Tokenised, other: Example) -> Pair:
        c = self.corruption
        corrupted, foil = clean, None
        if c.changes_text:
            corrupted = c.align(clean, question(self.model, other, self.template), example)
            foil = self.verbalizer.index(other.polarity)
        return Pair(
            example,
            clean,
            corrupted,
            self.verbalizer.index(example.polarity),
            foil,
            c,
            self.sigma,
            c.first(clean, corrupted, self.sigma),
            other if c.changes_text else None,
        )

    def scored(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs with the label scores of both runs."""
        labels: dict[str, Any] = {
            "continuations": self.continuations,
            "batch_size": self.batch_size,
        }
        clean = label_scores(self.model, [p.clean for p in pairs], **labels)
        corrupted: list[Tensor | None] = [None] * len(pairs)
        if self.corruption.changes_text:
            scores = label_scores(self.model, [p.corrupted for p in pairs], **labels)
            corrupted = [s[None] for s in scores]
        elif not self.corruption.is_ablation:
            corrupted = [noised_scores(self.model, p, self.continuations) for p in pairs]
        return [
            replace(p, clean_scores=a, corrupted_scores=b)
            for p, a, b in zip(pairs, clean, corrupted, strict=True)
        ]

    def nothing_left(self, n: int) -> str:
        reasons = ", ".join(f"{k} {reason}" for reason, k in self.dropped.items())
        hint = "another corruption may keep more"
        if self.keep != Keep.ALL and any(reason in FILTERED for reason in self.dropped):
            hint = "--keep all (keep='all') or another corruption would keep more"
        return f"no pair is left of {n} examples ({reasons or 'there were no examples'}); {hint}"


def reason_to_drop(pair: Pair, keep: Keep) -> str | None:
    """Return why the filter drops a scored pair; None where it is kept."""
    if keep == Keep.ALL:
        return None
    assert pair.clean_scores is not None
    if int(pair.clean_scores.argmax()) != pair.gold:
        return CLEAN_WRONG
    if pair.corrupted_scores is None:
        return None
    answer = int(pair.corrupted_scores.exp().mean(0).argmax())
    if pair.corruption.must_follow and answer != pair.foil:
        return NOT_FOLLOWING
    return CORRUPTED_RIGHT if keep == Keep.PAPER and answer == pair.gold else None


def answer_ids(pairs: Sequence[Pair]) -> list[int]:
    """Return the tokens of answers and foils of prompt pairs, each once, in order."""
    return list(dict.fromkeys(token for p in pairs for token in p.answers or ()))


def own_labels(pairs: Sequence[Pair]) -> Continuation:
    """Return the run that scores the answers and foils of all these prompt pairs."""
    return Continuation((), tuple((i, (token,)) for i, token in enumerate(answer_ids(pairs))))


def columns_of(pairs: Sequence[Pair], ids: Sequence[int]) -> Int[Tensor, "pair label"]:
    """Return the columns of each pair's own labels among these tokens."""
    column = {token: i for i, token in enumerate(ids)}
    return torch.tensor([[column[token] for token in p.answers or ()] for p in pairs])


def draw_sd(pairs: Sequence[Pair]) -> float:
    """Return the mean over pairs of the standard deviation of P(gold) over noise draws."""
    sd = [
        float(p.corrupted_scores.exp()[:, p.gold].std())
        for p in pairs
        if p.corrupted_scores is not None and len(p.corrupted_scores) > 1
    ]
    return sum(sd) / len(sd) if sd else 0.0


@torch.inference_mode()
def noised_scores(
    model: Model, pair: Pair, continuations: Sequence[Continuation]
) -> Float[Tensor, "draw label"]:
    """Return the label scores of the noised runs of one pair."""
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    parts = []
    for continuation in continuations:
        runs = make_runs(model, [pair], continuation)
        reads = positions_read([runs.length] * pair.draws, continuation)
        parts.append(read_labels(model, last(model, runs.corrupted, reads), continuation))
    return by_label(parts, continuations).to("cpu", wide)


# ---- runs: pairs of one length, as the engines take them --------------------------------------------


@dataclass(eq=False)
class Runs:
    """Clean and corrupted inputs of several pairs of equal length.

    Attributes:
        pairs: the pairs, in order.
        continuation: the label tokens appended to every prompt, and how many positions are read.
        clean: residual stream before block 0 of the clean runs, `[pair pos d_model]`.
        corrupted: of the corrupted runs, `[pair*draw pos d_model]`, draws of one pair together; the
            clean ones for ablations.
        draws: corrupted runs per pair.
        length: positions, continuation included.
    """

    pairs: tuple[Pair, ...]
    continuation: Continuation
    clean: Float[Tensor, "pair pos d_model"]
    corrupted: Float[Tensor, "row pos d_model"]
    draws: int
    length: int

    @property
    def prompt_length(self) -> int:
        """Return the number of positions of the prompt."""
        return self.length - len(self.continuation.tokens)


def make_runs(model: Model, pairs: Sequence[Pair], continuation: Continuation) -> Runs:
    """Embed both runs of pairs that all have the same length.

    Raises:
        AlignmentError: their lengths differ.
    """
    lengths = {p.length for p in pairs}
    if len(lengths) != 1:
        raise AlignmentError(
            f"pairs of {sorted(lengths)} tokens cannot share a run; group them by length"
        )
    tokens = extend(Tokens.stack([p.clean for p in pairs]), continuation)
    clean = model.embed(tokens.ids)
    corrupted = pairs[0].corruption.embed(model, pairs, clean, continuation)
    return Runs(tuple(pairs), continuation, clean, corrupted, pairs[0].draws, tokens.lengths[0])


def by_length(pairs: Sequence[Pair]) -> Mapping[int, list[int]]:
    """Return prompt length -> indices of the pairs of that length, shortest first."""
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(pairs):
        groups.setdefault(p.length, []).append(i)
    return dict(sorted(groups.items()))


__all__ = [
    "AspectSwap",
    "Corruption",
    "Counterfactual",
    "GaussianNoise",
    "Keep",
    "Lexicon",
    "MeanAblation",
    "OpinionSwap",
    "Pair",
    "Pairs",
    "Resample",
    "Runs",
    "ZeroAblation",
    "by_length",
    "expect_pairs",
    "make_pairs",
    "make_runs",
]
