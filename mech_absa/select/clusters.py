"""Layers that represent alike, merged into clusters; the centre of each stands for the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..sites import Site
from .evidence import Evidence, Selector
from .ranking import layer_site


def linear_cka(x: Float[np.ndarray, "example a"], y: Float[np.ndarray, "example b"]) -> float:
    """Return linear CKA = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)), HSIC = tr(X X^T H Y Y^T H).

    H centres. Source: Kornblith et al. 2019 (arXiv 1905.00414). 1 for representations that differ by
    a rotation and a scale, 0 where one side is constant.

    >>> x = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])
    >>> round(linear_cka(x, 3 * x[:, ::-1]), 6)
    1.0
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(np.linalg.norm(x.T @ y) ** 2 / size) if size > 0 else 0.0


def cluster_layers(
    states: Float[np.ndarray, "layer example d"], clusters: int
) -> list[tuple[int, ...]]:
    """Return clusters of neighbouring layers.

    Every layer begins alone. The neighbouring clusters with the highest CKA between the last layer of
    the left and the first of the right are merged, until `clusters` are left (CRaSh, Zhang et al.
    2023, arXiv 2310.15477).

    Raises:
        ConfigError: more clusters than layers, or none.
    """
    n = len(states)
    if not 1 <= clusters <= n:
        raise ConfigError(f"{clusters} clusters of {n} layers were asked for; accepted: 1 to {n}")
    found: list[tuple[int, ...]] = [(layer,) for layer in range(n)]
    alike = [linear_cka(states[i], states[i + 1]) for i in range(n - 1)]
    while len(found) > clusters:
        # Only neighbours touch, so that the similarity across a border never changes.
        border = max(range(len(found) - 1), key=lambda i: alike[found[i][-1]])
        found[border : border + 2] = [found[border] + found[border + 1]]
    return found


MOST = 256
"""Examples whose states are compared; CRaSh takes 512."""


def clusters_of(
    model: Model, examples: Sequence[Example], clusters: int, seed: int = 0, **question: Any
) -> list[tuple[int, ...]]:
    """Return clusters of a model's layers by the CKA of their outputs at the last token of prompts.

    Args:
        model: what runs, unedited.
        examples: to ask about; at most 256 of them, drawn by seed.
        clusters: how many.
        seed: of the draw.
        question: `template` and `verbalizer`, as in `Evidence`.

    Raises:
        ConfigError: there are no examples, more clusters than layers, or none.

    Examples:
        >>> import mech_absa as ma
        >>> reviews = ma.load_examples("builtin:restaurant/train")[:16]
        >>> len(clusters_of(ma.load_model(), reviews, 3))
        3
    """
    chosen = list(examples)
    if len(chosen) > MOST:
        chosen = random.Random(seed).sample(chosen, MOST)
    return cluster_layers(Evidence(model, tuple(chosen), **question).states["answer"], clusters)


class CKAClusters(Selector):
    """1 for the centre of a cluster of neighbouring layers by CKA, 0 for the others.

    CRaSh (arXiv 2310.15477) keeps the layer at position n // 2 of a cluster of n. There are as many
    clusters as a place has layers. States are those of the last token of the prompt.
    """

    name: ClassVar[str] = "cka"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        clusters = cluster_layers(evidence.states["answer"], evidence.width)
        centres = {cluster[len(cluster) // 2] for cluster in clusters}
        self.about = {"clusters": [list(c) for c in clusters]}
        return {
            layer_site(layer): float(layer in centres) for layer in range(evidence.model.n_layers)
        }


__all__ = ["CKAClusters", "cluster_layers", "clusters_of", "linear_cka"]
