"""Order sites by score: lists of (site, score) from tracing, from gradients, or made by hand.

`faithfulness` and `pruning` take such a list and nothing else, so that all rankings are measured
alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigError
from ..model import Model
from ..sites import Site

Ranking = Sequence[tuple[Site, float]]

RANDOM = "random order"
"""Name of the control in tables."""


def in_order(ranking: Ranking, model: Model, magnitude: bool = False) -> list[Site]:
    """Return the sites, most important first; equal scores keep their order in `ranking`.

    Args:
        magnitude: rank by |score|, which puts sites that work against the answer first as well.

    Raises:
        ConfigError: no sites, a site twice, or a score that is not a number.
        SiteError: the model lacks a site.
    """
    sites = [model.check_site(site) for site, _ in ranking]
    if not sites:
        raise ConfigError("the ranking holds no sites; at least one is needed")
    if len(set(sites)) < len(sites):
        repeated = next(s for i, s in enumerate(sites) if s in sites[:i])
        raise ConfigError(f"the ranking holds {repeated} more than once; each site once is needed")
    if unscored := [s for s, value in ranking if math.isnan(value)]:
        raise ConfigError(f"the score of {unscored[0]} is not a number")
    weight = [abs(value) if magnitude else value for _, value in ranking]
    return [sites[i] for i in sorted(range(len(sites)), key=lambda i: -weight[i])]


def check_counts(counts: Sequence[int], n: int) -> tuple[int, ...]:
    """Return `counts` sorted and without repetitions.

    Raises:
        ConfigError: no counts, or counts outside 0 to `n`.
    """
    chosen = tuple(sorted(set(counts)))
    if not chosen or chosen[0] < 0 or chosen[-1] > n:
        raise ConfigError(f"counts {chosen} of {n} sites were asked for; accepted: 0 to {n}")
    return chosen
