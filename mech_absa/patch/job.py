"""Describe what an engine computes: the cells of pairs of equal length.

A cell is one *component* (a kind of state in one layer, or one head) at one *span* of positions (a
token, or all tokens of a role) of one pair. A `Job` holds pairs of equal length and everything that
a cell's value depends on. An engine answers with `Answers`: the label scores of every cell, and of
the two unpatched runs.

The direction says which of the two runs is patched (the base) and where states come from (the
source). It is resolved here, in `Job.base` and `Job.source`, and nowhere else:

    denoise   base = corrupted, source = clean       effect = metric(patched) - metric(corrupted)
    noise     base = clean, source = corrupted       effect = metric(clean) - metric(patched)

Ablations have no corrupted run: their source is made from clean states, and the base is clean.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import ConfigError, SiteError, choices
from ..metrics import Metric, Need, kl
from ..model import Model
from ..prompts import Continuation
from ..sites import HEAD_KINDS, Site, in_reading_order
from .corruption import Source
from .pairs import Pair, Pairs, Runs, answer_ids, columns_of
from .request import SWEPT, By, Direction

Tick = Callable[[int], None]
"""Told how many cells are done."""


CONTROL = "control."
"""Roles of control spans begin with this; their size follows."""


@dataclass(frozen=True)
class Span:
    """Positions patched together.

    Attributes:
        positions: token positions, ascending.
        role: what they are for.
        position: the token position; None for a whole role.
    """

    positions: tuple[int, ...]
    role: str
    position: int | None = None

    def __str__(self) -> str:
        return self.role if self.position is None else str(self.position)


def token_spans(pair: Pair) -> list[Span]:
    """Return one span per prompt token."""
    return [Span((i,), role, i) for i, role in enumerate(pair.clean.role_names)]


def role_spans(pair: Pair) -> list[Span]:
    """Return one span per role that the prompt has, in reading order."""
    names = pair.clean.role_names
    return [
        Span(tuple(i for i, name in enumerate(names) if name == role), role)
        for role in in_reading_order(names)
    ]


def control_spans(pair: Pair) -> list[Span]:
    """Return template tokens of the sizes of the roles: the controls of a sweep by role.

    A role of n tokens is compared with n tokens of the template. They are drawn among those at which
    the two runs can differ, since earlier ones have no effect by construction; earlier ones are added
    where a role has more tokens, and a role with more tokens than the template gets all of it. The
    seed is the pair's id, so that a pair has the same control in every run and order, and chance
    averages out over pairs. Smaller controls are parts of larger ones.
    """
    names = pair.clean.role_names
    template = [i for i, name in enumerate(names) if name == "template"]
    random.Random(f"control of {pair.id}").shuffle(template)
    template.sort(
        key=lambda i: i < pair.first
    )  # stable: the order within both parts is the drawn one
    sizes = {min(len(span.positions), len(template)) for span in role_spans(pair)}
    return [Span(tuple(sorted(template[:n])), f"{CONTROL}{n}") for n in sorted(sizes - {0})]


SPANS: dict[By, Callable[[Pair], list[Span]]] = {By.TOKEN: token_spans, By.ROLE: role_spans}


def components(
    model: Model, kinds: Iterable[str], layers: Sequence[int] | None = None
) -> list[Site]:
    """Return every component of these kinds, by kind, layer and head.

    Raises:
        SiteError: a kind is unknown, or the model does not have it, or a layer is beyond it.
    """
    sites: list[Site] = []
    for kind in kinds:
        if kind not in SWEPT:
            raise SiteError(f"unknown kind of site {kind!r}; accepted: {choices(SWEPT)}")
        heads: Sequence[int | None] = [None]
        if kind in HEAD_KINDS:
            heads = range(model.n_kv_heads if kind in ("k", "v") else model.n_heads)
        for layer in range(model.n_layers) if layers is None else layers:
            sites += [model.check_site(Site(layer, kind, head)) for head in heads]
    return sites


def window_layers(layer: int, window: int, n_layers: int) -> range:
    """Return the centred window of ROME: [l - w//2, l + ceil(w/2)), cut at the model's ends."""
    return range(max(0, layer - window // 2), min(n_layers, layer + (window + 1) // 2))


class Side(NamedTuple):
    """The runs that are patched, or the runs that states are taken from.

    Attributes:
        inputs: their residual streams before block 0.
        run: which of them each row uses.
    """

    inputs: Float[Tensor, "run pos d_model"]
    run: Int[Tensor, " row"]


@dataclass(frozen=True, eq=False)
class Job:
    """Pairs of equal length and what is computed of them. A row is one pair and noise draw.

    Attributes:
        model: what is traced.
        runs: both inputs of every pair.
        components: which states.
        spans: which positions, for every pair.
        metric: decides how much of the vocabulary is read.
        direction: denoise or noise; ablations are always noise.
        window: layers restored together.
        ablation: where an ablation takes its states from; None where the source is the other run.
        wanted: cells that are computed; all where None.
    """

    model: Model
    runs: Runs
    components: Sequence[Site]
    spans: Sequence[Sequence[Span]]
    metric: Metric
    direction: str = Direction.DENOISE
    window: int = 1
    ablation: Source | None = None
    wanted: Bool[Tensor, "component span pair"] | None = None

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.runs.pairs) * self.runs.draws

    @property
    def n_spans(self) -> int:
        """Return the number of spans of the pair that has most."""
        return max(len(s) for s in self.spans)

    @property
    def cells(self) -> int:
        """Return the number of cells of all rows, those that are zero for certain included."""
        return int(self.exists().sum()) * self.runs.draws

    @property
    def n_reads(self) -> int:
        """Return the numbers read per cell: labels, or the metric itself if it needs all logits."""
        return 1 if self.metric.need == "vocabulary" else len(self.runs.continuation.labels)

    @property
    def base(self) -> Side:
        """Return the runs that are patched."""
        return self._corrupted if self.direction == Direction.DENOISE else self._clean

    @property
    def source(self) -> Side:
        """Return the runs that states are taken from."""
        from_clean = self.direction == Direction.DENOISE or self.ablation is not None
        return self._clean if from_clean else self._corrupted

    @property
    def _clean(self) -> Side:
        return Side(self.runs.clean, self.pair_of_row())

    @property
    def _corrupted(self) -> Side:
        return Side(self.runs.corrupted, torch.arange(self.rows))

    def pair_of_row(self) -> Int[Tensor, " row"]:
        """Return the pair of every row."""
        return torch.arange(len(self.runs.pairs)).repeat_interleave(self.runs.draws)

    def kinds(self) -> set[tuple[int, str]]:
        """Return (layer, kind) of every state that is put somewhere, windows included."""
        return {
            (layer, c.kind)
            for c in self.components
            for layer in window_layers(c.layer, self.window, self.model.n_layers)
        }

    def exists(self) -> Bool[Tensor, "component span pair"]:
        """Return which cells there are: shorter lists lack spans, and not all may be wanted."""
        lengths = torch.tensor([len(spans) for spans in self.spans])
        there = torch.arange(self.n_spans)[:, None] < lengths
        there = there.expand(len(self.components), *there.shape)
        return there.clone() if self.wanted is None else there & self.wanted

    def zero(self) -> Bool[Tensor, "component span pair"]:
        """Return the cells that no engine computes, because their effect is zero for certain.

        Before the first position at which the runs differ, a causal model's states are the same in
        both. A component of the last layer is only read at the positions that are unembedded.
        Cells that do not exist count as zero too.
        """
        first_read = self.runs.length - self.runs.continuation.reads
        zero = ~self.exists()
        # q reads at its own position only; k and v of the last layer reach the answer from everywhere.
        reaching = {"resid_pre", "k", "v"}
        top = self.model.n_layers - 1
        last = torch.tensor(
            [
                window_layers(c.layer, self.window, top + 1)[0] == top and c.kind not in reaching
                for c in self.components
            ]
        )
        for b, (pair, spans) in enumerate(zip(self.runs.pairs, self.spans, strict=True)):
            for s, span in enumerate(spans):
                if span.positions[-1] < pair.first:
                    zero[:, s, b] = True
                elif span.positions[-1] < first_read:
                    zero[last, s, b] = True
        return zero


@dataclass(eq=False)
class Answers:
    """Scores of one job, on the CPU.

    Attributes:
        patched: of every cell; where a cell does not exist or is zero for certain, the base run's.
        base: of the unpatched base runs.
        clean: of the clean runs.
        corrupted: of the corrupted runs; NaN for ablations.
        flops: floating-point operations of the matrix products, as planned (not measured).
    """

    patched: Float[Tensor, "component span row read"]
    base: Float[Tensor, "row read"]
    clean: Float[Tensor, "row read"]
    corrupted: Float[Tensor, "row read"]
    flops: int = 0


class Part(NamedTuple):
    """Cells that an engine has just finished. Every cell of a job is in one part.

    Attributes:
        job: whose cells they are.
        answers: of the job, so far; `answers.patched[component, span, row]` are the cells' scores.
        component, span, row: indices of the cells.
    """

    job: Job
    answers: Answers
    component: Int[Tensor, " cell"]
    span: Int[Tensor, " cell"]
    row: Int[Tensor, " cell"]


Seen = Callable[[Part], None]
"""Given the cells as they are finished; what it raises ends the sweep."""


def zero_part(job: Job, answers: Answers) -> Part:
    """Return the cells that are zero for certain, which no engine computes."""
    c, s, b = (job.exists() & job.zero()).nonzero(as_tuple=True)
    draws = job.runs.draws
    c, s = (x.repeat_interleave(draws) for x in (c, s))
    row = (b[:, None] * draws + torch.arange(draws)).flatten()
    return Part(job, answers, c, s, row)


class Reader:
    """Turns the last residual streams of rows into the numbers that a job asks for.

    Args:
        job: what is asked.
        normalise: takes the place of the final norm.
    """

    def __init__(self, job: Job, normalise: Callable[[Tensor], Tensor] | None = None):
        self.normalise = normalise
        self.model, self.job = job.model, job
        reads = job.runs.continuation.reads
        self.positions = range(job.runs.length - reads, job.runs.length)
        labels = [ids for _, ids in job.runs.continuation.labels]
        self.own: Tensor | None = None  # [pair label], columns of the labels that a pair has itself
        if labels and job.runs.pairs[0].answers is not None:
            ids = answer_ids(job.runs.pairs)
            labels, self.own = [(token,) for token in ids], columns_of(job.runs.pairs, ids)
        self.ids = torch.tensor(labels).reshape(-1, max(1, reads))
        self.clean_logits: Tensor | None = None  # [pair d_vocab], for the divergence from clean

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of scores."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def unpatched(
        self,
        clean: Float[Tensor, "pair pos d_model"],
        corrupted: Float[Tensor, "row pos d_model"] | None,
    ) -> Answers:
        """Read the unpatched runs; until it is computed, every cell holds the base run's scores.

        Args:
            clean: last residual streams of the clean runs; only positions that are read are used.
            corrupted: of the corrupted runs; None for ablations.
        """
        job, n = self.job, len(self.positions)
        if job.metric.need == "vocabulary":
            self.clean_logits = self.model.finish(clean[:, -n], None, "vocabulary")
        pairs = torch.arange(len(job.runs.pairs))
        of_clean = self(clean[:, -n:], pairs).repeat_interleave(job.runs.draws, dim=0)
        if corrupted is None:
            of_corrupted = torch.full_like(of_clean, torch.nan)
        else:
            of_corrupted = self(corrupted[:, -n:], job.pair_of_row())
        base = of_corrupted if job.direction == Direction.DENOISE else of_clean
        patched = base.expand(len(job.components), job.n_spans, *base.shape).cpu().clone()
        return Answers(patched, base.cpu(), of_clean.cpu(), of_corrupted.cpu())

    def flops(self, rows: int) -> int:
        """Return the floating-point operations of reading so many rows."""
        whole = self.job.metric.need != "labels" or len(self.positions) > 1
        columns = self.model.d_vocab if whole else len(self.ids)
        return rows * len(self.positions) * self.model.flops("unembed", columns)

    def __call__(
        self, last: Float[Tensor, "row read d_model"], pair_of_row: Int[Tensor, " row"]
    ) -> Float[Tensor, "row number"]:
        """Return the numbers of rows, on the device."""
        if self.job.metric.need == "vocabulary":
            assert self.clean_logits is not None
            parts = []
            for x, pairs in zip(last[:, 0].split(256), pair_of_row.split(256), strict=True):
                clean = self.clean_logits[pairs.to(self.clean_logits.device)]
                parts.append(kl(self._finish(x, None, "vocabulary"), clean))
            return torch.cat(parts)[:, None]
        need = "normaliser" if self.ids.shape[1] > 1 else self.job.metric.need
        tokens = (self._finish(last[:, j], ids, need) for j, ids in enumerate(self.ids.unbind(1)))
        scores = reduce(torch.add, tokens)
        if self.own is None:
            return scores
        return scores.gather(1, self.own[pair_of_row.cpu()].to(scores.device))

    def _finish(self, x: Tensor, ids: Tensor | None, need: Need) -> Tensor:
        return self.model.finish(x, ids, need, normalise=self.normalise)


def pass_flops(model: Model, length: int) -> int:
    """Return the floating-point operations of one pass over the blocks, without unembedding."""
    token = model.flops("qkv") + model.flops("project") + model.flops("mlp")
    return model.n_layers * length * (token + model.flops("attend", length))


def check_window(window: int, sites: Sequence[Site]) -> None:
    """Refuse a window over heads.

    Raises:
        ConfigError: heads are among the sites.
    """
    if window > 1 and any(c.kind in HEAD_KINDS for c in sites):
        raise ConfigError(
            f"a window of {window} layers was asked for with heads, whose numbers mean nothing "
            "across layers; leave heads out or use a window of 1"
        )


def comparable(metric: Metric, continuations: Sequence[Continuation]) -> Metric:
    """Return the metric, reading log-probabilities where any label has several tokens.

    Beside those, a bare logit would be a number of another kind.
    """
    mixed = metric.need == "labels" and any(c.reads > 1 for c in continuations)
    return replace(metric, need="normaliser") if mixed else metric


def reads_of(pairs: Pairs, metric: Metric) -> tuple[Continuation, ...]:
    """Return the continuations that a metric runs: the labels', or the bare prompt for `kl`."""
    return (Continuation((), ()),) if metric.need == "vocabulary" else pairs.continuations


__all__ = [
    "SPANS",
    "Answers",
    "Job",
    "Part",
    "Reader",
    "Seen",
    "Side",
    "Span",
    "Tick",
    "components",
    "control_spans",
    "reads_of",
    "zero_part",
]
