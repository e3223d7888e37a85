"""Choose sites from a map by a rule that is written down before looking.

The rule: of all windows of neighbouring layers and all roles, take the largest mean effect that stands
out. It is `clear` only if all of these hold:

* its interval lies above 0 and above the interval of the control in the same layers;
* over all candidates together, one-sided max-T tests by sentence find it above 0 and above the control,
  each at (1 - level) / 2, the tail that the interval leaves on its lower side;
* no cell of the window is zero for certain, as in the last layer of a token that the answer cannot read.

The control is `template`: tokens that every prompt shares and that name neither aspect nor opinion. It has
the size of the role. In a sweep by token, effects are averaged over the tokens of a role, so that both have
the size of one token. In a sweep by role, a role of n tokens is compared with n tokens of the template,
restored together and drawn by pair (`patch.job.control_spans`). Runs of earlier versions have no such
controls: there all template tokens together are the control, which is a higher bar for short roles.
`Selection.rule` says which control was used. Template tokens are taken, and not random tokens of any role, because the
latter hit the aspect and the opinion by chance, and would count real effects as control.

In simulated maps without any effect, sites are clear in at most 5 % of 1,000 maps in every case of
`benchmarks/selection.py`, skewed effects and a control below 0 included. The tests assume effects that are
symmetric about 0 where nothing is there; for skewed effects this is a measurement, not a guarantee.

Two kinds of role are left out of the choice by default: `answer`, since late layers of the last token carry
every decision of every model; and roles whose own tokens the corrupted text changes, since restoring their
early states only undoes the change.

A chosen site is the largest of many, so its own interval is too optimistic. `honest` is the effect of
sites chosen on the other half of the sentences; `stability` is the mean Jaccard index between the chosen
sites and those chosen on bootstrap samples of the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from jaxtyping import Bool, Float

from ..errors import ConfigError, DataError, choices
from ..records import plain, write_json
from ..sites import HEAD_KINDS, ROLES, Site, in_reading_order, spans_of
from ..stats import FEW, Estimate, cell_tests, cluster_bootstrap

if TYPE_CHECKING:
    from .importance import ImportanceMap

CONTROL = "template"
PAPER_SHARE = 6 / 32
"""The paper edits 6 of 32 layers."""
RESAMPLES = 200
"""Bootstrap samples for the stability of a choice."""


@dataclass(frozen=True)
class Selection(Sequence[Site]):
    """Sites chosen from a map, and how far to trust them.

    Attributes:
        sites: in order of layers.
        rule: in words.
        aie, ci_low, ci_high, n: of the chosen window and role; n counts pairs.
        control_high: upper end of the control's interval in the same layers.
        clear: whether the effect stands out, see the module's rule.
        sentences: independent units behind the numbers.
        p: of the chosen window against 0 and against the control, over all candidates.
        stability: mean Jaccard index with the sites of bootstrap samples; 1 is always the same.
        honest: effect of sites chosen on the other half of the sentences, with its interval.
        warnings: sentences to print beside the choice.
        importance: the map that they were chosen from, which a notebook shows; not written to files.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> effects = ma.trace(model, pairs, sites=("resid_post",))
        >>> selection = effects.importance(by="role").select()
        >>> all(isinstance(site, ma.Site) for site in selection)
        True
    """

    sites: tuple[Site, ...]
    rule: str
    aie: float
    ci_low: float
    ci_high: float
    control_high: float
    n: int
    clear: bool
    sentences: int = 0
    p: float = math.nan
    stability: float = math.nan
    honest: Estimate | None = None
    warnings: tuple[str, ...] = ()
    importance: ImportanceMap | None = field(default=None, repr=False, compare=False)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.sites[index]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __str__(self) -> str:
        interval = f"{self.aie:.4g} [{self.ci_low:.4g}, {self.ci_high:.4g}]"
        parts = [f"{', '.join(map(str, self.sites))}: mean effect {interval}, n = {self.n}"]
        if self.sentences:
            parts[0] += f" pairs of {self.sentences} sentences"
        if self.honest is not None and not math.isnan(self.honest.value):
            h = self.honest
            parts.append(f"on sentences not chosen on {h.value:.4g} [{h.low:.4g}, {h.high:.4g}]")
        if not math.isnan(self.stability):
            parts.append(f"stability {self.stability:.2f}")
        if not self.clear:
            parts.append("not clear: nothing stands out from 0 and from the control")
        return "; ".join([*parts, *self.warnings])

    def _repr_html_(self) -> str:
        from ..report import selection_html

        return selection_html(self)

    def save(self, path: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """Write `sites.json`, with the model the sites were found in where it is known.

        Args:
            path: of the file.
            model: from `traced_in`.
        """
        record = plain(replace(self, importance=None))
        del record["importance"]
        record["sites"] = [str(s) for s in self.sites]
        if spans := spans_of(str(s.at) for s in self.sites if s.at is not None):
            record["spans"] = spans
        write_json(path, record | ({"model": dict(model)} if model is not None else {}))


# ---- the rule ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Candidates:
    """Every window and role of one kind, with the pairs' effects.

    Attributes:
        spots: role and layers of each candidate.
        effect: `[pair spot]`, NaN where a pair lacks the role.
        control: `[pair spot]`, the control in the same layers; NaN without one.
        clusters: the sentence of each pair.
    """

    spots: tuple[tuple[str, tuple[int, ...]], ...]
    effect: Float[np.ndarray, "pair spot"]
    control: Float[np.ndarray, "pair spot"]
    clusters: np.ndarray

    def of_pairs(self, rows: np.ndarray) -> Candidates:
        """Return the candidates on some pairs only."""
        return replace(
            self,
            effect=self.effect[rows],
            control=self.control[rows],
            clusters=self.clusters[rows],
        )

    def largest(self, weights: Float[np.ndarray, " pair"] | None = None) -> int:
        """Return the spot with the largest mean effect, among those above 0 and the control if any.

        Args:
            weights: how often each pair counts; once where None.
        """
        mean, control = _means(self.effect, weights), _means(self.control, weights)
        eligible = mean > np.maximum(0.0, np.nan_to_num(control))
        ranked = np.where(eligible if eligible.any() else ~np.isnan(mean), mean, -np.inf)
        return int(np.argmax(ranked))


def _means(
    values: Float[np.ndarray, "pair spot"], weights: Float[np.ndarray, " pair"] | None
) -> Float[np.ndarray, " spot"]:
    w = np.ones(len(values)) if weights is None else weights
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = (w @ np.nan_to_num(values)) / (w @ ~np.isnan(values))
    return mean


def select(
    importance: ImportanceMap,
    kind: str | None = None,
    *,
    width: int | None = None,
    roles: Sequence[str] | None = None,
    control: str = CONTROL,
    draws: int = 2000,
    seed: int = 0,
) -> Selection:
    """Choose the window of neighbouring layers and the role with the largest effect that stands out.

    Args:
        importance: a map by role.
        kind: of state; default `resid_post` (the paper's) where the map has it, else its first.
        width: layers in the window; default the paper's share of the depth, 6 of 32.
        roles: to choose from; default all but the control, `answer`, and roles whose tokens the corrupted
            text changes.
        control: the role whose tokens are the control.
        draws, seed: of the bootstrap and the tests.

    Returns:
        the sites and how far to trust them. Where nothing is clear, the largest is given all the same.

    Raises:
        ConfigError: the map lacks what is asked for.
        DataError: no role is left to choose from.
    """
    kind, layers, width = _checked(importance, kind, width)
    rows = importance.table[importance.table["kind"] == kind]
    present = in_reading_order(rows["role"])
    left_out = {control} if roles else {control, "answer", *importance.changed_roles}
    wanted = [r for r in (roles or present) if r in present and r not in left_out]
    named = [r for r in present if r not in ROLES]
    if named and not roles and not rows["aie"][rows["role"].isin(wanted)].any():
        # Own prompts often differ in the very spans that they name: then these are what there is.
        wanted, left_out = named, left_out - set(named)
    if not wanted:
        raise DataError(f"no role is left to choose from; the map has {choices(present)}")
    windows = [tuple(layers[i : i + width]) for i in range(len(layers) - width + 1)]
    candidates = _candidates(importance, kind, windows, wanted, control)
    level = float(importance.about.get("level") or 0.95)
    interval = partial(cluster_bootstrap, level=level, draws=draws, seed=seed)
    effect = interval(candidates.effect, candidates.clusters)
    above = interval(candidates.control, candidates.clusters)
    p = _family_p(candidates, seed)
    clear = (effect.low > np.maximum(0.0, np.nan_to_num(above.high))) & (p <= (1 - level) / 2)
    best = candidates.largest()
    if clear.any():
        best = int(np.argmax(np.where(clear, effect.mean, -np.inf)))
    role, window = candidates.spots[best]
    chosen = Selection(
        tuple(Site(layer, kind, None, role) for layer in window),
        _rule(importance, kind, width, control, left_out - {control}, level),
        float(effect.mean[best]),
        float(effect.low[best]),
        float(effect.high[best]),
        float(above.high[best]),
        int((~np.isnan(candidates.effect[:, best])).sum()),
        bool(clear[best]),
        len(np.unique(candidates.clusters)),
        float(p[best]),
        _stability(candidates, best, seed),
        _honest(candidates, level, draws, seed),
    )
    warnings = tuple(_warnings(chosen, candidates, level))
    return replace(chosen, warnings=warnings, importance=importance)


def _checked(
    importance: ImportanceMap, kind: str | None, width: int | None
) -> tuple[str, list[int], int]:
    """Return kind, layers and width, checked against the map."""
    if not len(importance.values):
        raise DataError(
            "this map was loaded without the effects of its pairs; sites are chosen from a whole run's folder"
        )
    kinds = list(importance.table["kind"].unique())
    kind = kind or ("resid_post" if "resid_post" in kinds else kinds[0])
    if kind not in kinds:
        raise ConfigError(f"sites of kind {kind!r} were asked for; the map has {choices(kinds)}")
    if kind in HEAD_KINDS:
        raise ConfigError(
            "neighbouring layers share no heads; select heads from ImportanceMap.top instead"
        )
    if "role" not in importance.table:
        raise ConfigError("sites are chosen by role; make the map with by='role'")
    rows = importance.table[importance.table["kind"] == kind]
    layers = sorted(int(x) for x in rows["layer"].unique())
    width = max(1, round(len(layers) * PAPER_SHARE)) if width is None else width
    if not 1 <= width <= len(layers):
        raise ConfigError(f"a window of {width} layers was asked for; the map has {len(layers)}")
    return kind, layers, width


def _candidates(
    importance: ImportanceMap,
    kind: str,
    windows: Sequence[tuple[int, ...]],
    roles: Sequence[str],
    control: str,
) -> Candidates:
    """Collect windows and roles; those with a cell that is zero for certain are no candidates."""
    spots, effects, controls = [], [], []
    for window in windows:
        for role in roles:
            effect = importance.window(kind, role, window)
            if not _possible(effect):
                continue
            spots.append((role, window))
            effects.append(effect.mean(axis=1))
            controls.append(importance.control(kind, window, control, role))
    if not spots:
        raise DataError(
            f"every {kind} effect of the roles {choices(roles)} is exactly 0; there is nothing to choose"
        )
    return Candidates(
        tuple(spots), np.stack(effects, axis=1), np.stack(controls, axis=1), importance.clusters
    )


def _possible(effect: Float[np.ndarray, "pair layer"]) -> bool:
    """Return whether every layer of a window has an effect other than 0 in some pair."""
    return bool((np.nan_to_num(effect) != 0).any(axis=0).all())


def _family_p(candidates: Candidates, seed: int) -> Float[np.ndarray, " spot"]:
    """Return the larger of two max-T p-values per candidate: against 0, and against the control."""
    sentences = candidates.clusters
    p = cell_tests(candidates.effect, sentences, one_sided=True, seed=seed).adjusted
    difference = candidates.effect - candidates.control
    if np.isnan(difference).all():
        return p
    above = cell_tests(difference, sentences, one_sided=True, seed=seed).adjusted
    larger: np.ndarray = np.maximum(np.nan_to_num(p, nan=1.0), np.nan_to_num(above, nan=1.0))
    return larger


def _stability(candidates: Candidates, best: int, seed: int) -> float:
    """Return the mean Jaccard index of the chosen sites with those of bootstrap samples of sentences."""
    labels = np.unique(candidates.clusters, return_inverse=True)[1]
    k = int(labels.max()) + 1
    rng = np.random.default_rng(seed)
    chosen = _sites_of(candidates.spots[best])
    shares = []
    for _ in range(RESAMPLES):
        weights = rng.multinomial(k, np.full(k, 1 / k)).astype(float)[labels]
        other = _sites_of(candidates.spots[candidates.largest(weights)])
        shares.append(len(chosen & other) / len(chosen | other))
    return float(np.mean(shares))


def _sites_of(spot: tuple[str, tuple[int, ...]]) -> set[tuple[str, int]]:
    role, window = spot
    return {(role, layer) for layer in window}


def _honest(candidates: Candidates, level: float, draws: int, seed: int) -> Estimate:
    """Return the effect of sites chosen on the other half of the sentences, over all pairs."""
    labels = np.unique(candidates.clusters, return_inverse=True)[1]
    k = int(labels.max()) + 1
    if k < 4:
        return Estimate(math.nan, math.nan, math.nan)
    first = np.random.default_rng(seed).permutation(k)[: k // 2]
    half: Bool[np.ndarray, " pair"] = np.isin(labels, first)
    values = np.full(len(labels), np.nan)
    for mine, others in ((half, ~half), (~half, half)):
        spot = candidates.of_pairs(others).largest()
        values[mine] = candidates.effect[mine, spot]
    interval = cluster_bootstrap(values, candidates.clusters, level=level, draws=draws, seed=seed)
    return Estimate(float(interval.mean), float(interval.low), float(interval.high))


def _warnings(chosen: Selection, candidates: Candidates, level: float) -> Iterator[str]:
    if chosen.sentences < FEW:
        yield (
            f"only {chosen.sentences} sentences: intervals are too narrow and the choice may change "
            "with other sentences"
        )
    if 2.0**-chosen.sentences > (1 - level) / 2:
        yield f"{chosen.sentences} sentences can never be clear"
    if np.isnan(candidates.control).all():
        yield "the map has no control role"


def _control_in_words(importance: ImportanceMap, control: str) -> str:
    """Return which tokens the control is."""
    if control == CONTROL and importance.controls is not None:
        return f"as many tokens of the role {control!r}, drawn by pair"
    traced_by = importance.about.get("traced_by")
    each = {"token": "one token at a time", "role": "all its tokens together"}.get(str(traced_by))
    return f"the role {control!r}" + (f", {each}" if each else "")


def _effect_in_words(importance: ImportanceMap) -> str:
    """Return which effect is compared, where a run has two."""
    about = importance.about
    rule = about.get("rule") or ("mean" if about.get("direction") == "both" else None)
    if rule is None:
        return "effect"
    names = {"mean": "mean of PIE and TIE", "pie": "PIE, denoise", "tie": "TIE, noise"}
    return f"effect ({names[str(rule)]})"


def _rule(
    importance: ImportanceMap, kind: str, width: int, control: str, left_out: set[str], level: float
) -> str:
    """Return how sites are chosen, in a sentence."""
    layers = "layer" if width == 1 else f"{width} neighbouring layers"
    others = f", {', '.join(in_reading_order(left_out))} left out" if left_out else ""
    return (
        f"the {layers} and the role with the largest mean {kind} {_effect_in_words(importance)} whose {level:.0%} interval lies "
        f"above 0 and above that of the control ({_control_in_words(importance, control)}) in the same "
        f"layers, confirmed over all candidates{others}"
    )
