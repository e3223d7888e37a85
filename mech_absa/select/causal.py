"""Causal selectors: average indirect effects, exact and estimated.

With m the metric, and a cell of the clean run put into the corrupted one (`denoise`), the score of a
site is the mean over pairs of m(patched) - m(corrupted) (Meng et al. 2022, arXiv 2202.05262). In the
direction `noise` it is the mean of m(clean) - m(patched). `atp`, `atpstar`, `relp` and `ig` estimate
the same from gradients; `patch.gradients` has their formulas.

The metric is the difference of two label scores by default: the probability of a label saturates,
and estimates of it are small everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ..patch.plan import changed_roles
from ..patch.selection import CONTROL
from ..patch.trace import trace
from ..patch.traced import cell_site
from ..sites import Site
from .evidence import Evidence, Selector


class Effect(Selector):
    """mean over pairs of m(patched) - m(unpatched), signed so that it is large where a site matters.

    Source: Meng et al. 2022 (arXiv 2202.05262), section 2.1; estimates: Nanda 2023 (AtP), Kramár et
    al. 2024 (arXiv 2403.00745, AtP*), Rezaei Jafari et al. 2025 (arXiv 2508.21258, RelP),
    Sundararajan et al. 2017 (arXiv 1703.01365, IG).

    The control role, `answer`, and roles whose tokens the corrupted text changes are left out, as in
    `patch.selection`. A role that no pair has has no score.

    Args:
        kinds: of state; those of the class where None.
        metric: as in `trace`.

    Attributes:
        kinds: of state.
        direction: `denoise` or `noise`.
        method: `exact`, `atp`, `atpstar`, `relp` or `ig`.
    """

    name: ClassVar[str] = "effect"
    kinds: ClassVar[tuple[str, ...]] = ("resid_post",)
    direction: ClassVar[str] = "denoise"
    method: ClassVar[str] = "exact"

    def __init__(self, kinds: Sequence[str] | None = None, metric: str = "logit_diff"):
        super().__init__()
        self.swept = tuple(kinds or self.kinds)
        self.metric = metric

    def scores(self, evidence: Evidence) -> dict[Site, float]:
        pairs = evidence.pairs
        effects = trace(
            evidence.model,
            pairs,
            self.swept,
            by="role",
            metric=self.metric,
            direction=self.direction,
            method=self.method,
            check=False,
            progress=False,
        )
        values, cells = effects.matrix("role")
        left_out = {CONTROL, "answer", *changed_roles(pairs)}
        self.about = {"pairs": len(pairs), "left_out": sorted(left_out), "metric": self.metric}
        means = np.nanmean(values, axis=0)
        return {
            cell_site(row.kind, row.layer, row.head, row.role): float(mean)
            for row, mean in zip(cells.itertuples(index=False), means, strict=True)
            if row.role not in left_out
        }


class Exact(Effect):
    """AIE = mean of m(corrupted; site <- clean) - m(corrupted), every cell patched (Meng et al. 2022)."""

    name: ClassVar[str] = "exact"


class ExactNoise(Effect):
    """mean of m(clean) - m(clean; site <- corrupted), every cell patched: what is lost without a site."""

    name: ClassVar[str] = "exact_noise"
    direction: ClassVar[str] = "noise"


class Writes(Effect):
    """AIE of `attn_out` and `mlp_out`: which layer writes what the answer needs, not where it is carried."""

    name: ClassVar[str] = "writes"
    kinds: ClassVar[tuple[str, ...]] = ("attn_out", "mlp_out")


class AtP(Effect):
    """(clean - corrupted) . dm/dh at the corrupted run (Nanda 2023, attribution patching)."""

    name: ClassVar[str] = "atp"
    method: ClassVar[str] = "atp"


class AtPStar(Effect):
    """AtP with the softmax of the next attention taken exactly (Kramár et al. 2024, arXiv 2403.00745)."""

    name: ClassVar[str] = "atpstar"
    method: ClassVar[str] = "atpstar"


class RelP(Effect):
    """AtP with the backward pass of relevance propagation (arXiv 2508.21258)."""

    name: ClassVar[str] = "relp"
    method: ClassVar[str] = "relp"


class IG(Effect):
    """(clean - corrupted) . mean of dm/dh on the straight path of inputs (arXiv 1703.01365)."""

    name: ClassVar[str] = "ig"
    method: ClassVar[str] = "ig"


__all__ = ["IG", "AtP", "AtPStar", "Effect", "Exact", "ExactNoise", "RelP", "Writes"]
