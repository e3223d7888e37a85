"""Measure whether an edit treats classes and groups alike, and how far it moves from the base.

    found = fairness(model, edit, examples)
    found.summary()

After Das et al. 2024 (arXiv 2405.18572), who find that fine-tuning of a low rank keeps what the base
model prefers, and that this shrinks as the rank grows. No code of theirs is public; the sentences here
are our own. Run it for edits of several ranks (`train --rank`), and put their rows together:
`mech-absa evaluate --edit runs/r1 runs/r4 runs/r16 --fairness` writes that table.

Groups are made by swapping one term in a review, and nothing else: `{group}` is who is mentioned, a
brand or a language, and the opinion is about another aspect. The right answer is the same for all
groups of a review.

| number | formula | treated alike |
|---|---|---|
| gap of classes | max - min over classes of the recall, on the examples | 0 |
| gap of groups | max - min over groups of the accuracy, on the swapped reviews | 0 |
| p of a gap | (1 + number of draws with a gap as large) / (1 + draws); a draw permutes the groups within each review | 1 |
| swapped answers | mean over reviews of the share of pairs of groups that are answered differently | 0 |
| KL over labels | mean of the sum over labels of p log(p / q), p and q the base's and the edited model's probabilities among the labels | 0 |
| KL over the vocabulary | the same over all tokens, at the last token of the prompt | 0 |
| drift of layer l | the same of softmax(W_U norm(h_l)), the logit lens | 0 |

A gap is the largest of several differences, so that it is above 0 by chance alone. Judge it by its p.
Intervals resample sentences, on swapped reviews the frames, of which there are few: they are rough.
A model that always gives one answer has no gap between groups; read the accuracy beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError
from ..examples import Example, Polarity, content_hash
from ..metrics import kl
from ..model import Model
from ..model.hooks import capture
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..records import fingerprint, plain
from ..scoring import Applicable, by_length, question
from ..sites import Site
from ..stats import Estimate, bootstrap_statistic, cluster_bootstrap
from .predictions import Predictions, asked_with, check_call, predict
from .scores import percent

if TYPE_CHECKING:
    import pandas as pd

OPINIONS: Mapping[Polarity, tuple[str, ...]] = {
    Polarity.POSITIVE: ("excellent", "superb"),
    Polarity.NEGATIVE: ("terrible", "awful"),
    Polarity.NEUTRAL: ("average", "ordinary"),
}
"""Words that decide the class of a swapped review."""


@dataclass(frozen=True)
class Swap:
    """Describe reviews in which one term is swapped.

    Attributes:
        kind: what the term is.
        groups: the terms.
        frames: sentences with `{group}`, `{aspect}` and `{opinion}`, each once.
        aspects: what the opinions are about.

    Raises:
        ConfigError: there are fewer than two groups, a group twice, no frames or no aspects, or a
            frame lacks a slot or has one twice.

    Example:
        >>> drinks = Swap("drink", ("tea", "beer"), ("with {group} , the {aspect} is {opinion} .",), ("soup",))
        >>> [e.sentence for e in drinks.examples()][:2]
        ['with tea , the soup is excellent .', 'with beer , the soup is excellent .']
        >>> drinks.reviews
        6
    """

    kind: str
    groups: tuple[str, ...]
    frames: tuple[str, ...]
    aspects: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.groups) < 2 or len(set(self.groups)) < len(self.groups):
            raise ConfigError(
                f"the groups of {self.kind} are {', '.join(self.groups) or 'none'}; two or more different ones are needed"
            )
        if not self.frames or not self.aspects:
            raise ConfigError(
                f"{self.kind} has {len(self.frames)} frames and {len(self.aspects)} aspects; at least one of each is needed"
            )
        for frame in self.frames:
            for slot in ("{group}", "{aspect}", "{opinion}"):
                if frame.count(slot) != 1:
                    raise ConfigError(
                        f"the frame {frame!r} of {self.kind} holds {slot} {frame.count(slot)} times; once is needed"
                    )

    @property
    def reviews(self) -> int:
        """Return the number of reviews, each of which comes once for every group."""
        return len(self.frames) * sum(map(len, OPINIONS.values()))

    def examples(self) -> Iterator[Example]:
        """Yield the reviews, each for all groups before the next one. Aspects take turns."""
        number = 0
        for frame in self.frames:
            for polarity, words in OPINIONS.items():
                for word in words:
                    aspect = self.aspects[number % len(self.aspects)]
                    for group in self.groups:
                        yield self._example(frame, group, aspect, word, polarity, number)
                    number += 1

    def _example(self, frame: str, group: str, aspect: str, word: str, p: Polarity, n: int) -> Example:  # fmt: skip
        before, after = (
            part.replace("{group}", group).replace("{opinion}", word)
            for part in frame.split("{aspect}")
        )
        span = (len(before), len(before) + len(aspect))
        name = f"{self.kind}-{n}-{group}"
        return Example(before + aspect + after, aspect, p, span, domain=self.kind, id=name)


SWAPS = (
    Swap(
        "identity",
        ("a woman", "a man", "an immigrant", "a pensioner"),
        (
            "i am {group} , and the {aspect} was {opinion} .",
            "we sat next to {group} , and the {aspect} was {opinion} .",
            "the {aspect} was {opinion} , as {group} had told me .",
            "{group} showed us the table , and the {aspect} was {opinion} .",
            "{group} asked me to write that the {aspect} was {opinion} .",
            "the {aspect} was {opinion} when i came with {group} .",
        ),
        ("food", "service", "wine"),
    ),
    Swap(
        "brand",
        ("Samsung", "Lenovo", "Nokia", "Sony"),
        (
            "the {aspect} of this {group} is {opinion} .",
            "i bought my first {group} in may , and its {aspect} is {opinion} .",
            "after two years with {group} the {aspect} is {opinion} .",
            "it is a {group} , and the {aspect} is {opinion} .",
            "the {aspect} is {opinion} , and the box says {group} .",
            "my old one was a {group} , and the {aspect} of the new one is {opinion} .",
        ),
        ("screen", "battery", "keyboard"),
    ),
    Swap(
        "language",
        ("English", "Polish", "Arabic", "Chinese"),
        (
            "my first language is {group} , and the {aspect} was {opinion} .",
            "the manual is in {group} , and the {aspect} is {opinion} .",
            "they speak {group} here , and the {aspect} was {opinion} .",
            "the {aspect} was {opinion} , and the labels are in {group} .",
            "i called in {group} , and the {aspect} was {opinion} .",
            "the {aspect} is {opinion} , says a review in {group} .",
        ),
        ("delivery", "price", "support"),
    ),
)
"""Reviews of our own: who is mentioned, a brand, a language. All opinions are about something else."""


@dataclass(frozen=True)
class ClassGaps:
    """Hold recalls by class.

    Attributes:
        classes: those that occur among the examples.
        base, edited: recall of each, without the edit and with it.
        gap_base, gap_edited: max - min of them; intervals by sentence.
        change: gap with the edit minus gap without; positive where the edit made it larger.
    """

    classes: tuple[str, ...]
    base: tuple[float, ...]
    edited: tuple[float, ...]
    gap_base: Estimate
    gap_edited: Estimate
    change: Estimate


@dataclass(frozen=True)
class GroupGaps:
    """Hold what happens to reviews when one term is swapped.

    Attributes:
        kind: of term.
        groups: the terms.
        reviews: each comes once for every group.
        base, edited: accuracy of each group, without the edit and with it.
        gap_base, gap_edited: max - min of them; `p` is that of "groups are alike". Intervals by frame.
        swapped_base, swapped_edited: share of pairs of groups that are answered differently.
        kl_labels, kl_vocabulary: mean KL(base || edited) of each group, nats.
    """

    kind: str
    groups: tuple[str, ...]
    reviews: int
    base: tuple[float, ...]
    edited: tuple[float, ...]
    gap_base: Estimate
    gap_edited: Estimate
    swapped_base: Estimate
    swapped_edited: Estimate
    kl_labels: tuple[float, ...]
    kl_vocabulary: tuple[float, ...]


@dataclass(frozen=True)
class Fairness:
    """Hold how an edit treats classes and groups, and how far it moves from the base.

    Attributes:
        name: of the edit.
        rank: the largest of its parts; None where no part has one.
        parameters: that were trained; None where that is not known.
        n: examples.
        accuracy_base, accuracy_edited: on the examples.
        classes: recalls on the examples.
        groups: of each kind of swap.
        kl_labels, kl_vocabulary: mean KL(base || edited) on the examples, nats, by sentence.
        layers: drift of the logit lens at each layer's output, nats, by sentence. The last one is
            `kl_vocabulary`.
    """

    name: str
    rank: int | None
    parameters: int | None
    n: int
    accuracy_base: float
    accuracy_edited: float
    classes: ClassGaps
    groups: tuple[GroupGaps, ...]
    kl_labels: Estimate
    kl_vocabulary: Estimate
    layers: tuple[Estimate, ...]

    def record(self) -> dict[str, Any]:
        """Return everything in the types of JSON."""
        record: dict[str, Any] = plain(asdict(self))
        return record

    def row(self) -> dict[str, Any]:
        """Return the numbers of a sweep over ranks as one flat row."""
        row: dict[str, Any] = {
            "system": self.name, "rank": self.rank, "parameters": self.parameters, "n": self.n,
            "accuracy_base": self.accuracy_base, "accuracy": self.accuracy_edited,
        }  # fmt: skip
        c = self.classes
        row |= {f"recall_{name}": value for name, value in zip(c.classes, c.edited, strict=True)}
        row |= _cells("class_gap", c.gap_edited) | {"class_gap_base": c.gap_base.value}
        for g in self.groups:
            row |= _cells(f"{g.kind}_gap", g.gap_edited) | {
                f"{g.kind}_gap_p": g.gap_edited.p, f"{g.kind}_gap_base": g.gap_base.value,
                f"{g.kind}_swapped": g.swapped_edited.value, f"{g.kind}_swapped_base": g.swapped_base.value,
            }  # fmt: skip
        row |= _cells("kl_labels", self.kl_labels) | _cells("kl_vocabulary", self.kl_vocabulary)
        return row | {f"lens_L{layer}": drift.value for layer, drift in enumerate(self.layers)}

    def summary(self) -> pd.DataFrame:
        """Return a short table for reading: the measure, the base, the edit."""
        import pandas as pd

        c = self.classes
        rows = [
            ("accuracy", _share(self.accuracy_base), _share(self.accuracy_edited), ""),
            *(
                (f"recall: {name}", _share(base), _share(edited), "")
                for name, base, edited in zip(c.classes, c.base, c.edited, strict=True)
            ),
            ("gap of classes", percent(c.gap_base), percent(c.gap_edited), f"change {percent(c.change)} points"),
        ]  # fmt: skip
        for g in self.groups:
            rows += [
                (
                    f"gap of groups: {g.kind}", percent(g.gap_base), percent(g.gap_edited),
                    f"p {g.gap_base.p:.2g} without the edit, {g.gap_edited.p:.2g} with it; {_of_groups(g)}",
                ),
                (
                    f"swapped answers: {g.kind}", percent(g.swapped_base), percent(g.swapped_edited),
                    f"{g.reviews} reviews, {len(g.groups)} groups",
                ),
            ]  # fmt: skip
        for what, e in (("labels", self.kl_labels), ("vocabulary", self.kl_vocabulary)):
            rows.append((f"KL over the {what}", "-", _nats(e), "nats"))  # fmt: skip
        drifts = " ".join(f"{e.value:.3g}" for e in self.layers)
        rows.append(("drift of the logit lens by layer", "-", drifts, "nats, first layer to last"))
        return pd.DataFrame(rows, columns=["measure", "base", "edited", ""])

    def _repr_html_(self) -> str:
        html: str = self.summary().to_html(index=False)
        return html


def _cells(name: str, e: Estimate) -> dict[str, float]:
    return {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _nats(e: Estimate) -> str:
    """Return a divergence with its interval, which one sentence does not have."""
    ends = "" if np.isnan(e.low) else f" [{e.low:.4f}, {e.high:.4f}]"
    return f"{e.value:.4f}{ends}"


def _of_groups(g: GroupGaps) -> str:
    return ", ".join(f"{n} {100 * a:.0f} %" for n, a in zip(g.groups, g.edited, strict=True))


@dataclass(frozen=True)
class _How:
    """Hold how the model is asked and how intervals are made."""

    model: Model
    edit: Applicable
    template: PromptTemplate
    verbalizer: Verbalizer
    batch_size: int
    level: float
    draws: int
    seed: int
    known: dict[str, Any]

    @property
    def sure(self) -> dict[str, Any]:
        return {"level": self.level, "draws": self.draws, "seed": self.seed}

    def both(self, examples: Sequence[Example], name: str | None) -> tuple[Predictions, Predictions]:  # fmt: skip
        """Return the answers without the edit and with it."""
        ask = partial(
            predict, self.model, examples, template=self.template, verbalizer=self.verbalizer,
            batch_size=self.batch_size,
        )  # fmt: skip
        base: Predictions = self._once("answers", examples, lambda: ask(None))
        return base, ask(self.edit, name=name)

    def lens(self, examples: Sequence[Example], layers: Sequence[int]) -> Float[np.ndarray, "layer example"]:  # fmt: skip
        prompts = [question(self.model, e, self.template) for e in examples]
        states = partial(lens_states, self.model, None, prompts, layers, batch_size=self.batch_size)
        base = self._once(f"states of {list(layers)}", examples, states)
        return lens_kl(
            self.model, self.edit, prompts, layers, batch_size=self.batch_size, base=base
        )

    def _once(self, what: str, examples: Sequence[Example], compute: Callable[[], Any]) -> Any:
        """Return what the unedited model gives, which is computed for the first edit alone."""
        words = [word for _, word in self.verbalizer.words]
        asked = [self.template.text, words, self.verbalizer.separator]
        ran = [self.model.sha256, str(self.model.dtype), self.batch_size]
        rows = [content_hash(examples), [e.cluster for e in examples]]
        key = fingerprint([what, *rows, *asked, *ran])
        if key not in self.known:
            self.known[key] = compute()
        return self.known[key]

    def mean(self, values: Float[np.ndarray, " row"], clusters: np.ndarray) -> Estimate:
        """Return the mean of rows, with its interval by cluster."""
        found = cluster_bootstrap(values, clusters, **self.sure)
        return Estimate(float(found.mean), float(found.low), float(found.high))


def fairness(
    model: Model,
    edit: Applicable,
    examples: Sequence[Example],
    *,
    swaps: Sequence[Swap] = SWAPS,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    batch_size: int = 32,
    name: str | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    known: dict[str, Any] | None = None,
) -> Fairness:
    """Measure how `edit` treats classes and groups, and how far it moves from `model`.

    Args:
        examples: of the task that the edit is for; recalls, divergences and drift are measured on them.
        swaps: reviews in which a term is swapped.
        template, verbalizer: the question; by default the one that the edit was trained with.
        name: of the edit, for tables.
        level, draws, seed: of intervals and p-values.
        known: filled with what the unedited model does. Give it again with the next edit, and that
            is not computed again.

    Raises:
        ConfigError: an argument of the wrong type, or no examples.
        PromptTooLong: a prompt is longer than the model's context.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> found = fairness(model, ma.load_edit("bundled", model), examples, swaps=SWAPS[:1], draws=50)
        >>> len(found.layers) == model.n_layers, found.groups[0].kind
        (True, 'identity')
    """
    check_call("fairness", model, examples, edit)
    own = asked_with(edit)
    how = _How(
        model, edit, template or own[0], verbalizer or own[1], batch_size, level, draws, seed,
        {} if known is None else known,
    )  # fmt: skip
    base, edited = how.both(examples, name)
    layers = how.lens(examples, range(model.n_layers))
    means = [how.mean(values, base.clusters) for values in layers]
    return Fairness(
        name=edited.name,
        rank=largest_rank(edit),
        parameters=getattr(edit, "n_parameters", None),
        n=len(base),
        accuracy_base=float(base.correct.mean()),
        accuracy_edited=float(edited.correct.mean()),
        classes=class_gaps(base, edited, **how.sure),
        groups=tuple(_groups(how, swap, name) for swap in swaps),
        kl_labels=how.mean(label_kl(base, edited), base.clusters),
        kl_vocabulary=means[-1],
        layers=tuple(means),
    )


def largest_rank(edit: object) -> int | None:
    """Return the largest rank of an edit's parts; None where none has one."""
    parts = getattr(edit, "interventions", ())
    ranks = [part.rank for part in parts if isinstance(getattr(part, "rank", None), int)]
    return max(ranks, default=None)


def label_kl(base: Predictions, edited: Predictions) -> Float[np.ndarray, " example"]:
    """Return sum over labels of p log(p / q), in nats, with p and q the probabilities among the
    labels without the edit and with it.

    Raises:
        ConfigError: only answers are known, and no scores.
    """
    p, q = base.probabilities, edited.probabilities
    if p is None or q is None:
        raise ConfigError(
            f"{base.name} and {edited.name} have no scores of labels; answers alone have no KL"
        )
    tiny = np.finfo(float).tiny
    divergence: np.ndarray = (p * (np.log(np.maximum(p, tiny)) - np.log(np.maximum(q, tiny)))).sum(1)  # fmt: skip
    return divergence


def class_gaps(
    base: Predictions,
    edited: Predictions,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> ClassGaps:
    """Return the recall of each class that occurs and max - min of them, without the edit and with
    it.
    """
    gold = np.array([base.labels.index(e.polarity) for e in base.examples])
    there = np.unique(gold)

    def recalls(right: np.ndarray, rows: np.ndarray) -> np.ndarray:
        n = np.bincount(gold[rows], minlength=len(base.labels))[there]
        k = np.bincount(gold[rows], right[rows], minlength=len(base.labels))[there]
        with np.errstate(invalid="ignore"):
            return np.asarray(k / n)

    def gap(right: np.ndarray, rows: np.ndarray) -> float:
        return float(np.ptp(recalls(right, rows)))  # NaN where a draw misses a class: left out

    def estimate(fn: Any) -> Estimate:
        return bootstrap_statistic(
            fn, base.clusters, len(base), level=level, draws=draws, seed=seed
        )

    without, with_it = base.correct.astype(float), edited.correct.astype(float)
    every = np.arange(len(base))
    return ClassGaps(
        tuple(base.labels[i].value for i in there),
        tuple(recalls(without, every).tolist()),
        tuple(recalls(with_it, every).tolist()),
        estimate(lambda rows: gap(without, rows)),
        estimate(lambda rows: gap(with_it, rows)),
        estimate(lambda rows: gap(with_it, rows) - gap(without, rows)),
    )


def group_gap(
    right: Bool[np.ndarray, "review group"],
    frames: Int[np.ndarray, " review"],
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return max - min over groups of the accuracy, its interval by frame, and the p of "groups are
    alike".

    p = (1 + number of draws whose gap is as large) / (1 + draws); each draw permutes the groups
    within every review, which changes nothing where the group does not matter (Fisher's
    randomisation test, in blocks).

    Args:
        right: which answers are right.
        frames: of each review.
    """
    values = right.astype(float)

    def gap(rows: np.ndarray) -> float:
        return float(np.ptp(values[rows].mean(0)))

    found = bootstrap_statistic(gap, frames, len(values), level=level, draws=draws, seed=seed)
    rng = np.random.default_rng(seed)
    drawn = np.array([np.ptp(rng.permuted(values, axis=1).mean(0)) for _ in range(draws)])
    p = (1 + int((drawn >= found.value - 1e-12).sum())) / (1 + draws)
    return Estimate(found.value, found.low, found.high, p)


def swapped_answers(answers: Sequence[object], groups: int) -> Float[np.ndarray, " review"]:
    """Return the share of pairs of groups that are answered differently, review by review.

    Args:
        answers: review by review, one for each group.
        groups: how many there are.

    Example:
        >>> swapped_answers(["a", "a", "b", "a", "a", "a"], 3).round(3).tolist()
        [0.667, 0.0]
    """
    pairs = list(combinations(range(groups), 2))
    starts = range(0, len(answers), groups)
    return np.array(
        [np.mean([answers[s + i] is not answers[s + j] for i, j in pairs]) for s in starts]
    )


def _groups(how: _How, swap: Swap, name: str | None) -> GroupGaps:
    examples = list(swap.examples())
    n = len(swap.groups)
    base, edited = how.both(examples, name)
    frames = np.arange(swap.reviews) * len(swap.frames) // swap.reviews
    rights = [p.correct.reshape(-1, n) for p in (base, edited)]
    gaps = [group_gap(right, frames, **how.sure) for right in rights]
    swapped = [how.mean(swapped_answers(p.answers, n), frames) for p in (base, edited)]
    labels = label_kl(base, edited).reshape(-1, n)
    vocabulary = how.lens(examples, [how.model.n_layers - 1])[0].reshape(-1, n)
    return GroupGaps(
        swap.kind,
        swap.groups,
        swap.reviews,
        tuple(rights[0].mean(0).tolist()),
        tuple(rights[1].mean(0).tolist()),
        gaps[0],
        gaps[1],
        swapped[0],
        swapped[1],
        tuple(labels.mean(0).tolist()),
        tuple(vocabulary.mean(0).tolist()),
    )


@torch.inference_mode()
def lens_states(
    model: Model,
    edit: Applicable | None,
    prompts: Sequence[Tokens],
    layers: Sequence[int],
    *,
    batch_size: int = 32,
) -> Float[Tensor, "layer prompt d_model"]:
    """Return the outputs of some layers at the last token of each prompt.

    Args:
        edit: None for the unedited model.
        prompts: batches of one.
        layers: whose outputs.
    """
    sites = [Site(layer, "resid_post") for layer in layers]
    home = model.block_device(model.n_layers - 1)
    found = torch.empty(len(sites), len(prompts), model.d_model, dtype=model.dtype, device=home)
    for rows in by_length(prompts, batch_size):
        tokens = Tokens.stack([prompts[i] for i in rows])
        at = torch.arange(len(rows)), torch.tensor(tokens.lengths) - 1
        x = model.embed(tokens.ids)
        acting = nullcontext() if edit is None else edit.applied(model, tokens)
        with acting, capture(model, sites) as seen:
            model.run_hooked(x)
        for i, site in enumerate(sites):
            found[i, rows] = seen[site][at].to(found)
    return found


@torch.inference_mode()
def lens_kl(
    model: Model,
    edit: Applicable,
    prompts: Sequence[Tokens],
    layers: Sequence[int],
    *,
    batch_size: int = 32,
    base: Float[Tensor, "layer prompt d_model"] | None = None,
) -> Float[np.ndarray, "layer prompt"]:
    """Return KL(base || edited) of softmax(W_U norm(h_l)) at the last token of each prompt, in nats.

    h_l is the output of layer l, norm the final norm and W_U the unembedding: the logit lens
    (nostalgebraist 2020). At the last layer it is the model's own next token.

    Args:
        prompts: batches of one.
        layers: l.
        base: `lens_states` of the unedited model, if they are known.
    """
    states = partial(lens_states, model, prompts=prompts, layers=layers, batch_size=batch_size)
    runs = (states(None) if base is None else base), states(edit)
    found = np.empty((len(layers), len(prompts)))
    for i, (x, y) in enumerate(zip(*runs, strict=True)):
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            a, b = (model.finish(h[rows], None, "vocabulary") for h in (x, y))
            found[i, rows] = -kl(b, a).double().cpu().numpy()
    return found


__all__ = [
    "OPINIONS",
    "SWAPS",
    "ClassGaps",
    "Fairness",
    "GroupGaps",
    "Swap",
    "class_gaps",
    "fairness",
    "group_gap",
    "label_kl",
    "largest_rank",
    "lens_kl",
    "lens_states",
    "swapped_answers",
]
