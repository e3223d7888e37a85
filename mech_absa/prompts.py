"""Turn an example into a prompt, the prompt into tokens with roles, and polarities into label
strings.

The paper asks `Given the sentence: '{S}', what is the sentiment polarity of the aspect term {A} ?`
and expects `positive`, `negative` or `neutral`. The aspect stands in that text twice: in the
sentence and in the question. In a causal model only the second one can have read the whole
sentence. So the two are kept apart: their tokens have the roles `aspect.*` and `query.*`.

Roles come from character offsets, not from counting tokens. So they hold for byte-level BPE and
sentencepiece, with a BOS token or without, for aspects of many sub-tokens and for aspects that the
sentence repeats. A token belongs to the span that its visible characters (without blanks) overlap.
A token that glues the aspect to a comma belongs to the aspect.

Labels are strings. The score of a label is the summed log-probability of its tokens after the
prompt. So labels may have several tokens, different lengths, or a common first token.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .axes import Ids, Roles
from .errors import PromptError
from .examples import Example, Polarity, Span
from .sites import ROLES, role_indices

ROLE = {name: i for i, name in enumerate(ROLES)}


@dataclass(frozen=True)
class Prompt:
    """Hold the text of a question, with the characters of every part of it.

    Attributes:
        text: the whole prompt.
        sentence: span of the sentence.
        aspect: span of the aspect inside the sentence; None if it has no words there.
        opinion: span of the opinion expression, if known.
        queries: spans of the aspect outside the sentence, in reading order.
        example: the example that is asked about.

    Example:
        >>> import mech_absa as ma
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> prompt = ma.PromptTemplate("{sentence} About {aspect}:")(example)
        >>> prompt.text
        'The food was great. About food:'
    """

    text: str
    sentence: Span
    aspect: Span | None
    opinion: Span | None
    queries: tuple[Span, ...]
    example: Example = field(repr=False)


@dataclass(frozen=True)
class PromptTemplate:
    """Make prompts from a text with one `{sentence}` and at least one `{aspect}`.

    Raises:
        PromptError: a field is missing or unknown.

    Example:
        >>> import mech_absa as ma
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> ma.PromptTemplate("{sentence} About {aspect}:")(example).text
        'The food was great. About food:'
    """

    text: str = "Given the sentence: '{sentence}', what is the sentiment polarity of the aspect term {aspect} ?"

    def __post_init__(self) -> None:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise PromptError(
                f"template {self.text!r} does not parse ({error}); write {{{{ and }}}} for braces"
            ) from None
        fields = [name for _, name, _, _ in parts if name is not None]
        for _, name, spec, conversion in parts:
            if spec or conversion:
                raise PromptError(
                    f"template {self.text!r} formats the field {{{name}}}; accepted: {{sentence}} and "
                    "{aspect} without : or !"
                )
            if name not in ("sentence", "aspect", None):
                raise PromptError(
                    f"template {self.text!r} has an unknown field {{{name}}}; accepted: {{sentence}} and {{aspect}}"
                )
        if fields.count("sentence") != 1:
            raise PromptError(
                f"template {self.text!r} has {fields.count('sentence')} fields {{sentence}}; exactly one is needed"
            )
        if "aspect" not in fields:
            raise PromptError(
                f"template {self.text!r} has no field {{aspect}}; the question must name the aspect at least once"
            )

    def __call__(self, example: Example) -> Prompt:
        """Return the prompt that asks about `example`."""
        text, queries, offset = "", [], 0
        for literal, name, _, _ in string.Formatter().parse(self.text):
            text += literal
            if name == "sentence":
                offset = len(text)
                text += example.sentence
            elif name == "aspect":
                queries.append((len(text), len(text) + len(example.aspect)))
                text += example.aspect

        def shift(span: Span | None) -> Span | None:
            return None if span is None else (span[0] + offset, span[1] + offset)

        sentence = (offset, offset + len(example.sentence))
        return Prompt(
            text, sentence, shift(example.span), shift(example.opinion), tuple(queries), example
        )


@dataclass(frozen=True, eq=False)
class Tokens:
    """Hold a batch of token sequences, padded on the right.

    In a causal model padding on the right cannot reach the tokens before it, so no attention mask
    is needed and a batch gives what its rows give one by one.

    Attributes:
        ids: token ids.
        roles: index into `vocabulary` of every token; -1 where there is only padding.
        lengths: real tokens of each row.
        vocabulary: names of the roles: those of reviews, then those that a task brings.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> batch = ma.Tokens.stack([pair.clean for pair in pairs])
        >>> len(batch)
        2
    """

    ids: Ids
    roles: Roles
    lengths: tuple[int, ...]
    vocabulary: tuple[str, ...] = ROLES

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def stack(batch: Sequence[Tokens], pad_id: int = 0) -> Tokens:
        """Put several batches together, padded on the right.

        Roles of several vocabularies are numbered anew, in one vocabulary of them all.
        """
        width = max(max(t.lengths) for t in batch)
        vocabulary = tuple(dict.fromkeys(role for t in batch for role in t.vocabulary))

        def grow(x: torch.Tensor, value: int) -> torch.Tensor:
            return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value)[:, :width]

        return Tokens(
            torch.cat([grow(t.ids, pad_id) for t in batch]),
            torch.cat([grow(t.roles_in(vocabulary), -1) for t in batch]),
            tuple(n for t in batch for n in t.lengths),
            vocabulary,
        )

    def roles_in(self, vocabulary: tuple[str, ...]) -> Roles:
        """Return the roles as indices into another vocabulary, which has all of them."""
        if vocabulary[: len(self.vocabulary)] == self.vocabulary:
            return self.roles
        new = torch.tensor([*map(vocabulary.index, self.vocabulary), -1])
        return new.to(self.roles.device)[self.roles]

    def positions(self, at: str | int | None, row: int = 0) -> list[int]:
        """Return the positions of a role, of a role group, of one absolute position (negative from
        the end), or all (None).
        """
        n = self.lengths[row]
        if at is None:
            return list(range(n))
        if isinstance(at, int):
            return [at % n] if -n <= at < n else []
        wanted = set(role_indices(at, self.vocabulary))
        return [i for i, r in enumerate(self.roles[row, :n].tolist()) if r in wanted]


@dataclass(frozen=True, eq=False)
class Tokenised(Tokens):
    """Hold one prompt: a batch of one row without padding, which can be run or stacked.

    Example:
        >>> t = Tokenised.of([5, 6, 7], ["template", "query.last", "answer"])
        >>> t.length, t.role_names, t.positions("query")
        (3, ('template', 'query.last', 'answer'), [1])
    """

    def __post_init__(self) -> None:
        if tuple(self.ids.shape) != (1, self.lengths[0]) or len(self.lengths) != 1:
            raise PromptError(
                f"one prompt was expected, without padding; {tuple(self.ids.shape)} tokens came "
                f"with lengths {self.lengths}"
            )

    @classmethod
    def of(
        cls, ids: Sequence[int], roles: Sequence[str], vocabulary: Sequence[str] = ROLES
    ) -> Tokenised:
        """Return the prompt with these token ids and the role of each.

        Roles that the vocabulary lacks are added to it.
        """
        known = {role: i for i, role in enumerate(dict.fromkeys((*vocabulary, *roles)))}
        at = torch.tensor([[known[role] for role in roles]])
        return cls(torch.tensor([ids]), at, (len(ids),), tuple(known))

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return self.lengths[0]

    @cached_property
    def token_ids(self) -> tuple[int, ...]:
        """Return the token ids."""
        return tuple(self.ids[0].tolist())

    @cached_property
    def role_names(self) -> tuple[str, ...]:
        """Return the role of every token."""
        return tuple(self.vocabulary[r] for r in self.roles[0].tolist())


def encode(prompt: Prompt, tokenizer: Any, bos: bool | None = None) -> Tokenised:
    """Return the tokens of one prompt and the role of each.

    Args:
        prompt: the text and its parts.
        tokenizer: a fast Hugging Face tokenizer (character offsets are needed).
        bos: put the beginning-of-sequence token first; None follows the tokenizer.

    Raises:
        PromptError: the tokenizer has no offsets, or no BOS token although one is wanted.
    """
    ids, offsets = _ids_and_offsets(tokenizer, prompt.text)
    roles = _roles(prompt, offsets)
    if adds_bos(tokenizer) if bos is None else bos:
        ids, roles = [_bos_id(tokenizer), *ids], [ROLE["template"], *roles]
    if not ids:
        raise PromptError("the prompt is empty")
    roles[-1] = ROLE["answer"]
    return Tokenised(torch.tensor([ids]), torch.tensor([roles]), (len(ids),))


def encode_text(
    text: str,
    spans: Mapping[str, Span],
    tokenizer: Any,
    bos: bool | None = None,
    name: str = "",
    vocabulary: Sequence[str] = ROLES,
) -> Tokenised:
    """Return the tokens of a prompt of one's own; named spans give the roles.

    Args:
        text: the prompt.
        spans: name -> characters; each needs a token that no other span has, and not the last one,
            whose role is `answer`.
        tokenizer, bos: as in `encode`.
        name: of the prompt, for errors.
        vocabulary: roles of the task; those of the spans are added where it lacks them.

    Raises:
        PromptError: a span has no token, or shares one.
    """
    ids, offsets = _ids_and_offsets(tokenizer, text)
    visible = [_visible(text, span) for span in offsets]
    roles, owner = ["template"] * len(ids), [""] * len(ids)
    for span, (start, end) in spans.items():
        inside = [i for i, (a, b) in enumerate(visible) if a < end and b > start]
        if shared := [i for i in inside if owner[i]]:
            raise PromptError(
                f"the spans {owner[shared[0]]!r} and {span!r} of {name!r} share token {shared[0]}; "
                "spans must not overlap"
            )
        if not [i for i in inside if i < len(ids) - 1]:
            raise PromptError(
                f"the span {span!r} of {name!r} has no token but the last of the prompt, where the "
                "answer is read; name words before it"
            )
        for i in inside:
            roles[i], owner[i] = f"{span}.middle", span
        roles[inside[0]], roles[inside[-1]] = f"{span}.first", f"{span}.last"
    if adds_bos(tokenizer) if bos is None else bos:
        ids, roles = [_bos_id(tokenizer), *ids], ["template", *roles]
    if not ids:
        raise PromptError(f"the prompt of {name!r} is empty")
    roles[-1] = "answer"
    return Tokenised.of(ids, roles, vocabulary)


def answer_id(tokenizer: Any, text: str, answer: str, name: str = "") -> int:
    """Return the token that continues a prompt with an answer.

    Raises:
        PromptError: the answer is several tokens, or melts into the prompt.
    """
    before, _ = _ids_and_offsets(tokenizer, text)
    ids, _ = _ids_and_offsets(tokenizer, text + answer)
    more = ids[len(before) :]
    if ids[: len(before)] != before or not more:
        raise PromptError(
            f"the answer {answer!r} of {name!r} melts into the last token of its prompt; begin it "
            "with a blank, or end the prompt before the blank"
        )
    if len(more) > 1:
        first = tokenizer.decode(more[:1])
        raise PromptError(
            f"the answer {answer!r} of {name!r} is {len(more)} tokens, and one is needed; its first "
            f"is {first!r}"
        )
    return more[0]


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise PromptError(
            f"a BOS token was asked for, but the tokenizer {tokenizer.name_or_path!r} has none"
        )
    return int(tokenizer.bos_token_id)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts its BOS token first by default."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _ids_and_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    if not getattr(tokenizer, "is_fast", False):
        raise PromptError(
            f"the tokenizer {tokenizer.name_or_path!r} gives no character offsets; a fast tokenizer (tokenizer.json) is needed"
        )
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(out["input_ids"]), [(int(a), int(b)) for a, b in out["offset_mapping"]]


def _roles(prompt: Prompt, offsets: list[Span]) -> list[int]:
    """Return the role of every token, by the span that its visible characters overlap."""
    visible = [_visible(prompt.text, span) for span in offsets]

    def inside(span: Span | None) -> list[int]:
        if span is None:
            return []
        start, end = span
        return [i for i, (a, b) in enumerate(visible) if a < end and b > start]

    roles = [ROLE["template"]] * len(offsets)
    sentence, aspect = inside(prompt.sentence), inside(prompt.aspect)
    for i in sentence:
        roles[i] = ROLE["after"] if aspect and i > aspect[-1] else ROLE["before"]
    for i in inside(prompt.opinion):
        roles[i] = ROLE["opinion"]
    # Last, so that a token shared with the opinion or the template counts as the aspect's.
    for tokens, name in [(aspect, "aspect"), *((inside(q), "query") for q in prompt.queries)]:
        for i in tokens:
            roles[i] = ROLE[f"{name}.middle"]
        if tokens:
            roles[tokens[0]] = ROLE[f"{name}.first"]
            roles[tokens[-1]] = ROLE[f"{name}.last"]
    return roles


def _visible(text: str, span: Span) -> Span:
    """Return the span without outer blanks; unchanged if it is all blank.

    Tokenizers disagree on whether a word's leading blank belongs to it; its visible characters are
    what it says.
    """
    start, end = span
    inner = text[start:end].strip()
    if not inner:
        return span
    start += text[start:end].index(inner)
    return start, start + len(inner)


@dataclass(frozen=True)
class Continuation:
    """Hold label strings that one run of `prompt + tokens` can score.

    A label of k tokens is read at the last position of the prompt and the k-1 positions after it.
    Labels of one token share the empty continuation, so the usual three labels cost a single run.

    Attributes:
        tokens: appended to the prompt (the label without its last token).
        labels: (index of the label, its token ids), every label that this run scores.
    """

    tokens: tuple[int, ...]
    labels: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def reads(self) -> int:
        """Return how many of the last positions are read."""
        return len(self.tokens) + 1


@dataclass(frozen=True)
class Verbalizer:
    """Name each polarity by a label string.

    Attributes:
        words: polarity -> label string.
        separator: between prompt and label. The authors use none; with a blank, most tokenizers see
            an ordinary word.

    Example:
        >>> import mech_absa as ma
        >>> verbalizer = ma.Verbalizer.of(["good", "bad", "fine"])
        >>> [p.value for p in verbalizer.polarities]
        ['positive', 'negative', 'neutral']
    """

    words: tuple[tuple[Polarity, str], ...] = tuple((p, p.value) for p in Polarity)
    separator: str = " "

    def __post_init__(self) -> None:
        if len(self.words) < 2:
            raise PromptError(
                f"{len(self.words)} label was given; at least two are needed to tell apart"
            )
        if empty := [p.value for p, w in self.words if not w.strip()]:
            raise PromptError(f"the label of {empty[0]} is empty; a word is needed")

    @classmethod
    def of(cls, words: dict[str, str] | Iterable[str], separator: str = " ") -> Verbalizer:
        """Make a verbalizer from `{"positive": "good", ...}`, or from words in the order positive,
        negative, neutral.

        Raises:
            PromptError: a polarity is unknown.
        """
        if not isinstance(words, dict):
            words = dict(zip((p.value for p in Polarity), words, strict=False))
        known = {p.value: p for p in Polarity}
        for name in words:
            if name not in known:
                raise PromptError(f"a label was given for {name!r}; accepted: {', '.join(known)}")
        return cls(tuple((known[name], word) for name, word in words.items()), separator)

    @cached_property
    def polarities(self) -> tuple[Polarity, ...]:
        return tuple(p for p, _ in self.words)

    def index(self, polarity: Polarity) -> int:
        """Return the index of the label of this polarity.

        Raises:
            PromptError: none does.
        """
        try:
            return self.polarities.index(polarity)
        except ValueError:
            raise PromptError(
                f"no label for {polarity.value}; labels were given for {', '.join(p.value for p in self.polarities)}"
            ) from None

    def label_ids(
        self, tokenizer: Any, template: PromptTemplate | None = None
    ) -> list[tuple[int, ...]]:
        """Return the token ids of each label, as they follow a prompt.

        Raises:
            PromptError: two labels tokenise alike, one begins the other, or a label melts into the
                prompt's last token.
        """
        probe = (template or PromptTemplate())(
            Example("it was fine .", "it", Polarity.NEUTRAL, (0, 2))
        ).text
        base, _ = _ids_and_offsets(tokenizer, probe)
        found: list[tuple[int, ...]] = []
        for _, word in self.words:
            ids, _ = _ids_and_offsets(tokenizer, probe + self.separator + word)
            if ids[: len(base)] != base:
                raise PromptError(
                    f"the label {self.separator + word!r} melts into the last token of the prompt {probe[-20:]!r}; "
                    "end the template with a blank or a punctuation mark, or change the separator"
                )
            found.append(tuple(ids[len(base) :]))
        for i, a in enumerate(found):
            for j, b in enumerate(found):
                if i != j and a == b[: len(a)]:
                    how = (
                        "tokenise alike"
                        if a == b
                        else "cannot be told apart, since the tokens of one begin the other"
                    )
                    words = f"{self.words[i][1]!r} and {self.words[j][1]!r}"
                    raise PromptError(
                        f"the labels {words} {how} (ids {list(a)} and {list(b)}); choose labels with different tokens"
                    )
        return found

    def continuations(
        self, tokenizer: Any, template: PromptTemplate | None = None
    ) -> tuple[Continuation, ...]:
        """Return the runs that score all labels; a single run if every label is one token."""
        groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
        for index, ids in enumerate(self.label_ids(tokenizer, template)):
            groups.setdefault(ids[:-1], []).append((index, ids))
        return tuple(Continuation(tokens, tuple(labels)) for tokens, labels in groups.items())
