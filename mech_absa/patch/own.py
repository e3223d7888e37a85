"""`prompt_pairs`: prompt pairs of one's own -> pairs of runs, as `make_pairs` does for reviews."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, DataError, PromptError, PromptTooLong
from ..examples import Span
from ..model import Model
from ..own import PromptPair, PromptPairs
from ..prompts import Continuation, Tokenised, answer_id, encode_text
from ..scoring import TOO_LONG, label_scores
from ..sites import ROLES, vocabulary
from ..words import expect
from .align import first_difference, partners
from .corruption import (
    Corruption,
    Counterfactual,
    GaussianNoise,
    SpanAlignment,
    as_corruption,
)
from .pairs import (
    FILTERED,
    Keep,
    Pair,
    Pairs,
    columns_of,
    draw_sd,
    noised_scores,
    own_labels,
    reason_to_drop,
)

ANSWER_AND_FOIL = Continuation((), ((0, ()), (1, ())))
"""Two labels whose tokens every pair has itself (`Pair.answers`)."""


def prompt_pairs(
    model: Model,
    pairs: Sequence[PromptPair],
    corruption: Corruption | str | None = None,
    *,
    keep: Keep | str = Keep.PAPER,
    limit: int | None = None,
    batch_size: int = 32,
    strict: bool = False,
) -> Pairs:
    """Make clean and corrupted runs of prompt pairs of one's own.

    Args:
        model: what is traced.
        pairs: the prompts, their answers, and their named spans.
        corruption: None runs the corrupted prompts. Where one has another number of tokens, all pairs
            are aligned by their spans (`SpanAlignment`). `GaussianNoise(span="subject")` is ROME's
            tracing; `mean`, `zero` and `resample` are ablations.
        keep: a `Keep` or its word. The clean answer is right where `answer` is likelier than `foil`.
        limit: stop when this many pairs are kept.
        batch_size: prompts per forward pass while scoring.
        strict: refuse prompts that are longer than the model reads, instead of dropping them.

    Raises:
        AlignmentError: a corrupted prompt has another number of tokens, and differs outside the spans
            too; says where they part.
        PromptError: an answer is no single token, or a span has no token of its own.
        ConfigError: an argument is not accepted.
        DataError: no pair is left.
        PromptTooLong: a prompt is too long, with `strict`.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> pair = ma.PromptPair(
        ...     "the good food was", "the slow food was", " positive", " negative", {"word": "good"}
        ... )
        >>> pairs = ma.prompt_pairs(model, [pair], keep="all")
        >>> [pairs[0].clean.role_names.count(role) for role in ("template", "word.last", "answer")]
        [4, 1, 1]
    """
    expect(model, Model, "prompt_pairs(model=...)", "a Model, from load_model()")
    if isinstance(pairs, str) or not all(isinstance(p, PromptPair) for p in pairs):
        expect(pairs, PromptPairs, "prompt_pairs(pairs=...)", "a list of PromptPair")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} pairs was given; it must be 1 or more")
    made = _Maker(model, _corruption(corruption), Keep.parse(keep, "filter"), batch_size)
    return made.make(PromptPairs.of(pairs), limit, strict)


def _corruption(value: Corruption | str | None) -> Corruption:
    corruption = Counterfactual() if value is None else as_corruption(value)
    if corruption.changes_text and not isinstance(corruption, Counterfactual):
        raise ConfigError(
            f"{corruption.word} changes reviews; prompt pairs bring their own corrupted text: leave "
            "the corruption out, or choose noise, mean, zero or resample"
        )
    return corruption


class _Maker:
    """One call of `prompt_pairs`: tokenise, align, score, filter, count."""

    def __init__(self, model: Model, corruption: Corruption, keep: Keep, batch_size: int):
        self.model, self.corruption, self.keep = model, corruption, keep
        self.batch_size = batch_size
        self.vocabulary: tuple[str, ...] = ROLES

    def make(self, pairs: PromptPairs, limit: int | None, strict: bool) -> Pairs:
        dropped: Counter[str] = Counter()
        self.vocabulary = vocabulary(pairs.spans)
        prompts = []
        for p in pairs:
            try:
                prompts.append((p, self.prompt(p, p.clean, p.where)))
            except PromptTooLong:
                if strict:
                    raise
                dropped[TOO_LONG] += 1
        sigma = self.corruption.sigma(self.model, [t for _, t in prompts]) if prompts else 0.0
        made = self.aligned([self.pair(p, clean, sigma) for p, clean in prompts])
        kept: list[Pair] = []
        considered = sum(dropped.values())
        for pair in self.scored(made):
            if limit is not None and len(kept) == limit:
                break
            considered += 1
            if (reason := reason_to_drop(pair, self.keep)) is None:
                kept.append(pair)
            else:
                dropped[reason] += 1
        if not kept:
            reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
            helps = self.keep is not Keep.ALL and any(reason in FILTERED for reason in dropped)
            hint = "; --keep all (keep='all') would keep more" if helps else ""
            raise DataError(
                f"no pair is left of {len(pairs)} prompt pairs ({reasons or 'there were none'}){hint}"
            )
        return Pairs(
            tuple(kept),
            self.corruption,
            (ANSWER_AND_FOIL,),
            None,
            None,
            sigma,
            considered,
            dict(dropped),
            draw_sd(kept),
            self.model.name,
            self.model.sha256,
        )

    def prompt(self, pair: PromptPair, text: str, spans: Mapping[str, Span]) -> Tokenised:
        tokens = encode_text(
            text, spans, self.model.tokenizer, self.model.bos, pair.id, self.vocabulary
        )
        if tokens.length > self.model.n_ctx:
            raise PromptTooLong(
                f"the prompt of {pair.id!r} has {tokens.length} tokens; {self.model.name} reads "
                f"{self.model.n_ctx}"
            )
        return tokens

    def pair(self, own: PromptPair, clean: Tokenised, sigma: float) -> Pair:
        """Return a pair; one of two lengths has its partners, and is to be aligned by spans."""
        c, corrupted, partner = self.corruption, clean, None
        if c.changes_text:
            corrupted = self.corrupted(own)
            if corrupted.length == clean.length:
                ids, lengths = corrupted.ids, corrupted.lengths
                corrupted = Tokenised(ids, clean.roles, lengths, clean.vocabulary)
            else:
                c, partner = (
                    SpanAlignment(),
                    partners(own.id, clean, corrupted, self.model.tokenizer),
                )
        elif isinstance(c, GaussianNoise) and not c.positions(clean):
            raise ConfigError(
                f"noise on {str(c.span)!r} was asked for, and the prompt of {own.id!r} "
                "has no such tokens; name a span of the prompt, or all"
            )
        tokenizer = self.model.tokenizer
        answers = [answer_id(tokenizer, own.clean, a, own.id) for a in (own.answer, own.foil)]
        if answers[0] == answers[1]:
            raise PromptError(
                f"answer {own.answer!r} and foil {own.foil!r} of {own.id!r} are the same token"
            )
        first = (
            c.first(clean, corrupted, sigma)
            if partner is None
            else first_difference(clean, corrupted)
        )
        return Pair(
            own, clean, corrupted, 0, 1, c, sigma, first, answers=tuple(answers), partner=partner
        )

    def corrupted(self, own: PromptPair) -> Tokenised:
        """Return the tokens of the corrupted prompt.

        Raises:
            DataError: there is none.
        """
        if own.corrupted is None:
            raise DataError(
                f"the prompt pair {own.id!r} has no corrupted prompt; give one, or a corruption such "
                "as GaussianNoise(span='subject')",
                own.source or None,
                own.line or None,
            )
        return self.prompt(own, own.corrupted, {})

    def aligned(self, pairs: list[Pair]) -> list[Pair]:
        """Return the pairs; where one is aligned by spans, all are, so that they can be averaged."""
        if all(p.partner is None for p in pairs):
            return pairs
        self.corruption = SpanAlignment()
        return [
            replace(p, corruption=self.corruption, partner=p.partner or tuple(range(p.length)))
            for p in pairs
        ]

    def scored(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Return the pairs with the scores of answer and foil in both runs."""
        if not pairs:
            return []
        clean = self.scores(pairs, [p.clean for p in pairs])
        corrupted: Sequence[Tensor | None] = [None] * len(pairs)
        if self.corruption.changes_text:
            corrupted = [s[None] for s in self.scores(pairs, [p.corrupted for p in pairs])]
        elif not self.corruption.is_ablation:
            corrupted = [noised_scores(self.model, p, (own_labels([p]),)) for p in pairs]
        return [
            replace(p, clean_scores=a, corrupted_scores=b)
            for p, a, b in zip(pairs, clean, corrupted, strict=True)
        ]

    def scores(
        self, pairs: Sequence[Pair], prompts: Sequence[Tokenised]
    ) -> Float[Tensor, "pair label"]:
        labels = own_labels(pairs)
        scores = label_scores(self.model, prompts, (labels,), batch_size=self.batch_size)
        return scores.gather(1, columns_of(pairs, [ids[0] for _, ids in labels.labels]))


__all__ = ["ANSWER_AND_FOIL", "prompt_pairs"]
