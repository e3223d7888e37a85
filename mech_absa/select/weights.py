"""Selectors of structured pruning: how much the loss would change without a head or an MLP.

With S = W o dL/dW for every weight of a structure (o is element by element):

    vector-wise       I_v = |sum S|
    element-wise      I_e = sum |S|
    second order      I_2 = sum W^2 o A,   A = mean over examples of (dL/dW)^2

(LLM-Pruner, Ma et al. 2023, arXiv 2305.11627.) L is the mean cross-entropy of the gold label among the
labels. A head is made of its columns of W_Q, W_K and W_V and its rows of W_O; a key/value head counts
for each query head that reads it. An MLP is made of all its matrices. Biases have no part.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..edits.base import Matrix, Shape
from ..edits.edit import Edit
from ..sites import Site
from ..train.prefix import PrefixCache
from ..train.presets import matrices, parts
from ..train.task import Task
from .evidence import Evidence, Selector
from .ranking import Pool

Gradients = Mapping[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, matrix) -> mean gradient and mean squared gradient of the loss."""

_KNOWN: weakref.WeakKeyDictionary[Evidence, Gradients] = weakref.WeakKeyDictionary()
"""Gradients of evidence that is still in use: four selectors read the same."""


@dataclass(frozen=True, eq=False)
class Structure:
    """The weights of a head or an MLP, a row per channel.

    Attributes:
        first: S of each weight.
        second: W^2 o A of each weight.
    """

    first: Float[Tensor, "channel weight"]
    second: Float[Tensor, "channel weight"]


def loss_gradients(evidence: Evidence) -> Gradients:
    """Return gradients of the loss at every matrix, one example at a time.

    The weights stay as they are: gradients are those of a difference D = 0 that is added to each.
    They are computed once for an evidence.
    """
    if evidence not in _KNOWN:
        _KNOWN[evidence] = _gradients(evidence)
    return _KNOWN[evidence]


def _gradients(evidence: Evidence) -> Gradients:
    model = evidence.model
    shape = Shape.of(model)
    places = matrices(range(model.n_layers), *shape.matrices)
    edit = Edit.fresh(model, parts("full", places, 1.0))
    deltas = [i.get_parameter("D") for i in edit]
    task = Task(model, "labels", evidence.template, evidence.verbalizer, PrefixCache(model, 0))
    first, second = ([torch.zeros_like(d) for d in deltas] for _ in range(2))
    items = task.prepare(evidence.examples)
    for item in items:
        for i, g in enumerate(torch.autograd.grad(task.loss(edit, [item]), deltas)):
            first[i] += g / len(items)
            second[i] += g**2 / len(items)
    keys = [(i.place.layer, i.place.name) for i in edit if isinstance(i.place, Matrix)]
    return dict(zip(keys, zip(first, second, strict=True), strict=True))


def structures(evidence: Evidence) -> Iterator[tuple[Site, Structure]]:
    """Yield every head and MLP with the importance of its weights."""
    model, shape = evidence.model, Shape.of(evidence.model)
    gradients = loss_gradients(evidence)

    def both(layer: int, name: str) -> tuple[Tensor, Tensor]:
        W, _ = Matrix(layer, name).weight(model)
        first, second = gradients[layer, name]
        return W.to(first) * first, W.to(second) ** 2 * second

    d, group = shape.d_head, shape.n_heads // shape.n_kv_heads
    for layer in range(shape.n_layers):
        attention = {name: both(layer, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        for head in range(shape.n_heads):
            own = slice(head * d, (head + 1) * d)
            shared = slice(head // group * d, (head // group + 1) * d)
            first, second = (
                torch.cat(
                    [
                        attention["W_Q"][order][:, own].T,
                        attention["W_K"][order][:, shared].T,
                        attention["W_V"][order][:, shared].T,
                        attention["W_O"][order][own],
                    ],
                    dim=1,
                )
                for order in (0, 1)
            )
            yield Site(layer, "head", head), Structure(first, second)
        if shape.d_mlp:
            into = [both(layer, name) for name in shape.matrices if name in ("W_in", "W_gate")]
            out = both(layer, "W_out")
            first, second = (
                torch.cat([*(m[order].T for m in into), out[order]], dim=1) for order in (0, 1)
            )
            yield Site(layer, "mlp_out"), Structure(first, second)


class Pruning(Selector):
    """A score of every head and MLP from the importance of its weights; a layer's is their sum."""

    pool: ClassVar[Pool] = "sum"

    @abstractmethod
    def score(self, structure: Structure) -> float:
        """Return the score of one structure."""

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        return {site: self.score(s) for site, s in structures(evidence)}


class TaylorFirst(Pruning):
    """I_e = sum |W o dL/dW| (LLM-Pruner's `param_first`, arXiv 2305.11627; SAAP, arXiv 2412.15127)."""

    name: ClassVar[str] = "taylor1"

    def score(self, structure: Structure) -> float:
        return float(structure.first.abs().sum())


class TaylorSecond(Pruning):
    """I_2 = sum W^2 o mean (dL/dW)^2 (LLM-Pruner's `param_second`, without its factor of 1/2)."""

    name: ClassVar[str] = "taylor2"

    def score(self, structure: Structure) -> float:
        return float(structure.second.sum())


class Fluctuation(Pruning):
    """Standard deviation over the channels of a structure of their sum |W o dL/dW|.

    SAAP (arXiv 2412.15127) ranks by the fluctuation of importance inside a group. No source gives
    its formula or constants; this is the plainest reading of the words.
    """

    name: ClassVar[str] = "fluctuation"

    def score(self, structure: Structure) -> float:
        return float(structure.first.abs().sum(1).std(unbiased=False))


class SAAP(Selector):
    """I = I_v / (2 s_v^2) + I_e / (2 s_e^2) + log(s_v s_e): importances fused by learned uncertainties.

    Source: SAAP, arXiv 2412.15127. The uncertainties that minimise the sum of I over all structures
    have s^2 = the mean importance of their kind, which is used here: the paper's training of them has
    no published code. The logarithm is the same for all structures.
    """

    name: ClassVar[str] = "saap"
    pool: ClassVar[Pool] = "sum"

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        found = list(structures(evidence))
        vector = torch.stack([s.first.sum().abs() for _, s in found])
        element = torch.stack([s.first.abs().sum() for _, s in found])
        fused = torch.zeros_like(vector)
        for importance in (vector, element):
            variance = importance.mean().clamp(min=torch.finfo(importance.dtype).tiny)
            fused += importance / (2 * variance) + 0.5 * variance.log()
        self.about = {
            "s_vector": float(vector.mean().sqrt()),
            "s_element": float(element.mean().sqrt()),
        }
        return {site: float(x) for (site, _), x in zip(found, fused, strict=True)}


__all__ = [
    "SAAP",
    "Fluctuation",
    "Pruning",
    "Structure",
    "TaylorFirst",
    "TaylorSecond",
    "loss_gradients",
    "structures",
]
