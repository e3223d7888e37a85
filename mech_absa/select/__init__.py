"""Selectors: ways to say where a model should be edited, with one interface.

    evidence = Evidence(adapted, train[:120], base=model)
    ranking = selector("lens")(evidence)
    ranking.top(5), ranking.top_layers(2)

| module | scores sites by |
|---|---|
| `causal` | average indirect effects, exact and estimated from gradients |
| `critical` | saliency of attention through a state, as CRFT finds critical positions |
| `joint_mask` | a mask over heads and MLPs, trained on all of them together |
| `lens` | accuracy of the unembedding at each layer |
| `probe` | selectivity of linear probes |
| `weight_patch` | what adapted weights of a module do in the base model, and back |
| `weights` | Taylor importance of heads and MLPs, as in structured pruning |
| `clusters` | whether a layer is the centre of layers that represent alike |
| `learned` | gates and scales of heads that were trained |
| `fixed` | position alone: `first`, `middle`, `last`, `random` |

`search` finds the largest cells under a budget of exact work; `trainings` and `compared` ask whether an
edit is better where a selector says than at random places.
"""

from collections.abc import Callable

from ..errors import ConfigError, choices
from .causal import IG, AtP, AtPStar, Effect, Exact, ExactNoise, RelP, Writes
from .clusters import CKAClusters
from .critical import CriticalStates
from .evidence import Evidence, Selector
from .fixed import First, Last, Middle, Random
from .joint_mask import JointMask
from .learned import JoLA, LoFiTScales
from .lens import LensAccuracy
from .probe import LinearProbe
from .ranking import SiteRanking
from .search import Search, search_cells
from .weight_patch import WeightPatching, WeightPatchingBack, WeightPatchingGradient
from .weights import SAAP, Fluctuation, TaylorFirst, TaylorSecond

SELECTORS: dict[str, Callable[[], Selector]] = {
    s.name: s
    for s in (
        Exact,
        ExactNoise,
        Writes,
        AtP,
        AtPStar,
        RelP,
        IG,
        CriticalStates,
        JointMask,
        LensAccuracy,
        LinearProbe,
        WeightPatching,
        WeightPatchingBack,
        WeightPatchingGradient,
        TaylorFirst,
        TaylorSecond,
        SAAP,
        Fluctuation,
        CKAClusters,
        JoLA,
        LoFiTScales,
        Middle,
        First,
        Last,
        Random,
    )
}
"""Name -> selector with its usual settings."""


def selector(name: str) -> Selector:
    """Return the selector of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SELECTORS:
        raise ConfigError(f"unknown selector {name!r}; accepted: {choices(SELECTORS)}")
    return SELECTORS[name]()


__all__ = [
    "SELECTORS",
    "Effect",
    "Evidence",
    "Search",
    "Selector",
    "SiteRanking",
    "search_cells",
    "selector",
]
