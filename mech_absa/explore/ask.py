"""A state -> the clean and the corrupted run of its review, aligned, and what the model answers in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..errors import AlignmentError, ConfigError, MechAbsaError
from ..examples import Example, Polarity
from ..model import Model
from ..patch.corruption import AspectSwap, Corruption, Counterfactual, GaussianNoise
from ..patch.pairs import Pair, Pairs, make_pairs
from ..prompts import Continuation, PromptTemplate, Tokenised, Verbalizer
from ..report.maps import spaced
from ..scoring import Stream, label_scores, question
from .state import AUTO, Corruptions, State, place

ID = "review"
"""Id of the review, which fixes its noise: the same in the page, the command and the Python code."""


@dataclass(frozen=True, eq=False)
class Question:
    """How a model is asked.

    Attributes:
        model: which.
        template, verbalizer: the question and its labels.
    """

    model: Model
    template: PromptTemplate
    verbalizer: Verbalizer

    @property
    def continuations(self) -> tuple[Continuation, ...]:
        """Return how the labels are scored."""
        return self.verbalizer.continuations(self.model.tokenizer, self.template)

    def tokens(self, example: Example) -> Tokenised:
        """Return the prompt of an example."""
        return question(self.model, example, self.template)

    def scores(
        self, prompts: Sequence[Tokenised], edit: Any = None
    ) -> Float[Tensor, "prompt label"]:
        """Return the log-probabilities of the labels."""
        return label_scores(Stream(self.model, edit), prompts, self.continuations)

    def texts(self, tokens: Tokenised, example: Example) -> list[str]:
        """Return the text of every token, with the blanks before it."""
        words = [self.model.tokenizer.decode([i]) for i in tokens.ids[0].tolist()]
        return spaced(words, self.template(example).text)


def clean_example(q: Question, state: State) -> Example:
    """Return the review as an example; the gold label is the model's own answer where none is given."""
    span = state.at
    if state.gold != AUTO:
        gold = Polarity(state.gold)
    else:
        draft = Example(state.sentence, state.aspect, Polarity.POSITIVE, span, id=ID)
        gold = q.verbalizer.polarities[int(q.scores([q.tokens(draft)])[0].argmax())]
    return Example(state.sentence, state.aspect, gold, span, id=ID)


def other_example(q: Question, state: State, clean: Example) -> Example:
    """Return what the corrupted run of another text asks about.

    Raises:
        ConfigError: nothing is changed, or the changed text lacks the aspect.
    """
    if state.corruption == Corruptions.SWAP:
        if not state.other.strip():
            raise ConfigError("no other aspect is given; type the words to ask about instead")
        text, aspect, start = state.sentence, state.other, -1
        if state.other == state.aspect:
            raise ConfigError(f"both runs ask about {state.aspect!r}; name another aspect")
    else:
        text, aspect, start = state.edited, state.aspect, moved(state, clean)
        if not text.strip() or text == state.sentence:
            raise ConfigError("both runs read the same text; change a word of the corrupted run")
    span = place(text, aspect, start)
    if state.foil != AUTO:
        foil = Polarity(state.foil)
    else:
        draft = Example(text, aspect, clean.polarity, span)
        scores = q.scores([q.tokens(draft)])[0].tolist()
        labels = [p for p in q.verbalizer.polarities if p != clean.polarity]
        foil = max(labels, key=lambda p: scores[q.verbalizer.index(p)])
    if foil == clean.polarity:
        raise ConfigError(
            f"both runs are to answer {foil.value}; the corrupted run needs another label"
        )
    return Example(text, aspect, foil, span, id=f"{ID}-corrupted")


def moved(state: State, clean: Example) -> int:
    """Return where the aspect should begin in the edited text: it moves with what stands before it."""
    assert clean.span is not None
    before, after, at = state.sentence, state.edited, clean.span[0]
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), at)
    return at if same >= at else max(0, at + len(after) - len(before))


def corruption_of(state: State) -> Corruption:
    """Return how the corrupted run is made."""
    if state.corruption == Corruptions.NOISE:
        return GaussianNoise(state.scale, state.draws, state.span, state.seed)
    return AspectSwap() if state.corruption == Corruptions.SWAP else Counterfactual()


def asked_examples(q: Question, state: State) -> list[Example]:
    """Return what `make_pairs` is given: the review first, and what it can be swapped with."""
    clean = clean_example(q, state)
    if state.corruption == Corruptions.NOISE:
        return [clean]
    other = other_example(q, state, clean)
    if state.corruption == Corruptions.SWAP:
        return [clean, other]
    held = {f: getattr(clean, f) for f in ("sentence", "aspect", "polarity", "span", "id")}
    return [Example(**held, counterfactuals=(other,))]


def pairs_of(q: Question, state: State) -> Pairs:
    """Return the one pair of a state.

    Raises:
        MechAbsaError: the state asks nothing, or its two runs do not line up.
    """
    examples, corruption = asked_examples(q, state), corruption_of(state)
    clean = q.tokens(examples[0])
    if corruption.changes_text:
        other = examples[0].counterfactuals[0] if len(examples) == 1 else examples[1]
        corrupted = q.tokens(other)
        if clean.length != corrupted.length:
            raise AlignmentError(
                f"the corrupted run has {corrupted.length} tokens and the clean run {clean.length}; "
                "choose words with as many tokens, so that both line up"
            )
        corruption.align(clean, corrupted, examples[0])
    return make_pairs(
        q.model, examples, corruption, template=q.template, verbalizer=q.verbalizer, keep="all",
        limit=1,
    )  # fmt: skip


def look(q: Question, state: State, edit: Any = None) -> dict[str, Any]:
    """Return what the page shows at once: tokens, roles, and label probabilities of both runs.

    Args:
        q: whom to ask.
        state: what.
        edit: a trained edit, whose answer to the review is added.

    Raises:
        MechAbsaError: there is no review, or no aspect in it.
    """
    clean = clean_example(q, state)
    tokens = q.tokens(clean)
    answer: dict[str, Any] = {
        "link": state.link(), "start": clean.span[0] if clean.span else -1, "gold": clean.polarity.value,
        "tokens": q.texts(tokens, clean), "roles": list(tokens.role_names),
        "clean": rounded(q.scores([tokens])[0].exp()), "corrupted": None, "other": None, "problem": "",
        "edited": None if edit is None else rounded(q.scores([tokens], edit)[0].exp()),
    }  # fmt: skip
    try:
        if state.corruption != Corruptions.NOISE:
            example = other_example(q, state, clean)
            answer["other"] = q.texts(q.tokens(example), example)
        pair = pairs_of(q, state)[0]
    except MechAbsaError as error:
        return answer | {"problem": str(error)}
    assert pair.corrupted_scores is not None
    return answer | {
        "corrupted": rounded(pair.corrupted_scores.double().exp().mean(0)),
        "foil": foil_of(q, pair), "sigma": pair.sigma, "first": pair.first,
    }  # fmt: skip


def foil_of(q: Question, pair: Pair) -> str | None:
    """Return the polarity that the corrupted run should give; None where it asks for none."""
    return None if pair.foil is None else q.verbalizer.polarities[pair.foil].value


def rounded(values: Tensor, digits: int = 6) -> list[float]:
    """Return numbers to so many significant digits."""
    return [float(f"{v:.{digits}g}") for v in values.double().tolist()]


__all__ = [
    "ID",
    "Question",
    "asked_examples",
    "clean_example",
    "corruption_of",
    "look",
    "pairs_of",
    "rounded",
]
