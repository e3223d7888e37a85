"""Step 6: run the two unpatched runs, then walk chunk after chunk of rows and read their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ...errors import ModelError
from ...model import Model, run
from ...model.hooks import live_hooks
from ...sites import Site
from ..sweep import Answers, Job, Reader, States, pass_flops
from .cells import Rows, rows_of
from .enter import FIELD, needed
from .flops import walk_flops
from .packed import Packed
from .walk import BaseRun, Walk


def refusal(model: Model, components: Sequence[Site]) -> str | None:
    """Return why this engine cannot run a sweep; None where it can."""
    if model.refusal is not None:
        return f"{model.name} has {model.refusal}"
    if hooks := live_hooks(model.hooked):
        names = ", ".join(hooks[:3])
        return f"{model.name} carries hooks ({names}), which only the hooked forward pass obeys"
    if kinds := sorted({c.kind for c in components} - FIELD.keys()):
        return f"states of kind {', '.join(kinds)} are inside the attention"
    return None


@torch.inference_mode()
def sweep(
    model: Model, job: Job, memory: int = 512 << 20, tick: Callable[[int], None] | None = None
) -> Answers:
    """Compute every cell of a job exactly.

    Args:
        model: what is traced.
        job: pairs of one length and what is asked of them.
        memory: bytes that rows in flight may take.
        tick: told how many cells are done.

    Raises:
        ModelError: this engine cannot run the job; `refusal` says why.
    """
    if (why := refusal(model, job.components)) is not None:
        raise ModelError(f"the wavefront engine cannot run this: {why}; use --engine loop")
    read = Reader(model, job)
    base, source, source_last, source_run = both_runs(model, job)
    answers = unpatched(job, read, base.last, source_last)
    rows = rows_of(job, source_run)
    walk = Walk(model, job, base, source, memory)
    if tick is not None:
        tick(job.cells - len(rows))
    pair_of_row = job.pair_of_row()

    def answer(p: Packed) -> Tensor:
        return read(walk(p), pair_of_row[p.rows.base_run]).cpu()

    for p, scores in _chunks(model, job, rows, memory // token_bytes(model), answer):
        answers.patched[p.rows.component, p.rows.span, p.rows.base_run] = scores
        answers.flops += walk_flops(model, p, job.components)
        if tick is not None:
            tick(len(p.rows))
    runs = len(source_last) + job.rows
    answers.flops += runs * pass_flops(model, job.runs.length) + read.flops(len(rows) + runs)
    return answers


def both_runs(model: Model, job: Job) -> tuple[BaseRun, States, Tensor, Tensor]:
    """Run base and source unpatched.

    Returns:
        the base run; the states that are put into it; the source's last stream; and the source
        run of every base run. For ablations, the states are made from the clean run's.
    """
    source_x, source_run = job.source()
    source_last, source = states_of(model, source_x, job.kinds())
    if job.ablation is not None:
        source = job.ablation.states(source, job.runs.pairs, job.runs.length)
    last, states = run(model, job.base(), needed(model, {c.kind for c in job.components}))
    return BaseRun(states, last), source, source_last, source_run


def unpatched(job: Job, read: Reader, base_last: Tensor, source_last: Tensor) -> Answers:
    """Read the answers of the unpatched runs; until it is computed, a cell holds the base run's."""
    draws, n_reads = job.runs.draws, len(read.positions)
    of_row, of_pair = job.pair_of_row(), torch.arange(len(job.runs.pairs))
    base_tail, source_tail = base_last[:, -n_reads:], source_last[:, -n_reads:]
    if job.direction == "denoise":
        read.remember_clean(source_tail)
        clean = read(source_tail, of_pair).repeat_interleave(draws, dim=0)
        corrupted = base = read(base_tail, of_row)
    else:
        read.remember_clean(base_tail[::draws])
        clean = base = read(base_tail, of_row)
        no_run = job.ablation is not None
        corrupted = torch.full_like(clean, torch.nan) if no_run else read(source_tail, of_row)
    patched = base.expand(len(job.components), job.n_spans, *base.shape).cpu().clone()
    return Answers(patched, base.cpu(), clean.cpu(), corrupted.cpu())


def _chunks(
    model: Model, job: Job, rows: Rows, tokens: int, answer: Callable[[Packed], Tensor]
) -> Iterator[tuple[Packed, Tensor]]:
    """Answer chunks of at most so many tokens; where memory runs out, halve the chunk and go on."""
    start, cap = 0, max(rows.length, tokens)
    while start < len(rows):
        p = Packed(rows.chunk(start, cap), job.runs.continuation.reads, model.n_layers)
        scores = None
        try:
            scores = answer(p)
        except Exception as error:
            if not should_reduce_batch_size(error) or len(p.rows) == 1:
                raise
        if scores is None:  # out here, where the failed attempt's tensors are gone
            cap = len(p.row) // 2  # half of what was tried, which may be far below the budget
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        yield p, scores
        start += len(p.rows)


def states_of(model: Model, x: Tensor, kinds: set[tuple[int, str]]) -> tuple[Tensor, States]:
    """Run once; return the last residual stream and the activations at (layer, kind)."""
    last, layers = run(model, x, {FIELD[kind] for _, kind in kinds})
    return last, {(layer, kind): layers[layer][FIELD[kind]] for layer, kind in kinds}


def token_bytes(model: Model) -> int:
    """Return the bytes in flight per packed token: stream, sums, queries, keys, values, inputs."""
    heads = (3 * model.n_heads + 4 * model.n_kv_heads) * model.d_head
    return (9 * model.d_model + heads) * model.dtype.itemsize + 32


def base_bytes(model: Model, kinds: set[str]) -> int:
    """Return the bytes kept of the base run per token, over all layers."""
    z = model.n_heads * model.d_head
    streams = len(needed(model, kinds) - {"q", "k", "v", "z"})
    per_layer = streams * model.d_model + z + 2 * model.n_kv_heads * model.d_head
    per_layer += z if "head" in kinds else 0
    return model.n_layers * per_layer * model.dtype.itemsize


def source_bytes(model: Model, kinds: set[str]) -> int:
    """Return the bytes kept of the source run per token, over all layers."""
    z = model.n_heads * model.d_head
    widths = sum(z if kind == "head" else model.d_model for kind in kinds)
    return model.n_layers * widths * model.dtype.itemsize
