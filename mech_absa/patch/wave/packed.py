"""Step 2: lay the tokens of a chunk of rows end to end, one matrix row per token.

A row brings its positions from its first patched one on. Rows are sorted by the layer at which
they enter, so the rows, tokens and patched tokens that are live in a layer are always the first
so many: a `Stage`. The large products of the walk spend nothing on padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from .cells import Rows


class Stage(NamedTuple):
    """Hold how many rows have entered by a layer, and how many tokens and patched tokens they
    have.
    """

    rows: int
    tokens: int
    patched: int


class Bucket(NamedTuple):
    """Rows that share attention calls, because their first positions are close.

    Attributes:
        begin: no row of the bucket has a token left of this position.
        rows: sorted by base run, so that rows of one run stand together.
    """

    begin: int
    rows: Int[Tensor, " row"]


class Packed:
    """The tokens of a chunk of rows.

    Attributes:
        row, pos: of every token: its row, and its position in the prompt.
        patched, patched_row: the tokens that are patched, and their rows.
        begin, count: of every row: its first token, and how many tokens it has.
        n_reads: positions at the end of every row whose answer is read.
    """

    def __init__(self, rows: Rows, n_reads: int, n_layers: int):
        self.rows, self.n_reads, self.n_layers = rows, n_reads, n_layers
        self.count = rows.length - rows.first
        ends = self.count.cumsum(0)
        self.begin = ends - self.count
        self.row = torch.arange(len(rows)).repeat_interleave(self.count)
        self.pos = torch.arange(len(self.row)) - self.begin[self.row] + rows.first[self.row]
        self.patched_row = torch.arange(len(rows)).repeat_interleave(rows.n_patched)
        self.patched = self.begin[self.patched_row] + rows.patched - rows.first[self.patched_row]
        entered = torch.searchsorted(rows.entry, torch.arange(n_layers + 1), right=True)
        token_ends, patched_ends = [0, *ends.tolist()], [0, *rows.n_patched.cumsum(0).tolist()]
        self.stages = [Stage(n, token_ends[n], patched_ends[n]) for n in entered.tolist()]
        width = max(8, -(-rows.length // 8))  # an eighth of the prompt
        self._eighth = rows.first // width
        self._by_run = torch.argsort(rows.base_run, stable=True)
        self._buckets: dict[int, list[Bucket]] = {}

    def stage(self, layer: int) -> Stage:
        """Return what is live in a layer; nothing is below the first."""
        return self.stages[layer] if layer >= 0 else Stage(0, 0, 0)

    def changed(self, layer: int) -> Int[Tensor, " token"]:
        """Return the tokens whose input to a block differs from the base run's.

        These are all tokens of rows that entered earlier and the patched ones of those that join.
        """
        before, now = self.stage(layer - 1), self.stage(layer)
        return torch.cat([torch.arange(before.tokens), self.patched[before.patched : now.patched]])

    def read(self, layer: int) -> Int[Tensor, " token"]:
        """Return the tokens of the live rows whose answer is read, row after row."""
        ends = (self.begin + self.count)[: self.stage(layer).rows]
        return (ends[:, None] - self.n_reads + torch.arange(self.n_reads)).flatten()

    def buckets(self, layer: int) -> list[Bucket]:
        """Sort the live rows of a layer into buckets, an eighth of the prompt each."""
        n = self.stage(layer).rows
        if n not in self._buckets:  # asked for by the walk and by its FLOPs
            live = self._by_run[self._by_run < n]
            eighth, first = self._eighth[live], self.rows.first[live]
            self._buckets[n] = [
                Bucket(int(first[eighth == i].min()), live[eighth == i])
                for i in eighth.unique().tolist()
            ]
        return self._buckets[n]
