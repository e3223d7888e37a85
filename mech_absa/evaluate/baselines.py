"""Simple systems whose scores stand beside every score of a model.

A score says little on its own: a rule that takes the nearest opinion word answers 96 % of the first
version of the built-in world. These baselines are trained on the train file alone:

| name | what it answers |
|---|---|
| `majority` | the most frequent class of the train file |
| `nearest opinion` | the polarity of the opinion expression nearest to the aspect |
| `nearest opinion in the clause` | the same, but first among those in the clause of the aspect |
| `words around the aspect` | a logistic regression on words at positions relative to the aspect |
| `base, best wording` | the unedited model under the question that scores best on validation data |

The opinion expressions and their usual polarity are learned from the opinion spans of the train
file. Where it has none, the two baselines that need them are left out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError
from ..examples import Example, Examples, Polarity, Span
from ..prompts import PromptTemplate
from ..readers import load_examples
from .predictions import Predictions, predict
from .scores import Scores, score

if TYPE_CHECKING:
    import pandas as pd

    from ..model import Model

WORDINGS = (
    PromptTemplate().text,
    "{sentence} The sentiment polarity of {aspect} is",
    "{sentence} my view of the {aspect} is",
    "{sentence} my feelings about the {aspect} are",
    "{sentence} the {aspect} :",
)
"""Questions that are tried for the unedited model; the first is the paper's."""

WINDOW = 10
"""Words on each side of the aspect that the logistic regression reads one by one."""

_WORD = re.compile(r"\w+|[^\w\s]")
_BREAKS = set(".,;!?:") | {"and", "but", "while", "though", "although", "yet", "whereas", "plus"}


def baselines(
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    model: Model | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a table with the scores of every baseline on `test`, one row per baseline.

    Args:
        train: the only examples that a baseline learns or chooses from.
        model: the unedited model; without it, its row is left out.
        level: of the intervals, which resample sentences.
        draws: bootstrap draws.
        seed: of the bootstrap and of the validation split.

    Raises:
        ConfigError: `train` or `test` is empty.
    """
    import pandas as pd

    answers = baseline_predictions(train, test, model=model, seed=seed)
    tables = [score(p, level=level, draws=draws, seed=seed).to_pandas() for p in answers]
    return pd.concat([t[t["subset"] == "all"] for t in tables], ignore_index=True)


def baseline_predictions(
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    model: Model | None = None,
    seed: int = 0,
) -> list[Predictions]:
    """Return the answers of every baseline, in the order of the table above.

    Raises:
        ConfigError: `train` or `test` is empty.
    """
    for name, items in (("train", train), ("test", test)):
        if not len(items):
            raise ConfigError(f"the {name} data of the baselines are empty; give an example")
    answers = [majority(train, test)]
    if any(e.opinion for e in train):
        answers += [nearest_opinion(train, test), nearest_opinion(train, test, in_clause=True)]
    answers.append(words_around(train, test))
    if model is not None:
        answers.append(best_wording(model, train, test, seed=seed))
    return answers


def beside(
    data: Sequence[Examples],
    train: Sequence[Example] | None = None,
    *,
    model: Model | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> list[Scores]:
    """Return the scores of the baselines that belong beside a score on each of several test sets.

    They learn from `train`; where it is None, from the train file of each built-in test set. Other
    test sets are then left out, for nothing is known that a baseline could learn from.
    """
    scores = []
    for test in data:
        items = train if train is not None else _own_train(test.source)
        if items is not None:
            answers = baseline_predictions(items, test, model=model, seed=seed)
            scores += [score(p, level=level, draws=draws, seed=seed) for p in answers]
    return scores


def across(domains: Sequence[tuple[str, Examples, Examples]]) -> pd.DataFrame:
    """Return the baselines of every training domain on every test domain, one row each.

    Args:
        domains: name, training and test examples of each.

    Returns:
        columns baseline, train, test, in_domain, n, accuracy, macro_f1. Baselines of one training domain
        are trained once.
    """
    import pandas as pd

    rows = []
    together = [e for _, _, test in domains for e in test]
    for name, train, _ in domains:
        for answers in baseline_predictions(train, together):
            first = 0
            for other, _, test in domains:
                last = first + len(test)
                part = Predictions(tuple(test), answers.answers[first:last], answers.name, other)
                first = last
                known = score(part, draws=1).all
                rows.append(
                    {"baseline": answers.name, "train": name, "test": other, "in_domain": name == other,
                     "n": known.n, "accuracy": known.accuracy.value, "macro_f1": known.macro_f1.value}
                )  # fmt: skip
    return pd.DataFrame(rows)


def _own_train(source: str) -> Examples | None:
    """Return the train file that belongs to `builtin:.../test`; None for any other source."""
    if not source.startswith("builtin:") or source.replace(":", "/").split("/")[-1] != "test":
        return None
    return load_examples(source.removesuffix("test") + "train")


def majority(train: Sequence[Example], test: Sequence[Example]) -> Predictions:
    """Answer the most frequent class of `train` for every example of `test`."""
    counts = Counter(e.polarity for e in train)
    answer = max(Polarity, key=lambda p: counts[p])
    return _answers(test, [answer] * len(test), "majority")


# --- the nearest opinion expression ---------------------------------------------------------------


def nearest_opinion(
    train: Sequence[Example], test: Sequence[Example], *, in_clause: bool = False
) -> Predictions:
    """Answer the usual polarity of the opinion expression that stands nearest to the aspect.

    Distance counts the words in between; of two equally near expressions the following one is
    taken. An example without any known expression gets the majority class.

    Args:
        train: gives the expressions, its counterfactuals included, and their polarity in most cases.
        in_clause: take the nearest expression of the clause of the aspect, where it has one.
            Clauses end at punctuation marks and at conjunctions.
    """
    lexicon = opinion_lexicon(train)
    otherwise = majority(train, test).answers[0]
    name = "nearest opinion" + (" in the clause" if in_clause else "")
    return _answers(test, [_nearest(e, lexicon, in_clause) or otherwise for e in test], name)


def opinion_lexicon(train: Sequence[Example]) -> dict[tuple[str, ...], Polarity]:
    """Return each opinion expression of `train`, as words, with its most frequent polarity."""
    counts: dict[tuple[str, ...], Counter[Polarity]] = defaultdict(Counter)
    for e in (x for example in train for x in (example, *example.counterfactuals)):
        if e.opinion is not None:
            counts[tuple(_words(e.sentence[slice(*e.opinion)]))][e.polarity] += 1
    return {words: max(Polarity, key=lambda p: c[p]) for words, c in counts.items()}


def _nearest(
    example: Example, lexicon: dict[tuple[str, ...], Polarity], in_clause: bool
) -> Polarity | None:
    words, (start, end) = _located(example)
    places = [p for p in _expressions(words, lexicon) if p[1] <= start or p[0] >= end]
    if in_clause:
        first = next((i + 1 for i in range(start - 1, -1, -1) if words[i] in _BREAKS), 0)
        last = next((i for i in range(end, len(words)) if words[i] in _BREAKS), len(words))
        places = [p for p in places if first <= p[0] and p[1] <= last] or places
    if not places:
        return None
    near = min(places, key=lambda p: (p[0] - end, 0) if p[0] >= end else (start - p[1], 1))
    return lexicon[tuple(words[slice(*near)])]


def _expressions(words: list[str], lexicon: dict[tuple[str, ...], Polarity]) -> list[Span]:
    """Return where expressions of the lexicon stand, the longest at each place, without overlaps."""
    longest = max(map(len, lexicon))
    places, i = [], 0
    while i < len(words):
        for n in range(min(longest, len(words) - i), 0, -1):
            if tuple(words[i : i + n]) in lexicon:
                places.append((i, i + n))
                i += n - 1
                break
        i += 1
    return places


# --- words around the aspect ----------------------------------------------------------------------


def words_around(train: Sequence[Example], test: Sequence[Example]) -> Predictions:
    """Answer with a multinomial logistic regression on words at positions relative to the aspect.

    Each of the ten words before and after the aspect is a feature with its offset, and one with its
    side alone whose value is one over the distance. The counterfactuals of `train` are trained on
    too. The penalty is L2 with C = 1.
    """
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression

    name = "words around the aspect"
    if len({e.polarity for e in train}) == 1:
        return replace(majority(train, test), name=name)
    items = [e for example in train for e in (example, *example.counterfactuals)]
    vectorizer = DictVectorizer()
    x = vectorizer.fit_transform([_features(e) for e in items])
    regression = LogisticRegression(max_iter=300).fit(x, [e.polarity.value for e in items])
    labels = regression.predict(vectorizer.transform([_features(e) for e in test]))
    return _answers(test, [Polarity(str(label)) for label in labels], name)


def _features(example: Example) -> dict[str, float]:
    words, (start, end) = _located(example)
    features: dict[str, float] = {}
    for k in range(1, WINDOW + 1):
        for side, i in (("-", start - k), ("+", end - 1 + k)):
            if 0 <= i < len(words):
                features[f"{side}{k} {words[i]}"] = 1.0
                features.setdefault(f"{side} {words[i]}", 1 / k)  # the nearest place comes first
    return features


# --- the unedited model ---------------------------------------------------------------------------


def best_wording(
    model: Model,
    train: Sequence[Example],
    test: Sequence[Example],
    *,
    wordings: Sequence[str] = WORDINGS,
    most: int = 300,
    seed: int = 0,
) -> Predictions:
    """Ask the unedited model in the wording that scores best on `most` examples of `train`.

    The name of the answers holds the wording. Ties go to the wording that stands first.
    """
    validation = Examples(tuple(train)).sample(most, seed)
    right = [predict(model, validation, template=w).correct.mean() for w in wordings]
    wording = wordings[int(np.argmax(right))]
    return replace(predict(model, test, template=wording), name=f"base, best wording: {wording}")


# --- shared ---------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _located(example: Example) -> tuple[list[str], Span]:
    """Return the words of the sentence and which of them are the aspect; none without a span."""
    if example.span is None:
        words = _words(example.sentence)
        return words, (len(words), len(words))
    before, inside, after = (
        _words(example.sentence[: example.span[0]]),
        _words(example.sentence[slice(*example.span)]),
        _words(example.sentence[example.span[1] :]),
    )
    return [*before, *inside, *after], (len(before), len(before) + len(inside))


def _answers(test: Sequence[Example], answers: Sequence[Polarity | None], name: str) -> Predictions:
    source = test.source if isinstance(test, Examples) else ""
    return Predictions(tuple(test), tuple(answers), name, source)
