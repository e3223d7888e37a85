"""Clean and corrupted runs, aligned token by token.

A `Corruption` says how the corrupted run is made; a `Pair` is one example with both runs ready to be made, and refuses to exist when
they do not line up. `make_pairs` builds them, scores both runs, and applies the paper's filter: only examples that the clean run answers
rightly and the corrupted run wrongly are traced, and everything dropped is counted by reason.

| corruption | the corrupted run |
|---|---|
| `GaussianNoise` | the same tokens, noise on their embeddings (ROME; the paper: on all tokens) |
| `Counterfactual` | a minimal edit of the text with another polarity, as many tokens |
| `MeanAblation`, `ZeroAblation`, `Resample` | none: states of the clean run are replaced by a mean, by zero, or by another example's |

Noise takes the model off its distribution, which can break more than the fact under study and show sites that only repair damage; a
counterfactual asks precisely which states tell the two polarities apart, and needs such texts. When both are at hand, believe the
counterfactual first.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import AlignmentError, ConfigError, DataError, choices
from ..examples import Example, Examples, marked, mixed_polarity
from ..model import Model
from ..model.forward import last
from ..prompts import Continuation, PromptTemplate, Tokens, Verbalizer
from ..scoring import extend, label_scores, positions_read, question, read_labels
from ..sites import ROLES

Direction = Literal["denoise", "noise"]
"""`denoise` restores clean states in the corrupted run; `noise` puts corrupted states into the clean run."""
DIRECTIONS = ("denoise", "noise")
KEEPS = ("paper", "clean", "all")
"""`paper`: clean run right and corrupted run wrong; `clean`: clean run right; `all`: no filter."""
NOISE_SPANS = ("all", "sentence", "aspect", "query")


@dataclass(frozen=True)
class GaussianNoise:
    """Noise N(0, (scale * std)^2) on the embeddings, std over the embeddings of the aspect terms in the data.

    Meng et al. 2022 (ROME), appendix B.1: scale 3, 10 draws. ROME corrupts the subject; the paper's formula runs over all tokens.

    Attributes:
        scale: in standard deviations.
        draws: independent draws; each is one corrupted run, and a pair's effect is the mean over them.
        span: which tokens: `all`, `sentence`, `aspect` (in the sentence), `query` (the aspect in the question).
        seed: with the example's id it fixes the draws, whatever the order or the number of processes.
    """

    scale: float = 3.0
    draws: int = 10
    span: str = "all"
    seed: int = 0

    def __post_init__(self):
        if self.scale < 0:
            raise ConfigError(f"a noise scale of {self.scale:g} was given; it must be 0 or more")
        if self.draws < 1:
            raise ConfigError(f"{self.draws} noise draws were asked for; at least 1 is needed")
        if self.span not in NOISE_SPANS:
            raise ConfigError(f"unknown noise span {self.span!r}; accepted: {choices(NOISE_SPANS)}")


@dataclass(frozen=True)
class Counterfactual:
    """The example's own minimal edit with another polarity; the first one that lines up token by token."""


@dataclass(frozen=True)
class MeanAblation:
    """Replace states by their mean over the pairs' clean runs.

    Attributes:
        by: `role` takes the mean over tokens of the same role; `site` over all tokens.
    """

    by: str = "role"

    def __post_init__(self):
        if self.by not in ("role", "site"):
            raise ConfigError(f"a mean by {self.by!r} was asked for; accepted: role or site")


@dataclass(frozen=True)
class ZeroAblation:
    """Replace states by zero. Zero is a value like any other to the model, and often a strange one; prefer the mean."""


@dataclass(frozen=True)
class Resample:
    """Replace states by those of another example with another polarity, at the token of the same role (counted from its right end)."""

    seed: int = 0


Corruption = GaussianNoise | Counterfactual | MeanAblation | ZeroAblation | Resample
ABLATIONS = (MeanAblation, ZeroAblation, Resample)


@dataclass(frozen=True, eq=False)
class Pair:
    """One example, its clean run and its corrupted run.

    Attributes:
        example: what is asked.
        clean: prompt tokens (a batch of one) with roles.
        corrupted: tokens of the corrupted run; the clean ones where embeddings are noised or states ablated.
        gold: index of the right label.
        foil: index of the label the corrupted text asks for; -1 where it asks for none.
        corruption: how the corrupted run is made.
        sigma: standard deviation of the noise; 0 without noise.
        first: first position at which the two runs can differ.
        other: the counterfactual example that the corrupted run asks about, where there is one.
        clean_scores: log-probabilities of the labels, `[label]`.
        corrupted_scores: the same, `[draw label]`; None for ablations, which have no corrupted run.

    Raises:
        AlignmentError: the two prompts do not line up.
    """

    example: Example
    clean: Tokens
    corrupted: Tokens
    gold: int
    foil: int
    corruption: Corruption
    sigma: float = 0.0
    first: int = 0
    other: Example | None = None
    clean_scores: Float[Tensor, " label"] | None = None
    corrupted_scores: Float[Tensor, "draw label"] | None = None

    def __post_init__(self):
        check_alignment(self.clean, self.corrupted, self.example)

    @property
    def id(self) -> str:
        return self.example.id

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.clean.lengths[0]

    @property
    def draws(self) -> int:
        return self.corruption.draws if isinstance(self.corruption, GaussianNoise) else 1

    def noise_positions(self) -> list[int]:
        """Positions whose embeddings are noised."""
        if not isinstance(self.corruption, GaussianNoise) or self.sigma == 0:
            return []
        span = self.corruption.span
        if span == "all":
            return list(range(self.length))
        if span == "sentence":
            inside = {
                ROLES.index(r)
                for r in (
                    "before",
                    "aspect.first",
                    "aspect.middle",
                    "aspect.last",
                    "opinion",
                    "after",
                )
            }
            return [i for i, r in enumerate(self.clean.roles[0].tolist()) if r in inside]
        return self.clean.positions(span)

    def noise(self, d_model: int) -> Float[Tensor, "draw pos d_model"]:
        """The noise to add to the embeddings, on the CPU, float32; the same whenever it is asked for."""
        if not isinstance(self.corruption, GaussianNoise):
            raise ConfigError(f"a pair made by {type(self.corruption).__name__} has no noise")
        digest = hashlib.sha256(
            f"{self.corruption.seed}\0{self.example.id}\0{self.example.sentence}\0{self.example.aspect}".encode()
        ).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        noise = (
            torch.randn(self.corruption.draws, self.length, d_model, generator=generator)
            * self.sigma
        )
        mask = torch.zeros(self.length, 1)
        mask[self.noise_positions()] = 1.0
        return noise * mask

    def _repr_html_(self) -> str:
        from html import escape

        run = (
            ""
            if self.other is None
            else f"<div><small>corrupted run: {marked(self.other)}</small></div>"
        )
        if self.clean_scores is None:
            return self.example._repr_html_() + run
        said = [f"clean {_probabilities(self.clean_scores)}"]
        if self.corrupted_scores is not None:
            draws = f" (mean of {self.draws} draws)" if self.draws > 1 else ""
            said.append(f"corrupted {_probabilities(self.corrupted_scores)}{draws}")
        return f"{self.example._repr_html_()}{run}<div><small>P(label), in the order of the labels: {escape('; '.join(said))}</small></div>"


def _probabilities(scores: Float[Tensor, "*draw label"]) -> str:
    """Label probabilities, the mean over draws."""
    return ", ".join(
        f"{p:.3f}" for p in scores.double().exp().reshape(-1, scores.shape[-1]).mean(0).tolist()
    )


def check_alignment(clean: Tokens, corrupted: Tokens, example: Example) -> None:
    """Refuse two prompts that do not line up.

    Raises:
        AlignmentError: other lengths, or another role at some token.
    """
    if clean is corrupted:
        return
    name = example.id or repr(example.sentence[:40])
    a, b = clean.lengths[0], corrupted.lengths[0]
    ids_a, ids_b = clean.ids[0].tolist(), corrupted.ids[0].tolist()
    if a != b:
        i = next(
            (i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y), min(a, b)
        )
        raise AlignmentError(
            f"{name}: the clean prompt has {a} tokens and the corrupted one {b}; they part at token {i}; a counterfactual needs as many tokens"
        )
    # The opinion span may be known on one side only, or move by a token; every other role has to stand where it stood.
    soft = {ROLES.index("opinion"), ROLES.index("before"), ROLES.index("after")}
    for i, (x, y) in enumerate(
        zip(clean.roles[0].tolist(), corrupted.roles[0].tolist(), strict=True)
    ):
        if x != y and not (x in soft and y in soft):
            raise AlignmentError(
                f"{name}: token {i} is {ROLES[x]} in the clean prompt and {ROLES[y]} in the corrupted one; the edit moved the aspect"
            )


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """Pairs with the account of how they were chosen.

    Attributes:
        items: the pairs kept, in the order of the examples.
        corruption: how corrupted runs are made.
        continuations: how the labels are scored.
        verbalizer, template: what was asked.
        sigma: standard deviation of the noise, measured; 0 without noise.
        considered: examples looked at.
        dropped: reason -> count.
        draw_sd: mean over pairs of the standard deviation of P(gold) over noise draws; 0 without noise.
    """

    items: tuple[Pair, ...]
    corruption: Corruption
    continuations: tuple[Continuation, ...]
    verbalizer: Verbalizer
    template: PromptTemplate
    sigma: float = 0.0
    considered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    draw_sd: float = 0.0

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...
    def __getitem__(self, index):
        return (
            replace(self, items=self.items[index])
            if isinstance(index, slice)
            else self.items[index]
        )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.items)

    def account(self) -> dict[str, Any]:
        """For `run.json`: how many were considered, kept and dropped, and the strength of the corruption."""
        return {
            "considered": self.considered, "kept": len(self), "dropped": self.dropped, "sigma": self.sigma,
            "draw_sd": self.draw_sd, "classes_kept": dict(Counter(p.example.polarity.value for p in self)),
            "mixed_polarity": len(mixed_polarity([p.example for p in self.items])),
        }  # fmt: skip

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(p._repr_html_() for p in self.items[:3])
        gone = "; ".join(f"{n} dropped: {reason}" for reason, n in self.dropped.items())
        more = f"<div>&hellip; {len(self) - 3} more</div>" if len(self) > 3 else ""
        first = f"<b>{len(self)} pairs</b> of {self.considered} examples, {escape(str(self.corruption))}; {escape(gone) or 'none dropped'}"
        return f"<div>{first}</div>{head}{more}"


def aspect_embedding_std(model: Model, prompts: Sequence[Tokens]) -> float:
    """Standard deviation over all entries of the token embeddings of the aspect terms (ROME's unit of noise)."""
    ids = [t.ids[0, i] for t in prompts for i in t.positions("query") or t.positions("aspect")]
    if not ids:
        raise DataError(
            "no aspect tokens were found in the prompts; the noise scale is measured on them"
        )
    with torch.inference_mode():
        return float(model.hooked.embed(torch.stack(ids)[None].to(model.device)).float().std())


def make_pairs(
    model: Model,
    examples: Examples | Sequence[Example],
    corruption: Corruption | None = None,
    *,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    keep: str = "paper",
    limit: int | None = None,
    batch_size: int = 32,
) -> Pairs:
    """Clean and corrupted runs of the examples, filtered and counted.

    Args:
        model: what is traced.
        examples: what is asked.
        corruption: default `GaussianNoise()`, the paper's.
        template, verbalizer: default the paper's.
        keep: `paper` (clean right, corrupted wrong), `clean` (clean right) or `all`.
        limit: stop when this many pairs are kept.
        batch_size: prompts a forward pass while scoring.

    Raises:
        DataError: no pair is left.
    """
    corruption = GaussianNoise() if corruption is None else corruption
    template, verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
    if keep not in KEEPS:
        raise ConfigError(f"unknown filter {keep!r}; accepted: {choices(KEEPS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit of {limit} pairs was given; it must be 1 or more")
    continuations = verbalizer.continuations(model.tokenizer, template)
    prompts = [question(model, e, template) for e in examples]
    sigma = 0.0
    if isinstance(corruption, GaussianNoise):
        sigma = corruption.scale * aspect_embedding_std(model, prompts)

    dropped: Counter[str] = Counter()
    kept: list[Pair] = []
    considered = at = 0
    while at < len(prompts) and (limit is None or len(kept) < limit):
        # With a limit, no more are made and scored at a time than are still wanted.
        step = 4 * batch_size if limit is None else min(4 * batch_size, max(8, limit - len(kept)))
        made: list[Pair | str] = []
        for example, clean in zip(examples[at : at + step], prompts[at : at + step], strict=True):
            try:
                made.append(_pair(model, example, clean, corruption, sigma, template, verbalizer))
            except AlignmentError:
                made.append("counterfactual does not line up")
            except _NoCounterfactual:
                made.append("no counterfactual")
        at += step
        scored = iter(
            _scored(model, [p for p in made if isinstance(p, Pair)], continuations, batch_size)
        )
        for candidate in made:
            if limit is not None and len(kept) == limit:
                break
            considered += 1
            if isinstance(candidate, str):
                dropped[candidate] += 1
                continue
            pair = next(scored)
            if (reason := _reason_to_drop(pair, keep)) is None:
                kept.append(pair)
            else:
                dropped[reason] += 1
    if not kept:
        why = (
            ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "there were no examples"
        )
        raise DataError(
            f"no pair is left of {len(prompts)} examples ({why}); another corruption or --keep all would keep more"
        )
    sd = [
        float(p.corrupted_scores.exp()[:, p.gold].std())
        for p in kept
        if p.corrupted_scores is not None and len(p.corrupted_scores) > 1
    ]
    return Pairs(
        tuple(kept), corruption, continuations, verbalizer, template, sigma, considered, dict(dropped), sum(sd) / len(sd) if sd else 0.0
    )  # fmt: skip


class _NoCounterfactual(Exception):
    pass


def _pair(
    model: Model,
    example: Example,
    clean: Tokens,
    corruption: Corruption,
    sigma: float,
    template: PromptTemplate,
    verbalizer: Verbalizer,
) -> Pair:
    gold = verbalizer.index(example.polarity)
    if not isinstance(corruption, Counterfactual):
        pair = Pair(example, clean, clean, gold, -1, corruption, sigma)
        positions = pair.noise_positions()
        return replace(
            pair,
            first=min(positions)
            if positions
            else (pair.length if isinstance(corruption, GaussianNoise) else 0),
        )
    problem: AlignmentError | None = None
    for other in example.counterfactuals:
        corrupted = question(model, other, template)
        try:
            pair = Pair(
                example,
                clean,
                corrupted,
                gold,
                verbalizer.index(other.polarity),
                corruption,
                other=other,
            )
        except AlignmentError as error:
            problem = error
            continue
        differs = (clean.ids != corrupted.ids)[0].nonzero()
        return replace(pair, first=int(differs[0]) if len(differs) else pair.length)
    if problem is not None:
        raise problem
    raise _NoCounterfactual


def _scored(
    model: Model, pairs: Sequence[Pair], continuations: Sequence[Continuation], batch_size: int
) -> list[Pair]:
    """The pairs with the label scores of both runs."""
    clean = label_scores(model, [p.clean for p in pairs], continuations, batch_size=batch_size)
    corrupted: list[Tensor | None]
    if all(isinstance(p.corruption, Counterfactual) for p in pairs):
        corrupted = [
            s[None]
            for s in label_scores(
                model, [p.corrupted for p in pairs], continuations, batch_size=batch_size
            )
        ]
    elif all(isinstance(p.corruption, GaussianNoise) for p in pairs):
        corrupted = [noised_scores(model, p, continuations) for p in pairs]
    else:
        corrupted = [None] * len(pairs)
    return [
        replace(p, clean_scores=a, corrupted_scores=b)
        for p, a, b in zip(pairs, clean, corrupted, strict=True)
    ]


@torch.inference_mode()
def noised_scores(
    model: Model, pair: Pair, continuations: Sequence[Continuation]
) -> Float[Tensor, "draw label"]:
    """Label scores of the noised runs of one pair."""
    n_labels = sum(len(c.labels) for c in continuations)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    scores = torch.zeros(pair.draws, n_labels, dtype=wide)
    for continuation in continuations:
        runs = make_runs(model, [pair], continuation)
        reads = positions_read([runs.length] * pair.draws, continuation)
        part = read_labels(model, last(model, runs.corrupted, reads), continuation)
        scores[:, [i for i, _ in continuation.labels]] = part.to("cpu", wide)
    return scores


def _reason_to_drop(pair: Pair, keep: str) -> str | None:
    if keep == "all":
        return None
    assert pair.clean_scores is not None
    if int(pair.clean_scores.argmax()) != pair.gold:
        return "clean run wrong"
    if (
        keep == "paper"
        and pair.corrupted_scores is not None
        and int(pair.corrupted_scores.exp().mean(0).argmax()) == pair.gold
    ):
        return "corrupted run right"
    return None


# ---- runs: pairs of one length, as the engines take them ---------------------------------------------------------------------------


@dataclass(eq=False)
class Runs:
    """Clean and corrupted inputs of several pairs of equal length.

    Attributes:
        pairs: the pairs, in order.
        continuation: the label tokens appended to every prompt, and how many positions are read.
        clean: residual stream before block 0 of the clean runs, `[pair pos d_model]`.
        corrupted: of the corrupted runs, `[pair*draw pos d_model]`, draws of one pair together; the clean ones for ablations.
        draws: corrupted runs of each pair.
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
        return self.length - len(self.continuation.tokens)


def make_runs(model: Model, pairs: Sequence[Pair], continuation: Continuation) -> Runs:
    """Embed both runs of pairs that all have the same length."""
    lengths = {p.length for p in pairs}
    if len(lengths) != 1:
        raise AlignmentError(
            f"pairs of {sorted(lengths)} tokens cannot share a run; group them by length"
        )
    clean_tokens = extend(Tokens.stack([p.clean for p in pairs]), continuation)
    clean = model.embed(clean_tokens.ids)
    if isinstance(pairs[0].corruption, GaussianNoise):
        noise = torch.stack([p.noise(model.d_model) for p in pairs]).to(
            clean
        )  # [pair draw pos d_model]
        noise = torch.nn.functional.pad(noise, (0, 0, 0, len(continuation.tokens)))
        corrupted = (clean[:, None] + noise).flatten(0, 1)
    elif isinstance(pairs[0].corruption, Counterfactual):
        corrupted = model.embed(
            extend(Tokens.stack([p.corrupted for p in pairs]), continuation).ids
        )
    else:
        corrupted = clean
    return Runs(
        tuple(pairs), continuation, clean, corrupted, pairs[0].draws, clean_tokens.lengths[0]
    )


def by_length(pairs: Sequence[Pair]) -> dict[int, list[int]]:
    """Prompt length -> indices of the pairs of that length, shortest first."""
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(pairs):
        groups.setdefault(p.length, []).append(i)
    return dict(sorted(groups.items()))


def partners(pairs: Sequence[Pair], seed: int) -> list[int]:
    """For every pair another one of another polarity (of another sentence, where there is none), drawn once by the seed."""
    rng = random.Random(seed)
    chosen = []
    for i, p in enumerate(pairs):
        other = [
            j
            for j, q in enumerate(pairs)
            if q.gold != p.gold and q.example.cluster != p.example.cluster
        ]
        other = (
            other
            or [j for j, q in enumerate(pairs) if q.example.cluster != p.example.cluster]
            or [j for j in range(len(pairs)) if j != i]
            or [i]
        )
        chosen.append(rng.choice(other))
    return chosen


def same_role_positions(mine: Tokens, theirs: Tokens) -> list[int]:
    """For every token of `mine` the token of `theirs` with the same role, counted from the role's right end; -1 where it has no such role."""
    where: dict[int, list[int]] = {}
    for j, r in enumerate(theirs.roles[0, : theirs.lengths[0]].tolist()):
        where.setdefault(r, []).append(j)
    roles = mine.roles[0, : mine.lengths[0]].tolist()
    left: Counter[int] = Counter(roles)
    found = []
    for r in roles:
        left[r] -= 1
        places = where.get(r, [])
        found.append(places[max(0, len(places) - 1 - left[r])] if places else -1)
    return found


__all__ = [
    "Corruption", "Counterfactual", "Direction", "GaussianNoise", "MeanAblation", "Pair", "Pairs", "Resample", "Runs", "ZeroAblation",
    "by_length", "make_pairs", "make_runs", "partners", "same_role_positions",
]  # fmt: skip
