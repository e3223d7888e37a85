"""Prompts -> scores of the label strings, in batches, with an edit or without.

A label's score is the summed log-probability of its tokens after the prompt. Prompts are padded on the right and read at their own last
positions, so that a batch gives what its rows give one by one; the final norm and the unembedding see only the rows that are read.
Everything runs through the hooked forward pass, so interventions and edits apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .axes import Resid
from .errors import PromptError
from .examples import Example
from .metrics import Need
from .models import Model
from .prompts import Continuation, PromptTemplate, Tokens, Verbalizer, encode


@runtime_checkable
class Applicable(Protocol):
    """What can be in force during forward passes over a batch of known tokens: a trained edit, a planned intervention."""

    def applied(self, model: Model, tokens: Tokens) -> AbstractContextManager[Any]: ...


def question(model: Model, example: Example, template: PromptTemplate | None = None) -> Tokens:
    """The tokens that ask `model` about `example`.

    Raises:
        PromptError: the prompt is longer than the model's context.
    """
    tokens = encode((template or PromptTemplate())(example), model.tokenizer, model.bos)
    if tokens.lengths[0] > model.n_ctx:
        raise PromptError(
            f"the prompt of {example.id or example.sentence[:40]!r} has {tokens.lengths[0]} tokens; {model.name} reads {model.n_ctx}"
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


def last_residual(model: Model, tokens: Tokens, edit: Applicable | None = None) -> Resid:
    """The residual stream after the last block, hooks and edit in force: `[batch pos d_model]`."""
    with edit.applied(model, tokens) if edit is not None else nullcontext():
        return model.hooked.forward(model.embed(tokens.ids), start_at_layer=0, stop_at_layer=model.n_layers)


def read_labels(
    model: Model, last: Resid, lengths: Sequence[int], continuation: Continuation, need: Need = "normaliser"
) -> Float[Tensor, "batch read"]:
    """Scores of the labels that this continuation reads, from the last residual stream of prompt + continuation.

    Args:
        last: after the last block.
        lengths: of prompt + continuation, a row each.
        continuation: which labels, and how many positions they are read at.
        need: `labels` gives bare logits, and only for labels of one token; longer ones always need the normaliser.
    """
    k = continuation.reads
    n = torch.tensor(lengths, device=last.device)
    rows = torch.arange(len(n), device=last.device)
    ids = torch.tensor([ids for _, ids in continuation.labels], device=last.device)  # [read k]
    if k > 1:
        need = "normaliser"
    total: Tensor | None = None
    for j in range(k):
        part = model.finish(last[rows, n - k + j], ids[:, j], need)
        total = part if total is None else total + part
    assert total is not None
    return total


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
                part = read_labels(model, last_residual(model, tokens, edit), tokens.lengths, continuation, need)
                scores[torch.tensor(rows)[:, None], torch.tensor([i for i, _ in continuation.labels])] = part.to("cpu", wide)
    return scores


def gold_indices(examples: Sequence[Example], verbalizer: Verbalizer) -> Tensor:
    """Index of the right label of each example."""
    return torch.tensor([verbalizer.index(e.polarity) for e in examples], dtype=torch.long)
