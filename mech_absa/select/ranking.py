"""Sites in order of importance, whichever way they were scored.

A `SiteRanking` is a sequence of (site, score), the best first, which is what `evaluate.faithfulness`
and `evaluate.prune` take. It also gives a score per layer, since edits are placed by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..errors import ConfigError
from ..sites import Site
from ..stats import Estimate, spearman_interval

Pool = Literal["max", "sum"]
"""How the scores of a layer's sites become the layer's score."""


@dataclass(frozen=True, eq=False)
class SiteRanking(Sequence[tuple[Site, float]]):
    """Sites with their scores, the best first; of equal scores, the one that was given first.

    Attributes:
        selector: name of what scored them.
        scored: (site, score), in order.
        n_layers: layers of the model.
        pool: how scores become those of layers.
        about: what else the selector found, for a record.

    Example:
        >>> scores = {Site(0, "mlp_out"): 1.0, Site(1, "mlp_out"): 3.0, Site(1, "attn_out"): 2.0}
        >>> ranking = SiteRanking.of("mine", scores, n_layers=2, pool="sum")
        >>> [str(site) for site in ranking.top(2)], ranking.layer_scores.tolist()
        (['L1.mlp_out', 'L1.attn_out'], [1.0, 5.0])
    """

    selector: str
    scored: tuple[tuple[Site, float], ...]
    n_layers: int
    pool: Pool = "max"
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        selector: str,
        scores: Mapping[Site, float],
        n_layers: int,
        pool: Pool = "max",
        about: Mapping[str, Any] | None = None,
    ) -> SiteRanking:
        """Return the ranking of some scores.

        Raises:
            ConfigError: there are none, or one is not a finite number.
        """
        if not scores:
            raise ConfigError(f"the selector {selector} scored no site; at least one is needed")
        for site, value in scores.items():
            if not math.isfinite(value):
                raise ConfigError(
                    f"the selector {selector} scored {site} with {value}; a finite number is needed"
                )
        ordered = sorted(scores.items(), key=lambda item: -item[1])
        return cls(selector, tuple(ordered), n_layers, pool, dict(about or {}))

    @overload
    def __getitem__(self, index: int) -> tuple[Site, float]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[Site, float], ...]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[Site, float] | tuple[tuple[Site, float], ...]:
        return self.scored[index]

    def __len__(self) -> int:
        return len(self.scored)

    def __iter__(self) -> Iterator[tuple[Site, float]]:
        return iter(self.scored)

    def __repr__(self) -> str:
        best = ", ".join(f"{site} {score:.3g}" for site, score in self.scored[:3])
        return f"SiteRanking({self.selector}: {len(self)} sites; {best})"

    def top(self, k: int) -> list[Site]:
        """Return the `k` best sites.

        Raises:
            ConfigError: there are fewer.
        """
        if not 1 <= k <= len(self):
            raise ConfigError(
                f"the {k} best sites of {self.selector} were asked for; accepted: 1 to {len(self)}"
            )
        return [site for site, _ in self.scored[:k]]

    @property
    def layer_scores(self) -> Float[np.ndarray, " layer"]:
        """Return a score per layer: the largest of its sites', or their sum; NaN without a site."""
        found = np.full(self.n_layers, np.nan)
        for site, score in self.scored:
            before = found[site.layer]
            if math.isnan(before):
                found[site.layer] = score
            elif self.pool == "sum":
                found[site.layer] = before + score
        return found

    def top_layers(self, k: int) -> tuple[int, ...]:
        """Return the `k` best layers in order of depth; of equal layers, the lower one is taken.

        Raises:
            ConfigError: fewer layers have a score.
        """
        scores = self.layer_scores
        known = [layer for layer in range(self.n_layers) if not math.isnan(scores[layer])]
        if not 1 <= k <= len(known):
            raise ConfigError(
                f"the {k} best layers of {self.selector} were asked for; "
                f"accepted: 1 to {len(known)}, as many as have a score"
            )
        return tuple(sorted(sorted(known, key=lambda layer: -scores[layer])[:k]))

    def agreement(self, other: SiteRanking, draws: int = 500) -> Estimate:
        """Return the rank correlation of two selectors' layer scores; see `stats.spearman_interval`."""
        return spearman_interval(self.layer_scores, other.layer_scores, draws=draws)

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per site: columns `selector, site, layer, score`, the best first."""
        rows = [(self.selector, str(s), s.layer, score) for s, score in self.scored]
        return pd.DataFrame(rows, columns=["selector", "site", "layer", "score"])


def layer_site(layer: int) -> Site:
    """Return the site that stands for a layer as a whole: its output."""
    return Site(layer, "resid_post")


__all__ = ["Pool", "SiteRanking", "layer_site"]
