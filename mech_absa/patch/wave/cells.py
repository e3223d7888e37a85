"""Step 1: list the rows of a sweep, one per (component, span, base run) that has to be computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..job import Job, window_layers


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows sorted by the layer at which they enter.

    Attributes:
        component, span, row: indices that say which cell of which row of the job a row is.
        base_run, source_run: the run that is patched, and the one that states are taken from.
        entry: layer at which it enters; the number of layers where it enters after the last.
        first: its leftmost patched position; tokens before it are the base run's.
        n_patched: how many positions it patches.
        patched: the patched positions of all rows, row after row.
        length: positions of the prompts, label tokens included.
    """

    component: Int[Tensor, " row"]
    span: Int[Tensor, " row"]
    row: Int[Tensor, " row"]
    base_run: Int[Tensor, " row"]
    source_run: Int[Tensor, " row"]
    entry: Int[Tensor, " row"]
    first: Int[Tensor, " row"]
    n_patched: Int[Tensor, " row"]
    patched: Int[Tensor, " patch"]
    length: int

    def __len__(self) -> int:
        return len(self.row)

    def chunk(self, start: int, tokens: int) -> Rows:
        """Return the rows from `start` on that have at most so many tokens; at least one row."""
        used = (self.length - self.first[start:]).cumsum(0)
        stop = start + max(1, int(torch.searchsorted(used, tokens, right=True)))
        ends = [0, *self.n_patched.cumsum(0).tolist()]
        return Rows(
            self.component[start:stop],
            self.span[start:stop],
            self.row[start:stop],
            self.base_run[start:stop],
            self.source_run[start:stop],
            self.entry[start:stop],
            self.first[start:stop],
            self.n_patched[start:stop],
            self.patched[ends[start] : ends[stop]],
            self.length,
        )


def rows_of(job: Job) -> Rows:
    """List the rows of a job.

    Positions left of the first difference hold the same state in both runs and are not patched.
    """
    draws = job.runs.draws
    c, s, b = (~job.zero()).nonzero(as_tuple=True)
    spans = [job.spans[i][j] for i, j in zip(b.tolist(), s.tolist(), strict=True)]
    lefts = [0 if job.ablation is not None else job.runs.pairs[i].first for i in b.tolist()]
    patched = [
        [t for t in span.positions if t >= left] for span, left in zip(spans, lefts, strict=True)
    ]
    entry = torch.tensor(
        [
            window_layers(x.layer, job.window, job.model.n_layers)[0] + (x.kind != "resid_pre")
            for x in job.components
        ]
    )[c]
    first = torch.tensor([p[0] for p in patched], dtype=torch.long)
    order = torch.argsort(entry * job.runs.length + first, stable=True)
    patched = [patched[i] for i in order.tolist()]
    n_patched = torch.tensor([len(p) for p in patched], dtype=torch.long)

    def per_draw(x: Tensor) -> Tensor:
        return x.repeat_interleave(draws)

    row = (b[order][:, None] * draws + torch.arange(draws)).flatten()
    return Rows(
        per_draw(c[order]),
        per_draw(s[order]),
        row,
        job.base.run[row],
        job.source.run[row],
        per_draw(entry[order]),
        per_draw(first[order]),
        per_draw(n_patched),
        torch.tensor([t for p in patched for _ in range(draws) for t in p], dtype=torch.long),
        job.runs.length,
    )
