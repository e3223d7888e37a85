"""Score label strings after prompts, in batches, with an edit or without.

The score of a label is the summed log-probability of its tokens after the prompt. Everything that
scores labels goes through four functions:

    label_scores(stream, prompts, continuations)   any number of prompts, sorted by length
    batch_scores(stream, batch, continuations)     one batch; differentiable
    read_labels(model, rows, continuation)         rows of the residual stream -> scores
    by_label(parts, continuations)                 scores by continuation -> one column per label

`stream` says where the residual stream after the last block comes from: `Stream(model, edit)`, or a
stream that keeps the part below an edit (`train.prefix`). A model alone stands for `Stream(model)`.

Prompts are padded on the right and read at their own last positions, so a batch gives the same as
its rows one by one. The last block, the final norm and the unembedding compute only the rows that
are read. Scores that are not numbers raise an error here, for all commands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .axes import Resid
from .errors import DataError, EditError, ModelError, PromptTooLong
from .examples import Example, Examples
from .metrics import Need
from .model import Model
from .model.forward import Point, advance, last
from .model.pieces import rows_of
from .prompts import Continuation, PromptTemplate, Tokenised, Tokens, Verbalizer, encode


@runtime_checkable
class Applicable(Protocol):
    """Describe what can be applied during forward passes over a batch of known tokens: a trained
    edit, or a planned intervention.
    """

    def applied(self, model: Model, tokens: Tokens) -> AbstractContextManager[Any]: ...


@runtime_checkable
class Pointed(Protocol):
    """Describe what can also say, before a pass, which functions act where in it: a trained
    edit.
    """

    def points(self, model: Model, tokens: Tokens) -> list[Point]: ...


class Stream:
    """Give a model's residual stream after the last block, with an edit or without.

    Args:
        model: what runs.
        edit: in force in every pass; None for the model as it is.
    """

    def __init__(self, model: Model, edit: Applicable | None = None):
        self.model, self.edit = model, edit

    def last(
        self, tokens: Tokens, reads: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch read d_model"]:
        """Return the stream at the positions `reads` of each row."""
        return last_residual(self.model, tokens, self.edit, reads)


def question(
    model: Model, example: Example, template: PromptTemplate | None = None, room: int = 0
) -> Tokenised:
    """Return the tokens that ask `model` about `example`.

    Args:
        model: whose tokenizer and context are used.
        example: what is asked about.
        template: the question; the paper's where None.
        room: how many tokens must fit behind the prompt (`room_for`).

    Raises:
        PromptTooLong: the prompt and what follows it are longer than the model's context.
    """
    tokens = encode((template or PromptTemplate())(example), model.tokenizer, model.bos)
    if (n := tokens.length) + room > model.n_ctx:
        name = example.id or example.sentence[:40]
        answer = f" and {room} of the answer" if room else ""
        raise PromptTooLong(
            f"the prompt of {name!r} has {n} tokens{answer}; {model.name} reads {model.n_ctx}"
        )
    return tokens


TOO_LONG = "prompt longer than the model reads"
"""Reason why an example was left out."""
AROUND = 8
"""More tokens than a tokenizer puts around a text."""


def fitting(
    model: Model,
    examples: Examples,
    templates: Sequence[PromptTemplate],
    verbalizer: Verbalizer,
    *,
    answers: bool = False,
    strict: bool = False,
) -> Examples:
    """Return the examples that the model can be asked about; the others are counted in `left_out`.

    Args:
        model: whose tokenizer and context are used.
        examples: of one source.
        templates: the questions, each of which must fit.
        verbalizer: the labels, which must fit behind each of them.
        answers: whole answers must fit, as for `decode="generate"` and the loss `text`.
        strict: raise for the first prompt that is too long, instead of leaving its example out.

    Raises:
        PromptTooLong: a prompt is too long, with `strict`.
        DataError: no example is left.

    Example:
        >>> import mech_absa as ma
        >>> model, reviews = ma.load_model(), ma.load_examples("builtin:restaurant/test", limit=3)
        >>> long = replace(reviews[0], sentence=reviews[0].sentence + " Truly." * 300)
        >>> mixed = replace(reviews, items=(*reviews, long))
        >>> left = fitting(model, mixed, [ma.PromptTemplate()], ma.Verbalizer())
        >>> len(mixed), len(left), left.left_out
        (4, 3, {'prompt longer than the model reads': 1})
    """
    room = 0
    for template in templates:
        room = max(room, room_for(verbalizer.continuations(model.tokenizer, template)))
        if answers:
            room = max(room, *map(len, verbalizer.label_ids(model.tokenizer, template)))

    def fits(example: Example) -> bool:
        for template in templates:
            # A token holds a byte or more, so most prompts need no tokenizer.
            if len(template(example).text.encode()) + AROUND + room <= model.n_ctx:
                continue
            try:
                question(model, example, template, room)
            except PromptTooLong:
                if strict:
                    raise
                return False
        return True

    kept = examples.only(fits)
    if not (lost := len(examples) - len(kept)):
        return examples
    if not len(kept):
        raise DataError(
            f"no example is left: {model.name} reads {model.n_ctx} tokens, and every prompt is longer",
            examples.source,
        )
    before = examples.left_out.get(TOO_LONG, 0)
    return replace(kept, left_out=examples.left_out | {TOO_LONG: before + lost})


def room_for(continuations: Sequence[Continuation]) -> int:
    """Return how many tokens must fit behind a prompt so that every label can be read."""
    return max((len(c.tokens) for c in continuations), default=0)


def by_length(prompts: Sequence[Tokens], batch_size: int) -> Iterator[list[int]]:
    """Yield the indices of batches of at most `batch_size` prompts of similar length.

    >>> ids = [torch.zeros(1, n, dtype=torch.long) for n in (3, 1, 2)]
    >>> prompts = [Tokens(x, x, (x.shape[1],)) for x in ids]
    >>> list(by_length(prompts, 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].lengths[0])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def extend(tokens: Tokens, continuation: Continuation, pad_id: int = 0) -> Tokens:
    """Append a continuation to prompts. Its tokens carry no role (-1), so edits at prompt positions
    leave them alone.
    """
    if not continuation.tokens:
        return tokens
    extra = len(continuation.tokens)
    ids = torch.nn.functional.pad(tokens.ids, (0, extra), value=pad_id)
    roles = torch.nn.functional.pad(tokens.roles, (0, extra), value=-1)
    for row, n in enumerate(tokens.lengths):
        ids[row, n : n + extra] = torch.tensor(continuation.tokens)
    lengths = tuple(n + extra for n in tokens.lengths)
    return Tokens(ids, roles, lengths, tokens.vocabulary)


def last_residual(
    model: Model,
    tokens: Tokens,
    edit: Applicable | None = None,
    reads: Int[Tensor, "batch read"] | None = None,
) -> Resid | Float[Tensor, "batch read d_model"]:
    """Return the residual stream after the last block, with hooks and edit applied.

    Args:
        reads: the positions wanted of each row; all where None.
    """
    x = model.embed(tokens.ids)
    if edit is None or isinstance(edit, Pointed):
        points = edit.points(model, tokens) if edit is not None else ()
        return (
            advance(model, x, 0, None, points)
            if reads is None
            else last(model, x, reads, 0, points)
        )
    with edit.applied(model, tokens):
        whole = advance(model, x)
    return whole if reads is None else rows_of(whole, reads)


def positions_read(lengths: Sequence[int], continuation: Continuation) -> Int[Tensor, "batch read"]:
    """Return the positions at which prompts + continuation of this length predict the last tokens
    of its labels.
    """
    k = continuation.reads
    return torch.tensor(lengths)[:, None] - k + torch.arange(k)


def read_labels(
    model: Model,
    rows: Float[Tensor, "batch read d_model"],
    continuation: Continuation,
    need: Need = "normaliser",
) -> Float[Tensor, "batch label"]:
    """Return the scores of the labels that this continuation reads.

    Args:
        rows: the last residual stream at `positions_read`.
        continuation: which labels.
        need: `labels` gives bare logits, and only for labels of one token; longer ones always need
            the normaliser.
    """
    ids = torch.tensor([ids for _, ids in continuation.labels], device=rows.device)  # [label read]
    if continuation.reads > 1:
        need = "normaliser"
    parts = [model.finish(rows[:, j], ids[:, j], need) for j in range(continuation.reads)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def by_label(
    parts: Sequence[Tensor], continuations: Sequence[Continuation]
) -> Float[Tensor, "*row label"]:
    """Return one column per label, in the verbalizer's order.

    Args:
        parts: `[*row, its labels]`, the scores that each continuation gives (`read_labels`).
        continuations: in the same order.
    """
    columns = [i for c in continuations for i, _ in c.labels]
    if columns == list(range(len(columns))) and len(parts) == 1:
        return parts[0]
    order = torch.tensor(columns, device=parts[0].device).argsort()
    return torch.cat(list(parts), -1)[..., order]


def batch_scores(
    stream: Stream | Model,
    batch: Tokens,
    continuations: Sequence[Continuation],
    need: Need = "normaliser",
) -> Float[Tensor, "batch label"]:
    """Return the scores of every label for a batch of prompts; differentiable.

    Args:
        stream: where the residual stream comes from.
        batch: prompts, padded on the right.
        continuations: of a `Verbalizer`.
        need: as in `label_scores`.
    """
    stream = Stream(stream) if isinstance(stream, Model) else stream
    longest, n_ctx = max(batch.lengths) + room_for(continuations), stream.model.n_ctx
    if longest > n_ctx:
        raise PromptTooLong(
            f"a prompt of {max(batch.lengths)} tokens and the labels behind it make {longest} "
            f"tokens; {stream.model.name} reads {n_ctx}"
        )
    parts = []
    for continuation in continuations:
        tokens = extend(batch, continuation)
        rows = stream.last(tokens, positions_read(tokens.lengths, continuation))
        parts.append(read_labels(stream.model, rows, continuation, need))
    return by_label(parts, continuations)


@torch.no_grad()
def label_scores(
    stream: Stream | Model,
    prompts: Sequence[Tokens],
    continuations: Sequence[Continuation],
    need: Need = "normaliser",
    batch_size: int = 32,
    allow_nan: bool = False,
) -> Float[Tensor, "prompt label"]:
    """Return the scores of every label for every prompt, on the CPU, float32 or wider.

    Args:
        stream: where the residual stream comes from: `Stream(model, edit)`, or a model.
        prompts: batches of one, from `question`.
        continuations: of a `Verbalizer`.
        need: `normaliser` for log-probabilities, `labels` for bare logits (labels of one token).
        batch_size: prompts per forward pass; sorted by length, so that little is padded.
        allow_nan: return scores that are not numbers instead of raising.

    Raises:
        PromptTooLong: a prompt and a label are together longer than the model's context.
        EditError, ModelError: scores are not numbers; says how many.
    """
    stream = Stream(stream) if isinstance(stream, Model) else stream
    model = stream.model
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    scores = torch.zeros(len(prompts), sum(len(c.labels) for c in continuations), dtype=wide)
    for rows in by_length(prompts, batch_size):
        batch = Tokens.stack([prompts[i] for i in rows])
        scores[rows] = batch_scores(stream, batch, continuations, need).to("cpu", wide)
    if not allow_nan and (broken := int(scores.isnan().any(1).sum())):
        which = f"the scores of {broken} of {len(prompts)} prompts are not numbers"
        if stream.edit is None:
            raise ModelError(
                f"{model.name}: {which}; its weights hold some, or {model.dtype} overflows"
            )
        raise EditError(f"{model.name}: {which}; the edit diverged, or {model.dtype} overflows")
    return scores


def gold_indices(examples: Sequence[Example], verbalizer: Verbalizer) -> Tensor:
    """Return the index of the right label of each example."""
    return torch.tensor([verbalizer.index(e.polarity) for e in examples], dtype=torch.long)
