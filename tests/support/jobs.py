"""Small models, small questions, and jobs made of them, for every test of the engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from transformers import AutoTokenizer

from mech_absa.examples import Example, Polarity
from mech_absa.metrics import get_metric
from mech_absa.model import Model, load_model
from mech_absa.patch import loop
from mech_absa.patch.job import SPANS, Answers, Job, check_window, components, reads_of
from mech_absa.patch.pairs import (
    Corruption,
    GaussianNoise,
    Pair,
    Pairs,
    by_length,
    make_pairs,
    make_runs,
)
from mech_absa.prompts import Continuation, PromptTemplate, Verbalizer
from support.numpy_transformer import NumpyTransformer
from support.tiny_models import float64_throughout, hf_float64, tiny_folder

P = Polarity
TEMPLATE = PromptTemplate("{sentence} {aspect}?")
ONE_TOKEN = (
    "staff",
    "was",
    "the",
)  # labels of one token each for every tiny tokenizer: one continuation, one position read
LONG = (
    "the staff",
    "was food",
    "the was",
)  # two continuations: `the` with two labels, and `was f` with one
BLOCK = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@cache
def tiny(arch: str) -> Model:
    """A tiny random model in float64 from end to end; shared, so a test leaves it as it was."""
    folder = tiny_folder(arch)
    with float64_throughout():
        return load_model(
            (hf_float64(folder), AutoTokenizer.from_pretrained(folder)),
            dtype="float64",
            check=False,
        )


@cache
def tiny32(arch: str) -> Model:
    return load_model(tiny_folder(arch), check=False)


def example(
    id: str, sentence: str, aspect: str, polarity: Polarity, *edits: tuple[str, Polarity]
) -> Example:
    def one(
        sentence: str, polarity: Polarity, id: str, others: tuple[Example, ...] = ()
    ) -> Example:
        start = sentence.index(aspect)
        return Example(
            sentence, aspect, polarity, (start, start + len(aspect)), id=id, counterfactuals=others
        )

    return one(
        sentence, polarity, id, tuple(one(s, p, f"{id}.{i}") for i, (s, p) in enumerate(edits))
    )


EXAMPLES = (  # the first three have as many tokens, and part from their edits at different places
    example("a", "The food was fine", "food", P.POSITIVE, ("The food was bad", P.NEGATIVE)),
    example("b", "bad was the food", "food", P.NEGATIVE, ("fine was the food", P.POSITIVE)),
    example(
        "c",
        "The bad was food",
        "bad",
        P.NEUTRAL,
        ("was bad The food", P.NEUTRAL),
        ("The bad food was", P.POSITIVE),
    ),
    example(
        "d",
        "The staff was the staff and the food was bad",
        "food",
        P.NEGATIVE,
        ("The staff was the staff and the food was fine", P.POSITIVE),
    ),
)


def pairs_of(
    model: Model,
    corruption: Corruption,
    labels: Sequence[str] = ONE_TOKEN,
    examples: Sequence[Example] = EXAMPLES,
) -> Pairs:
    return make_pairs(
        model,
        list(examples),
        corruption,
        template=TEMPLATE,
        verbalizer=Verbalizer.of(list(labels)),
        keep="all",
    )


def jobs(
    model: Model,
    pairs: Pairs,
    kinds: Sequence[str],
    direction: str = "denoise",
    window: int = 1,
    metric: str = "logit_diff",
    by: str = "token",
) -> Iterator[Job]:
    """One job for every length of prompt and every continuation of the labels."""
    sites = components(model, [kind for kind in kinds if kind in model.kinds])
    check_window(window, sites)
    used = "noise" if pairs.corruption.is_ablation else direction
    measure = get_metric(metric)
    for indices in by_length(pairs).values():
        group = [pairs[i] for i in indices]
        for continuation in reads_of(pairs, measure):
            job = Job(
                model,
                make_runs(model, group, continuation),
                sites,
                [SPANS[by](p) for p in group],
                measure,
                used,
                window,
            )
            source = pairs.corruption.source(
                pairs, job.kinds(), lambda chosen, job=job: clean_states(model, chosen, job.kinds())
            )
            yield replace(job, ablation=source)


def the_job(*args, **kwargs) -> Job:
    """The first job, which holds the three short pairs."""
    return next(jobs(*args, **kwargs))


def clean_states(model: Model, pairs: Sequence[Pair], kinds: set[tuple[int, str]]):
    return loop.states(model, make_runs(model, pairs, Continuation((), ())).clean, kinds)[1]


def nothing_skipped(job: Job) -> Job:
    """The same job with pairs that claim to differ from the first token on, so that fewer cells count as zero for certain."""
    return replace(
        job, runs=replace(job.runs, pairs=tuple(replace(p, first=0) for p in job.runs.pairs))
    )


def furthest(a: Answers, b: Answers) -> float:
    """The largest difference between two answers, which must be missing in the same places."""
    worst = 0.0
    for name in ("patched", "base", "clean", "corrupted"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.shape == y.shape and x.dtype == y.dtype, name
        assert torch.equal(x.isnan(), y.isnan()), name
        worst = max(worst, float((x - y).nan_to_num(0).abs().max()))
    return worst


# ---- what every cell has to be, by the numpy oracle --------------------------------------------------------------------------------

Table = dict[tuple[str, int], np.ndarray]  # (kind, layer) -> [pos ...]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


class Expected:
    """Every number of a job from do() on one sequence at a time; nothing is skipped, cached or batched."""

    def __init__(self, model: Model, job: Job, sources: Sequence[Table] | None = None):
        """`sources`: for every pair the states put into its clean run; by default those of its other run."""
        self.oracle, self.model, self.job = NumpyTransformer(model.hooked), model, job
        reads = []
        for b, pair in enumerate(job.runs.pairs):
            more = list(job.runs.continuation.tokens)
            clean = self.oracle.embed(pair.clean.ids[0].tolist() + more)
            for draw in range(job.runs.draws):
                corrupted = self.oracle.embed(pair.corrupted.ids[0].tolist() + more)
                if isinstance(pair.corruption, GaussianNoise):
                    corrupted[: pair.length] += pair.noise(model.d_model)[draw].double().numpy()
                base, other = (
                    (corrupted, clean) if job.direction == "denoise" else (clean, corrupted)
                )
                source = sources[b] if sources is not None else self.oracle.run(embeddings=other)[1]
                self.clean_logits = self.oracle.run(embeddings=clean)[0]
                reads.append(
                    (
                        self._cells(b, base, source),
                        self.read(base),
                        self.read(clean),
                        self.read(corrupted),
                    )
                )
        self.patched = np.stack([r[0] for r in reads], axis=2)
        self.base, self.clean, self.corrupted = (np.stack([r[i] for r in reads]) for i in (1, 2, 3))

    def _cells(self, b: int, base: np.ndarray, source: Table) -> np.ndarray:
        job, L = self.job, self.model.n_layers
        out = np.tile(self.read(base), (len(job.components), job.n_spans, 1))
        for c, site in enumerate(job.components):
            kind = {"head": "z"}.get(site.kind, site.kind)
            # ROME's own words: range(max(0, layer - window // 2), min(num_layers, layer - (-window // 2)))
            layers = range(
                max(0, site.layer - job.window // 2), min(L, site.layer - (-job.window // 2))
            )
            for s, span in enumerate(job.spans[b]):
                head = () if site.head is None else (site.head,)
                out[c, s] = self.read(
                    base,
                    {
                        (kind, m, p, *head): source[kind, m][(p, *head)]
                        for m in layers
                        for p in span.positions
                    },
                )
        return out

    def read(self, embeddings: np.ndarray, do=None) -> np.ndarray:
        logits, _ = self.oracle.run(embeddings=embeddings, do=do)
        if self.job.metric.name == "kl":
            p, q = log_softmax(self.clean_logits[-1]), log_softmax(logits[-1])
            return -(np.exp(p) * (p - q)).sum(keepdims=True)
        continuation = self.job.runs.continuation
        k = 1 + len(continuation.tokens)
        if self.job.metric.need == "normaliser" or k > 1:
            logits = log_softmax(logits)
        return np.array(
            [
                sum(logits[len(logits) - k + j, ids[j]] for j in range(k))
                for _, ids in continuation.labels
            ]
        )

    def error(self, answers: Answers) -> float:
        names = ("patched", "base", "clean") + (
            () if answers.corrupted.isnan().all() else ("corrupted",)
        )
        return max(
            float(np.abs(getattr(self, name) - getattr(answers, name).numpy()).max())
            for name in names
        )
