"""The reference: one hooked forward pass for every cell.

    for every component c and span s:
        run the base input with c overwritten at s by the source's state; read the labels

Slow and obvious. Everything else in this package has to agree with it, and what the wavefront refuses is run here. Rows (pairs x draws)
of a job share a forward pass; nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import Model
from ..model.hooks import capture, intervene
from ..sites import HEAD_KINDS, Site
from .corruption import States
from .sweep import Answers, Job, Reader, pass_flops, window_layers


def _any_head(layer: int, kind: str) -> Site:
    return Site(layer, kind, 0 if kind in HEAD_KINDS else None)


@torch.inference_mode()
def states(model: Model, x: Tensor, kinds: set[tuple[int, str]]) -> tuple[Tensor, States]:
    """One hooked pass: the last residual stream, and the activations at (layer, kind)."""
    sites = {key: _any_head(*key) for key in kinds}
    with capture(model.hooked, sites.values()) as seen:
        last = model.hooked.forward(x, start_at_layer=0, stop_at_layer=model.n_layers)
    return last, {key: seen[site] for key, site in sites.items()}


@torch.inference_mode()
def sweep(model: Model, job: Job, tick: Callable[[int], None] | None = None) -> Answers:
    """Every cell of a job, exactly.

    Args:
        model: what is traced.
        job: pairs of one length and what is asked of them.
        tick: told how many cells are done.
    """
    read = Reader(model, job)
    pair_of_row = job.pair_of_row()
    columns = list(read.positions)
    source_x, source_row = job.source()
    _, source = states(model, source_x, job.kinds())
    if job.ablation is not None:
        source = job.ablation.states(source, job.runs.pairs, job.runs.length)

    def last_of(x: Tensor) -> Tensor:
        return model.hooked.forward(x, start_at_layer=0, stop_at_layer=model.n_layers)[:, columns]

    clean_last = last_of(job.runs.clean)
    read.remember_clean(clean_last)
    draws = job.runs.draws
    clean = read(clean_last, torch.arange(len(job.runs.pairs))).repeat_interleave(draws, dim=0)
    corrupted = (
        torch.full_like(clean, torch.nan)
        if job.ablation is not None
        else read(last_of(job.runs.corrupted), pair_of_row)
    )
    base_x = job.base()
    base = read(last_of(base_x), pair_of_row)

    zero = job.zero()
    passes = len(source_x) + 3 * job.rows
    patched = base.expand(len(job.components), job.n_spans, *base.shape).clone()
    for c, component in enumerate(job.components):
        layers = window_layers(component.layer, job.window, model.n_layers)
        for s in range(job.n_spans):
            if bool(zero[c, s].all()):
                continue
            passes += job.rows
            mask = torch.zeros(job.rows, job.runs.length, dtype=torch.bool)
            for row, b in enumerate(pair_of_row.tolist()):
                if not zero[c, s, b]:
                    mask[row, list(job.spans[b][s].positions)] = True

            def put(
                layer: int, mask: Tensor = mask, component: Site = component
            ) -> Callable[[Tensor], Tensor]:
                value = source[layer, component.kind]
                value = (
                    value[source_row.to(value.device)]
                    if component.head is None
                    else value[source_row.to(value.device)][:, :, component.head]
                )
                return lambda act: torch.where(mask[..., None].to(act.device), value.to(act), act)

            sites = {Site(layer, component.kind, component.head): put(layer) for layer in layers}
            with intervene(model.hooked, sites, times=1):
                touched = mask.any(1).to(base.device)
                patched[c, s, touched] = read(last_of(base_x), pair_of_row)[touched]
        if tick is not None:
            tick(job.n_spans * job.rows)
    flops = passes * pass_flops(model, job.runs.length) + read.flops(passes)
    return Answers(patched.cpu(), base.cpu(), clean.cpu(), corrupted.cpu(), flops)
