"""List what to know about the data before trusting a score, for the screen, the run record and the
report.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import choices
from ..examples import Example, Examples, Polarity, class_counts, leakage


def caveats(
    train: Sequence[Example] | None, others: Sequence[Examples], name: str = ""
) -> list[str]:
    """Return sentences about missing classes and about test rows that were trained on.

    Args:
        train: what was trained on; None where that is not known.
        others: what is scored, or chosen on.
        name: of what was trained on, where there are several.
    """
    said = []
    name = f"{name}: " if name else ""
    learnt = class_counts(train) if train is not None else None
    if (
        train is not None
        and learnt is not None
        and (empty := [c for c, n in learnt.items() if not n])
    ):
        said.append(
            f"{name}no {choices(empty)} example among the {len(train)} to train on ({_counts(learnt)}): the edit cannot learn to answer that"
        )
    for other in others:
        own = other.counts()
        if empty := [c for c, n in own.items() if not n]:
            said.append(
                f"no {choices(empty)} example among the {len(other)} of {other.source} ({_counts(own)}): macro-F1 is over the other classes"
            )
        if train is None or learnt is None:
            continue
        for polarity in Polarity:
            if own[polarity.value] and not learnt[polarity.value]:
                said.append(
                    f"{name}{own[polarity.value]} of {len(other)} rows of {other.source} are {polarity.value}, and no training example is"
                )
        leak = leakage(train, other)
        if leak.rows:
            which = (
                f"all {leak.total}"
                if len(leak.rows) == leak.total
                else f"{len(leak.rows)} of {leak.total}"
            )
            said.append(
                f"{name}{which} rows of {other.source} stand in the training data ({100 * leak.share:.1f} %; {leak.same_label} with the same label): "
                "a score on them says little"
            )
    return said


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {c}" for c, n in counts.items())
