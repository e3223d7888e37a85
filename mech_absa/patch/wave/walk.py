"""Step 4: walk a chunk of rows through the layers.

    for every layer:
        join     rows that enter here bring the base run's stream with their patched tokens replaced
        block    run the block once on the tokens of all live rows
    late         rows that enter after the last block

Three things make a block cheap. Only *changed* tokens have new queries, keys and values; the other
tokens of rows that have just joined keep the base run's. Keys and values left of a row's first
token are the base run's. In the last block, only the tokens whose answer is read have a query, an
output and an MLP. Inside a window of layers, `put_back` restores the source's state again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...model import LayerStates, Model, Tap, Taps
from ...model.block import block
from ...sites import Site
from ..corruption import States
from ..job import window_layers
from .attention import attention
from .enter import ENTER, Here
from .packed import Packed


@dataclass(frozen=True, eq=False)
class Unpatched:
    """Unpatched runs.

    Attributes:
        states: what was kept of every block, `[run pos ...]`.
        last: the stream after the last block.
    """

    states: list[LayerStates]
    last: Float[Tensor, "run pos d_model"]


@runtime_checkable
class Swept(Protocol):
    """Describe what a walk must know of a sweep: its components, and how many layers go
    together.
    """

    @property
    def components(self) -> Sequence[Site]: ...
    @property
    def window(self) -> int: ...


class Walk:
    """Walks chunks of rows of one sweep.

    Args:
        model: what is traced.
        job: says what the rows' components and windows are.
        base: states of the runs that are patched.
        source: states that are put into them, `[run pos ...]`.
        memory: bytes that rows in flight may take.
    """

    def __init__(self, model: Model, job: Swept, base: Unpatched, source: States, memory: int):
        self.model, self.job, self.base, self.source = model, job, base, source
        on_cpu = model.device.type == "cpu"
        self.attention_bytes = max(1 << 20, min(memory // 8, 64 << 20 if on_cpu else memory))
        self.kinds = [c.kind for c in job.components]
        self.head = torch.tensor([-1 if c.head is None else c.head for c in job.components])
        self.window = [window_layers(c.layer, job.window, model.n_layers) for c in job.components]

    def __call__(self, p: Packed) -> Float[Tensor, "row read d_model"]:
        """Return the last residual stream of every row at the positions that are read."""
        model, n_layers = self.model, self.model.n_layers
        x = torch.empty(0, model.d_model, dtype=model.dtype, device=model.device)
        for layer in range(int(p.rows.entry[0]), n_layers):
            x = self.join(p, layer, x.to(model.block_device(layer)))
            x = self.block(p, layer, x)
        late = self.late(p)
        n = p.stage(n_layers - 1).rows
        return torch.cat([x.unflatten(0, (n, p.n_reads)).to(late.device), late]) if n else late

    def join(self, p: Packed, layer: int, x: Tensor) -> Float[Tensor, "token d_model"]:
        """Append the rows that enter here: the base run's stream, the patched tokens replaced."""
        before, now = p.stage(layer - 1), p.stage(layer)
        if now.tokens == before.tokens:
            return x
        fresh = self.of_base(p, layer, "resid_pre")
        joining = slice(before.patched, now.patched)
        where = (p.patched[joining] - before.tokens).to(x.device)
        fresh[where] = self.entering(p, p.patched_row[joining], p.rows.patched[joining], layer)
        return torch.cat([x, fresh])

    def block(self, p: Packed, layer: int, x: Tensor) -> Float[Tensor, "kept d_model"]:
        """Run one block; in the last one, only the tokens that are read go on."""
        model, device = self.model, x.device
        reading = layer == model.n_layers - 1
        tokens, kept = torch.arange(p.stage(layer).tokens), p.read(layer)
        changed, pos = p.changed(layer).to(device), p.pos[: len(tokens)].to(device)

        def attend(layer: int, x: Tensor) -> Tensor:
            new = model.qkv(layer, x if len(changed) == len(x) else x[changed], pos[changed])
            qkv = [self.or_base(p, layer, *named) for named in zip("qkv", new, strict=True)]
            return attention(model, layer, p, qkv, self.base.states[layer], self.attention_bytes)

        def mlp(layer: int, x: Tensor) -> Tensor:
            if not model.parallel or reading:
                return model.mlp_out(layer, x)
            return self.or_base(p, layer, "mlp_out", model.mlp_out(layer, x[changed]))

        return block(
            model,
            layer,
            x,
            attend,
            self.put_back(p, layer, tokens, kept if reading else tokens),
            keep=(lambda x: x[kept.to(device)]) if reading else None,
            mlp=mlp,
        )

    def late(self, p: Packed) -> Float[Tensor, "row read d_model"]:
        """Return the streams of rows that enter after the last block.

        Of those, only a patch at a position that is read can be seen.
        """
        n, left = p.stage(self.model.n_layers - 1).rows, p.rows.length - p.n_reads
        last = self.base.last[p.rows.base_run[n:].to(self.base.last.device), left:]
        seen = ((p.patched_row >= n) & (p.rows.patched >= left)).nonzero()[:, 0]
        if len(seen):
            row, at = p.patched_row[seen], p.rows.patched[seen]
            where = (row - n).to(last.device), (at - left).to(last.device)
            last[where] = self.entering(p, row, at, self.model.n_layers).to(last)
        return last

    def entering(
        self, p: Packed, row: Int[Tensor, " patch"], at: Int[Tensor, " patch"], layer: int
    ) -> Float[Tensor, "patch d_model"]:
        """Return the stream at patched tokens of rows that enter at `layer`, kind by kind."""
        component = p.rows.component[row]
        kind_of = torch.tensor([list(ENTER).index(k) for k in self.kinds])[component]
        device = self.model.block_device(min(layer, self.model.n_layers - 1))
        out = torch.empty(len(row), self.model.d_model, dtype=self.model.dtype, device=device)
        for i in kind_of.unique().tolist():
            kind, mine = list(ENTER)[i], (kind_of == i).nonzero()[:, 0]
            block = layer if kind == "resid_pre" else layer - 1
            source, states = self.source[block, kind], self.base.states[block]
            b, t = (y[mine].to(source.device) for y in (p.rows.base_run[row], at))
            s, head = p.rows.source_run[row][mine], self.head[component[mine]]
            here = Here(
                self.model,
                block,
                partial(_state_at, states, b, t),
                source[s.to(source.device), t],
                head.to(source.device),
            )
            out[mine.to(device)] = ENTER[kind](here).to(out)
        return out

    def of_base(self, p: Packed, layer: int, name: str) -> Tensor:
        """Return a state of the base run at the tokens of rows that join in this layer."""
        state = self.base.states[layer][name]
        joining = slice(p.stage(layer - 1).tokens, p.stage(layer).tokens)
        run, pos = p.rows.base_run[p.row[joining]], p.pos[joining]
        return state[run.to(state.device), pos.to(state.device)]

    def or_base(self, p: Packed, layer: int, name: str, new: Tensor) -> Tensor:
        """Spread `new`, which holds the changed tokens, over all; the others keep the base run's."""
        before, now = p.stage(layer - 1), p.stage(layer)
        if len(new) == now.tokens:
            return new
        fresh = self.of_base(p, layer, name)
        joined = p.patched[before.patched : now.patched] - before.tokens
        fresh[joined.to(fresh.device)] = new[before.tokens :]
        return torch.cat([new[: before.tokens], fresh])

    def put_back(
        self, p: Packed, layer: int, tokens: Int[Tensor, " token"], kept: Int[Tensor, " kept"]
    ) -> Taps:
        """Return taps that restore the source's state in rows whose window goes on in this layer.

        Args:
            tokens: those that enter the block.
            kept: those that leave the attention.
        """
        taps: dict[str, Tap] = {}
        if self.job.window == 1:
            return taps
        goes_on = [layer in window and layer != window[0] for window in self.window]
        for kind in {k for k, on in zip(self.kinds, goes_on, strict=True) if on}:
            ours = torch.tensor([k == kind and g for k, g in zip(self.kinds, goes_on, strict=True)])
            at_hand = tokens if kind == "resid_pre" else kept
            taps[kind] = self.restore(p, layer, kind, ours, at_hand)
        return taps

    def restore(
        self,
        p: Packed,
        layer: int,
        kind: str,
        ours: Bool[Tensor, " component"],
        at_hand: Int[Tensor, " token"],
    ) -> Tap:
        """Return a tap that puts the source's state back at patched tokens of some components."""
        now, source = p.stage(layer), self.source[layer, kind]
        place = torch.full((now.tokens,), -1)
        place[at_hand] = torch.arange(len(at_hand))
        place = place[p.patched[: now.patched]]
        row = p.patched_row[: now.patched]
        mine = (ours[p.rows.component[row]] & (place >= 0)).nonzero()[:, 0]
        run, at = p.rows.source_run[row[mine]], p.rows.patched[mine]
        where, value = place[mine], source[run.to(source.device), at.to(source.device)]
        return lambda x: x.index_copy(0, where.to(x.device), value.to(x))


def _state_at(
    states: LayerStates, run: Int[Tensor, " patch"], at: Int[Tensor, " patch"], name: str
) -> Tensor:
    """Return a state of one block at tokens `at` of runs `run`."""
    return states[name][run, at]
