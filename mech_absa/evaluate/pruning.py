"""Measure how much of the task is left when the least important sites are removed for good.

`prune` replaces sites by their mean over the data (or by zero), the least important first, and
scores the answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..examples import Example
from ..model import Model
from ..model.hooks import capture, hooked_at
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..scoring import Applicable, question
from ..sites import Site
from ..stats import Estimate
from ..words import Choice
from .faithfulness import replacing
from .predictions import Predictions, asked_with, predict
from .ranking import RANDOM, Ranking, check_counts, in_order
from .scores import score

if TYPE_CHECKING:
    import pandas as pd


class StandIn(Choice):
    """Name what replaces a removed site."""

    MEAN = "mean", "The site's mean over the tokens of the reference examples."
    ZERO = "zero", "Zero, which is a strange value to most models."


class Ablation:
    """Replace sites by a fixed value, whatever they read. It is applied in the same way as an edit.

    Args:
        sites: what is ablated; a site without a token at all tokens.
        values: (layer, kind) -> `[d_model]`, or `[head d_head]` for kinds of heads; zero where
            None.
        edit: in force at the same time, below the ablation.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        values: dict[tuple[int, str], Tensor] | None = None,
        edit: Applicable | None = None,
    ):
        self.sites, self.values, self.edit = list(sites), values, edit

    @contextlib.contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[None]:
        masks = torch.zeros(len(self.sites), *tokens.ids.shape, dtype=torch.bool)
        for i, site in enumerate(self.sites):
            for row in range(len(tokens)):
                masks[
                    i, row, slice(None) if site.at is None else tokens.positions(site.at, row)
                ] = True
        keys = {(s.layer, s.kind) for s in self.sites}
        values = {key: torch.zeros(()) if self.values is None else self.values[key] for key in keys}
        below = (
            self.edit.applied(model, tokens) if self.edit is not None else contextlib.nullcontext()
        )
        with below, hooked_at(replacing(model, self.sites, range(len(self.sites)), masks, values)):
            yield


@torch.inference_mode()
def mean_activations(
    model: Model,
    prompts: Sequence[Tokens],
    sites: Sequence[Site],
    edit: Applicable | None = None,
    batch_size: int = 32,
) -> dict[tuple[int, str], Tensor]:
    """Return mean activations over all tokens of the prompts, by (layer, kind): `[d_model]`, or
    `[head d_head]` for kinds of heads.
    """
    points = {(s.layer, s.kind): s for s in sites}
    sums: dict[tuple[int, str], Tensor] = {}
    order = sorted(prompts, key=lambda t: t.lengths[0])
    for start in range(0, len(order), batch_size):
        tokens = Tokens.stack(order[start : start + batch_size])
        real = (tokens.roles >= 0).to(model.device)
        below = edit.applied(model, tokens) if edit is not None else contextlib.nullcontext()
        with (
            below,
            capture(model, points.values()) as seen,
        ):  # in this order, so that what is seen is what the edit leaves
            model.run_hooked(model.embed(tokens.ids))
        for key, site in points.items():
            total = seen[site][real.to(seen[site].device)].double().sum(0)
            sums[key] = sums[key] + total if key in sums else total
    n = sum(t.lengths[0] for t in order)
    return {key: total / n for key, total in sums.items()}


@dataclass(frozen=True, eq=False)
class PruningCurve:
    """Hold what is left of the task as the least important sites are removed.

    Attributes:
        how: `mean` or `zero`: what stands in for a removed site.
        removed: the sites, in the order of their removal.
        counts: how many were removed.
        accuracy, macro_f1: at each count, with their intervals.
        random: accuracy when random sites are removed, `[order count]`.
        majority: accuracy of the most frequent class.
    """

    how: StandIn
    removed: tuple[Site, ...] = field(repr=False)
    counts: tuple[int, ...]
    accuracy: tuple[Estimate, ...]
    macro_f1: tuple[Estimate, ...]
    random: Float[np.ndarray, "order count"]
    majority: float

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per count, for the ranking and for the mean of the random orders: `method,
        count, removed` (the share of the sites), `accuracy, macro_f1` with their intervals,
        `majority`.
        """
        import pandas as pd

        steps: dict[str, Any] = {
            "count": self.counts,
            "removed": [k / len(self.removed) for k in self.counts],
            "majority": self.majority,
        }
        own = {"method": "least important first"} | steps
        for name, estimates in (("accuracy", self.accuracy), ("macro_f1", self.macro_f1)):
            own |= {name: [e.value for e in estimates]}
            own |= {
                f"{name}_low": [e.low for e in estimates],
                f"{name}_high": [e.high for e in estimates],
            }
        chance = (
            [{"method": RANDOM, "accuracy": self.random.mean(0)} | steps]
            if len(self.random)
            else []
        )
        return pd.concat([pd.DataFrame(part) for part in (own, *chance)], ignore_index=True)

    def _repr_html_(self) -> str:
        html: str = self.to_pandas().to_html(index=False, float_format="{:.3f}".format)
        return html


def prune(
    model: Model,
    examples: Sequence[Example],
    ranking: Ranking,
    edit: Applicable | None = None,
    *,
    how: StandIn | str = StandIn.MEAN,
    reference: Sequence[Example] | None = None,
    counts: Sequence[int] | None = None,
    randoms: int = 3,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    batch_size: int = 32,
    level: float = 0.95,
    draws: int = 500,
    seed: int = 0,
) -> PruningCurve:
    """Score the answers with the least important sites removed.

    Args:
        ranking: usually all heads and all `mlp_out`.
        edit: in force throughout.
        how: `mean` puts in each site's mean over the tokens of `reference`; `zero` puts in zero,
            which is a strange value to most models.
        reference: examples the means are taken over; the examples themselves where None.
        counts: how many are removed; eleven steps from none to all where None.
        randoms: random orders, for comparison.

    Raises:
        ConfigError: an unknown way; counts beyond the sites.
        SiteError: the model lacks a site.
    """
    how = StandIn.parse(how, "stand-in")
    worst_first = in_order(ranking, model)[::-1]
    n = len(worst_first)
    ks = check_counts([round(n * i / 10) for i in range(11)] if counts is None else counts, n)
    own = asked_with(edit)
    template, verbalizer = template or own[0], verbalizer or own[1]
    values = None
    if how is StandIn.MEAN:
        seen = examples if reference is None else reference
        prompts = [question(model, e, template) for e in seen]
        values = mean_activations(model, prompts, worst_first, edit, batch_size)

    ask = partial(predict, template=template, verbalizer=verbalizer, batch_size=batch_size)

    def answers(order: Sequence[Site], k: int) -> Predictions:
        return ask(model, examples, Ablation(order[:k], values, edit), name=f"{k} removed")

    rng = np.random.default_rng(seed)
    orders = [[worst_first[i] for i in rng.permutation(n)] for _ in range(randoms)]
    by_chance = [[answers(order, k).correct.mean() for k in ks] for order in orders]
    scores = [score(answers(worst_first, k), level=level, draws=draws, seed=seed).all for k in ks]
    return PruningCurve(
        how=how,
        removed=tuple(worst_first),
        counts=ks,
        accuracy=tuple(s.accuracy for s in scores),
        macro_f1=tuple(s.macro_f1 for s in scores),
        random=np.array(by_chance).reshape(randoms, len(ks)),
        majority=scores[0].majority,
    )
