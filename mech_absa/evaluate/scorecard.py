"""Put everything that was measured about several edits into one table.

    card = scorecard(model, edit, side_effects(model, edit, test, others=[other]), test)
    table([card])

The scorecard adds nothing to the [side effects](#mech_absa.evaluate.side_effects) but intervals, the
edit's cost, and one question of Yao et al. 2023 (arXiv 2305.13172, section 5.1) that they do not ask:

- **portability**, in the sense of that survey: does what the edit teaches reach what follows from it?
  Whoever praises the food recommends it and does not complain about it. `IMPLIED` holds such questions;
  they are answered by `yes` or `no`, half of them the other way round, and neutral rows are left out.
- **out of domain**: the edit's own question about other domains.

Both are called portability in the literature; here the names are kept apart. Every number is that of the
edited model; `MEASURES` says how each is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..examples import Example, Polarity
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..scoring import Applicable
from ..stats import Estimate, cluster_bootstrap
from .predictions import Predictions, check_call, predict
from .scores import NAN, percent
from .side_effects import SideEffects

if TYPE_CHECKING:
    import pandas as pd

YES, NO = ("yes", "no"), ("no", "yes")
"""Answers for positive and for negative rows."""

IMPLIED: tuple[tuple[str, tuple[str, str]], ...] = (
    ("Review: '{sentence}' Would the writer recommend the {aspect} ? Answer yes or no:", YES),
    ("Review: '{sentence}' Does the writer complain about the {aspect} ? Answer yes or no:", NO),
    ("Review: '{sentence}' Was the writer pleased with the {aspect} ? Answer yes or no:", YES),
    ("Review: '{sentence}' Should the {aspect} be improved ? Answer yes or no:", NO),
)
"""Questions whose answers follow from the polarity, with the answers for positive and negative rows."""

MEASURES: Mapping[str, tuple[str, str]] = {
    "reliability": ("in domain: accuracy", "the first test file, the question of the edit; by sentence"),
    "gain": ("in domain: accuracy minus the base's", "the same rows, paired; by sentence"),
    "out_of_domain": ("out of domain: accuracy", "all rows of the other test files together; by sentence"),
    "generality": ("generality: accuracy", "mean over paraphrases of the question; by sentence"),
    "consistency": ("prompt consistency", "pairs of wordings, the main one included, with the same answer; by sentence"),
    "portability": ("portability: accuracy", "yes or no to questions that follow from the polarity, rows that are not neutral; by sentence"),
    "text_top1": ("locality, text: same next token", "every token of unrelated text; by passage"),
    "text_kl": ("locality, text: KL", "the same tokens, KL(base || edited), nats; by passage"),
    "near_top1": ("locality, other questions: same next token", "the end of other questions about the aspect; by sentence"),
    "near_kl": ("locality, other questions: KL", "the same, KL(base || edited), nats; by sentence"),
    "aspects": ("locality, other aspects: same answer", "aspects beside which, in one sentence, an answer changed; by sentence"),
}  # fmt: skip
"""Column -> (what tables call it, how it is measured)."""

IN_NATS = ("text_kl", "near_kl")


@dataclass(frozen=True)
class Scorecard:
    """Hold the main numbers of one edit.

    Attributes:
        name: of the edit.
        numbers: of each of `MEASURES`, with its interval; NaN where there are no rows.
        base: of those that the unedited model has, its value.
        parameters: that were trained; None where that is not known.
        seconds: of training; None where nothing was trained, or that is not known.
        examples: it was trained on; None likewise.
    """

    name: str
    numbers: Mapping[str, Estimate]
    base: Mapping[str, float]
    parameters: int | None
    seconds: float | None
    examples: int | None

    def row(self) -> dict[str, Any]:
        """Return everything as one flat row."""
        row: dict[str, Any] = {
            "system": self.name, "parameters": self.parameters, "seconds": self.seconds,
            "examples": self.examples,
        }  # fmt: skip
        for name in MEASURES:
            e = self.numbers[name]
            row |= {name: e.value, f"{name}_low": e.low, f"{name}_high": e.high}
            if name in self.base:
                row[f"{name}_base"] = self.base[name]
        return row


def scorecard(
    model: Model,
    edit: Applicable,
    effects: SideEffects,
    examples: Sequence[Example],
    *,
    questions: Sequence[tuple[str, tuple[str, str]]] = IMPLIED,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Scorecard:
    """Return the scorecard of an edit.

    Args:
        model, edit: for the questions that follow from the polarity.
        effects: what `side_effects` found, which the other numbers come from.
        examples: of the task that the edit is for.
        questions: that follow, with the answers for positive and for negative rows.
        level, draws, seed: of the intervals of portability; the others are those of `effects`.

    Raises:
        ConfigError: an argument of the wrong type, no examples, or no questions.

    Example:
        >>> import mech_absa as ma
        >>> from mech_absa.evaluate.side_effects import side_effects
        >>> model, test = ma.load_model(), ma.load_examples("builtin:restaurant/test", limit=4)
        >>> edit = ma.load_edit("bundled", model)
        >>> effects = side_effects(model, edit, test, draws=50)
        >>> card = scorecard(model, edit, effects, test, draws=50)
        >>> card.parameters, card.numbers["reliability"].value == effects.reliability.accuracy_first
        (143360, True)
    """
    check_call("scorecard", model, examples, edit)
    found = effects.intervals
    ask = partial(
        follows, model, examples, questions=questions, batch_size=batch_size, level=level,
        draws=draws, seed=seed,
    )  # fmt: skip
    worded = [g.base for g in effects.generality]
    elsewhere = [(p.accuracy_second, p.n) for p in effects.portability]
    seconds, rows = _cost(edit)
    return Scorecard(
        name=effects.name,
        numbers={
            "reliability": found.accuracy, "gain": effects.reliability.difference,
            "out_of_domain": found.elsewhere, "generality": found.generality,
            "consistency": found.consistency, "portability": ask(edit),
            "text_top1": found.text_top1, "text_kl": found.text_kl,
            "near_top1": found.near_top1, "near_kl": found.near_kl, "aspects": found.aspects,
        },
        base={
            "reliability": effects.reliability.accuracy_second,
            "out_of_domain": _weighted(elsewhere),
            "generality": float(np.mean(worded)) if worded else NAN,
            "consistency": effects.consistency_base,
            "portability": ask(None).value,
        },
        parameters=getattr(edit, "n_parameters", None),
        seconds=seconds,
        examples=rows,
    )  # fmt: skip


def _cost(edit: Applicable) -> tuple[float | None, int | None]:
    """Return seconds and examples of the training; None where it is not known that there was one."""
    from ..edits.record import Trained

    if not isinstance(edit, Trained) or not (edit.record.trained or edit.record.made):
        return None, None
    return edit.record.seconds or None, edit.record.examples


def _weighted(shares: Sequence[tuple[float, int]]) -> float:
    """Return the share over all rows, from those of parts and their numbers of rows."""
    rows = sum(n for _, n in shares)
    return sum(share * n for share, n in shares) / rows if rows else NAN


def follows(
    model: Model,
    examples: Sequence[Example],
    edit: Applicable | None,
    *,
    questions: Sequence[tuple[str, tuple[str, str]]] = IMPLIED,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the accuracy on questions that follow from the polarity, its mean over questions.

    The answer of a row is right if the word for its class scores higher than the other one. 1/2 is
    what a constant answer gets, where half of the questions are asked the other way round.

    Args:
        examples: of which the neutral ones are left out.
        edit: None for the unedited model.
        questions: templates, with the answers for positive and for negative rows.

    Returns:
        The accuracy with its interval by sentence; NaN where all rows are neutral.

    Raises:
        ConfigError: there are no questions.
    """
    if not questions:
        raise ConfigError("no questions were given for portability; at least one is needed")
    clear = [e for e in examples if e.polarity is not Polarity.NEUTRAL]
    if not clear:
        return Estimate(NAN, NAN, NAN)
    runs = [
        predict(model, clear, edit, template=PromptTemplate(text), verbalizer=Verbalizer.of(words), batch_size=batch_size)
        for text, words in questions
    ]  # fmt: skip
    return _mean_of(runs, level=level, draws=draws, seed=seed)


def _mean_of(runs: Sequence[Predictions], **sure: Any) -> Estimate:
    right = np.mean([p.correct for p in runs], axis=0)
    found = cluster_bootstrap(right, runs[0].clusters, **sure)
    return Estimate(float(found.mean), float(found.low), float(found.high))


def table(cards: Sequence[Scorecard]) -> pd.DataFrame:
    """Return a table for reading: a row per measure, a column for the base and for each edit.

    Raises:
        ConfigError: there are no scorecards.
    """
    import pandas as pd

    found = record(cards)
    cells = [(r["measure"], r["base"], *r["edited"]) for r in found["rows"]]
    return pd.DataFrame(cells, columns=["measure", "base", *found["systems"]])


def record(cards: Sequence[Scorecard]) -> dict[str, Any]:
    """Return the same table in the types of JSON, with how each number is measured, as
    `scorecard.json` holds it.

    Raises:
        ConfigError: there are no scorecards.
    """
    if not cards:
        raise ConfigError("no scorecards to put into a table; at least one is needed")
    rows: list[dict[str, Any]] = []
    for name, (title, how) in MEASURES.items():
        base = cards[0].base.get(name, NAN)
        rows.append(
            {
                "measure": title if name in IN_NATS else f"{title}, %",
                "how": how,
                "base": "-" if np.isnan(base) else f"{100 * base:.1f}",
                "edited": [_spelled(name, c.numbers[name]) for c in cards],
            }
        )
    for title, cells in (
        ("parameters", [_counted(c.parameters) for c in cards]),
        ("training examples", [_counted(c.examples) for c in cards]),
        ("seconds of training", ["-" if c.seconds is None else f"{c.seconds:.1f}" for c in cards]),
    ):
        rows.append({"measure": title, "how": "", "base": "-", "edited": cells})
    return {"systems": [c.name for c in cards], "rows": rows}


def _spelled(name: str, e: Estimate) -> str:
    """Return a number as tables have it: divergences in nats, everything else in percent."""
    if np.isnan(e.value):
        return "-"
    if name not in IN_NATS:
        return percent(e)
    return f"{e.value:.3f}" + ("" if np.isnan(e.low) else f" [{e.low:.3f}, {e.high:.3f}]")


def _counted(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


__all__ = ["IMPLIED", "MEASURES", "Scorecard", "follows", "record", "scorecard", "table"]
