"""Estimates of a sweep from gradients: a few passes for all cells together, and no promise that they are right.

    atp       one forward and one backward pass of the base run; every cell at once
    atpstar   the same, with the first attention that reads a patched state taken exactly instead of linearly
    ig        `steps` forward and backward passes between base and source

Write m for the metric, a for a state, b for its value in the base run and s for its value in the source run. All three estimate what the
exact engines compute, m(base run with a <- s) - m(base run), for the same cells and with the same sign.

**Attribution patching** (`atp`; Nanda 2023, Syed et al. 2023) is the first-order term of that difference at the base run,

    atp(a, span) = sum over positions t of the span of (s_t - b_t) . dm/da_t

It is exact where the model is linear, and silent where the base run is flat: a dead relu, a saturated softmax.

**AtP*** (`atpstar`; Kramar et al. 2024, the query and key fix) replaces the linearisation of one softmax. Let A be the pattern `[head q k]`
of the first attention that reads the patched state, and G = dm/dA, which is G[h,q,k] = dm/dz[q,h] . v[k,h]. For queries and for keys by
themselves,

    by_query(t)  = sum over h, k    of G[h,t,k] (A'[h,t,k] - A[h,t,k])      A' = softmax of the scores with the queries at t replaced
    by_key(span) = sum over h, q, k of G[h,q,k] (A'[h,q,k] - A[h,q,k])      A' = softmax of the scores with the keys of the span replaced

    atpstar(q, span) = sum over t of by_query(t)
    atpstar(k, span) = by_key(span)
    atpstar(v, span) = atp(v, span)                                         the pattern is not touched, and z is linear in v
    atpstar(a, span) = atp(a, span) - sum over t of [dm/dq . dq/da + dm/dk . dk/da] (s_t - b_t) + sum over t of by_query(t) + by_key(span)

The last line is for states of the residual stream and what is added to it: resid_pre(l) is read by attention l; resid_mid, resid_post,
attn_out, mlp_out and heads of layer l by attention l+1, and the replaced queries and keys are those of the stream as the patch really
leaves it (the MLP and the norms between are run, not linearised). What enters after the last block has nothing to correct. Everything
after that attention stays linear.

**Integrated gradients** (`ig`; Sundararajan et al. 2017; on inputs, Hanna et al. 2024) average the gradient over the straight path of the
inputs, x(alpha) = x_base + alpha (x_source - x_base), at the midpoints alpha_i = (i - 1/2) / steps:

    ig(a, span) = sum over t of (s_t - b_t) . (1 / steps) sum over i of dm/da_t at x(alpha_i)

It is *complete* at the inputs: summed over all positions, resid_pre(0) gives m(source run) - m(base run), up to the midpoint rule's error,
which falls with the square of `steps` where the metric is smooth. Ablations have no source run, hence no path, and are refused.

A window of layers gets the sum of its layers' estimates. That counts a path from one layer of the window to another although the exact
patch cuts it, so windows are the least trustworthy cells here; with resid_* kinds, avoid them.

The metric itself has to be differentiated, not only read; so all labels have to be scored by one run, that is, be single tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from ..axes import HeadOut, Resid
from ..errors import ConfigError, ModelError, choices
from ..metrics import foil_indices
from ..model import Model
from ..model.hooks import capture, live_hooks
from ..sites import HEAD_KINDS, Site
from ..stats import spearman_interval, top_k_overlap
from .corruption import States
from .loop import states
from .sweep import Job, Reader, window_layers

Method = Literal["atp", "atpstar", "ig"]
METHODS = ("atp", "atpstar", "ig")

_AFTER = ("resid_mid", "resid_post", "attn_out", "mlp_out", "head")
"""Kinds of layer l that are first read by attention l+1."""


@dataclass(eq=False)
class Estimates:
    """Estimated effects of one job and the scores of its unpatched runs, on the CPU.

    Attributes:
        effect: metric(patched) - metric(base), estimated, in the metric's unit; 0 where a cell does not exist or is zero for certain.
        base, clean, corrupted: label scores, as in `Answers`.
    """

    effect: Float[Tensor, "component span row"]
    base: Float[Tensor, "row read"]
    clean: Float[Tensor, "row read"]
    corrupted: Float[Tensor, "row read"]


def refusal(model: Model) -> str | None:
    """Why AtP* cannot run this, which needs the attention in pieces; None where it can. The other methods run every model."""
    if model.refusal is not None:
        return f"{model.name} has {model.refusal}"
    if hooks := live_hooks(model.hooked):
        return f"{model.name} carries hooks ({', '.join(hooks[:3])}), which only the hooked forward pass obeys"
    return None


@torch.inference_mode(False)
@torch.no_grad()
def sweep(
    model: Model,
    job: Job,
    method: Method = "atp",
    steps: int = 16,
    tick: Callable[[int], None] | None = None,
    memory: int = 512 << 20,
) -> Estimates:
    """Every cell of a job, estimated.

    Args:
        model: what is traced; hooks on it (edits) are in force, except under `atpstar`.
        job: pairs of one length and what is asked of them.
        method: `atp`, `atpstar` or `ig`.
        steps: points of the path, for `ig`.
        tick: told how many cells are done.
        memory: bytes that the graphs of rows in flight may take, roughly.

    Raises:
        ConfigError: the method is unknown, it has no path to integrate over, or a label is longer than one token.
        ModelError: AtP* cannot take this model apart; `refusal` says why.
    """
    check(model, job, method, steps)
    source_x, source_row = job.source()
    base_x = job.base()
    source_last, source = states(model, source_x, job.kinds())
    base_last, base = states(model, base_x, job.kinds())
    if job.ablation is not None:
        source = job.ablation.states(source, job.runs.pairs, job.runs.length)

    read = Reader(model, job)
    pair_of_row = job.pair_of_row()
    columns, draws = list(read.positions), job.runs.draws
    clean_last = source_last if job.direction == "denoise" else base_last[::draws]
    read.remember_clean(clean_last[:, columns])
    clean = read(clean_last[:, columns], torch.arange(len(job.runs.pairs))).repeat_interleave(
        draws, dim=0
    )
    base_scores = read(base_last[:, columns], pair_of_row)
    if job.ablation is not None:
        corrupted = torch.full_like(clean, torch.nan)
    else:
        corrupted = (
            base_scores
            if job.direction == "denoise"
            else read(source_last[:, columns], pair_of_row)
        )

    zero = job.zero()[:, :, pair_of_row]
    effect = torch.zeros(zero.shape, dtype=read.dtype)
    size = max(1, memory // (job.runs.length * graph_bytes(model, job.runs.length, method)))
    start = 0
    while start < job.rows:
        rows = torch.arange(start, min(start + size, job.rows))
        try:
            delta = {
                key: source[key][source_row[rows].to(act.device)].to(act) - act[rows.to(act.device)] for key, act in base.items()
            }  # fmt: skip
            x = base_x[rows.to(base_x.device)]
            if method == "ig":
                way = source_x[source_row[rows].to(source_x.device)] - x
                points = [x + (i + 0.5) / steps * way for i in range(steps)]
            else:
                points = [x]
            found = _attributed(model, job, read, rows, points, delta, method == "atpstar")
            for c, component in enumerate(job.components):
                for layer in window_layers(component.layer, job.window, model.n_layers):
                    part = found[layer, component.kind]
                    effect[c, :, rows] += (
                        part if component.head is None else part[..., component.head]
                    ).T.cpu()
        except (
            Exception
        ) as error:  # only running out of memory is handled; all else is raised again
            if not should_reduce_batch_size(error) or size == 1:
                raise
            size = max(1, min(size, len(rows)) // 2)
            effect[:, :, rows] = 0
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        start += len(rows)
        if tick is not None:
            tick(len(job.components) * job.n_spans * len(rows))
    return Estimates(effect.masked_fill(zero, 0), base_scores.cpu(), clean.cpu(), corrupted.cpu())


def graph_bytes(model: Model, length: int, method: Method = "atp") -> int:
    """Bytes that one token of a differentiable pass keeps, over all layers; the widest tensors counted, not every last one."""
    per_layer = (
        14 * model.d_model
        + 5 * model.d_mlp
        + 8 * model.n_heads * model.d_head
        + 4 * model.n_heads * length
    )
    largest = 8 * model.n_heads * length if method == "atpstar" else 0
    return (model.n_layers * per_layer + largest + 3 * model.d_vocab // length) * max(
        4, model.dtype.itemsize
    )


def agreement(exact: ArrayLike, estimate: ArrayLike, k: int) -> dict[str, float | int]:
    """How well estimated effects stand for exact ones, for a report.

    Args:
        exact, estimate: `[*cell]`, signed so that large means important; cells where either is NaN are left out.
        k: how many of the largest cells have to be found.

    Returns:
        `spearman` with its 95 % interval `spearman_low`, `spearman_high`; `pearson`; `top_k_overlap`, the share of the k largest exact
        cells that are among the k largest estimates; `mean_absolute_error`, in the metric's unit; `k`; `n`, the number of cells.
        Correlations are NaN where one side is constant.

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
        "mean_absolute_error": float(np.abs(x - y).mean()),
        "k": k,
        "n": len(x),
    }


# ---------------------------------------------------------------------------------------------------- inside


def check(model: Model, job: Job, method: str, steps: int) -> None:
    """Refuse what cannot be estimated, before anything is run.

    Raises:
        ConfigError, ModelError: with the reason.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r} of estimation; accepted: {choices(METHODS)}")
    if method == "ig" and job.ablation is not None:
        raise ConfigError(
            "integrated gradients need a source run to walk to, and an ablation has none; use --method atp"
        )
    if method == "ig" and steps < 1:
        raise ConfigError(
            f"{steps} steps of integrated gradients were asked for; it must be 1 or more"
        )
    if method == "atpstar" and (why := refusal(model)) is not None:
        raise ModelError(f"AtP* cannot run this: {why}; use --method atp")
    if job.metric.need == "vocabulary":
        return
    labels = job.runs.continuation.labels
    known = {len(p.clean_scores) for p in job.runs.pairs if p.clean_scores is not None} | {
        len(labels)
    }
    if job.runs.continuation.tokens or len(known) > 1:
        names = [
            repr(model.tokenizer.decode(list(ids)) if model.tokenizer is not None else list(ids))
            for _, ids in labels
        ]
        raise ConfigError(
            f"estimates differentiate the metric and need one run that scores all labels, but only {', '.join(names)} (of {max(known)}) "
            "share this one; choose labels of a single token, or use the exact method"
        )


def _attributed(
    model: Model,
    job: Job,
    read: Reader,
    rows: Int[Tensor, " row"],
    points: list[Resid],
    delta: States,
    star: bool,
) -> States:
    """(layer, kind) -> estimated effects `[row span]`, or `[row span head]` for kinds of heads.

    Args:
        rows: which of the job's.
        points: inputs `[row pos d_model]` at which gradients are taken; their mean is used.
        delta: source - base of every state.
        star: correct the first attention's softmax (one point only).
    """
    kinds = set(delta)
    if star:
        kinds |= {
            (layer, kind)
            for layer in range(model.n_layers)
            for kind in ("resid_pre", "q", "k", "v", "head")
        }
        kinds |= {(layer, "resid_mid") for layer in range(model.n_layers) if not model.parallel}
    sites = {key: Site(*key, head=0 if key[1] in HEAD_KINDS else None) for key in sorted(kinds)}
    pairs = [job.runs.pairs[b] for b in job.pair_of_row()[rows].tolist()]
    per_token: States = {}
    for x in points:
        with torch.enable_grad(), capture(model.hooked, sites.values(), grad=True) as seen:
            last = model.hooked.forward(
                x.detach().clone().requires_grad_(), start_at_layer=0, stop_at_layer=model.n_layers
            )
            scores = read(last[:, list(read.positions)], job.pair_of_row()[rows])
            if job.metric.need == "vocabulary":
                value = scores.sum()
            else:
                gold = torch.tensor([p.gold for p in pairs], device=scores.device)
                foil = foil_indices(p.foil for p in pairs).to(scores.device)
                value = job.metric(scores, gold, foil).sum()
        # Rows do not touch each other, so that the gradient of the sum is every row's own.
        acts = {key: seen[site] for key, site in sites.items()}
        found = torch.autograd.grad(
            value, list(acts.values()), retain_graph=star, materialize_grads=True
        )
        grads = dict(zip(acts, found, strict=True))
        for key, d in delta.items():
            part = _dot(grads[key], d).to(read.dtype) / len(points)
            per_token[key] = part if key not in per_token else per_token[key] + part

    member = torch.zeros(len(rows), job.n_spans, job.runs.length, dtype=read.dtype)
    for r, b in enumerate(job.pair_of_row()[rows].tolist()):
        for s, span in enumerate(job.spans[b]):
            member[r, s, list(span.positions)] = 1
    total = {
        key: einsum(member.to(y.device), y, "row span pos, row pos ... -> row span ...")
        for key, y in per_token.items()
    }
    if star:
        for layer in range(model.n_layers):
            _correct(model, layer, acts, grads, delta, member, total)
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis, float32 or wider."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(wide) * b.to(wide)).sum(-1)


def _correct(
    model: Model,
    layer: int,
    acts: States,
    grads: States,
    delta: States,
    member: Float[Tensor, "row span pos"],
    total: States,
) -> None:
    """Replace, in `total`, the linear effect through the pattern of this layer's attention by the exact one."""
    reads = [
        key
        for key in [(layer, "resid_pre"), *((layer - 1, kind) for kind in _AFTER)]
        if key in delta
    ]
    if not reads and not {(layer, "q"), (layer, "k")} & delta.keys():
        return
    attention = _Attention(model, layer, acts, grads, member)
    if (layer, "q") in delta:
        total[layer, "q"] = attention.by_query(
            attention.turned("q", acts[layer, "q"].detach() + delta[layer, "q"])
        )
    if (layer, "k") in delta:
        by_head = attention.by_key(
            attention.turned("k", acts[layer, "k"].detach() + delta[layer, "k"])
        )
        total[layer, "k"] = reduce(
            by_head, "row span (kv group) -> row span kv", "sum", kv=model.n_kv_heads
        )
    if not reads:
        return
    through = [(layer, "q"), (layer, "k")]
    linear = torch.autograd.grad(
        [acts[key] for key in through],
        [acts[key] for key in reads],
        [grads[key] for key in through],
        retain_graph=True,
        materialize_grads=True,
    )  # all that lies between such a state and the next queries and keys acts on each position by itself
    for key, gradient in zip(reads, linear, strict=True):
        per_token = _dot(gradient, delta[key])
        total[key] -= einsum(
            member.to(per_token), per_token, "row span pos, row pos ... -> row span ..."
        )
        if key[1] == "head":
            exact = [
                attention.entered(_stream(model, layer, key, acts, delta[key], head))
                for head in range(model.n_heads)
            ]
            total[key] += torch.stack(exact, dim=-1)
        else:
            total[key] += attention.entered(_stream(model, layer, key, acts, delta[key]))


def _stream(
    model: Model, layer: int, key: tuple[int, str], acts: States, delta: Tensor, head: int = 0
) -> Resid:
    """The residual stream that this layer reads when the state at `key` is replaced, at every position by itself."""
    below, kind = key
    before = acts[layer, "resid_pre"].detach()
    flat = delta.flatten(0, 1)
    if kind in ("resid_pre", "resid_post", "mlp_out"):
        return before + delta.to(before)
    if kind == "head":
        z = acts[key].detach().flatten(0, 1)
        patched = z.clone()
        patched[:, head] += flat[:, head]
        flat = model.attn_out(below, model.project(below, patched)) - model.attn_out(
            below, model.project(below, z)
        )
    if not model.parallel:
        mid = acts[below, "resid_mid"].detach().flatten(0, 1)
        flat = flat + model.mlp_out(below, mid + flat) - model.mlp_out(below, mid)
    return before + flat.view_as(before).to(before)


class _Attention:
    """One attention of the base run, and what replaced queries and keys do to the metric through its pattern alone."""

    def __init__(
        self,
        model: Model,
        layer: int,
        acts: States,
        grads: States,
        member: Float[Tensor, "row span pos"],
    ):
        self.model, self.layer = model, layer
        self.n_rows, _, self.length = member.shape
        self.q, self.k = (self.turned(kind, acts[layer, kind].detach()) for kind in ("q", "k"))
        self.member = member.to(self.q.device)
        self.wide = member.dtype
        self.scores = self._scores(self.q, self.k)
        self.pattern = self.scores.softmax(-1)
        v = repeat(
            acts[layer, "v"].detach(),
            "row k kv d -> row k (kv group) d",
            group=model.n_heads // model.n_kv_heads,
        )
        self.gradient = einsum(
            grads[layer, "head"].to(self.wide),
            v.to(self.wide),
            "row q head d, row k head d -> row head q k",
        )

    def _scores(
        self, q: HeadOut, k: Float[Tensor, "batch pos kv d_head"]
    ) -> Float[Tensor, "row head q k"]:
        return self.model.scores(self.layer, q, k, torch.arange(self.length, device=q.device)).to(
            self.wide
        )

    def turned(self, kind: str, x: HeadOut) -> HeadOut:
        """Queries or keys as projected -> as they meet: normalised and rotated where the model does so."""
        attn = self.model.hooked.blocks[self.layer].attn
        if self.model.cfg.use_qk_norm:
            x = attn._apply_qk_norm(x, attn.q_norm if kind == "q" else attn.k_norm)
        return self.model.rotate(self.layer, x, torch.arange(self.length, device=x.device))

    def by_query(self, q: HeadOut) -> Float[Tensor, "row span head"]:
        """Queries of the span replaced. A query moves its own row of the pattern only, so that all positions share one softmax."""
        moved = _dot(self.gradient, self._scores(q, self.k).softmax(-1) - self.pattern)
        return einsum(self.member, moved, "row span pos, row head pos -> row span head")

    def by_key(self, k: Float[Tensor, "batch pos kv d_head"]) -> Float[Tensor, "row span head"]:
        """Keys of the span replaced: one softmax a span, since a key moves every row that sees it."""
        new = self._scores(self.q, k)
        effects = []
        for inside in self.member.unbind(1):
            scores = torch.where(rearrange(inside, "row k -> row 1 1 k") > 0, new, self.scores)
            effects.append(_dot(self.gradient, scores.softmax(-1) - self.pattern).sum(-1))
        return torch.stack(effects, dim=1)

    def entered(self, stream: Resid) -> Float[Tensor, "row span"]:
        """Queries and keys, each by itself, of another residual stream."""
        positions = repeat(
            torch.arange(self.length, device=stream.device), "pos -> (row pos)", row=self.n_rows
        )
        q, k, _ = self.model.qkv(self.layer, stream.flatten(0, 1), positions)
        q, k = q.view_as(self.q), k.view_as(self.k)
        return (self.by_query(q) + self.by_key(k)).sum(-1)
