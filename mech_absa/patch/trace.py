"""Trace pairs: measure the effect of every site and return `Effects`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metrics import Metric
from ..model import Model
from ..progress import bar, wanted
from ..sites import Site
from .directions import BothDirections
from .effects import Effects
from .pairs import Pairs
from .plan import plan
from .request import DEFAULT_RULES, DEFAULT_SITES, Direction, Method, Request
from .self_check import self_check


def trace(
    model: Model,
    pairs: Pairs,
    sites: Sequence[str | Site] = DEFAULT_SITES,
    *,
    by: str = "token",
    layers: Sequence[int] | None = None,
    metric: str | Metric = "prob",
    direction: str = "denoise",
    window: int = 1,
    method: str = "exact",
    steps: int = 16,
    rules: Sequence[str] = DEFAULT_RULES,
    exact_top: int = 0,
    engine: str = "wavefront",
    memory: int | float | None = None,
    check: bool = True,
    progress: bool | None = None,
) -> Effects:
    """Measure the effect of every site on every pair.

    Args:
        model: what is traced.
        pairs: from `make_pairs`.
        sites: kinds (`resid_pre, resid_mid, resid_post, attn_out, mlp_out, head`, and `q, k, v` by
            the loop), or single sites, such as `L5.head3` or `L3.resid_post@query.last`.
        by: `token` restores one token at a time; `role` all tokens of a role together, which costs
            a tenth.
        layers: of the kinds; all where None.
        metric: `prob` (the paper), `prob_label`, `logprob`, `logit_diff` or `kl`.
        direction: `denoise` (put clean states into the corrupted run), `noise` (the reverse) or
            `both`, which runs clean and corrupted prompts once and adds a column `direction`.
            Ablations have no corrupted run and are `noise` whatever this says;
            `effects.about["direction"]` tells.
        window: layers restored together, centred (ROME: 10 for attention and MLP; the paper: 1).
        method: `exact`, or an estimate from gradients: `atp`, `atpstar`, `relp`, `ig`.
        steps: of integrated gradients.
        rules: of RelP: `ln`, `identity`, `half`, `pattern`.
        exact_top: of an estimate, compute this many leading cells exactly. They are the cells
            (kind, layer, head, role) with the largest average estimate; columns `exact` and
            `estimate` are added.
        engine: `wavefront`, or `loop` for one forward pass per cell.
        memory: bytes for activations in flight; by the device where None.
        check: run `self_check` (a few percent of the time) and fail where an identity is broken.
        progress: show a bar; where None, in a terminal and in a notebook.

    Returns:
        one row per pair and cell.

    Raises:
        ConfigError, SiteError, ModelError: an argument is not accepted.
        SelfCheckError: an identity does not hold.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> effects = ma.trace(model, pairs, ["mlp_out"], by="role", layers=[0, 1])
        >>> sorted(effects.frame["layer"].unique().tolist())
        [0, 1]
    """
    request = Request.parse(
        sites,
        by=by,
        layers=layers,
        metric=metric,
        direction=direction,
        window=window,
        method=method,
        steps=steps,
        rules=rules,
        exact_top=exact_top,
        engine=engine,
        memory=memory,
        spans=pairs.spans if isinstance(pairs, Pairs) else (),
    )
    p = plan(model, pairs, request)
    checks = self_check(p) if check and request.method == Method.EXACT else {}
    with bar("tracing", p.cells, quiet=not wanted(progress)) as tick:
        frames = [frame for _, frame in p.iterate(tick=tick)]
    effects = p.gather(frames)
    effects.about["self_checks"] = checks
    return effects


def trace_both(
    model: Model, pairs: Pairs, sites: Sequence[str | Site] = DEFAULT_SITES, **options: Any
) -> BothDirections:
    """Trace in both directions over shared runs.

    Args:
        model, pairs, sites, options: as in `trace`, without `direction`.

    Raises:
        DataError: the corruption is an ablation, which has one direction.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")
        >>> pairs = ma.make_pairs(model, examples, ma.Counterfactual(), limit=2, keep="all")
        >>> both = trace_both(model, pairs, ["mlp_out"], by="role", layers=[1])
        >>> len(both.interaction) == len(both.pie) == len(both.tie)
        True
    """
    return BothDirections.of(trace(model, pairs, sites, direction=Direction.BOTH, **options))


__all__ = ["trace", "trace_both"]
