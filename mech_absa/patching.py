"""Use the engine through the names of `transformer_lens.patching`: change one import.

    from mech_absa import patching                     # was: from transformer_lens import patching
    patching.get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)

Every public name of `transformer_lens.patching` is here, with the same arguments and the same
result. You bring your own `HookedTransformer` or `TransformerBridge`, your own `clean_cache`, and your own metric of the
logits. Sweeps over `resid_pre`, `resid_mid`, `attn_out`, `mlp_out` and the output of heads run in
one walk over the layers (`patch/wave`); everything else runs as TransformerLens runs it.

The engine computes the logits of the last position; at all other positions the metric sees NaN. A
metric that reads them returns NaN on the unpatched run. Then the exact loop of TransformerLens
runs instead, and a warning says so once. The same holds for models and sites that the engine
cannot compute. So the result is always the one that TransformerLens returns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import patching as theirs
from transformer_lens.patching import (
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)

from .model import Model, run
from .model.bridge import is_bridge
from .model.load import unreadable
from .patch.wave import refusal, token_bytes
from .patch.wave.cells import Rows
from .patch.wave.enter import needed
from .patch.wave.packed import Packed
from .patch.wave.walk import Unpatched, Walk
from .sites import Site

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Any]
Metrics = Metric | Mapping[str, Metric]
"""A metric of logits; with TransformerLens 4 also a dictionary of them."""
MEMORY = 512 << 20
"""Bytes that activations in flight may take."""

KIND_OF = {
    (layer_pos_patch_setter, "resid_pre"): "resid_pre",
    (layer_pos_patch_setter, "resid_mid"): "resid_mid",
    (layer_pos_patch_setter, "resid_post"): "resid_post",
    (layer_pos_patch_setter, "attn_out"): "attn_out",
    (layer_pos_patch_setter, "mlp_out"): "mlp_out",
    (layer_pos_head_vector_patch_setter, "z"): "head",
    (layer_head_vector_patch_setter, "z"): "head",
}
"""(patch setter, activation name) -> kind of site, for what the engine computes."""


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Int[Tensor, "batch pos"],
    clean_cache: Any,
    patching_metric: Metrics,
    patch_setter: Callable[..., Tensor],
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    **options: Any,
) -> Any:
    """Patch one activation after the other and return the metric of each run.

    The arguments and the result are those of `transformer_lens.patching.generic_activation_patch`.

    Args:
        model: a `HookedTransformer` or a bridge, folded or raw; it is left as it is.
        corrupted_tokens: tokens of the run that is patched.
        clean_cache: activations that are put in.
        patching_metric: logits -> one number; with newer versions, a dictionary of such functions.
        patch_setter, activation_name: which activation, and which part of it an index names.
        index_axis_names, index_df: which indices; see TransformerLens.
        return_index_df: also return the indices.
        options: those of newer versions of TransformerLens; with any, its own loop runs.

    Returns:
        the metric of every patched run, one axis per axis of the index (flat with `index_df`).
    """
    call = partial(
        theirs.generic_activation_patch,
        model,
        corrupted_tokens,
        clean_cache,
        patching_metric,
        patch_setter=patch_setter,
        activation_name=activation_name,
        index_axis_names=index_axis_names,
        index_df=index_df,
        return_index_df=return_index_df,
        **options,
    )
    kind = KIND_OF.get((patch_setter, activation_name))
    if kind == "resid_mid" and is_bridge(model):
        _say_once("hook_resid_mid of a bridge reaches the MLP alone, not the stream that goes on")
        kind = None
    if options or isinstance(
        patching_metric, Mapping
    ):  # newer results of TransformerLens, by its loop
        return call()
    if kind is None or (index_df is None) == (index_axis_names is None):
        return call()
    shape = _axis_sizes(model, corrupted_tokens, index_axis_names)
    cells = make_df_from_ranges(shape, index_axis_names or ()) if index_df is None else index_df
    with _left_as_it_is(model):
        values = _by_engine(model, corrupted_tokens, clean_cache, patching_metric, kind, cells)
    if values is None:
        return call()
    result = values.to(model.cfg.device)
    result = result.reshape(shape) if index_df is None else result
    return (result, cells) if return_index_df else result


def _axis_sizes(model: Any, tokens: Tensor, axes: Sequence[str] | None) -> list[int]:
    """Return how many indices each axis has."""
    sizes = {"layer": model.cfg.n_layers, "pos": tokens.shape[-1]}
    return [sizes.get(axis, model.cfg.n_heads) for axis in axes or ()]


# ---- by the engine --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Describe what the walk must know of a sweep: the component of every cell, and that none is a
    window.
    """

    components: tuple[Site, ...]
    window: int = 1


@contextlib.contextmanager
def _left_as_it_is(hooked: Any) -> Iterator[None]:
    """Give the user's model its mode and its trainable parameters back; `Model` freezes it."""
    training, trained = hooked.training, [p for p in hooked.parameters() if p.requires_grad]
    try:
        yield
    finally:
        hooked.train(training)
        for p in trained:
            p.requires_grad_(True)


_warned: set[str] = set()


def _say_once(why: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(f"the exact loop of TransformerLens runs: {why}", stacklevel=4)


@torch.inference_mode()
def _by_engine(
    hooked: Any, tokens: Tensor, cache: Any, metric: Metric, kind: str, cells: pd.DataFrame
) -> Float[Tensor, " cell"] | None:
    """Return the metric of every cell; None where TransformerLens's loop has to run."""
    model = Model(hooked, None, name=str(hooked.cfg.model_name), bos=False)
    model.backend.unreadable = unreadable(model)
    sites = _sites(cells, kind)
    if (why := refusal(model, sites[:1])) is not None:
        _say_once(why)
        return None
    x = model.embed(tokens)
    last, states = run(model, x, needed(model, {kind}))
    sheet = _Sheet(model, tokens, metric)
    base = sheet(last[:, -1])
    if base != base:  # NaN
        _say_once("the metric reads logits of other positions than the last")
        return None
    source = {
        (layer, kind): cache[_any_head(layer, kind).hook_name].to(x)
        for layer in {s.layer for s in sites}
    }
    rows = _rows(model, cells, sites, source, _first_difference(x, cache), x.shape[1])
    walk = Walk(model, Grid(tuple(sites)), Unpatched(states, last), source, MEMORY)
    patched = last[:, -1].expand(len(sites), -1, -1).clone()
    for p in _chunks(model, rows):
        patched[p.rows.component, p.rows.base_run] = walk(p)[:, 0]
    unpatched = torch.ones(len(sites), dtype=torch.bool)
    unpatched[rows.component] = False
    values = [base if same else sheet(y) for same, y in zip(unpatched, patched, strict=True)]
    return torch.tensor(values)


class _Sheet:
    """The user's metric on logits whose last position alone is known."""

    def __init__(self, model: Model, tokens: Tensor, metric: Metric):
        self.model, self.metric = model, metric
        dtype, device = model.dtype, model.device
        self.logits = torch.full((*tokens.shape, model.d_vocab), torch.nan, dtype=dtype).to(device)

    def __call__(self, last: Float[Tensor, "batch d_model"]) -> float:
        self.logits[:, -1] = self.model.finish(last, None, "vocabulary").to(self.logits)
        value = self.metric(self.logits)
        return float(value.item() if isinstance(value, Tensor) else value)


def _any_head(layer: int, kind: str) -> Site:
    return Site(layer, kind, 0 if kind == "head" else None)


def _sites(cells: pd.DataFrame, kind: str) -> list[Site]:
    """Return the component of every cell; the last column of a table of heads names the head."""
    if kind != "head":
        return [Site(int(layer), kind) for layer in cells.iloc[:, 0]]
    return [
        Site(int(layer), kind, int(head))
        for layer, head in zip(cells.iloc[:, 0], cells.iloc[:, -1], strict=True)
    ]


def _first_difference(x: Float[Tensor, "batch pos d_model"], cache: Any) -> Int[Tensor, " batch"]:
    """Return where clean and corrupted prompts part; 0 where the cache does not tell."""
    name = "blocks.0.hook_resid_pre"
    if name not in cache or cache[name].shape[1] != x.shape[1]:
        return torch.zeros(len(x), dtype=torch.long)
    differs = (cache[name].to(x) != x).any(-1).cpu()
    return torch.where(differs.any(1), differs.int().argmax(1), x.shape[1])


def _rows(
    model: Model,
    cells: pd.DataFrame,
    sites: list[Site],
    source: dict[tuple[int, str], Tensor],
    first_difference: Int[Tensor, " batch"],
    length: int,
) -> Rows:
    """List the rows to compute: the cells that can change the logits of the last position."""
    at_once = cells.shape[1] == 2 and sites[0].kind == "head"  # (layer, head): all positions
    positions = [range(length)] * len(sites) if at_once else [[int(t)] for t in cells.iloc[:, 1]]
    clean_run = len(next(iter(source.values()))) > 1  # a cache of one prompt serves the whole batch
    top = model.n_layers - 1
    listed: list[tuple[int, int, int, int, list[int]]] = []
    for c, (site, spots) in enumerate(zip(sites, positions, strict=True)):
        entry = site.layer + (site.kind != "resid_pre")
        last_only = site.layer == top and site.kind != "resid_pre"
        for b, parted in enumerate(first_difference.tolist()):
            live = [t % length for t in spots if t % length >= parted]
            if live and not (last_only and max(live) < length - 1):
                listed.append((entry, live[0], c, b, live))
    listed.sort(key=lambda row: row[:2])
    entry_, first, component, run_, live_ = zip(*listed, strict=True) if listed else ((),) * 5
    long = partial(torch.tensor, dtype=torch.long)
    return Rows(
        component=long(component),
        span=torch.zeros(len(listed), dtype=torch.long),
        row=long(run_),
        base_run=long(run_),
        source_run=long([b if clean_run else 0 for b in run_]),
        entry=long(entry_),
        first=long(first),
        n_patched=long([len(live) for live in live_]),
        patched=long([t for live in live_ for t in live]),
        length=length,
    )


def _chunks(model: Model, rows: Rows) -> Iterator[Packed]:
    start, tokens = 0, MEMORY // token_bytes(model)
    while start < len(rows):
        yield (p := Packed(rows.chunk(start, tokens), 1, model.n_layers))
        start += len(p.rows)


# ---- TransformerLens's names ------------------------------------------------------------------------


def _named(setter: Callable[..., Tensor], activation: str, *axes: str) -> Any:
    return partial(
        generic_activation_patch,
        patch_setter=setter,
        activation_name=activation,
        index_axis_names=axes,
    )


get_act_patch_resid_pre = _named(layer_pos_patch_setter, "resid_pre", "layer", "pos")
get_act_patch_resid_mid = _named(layer_pos_patch_setter, "resid_mid", "layer", "pos")
get_act_patch_attn_out = _named(layer_pos_patch_setter, "attn_out", "layer", "pos")
get_act_patch_mlp_out = _named(layer_pos_patch_setter, "mlp_out", "layer", "pos")
get_act_patch_attn_head_out_by_pos = _named(
    layer_pos_head_vector_patch_setter, "z", "layer", "pos", "head"
)
get_act_patch_attn_head_out_all_pos = _named(layer_head_vector_patch_setter, "z", "layer", "head")


def get_act_patch_block_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metrics, **options: Any
) -> Float[Tensor, "3 layer pos"]:
    """Patch resid_pre, attn_out and mlp_out of every layer and position; return them stacked."""
    given = (model, corrupted_tokens, clean_cache, metric)
    every = (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out)
    return torch.stack([patch(*given, **options) for patch in every])


def _padded(result: Tensor, model: Any) -> Tensor:
    """Fill up with zeros where keys and values have fewer heads than queries, as TransformerLens."""
    return torch.nn.functional.pad(result, (0, model.cfg.n_heads - result.shape[-1]))


def get_act_patch_attn_head_all_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metrics, **options: Any
) -> Float[Tensor, "5 layer head"]:
    """Patch output, query, key, value and pattern of every head at all positions; stack them."""
    given = (model, corrupted_tokens, clean_cache, metric)
    every = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return torch.stack([_padded(patch(*given, **options), model) for patch in every])


def get_act_patch_attn_head_by_pos_every(
    model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metrics, **options: Any
) -> Float[Tensor, "5 layer pos head"]:
    """Patch output, query, key, value and pattern of every head by position; return them stacked.

    The pattern is patched by destination position, as in TransformerLens.
    """
    given = (model, corrupted_tokens, clean_cache, metric)
    vectors = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
    )
    results = [_padded(patch(*given, **options), model) for patch in vectors]
    pattern = get_act_patch_attn_head_pattern_by_pos(*given, **options)
    return torch.stack([*results, pattern.transpose(1, 2)])


__all__ = [
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]

for _name in vars(theirs):  # what newer versions of TransformerLens add runs as it is there
    if _name.startswith("get_act_patch_") and _name not in globals():
        globals()[_name] = getattr(theirs, _name)
        __all__ += [_name]
