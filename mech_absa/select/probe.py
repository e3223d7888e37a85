"""Linear probes as a selector: where the label can be read off a state, and not off anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..errors import DataError
from ..sites import Site
from .evidence import Evidence, Selector

FOLDS = 5
"""Parts of the examples; each is predicted by a probe that was trained on the others."""


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy of a probe on examples it was not trained on.

    Attributes:
        accuracy: of the label.
        control: of the control task.
    """

    accuracy: float
    control: float

    @property
    def selectivity(self) -> float:
        """Return accuracy - control accuracy."""
        return self.accuracy - self.control


def control_labels(
    words: Sequence[str], labels: Int[np.ndarray, " example"], seed: int = 0
) -> Int[np.ndarray, " example"]:
    """Return a random label for every word, the same wherever the word stands.

    Source: Hewitt and Liang 2019 (arXiv 1909.03368), section 2. Labels are drawn with the frequencies
    of the real ones. A probe can only learn them by heart: they say how much a probe learns that
    the representation does not hold.

    Args:
        words: the aspect term of each example.
        labels: the real ones.
        seed: of the draw.

    >>> drawn = control_labels(["menu", "wine", "menu"], np.array([0, 1, 1]))
    >>> bool(drawn[0] == drawn[2])
    True
    """
    rng = np.random.default_rng(seed)
    of_word = {word: int(rng.choice(labels)) for word in sorted(set(words))}
    return np.array([of_word[word] for word in words])


def probe_accuracy(
    states: Float[np.ndarray, "example d"],
    labels: Int[np.ndarray, " example"],
    clusters: Sequence[str],
    folds: int = FOLDS,
) -> float:
    """Return the cross-validated accuracy of a linear probe; no sentence is on both sides.

    The probe is scikit-learn's logistic regression (L2, C = 1) on standardised states. A fold whose
    training part has one label only predicts that label.

    Args:
        states: of each example.
        labels: to read off them.
        clusters: the sentence of each example.
        folds: parts.

    Raises:
        DataError: fewer sentences than folds.
    """
    n = len(set(clusters))
    if n < folds:
        raise DataError(
            f"{n} sentences came to a probe with {folds} folds; at least {folds} are needed"
        )
    right = np.zeros(len(labels), dtype=bool)
    for train, test in GroupKFold(folds).split(states, labels, clusters):
        seen = np.unique(labels[train])
        if len(seen) == 1:
            right[test] = labels[test] == seen[0]
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        right[test] = probe.fit(states[train], labels[train]).predict(states[test]) == labels[test]
    return float(right.mean())


class LinearProbe(Selector):
    """selectivity = accuracy of a linear probe of `resid_post` at a role - accuracy on the control task.

    Source: Alain and Bengio 2016 (arXiv 1610.01644); control task and selectivity of Hewitt and Liang
    2019 (arXiv 1909.03368), with the aspect term as the word. A probe tells what can be read, not
    what the model uses.

    Args:
        folds: of the cross-validation.
    """

    name: ClassVar[str] = "probe"

    def __init__(self, folds: int = FOLDS):
        super().__init__()
        self.folds = folds

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        found = self.probe(evidence)
        self.about = {
            str(site): {"accuracy": p.accuracy, "control": p.control} for site, p in found.items()
        }
        return {site: p.selectivity for site, p in found.items()}

    def probe(self, evidence: Evidence) -> dict[Site, ProbeScore]:
        """Return both accuracies of every layer and role."""
        words = [e.aspect for e in evidence.examples]
        control = control_labels(words, evidence.gold, evidence.seed)
        found: dict[Site, ProbeScore] = {}
        for role, states in evidence.states.items():
            for layer in range(evidence.model.n_layers):
                real, random = (
                    probe_accuracy(states[layer], labels, evidence.clusters, self.folds)
                    for labels in (evidence.gold, control)
                )
                found[Site(layer, "resid_post", None, role)] = ProbeScore(real, random)
        return found


__all__ = ["LinearProbe", "ProbeScore", "control_labels", "probe_accuracy"]
