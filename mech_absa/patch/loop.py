"""The reference: one hooked forward pass for every cell.

    for every component c and span s:
        run the base input with c overwritten at s by the source's state; read the labels

It is slow and obvious. Everything else in this package has to agree with it, and what the wave
cannot run is run here. Rows (pairs x draws) of a job share a forward pass; nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from ..model import Model
from ..model.hooks import capture, intervene
from ..sites import HEAD_KINDS, Site
from .corruption import States
from .job import Answers, Job, Part, Reader, Seen, Tick, pass_flops, window_layers, zero_part


@torch.inference_mode()
def states(model: Model, x: Tensor, kinds: set[tuple[int, str]]) -> tuple[Tensor, States]:
    """Run once with hooks; return the last residual stream and the activations at (layer, kind)."""
    sites = {key: Site(*key, 0 if key[1] in HEAD_KINDS else None) for key in kinds}
    with capture(model, sites.values()) as seen:
        last = model.run_hooked(x)
    return last, {key: seen[site] for key, site in sites.items()}


@torch.inference_mode()
def sweep(job: Job, memory: int = 0, tick: Tick | None = None, seen: Seen | None = None) -> Answers:
    """Compute every cell of a job exactly.

    Args:
        job: pairs of one length and what is asked of them.
        memory: not used; all rows of a cell share a pass.
        tick: told how many cells are done.
        seen: given every cell, draw by draw, when it is computed.
    """
    read = Reader(job)
    _, source = states(job.model, job.source.inputs, job.kinds())
    if job.ablation is not None:
        source = job.ablation.states(source, job.runs.pairs, job.runs.length)
    clean = job.model.run_hooked(job.runs.clean)
    corrupted = None if job.ablation is not None else job.model.run_hooked(job.runs.corrupted)
    answers = read.unpatched(clean, corrupted)

    base = job.base.inputs[job.base.run.to(job.base.inputs.device)]
    zero, exists, pair_of_row = job.zero(), job.exists(), job.pair_of_row()
    if seen is not None:
        seen(zero_part(job, answers))
    passes = len(job.source.inputs) + len(clean) + (0 if corrupted is None else len(corrupted))
    for c, component in enumerate(job.components):
        for s in range(job.n_spans):
            if not bool(zero[c, s].all()):
                passes += job.rows
                mask = _mask(job, c, s, zero)
                layers = window_layers(component.layer, job.window, job.model.n_layers)
                sites = {
                    Site(layer, component.kind, component.head): _put(
                        source[layer, component.kind], component.head, job, mask
                    )
                    for layer in layers
                }
                with intervene(job.model, sites, times=1):
                    last = job.model.run_hooked(base)[:, list(read.positions)]
                touched = mask.any(1)
                answers.patched[c, s, touched] = read(last, pair_of_row).cpu()[touched]
                if seen is not None:
                    rows = touched.nonzero()[:, 0]
                    at = torch.full_like(rows, c), torch.full_like(rows, s)
                    seen(Part(job, answers, *at, rows))
            if tick is not None:
                tick(int(exists[c, s].sum()) * job.runs.draws)
    answers.flops = passes * pass_flops(job.model, job.runs.length) + read.flops(passes)
    return answers


def _mask(job: Job, c: int, s: int, zero: Tensor) -> Bool[Tensor, "row pos"]:
    """Return the positions of every row that a cell patches."""
    mask = torch.zeros(job.rows, job.runs.length, dtype=torch.bool)
    for row, b in enumerate(job.pair_of_row().tolist()):
        if not zero[c, s, b]:
            mask[row, list(job.spans[b][s].positions)] = True
    return mask


def _put(
    state: Tensor, head: int | None, job: Job, mask: Bool[Tensor, "row pos"]
) -> Callable[[Tensor], Tensor]:
    """Return a function that overwrites an activation by the source's state where the mask says."""
    value = state[job.source.run.to(state.device)]
    value = value if head is None else value[:, :, head]
    return lambda act: torch.where(mask[..., None].to(act.device), value.to(act), act)
