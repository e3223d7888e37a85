"""The engine: every cell of a sweep in one walk over the layers, exact.

In a causal decoder a state restored at (layer l, position t) changes nothing below l and nothing left of t. So a cell need not be a
forward pass: it is a *perturbation of the residual stream at a few positions that enters at one layer*, and from there on it needs only
the positions from t on, reading keys and values of the positions before t from the base run.

| component | enters | work before it enters |
|---|---|---|
| resid_pre(l) | at l | none |
| resid_post(l), mlp_out(l) | at l+1 | none: swap, or add source - base |
| resid_mid(l), attn_out(l) | at l+1 | one MLP on the patched positions (none in parallel blocks) |
| head(l, h) | at l+1 | (z_source - z_base) W_O[h], then as attn_out |

The wave walks the layers once. At layer m the rows that enter there join, and the block runs once on the tokens of all live rows,
*packed*: one row of a matrix a token, whatever prompt and cell it belongs to, so the large products spend nothing on padding. Where
a row has just joined, only its patched tokens have new queries, keys and values. In the last block only the positions that are read
have a query, an output and an MLP. One row a cell is unembedded. Cells that are zero for certain never join (`Job.zero`).

Against one forward pass a cell this is a factor of 4 for large models and 7 for GPT-2 small (`benchmarks/README.md` derives the floor);
the weights are read once a layer and chunk instead of once a layer and cell, which is worth as much again.

With a window of layers (ROME: 10 for attention and MLP) a row joins at the window's first layer, and the source's state is put back
inside every further block of the window. Noise draws are rows. Label tokens are positions like any other.

What this cannot run it refuses by name (`refusal`), and `trace` hands the job to `loop`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ModelError
from ..model import LayerStates, Model, run
from ..model.hooks import live_hooks
from ..sites import Site
from .sweep import Answers, Job, Reader, States, pass_flops, window_layers

FIELD = {
    "resid_pre": "resid_pre", "resid_mid": "resid_mid", "resid_post": "resid_post",
    "attn_out": "attn_out", "mlp_out": "mlp_out", "head": "z",
}  # fmt: skip
"""Kind of site -> the field of `LayerStates` that holds it. These are the kinds the wave can carry."""


def refusal(model: Model, components: list[Site]) -> str | None:
    """Why the wave cannot run this; None where it can."""
    if model.refusal is not None:
        return f"{model.name} has {model.refusal}"
    if hooks := live_hooks(model.hooked):
        return f"{model.name} carries hooks ({', '.join(hooks[:3])}), which only the hooked forward pass obeys"
    if kinds := sorted({c.kind for c in components} - FIELD.keys()):
        return f"states of kind {', '.join(kinds)} are inside the attention"
    return None


def states_of(model: Model, x: Tensor, kinds: set[tuple[int, str]]) -> tuple[Tensor, States]:
    """One pass: the last residual stream and the activations at (layer, kind)."""
    last, layers = run(model, x, {FIELD[kind] for _, kind in kinds})
    return last, {(layer, kind): getattr(layers[layer], FIELD[kind]) for layer, kind in kinds}


def token_bytes(model: Model) -> int:
    """Bytes in flight for each packed token of a wave: the stream, the sums, queries, keys, values and what feeds them."""
    heads = (3 * model.n_heads + 4 * model.n_kv_heads) * model.d_head
    return (9 * model.d_model + heads) * model.dtype.itemsize + 32


def base_bytes(model: Model, kinds: set[str]) -> int:
    """Bytes kept of the base run for each of its tokens, over all layers."""
    per_layer = model.d_model + (model.n_heads + 2 * model.n_kv_heads) * model.d_head
    per_layer += (
        model.d_model * len(_kept(model, kinds) - {"resid_pre", "q", "k", "v", "z"})
        + ("head" in kinds) * model.n_heads * model.d_head
    )
    return model.n_layers * per_layer * model.dtype.itemsize


def source_bytes(model: Model, kinds: set[str]) -> int:
    """Bytes kept of the source run for each of its tokens, over all layers."""
    widths = {
        kind: model.n_heads * model.d_head if kind == "head" else model.d_model for kind in kinds
    }
    return model.n_layers * sum(widths.values()) * model.dtype.itemsize


def _kept(model: Model, kinds: set[str]) -> set[str]:
    """What is needed of the base run: its stream, queries, keys and values, and what entering rows are made from."""
    keep = {"resid_pre", "q", "k", "v"}
    if "mlp_out" in kinds:
        keep.add("resid_mid")
    if "head" in kinds:
        keep |= {"z", "projected"}
    if model.parallel:
        keep.add("mlp_out")
    return keep


@torch.inference_mode()
def sweep(
    model: Model, job: Job, memory: int = 512 << 20, tick: Callable[[int], None] | None = None
) -> Answers:
    """Every cell of a job, exactly.

    Args:
        model: what is traced.
        job: pairs of one length and what is asked of them.
        memory: bytes that rows in flight may take.
        tick: told how many cells are done.

    Raises:
        ModelError: the wave cannot run this; `refusal` says why.
    """
    if (why := refusal(model, list(job.components))) is not None:
        raise ModelError(f"the wavefront engine cannot run this: {why}; use --engine loop")
    read = Reader(model, job)
    n_reads = len(read.positions)
    pair_of_row = job.pair_of_row()
    kinds = {c.kind for c in job.components}
    draws = job.runs.draws

    # The two unpatched runs. One of them is the base, the other the source; for ablations the clean run is both.
    source_x, source_row = job.source()
    source_last, source = states_of(model, source_x, job.kinds())
    if job.ablation is not None:
        source = job.ablation.states(source, job.runs.pairs, job.runs.length)
    base_last, base = run(model, job.base(), _kept(model, kinds))
    tails = {"source": source_last[:, -n_reads:], "base": base_last[:, -n_reads:]}
    if job.direction == "denoise":
        clean_tail, clean_pairs = tails["source"], torch.arange(len(job.runs.pairs))
        read.remember_clean(clean_tail)
        clean = read(clean_tail, clean_pairs).repeat_interleave(draws, dim=0)
        corrupted = base_scores = read(tails["base"], pair_of_row)
    else:
        read.remember_clean(tails["base"][::draws])
        clean = base_scores = read(tails["base"], pair_of_row)
        corrupted = (
            torch.full_like(clean, torch.nan)
            if job.ablation is not None
            else read(tails["source"], pair_of_row)
        )

    patched = base_scores.expand(len(job.components), job.n_spans, *base_scores.shape).cpu().clone()
    rows = _rows(job, source_row, model.n_layers)
    walk = _Walk(model, job, base, base_last, source, memory)
    cap = max(job.runs.length, memory // token_bytes(model))
    if tick is not None:
        tick(patched.shape[0] * patched.shape[1] * patched.shape[2] - len(rows))
    start = 0
    while start < len(rows):
        stop = rows.fill(start, cap)
        out_of_memory = False
        try:
            chunk = rows[start:stop]
            patched[chunk.component, chunk.span, chunk.row] = read(
                walk(chunk), pair_of_row[chunk.row]
            ).cpu()
        except Exception as error:
            if not should_reduce_batch_size(error) or stop - start == 1:
                raise
            out_of_memory = True
        if out_of_memory:  # out here, where the failed attempt's tensors are gone
            cap = (
                int((job.runs.length - rows.first[start:stop]).sum()) // 2
            )  # half of what was tried, which may be far below the budget
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        if tick is not None:
            tick(stop - start)
        start = stop
    runs = len(source_x) + job.rows
    flops = walk.flops + runs * pass_flops(model, job.runs.length) + read.flops(len(rows) + runs)
    return Answers(patched, base_scores.cpu(), clean.cpu(), corrupted.cpu(), flops)


@dataclass(eq=False)
class _Rows:
    """Rows of a wave: one for every cell, pair and draw that has to be computed, sorted by the layer at which they enter.

    All `[row]`; the patched positions of all rows are laid end to end in `at`, row r's between `at_end[r-1]` and `at_end[r]`.
    """

    component: Int[Tensor, " row"]
    span: Int[Tensor, " row"]
    row: Int[Tensor, " row"]  # base run
    source: Int[Tensor, " row"]  # source run
    entry: Int[Tensor, " row"]
    first: Int[Tensor, " row"]  # leftmost patched position
    n_at: Int[Tensor, " row"]
    at: Int[Tensor, " at"]
    length: int

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, part: slice) -> _Rows:
        ends = torch.cat([torch.zeros(1, dtype=torch.long), self.n_at.cumsum(0)])
        at = self.at[ends[part.start] : ends[part.stop]]
        fields = {
            name: getattr(self, name)[part]
            for name in ("component", "span", "row", "source", "entry", "first", "n_at")
        }
        return _Rows(**fields, at=at, length=self.length)

    def fill(self, start: int, tokens: int) -> int:
        """The end of the longest run of rows from `start` with at most so many tokens; at least one row."""
        used = (self.length - self.first[start:]).cumsum(0)
        return start + max(1, int(torch.searchsorted(used, tokens, right=True)))


def _rows(job: Job, source_row: Int[Tensor, " row"], n_layers: int) -> _Rows:
    draws = job.runs.draws
    c, s, b = (~job.zero()).nonzero(as_tuple=True)
    # Positions of a span left of the first difference hold the same state in both runs; they need no patching.
    keep = [
        [[p for p in span.positions if p >= pair.first] for span in spans]
        for pair, spans in zip(job.runs.pairs, job.spans, strict=True)
    ]
    if job.ablation is not None:
        keep = [[list(span.positions) for span in spans] for spans in job.spans]
    bottom = torch.tensor(
        [
            window_layers(x.layer, job.window, n_layers)[0] + (x.kind != "resid_pre")
            for x in job.components
        ]
    )
    first = torch.tensor(
        [[k[i][0] if i < len(k) and k[i] else 0 for i in range(job.n_spans)] for k in keep]
    )
    entry = bottom[c]
    order = torch.argsort(entry * job.runs.length + first[b, s], stable=True)
    c, s, b, entry = c[order], s[order], b[order], entry[order]
    count = torch.tensor(
        [[len(k[i]) if i < len(k) else 0 for i in range(job.n_spans)] for k in keep]
    )[b, s].repeat_interleave(draws)
    at = [
        p
        for i, j in zip(b.tolist(), s.tolist(), strict=True)
        for _ in range(draws)
        for p in keep[i][j]
    ]
    row = (b[:, None] * draws + torch.arange(draws)).flatten()
    spread = lambda x: x.repeat_interleave(draws)  # noqa: E731
    return _Rows(
        spread(c),
        spread(s),
        row,
        source_row[row],
        spread(entry),
        spread(first[b, s]),
        count,
        torch.tensor(at, dtype=torch.long),
        job.runs.length,
    )


class _Walk:
    """One chunk of rows through the layers."""

    def __init__(
        self,
        model: Model,
        job: Job,
        base: list[LayerStates],
        base_last: Tensor,
        source: States,
        memory: int,
    ):
        self.model, self.job, self.base, self.base_last, self.source = (
            model,
            job,
            base,
            base_last,
            source,
        )
        self.T = job.runs.length
        self.n_reads = job.runs.continuation.reads
        self.attention_bytes = max(
            1 << 20, min(memory // 8, 64 << 20 if model.device.type == "cpu" else memory // 8)
        )
        self.kind = [c.kind for c in job.components]
        self.head = torch.tensor([-1 if c.head is None else c.head for c in job.components])
        self.window = [window_layers(c.layer, job.window, model.n_layers) for c in job.components]
        self.flops = 0

    def __call__(self, rows: _Rows) -> Float[Tensor, "row read d_model"]:
        """The last residual stream of every row at the positions that are read."""
        model, T = self.model, self.T
        L = model.n_layers
        lengths = T - rows.first
        ends = lengths.cumsum(0)
        offset = ends - lengths  # where a row's tokens begin
        tok_row = torch.arange(len(rows)).repeat_interleave(lengths)
        tok_pos = torch.arange(int(ends[-1])) - offset[tok_row] + rows.first[tok_row]
        at_row = torch.arange(len(rows)).repeat_interleave(rows.n_at)
        at_tok = offset[at_row] + rows.at - rows.first[at_row]
        at_ends = rows.n_at.cumsum(0)
        width = max(
            8, -(-T // 8)
        )  # rows whose first positions fall in the same eighth of the prompt share an attention call
        buckets = [
            (b * width, ids)
            for b in range(-(-T // width))
            if len(ids := (rows.first // width == b).nonzero()[:, 0])
        ]
        live = torch.searchsorted(
            rows.entry, torch.arange(L + 1), right=True
        ).tolist()  # rows that have entered by each layer

        first_layer = int(rows.entry[0])
        x = torch.empty(0, model.d_model, dtype=model.dtype, device=model.device)
        last = torch.empty(
            len(rows), self.n_reads, model.d_model, dtype=model.dtype, device=self.base_last.device
        )
        n_old = 0
        for layer in range(first_layer, L):
            n = live[layer]
            device = model.block_device(layer)
            base = self.base[layer]
            old, tokens = (int(ends[n_old - 1]) if n_old else 0), (int(ends[n - 1]) if n else 0)
            joining = slice(
                int(at_ends[n_old - 1]) if n_old else 0, int(at_ends[n - 1]) if n else 0
            )
            row_of, pos_of = rows.row[tok_row[:tokens]].to(device), tok_pos[:tokens].to(device)
            x = x.to(device)

            # Rows that enter here: the base run's stream with the patched positions replaced.
            if tokens > old:
                fresh = base.resid_pre[row_of[old:], pos_of[old:]]
                fresh[(at_tok[joining] - old).to(device)] = self._entering(
                    rows, at_row[joining], rows.at[joining], layer
                )
                x = torch.cat([x, fresh])
            x = self._again("resid_pre", layer, x, rows, at_row, at_tok, n)

            # Queries, keys and values change at every token of old rows, and at the patched tokens of new ones.
            changed = torch.cat([torch.arange(old), at_tok[joining]]).to(device)
            q, k, v = model.qkv(layer, x[changed] if tokens > old else x, pos_of[changed])
            self.flops += model.flops("qkv", len(changed))
            if tokens > old:
                here = (at_tok[joining] - old).to(device)
                q, k, v = (
                    self._spread(y, kept, row_of[old:], pos_of[old:], here, old)
                    for y, kept in ((q, base.q), (k, base.k), (v, base.v))
                )

            final = layer == L - 1
            if final:  # only the positions that are read go on
                wanted = (
                    (ends[:n, None] - self.n_reads + torch.arange(self.n_reads))
                    .flatten()
                    .to(device)
                )
            z = self._attention(
                layer, q, k, v, rows, buckets, n, offset, lengths, tok_row, tok_pos, final
            )
            del q, k, v
            attn_out = model.attn_out(layer, model.project(layer, z))
            self.flops += model.flops("project", len(z))
            del z
            self.flops += model.flops(
                "mlp", len(attn_out) if final or not model.parallel else len(changed)
            )
            if final:
                x = x[wanted]
                mid = x + self._again_final("attn_out", layer, attn_out, rows, n)
                mid = self._again_final("resid_mid", layer, mid, rows, n)
                x = mid + self._again_final(
                    "mlp_out", layer, model.mlp_out(layer, x if model.parallel else mid), rows, n
                )
                last[:n] = (
                    self._again_final("resid_post", layer, x, rows, n)
                    .unflatten(0, (n, self.n_reads))
                    .to(last.device)
                )
                break
            attn_out = self._again("attn_out", layer, attn_out, rows, at_row, at_tok, n)
            mid = x + attn_out
            mid = self._again("resid_mid", layer, mid, rows, at_row, at_tok, n)
            if not model.parallel:
                mlp_out = model.mlp_out(layer, mid)
            elif (
                tokens > old
            ):  # a parallel MLP reads the block's input: unchanged tokens keep the base run's output
                mlp_out = torch.cat(
                    [
                        attn_out.new_empty(old, model.d_model),
                        base.mlp_out[row_of[old:], pos_of[old:]],
                    ]
                )
                mlp_out[changed] = model.mlp_out(layer, x[changed])
            else:
                mlp_out = model.mlp_out(layer, x)
            x = mid + self._again("mlp_out", layer, mlp_out, rows, at_row, at_tok, n)
            x = self._again("resid_post", layer, x, rows, at_row, at_tok, n)
            n_old = n

        n = live[L - 1]
        if (
            n < len(rows)
        ):  # rows that enter after the last block: only a patch at a position that is read can be seen
            late = slice(int(at_ends[n - 1]) if n else 0, len(rows.at))
            last[n:] = self.base_last[rows.row[n:].to(last.device), -self.n_reads :]
            seen = (rows.at[late] >= T - self.n_reads).nonzero()[:, 0] + late.start
            if len(seen):
                where = (
                    at_row[seen].to(last.device),
                    (rows.at[seen] - (T - self.n_reads)).to(last.device),
                )
                last[where] = self._entering(rows, at_row[seen], rows.at[seen], L).to(last.device)
        return last

    @staticmethod
    def _spread(
        y: Tensor, kept: Tensor, row_of: Tensor, pos_of: Tensor, here: Tensor, old: int
    ) -> Tensor:
        """Computed values of old and patched tokens, the base run's for the other tokens of new rows."""
        fresh = kept[row_of, pos_of]
        fresh[here] = y[old:]
        return torch.cat([y[:old], fresh])

    def _entering(
        self, rows: _Rows, row: Int[Tensor, " at"], at: Int[Tensor, " at"], layer: int
    ) -> Float[Tensor, "at d_model"]:
        """The residual stream at the patched positions of rows that enter at `layer` (which may be the one after the last)."""
        model = self.model
        component = rows.component[row]
        out: Tensor | None = None
        for kind in sorted({self.kind[c] for c in component.unique().tolist()}):
            mine = torch.tensor([self.kind[c] == kind for c in range(len(self.kind))])[
                component
            ].nonzero()[:, 0]
            origin = layer if kind == "resid_pre" else layer - 1
            source = self.source[origin, kind]
            device = source.device
            s, b, p = (
                rows.source[row[mine]].to(device),
                rows.row[row[mine]].to(device),
                at[mine].to(device),
            )
            value = source[s, p]
            base = self.base[origin]
            if kind == "mlp_out":
                value = base.resid_mid[b, p] + value
            elif kind == "resid_mid":
                self.flops += model.flops("mlp", len(mine))
                value = value + model.mlp_out(origin, value)
            elif kind in ("attn_out", "head"):
                if kind == "head":
                    value = model.attn_out(
                        origin,
                        base.projected[b, p]
                        + self._head_delta(
                            origin, value, base.z[b, p], self.head[component[mine]].to(device)
                        ),
                    )
                mid = base.resid_pre[b, p] + value
                self.flops += (kind == "head") * len(mine) * 2 * model.d_head * model.d_model + (
                    not model.parallel
                ) * model.flops("mlp", len(mine))
                value = mid + (base.mlp_out[b, p] if model.parallel else model.mlp_out(origin, mid))
            if out is None:
                out = torch.empty(len(row), model.d_model, dtype=value.dtype, device=device)
            out[mine.to(device)] = value.to(out)
        assert out is not None
        return out

    def _head_delta(
        self, layer: int, source: Tensor, base: Tensor, head: Int[Tensor, " at"]
    ) -> Float[Tensor, "at d_model"]:
        """(z_source - z_base)[h] W_O[h]: what replacing one head's z does to the attention's sum."""
        W_O = self.model.hooked.blocks[layer].attn.W_O
        delta = torch.empty(len(head), self.model.d_model, dtype=source.dtype, device=source.device)
        for h in head.unique().tolist():
            mine = head == h
            delta[mine] = (source[mine, h] - base[mine, h]) @ W_O[h]
        return delta

    def _attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: _Rows, buckets: list[tuple[int, Tensor]], n: int,
        offset: Tensor, lengths: Tensor, tok_row: Tensor, tok_pos: Tensor, final: bool,
    ) -> Float[Tensor, "token head d_head"]:  # fmt: skip
        """z of the live tokens (of the read positions only, in the last block), rows of similar first position together."""
        model, T, base = self.model, self.T, self.base[layer]
        device = q.device
        z = q.new_empty(n * self.n_reads if final else len(q), *q.shape[1:])
        for begin, ids in buckets:
            ids = ids[: int(torch.searchsorted(ids, n))]
            begin = max(begin, int(rows.first[ids].min())) if len(ids) else begin
            asked = torch.arange(T - self.n_reads if final else begin, T, device=device)
            row_bytes = q.element_size() * (
                (2 * model.n_kv_heads * T + 3 * model.n_heads * len(asked)) * model.d_head
                + 3 * model.n_heads * len(asked) * T
            )
            for part in ids.split(max(1, self.attention_bytes // row_bytes)):
                m = lengths[part]
                local = torch.arange(len(part)).repeat_interleave(m)
                tok = torch.arange(int(m.sum())) - (m.cumsum(0) - m)[local] + offset[part][local]
                pos = tok_pos[tok]
                local, tok, pos = local.to(device), tok.to(device), pos.to(device)
                which = rows.row[part].to(device)
                keys, values = (
                    base.k[which],
                    base.v[which],
                )  # copies: the base run's, overwritten from the row's first position on
                keys[local, pos], values[local, pos] = k[tok], v[tok]
                self.flops += model.flops("attend", len(part) * len(asked) * T)
                if final:
                    read = (
                        (offset[part] + lengths[part])[:, None]
                        - self.n_reads
                        + torch.arange(self.n_reads)
                    )
                    done = model.attend(layer, q[read.to(device)], keys, values, asked)
                    where = (
                        (part[:, None] * self.n_reads + torch.arange(self.n_reads))
                        .flatten()
                        .to(device)
                    )
                    z[where] = done.flatten(0, 1)
                    continue
                queries = q.new_zeros(len(part), len(asked), *q.shape[1:])
                queries[local, pos - begin] = q[tok]
                z[tok] = model.attend(layer, queries, keys, values, asked)[local, pos - begin]
        return z

    # Windows: the source's state is put back inside every further block of the window.

    def _inside(self, kind: str, layer: int, rows: _Rows, n: int) -> Tensor | None:
        """Which of the live rows have this state put back in this layer; None for none."""
        if self.job.window == 1:
            return None
        mine = torch.tensor(
            [
                k == kind and layer in w and layer != w[0]
                for k, w in zip(self.kind, self.window, strict=True)
            ]
        )
        chosen = mine[rows.component[:n]]
        return chosen if bool(chosen.any()) else None

    def _again(
        self, kind: str, layer: int, x: Tensor, rows: _Rows, at_row: Tensor, at_tok: Tensor, n: int
    ) -> Tensor:
        chosen = self._inside(kind, layer, rows, n)
        if chosen is None:
            return x
        live = at_row < n
        mine = (live & torch.nn.functional.pad(chosen, (0, len(rows) - n))[at_row]).nonzero()[:, 0]
        source = self.source[layer, kind]
        x = x.clone()
        x[at_tok[mine].to(x.device)] = source[
            rows.source[at_row[mine]].to(source.device), rows.at[mine].to(source.device)
        ].to(x)
        return x

    def _again_final(self, kind: str, layer: int, x: Tensor, rows: _Rows, n: int) -> Tensor:
        """The same in the last block, where only the positions that are read are at hand."""
        chosen = self._inside(kind, layer, rows, n)
        if chosen is None:
            return x
        at_row = torch.arange(len(rows)).repeat_interleave(rows.n_at)
        inside = (
            (at_row < n)
            & torch.nn.functional.pad(chosen, (0, len(rows) - n))[at_row]
            & (rows.at >= self.T - self.n_reads)
        )
        mine = inside.nonzero()[:, 0]
        source = self.source[layer, kind]
        x = x.clone()
        where = at_row[mine] * self.n_reads + rows.at[mine] - (self.T - self.n_reads)
        x[where.to(x.device)] = source[
            rows.source[at_row[mine]].to(source.device), rows.at[mine].to(source.device)
        ].to(x)
        return x
