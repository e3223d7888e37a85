"""Print what to know before a sweep: what is traced, whether the model can do the task, and what
the result can show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..examples import Examples
from ..own import PromptPairs
from ..patch.pairs import CLEAN_WRONG, FILTERED, Pairs
from ..patch.plan import Plan
from ..stats import resolution
from . import machine

LEAST_MASS = 0.05
"""Share of probability on the label words below which the metric `prob` measures little."""
LEAST_TOTAL = 0.01
"""Mean change of P(right label) between the runs below which effects of `prob` are tiny."""


def account(pairs: Pairs) -> dict[str, float | int | None]:
    """Return what pairs say of the model: sentences, clean accuracy, probability on the labels, total effect.

    Accuracy is over all examples whose clean run was scored, kept or dropped.
    """
    clean = [(p.gold, p.clean_scores.exp().numpy()) for p in pairs if p.clean_scores is not None]
    wrong = sum(int(q.argmax()) != gold for gold, q in clean)
    judged = len(pairs) + sum(pairs.dropped.get(reason, 0) for reason in FILTERED)
    wrong += pairs.dropped.get(CLEAN_WRONG, 0)
    corrupted = [
        float(p.corrupted_scores.exp()[:, p.gold].mean())
        for p in pairs
        if p.corrupted_scores is not None
    ]
    total = None
    if len(corrupted) == len(pairs) and clean:
        total = float(np.mean(np.array([float(q[gold]) for gold, q in clean]) - corrupted))
    return {
        "sentences": pairs.sentences,
        "clean_accuracy": (judged - wrong) / judged if judged else None,
        "label_mass": float(np.mean([float(q.sum()) for _, q in clean])) if clean else None,
        "total_effect_of_probability": total,
    }


def lines(p: Plan, direction: str, adjustment: str) -> Iterator[str]:
    """Yield the lines that are printed before the sweep."""
    known = account(p.pairs)
    yield (
        f"{len(p.pairs)} pairs kept of {p.pairs.considered}, of {known['sentences']} sentences"
        + "".join(f"; {n} dropped: {reason}" for reason, n in p.pairs.dropped.items())
    )
    if known["clean_accuracy"] is not None and known["label_mass"] is not None:
        yield (
            f"clean accuracy {known['clean_accuracy']:.1%}; the label words hold {known['label_mass']:.3g} of the probability"
        )
    e = p.estimate()
    yield (
        f"{e['cells']:,} cells by {e['engine']} in {e['batches']} batches; activations in flight up to {p.memory / 2**20:,.0f} MiB, "
        f"{e['pair_bytes'] / 2**20:,.1f} MiB per pair of {e['longest_prompt']} tokens"
    )
    cells = len(p.components) * len({r for q in p.pairs for r in q.clean.role_names})
    yield f"resolution: {resolution(p.pairs.sentences, cells, adjustment)}"
    if p.request.direction != direction:
        yield "an ablation has no corrupted run to restore: its states are put into the clean run (direction noise)"
    if p.why_loop is not None:
        yield f"the plain loop runs instead of the wavefront: {p.why_loop}"


def warnings(p: Plan, examples: Examples | PromptPairs) -> list[str]:
    """Return what a reader of the result should know, a sentence each."""
    known: dict[str, Any] = account(p.pairs)
    notes = []
    accuracy, majority = known["clean_accuracy"], _majority(examples)
    if accuracy is not None and accuracy <= majority:
        notes.append(
            f"the model answers {accuracy:.1%} of the examples, no more than always answering the most frequent label ({majority:.1%}): "
            "the map shows little of how the task is done"
        )
    mass, total = known["label_mass"], known["total_effect_of_probability"]
    if p.request.metric.name == "prob" and mass is not None and mass < LEAST_MASS:
        notes.append(
            f"the label words hold {mass:.2g} of the probability, so that effects on prob are tiny; --metric logit_diff or prob_label helps"
        )
    elif p.request.metric.name == "prob" and total is not None and abs(total) < LEAST_TOTAL:
        notes.append(
            f"the corruption changes P(right label) by {total:.2g} on average; --metric logit_diff, or a stronger corruption, shows more"
        )
    if tests := [s for s in examples.source.split(" + ") if re.search(r"(/|[_:.-])test\b", s)]:
        notes.append(
            f"sites are chosen on {tests[0]}, which is named test data: score edits at these sites on other rows"
        )
    return notes


def of_the_map(about: Mapping[str, Any]) -> list[str]:
    """Return what weakens the p-values of a map, a sentence each.

    Args:
        about: of an `ImportanceMap`.
    """
    cells, of = about.get("skewed_cells") or 0, about.get("tested_cells") or 0
    if not cells or about.get("adjustment") == "bootstrap":
        return []
    return [
        f"{cells} of {of} cells have skewed effects; sign-flip p-values of such cells are too small too often, so read their "
        "intervals and single pairs, or take --adjustment bootstrap"
    ]


def of_the_machine() -> list[str]:
    """Return what slows this machine down now, a sentence each."""
    crowded = machine.crowded()
    return [] if crowded is None else [crowded]


def _majority(examples: Examples | PromptPairs) -> float:
    if isinstance(examples, PromptPairs):
        return 0.5  # answer or foil
    counts = examples.counts()
    return max(counts.values()) / max(1, sum(counts.values()))
