"""Make corrupted runs: one class per corruption.

| word | class | the corrupted run |
|---|---|---|
| `noise` | `GaussianNoise` | the same tokens, noise on their embeddings (ROME; the paper: on all tokens) |
| `counterfactual` | `Counterfactual` | the example's own minimal edit with another polarity |
| `aspect-swap` | `AspectSwap` | the same sentence, the question asks about another aspect of it |
| `opinion-swap` | `OpinionSwap` | the opinion expression replaced by one of another polarity |
| `mean`, `zero`, `resample` | `MeanAblation`, `ZeroAblation`, `Resample` | none: clean states are replaced |

Noise takes the model off its distribution. That can break more than the fact under study, and show
sites that only repair the damage. A counterfactual asks which states tell two polarities apart, and
needs such texts. When both are available, trust the counterfactual first.

To add a corruption, subclass `Corruption`, override what differs, and add the class to `WORDS`. The
rest of the package asks a corruption through its methods and never tests its class.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..axes import Resid
from ..errors import AlignmentError, ConfigError, DataError, choices
from ..examples import Example, Polarity, normal
from ..model import Model
from ..own import Asked
from ..prompts import Continuation, Tokenised, Tokens
from ..scoring import extend
from ..sites import ROLES, is_span
from ..words import Choice, shown

if TYPE_CHECKING:
    from .pairs import Pair

States = dict[tuple[int, str], Tensor]
"""(layer, kind) -> activation `[row pos ...]`."""
StatesOf = Callable[[Sequence["Pair"]], States]
"""Pairs of one length -> the clean states of their prompts, `[pair pos ...]`."""
Pool = Mapping[str, Sequence[Example]]
"""Sentence (`Example.cluster`) -> its examples: what an aspect can be swapped with."""


class NoiseSpan(Choice):
    """Tokens whose embeddings are noised."""

    ALL = "all", "every token of the prompt (the paper)"
    SENTENCE = "sentence", "every token of the sentence"
    ASPECT = "aspect", "the aspect inside the sentence"
    QUERY = "query", "the aspect in the question"


class MeanBy(Choice):
    """Tokens over which a mean ablation averages."""

    ROLE = "role", "tokens of the same role"
    SITE = "site", "all tokens"


_SENTENCE_ROLES = frozenset(
    ("before", "aspect.first", "aspect.middle", "aspect.last", "opinion", "after")
)


class Source(ABC):
    """Give the states that an ablation puts in."""

    @abstractmethod
    def states(self, clean: States, pairs: Sequence[Pair], length: int) -> States:
        """Return the states to put into the clean runs of pairs of one length.

        Args:
            clean: (layer, kind) -> `[pair pos ...]`.
            pairs: the pairs.
            length: positions, label tokens included; label tokens are never patched.
        """


class Corruption:
    """Base of all corruptions. Every attribute and method has a default for `same text, one run`.

    Attributes:
        word: its name on the command line and in Python.
        draws: corrupted runs per pair.
        is_ablation: there is no corrupted run; states of the clean run are replaced.
        changes_text: the corrupted run reads other tokens.
        must_follow: keep a pair only if the corrupted run gives the foil's answer.
        lacking: why an example is dropped when `corrupted` gives no text.
        misfit: why an example is dropped when none of the texts lines up.
    """

    word: ClassVar[str]
    draws: int = 1
    is_ablation: ClassVar[bool] = False
    changes_text: ClassVar[bool] = False
    must_follow: ClassVar[bool] = False
    lacking: ClassVar[str] = ""
    misfit: ClassVar[str] = "corrupted prompt does not line up"

    @property
    def name(self) -> str:
        """Return the name of the class, for records."""
        return type(self).__name__

    def settings(self) -> dict[str, Any]:
        """Return the settings, for records."""
        return dict(vars(self))

    def corrupted(self, example: Example, pool: Pool) -> Iterable[Example]:
        """Give the examples that the corrupted run may ask about, best first.

        Args:
            example: the clean one.
            pool: all examples, by sentence.
        """
        return (example,)

    def sigma(self, model: Model, prompts: Sequence[Tokenised]) -> float:
        """Measure the standard deviation of the noise; 0 without noise."""
        return 0.0

    def align(self, clean: Tokenised, corrupted: Tokenised, example: Asked) -> Tokenised:
        """Return the corrupted prompt with roles that match the clean one, token by token.

        Raises:
            AlignmentError: the prompts do not line up.
        """
        check_alignment(clean, corrupted, example)
        return corrupted

    def first(self, clean: Tokenised, corrupted: Tokenised, sigma: float) -> int:
        """Return the first position at which the two runs can differ; the length where none can."""
        return 0

    def positions(self, clean: Tokenised) -> list[int]:
        """Return the positions whose embeddings are noised."""
        return []

    def noise(self, pair: Pair, d_model: int) -> Float[Tensor, "draw pos d_model"]:
        """Draw the noise to add to the embeddings of a pair.

        Raises:
            ConfigError: this corruption adds none.
        """
        raise ConfigError(f"a pair made by {self.name} has no noise; only GaussianNoise has")

    def embed(
        self, model: Model, pairs: Sequence[Pair], clean: Resid, continuation: Continuation
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the residual streams before block 0 of the corrupted runs, draws of a pair together.

        Args:
            model: what is traced.
            pairs: of one length.
            clean: streams of the clean runs.
            continuation: the label tokens at the end of every prompt.
        """
        return clean

    def source(
        self, pairs: Sequence[Pair], kinds: set[tuple[int, str]], states_of: StatesOf
    ) -> Source | None:
        """Return where an ablation takes its states from; None where there is a corrupted run.

        Args:
            pairs: all pairs.
            kinds: (layer, kind) needed.
            states_of: gives clean states.
        """
        return None


# ---- noise ------------------------------------------------------------------------------------------

MOST_DRAWS = 10_000
LARGEST_SCALE = 1e6
"""Beyond these the noise of one pair fills the memory, or overflows float32."""


@dataclass(frozen=True)
class GaussianNoise(Corruption):
    """Add noise N(0, (scale * std)^2) to embeddings, std over the embeddings of the aspect terms.

    Meng et al. 2022 (ROME), appendix B.1: scale 3, 10 draws. ROME corrupts the subject; the paper's
    formula runs over all tokens.

    Attributes:
        scale: in standard deviations; finite, 0 or more.
        draws: independent draws; each is one corrupted run, and a pair's effect is their mean.
        span: which tokens: a `NoiseSpan` or its word, or a span that a `PromptPair` names.
        seed: fixes the draws together with the example, whatever the order of the examples or the
            number of processes.

    Raises:
        ConfigError: a value outside these ranges.

    Example:
        >>> GaussianNoise(scale=3.0, draws=2, span="aspect")
        GaussianNoise(scale=3.0, draws=2, span='aspect', seed=0)
    """

    word: ClassVar[str] = "noise"

    scale: float = 3.0
    draws: int = 10
    span: NoiseSpan | str = NoiseSpan.ALL
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, (int, float)) and 0 <= self.scale <= LARGEST_SCALE):
            given = f"{self.scale:g}" if isinstance(self.scale, (int, float)) else shown(self.scale)
            raise ConfigError(
                f"a noise scale of {given} was given; it must be a finite number, 0 or more, up to {LARGEST_SCALE:g}"
            )
        if not (isinstance(self.draws, int) and 1 <= self.draws <= MOST_DRAWS):
            raise ConfigError(
                f"{self.draws} noise draws were asked for; accepted: 1 to {MOST_DRAWS:,}"
            )
        if not self.own_span:
            object.__setattr__(self, "span", NoiseSpan.parse(self.span, "noise span"))

    @property
    def own_span(self) -> str | None:
        """Return the named span of own prompts that is noised; None for a `NoiseSpan`."""
        known = self.span in NoiseSpan.words() or not isinstance(self.span, str)
        return None if known or not is_span(self.span) else str(self.span)

    def sigma(self, model: Model, prompts: Sequence[Tokenised]) -> float:
        """Return `scale` times the standard deviation over the aspects' embeddings."""
        return self.scale * aspect_embedding_std(model, prompts, self.own_span)

    def first(self, clean: Tokenised, corrupted: Tokenised, sigma: float) -> int:
        """Return the first noised position."""
        return min(self.positions(clean) if sigma else [], default=clean.length)

    def positions(self, clean: Tokenised) -> list[int]:
        """Return the positions of the span."""
        if self.span == NoiseSpan.ALL:
            return list(range(clean.length))
        if self.span == NoiseSpan.SENTENCE:
            return [i for i, role in enumerate(clean.role_names) if role in _SENTENCE_ROLES]
        return clean.positions(str(self.span))

    def noise(self, pair: Pair, d_model: int) -> Float[Tensor, "draw pos d_model"]:
        """Draw the noise of a pair, on the CPU in float32; the same whenever it is asked for."""
        e = pair.example
        text = f"{self.seed}\0{e.id}\0{e.sentence}\0{e.aspect}"
        generator = torch.Generator().manual_seed(_number(text))
        noise = torch.randn(self.draws, pair.length, d_model, generator=generator) * pair.sigma
        mask = torch.zeros(pair.length, 1)
        mask[pair.noise_positions()] = 1.0
        return noise * mask

    def embed(
        self, model: Model, pairs: Sequence[Pair], clean: Resid, continuation: Continuation
    ) -> Float[Tensor, "row pos d_model"]:
        """Return the clean streams plus noise; label tokens stay clean."""
        noise = torch.stack([self.noise(p, model.d_model) for p in pairs]).to(clean)
        noise = torch.nn.functional.pad(noise, (0, 0, 0, len(continuation.tokens)))
        return (clean[:, None] + noise).flatten(0, 1)


def aspect_embedding_std(model: Model, prompts: Sequence[Tokens], span: str | None = None) -> float:
    """Return the standard deviation over all entries of the aspect terms' embeddings (ROME's unit).

    Args:
        model: whose embeddings.
        prompts: batches of one.
        span: of own prompts; where None, the aspect terms, or all named spans.

    Raises:
        DataError: no prompt has such tokens.
    """

    def places(t: Tokens) -> list[int]:
        if span is not None:
            return t.positions(span)
        own = [i for i, role in enumerate(t.roles[0].tolist()) if role >= len(ROLES)]
        return t.positions("query") or t.positions("aspect") or own

    ids = [t.ids[0, i] for t in prompts for i in places(t)]
    if not ids:
        raise DataError(
            f"no tokens of {span or 'an aspect or a named span'} were found in the prompts; the "
            "noise scale is measured on them"
        )
    with torch.inference_mode():
        return float(model.embed_tokens(torch.stack(ids)[None]).float().std())


# ---- other texts ------------------------------------------------------------------------------------


class _OtherText(Corruption):
    """Base of corruptions whose corrupted run reads another prompt of as many tokens."""

    changes_text: ClassVar[bool] = True

    def first(self, clean: Tokenised, corrupted: Tokenised, sigma: float) -> int:
        """Return the first position with another token."""
        differs = (clean.ids != corrupted.ids)[0].nonzero()
        return int(differs[0]) if len(differs) else clean.length

    def embed(
        self, model: Model, pairs: Sequence[Pair], clean: Resid, continuation: Continuation
    ) -> Float[Tensor, "row pos d_model"]:
        """Embed the corrupted prompts."""
        return model.embed(extend(Tokens.stack([p.corrupted for p in pairs]), continuation).ids)


@dataclass(frozen=True)
class Counterfactual(_OtherText):
    """Use the example's own minimal edit with another polarity; the first that lines up token by
    token.

    Example:
        >>> Counterfactual()
        Counterfactual()
    """

    word: ClassVar[str] = "counterfactual"
    lacking: ClassVar[str] = "no counterfactual"
    misfit: ClassVar[str] = "counterfactual does not line up"

    def corrupted(self, example: Example, pool: Pool) -> Iterable[Example]:
        """Give the example's counterfactuals."""
        return example.counterfactuals


@dataclass(frozen=True)
class AspectSwap(_OtherText):
    """Ask about another aspect of the same sentence, with another polarity.

    Works on real text wherever one sentence holds two polarities (every sentence of MAMS). The
    sentence is fixed, so that only the binding between question and sentence changes. Pairs whose
    two aspects have other numbers of tokens are dropped and counted.

    Pitfalls: the corrupted tokens are the aspect in the question, so early states there only undo
    the swap, and sites are not chosen from `query.*` by default. Sentences with one aspect are
    never used, so the pairs are a selected sample. The roles `aspect.*` mark the clean aspect in
    both runs.

    Example:
        >>> food = Example("good food , slow staff", "food", Polarity.POSITIVE, (5, 9))
        >>> staff = Example("good food , slow staff", "staff", Polarity.NEGATIVE, (17, 22))
        >>> [e.aspect for e in AspectSwap().corrupted(food, {food.cluster: [food, staff]})]
        ['staff']
    """

    word: ClassVar[str] = "aspect-swap"
    lacking: ClassVar[str] = "no aspect of another polarity in the sentence"
    misfit: ClassVar[str] = "the other aspect has another number of tokens"

    def corrupted(self, example: Example, pool: Pool) -> Iterable[Example]:
        """Give the examples of the same sentence with another aspect and another polarity."""
        return [
            other
            for other in pool.get(example.cluster, ())
            if other.sentence == example.sentence
            and other.polarity != example.polarity
            and normal(other.aspect) != normal(example.aspect)
        ]

    def align(self, clean: Tokenised, corrupted: Tokenised, example: Asked) -> Tokenised:
        """Give the corrupted prompt the roles of the clean one; only the question may differ."""
        if clean.length != corrupted.length:
            raise _other_length(clean, corrupted, example)
        for i in (clean.ids != corrupted.ids)[0].nonzero().flatten().tolist():
            if not clean.role_names[i].startswith("query"):
                raise AlignmentError(
                    f"{_who(example)}: token {i} differs and is {clean.role_names[i]}; an aspect "
                    "swap may change the aspect in the question only"
                )
        return Tokenised(corrupted.ids, clean.roles, corrupted.lengths, clean.vocabulary)


@dataclass(frozen=True)
class Lexicon:
    """Opinion expressions and their polarity, collected from training data.

    Attributes:
        expressions: lower-case text and polarity, in the order of first use.

    Example:
        >>> e = Example("the food was great", "food", Polarity.POSITIVE, (4, 8), opinion=(13, 18))
        >>> Lexicon.of([e]).of_polarity(Polarity.POSITIVE)
        ('great',)
    """

    expressions: tuple[tuple[str, Polarity], ...]

    @classmethod
    def of(cls, examples: Iterable[Example], purity: float = 0.8, least: int = 1) -> Lexicon:
        """Collect the opinion expressions of examples that mark them.

        Args:
            examples: training data; never the data that is traced.
            purity: smallest share of an expression's uses with one polarity.
            least: smallest number of uses.

        Raises:
            DataError: no example marks an opinion expression.
        """
        uses: dict[str, Counter[Polarity]] = {}
        for e in examples:
            if e.opinion is not None:
                text = normal(e.sentence[slice(*e.opinion)])
                uses.setdefault(text, Counter())[e.polarity] += 1
        kept = []
        for text, counts in uses.items():
            (polarity, n), *_ = counts.most_common(1)
            if text and n >= least and n >= purity * counts.total():
                kept.append((text, polarity))
        if not kept:
            raise DataError(
                "no example marks an opinion expression; a lexicon needs data with opinion spans, "
                "such as triplets of aspect, opinion and polarity"
            )
        return cls(tuple(kept))

    def of_polarity(self, polarity: Polarity) -> tuple[str, ...]:
        """Return the expressions of one polarity."""
        return tuple(text for text, p in self.expressions if p == polarity)

    def __len__(self) -> int:
        return len(self.expressions)

    def __repr__(self) -> str:
        counts = Counter(p.value for _, p in self.expressions)
        return f"Lexicon({', '.join(f'{counts[p.value]} {p.value}' for p in Polarity)})"


_OPPOSITES = {
    Polarity.POSITIVE: (Polarity.NEGATIVE, Polarity.NEUTRAL),
    Polarity.NEGATIVE: (Polarity.POSITIVE, Polarity.NEUTRAL),
    Polarity.NEUTRAL: (Polarity.POSITIVE, Polarity.NEGATIVE),
}


@dataclass(frozen=True)
class OpinionSwap(_OtherText):
    """Replace the opinion expression by one of another polarity from a lexicon, in place.

    Expressions of as many words are tried in an order drawn by `seed` and the example, until one
    gives as many tokens. A pair is kept only if the model's answer follows the swap, since nobody
    has labelled the new sentence; the others are counted.

    Pitfalls: the new sentence can be odd ("the waiter was crispy"); another opinion on the same
    aspect stays as it was; and keeping only pairs whose answer follows selects sentences where one
    expression decides. Early states of the role `opinion` only undo the swap.

    Attributes:
        lexicon: from training data.
        tries: expressions tried per example.
        seed: of the order.

    Example:
        >>> lexicon = Lexicon((("awful", Polarity.NEGATIVE),))
        >>> e = Example("Great food", "food", Polarity.POSITIVE, (6, 10), opinion=(0, 5))
        >>> [(o.sentence, o.polarity.value) for o in OpinionSwap(lexicon).corrupted(e, {})]
        [('Awful food', 'negative')]
    """

    word: ClassVar[str] = "opinion-swap"
    must_follow: ClassVar[bool] = True
    lacking: ClassVar[str] = "no opinion expression is marked, or none of another polarity fits"
    misfit: ClassVar[str] = "no expression of another polarity has as many tokens"

    lexicon: Lexicon = field(default_factory=lambda: _no_lexicon())
    tries: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.lexicon, Lexicon):
            raise ConfigError(
                f"OpinionSwap(lexicon=...) got {shown(self.lexicon)}; accepted: a Lexicon, such as "
                "Lexicon.of(training examples)"
            )
        if self.tries < 1:
            raise ConfigError(f"{self.tries} tries were asked for; at least 1 is needed")

    def settings(self) -> dict[str, Any]:
        """Return the settings; of the lexicon only its size."""
        return {"lexicon": repr(self.lexicon), "tries": self.tries, "seed": self.seed}

    def corrupted(self, example: Example, pool: Pool) -> Iterator[Example]:
        """Give the example with other opinion expressions in the place of its own."""
        if example.opinion is None or _overlap(example.opinion, example.span):
            return
        start, end = example.opinion
        own = example.sentence[start:end]
        order = random.Random(_number(f"{self.seed}\0{example.id}\0{example.sentence}"))
        left = self.tries
        for polarity in _OPPOSITES[example.polarity]:
            fitting = [
                text
                for text in self.lexicon.of_polarity(polarity)
                if len(text.split()) == len(own.split()) and text != normal(own)
            ]
            for text in order.sample(fitting, min(left, len(fitting))):
                left -= 1
                yield _swapped(example, text, polarity)


def _no_lexicon() -> Lexicon:
    raise ConfigError(
        "OpinionSwap needs a lexicon of training data; give OpinionSwap(Lexicon.of(examples)), or "
        "--lexicon DATA on the command line"
    )


def _swapped(example: Example, text: str, polarity: Polarity) -> Example:
    """Return the example with another opinion expression, its spans moved along."""
    assert example.opinion is not None
    start, end = example.opinion
    if example.sentence[start:end][:1].isupper():
        text = text[:1].upper() + text[1:]
    moved = len(text) - (end - start)
    span = example.span
    if span is not None and span[0] >= end:
        span = (span[0] + moved, span[1] + moved)
    return Example(
        example.sentence[:start] + text + example.sentence[end:],
        example.aspect,
        polarity,
        span,
        (start, start + len(text)),
        example.domain,
        example.source,
        example.line,
        f"{example.id}~{text}",
    )


def _overlap(a: tuple[int, int], b: tuple[int, int] | None) -> bool:
    return b is not None and a[0] < b[1] and b[0] < a[1]


def _number(text: str) -> int:
    """Return a 56-bit number that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


# ---- ablations --------------------------------------------------------------------------------------


class _AblationBase(Corruption):
    is_ablation: ClassVar[bool] = True


@dataclass(frozen=True)
class MeanAblation(_AblationBase):
    """Replace states by their mean over the pairs' clean runs.

    Attributes:
        by: a `MeanBy` or its word: `role` averages over tokens of the same role, `site` over all.

    Example:
        >>> MeanAblation(by="site")
        MeanAblation(by='site')
    """

    word: ClassVar[str] = "mean"

    by: MeanBy | str = MeanBy.ROLE

    def __post_init__(self) -> None:
        object.__setattr__(self, "by", MeanBy.parse(self.by, "mean ablation by"))

    def source(
        self, pairs: Sequence[Pair], kinds: set[tuple[int, str]], states_of: StatesOf
    ) -> Source:
        """Return tables of means, one row per role."""
        sums: States = {}
        n_roles = max(len(p.clean.vocabulary) for p in pairs)
        counts = torch.zeros(n_roles, dtype=torch.float64)
        for p in pairs:
            states = states_of([p])
            roles = p.clean.roles[0]
            counts.index_add_(0, roles, torch.ones(p.length, dtype=torch.float64))
            for key in kinds:
                act = states[key][0].double().cpu()
                zeros = torch.zeros(n_roles, *act.shape[1:], dtype=torch.float64)
                sums.setdefault(key, zeros).index_add_(0, roles, act)
        means = {}
        for key, table in sums.items():
            if self.by == MeanBy.ROLE:
                means[key] = table / counts.clamp(min=1).view(-1, *[1] * (table.ndim - 1))
            else:
                means[key] = (table.sum(0) / counts.sum()).expand_as(table)
        return MeanStates(means)


@dataclass(frozen=True)
class ZeroAblation(_AblationBase):
    """Replace states by zero. Zero is often a strange value to the model; prefer the mean.

    Example:
        >>> ZeroAblation()
        ZeroAblation()
    """

    word: ClassVar[str] = "zero"

    def source(
        self, pairs: Sequence[Pair], kinds: set[tuple[int, str]], states_of: StatesOf
    ) -> Source:
        """Return zeros."""
        return ZeroStates()


@dataclass(frozen=True)
class Resample(_AblationBase):
    """Replace states by those of another example with another polarity, at the token of the same role.

    Tokens of a role are counted from its right end.

    Attributes:
        seed: of the draw of the other example.

    Example:
        >>> Resample(seed=1)
        Resample(seed=1)
    """

    word: ClassVar[str] = "resample"

    seed: int = 0

    def source(
        self, pairs: Sequence[Pair], kinds: set[tuple[int, str]], states_of: StatesOf
    ) -> Source:
        """Return the states of each pair's partner."""
        pairs = list(pairs)
        chosen = dict(zip((p.id for p in pairs), partners(pairs, self.seed), strict=True))

        def partner_states(p: Pair) -> States:
            other = pairs[chosen[p.id]]
            mine, theirs = states_of([p]), states_of([other])
            index = torch.tensor(same_role_positions(p.clean, other.clean))
            out = {}
            for key in kinds:
                moved = theirs[key][0][index.clamp(min=0).to(theirs[key].device)]
                own = mine[key][0]
                keep = (index < 0).to(own.device).view(-1, *[1] * (own.ndim - 1))
                out[key] = torch.where(keep, own, moved)  # a role the partner lacks stays as it is
            return out

        return PartnerStates(partner_states)


@dataclass(frozen=True)
class SpanAlignment(_AblationBase):
    """Put states of a corrupted prompt of another length into the clean run, span by span.

    Each clean token takes the states of its partner in the corrupted prompt (`Pair.partner`). What
    is patched is the clean run, so the direction is noise. `prompt_pairs` takes this corruption by
    itself where a pair's prompts have other lengths.

    Example:
        >>> SpanAlignment().changes_text
        True
    """

    word: ClassVar[str] = "spans"
    changes_text: ClassVar[bool] = True

    def align(self, clean: Tokenised, corrupted: Tokenised, example: Asked) -> Tokenised:
        """Return the corrupted prompt; `Pair.partner` says what lines up."""
        return corrupted

    def source(
        self, pairs: Sequence[Pair], kinds: set[tuple[int, str]], states_of: StatesOf
    ) -> Source:
        """Return the states of each token's partner."""

        def partner_states(p: Pair) -> States:
            theirs = states_of([replace(p, clean=p.corrupted, partner=None)])
            index = torch.tensor(p.partner)
            return {key: theirs[key][0][index.to(theirs[key].device)] for key in kinds}

        return PartnerStates(partner_states)


@dataclass(frozen=True, eq=False)
class ZeroStates(Source):
    """A source of zeros."""

    def states(self, clean: States, pairs: Sequence[Pair], length: int) -> States:
        """Return zeros of the shapes of the clean states."""
        return {key: torch.zeros_like(act) for key, act in clean.items()}


@dataclass(frozen=True, eq=False)
class MeanStates(Source):
    """A source of means: (layer, kind) -> `[role ...]`."""

    means: States

    def states(self, clean: States, pairs: Sequence[Pair], length: int) -> States:
        """Return the mean of every token's role."""
        pad = torch.nn.functional.pad
        roles = torch.stack([pad(p.clean.roles[0], (0, length - p.length)) for p in pairs])
        return {k: table.to(clean[k])[roles] for k, table in self.means.items() if k in clean}


@dataclass(frozen=True, eq=False)
class PartnerStates(Source):
    """A source of another example's states at the positions of the same role."""

    of: Callable[[Pair], States]

    def states(self, clean: States, pairs: Sequence[Pair], length: int) -> States:
        """Return the partners' states, zeros at label tokens."""
        parts = [self.of(p) for p in pairs]
        return {
            key: torch.stack([_pad(part[key].to(act), length) for part in parts])
            for key, act in clean.items()
        }


def _pad(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - x.shape[0], *x.shape[1:])])


def partners(pairs: Sequence[Pair], seed: int) -> list[int]:
    """Draw for every pair another one of another polarity and sentence.

    Where there is none: of another sentence; else any other pair; else the pair itself.
    """
    rng = random.Random(seed)
    chosen = []
    for i, p in enumerate(pairs):
        elsewhere = [j for j, q in enumerate(pairs) if q.example.cluster != p.example.cluster]
        others = (
            [j for j in elsewhere if pairs[j].example.answer != p.example.answer]
            or elsewhere
            or [j for j in range(len(pairs)) if j != i]
            or [i]
        )
        chosen.append(rng.choice(others))
    return chosen


def same_role_positions(mine: Tokenised, theirs: Tokenised) -> list[int]:
    """Return for every token of `mine` the token of `theirs` with the same role.

    Tokens of a role are counted from its right end; -1 where `theirs` lacks the role.
    """
    where: dict[str, list[int]] = {}
    for j, role in enumerate(theirs.role_names):
        where.setdefault(role, []).append(j)
    left = Counter(mine.role_names)
    positions = []
    for role in mine.role_names:
        left[role] -= 1
        places = where.get(role, [])
        positions.append(places[max(0, len(places) - 1 - left[role])] if places else -1)
    return positions


# ---- alignment --------------------------------------------------------------------------------------


def check_alignment(clean: Tokenised, corrupted: Tokenised, example: Asked) -> None:
    """Refuse two prompts that do not line up.

    Raises:
        AlignmentError: other lengths, or another role at some token.
    """
    if clean is corrupted:
        return
    if clean.length != corrupted.length:
        raise _other_length(clean, corrupted, example)
    # The opinion may be known in one prompt only, or move by a token. Other roles must not move.
    soft = {"opinion", "before", "after"}
    for i, (x, y) in enumerate(zip(clean.role_names, corrupted.role_names, strict=True)):
        if x != y and not (x in soft and y in soft):
            raise AlignmentError(
                f"{_who(example)}: token {i} is {x} in the clean prompt and {y} in the corrupted "
                "one; the edit moved the aspect"
            )


def _other_length(clean: Tokenised, corrupted: Tokenised, example: Asked) -> AlignmentError:
    a, b = clean.ids[0].tolist(), corrupted.ids[0].tolist()
    shorter = min(len(a), len(b))
    i = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    return AlignmentError(
        f"{_who(example)}: the clean prompt has {len(a)} tokens and the corrupted one {len(b)}; "
        f"they part at token {i}; a counterfactual needs as many tokens"
    )


def _who(example: Asked) -> str:
    return example.id or repr(example.sentence[:40])


# ---- words ------------------------------------------------------------------------------------------

WORDS: dict[str, type[Corruption]] = {
    c.word: c
    for c in (
        GaussianNoise,
        Counterfactual,
        AspectSwap,
        OpinionSwap,
        MeanAblation,
        ZeroAblation,
        Resample,
    )
}
"""Word -> class. The words are accepted on the command line and in Python."""


def as_corruption(value: object) -> Corruption:
    """Return the corruption that a value names.

    Args:
        value: a corruption, its word, or None for the paper's noise.

    Raises:
        ConfigError: it names none.

    Example:
        >>> as_corruption("mean")
        MeanAblation(by='role')
    """
    if value is None:
        return GaussianNoise()
    if isinstance(value, Corruption):
        return value
    if isinstance(value, str) and value in WORDS:
        return WORDS[value]()
    if isinstance(value, type) and issubclass(value, Corruption):
        raise ConfigError(
            f"the class {value.__name__} was given as a corruption; an instance is needed: "
            f"{value.__name__}()"
        )
    raise ConfigError(
        f"{shown(value)} is no corruption; accepted: {choices(WORDS)}, or an instance such as "
        "GaussianNoise(scale=3.0)"
    )
