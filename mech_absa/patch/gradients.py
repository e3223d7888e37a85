"""Estimates of a sweep from gradients: a few passes for all cells together, without a guarantee.

    atp       one forward and one backward pass of the base run; every cell at once
    atpstar   the same, with the first attention that reads a patched state taken exactly
    relp      the same as atp, with the backward pass of layer-wise relevance propagation (`rules`)
    ig        `steps` forward and backward passes between base and source

Write m for the metric, a for a state, b for its value in the base run and s for its value in the
source run. All estimate what the exact engines compute, m(base run with a <- s) - m(base run), for
the same cells and with the same sign.

**Attribution patching** (`atp`; Nanda 2023, Syed et al. 2023) is the first-order term of that
difference at the base run,

    atp(a, span) = sum over positions t of the span of (s_t - b_t) . dm/da_t

It is exact where the model is linear, and 0 where the base run is flat: a dead relu, a saturated
softmax. **RelP** (`relp`; Rezaei Jafari et al. 2025) is the same sum with dm/da_t replaced by the
relevance coefficients of `rules`.

**AtP*** (`atpstar`; Kramar et al. 2024, the query and key fix) replaces the linearisation of one
softmax. Let A be the pattern `[head q k]` of the first attention that reads the patched state, and
G = dm/dA, which is G[h,q,k] = dm/dz[q,h] . v[k,h]. For queries and for keys by themselves,

    by_query(t)  = sum over h, k    of G[h,t,k] (A'[h,t,k] - A[h,t,k])    A': queries at t replaced
    by_key(span) = sum over h, q, k of G[h,q,k] (A'[h,q,k] - A[h,q,k])    A': keys of the span replaced

    atpstar(q, span) = sum over t of by_query(t)
    atpstar(k, span) = by_key(span)
    atpstar(v, span) = atp(v, span)                       the pattern stays, and z is linear in v
    atpstar(a, span) = atp(a, span) - sum over t of [dm/dq . dq/da + dm/dk . dk/da] (s_t - b_t)
                       + sum over t of by_query(t) + by_key(span)

The last line is for states of the residual stream and what is added to it: resid_pre(l) is read by
attention l; resid_mid, resid_post, attn_out, mlp_out and heads of layer l by attention l+1. The
replaced queries and keys are those of the stream as the patch really leaves it (the MLP and the
norms between are run, not linearised). What enters after the last block has nothing to correct.
Everything after that attention stays linear.

**Integrated gradients** (`ig`; Sundararajan et al. 2017; on inputs, Hanna et al. 2024) average the
gradient over the straight path of the inputs, x(alpha) = x_base + alpha (x_source - x_base), at the
midpoints alpha_i = (i - 1/2) / steps:

    ig(a, span) = sum over t of (s_t - b_t) . (1 / steps) sum over i of dm/da_t at x(alpha_i)

It is *complete* at the inputs: summed over all positions, resid_pre(0) gives m(source run) - m(base
run), up to the midpoint rule's error, which falls with the square of `steps` where the metric is
smooth. Ablations have no source run, hence no path, and are refused.

A second-order term, 1/2 d^T H d, needs one more backward pass per cell, because the direction d
differs from cell to cell. An exact cell costs a fraction of a forward pass here, so there is none:
compute the leading cells exactly instead (`exact_top`).

A window of layers gets the sum of its layers' estimates. That counts a path from one layer of the
window to another although the exact patch cuts it, so windows are the least reliable cells here;
avoid them with resid_* kinds.

The metric itself has to be differentiated, not only read. So all labels have to be scored by one
run, that is, be single tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from einops import einsum
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from ..axes import Resid
from ..errors import ConfigError, ModelError
from ..metrics import foil_indices
from ..model import Model
from ..model.hooks import capture, live_hooks
from ..sites import HEAD_KINDS, Site
from ..stats import spearman_interval, top_k_overlap
from .atpstar import Linearised, correct, dot, states_needed
from .corruption import States
from .job import Answers, Job, Reader, Tick, window_layers
from .loop import states
from .request import DEFAULT_RULES, Direction, Method, Rule
from .rules import final_norm, relevance

METHODS = tuple(m for m in Method if m is not Method.EXACT)
"""The methods that estimate."""


@dataclass(frozen=True)
class Estimator:
    """Say how cells are estimated.

    Attributes:
        method: any but exact.
        steps: points of the path, for integrated gradients.
        rules: of RelP.
    """

    method: Method = Method.ATP
    steps: int = 16
    rules: tuple[Rule, ...] = DEFAULT_RULES


@dataclass(eq=False)
class Estimates:
    """Estimated effects of one job and the scores of its unpatched runs, on the CPU.

    Attributes:
        effect: metric(patched) - metric(base), estimated, in the metric's unit; 0 where a cell does
            not exist or is zero for certain.
        unpatched: label scores of the unpatched runs.
    """

    effect: Float[Tensor, "component span row"]
    unpatched: Answers


def refusal(model: Model) -> str | None:
    """Return why AtP* cannot run this model, whose attention it needs in pieces; None where it can."""
    if model.refusal is not None:
        return f"{model.name} has {model.refusal}"
    if hooks := live_hooks(model):
        names = ", ".join(hooks[:3])
        return f"{model.name} carries hooks ({names}), which only the hooked forward pass obeys"
    return None


@torch.inference_mode(False)
@torch.no_grad()
def sweep(
    job: Job,
    memory: int = 512 << 20,
    tick: Tick | None = None,
    how: Estimator = Estimator(),
) -> Estimates:
    """Estimate every cell of a job. Hooks on the model (edits) are in force, except under AtP*.

    Args:
        job: pairs of one length and what is asked of them.
        memory: bytes that the graphs of rows in flight may take, roughly.
        tick: told how many cells are done.
        how: the method and its settings.

    Raises:
        ConfigError: the method has no path to integrate over, or a label has several tokens.
        ModelError: AtP* cannot take this model apart; `refusal` says why.
    """
    check(job, how)
    read = Reader(job, final_norm(job.model, how.rules) if how.method is Method.RELP else None)
    unpatched, base, source = _unpatched(job, read)
    effect = torch.zeros(len(job.components), job.n_spans, job.rows, dtype=read.dtype)
    per_row = job.exists().sum((0, 1)).repeat_interleave(job.runs.draws)
    size = max(1, memory // (job.runs.length * graph_bytes(job.model, job.runs.length, how.method)))
    start = 0
    while start < job.rows:
        rows = torch.arange(start, min(start + size, job.rows))
        try:
            effect[:, :, rows] = _estimated(job, how, read, rows, base, source)
        except Exception as error:  # out of memory is handled; all else is raised again
            if not should_reduce_batch_size(error) or size == 1:
                raise
            size = max(1, len(rows) // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(rows)
        if tick is not None:
            tick(int(per_row[rows].sum()))
    zero = job.zero()[:, :, job.pair_of_row()]
    return Estimates(effect.masked_fill(zero, 0), unpatched)


def graph_bytes(model: Model, length: int, method: str = Method.ATP) -> int:
    """Return the bytes that one token of a differentiable pass keeps, over all layers, roughly."""
    stream, attention = 14 * model.d_model + 5 * model.d_mlp, 8 * model.n_heads * model.d_head
    per_layer = stream + attention + 4 * model.n_heads * length
    star = 8 * model.n_heads * length if method == Method.ATPSTAR else 0
    numbers = model.n_layers * per_layer + star + 3 * model.d_vocab // length
    return numbers * max(4, model.dtype.itemsize)


def agreement(exact: ArrayLike, estimate: ArrayLike, k: int) -> dict[str, float | int]:
    """Return how well estimated effects stand for exact ones, for a report.

    Args:
        exact, estimate: `[*cell]`, signed so that large means important; cells where either is NaN
            are left out.
        k: how many of the largest cells have to be found.

    Returns:
        `spearman` with its 95 % interval `spearman_low`, `spearman_high`; `pearson`;
        `top_k_overlap`, the share of the k largest exact cells that are among the k largest
        estimates; `sum_ratio`, the sum of the estimates over the exact sum (1 where magnitudes are
        right on the whole); `mean_absolute_error`, in the metric's unit; `k`; `n`, the number of
        cells. Correlations are NaN where one side is constant, the ratio where the exact sum is 0.

    Raises:
        ConfigError: shapes that differ, fewer than 3 cells, or k outside 1 to the number of cells.
    """
    rank = spearman_interval(exact, estimate)
    overlap = top_k_overlap(exact, estimate, k)
    x, y = np.asarray(exact, dtype=float).ravel(), np.asarray(estimate, dtype=float).ravel()
    keep = ~(np.isnan(x) | np.isnan(y))
    x, y = x[keep], y[keep]
    dx, dy = x - x.mean(), y - y.mean()
    size = float(np.linalg.norm(dx) * np.linalg.norm(dy))
    return {
        "spearman": rank.value,
        "spearman_low": rank.low,
        "spearman_high": rank.high,
        "pearson": float(dx @ dy) / size if size > 0 else float("nan"),
        "top_k_overlap": overlap,
        "sum_ratio": float(y.sum() / x.sum()) if x.sum() else float("nan"),
        "mean_absolute_error": float(np.abs(x - y).mean()),
        "k": k,
        "n": len(x),
    }


def check(job: Job, how: Estimator) -> None:
    """Refuse what cannot be estimated, before anything is run.

    Raises:
        ConfigError, ModelError: with the reason.
    """
    if how.method is Method.IG and job.ablation is not None:
        raise ConfigError(
            "integrated gradients need a source run to walk to, and an ablation has none; "
            "use --method atp"
        )
    if how.method is Method.ATPSTAR and (why := refusal(job.model)) is not None:
        raise ModelError(f"AtP* cannot run this: {why}; use --method atp")
    if job.metric.need == "vocabulary":
        return
    labels, tokenizer = job.runs.continuation.labels, job.model.tokenizer
    counts = {len(p.clean_scores) for p in job.runs.pairs if p.clean_scores is not None}
    counts.add(len(labels))
    if job.runs.continuation.tokens or len(counts) > 1:
        words = [
            list(ids) if tokenizer is None else tokenizer.decode(list(ids)) for _, ids in labels
        ]
        raise ConfigError(
            "estimates differentiate the metric and need one run that scores all labels, but only "
            f"{', '.join(map(repr, words))} (of {max(counts)}) share this one; choose labels of a "
            "single token, or use the exact method"
        )


# ---- inside -------------------------------------------------------------------------------------


def _unpatched(job: Job, read: Reader) -> tuple[Answers, States, States]:
    """Return the answers of the unpatched runs, the base's states and the states put into it."""
    base_last, base = states(job.model, job.base.inputs, job.kinds())
    source_last, source = states(job.model, job.source.inputs, job.kinds())
    if job.ablation is not None:
        answers = read.unpatched(base_last, None)
        return answers, base, job.ablation.states(source, job.runs.pairs, job.runs.length)
    denoise = job.direction == Direction.DENOISE
    clean, corrupted = (source_last, base_last) if denoise else (base_last, source_last)
    return read.unpatched(clean, corrupted), base, source


def _estimated(
    job: Job, how: Estimator, read: Reader, rows: Int[Tensor, " row"], base: States, source: States
) -> Float[Tensor, "component span row"]:
    """Return the estimates of some rows, those of certain zeros included."""
    at_base, at_source = job.base.run[rows], job.source.run[rows]
    delta = {
        key: source[key][at_source.to(act.device)].to(act) - act[at_base.to(act.device)]
        for key, act in base.items()
    }
    x = job.base.inputs[at_base.to(job.base.inputs.device)]
    points = [x]
    if how.method is Method.IG:
        way = job.source.inputs[at_source.to(x.device)] - x
        points = [x + (i + 0.5) / how.steps * way for i in range(how.steps)]
    by_state = _attributed(job, how, read, rows, points, delta)
    parts = []
    for c in job.components:
        layers = window_layers(c.layer, job.window, job.model.n_layers)
        states_of_window = [by_state[layer, c.kind] for layer in layers]
        if c.head is not None:
            states_of_window = [part[..., c.head] for part in states_of_window]
        parts.append(sum(part.T.cpu() for part in states_of_window))
    return torch.stack(parts)  # type: ignore[arg-type]


def _attributed(
    job: Job,
    how: Estimator,
    read: Reader,
    rows: Int[Tensor, " row"],
    points: list[Resid],
    delta: States,
) -> States:
    """Return (layer, kind) -> estimates `[row span]`, or `[row span head]` for kinds of heads.

    Args:
        rows: which of the job's.
        points: inputs `[row pos d_model]` at which gradients are taken; their mean is used.
        delta: source - base of every state.
    """
    star = how.method is Method.ATPSTAR
    kinds = set(delta) | (states_needed(job.model) if star else set())
    per_token: States = {}
    for x in points:
        acts, value = _metric_at(job, how, read, rows, x, kinds)
        # Rows do not touch each other, so that the gradient of the sum is every row's own.
        gradients = torch.autograd.grad(
            value, list(acts.values()), retain_graph=star, materialize_grads=True
        )
        grads = dict(zip(acts, gradients, strict=True))
        for key, d in delta.items():
            part = dot(grads[key], d).to(read.dtype) / len(points)
            per_token[key] = part if key not in per_token else per_token[key] + part
    member = _members(job, rows, read.dtype)
    total = {
        key: einsum(member.to(y.device), y, "row span pos, row pos ... -> row span ...")
        for key, y in per_token.items()
    }
    if star:
        base = Linearised(job.model, acts, grads, delta, member)
        for layer in range(job.model.n_layers):
            correct(base, layer, total)
    return total


def _metric_at(
    job: Job,
    how: Estimator,
    read: Reader,
    rows: Int[Tensor, " row"],
    x: Resid,
    kinds: set[tuple[int, str]],
) -> tuple[States, Tensor]:
    """Run inputs differentiably; return the states at `kinds` and the metric, summed over rows."""
    model = job.model
    sites = {key: Site(*key, head=0 if key[1] in HEAD_KINDS else None) for key in sorted(kinds)}
    with torch.enable_grad(), _rules(job, how), capture(model, sites.values(), True) as seen:
        inputs = x.detach().clone().requires_grad_()
        last = model.run_hooked(inputs)
        of_row = job.pair_of_row()[rows]
        scores = read(last[:, list(read.positions)], of_row)
        if job.metric.need == "vocabulary":
            value = scores.sum()
        else:
            pairs = [job.runs.pairs[b] for b in of_row.tolist()]
            gold = torch.tensor([p.gold for p in pairs], device=scores.device)
            foil = foil_indices(p.foil for p in pairs).to(scores.device)
            value = job.metric(scores, gold, foil).sum()
    return {key: seen[site] for key, site in sites.items()}, value


@contextlib.contextmanager
def _rules(job: Job, how: Estimator) -> Iterator[None]:
    with relevance(job.model, how.rules) if how.method is Method.RELP else contextlib.nullcontext():
        yield


def _members(
    job: Job, rows: Int[Tensor, " row"], dtype: torch.dtype
) -> Float[Tensor, "row span pos"]:
    """Return 1 where a position belongs to a span of a row, 0 elsewhere."""
    member = torch.zeros(len(rows), job.n_spans, job.runs.length, dtype=dtype)
    for r, b in enumerate(job.pair_of_row()[rows].tolist()):
        for s, span in enumerate(job.spans[b]):
            member[r, s, list(span.positions)] = 1
    return member
