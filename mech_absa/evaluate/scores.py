"""Score answers, with what is needed to trust the numbers.

Published scores of this task differ more between evaluation protocols than between methods:
accuracy or macro-F1, duplicates kept or dropped, test rows that stand in the training file, no
interval. So a `Scores` always holds the same numbers, computed in one way:

- accuracy and macro-F1, each with a bootstrap interval that resamples sentences, because the
  aspects of one sentence are not independent;
- precision, recall, F1 and support of every class, and the confusion matrix;
- the majority baseline: the score of always answering the most frequent class of these rows;
- the same without test rows that stand in the training data, if that is given;
- the same for sentences with several polarities, where only the aspect can decide;
- the same with every question counted once, if some are asked twice;
- calibration: the mean probability of the gold label, the cross-entropy over the labels, and the
  share of the probability that the labels have.

| name | formula |
|---|---|
| macro-F1 | mean F1 over the classes that occur among the gold labels (Device has no neutral row: two classes there) |
| gold probability | mean over rows of P(gold) / sum over the labels of P(label) |
| cross-entropy (`nll`) | mean over rows of -log of the same, in nats; log 3 = 1.099 is a uniform guess |
| label mass | mean over rows of the sum over the labels of P(label), over the whole vocabulary |

`compare` compares two systems on the same rows by McNemar's test and by a paired bootstrap over
sentences. Use the bootstrap if sentences have several rows. `aggregate` joins several seeds. The
spread between seeds and the sampling error of the test file are different things, so it gives both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from scipy.special import logsumexp, stdtrit

from ..errors import ConfigError
from ..examples import Example, Polarity, leakage, mixed_polarity
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..scoring import Applicable
from ..stats import (
    Estimate,
    McNemar,
    bootstrap_statistic,
    cluster_bootstrap,
    mcnemar,
    paired_bootstrap_difference,
)
from ..words import expect
from .predictions import Decode, Predictions, check_call, predict

if TYPE_CHECKING:
    import pandas as pd

NONE = "none"
"""How tables write an answer that is no label."""

NAN = float("nan")


@dataclass(frozen=True)
class ClassScore:
    """Hold the score of one class. Precision is 0 if the class was never answered."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    answered: int


@dataclass(frozen=True, eq=False)
class Quality:
    """Hold how good the answers to some rows are.

    Attributes:
        n: rows.
        sentences: different sentences among them.
        accuracy, macro_f1: with their intervals.
        majority: share of the most frequent gold class.
        majority_class: that class.
        classes: every class that has a label.
        confusion: rows are gold classes in the order of `classes`; columns are answers in that
            order, then `none`.
        unanswered: answers that were no label.
        gold_probability, nll, label_mass: calibration; NaN where no scores are known.
    """

    n: int
    sentences: int
    accuracy: Estimate
    macro_f1: Estimate
    majority: float
    majority_class: str
    classes: tuple[ClassScore, ...]
    confusion: Int[np.ndarray, "gold answer"]
    unanswered: int
    gold_probability: float = NAN
    nll: float = NAN
    label_mass: float = NAN

    def row(self) -> dict[str, Any]:
        """Return all numbers as one flat row."""
        row: dict[str, Any] = {
            "n": self.n, "sentences": self.sentences,
            "accuracy": self.accuracy.value, "accuracy_low": self.accuracy.low, "accuracy_high": self.accuracy.high,
            "macro_f1": self.macro_f1.value, "macro_f1_low": self.macro_f1.low, "macro_f1_high": self.macro_f1.high,
            "majority": self.majority, "majority_class": self.majority_class, "unanswered": self.unanswered,
            "gold_probability": self.gold_probability, "nll": self.nll, "label_mass": self.label_mass,
        }  # fmt: skip
        for c in self.classes:
            row |= {
                f"{what}_{c.label}": getattr(c, what)
                for what in ("precision", "recall", "f1", "support", "answered")
            }
        return row

    def confusion_table(self) -> pd.DataFrame:
        """Return the confusion matrix with its names."""
        import pandas as pd

        names = [c.label for c in self.classes]
        index, columns = pd.Index(names, name="gold"), pd.Index([*names, NONE], name="answered")
        return pd.DataFrame(self.confusion, index=index, columns=columns)


@dataclass(frozen=True, eq=False)
class Scores:
    """Hold how good one system is on one data set.

    Attributes:
        name: of the system.
        data: of the data set.
        all: every row.
        unseen: without the rows whose question stands in the training data; None where that was not
            given, or leaves no row.
        leaked: how many such rows there are; None where the training data was not given.
        mixed: the rows of sentences that carry several polarities; None where there are none.
        distinct: every question (sentence and aspect) once, the first time it is asked; None where
            none is asked twice.
        predictions: the answers scored.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> ma.evaluate(model, examples).all.n
        4
    """

    name: str
    data: str
    all: Quality
    unseen: Quality | None
    leaked: int | None
    mixed: Quality | None
    distinct: Quality | None
    predictions: Predictions = field(repr=False)

    @property
    def accuracy(self) -> float:
        return self.all.accuracy.value

    @property
    def macro_f1(self) -> float:
        return self.all.macro_f1.value

    @property
    def subsets(self) -> dict[str, Quality]:
        """Return the scores of each set of rows that exists, by name."""
        found = {
            "all": self.all,
            "unseen": self.unseen,
            "mixed": self.mixed,
            "distinct": self.distinct,
        }
        return {name: quality for name, quality in found.items() if quality is not None}

    def compare(
        self, other: Scores | Predictions, *, level: float = 0.95, draws: int = 9999, seed: int = 0
    ) -> Comparison:
        """Compare two systems on the same rows; a positive difference favours the first.

        Raises:
            ConfigError: they answered different examples.
        """
        answers = other.predictions if isinstance(other, Scores) else other
        expect(
            answers, Predictions, "Scores.compare(other=...)", "scores of evaluate, or predictions"
        )
        return compare(self.predictions, answers, level=level, draws=draws, seed=seed)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per subset (`all`, `unseen`, `mixed`, `distinct`), one column per
        number.
        """
        import pandas as pd

        head = {"system": self.name, "data": self.data}
        return pd.DataFrame(
            [head | {"subset": s, "leaked": self.leaked} | q.row() for s, q in self.subsets.items()]
        )

    def summary(self) -> pd.DataFrame:
        """Return a short table for reading: percentages with their intervals."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"system": self.name, "data": self.data, "rows": s} | summary_row(q)
                for s, q in self.subsets.items()
            ]
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        classes = pd.DataFrame([vars(c) for c in self.all.classes])
        leaked = (
            ""
            if self.leaked is None
            else f"<div>{self.leaked} of {self.all.n} rows stand in the training data</div>"
        )
        html: str = (
            self.summary().to_html(index=False) + leaked
            + classes.to_html(index=False, float_format="{:.3f}".format) + self.all.confusion_table().to_html()
        )  # fmt: skip
        return html


def summary_row(q: Quality) -> dict[str, str]:
    """Return the numbers of a `Quality` that fit into a table, as text."""
    return {
        "n": str(q.n),
        "accuracy %": percent(q.accuracy),
        "macro-F1 %": percent(q.macro_f1),
        "majority %": f"{100 * q.majority:.1f}",
        "recall %": " ".join(f"{c.label[:3]} {100 * c.recall:.0f}" for c in q.classes if c.support),
        "P(gold)": "-" if np.isnan(q.gold_probability) else f"{q.gold_probability:.3f}",
        "no label": str(q.unanswered),
    }


def percent(e: Estimate) -> str:
    """Return an estimate as text in percent, such as `88.1 [86.0, 90.2]`."""
    return (
        f"{100 * e.value:.1f}"
        if np.isnan(e.low)
        else f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    )


# ---------------------------------------------------------------------------------------------------- scoring


def evaluate(
    model: Model,
    examples: Sequence[Example],
    edit: Applicable | None = None,
    *,
    train: Sequence[Example] | None = None,
    template: PromptTemplate | str | None = None,
    verbalizer: Verbalizer | None = None,
    decode: Decode = "label",
    batch_size: int = 32,
    name: str | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Scores:
    """Return the scores of `model` on `examples`, with `edit` applied: `predict`, then `score`.

    Raises:
        ConfigError: an argument of the wrong type, or no examples.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> scores = ma.evaluate(model, examples, ma.load_edit("bundled", model))
        >>> scores.all.n, 0 <= scores.accuracy <= 1
        (4, True)
    """
    check_call("evaluate", model, examples, edit)
    answers = predict(
        model,
        examples,
        edit,
        template=template,
        verbalizer=verbalizer,
        decode=decode,
        batch_size=batch_size,
        name=name,
    )
    return score(answers, train=train, level=level, draws=draws, seed=seed)


def score(
    predictions: Predictions,
    *,
    train: Sequence[Example] | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Scores:
    """Return the scores of some answers.

    Args:
        train: what the system was trained on, to tell which test rows it has seen.
        level: of the intervals.
        draws: bootstrap draws.
    """

    def of(rows: Sequence[int]) -> Quality | None:
        return (
            quality(predictions.take(rows), level=level, draws=draws, seed=seed)
            if len(rows)
            else None
        )

    seen = None if train is None else set(leakage(train, predictions.examples).rows)
    first: dict[tuple[str, str], int] = {}
    for i, e in enumerate(predictions.examples):
        first.setdefault(e.key, i)
    return Scores(
        predictions.name,
        predictions.data,
        quality(predictions, level=level, draws=draws, seed=seed),
        None if seen is None else of([i for i in range(len(predictions)) if i not in seen]),
        None if seen is None else len(seen),
        of(mixed_polarity(predictions.examples)),
        of(list(first.values())) if len(first) < len(predictions) else None,
        predictions,
    )


def quality(p: Predictions, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> Quality:
    """Count everything over one set of rows."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    classes = [c.value for c in p.labels]
    gold = [e.polarity.value for e in p.examples]
    if strange := sorted(set(gold) - set(classes)):
        raise ConfigError(
            f"{p.data or p.name}: rows are {strange[0]}, but the system can only answer {', '.join(classes)}"
        )
    answered = [NONE if a is None else a.value for a in p.answers]
    precision, recall, f1, support = precision_recall_fscore_support(
        gold, answered, labels=classes, average=None, zero_division=0
    )
    confusion = confusion_matrix(gold, answered, labels=[*classes, NONE])[: len(classes)]
    frequent = int(np.argmax(support))
    accuracy = cluster_bootstrap(p.correct, p.clusters, level=level, draws=draws, seed=seed)
    calibration = {}
    if p.scores is not None:
        total = logsumexp(p.scores, axis=1)
        right = p.scores[np.arange(len(p)), [classes.index(g) for g in gold]] - total
        calibration = {
            "gold_probability": float(np.exp(right).mean()), "nll": float(-right.mean()), "label_mass": float(np.exp(total).mean()),
        }  # fmt: skip
    return Quality(
        n=len(p),
        sentences=len(set(p.clusters)),
        accuracy=Estimate(float(accuracy.mean), float(accuracy.low), float(accuracy.high)),
        macro_f1=bootstrap_statistic(
            _macro_f1(p), p.clusters, len(p), level=level, draws=draws, seed=seed
        ),
        majority=float(support[frequent] / len(p)),
        majority_class=classes[frequent],
        classes=tuple(
            ClassScore(
                c,
                float(precision[i]),
                float(recall[i]),
                float(f1[i]),
                int(support[i]),
                int(confusion[:, i].sum()),
            )
            for i, c in enumerate(classes)
        ),
        confusion=confusion,
        unanswered=int(confusion[:, -1].sum()),
        **calibration,
    )


def _macro_f1(p: Predictions) -> Callable[[np.ndarray], float]:
    """Return a function from row indices to macro-F1. It is faster than a library call per draw."""
    order: dict[Polarity | None, int] = {c: i for i, c in enumerate(p.labels)}
    k = len(order)
    order[None] = k
    # An answer outside the labels (which only a file can give) is as good as none.
    cell = np.array(
        [
            order[e.polarity] * (k + 1) + order.get(a, k)
            for e, a in zip(p.examples, p.answers, strict=True)
        ]
    )

    # Fixed over the draws, or a draw that misses a rare class would score higher for it.
    there = np.unique(cell // (k + 1))

    def macro_f1(rows: np.ndarray) -> float:
        table = np.bincount(cell[rows], minlength=k * (k + 1)).reshape(k, k + 1)
        meant_or_answered = table.sum(1) + table[:, :k].sum(0)
        return float((2 * np.diagonal(table) / np.maximum(meant_or_answered, 1))[there].mean())

    return macro_f1


# ---------------------------------------------------------------------------------------------------- two systems


@dataclass(frozen=True)
class Comparison:
    """Hold the comparison of two systems on the same rows.

    Attributes:
        first, second: their names.
        n: rows.
        accuracy_first, accuracy_second: shares of right answers.
        difference: accuracy of the first minus that of the second, with its interval and sign-flip
            p, by sentence.
        macro_f1: the same for macro-F1 (no p).
        mcnemar: b counts rows where only the first is right, c where only the second is.
        agreement: share of rows with the same answer.
    """

    first: str
    second: str
    data: str
    n: int
    accuracy_first: float
    accuracy_second: float
    difference: Estimate
    macro_f1: Estimate
    mcnemar: McNemar
    agreement: float

    def row(self) -> dict[str, Any]:
        """Return all numbers as one flat row."""
        return {
            "first": self.first, "second": self.second, "data": self.data, "n": self.n,
            "accuracy_first": self.accuracy_first, "accuracy_second": self.accuracy_second,
            "difference": self.difference.value, "difference_low": self.difference.low, "difference_high": self.difference.high,
            "p_sign_flip": self.difference.p,
            "macro_f1_difference": self.macro_f1.value, "macro_f1_low": self.macro_f1.low, "macro_f1_high": self.macro_f1.high,
            "only_first_right": self.mcnemar.b, "only_second_right": self.mcnemar.c, "p_mcnemar": self.mcnemar.p,
            "agreement": self.agreement,
        }  # fmt: skip

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([self.row()])

    def _repr_html_(self) -> str:
        html: str = self.to_pandas().to_html(index=False)
        return html


def compare(
    first: Predictions,
    second: Predictions,
    *,
    level: float = 0.95,
    draws: int = 9999,
    seed: int = 0,
) -> Comparison:
    """The first system against the second, on the same rows.

    Raises:
        ConfigError: they answered different examples.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> base = ma.predict(model, examples)
        >>> edited = ma.predict(model, examples, ma.load_edit("bundled", model))
        >>> ma.compare(edited, base).n
        4
    """
    for name, given in (("first", first), ("second", second)):
        expect(given, Predictions, f"compare({name}=...)", "Predictions, from predict(...)")
    same_rows(first, second)
    correct = first.correct.astype(float), second.correct.astype(float)
    f1 = _macro_f1(first), _macro_f1(second)
    return Comparison(
        first.name,
        second.name,
        first.data,
        len(first),
        float(correct[0].mean()),
        float(correct[1].mean()),
        paired_bootstrap_difference(*correct, first.clusters, level=level, draws=draws, seed=seed),
        bootstrap_statistic(
            lambda rows: f1[0](rows) - f1[1](rows),
            first.clusters,
            len(first),
            level=level,
            draws=min(draws, 1000),
            seed=seed,
        ),
        mcnemar(*correct),
        float(np.mean([a is b for a, b in zip(first.answers, second.answers, strict=True)])),
    )


def same_rows(first: Predictions, second: Predictions) -> None:
    """Reject answers to different questions.

    Raises:
        ConfigError: they answered different examples.
    """
    if len(first) != len(second):
        raise ConfigError(
            f"{first.name} answered {len(first)} examples and {second.name} {len(second)}; the same rows are needed"
        )
    for i, (a, b) in enumerate(zip(first.examples, second.examples, strict=True)):
        if (a.key, a.polarity) != (b.key, b.polarity):
            raise ConfigError(
                f"row {i + 1} of {first.name} asks about {a.aspect!r}, of {second.name} about {b.aspect!r}; the same rows are needed"
            )


# ---------------------------------------------------------------------------------------------------- several seeds


@dataclass(frozen=True)
class Spread:
    """Hold mean, standard deviation (n - 1) and Student's interval of the mean over seeds; NaN for
    one seed.
    """

    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Aggregate:
    """Hold several seeds of one method on one data set.

    Attributes:
        name: of the method.
        data: of the data set.
        seeds: number of seeds.
        accuracy, macro_f1: over the seeds.
        sampling: mean accuracy of the seeds with its bootstrap interval over sentences, that is,
            what other test sentences could give.
    """

    name: str
    data: str
    seeds: int
    accuracy: Spread
    macro_f1: Spread
    sampling: Estimate

    def row(self) -> dict[str, Any]:
        """Return all numbers as one flat row."""
        row: dict[str, Any] = {"system": self.name, "data": self.data, "seeds": self.seeds}
        for what in ("accuracy", "macro_f1"):
            spread = getattr(self, what)
            row |= {
                what: spread.mean,
                f"{what}_sd": spread.sd,
                f"{what}_low": spread.low,
                f"{what}_high": spread.high,
            }
        return row | {"sampling_low": self.sampling.low, "sampling_high": self.sampling.high}

    def to_pandas(self) -> pd.DataFrame:
        import pandas as pd

        return pd.DataFrame([self.row()])

    def _repr_html_(self) -> str:
        html: str = self.to_pandas().to_html(index=False)
        return html


def spread(values: Sequence[float], level: float = 0.95) -> Spread:
    """Return mean, standard deviation and Student's interval of the mean of a few runs."""
    x = np.asarray(values, dtype=float)
    if not x.size:
        raise ConfigError("no runs to put together; at least one is needed")
    if x.size == 1:
        return Spread(float(x[0]), NAN, NAN, NAN)
    mean, sd = float(x.mean()), float(x.std(ddof=1))
    reach = float(stdtrit(x.size - 1, (1 + level) / 2)) * sd / x.size**0.5
    return Spread(mean, sd, mean - reach, mean + reach)


def aggregate(
    runs: Sequence[Scores],
    name: str | None = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Aggregate:
    """Join the scores of several seeds of one method on the same rows.

    Raises:
        ConfigError: no runs, or runs on different rows.
    """
    if not runs:
        raise ConfigError("no runs to put together; at least one is needed")
    for other in runs[1:]:
        same_rows(runs[0].predictions, other.predictions)
    share = np.mean([r.predictions.correct for r in runs], axis=0)
    interval = cluster_bootstrap(
        share, runs[0].predictions.clusters, level=level, draws=draws, seed=seed
    )
    return Aggregate(
        name or runs[0].name,
        runs[0].data,
        len(runs),
        spread([r.accuracy for r in runs], level),
        spread([r.macro_f1 for r in runs], level),
        Estimate(float(interval.mean), float(interval.low), float(interval.high)),
    )
