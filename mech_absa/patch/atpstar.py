"""The correction of AtP*: the softmax of the next attention, taken exactly.

`gradients` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from ..axes import HeadOut, Resid
from ..model import Model
from .corruption import States

AFTER = ("resid_mid", "resid_post", "attn_out", "mlp_out", "head")
"""Kinds of layer l that are first read by attention l+1."""


def states_needed(model: Model) -> set[tuple[int, str]]:
    """Return (layer, kind) of the states that the correction reads."""
    kinds = ("resid_pre", "q", "k", "v", "head", *(() if model.parallel else ("resid_mid",)))
    return {(layer, kind) for layer in range(model.n_layers) for kind in kinds}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products over the last axis, float32 or wider."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(wide) * b.to(wide)).sum(-1)


@dataclass(frozen=True, eq=False)
class Linearised:
    """The base run with its gradients, and what is put into it.

    Attributes:
        acts, grads: states of the base run, in the graph, and the metric's gradients there.
        delta: source - base of every state that is patched.
        member: 1 where a position belongs to a span.
    """

    model: Model
    acts: States
    grads: States
    delta: States
    member: Float[Tensor, "row span pos"]


def correct(base: Linearised, layer: int, total: States) -> None:
    """Replace, in `total`, the linear effect through this layer's pattern by the exact one."""
    delta, acts = base.delta, base.acts
    readers = [(layer, "resid_pre"), *((layer - 1, kind) for kind in AFTER)]
    reads = [key for key in readers if key in delta]
    own = {(layer, "q"), (layer, "k")} & delta.keys()
    if not reads and not own:
        return
    attention = _Attention(base, layer)
    if (layer, "q") in own:
        q = attention.turned("q", acts[layer, "q"].detach() + delta[layer, "q"])
        total[layer, "q"] = attention.by_query(q)
    if (layer, "k") in own:
        k = attention.turned("k", acts[layer, "k"].detach() + delta[layer, "k"])
        kv = base.model.n_kv_heads
        total[layer, "k"] = reduce(
            attention.by_key(k), "row span (kv group) -> row span kv", "sum", kv=kv
        )
    if reads:
        _correct_stream(base, layer, reads, attention, total)


def _correct_stream(
    base: Linearised,
    layer: int,
    reads: list[tuple[int, str]],
    attention: _Attention,
    total: States,
) -> None:
    """Correct the states of the residual stream, and what is added to it, that this layer reads.

    All that lies between such a state and the next queries and keys acts on each position by itself.
    """
    through = [(layer, "q"), (layer, "k")]
    linear = torch.autograd.grad(
        [base.acts[key] for key in through],
        [base.acts[key] for key in reads],
        [base.grads[key] for key in through],
        retain_graph=True,
        materialize_grads=True,
    )
    for key, gradient in zip(reads, linear, strict=True):
        per_token = dot(gradient, base.delta[key])
        member = base.member.to(per_token)
        total[key] -= einsum(member, per_token, "row span pos, row pos ... -> row span ...")
        if key[1] == "head":
            heads = range(base.model.n_heads)
            exact = [attention.entered(_stream(base, layer, key, head)) for head in heads]
            total[key] += torch.stack(exact, dim=-1)
        else:
            total[key] += attention.entered(_stream(base, layer, key))


def _stream(base: Linearised, layer: int, key: tuple[int, str], head: int = 0) -> Resid:
    """Return the stream that this layer reads when a state is replaced, position by position."""
    model, acts, delta = base.model, base.acts, base.delta[key]
    below, kind = key
    before = acts[layer, "resid_pre"].detach()
    flat = delta.flatten(0, 1)
    if kind in ("resid_pre", "resid_post", "mlp_out"):
        return before + delta.to(before)
    if kind == "head":
        z = acts[key].detach().flatten(0, 1)
        patched = z.clone()
        patched[:, head] += flat[:, head]
        new, old = (model.attn_out(below, model.project(below, y)) for y in (patched, z))
        flat = new - old
    if not model.parallel:
        mid = acts[below, "resid_mid"].detach().flatten(0, 1)
        flat = flat + model.mlp_out(below, mid + flat) - model.mlp_out(below, mid)
    return before + flat.view_as(before).to(before)


class _Attention:
    """One attention of the base run: what replaced queries and keys do through its pattern alone."""

    def __init__(self, base: Linearised, layer: int):
        model, acts, grads, member = base.model, base.acts, base.grads, base.member
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
        """Return queries or keys as they meet: normalised and rotated where the model does so."""
        x = self.model.backend.qk_norm(self.layer, kind, x)
        return self.model.rotate(self.layer, x, torch.arange(self.length, device=x.device))

    def by_query(self, q: HeadOut) -> Float[Tensor, "row span head"]:
        """Return the effect of replacing the span's queries.

        A query moves its own row of the pattern only, so that all positions share one softmax.
        """
        moved = dot(self.gradient, self._scores(q, self.k).softmax(-1) - self.pattern)
        return einsum(self.member, moved, "row span pos, row head pos -> row span head")

    def by_key(self, k: Float[Tensor, "batch pos kv d_head"]) -> Float[Tensor, "row span head"]:
        """Return the effect of replacing the span's keys.

        It takes one softmax per span, because a key moves every row that sees it.
        """
        new = self._scores(self.q, k)
        effects = []
        for inside in self.member.unbind(1):
            scores = torch.where(rearrange(inside, "row k -> row 1 1 k") > 0, new, self.scores)
            effects.append(dot(self.gradient, scores.softmax(-1) - self.pattern).sum(-1))
        return torch.stack(effects, dim=1)

    def entered(self, stream: Resid) -> Float[Tensor, "row span"]:
        """Return the effect of the queries and keys, each by itself, of another residual stream."""
        positions = repeat(
            torch.arange(self.length, device=stream.device), "pos -> (row pos)", row=self.n_rows
        )
        q, k, _ = self.model.qkv(self.layer, stream.flatten(0, 1), positions)
        q, k = q.view_as(self.q), k.view_as(self.k)
        return (self.by_query(q) + self.by_key(k)).sum(-1)
