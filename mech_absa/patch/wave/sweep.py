"""Step 6: run the two unpatched runs, then walk chunk after chunk of rows and read their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from ...errors import ModelError
from ...model import Model, run
from ...model.hooks import live_hooks
from ...sites import Site
from ..corruption import States
from ..job import Answers, Job, Part, Reader, Seen, Tick, pass_flops, zero_part
from ..request import Direction
from .cells import Rows, rows_of
from .enter import FIELD, needed
from .flops import walk_flops
from .packed import Packed
from .walk import Unpatched, Walk


def refusal(model: Model, components: Sequence[Site]) -> str | None:
    """Return why this engine cannot run a sweep; None where it can."""
    if model.refusal is not None:
        return f"{model.name} has {model.refusal}"
    if hooks := live_hooks(model):
        names = ", ".join(hooks[:3])
        return f"{model.name} carries hooks ({names}), which only the hooked forward pass obeys"
    if kinds := sorted({c.kind for c in components} - FIELD.keys()):
        return f"states of kind {', '.join(kinds)} are inside the attention"
    return None


class Ran(NamedTuple):
    """Both unpatched runs of a job; the corrupted one is None for ablations."""

    clean: Unpatched
    corrupted: Unpatched | None


@torch.inference_mode()
def run_unpatched(job: Job, directions: Iterable[str]) -> Ran:
    """Run clean and corrupted prompts once, keeping all that these directions need."""
    kinds = {c.kind for c in job.components}
    as_base, as_source = needed(job.model, kinds), {FIELD[kind] for kind in kinds}
    ablation, directions = job.ablation is not None, set(directions)
    denoise, noise = Direction.DENOISE in directions, Direction.NOISE in directions
    clean = (as_source if denoise or ablation else set()) | (as_base if noise else set())
    last, states = run(job.model, job.runs.clean, clean)
    if ablation:
        return Ran(Unpatched(states, last), None)
    corrupted = (as_base if denoise else set()) | (as_source if noise else set())
    corrupted_last, corrupted_states = run(job.model, job.runs.corrupted, corrupted)
    return Ran(Unpatched(states, last), Unpatched(corrupted_states, corrupted_last))


@torch.inference_mode()
def sweep(
    job: Job,
    memory: int = 512 << 20,
    tick: Tick | None = None,
    ran: Ran | None = None,
    seen: Seen | None = None,
) -> Answers:
    """Compute every cell of a job exactly.

    Args:
        job: pairs of one length and what is asked of them.
        memory: bytes that rows in flight may take.
        tick: told how many cells are done.
        ran: the unpatched runs, where they are known.
        seen: given the cells of every chunk; early layers are finished first.

    Raises:
        ModelError: this engine cannot run the job; `refusal` says why.
    """
    model = job.model
    if (why := refusal(model, job.components)) is not None:
        raise ModelError(f"the wavefront engine cannot run this: {why}; use --engine loop")
    read = Reader(job)
    ran = run_unpatched(job, [job.direction]) if ran is None else ran
    corrupted_last = None if ran.corrupted is None else ran.corrupted.last
    answers = read.unpatched(ran.clean.last, corrupted_last)
    rows = rows_of(job)
    walk = Walk(model, job, *_base_and_source(job, ran), memory)
    if tick is not None:
        tick(job.cells - len(rows))
    if seen is not None:
        seen(zero_part(job, answers))
    pair_of_row = job.pair_of_row()

    def answer(p: Packed) -> Tensor:
        return read(walk(p), pair_of_row[p.rows.row]).cpu()

    for p, scores in _chunks(job, rows, memory // token_bytes(model), answer):
        answers.patched[p.rows.component, p.rows.span, p.rows.row] = scores
        answers.flops += walk_flops(model, p, job.components)
        if tick is not None:
            tick(len(p.rows))
        if seen is not None:
            seen(Part(job, answers, p.rows.component, p.rows.span, p.rows.row))
    runs = len(job.runs.clean) + (0 if ran.corrupted is None else job.rows)
    answers.flops += runs * pass_flops(model, job.runs.length) + read.flops(len(rows) + runs)
    return answers


def _base_and_source(job: Job, ran: Ran) -> tuple[Unpatched, States]:
    """Return the run that is patched, and the states that are put into it."""
    clean, corrupted = ran
    if corrupted is None:
        base, source = clean, clean
    elif job.direction == Direction.DENOISE:
        base, source = corrupted, clean
    else:
        base, source = clean, corrupted
    states = {(layer, kind): source.states[layer][FIELD[kind]] for layer, kind in job.kinds()}
    if job.ablation is not None:
        states = job.ablation.states(states, job.runs.pairs, job.runs.length)
    return base, states


def _chunks(
    job: Job, rows: Rows, tokens: int, answer: Callable[[Packed], Tensor]
) -> Iterator[tuple[Packed, Tensor]]:
    """Answer chunks of at most so many tokens; where memory runs out, halve the chunk and go on."""
    start, cap = 0, max(rows.length, tokens)
    while start < len(rows):
        p = Packed(rows.chunk(start, cap), job.runs.continuation.reads, job.model.n_layers)
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
