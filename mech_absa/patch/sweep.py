"""What a sweep computes, in the form that every engine takes.

A cell is one *component* (a kind of state in one layer, or one head) at one *span* of positions (a token, or all tokens of a role) of one
pair. A `Job` holds pairs of equal length and everything that a cell's value depends on; an engine answers with `Answers`: the label
scores of every cell, and of the two unpatched runs.

`direction` fixes what is put where. In both, a positive effect means that the cell matters:

    denoise   base run = corrupted, source = clean       effect = metric(patched) - metric(corrupted)     what restoring it brings back
    noise     base run = clean, source = corrupted       effect = metric(clean) - metric(patched)         what breaking it takes away

Ablations have no corrupted run; their source is made from clean states, and their direction is always `noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..axes import Resid
from ..errors import ConfigError, SiteError, choices
from ..metrics import Metric, kl
from ..model import Model
from ..prompts import Continuation
from ..sites import HEAD_KINDS, ROLES, Site
from .corruption import Source
from .corruption import States as States
from .pairs import DIRECTIONS, Direction, Pair, Pairs, Runs

SWEPT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "q", "k", "v")
"""Kinds that can be swept; q, k and v by the loop only."""


@dataclass(frozen=True)
class Span:
    """Positions patched together.

    Attributes:
        positions: token positions, ascending.
        role: what they are for.
        position: the token position, or -1 for a whole role.
    """

    positions: tuple[int, ...]
    role: str
    position: int = -1


def token_spans(pair: Pair) -> list[Span]:
    """Every prompt token by itself."""
    roles = pair.clean.roles[0].tolist()
    return [Span((i,), ROLES[roles[i]], i) for i in range(pair.length)]


def role_spans(pair: Pair) -> list[Span]:
    """All tokens of a role together, in the order of `ROLES`; roles that the prompt does not have are absent."""
    roles = pair.clean.roles[0].tolist()
    groups = {
        name: tuple(i for i, r in enumerate(roles) if r == index)
        for index, name in enumerate(ROLES)
    }
    return [Span(positions, name) for name, positions in groups.items() if positions]


SPANS: dict[str, Callable[[Pair], list[Span]]] = {"token": token_spans, "role": role_spans}


def components(
    model: Model, kinds: Iterable[str], layers: Sequence[int] | None = None
) -> list[Site]:
    """Every component of these kinds, by kind, layer and head.

    Raises:
        SiteError: a kind is unknown, or the model does not have it, or a layer is beyond it.
    """
    found = []
    for kind in kinds:
        if kind not in SWEPT:
            raise SiteError(f"unknown kind of site {kind!r}; accepted: {choices(SWEPT)}")
        heads: Sequence[int | None] = [None]
        if kind in HEAD_KINDS:
            heads = range(model.n_kv_heads if kind in ("k", "v") else model.n_heads)
        for layer in range(model.n_layers) if layers is None else layers:
            for head in heads:
                found.append(model.check_site(Site(layer, kind, head)))
    return found


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """The centred window of ROME: layers [l - w//2, l + ceil(w/2)), cut at the ends of the model."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


@dataclass(eq=False)
class Job:
    """Pairs of equal length and what is to be known of them.

    Attributes:
        runs: both inputs of every pair.
        components: which states.
        spans: which positions, for every pair.
        metric: decides how much of the vocabulary is read.
        n_layers: of the model.
        direction: `denoise` or `noise`; ablations are always `noise`.
        window: layers restored together.
        ablation: (layer, kind) -> source states for pairs of an ablation; None where the source is the other run.
    """

    runs: Runs
    components: Sequence[Site]
    spans: Sequence[Sequence[Span]]
    metric: Metric
    n_layers: int
    direction: Direction = "denoise"
    window: int = 1
    ablation: Source | None = None

    @property
    def rows(self) -> int:
        """Base runs: one for each pair and draw."""
        return len(self.runs.pairs) * self.runs.draws

    @property
    def cells(self) -> int:
        """Cells of all base runs, those that are zero for certain included."""
        return len(self.components) * self.n_spans * self.rows

    @property
    def n_spans(self) -> int:
        return max(len(s) for s in self.spans)

    @property
    def n_reads(self) -> int:
        """Numbers read of every cell: labels, or the metric itself where it needs the whole vocabulary."""
        return 1 if self.metric.need == "vocabulary" else len(self.runs.continuation.labels)

    def pair_of_row(self) -> Int[Tensor, " row"]:
        return torch.arange(len(self.runs.pairs)).repeat_interleave(self.runs.draws)

    def base(self) -> Resid:
        """The runs that are patched, `[row pos d_model]`."""
        if self.direction == "denoise":
            return self.runs.corrupted
        return self.runs.clean.repeat_interleave(self.runs.draws, dim=0)

    def source(self) -> tuple[Resid, Int[Tensor, " row"]]:
        """The runs that states are taken from, and which of them each row uses."""
        if self.direction == "denoise" or self.ablation is not None:
            return self.runs.clean, self.pair_of_row()
        return self.runs.corrupted, torch.arange(self.rows)

    def kinds(self) -> set[tuple[int, str]]:
        """(layer, kind) of every state that is put somewhere, windows included."""
        return {
            (layer, c.kind)
            for c in self.components
            for layer in window_layers(c.layer, self.window, self.n_layers)
        }

    def zero(self) -> Bool[Tensor, "component span pair"]:
        """Cells whose effect is zero for certain, and which no engine computes.

        Before the first position at which the runs differ, a causal model's states are the same in both; and a component of the last
        layer is only read at the positions that are unembedded. Missing spans of shorter lists count as zero too.
        """
        first_read = self.runs.length - self.runs.continuation.reads
        zero = torch.zeros(
            len(self.components), self.n_spans, len(self.runs.pairs), dtype=torch.bool
        )
        # q reads at its own position only; k and v of the last layer reach the answer from everywhere.
        unread_kinds = {"resid_mid", "resid_post", "attn_out", "mlp_out", "head", "q"}
        last = torch.tensor(
            [
                self._bottom(c) == self.n_layers - 1 and c.kind in unread_kinds
                for c in self.components
            ]
        )
        for b, (pair, spans) in enumerate(zip(self.runs.pairs, self.spans, strict=True)):
            for s in range(self.n_spans):
                if s >= len(spans) or max(spans[s].positions) < pair.first:
                    zero[:, s, b] = True
                elif max(spans[s].positions) < first_read:
                    zero[last, s, b] = True
        return zero

    def _bottom(self, c: Site) -> int:
        return window_layers(c.layer, self.window, self.n_layers)[0]


@dataclass(eq=False)
class Answers:
    """Scores of one job, on the CPU.

    Attributes:
        patched: `[component span row read]`; where a cell does not exist or is zero for certain, the base run's.
        base: of the unpatched base runs, `[row read]`.
        clean: of the clean runs, `[row read]`.
        corrupted: of the corrupted runs, `[row read]`; NaN for ablations.
        flops: floating-point operations of the matrix products, as planned (not measured).
    """

    patched: Float[Tensor, "component span row read"]
    base: Float[Tensor, "row read"]
    clean: Float[Tensor, "row read"]
    corrupted: Float[Tensor, "row read"]
    flops: int = 0


class Reader:
    """The last residual stream of some rows -> the numbers a job asks for.

    Args:
        model: whose unembedding it is.
        job: what is asked.
    """

    def __init__(self, model: Model, job: Job):
        self.model, self.job = model, job
        self.positions = range(job.runs.length - job.runs.continuation.reads, job.runs.length)
        self.ids = torch.tensor([ids for _, ids in job.runs.continuation.labels]).reshape(
            -1, max(1, job.runs.continuation.reads)
        )
        self.clean_logits: Tensor | None = (
            None  # [pair d_vocab], for the divergence from the clean run
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def remember_clean(self, last: Float[Tensor, "row read d_model"]) -> None:
        """Keep what the clean runs answer; needed before anything is read for a metric over the vocabulary."""
        if self.job.metric.need == "vocabulary":
            self.clean_logits = self.model.finish(last[:, 0], None, "vocabulary")

    def flops(self, rows: int) -> int:
        """Floating-point operations of reading so many rows."""
        whole = self.job.metric.need != "labels" or len(self.positions) > 1
        return (
            rows
            * len(self.positions)
            * self.model.flops("unembed", self.model.d_vocab if whole else len(self.ids))
        )

    def __call__(
        self, last: Float[Tensor, "row read d_model"], pair_of_row: Int[Tensor, " row"]
    ) -> Float[Tensor, "row number"]:
        """Numbers of rows, on the device."""
        if self.job.metric.need == "vocabulary":
            assert self.clean_logits is not None
            parts = []
            for x, pairs in zip(last[:, 0].split(256), pair_of_row.split(256), strict=True):
                parts.append(
                    kl(
                        self.model.finish(x, None, "vocabulary"),
                        self.clean_logits[pairs.to(self.clean_logits.device)],
                    )
                )
            return torch.cat(parts)[:, None]
        k = self.ids.shape[1]
        need = "normaliser" if k > 1 else self.job.metric.need
        return sum(self.model.finish(last[:, j], self.ids[:, j], need) for j in range(k))  # type: ignore[return-value]


def pass_flops(model: Model, length: int) -> int:
    """Floating-point operations of one whole forward pass over the blocks, without unembedding."""
    token = (
        model.flops("qkv")
        + model.flops("attend", length)
        + model.flops("project")
        + model.flops("mlp")
    )
    return model.n_layers * length * token


def check_request(
    model: Model, pairs: Pairs, direction: str, window: int, sites: Sequence[Site]
) -> Direction:
    """The direction that will be used.

    Raises:
        ConfigError: the direction or the window is not one.
    """
    if direction not in DIRECTIONS:
        raise ConfigError(f"unknown direction {direction!r}; accepted: {choices(DIRECTIONS)}")
    if window < 1:
        raise ConfigError(f"a window of {window} layers was asked for; it must be 1 or more")
    if window > 1 and any(c.kind in HEAD_KINDS for c in sites):
        raise ConfigError(
            "a window over layers makes no sense for heads, whose numbers mean nothing across layers; leave heads out or use --window 1"
        )
    return "noise" if pairs.corruption.is_ablation else direction  # type: ignore[return-value]


def comparable(metric: Metric, continuations: Sequence[Continuation]) -> Metric:
    """The metric, reading log-probabilities where any label has several tokens: beside those, a bare logit says nothing."""
    mixed = metric.need == "labels" and any(c.reads > 1 for c in continuations)
    return replace(metric, need="normaliser") if mixed else metric


def reads_of(pairs: Pairs, metric: Metric) -> tuple[Continuation, ...]:
    """The continuations that a metric has to run: those of the labels, or the bare prompt for a divergence over the vocabulary."""
    return (Continuation((), ()),) if metric.need == "vocabulary" else pairs.continuations
