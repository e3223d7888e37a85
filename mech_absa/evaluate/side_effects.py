"""Measure what an edit changes besides its task: the four questions of model editing.

After Yao et al. 2023 (arXiv 2305.13172):

- **reliability**: is the task done? Accuracy against the base on the same rows, and the number of
  answers that became right and wrong.
- **generality**: is it done when the question is worded otherwise? Accuracy and agreement under
  paraphrased templates.
- **locality**: what changes that should not? The next-token distribution on unrelated text; on
  other questions about the same aspect and sentence; and the answers on the *other* aspects of
  sentences in which an answer changed.
- **portability**: does the edit carry over to other domains?

The prompt consistency of Yang et al. 2025 (arXiv 2501.11041) and its predecessors stands beside
them: the chance that two wordings of the question, drawn at random, get the same answer. A model
that always answers `positive` has consistency 1, so read it beside the accuracy.

| measure | formula | nothing changed |
|---|---|---|
| KL | mean over tokens of KL(P_base ‖ P_edited) of the next token, nats | 0 |
| top-1 | share of tokens with the same most probable next token | 1 |
| consistency | mean over examples of the share of pairs of templates with the same answer | the base's |
| one label | share of mixed-polarity sentences all of whose aspects get one answer (never right) | the base's |

An edit at the roles of an aspect cannot act on text without an aspect. Its KL there is 0 by
construction, which is no merit. `near` measures it where it acts: the same prompt up to the end of
the sentence and the aspect, with another question. Weight edits act on every token of both.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from ..errors import ConfigError, DataError
from ..examples import Example, mixed_polarity
from ..metrics import kl
from ..model import Model
from ..prompts import ROLE, PromptTemplate, Tokens, Verbalizer
from ..records import plain
from ..scoring import Applicable, by_length, last_residual, question
from ..stats import Estimate, cluster_bootstrap
from ..words import Choice
from .predictions import Predictions, asked_with, check_call, predict
from .scores import NAN, Comparison, compare

if TYPE_CHECKING:
    import pandas as pd

PARAPHRASES = (
    "Given the sentence: '{sentence}', what is the sentiment towards the aspect term {aspect} ?",
    "Read the sentence: '{sentence}'. What is the polarity of the opinion about {aspect} ?",
    "Sentence: '{sentence}' Question: how does the writer feel about the aspect term {aspect} ? Answer:",
    "'{sentence}' In this sentence, is the sentiment about {aspect} positive, negative or neutral ? It is",
    "{sentence} The sentiment polarity of {aspect} is",
)
"""The paper's question in other words."""

NEAR = (
    "Given the sentence: '{sentence}', what is the first letter of the aspect term {aspect} ?",
    "Given the sentence: '{sentence}', how many words are in the aspect term {aspect} ?",
    "Given the sentence: '{sentence}', what is the word that follows the aspect term {aspect} ?",
)
"""Other questions about the same sentence and aspect."""

PASSAGES = (
    "The river rises in the hills to the north and runs for some forty miles before it meets the sea. Two stone bridges cross it, the "
    "older of which was built three hundred years ago. Barges used to carry timber and salt along the lower part; today a path for "
    "walkers follows the bank.",
    "To change the filter, close the valve and wait for ten minutes. Turn the cap to the left and lift it out. Put the new filter in with "
    "the arrow pointing down, turn the cap to the right until it clicks, and open the valve again. Write the date on the label.",
    "A triangle has three sides and three angles. The angles add up to one hundred and eighty degrees. If two of the sides are equal in "
    "length, two of the angles are equal as well. The area is half of the base times the height.",
    "The committee met on Tuesday at nine. Six of the eight members were present. The minutes of the last meeting were read, the "
    "figures for March were shown, and the next meeting was set for the fourth of May in the same room.",
    "In spring the birds come back from the south and build their nests in the reeds. The eggs hatch after about three weeks. The young "
    "ones learn to fly in June, and by the end of September most of the birds have left again.",
)
"""Text without products or opinions, written for this purpose."""


class Locality(Choice):
    """Name what a number of locality was measured on. Protocols of this name differ in the
    literature.
    """

    TEXT = (
        "every token of unrelated text",
        "The next token after every token of the passages, which are given, not generated (teacher forcing). Its `top1` is the "
        "locality of EasyEdit: equality of the most probable tokens before and after.",
    )
    QUESTIONS = (
        "answers to other questions",
        "The next token at the end of other questions about the same sentence and aspect.",
    )
    ASPECTS = (
        "other aspects of the sentence",
        "The label string of the largest log-probability, for aspects beside which an answer changed.",
    )


@dataclass(frozen=True)
class Drift:
    """Hold how far an edit moves the next token.

    Attributes:
        protocol: where it was measured.
        kl: mean of KL(base || edited), nats.
        kl_max: the largest.
        top1: share of positions with the same most probable token.
        n: positions compared.
    """

    protocol: Locality
    kl: float
    kl_max: float
    top1: float
    n: int


@dataclass(frozen=True)
class Paraphrase:
    """Hold the results under one other wording of the question.

    Attributes:
        base, edited: accuracy without the edit and with it.
        agreement: share of examples that the edited model answers as it answers the main template.
    """

    template: str
    base: float
    edited: float
    agreement: float


@dataclass(frozen=True)
class OtherAspects:
    """Hold the answers on rows beside which, in the same sentence, the edit changed an answer.

    Attributes:
        n: such rows; the shares are NaN where there are none.
        agreement: share of them that are answered as before.
        kl: mean KL(base || edited) over the labels, nats.
        fixed, broken: rows that became right, that became wrong.
        one_label_base, one_label_edited: share of the sentences with several polarities whose
            aspects all get one answer.
    """

    n: int
    agreement: float
    kl: float
    fixed: int
    broken: int
    one_label_base: float
    one_label_edited: float
    protocol: Locality = Locality.ASPECTS


@dataclass(frozen=True)
class Intervals:
    """Hold the main numbers of the edited model with bootstrap intervals; NaN where there are no rows.

    Attributes:
        accuracy: on the edit's own task, by sentence.
        elsewhere: on all rows of the other domains together, by sentence.
        generality: mean accuracy over the paraphrases, by sentence.
        consistency: prompt consistency, by sentence.
        text_kl, text_top1: drift on unrelated text, by passage: with few passages they are rough.
        near_kl, near_top1: drift at the answer to other questions, by sentence.
        aspects: share of other aspects that are answered as before, by sentence.
    """

    accuracy: Estimate
    elsewhere: Estimate
    generality: Estimate
    consistency: Estimate
    text_kl: Estimate
    text_top1: Estimate
    near_kl: Estimate
    near_top1: Estimate
    aspects: Estimate


@dataclass(frozen=True)
class SideEffects:
    """Hold everything that was measured about one edit.

    Attributes:
        name: of the edit.
        reliability: the edited model against the base on the edit's own task; `mcnemar.b` answers
            were put right, `mcnemar.c` put wrong.
        generality: under each paraphrase.
        consistency_base, consistency_edited: prompt consistency over the main template and all
            paraphrases.
        text: drift on unrelated text.
        near: drift at the answer to other questions.
        other_aspects: in the same sentences.
        portability: the edited model against the base on each other domain.
        intervals: of the main numbers.
        weights_before, weights_after: sha256 of the base model's weights.
    """

    name: str
    reliability: Comparison
    generality: tuple[Paraphrase, ...]
    consistency_base: float
    consistency_edited: float
    text: Drift
    near: Drift
    other_aspects: OtherAspects
    portability: tuple[Comparison, ...]
    intervals: Intervals
    weights_before: str
    weights_after: str

    @property
    def weights_unchanged(self) -> bool:
        return self.weights_before == self.weights_after

    def record(self) -> dict[str, Any]:
        """Return everything in the types of JSON."""
        record: dict[str, Any] = plain(asdict(self))
        return record | {"weights_unchanged": self.weights_unchanged}

    def summary(self) -> pd.DataFrame:
        """Return a short table for reading: the measure, the base, the edit."""
        import pandas as pd

        r = self.reliability
        moved = f"{_points(r)}; {r.mcnemar.b} fixed, {r.mcnemar.c} broken"
        rows = [_both("reliability: accuracy", r.accuracy_second, r.accuracy_first, moved)]
        for g in self.generality:
            note = f"{100 * g.agreement:.0f} % answered as under the main wording; {g.template}"
            rows.append(_both("generality: accuracy", g.base, g.edited, note))
        rows.append(_both("prompt consistency", self.consistency_base, self.consistency_edited))
        rows += self._locality()
        for p in self.portability:
            what = f"portability: {p.data}"
            rows.append(_both(what, p.accuracy_second, p.accuracy_first, _points(p)))
        rows.append(_edited("base weights", "unchanged" if self.weights_unchanged else "CHANGED"))
        return pd.DataFrame(rows)

    def _locality(self) -> list[dict[str, str]]:
        """Return the rows of the table for what should not change."""
        o, text, near = self.other_aspects, self.text, self.near
        rows = [
            _edited(
                "unrelated text: KL",
                f"{text.kl:.4f} nats",
                f"top-1 the same at {100 * text.top1:.1f} % of {text.n} tokens",
            ),
            _edited(
                "other questions: KL",
                f"{near.kl:.4f} nats",
                f"top-1 the same at {100 * near.top1:.1f} % of {near.n} answers",
            ),
        ]
        if o.n:
            same = f"{100 * o.agreement:.0f} % of {o.n} answered as without the edit"
            note = f"{same}; {o.fixed} fixed, {o.broken} broken"
            rows.append(_edited("other aspects: KL", f"{o.kl:.4f} nats", note))
        if not np.isnan(o.one_label_base):
            rows.append(
                _both("one label for a mixed sentence", o.one_label_base, o.one_label_edited)
            )
        return rows

    def _repr_html_(self) -> str:
        html: str = self.summary().to_html(index=False)
        return html


def _both(what: str, base: float, edited: float, note: str = "") -> dict[str, str]:
    """Return a row with two shares."""
    shares = {"base": f"{100 * base:.1f} %", "edited": f"{100 * edited:.1f} %"}
    return {"measure": what, **shares, "": note}


def _edited(what: str, edited: str, note: str = "") -> dict[str, str]:
    """Return a row for something that only an edit has."""
    return {"measure": what, "base": "-", "edited": edited, "": note}


def _points(c: Comparison) -> str:
    d = c.difference
    return f"{100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"


def side_effects(
    model: Model,
    edit: Applicable,
    examples: Sequence[Example],
    *,
    others: Sequence[Sequence[Example]] = (),
    texts: Sequence[str] = PASSAGES,
    paraphrases: Sequence[str] = PARAPHRASES,
    near: Sequence[str] = NEAR,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    batch_size: int = 32,
    name: str | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> SideEffects:
    """Measure what `edit` changes in `model`.

    Args:
        examples: of the task that the edit is for.
        others: of other domains.
        texts: unrelated passages.
        paraphrases: other templates of the same question.
        near: templates of other questions.
    """
    if not texts:
        raise ConfigError("no unrelated texts were given for locality; at least one is needed")
    check_call("side_effects", model, examples, edit)
    own = asked_with(edit)
    template, verbalizer = template or own[0], verbalizer or own[1]
    before = model.hash_now()

    ask = partial(predict, model, verbalizer=verbalizer, batch_size=batch_size)

    def both(data: Sequence[Example], asked: PromptTemplate | str) -> _Answers:
        return ask(data, None, template=asked), ask(data, edit, template=asked, name=name)

    sure: dict[str, Any] = {"level": level, "draws": draws, "seed": seed}
    base, edited = both(examples, template)
    worded = [both(examples, text) for text in paraphrases]
    elsewhere = [both(data, template) for data in others]
    text = _on_texts(model, edit, texts, batch_size)
    questions = _on_questions(model, edit, examples, near, batch_size)
    return SideEffects(
        name=edited.name,
        reliability=compare(edited, base, **sure),
        generality=_generality(edited, paraphrases, worded),
        consistency_base=agreement([base, *(b for b, _ in worded)]),
        consistency_edited=agreement([edited, *(e for _, e in worded)]),
        text=text[0].drift(Locality.TEXT),
        near=questions[0].drift(Locality.QUESTIONS),
        other_aspects=other_aspects(base, edited),
        portability=tuple(compare(e, b, **sure) for b, e in elsewhere),
        intervals=_intervals(
            [(base, edited), *worded], elsewhere, {"text": text, "near": questions}, **sure
        ),
        weights_before=before,
        weights_after=model.hash_now(),
    )


def _on_texts(
    model: Model, edit: Applicable, texts: Sequence[str], batch_size: int
) -> tuple[TokenDrift, list[int]]:
    """Return the drift on unrelated text, and the passage of each piece."""
    pieces = [(i, t) for i, text in enumerate(texts) for t in text_tokens(model, text)]
    moved = token_drift(model, edit, [t for _, t in pieces], batch_size=batch_size)
    return moved, [i for i, _ in pieces]


def _on_questions(
    model: Model,
    edit: Applicable,
    examples: Sequence[Example],
    near: Sequence[str],
    batch_size: int,
) -> tuple[TokenDrift, list[str]]:
    """Return the drift at the answer to other questions, and the sentence of each."""
    asked = [(e, PromptTemplate(text)) for text in near for e in examples]
    prompts = [question(model, e, template) for e, template in asked]
    moved = token_drift(model, edit, prompts, last=True, batch_size=batch_size)
    return moved, [e.cluster for e, _ in asked]


_Answers = tuple[Predictions, Predictions]
"""The answers without the edit and with it."""


def _generality(
    edited: Predictions, texts: Sequence[str], worded: Sequence[_Answers]
) -> tuple[Paraphrase, ...]:
    """Return the results of each paraphrase, from the answers without the edit and with it."""
    return tuple(
        Paraphrase(text, float(b.correct.mean()), float(e.correct.mean()), agreement([edited, e]))
        for text, (b, e) in zip(texts, worded, strict=True)
    )


def agreement(runs: Sequence[Predictions]) -> float:
    """Return the chance that two different runs, drawn at random, give the same answer; 1 for a
    single run.
    """
    return float(agreements(runs).mean())


def agreements(runs: Sequence[Predictions]) -> Float[np.ndarray, " example"]:
    """Return the share of pairs of runs that give the same answer, row by row; 1 for a single run."""
    pairs = [
        [a is b for a, b in zip(p.answers, q.answers, strict=True)]
        for p, q in combinations(runs, 2)
    ]
    return np.mean(pairs, axis=0) if pairs else np.ones(len(runs[0]))


def _mean(
    values: ArrayLike, clusters: ArrayLike, *, level: float, draws: int, seed: int
) -> Estimate:
    """Return a mean with its interval by cluster; NaN where there are no values."""
    if not np.size(clusters):
        return Estimate(NAN, NAN, NAN)
    found = cluster_bootstrap(
        np.asarray(values, dtype=float), np.asarray(clusters), level=level, draws=draws, seed=seed
    )
    return Estimate(float(found.mean), float(found.low), float(found.high))


def _intervals(
    worded: Sequence[_Answers],
    elsewhere: Sequence[_Answers],
    moved: Mapping[str, tuple[TokenDrift, Sequence[object]]],
    **sure: Any,
) -> Intervals:
    """Return the intervals of the edited model.

    Args:
        worded: answers under the main wording, which comes first, and its paraphrases.
        elsewhere: answers on other domains.
        moved: `text` and `near`, each with the cluster of every prompt.
        sure: how intervals are made.
    """

    def mean(values: ArrayLike, clusters: ArrayLike) -> Estimate:
        return _mean(values, clusters, **sure)

    (base, edited), *paraphrased = worded
    clusters, others = edited.clusters, [e for _, e in elsewhere]
    rows, changed = _beside_changes(base, edited)
    right = [e.correct for _, e in paraphrased]
    found = {
        "accuracy": mean(edited.correct, clusters),
        "elsewhere": mean(
            [r for p in others for r in p.correct], [c for p in others for c in p.clusters]
        ),
        "generality": mean(np.mean(right, axis=0), clusters) if right else mean([], []),
        "consistency": mean(agreements([e for _, e in worded]), clusters),
        "aspects": mean(~changed[rows], clusters[rows]),
    }
    for name, (tokens, of_prompt) in moved.items():
        of_token = np.asarray(of_prompt)[tokens.prompt]
        found[f"{name}_kl"] = mean(tokens.kl, of_token)
        found[f"{name}_top1"] = mean(tokens.same, of_token)
    return Intervals(**found)


def other_aspects(base: Predictions, edited: Predictions) -> OtherAspects:
    """Measure how the answers move on the aspects beside those that the edit changed."""
    rows, moved = _beside_changes(base, edited)
    p, q = base.probabilities, edited.probabilities
    assert p is not None and q is not None
    tiny = np.finfo(float).tiny
    divergence = (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(1)

    def one_label(run: Predictions) -> float:
        answers = defaultdict(set)
        for i in mixed_polarity(run.examples):
            answers[run.clusters[i]].add(run.answers[i])
        return float(np.mean([len(a) == 1 for a in answers.values()])) if answers else float("nan")

    return OtherAspects(
        int(rows.sum()),
        float((~moved[rows]).mean()) if rows.any() else float("nan"),
        float(divergence[rows].mean()) if rows.any() else float("nan"),
        int((~base.correct & edited.correct)[rows].sum()),
        int((base.correct & ~edited.correct)[rows].sum()),
        one_label(base),
        one_label(edited),
    )


def _beside_changes(
    base: Predictions, edited: Predictions
) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Return which rows have another row of their sentence whose answer changed, and which
    changed.
    """
    moved = np.array([a is not b for a, b in zip(base.answers, edited.answers, strict=True)])
    in_sentence = Counter(c for c, m in zip(base.clusters, moved, strict=True) if m)
    rows = [in_sentence[c] - int(m) > 0 for c, m in zip(base.clusters, moved, strict=True)]
    return np.array(rows, dtype=bool), moved


@dataclass(frozen=True, eq=False)
class TokenDrift:
    """Hold how far an edit moves the next token, token by token.

    Attributes:
        kl: KL(base || edited), nats.
        same: whether the most probable token stays.
        prompt: the number of each token's prompt.
    """

    kl: Float[np.ndarray, " token"]
    same: Bool[np.ndarray, " token"]
    prompt: Int[np.ndarray, " token"]

    def drift(self, protocol: Locality) -> Drift:
        """Return the means over tokens."""
        d = self.kl
        return Drift(protocol, float(d.mean()), float(d.max()), float(self.same.mean()), len(d))


def drift(
    model: Model,
    edit: Applicable,
    prompts: Sequence[Tokens],
    *,
    last: bool = False,
    batch_size: int = 32,
) -> Drift:
    """Measure how far `edit` moves the next token after every token of the prompts, or after the
    last only.
    """
    moved = token_drift(model, edit, prompts, last=last, batch_size=batch_size)
    return moved.drift(Locality.QUESTIONS if last else Locality.TEXT)


@torch.inference_mode()
def token_drift(
    model: Model,
    edit: Applicable,
    prompts: Sequence[Tokens],
    *,
    last: bool = False,
    batch_size: int = 32,
) -> TokenDrift:
    """Measure how far `edit` moves the next token, after each token of the prompts or after the last
    only.
    """
    divergences, same, prompt = [], [], []
    for rows in by_length(prompts, batch_size):
        tokens = Tokens.stack([prompts[i] for i in rows])
        lengths = torch.tensor(tokens.lengths)
        columns = torch.arange(tokens.ids.shape[1])
        read = (columns == lengths[:, None] - 1) if last else (columns < lengths[:, None])
        prompt.append(torch.tensor(rows)[read.nonzero()[:, 0]])
        plain_run, edited_run = (last_residual(model, tokens, e) for e in (None, edit))
        read = read.to(plain_run.device)
        for x, y in zip(plain_run[read].split(256), edited_run[read].split(256), strict=True):
            a, b = model.finish(x, None, "vocabulary"), model.finish(y, None, "vocabulary")
            divergences.append(-kl(b, a).double().cpu())
            same.append((a.argmax(-1) == b.argmax(-1)).cpu())
    return TokenDrift(*(torch.cat(parts).numpy() for parts in (divergences, same, prompt)))


def text_tokens(model: Model, text: str) -> list[Tokens]:
    """Return a text in pieces that fit the model's context. Every token has the role `template`."""
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    first = [model.tokenizer.bos_token_id] if model.bos else []
    step = model.n_ctx - len(first)
    pieces = [first + ids[i : i + step] for i in range(0, len(ids), step)]
    return [
        Tokens(torch.tensor([p]), torch.full((1, len(p)), ROLE["template"]), (len(p),))
        for p in pieces
    ]


def read_texts(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read the passages of a text file, which are separated by blank lines.

    Raises:
        DataError: there is no such file, it is not UTF-8, or it is empty.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(
            f"the file {reason}; a UTF-8 text file of passages separated by blank lines is accepted",
            source,
        ) from None
    passages = tuple(
        " ".join(p.split()) for p in text.replace("\r\n", "\n").split("\n\n") if p.strip()
    )
    if not passages:
        raise DataError("the file is empty; at least one passage is needed", source)
    return passages
