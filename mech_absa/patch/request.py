"""Parse what a trace is asked for: words are parsed once, here, and travel on as enumerations.

`Request.parse` needs no model, so that a command can refuse a wrong word before it loads one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, SiteError, choices
from ..metrics import Metric, get_metric
from ..sites import Site
from ..words import Choice, shown

SWEPT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "q", "k", "v")
"""Kinds that can be swept; q, k and v by the loop and by estimates only."""
DEFAULT_SITES = ("resid_post", "attn_out", "mlp_out")
LEAST_MEMORY, MOST_MEMORY = 1 << 20, 1 << 50
"""Smallest and largest accepted budget in bytes."""


class Direction(Choice):
    """Name what is put where. In each direction, a positive effect means that the cell matters."""

    DENOISE = "denoise", "put clean states into the corrupted run; the effect is what comes back"
    NOISE = "noise", "put corrupted states into the clean run; the effect is what is lost"
    BOTH = "both", "both of these over shared runs; a column `direction` tells them apart"

    @property
    def sign(self) -> float:
        """Return the sign of metric(patched) - metric(base) in an effect."""
        return 1.0 if self is Direction.DENOISE else -1.0

    @property
    def single(self) -> tuple[Direction, ...]:
        """Return the directions that this word stands for."""
        return (Direction.DENOISE, Direction.NOISE) if self is Direction.BOTH else (self,)


class By(Choice):
    """Name what is patched together."""

    TOKEN = "token", "one token at a time"
    ROLE = "role", "all tokens of a role together, at a tenth of the cost"


class Method(Choice):
    """Name how effects are computed."""

    EXACT = "exact", "patch every cell"
    ATP = "atp", "attribution patching: the gradient at the base run (Nanda 2023)"
    ATPSTAR = "atpstar", "AtP with the next softmax taken exactly (Kramar et al. 2024)"
    IG = "ig", "integrated gradients over the path between the inputs (Sundararajan et al. 2017)"
    RELP = "relp", "AtP with the backward pass of layer-wise relevance (Jafari et al. 2025)"


class Engine(Choice):
    """Name how exact effects are computed."""

    WAVEFRONT = "wavefront", "all cells in one walk over the layers"
    LOOP = "loop", "one hooked forward pass per cell"


class Rule(Choice):
    """Rules of RelP: what the backward pass takes as constant. Values of the forward pass stay."""

    LN = "ln", "the scale of a norm"
    IDENTITY = "identity", "act(x) / x of an activation function"
    HALF = "half", "of a gated product, each factor in turn; both share the gradient equally"
    PATTERN = "pattern", "the attention pattern"


DEFAULT_RULES = (Rule.LN, Rule.IDENTITY, Rule.HALF)
"""The rules that the paper's code uses."""


@dataclass(frozen=True)
class Request:
    """A trace, apart from its model and pairs. Make it with `parse`.

    Attributes:
        sites: kinds of state, and single sites.
        layers: of the kinds; all where None.
        by: what is patched together.
        metric: what effects are differences of.
        direction: what is put where.
        window: layers restored together.
        method: exact, or an estimate.
        steps: of integrated gradients.
        rules: of RelP.
        exact_top: of an estimate, how many leading cells are computed exactly afterwards.
        engine: of exact effects.
        memory: bytes for activations in flight; by the device where None.
    """

    sites: tuple[str | Site, ...]
    layers: tuple[int, ...] | None
    by: By
    metric: Metric
    direction: Direction
    window: int
    method: Method
    steps: int
    rules: tuple[Rule, ...]
    exact_top: int
    engine: Engine
    memory: int | None

    @classmethod
    def parse(
        cls,
        sites: Sequence[str | Site] = DEFAULT_SITES,
        *,
        layers: Sequence[int] | None = None,
        by: str = "token",
        metric: str | Metric = "prob",
        direction: str = "denoise",
        window: int = 1,
        method: str = "exact",
        steps: int = 16,
        rules: Sequence[str] = DEFAULT_RULES,
        exact_top: int = 0,
        engine: str = "wavefront",
        memory: int | float | None = None,
        spans: Sequence[str] = (),
    ) -> Request:
        """Return a checked request; arguments as in `trace`, and the named spans of own prompts.

        Raises:
            ConfigError, SiteError: the first argument that is not accepted.

        Example:
            >>> request = Request.parse(("head",), by="role", metric="logit_diff")
            >>> request.by.sentence
            'all tokens of a role together, at a tenth of the cost'
            >>> Request.parse(direction="backwards")
            Traceback (most recent call last):
                ...
            mech_absa.errors.ConfigError: unknown direction 'backwards'; accepted: denoise, noise or both
        """
        way = Method.parse(method, "method")
        top = whole("exact_top", exact_top, least=0)
        if top and way is Method.EXACT:
            raise ConfigError("exact_top was given with method exact, which computes every cell")
        return cls(
            sites=parse_sites(sites, spans),
            layers=None if layers is None else tuple(whole("a layer", n, least=0) for n in layers),
            by=By.parse(by, "by"),
            metric=get_metric(metric),
            direction=Direction.parse(direction, "direction"),
            window=whole("window", window),
            method=way,
            steps=whole("steps", steps),
            rules=tuple(dict.fromkeys(Rule.parse(r, "rule") for r in rules)),
            exact_top=top,
            engine=Engine.parse(engine, "engine"),
            memory=None if memory is None else check_memory(memory),
        )


def parse_sites(sites: object, spans: Sequence[str] = ()) -> tuple[str | Site, ...]:
    """Return kinds as words and single sites as `Site`; `spans` are those of own prompts.

    Raises:
        SiteError: a word is neither a kind nor a site.
        ConfigError: there is none, or they come as one string.
    """
    if isinstance(sites, (str, Site)) or not isinstance(sites, Sequence):
        raise ConfigError(
            f"sites={shown(sites)} was given; accepted: a list of kinds or sites, such as ['head']"
        )
    if not sites:
        raise ConfigError("no sites were given; name at least one kind, such as resid_post")
    parsed: list[str | Site] = []
    for site in sites:
        if isinstance(site, str):
            parsed.append(Site.parse(site, spans) if "." in site else site)
        elif isinstance(site, Site):
            parsed.append(site)
        else:
            raise SiteError(f"{shown(site)} is no site; accepted: a Site, or a word like L5.head3")
        if isinstance(parsed[-1], str) and parsed[-1] not in SWEPT:
            raise SiteError(f"unknown kind of site {site!r}; accepted: {choices(SWEPT)}")
    return tuple(parsed)


def whole(name: str, value: object, least: int = 1) -> int:
    """Return a whole number.

    Raises:
        ConfigError: it is none, or too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < least:
        raise ConfigError(
            f"{name} {shown(value)} was given; it must be a whole number, {least} or more"
        )
    return int(value)


def check_memory(value: object) -> int:
    """Return a budget in bytes.

    Raises:
        ConfigError: it is no number between 1 MiB and 1 PiB.
    """
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not LEAST_MEMORY <= number <= MOST_MEMORY:  # NaN lies nowhere
        raise ConfigError(
            f"a budget of {shown(value)} bytes was given; it must lie between 1 MiB and 1 PiB"
        )
    return int(number)


__all__ = [
    "DEFAULT_RULES",
    "DEFAULT_SITES",
    "SWEPT",
    "By",
    "Direction",
    "Engine",
    "Method",
    "Request",
    "Rule",
    "check_memory",
]
