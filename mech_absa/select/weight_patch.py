"""Weight patching: what the adapted weights of one module do in the base model, and the other way round.

With m the metric, averaged over the examples, base and adapted two models of one shape, and
x[M <- y] the model x with the weights of module M of y:

    weight_patch        m(base[M <- adapted]) - m(base)          what M's new weights bring alone
    weight_patch_back   m(adapted) - m(adapted[M <- base])       what is lost without them
    weight_patch_grad   sum over matrices of M of dm/dW . (W_adapted - W_base), at the base

Source: Sun et al. 2026 (arXiv 2604.13694). Activation patching shows where a capability passes;
weight patching asks which weights hold it. No code was published. The choices made here:

- M is the attention (W_Q, W_K, W_V, W_O) or the MLP (W_in, W_gate, W_out) of a layer, with the
  biases and norms that belong to it, or the layer as a whole. The third formula leaves biases and
  norms out.
- m is the metric of the causal selectors, at the label; the paper's vector anchor, for text of any
  kind, is not needed here.
- Effects are differences of m and are not divided by m(adapted) - m(base), which `about` holds.

No weight is copied. The attention of the adapted layer in the base is the base's block with the
output of the adapted attention; the adapted MLP in the base is the adapted block with the output of
the base's attention.
"""

from __future__ import annotations

import re
from dataclasses import astuple, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Resid
from ..edits.base import Matrix, Shape
from ..edits.edit import Edit
from ..errors import ConfigError, choices
from ..metrics import METRICS, Metric
from ..model import Model
from ..model.forward import Point, advance, last
from ..model.pieces import rows_of
from ..prompts import Tokens
from ..scoring import Stream, batch_scores, by_length, label_scores
from ..sites import Site
from ..train.prefix import PrefixCache
from ..train.presets import parts
from .evidence import BATCH, Evidence, Selector

Unit = Literal["module", "layer"]
"""What is patched at a time."""

KINDS: dict[str, tuple[str, ...]] = {"module": ("attn_out", "mlp_out"), "layer": ("resid_post",)}
"""Unit -> the sites that stand for it."""

READABLE = tuple(name for name, metric in METRICS.items() if metric.need != "vocabulary")
"""Metrics of label scores."""

MEMORY = 1 << 28
"""Bytes for streams of the unpatched model, which are computed once."""


def swapped(model: Model, donor: Model, site: Site, x: Resid) -> Resid:
    """Return the stream after one block of `model` in which a module has the weights of `donor`.

    Args:
        model: what runs.
        donor: of the same shape.
        site: `attn_out` or `mlp_out` of the layer for a module, `resid_post` for all of it.
        x: as it enters the block.
    """
    layer, stop = site.layer, site.layer + 1
    if site.kind == "resid_post":
        return advance(donor, x, layer, stop)
    attention, rest = (donor, model) if site.kind == "attn_out" else (model, donor)
    seen: list[Tensor] = []
    kept: list[Point] = [(attention.point(layer, "attn_out"), seen.append)]
    advance(attention, x, layer, stop, kept)
    return advance(rest, x, layer, stop, [(rest.point(layer, "attn_out"), lambda _: seen[0])])


class Swapped(Stream):
    """The residual stream after the last block, with one module of another model.

    Args:
        cache: of the model that runs.
        donor: whose weights the module has.
        site: of the module, as in `swapped`.
    """

    def __init__(self, cache: PrefixCache, donor: Model, site: Site):
        super().__init__(cache.model)
        self.cache, self.donor, self.site = cache, donor, site

    def last(
        self, tokens: Tokens, reads: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch read d_model"]:
        """Return the stream at the positions `reads` of each row."""
        layer = self.site.layer
        x = swapped(self.model, self.donor, self.site, self.cache.get(layer, tokens))
        if layer + 1 == self.model.n_layers:
            return rows_of(x, reads)
        return last(self.model, x, reads, layer + 1)


def changed_weights(base: Model, adapted: Model) -> tuple[set[int], list[str]]:
    """Return the layers whose weights differ, and the names of other weights that do.

    >>> import mech_absa as ma
    >>> model = ma.load_model()
    >>> changed_weights(model, ma.load_edit("bundled", model).merged(model))
    ({0, 1, 2, 3, 4, 5, 6, 7}, [])
    """
    layers: set[int] = set()
    elsewhere: list[str] = []
    theirs = adapted.state_dict()
    for name, weight in base.state_dict().items():
        other = theirs.get(name)
        if other is not None and torch.equal(weight, other.to(weight)):
            continue
        if block := re.match(r"blocks\.(\d+)\.", name):
            layers.add(int(block[1]))
        else:
            elsewhere.append(name)
    return layers, elsewhere


class WeightPatching(Selector):
    """m(base[M <- adapted]) - m(base): what the adapted weights of a module do in the base model.

    Source: Sun et al. 2026 (arXiv 2604.13694); the module's docstring has the choices.

    Args:
        unit: `module` scores the attention and the MLP of each layer, `layer` each layer.
        metric: of label scores, as in `trace`.

    Raises:
        ConfigError: no base model, a base of another shape, or no weights of a layer that differ.
    """

    name: ClassVar[str] = "weight_patch"
    into_base: ClassVar[bool] = True

    def __init__(self, unit: Unit | str = "module", metric: str = "logit_diff"):
        super().__init__()
        if unit not in KINDS:
            raise ConfigError(f"{self.name} of {unit!r} was asked for; accepted: {choices(KINDS)}")
        if metric not in READABLE:
            raise ConfigError(
                f"{self.name} with the metric {metric!r} was asked for; accepted: {choices(READABLE)}"
            )
        self.unit, self.metric = unit, METRICS[metric]

    def models(self, evidence: Evidence) -> tuple[Model, Model, set[int]]:
        """Return the base, the adapted model and the layers whose weights differ."""
        base, adapted = evidence.edited, evidence.model
        if base is adapted:
            raise ConfigError(
                f"{self.name} patches weights of an adapted model, and there is no adapter: give "
                "Evidence(adapted, examples, base=model), or name an --adapter"
            )
        if _sizes(base) != _sizes(adapted):
            raise ConfigError(
                f"{self.name} patches weights between models of one shape; {base.name} and "
                f"{adapted.name} differ in it"
            )
        layers, elsewhere = changed_weights(base, adapted)
        if not layers:
            raise ConfigError(
                f"{self.name} patches weights of layers, and those of {adapted.name} are the same as "
                f"those of {base.name}; give a model that was adapted"
            )
        self.about = {"layers_changed": sorted(layers), "changed_elsewhere": elsewhere}
        return base, adapted, layers

    def sites(self, model: Model) -> list[Site]:
        """Return the sites of what is patched."""
        kinds = [kind for kind in KINDS[self.unit] if kind in model.kinds]
        return [Site(layer, kind) for layer in range(model.n_layers) for kind in kinds]

    @torch.inference_mode()
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        base, adapted, layers = self.models(evidence)
        model, donor = (base, adapted) if self.into_base else (adapted, base)
        cache = PrefixCache(model, MEMORY)
        means = {"base": _mean(evidence, Stream(base), self.metric)}
        means["adapted"] = _mean(evidence, Stream(adapted), self.metric)
        self.about |= {**means, "metric": self.metric.name, "examples": len(evidence.examples)}
        unpatched = means["base" if self.into_base else "adapted"]
        sign = 1.0 if self.into_base else -1.0
        found: dict[Site, float] = {}
        for site in self.sites(model):
            if site.layer not in layers:
                found[site] = 0.0
                continue
            cache.fill(site.layer, evidence.prompts)
            value = _mean(evidence, Swapped(cache, donor, site), self.metric)
            found[site] = sign * (value - unpatched)
        return found


class WeightPatchingBack(WeightPatching):
    """m(adapted) - m(adapted[M <- base]): what the adapted model loses with a module of the base.

    Source: as `WeightPatching`, in the other direction.
    """

    name: ClassVar[str] = "weight_patch_back"
    into_base: ClassVar[bool] = False


class WeightPatchingGradient(WeightPatching):
    """sum over matrices of dm/dW . (W_adapted - W_base) at the base: the first order of `WeightPatching`.

    Source: as `WeightPatching`. One backward pass for all modules; biases and norms have no part.
    """

    name: ClassVar[str] = "weight_patch_grad"

    @torch.inference_mode(False)
    @torch.enable_grad()
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        base, adapted, layers = self.models(evidence)
        change = {
            matrix: adapted.backend.matrix(matrix.layer, matrix.name).W - matrix.weight(base)[0]
            for layer in sorted(layers)
            for matrix in (Matrix(layer, name) for name in Shape.of(base).matrices)
        }
        change = {matrix: d for matrix, d in change.items() if bool(d.any())}
        self.about |= {"metric": self.metric.name, "examples": len(evidence.examples)}
        found = dict.fromkeys(self.sites(base), 0.0)
        for matrix, slope in self.slopes(evidence, change).items():
            module = "mlp_out" if matrix.name in ("W_in", "W_gate", "W_out") else "attn_out"
            kind = module if self.unit == "module" else "resid_post"
            found[Site(matrix.layer, kind)] += slope
        return found

    def slopes(self, evidence: Evidence, change: dict[Matrix, Tensor]) -> dict[Matrix, float]:
        """Return d/dt of the mean metric with W + t D in the place of each matrix W, at t = 0."""
        base, n = evidence.edited, len(evidence.examples)
        if not change:
            return {}
        edit = Edit.fresh(base, parts("full", [str(m) for m in change], 1.0))
        deltas = {i.place: i.get_parameter("D") for i in edit if isinstance(i.place, Matrix)}
        continuations = evidence.verbalizer.continuations(base.tokenizer, evidence.template)
        gold = torch.from_numpy(evidence.gold)
        total = dict.fromkeys(change, 0.0)
        for rows in by_length(evidence.prompts, BATCH):
            batch = Tokens.stack([evidence.prompts[i] for i in rows])
            scores = batch_scores(Stream(base, edit), batch, continuations)
            value = self.metric(scores, gold[rows].to(scores.device)).sum() / n
            for place, g in zip(
                deltas, torch.autograd.grad(value, list(deltas.values())), strict=True
            ):
                total[place] += float((g.double() * change[place].to(g.device)).sum())
        return total


def _sizes(model: Model) -> tuple[int, ...]:
    """Return what two models must share to exchange weights."""
    return (*astuple(replace(Shape.of(model), n_parameters=0)), model.d_vocab)


def _mean(evidence: Evidence, stream: Stream, metric: Metric) -> float:
    """Return the mean of a metric over the examples."""
    model = stream.model
    continuations = evidence.verbalizer.continuations(model.tokenizer, evidence.template)
    scores = label_scores(stream, evidence.prompts, continuations, batch_size=BATCH)
    return float(metric(scores, torch.from_numpy(evidence.gold)).double().mean())


__all__ = [
    "Swapped",
    "WeightPatching",
    "WeightPatchingBack",
    "WeightPatchingGradient",
    "changed_weights",
    "swapped",
]
