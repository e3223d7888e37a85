"""What an edit is trained on: prompts with their answers, the loss of a batch, and how good the
answers are.

The loss covers the answer only. `labels` is the cross-entropy of the gold label among the label
strings, which needs no more of the unembedding than their columns; `text` is that of the answer's
tokens and the end of sequence over the whole vocabulary. In both, the final norm and the
unembedding see only the rows that are read, and so does the last block (`forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor

from ..axes import LabelScores
from ..edits.base import Where
from ..edits.edit import Edit
from ..errors import ConfigError
from ..examples import Example
from ..metrics import Need
from ..model import Model
from ..prompts import Continuation, PromptTemplate, Tokens, Verbalizer
from ..scoring import batch_scores, extend, label_scores, question, room_for
from ..sites import Site
from .prefix import CachedStream, PrefixCache
from .presets import Loss


@dataclass(frozen=True)
class Prepared:
    """One example, ready to be trained on.

    Attributes:
        prompt: tokens of the question.
        runs: the prompt with each continuation that a pass must read.
        gold: index of the right label.
        answer: token ids that answer it in full text.
    """

    prompt: Tokens
    runs: tuple[Tokens, ...]
    gold: int
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.runs[-1].lengths[0]


class Task:
    """The question, its answers, the loss of a batch, and how good the answers of an edit are.

    Args:
        model: the one that answers.
        kind: `labels` or `text`.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        cache: of streams below the edit.
        shared_weight: in `text`, weight of the tokens of an answer that it shares with the others
            (`told_apart`); the tokens that tell it apart have 1.
    """

    def __init__(
        self,
        model: Model,
        kind: Loss,
        template: PromptTemplate | None,
        verbalizer: Verbalizer | None,
        cache: PrefixCache,
        shared_weight: float = 1.0,
    ):
        self.model, self.kind, self.cache = model, kind, cache
        self.template, self.verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
        self.continuations = self.verbalizer.continuations(model.tokenizer, self.template)
        eos = model.tokenizer.eos_token_id
        self.answers = [
            ids if eos is None else (*ids, eos)
            for ids in self.verbalizer.label_ids(model.tokenizer, self.template)
        ]
        self.weights = [_shares(a, self.answers, shared_weight) for a in self.answers]

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        """Return the examples as tokens, in their order.

        Raises:
            PromptError: a prompt, or a prompt with its answer, is longer than the model's context.
        """
        return [self._prepared(e) for e in examples]

    def _prepared(self, example: Example) -> Prepared:
        gold = self.verbalizer.index(example.polarity)
        answer = self.answers[gold]
        asked = [Continuation(answer[:-1], ())] if self.kind == "text" else self.continuations
        room = max(room_for(asked), room_for(self.continuations))
        prompt = question(self.model, example, self.template, room)
        return Prepared(prompt, tuple(extend(prompt, c) for c in asked), gold, answer)

    def stream(self, edit: Edit | None) -> CachedStream:
        """Return the source of the last residual stream: run from the kept stream below the edit."""
        return CachedStream(self.cache, edit)

    def loss(self, edit: Edit, batch: Sequence[Prepared]) -> Tensor:
        """Return the loss summed over a batch; each example's is a mean over the tokens it is read
        at.
        """
        logits, target, weight = self.read(edit, batch)
        if weight is None:
            return F.cross_entropy(logits, target, reduction="sum")
        return (F.cross_entropy(logits, target, reduction="none") * weight).sum()

    def read(self, edit: Edit, batch: Sequence[Prepared]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what the loss of a batch is computed from.

        Returns:
            Logits [row choice], the right choice of each row, and the weight of each row: a row is
            an example and the choices are the labels, without weights (None), or a row is a token of
            an answer and the choices are the vocabulary.
        """
        return self._text(edit, batch) if self.kind == "text" else self._labels(edit, batch)

    def _text(self, edit: Edit, batch: Sequence[Prepared]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = Tokens.stack([q.runs[0] for q in batch])
        # Shorter answers are read again at their last token, with no weight.
        slots = range(max(len(q.answer) for q in batch))
        reads = [
            [q.prompt.lengths[0] - 1 + min(j, len(q.answer) - 1) for j in slots] for q in batch
        ]
        rows = self.stream(edit).last(tokens, torch.tensor(reads)).flatten(0, 1)
        target = torch.tensor(
            [q.answer[min(j, len(q.answer) - 1)] for q in batch for j in slots], device=rows.device
        )
        weights = [[*self.weights[q.gold], *[0.0] * len(slots)][: len(slots)] for q in batch]
        weight = torch.tensor(weights, device=rows.device).flatten()
        return self.model.finish(rows, None, "vocabulary"), target, weight

    def _labels(self, edit: Edit, batch: Sequence[Prepared]) -> tuple[Tensor, Tensor, None]:
        gold = torch.tensor([q.gold for q in batch], device=self.model.device)
        # The normaliser cancels where all labels are read at one place.
        alone = len(self.continuations) == 1 and self.continuations[0].reads == 1
        need: Need = "labels" if alone else "normaliser"
        prompts = Tokens.stack([q.prompt for q in batch])
        return batch_scores(self.stream(edit), prompts, self.continuations, need), gold, None

    def keep(self, layer: int, items: Sequence[Prepared]) -> None:
        """Keep the streams of items as they enter a layer, for the scores of edits there."""
        runs = [extend(q.prompt, c) for q in items for c in self.continuations]
        self.cache.fill(layer, runs)

    def scores(
        self,
        edit: Edit | None,
        items: Sequence[Prepared],
        batch_size: int = 32,
        allow_nan: bool = False,
    ) -> LabelScores:
        """Return `scoring.label_scores`, with the streams below the edit kept for the next edit.

        Raises:
            EditError: a score is not a number, unless `allow_nan`.
        """
        prompts = [q.prompt for q in items]
        if edit is not None:
            self.keep(edit.layers[0], items)
        scores = label_scores(
            self.stream(edit),
            prompts,
            self.continuations,
            batch_size=batch_size,
            allow_nan=allow_nan,
        )
        return scores.double()

    def quality(
        self, edit: Edit, items: Sequence[Prepared], batch_size: int
    ) -> tuple[float, float]:
        """Return (mean cross-entropy over the labels, accuracy), whatever the loss is."""
        scores = self.scores(edit, items, batch_size, allow_nan=True)
        gold = torch.tensor([q.gold for q in items])
        right = (scores.argmax(-1) == gold).double().mean()
        return float(F.cross_entropy(scores, gold)), float(right)


def told_apart(answer: Sequence[int], other: Sequence[int]) -> list[bool]:
    """Return which tokens of an answer a minimal edit to another one would touch.

    The answers are aligned by their longest common runs (`difflib`). A token is touched where it is
    replaced or deleted, and where something is inserted before it: the other answer has another token
    in its place.

    Examples:
        >>> told_apart([7, 5, 1], [8, 5, 1]), told_apart([7, 1], [7, 9, 1])
        ([True, False, False], [False, True])
    """
    touched = [False] * len(answer)
    for what, start, end, _, _ in SequenceMatcher(None, answer, other, False).get_opcodes():
        if what != "equal":
            for j in range(start, min(max(end, start + 1), len(answer))):
                touched[j] = True
    return touched


def _shares(
    answer: Sequence[int], answers: Iterable[Sequence[int]], shared_weight: float
) -> list[float]:
    """Return the share of each token of an answer in its loss; they add up to 1.

    No label begins another one, so that some token always tells them apart.
    """
    touched = [told_apart(answer, other) for other in answers if other != answer]
    apart = [any(flags) for flags in zip(*touched, strict=True)]
    weights = [1.0 if mine else shared_weight for mine in apart]
    return [w / sum(weights) for w in weights]


def check_positions(edit: Edit, items: Sequence[Prepared]) -> None:
    """Check that each part of an edit acts in some prompt: a part that does not would train nothing
    and say nothing.

    Raises:
        ConfigError: no prompt has a token at the position of a part.
    """
    unseen = {i.place.at: i for i in edit if isinstance(i.place, Site) and i.place.at is not None}
    for q in items:
        if not unseen:
            return
        where = Where(q.prompt)
        unseen = {at: i for at, i in unseen.items() if not bool(where.mask(at).any())}
    for at, intervention in unseen.items():
        raise ConfigError(
            f"{intervention.family} at {intervention.place}: none of the {len(items)} training prompts has a token at {at}"
        )
