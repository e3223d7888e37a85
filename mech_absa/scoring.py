"""Prompts -> scores of the label strings, in batches, with an edit or without.

A label's score is the summed log-probability of its tokens after the prompt. Prompts are padded on the right and read at their own last
positions, so that a batch gives what its rows give one by one; the last block, the final norm and the unembedding see only the rows that
are read. Edits apply, and so do whatever hooks are on the model (`forward.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .axes import Resid
from .errors import PromptTooLong
from .examples import Example
from .metrics import Need
from .model import Model
from .model.forward import Point, advance, last, rows_of
from .prompts import Continuation, PromptTemplate, Tokenised, Tokens, Verbalizer, encode


@runtime_checkable
class Applicable(Protocol):
    """What can be in force during forward passes over a batch of known tokens: a trained edit, a planned intervention."""

    def applied(self, model: Model, tokens: Tokens) -> AbstractContextManager[Any]: ...


@runtime_checkable
class Pointed(Protocol):
    """What can also say, before a pass, which functions act where in it: a trained edit."""

    def points(self, model: Model, tokens: Tokens) -> list[Point]: ...


def question(model: Model, example: Example, template: PromptTemplate | None = None) -> Tokenised:
    """The tokens that ask `model` about `example`.

    Raises:
        PromptTooLong: the prompt is longer than the model's context.
    """
    tokens = encode((template or PromptTemplate())(example), model.tokenizer, model.bos)
    if tokens.length > model.n_ctx:
        raise PromptTooLong(
            f"the prompt of {example.id or example.sentence[:40]!r} has {tokens.length} tokens; {model.name} reads {model.n_ctx}"
        )
    return tokens


def extend(tokens: Tokens, continuation: Continuation, pad_id: int = 0) -> Tokens:
    """Prompts followed by a continuation; its tokens carry no role (-1), so that edits of prompt positions leave them alone."""
    if not continuation.tokens:
        return tokens
    extra = len(continuation.tokens)
    ids = torch.nn.functional.pad(tokens.ids, (0, extra), value=pad_id)
    roles = torch.nn.functional.pad(tokens.roles, (0, extra), value=-1)
    for row, n in enumerate(tokens.lengths):
        ids[row, n : n + extra] = torch.tensor(continuation.tokens)
    return Tokens(ids, roles, tuple(n + extra for n in tokens.lengths))


def last_residual(
    model: Model,
    tokens: Tokens,
    edit: Applicable | None = None,
    reads: Int[Tensor, "batch read"] | None = None,
) -> Resid | Float[Tensor, "batch read d_model"]:
    """The residual stream after the last block, hooks and edit in force.

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
    """Where prompts + continuation, this long, predict the last tokens of its labels."""
    k = continuation.reads
    return torch.tensor(lengths)[:, None] - k + torch.arange(k)


def read_labels(
    model: Model,
    rows: Float[Tensor, "batch read d_model"],
    continuation: Continuation,
    need: Need = "normaliser",
) -> Float[Tensor, "batch label"]:
    """Scores of the labels that this continuation reads.

    Args:
        rows: the last residual stream at `positions_read`.
        continuation: which labels.
        need: `labels` gives bare logits, and only for labels of one token; longer ones always need the normaliser.
    """
    ids = torch.tensor([ids for _, ids in continuation.labels], device=rows.device)  # [label read]
    if continuation.reads > 1:
        need = "normaliser"
    parts = [model.finish(rows[:, j], ids[:, j], need) for j in range(continuation.reads)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def label_scores(
    model: Model,
    prompts: Sequence[Tokens],
    continuations: Sequence[Continuation],
    need: Need = "normaliser",
    edit: Applicable | None = None,
    batch_size: int = 32,
) -> Float[Tensor, "batch label"]:
    """Scores of every label for every prompt, on the CPU, float32 or wider.

    Args:
        prompts: batches of one, from `question`.
        continuations: of a `Verbalizer`.
        need: `normaliser` for log-probabilities, `labels` for bare logits (labels of one token).
        edit: in force during the passes.
        batch_size: prompts a forward pass; sorted by length, so that little is padded.
    """
    n_labels = sum(len(c.labels) for c in continuations)
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    scores = torch.zeros(len(prompts), n_labels, dtype=wide)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].lengths[0])
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = Tokens.stack([prompts[i] for i in rows])
            for continuation in continuations:
                tokens = extend(batch, continuation)
                rows_read = last_residual(
                    model, tokens, edit, positions_read(tokens.lengths, continuation)
                )
                part = read_labels(model, rows_read, continuation, need)
                scores[
                    torch.tensor(rows)[:, None], torch.tensor([i for i, _ in continuation.labels])
                ] = part.to("cpu", wide)
    return scores


def gold_indices(examples: Sequence[Example], verbalizer: Verbalizer) -> Tensor:
    """Index of the right label of each example."""
    return torch.tensor([verbalizer.index(e.polarity) for e in examples], dtype=torch.long)
