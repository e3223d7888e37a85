"""Jobs of random tokens and a model that is linear, for tests of estimates."""

from __future__ import annotations

from functools import cache

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from mech_absa.examples import Example, Polarity
from mech_absa.metrics import get_metric
from mech_absa.model import Model
from mech_absa.patch import loop
from mech_absa.patch.job import Job, components, token_spans
from mech_absa.patch.pairs import Counterfactual, Pair, make_runs
from mech_absa.prompts import Continuation, Tokenised

LABELS = (5, 6, 7)  # token ids
P = Polarity.POSITIVE


def tokens(ids: torch.Tensor) -> Tokenised:
    """Ids [pos] with roles that repeat, so that a role is several positions."""
    names = ["template", "before", "aspect.first", "aspect.last", "opinion", "after", "query.last"]
    roles = [names[i % len(names)] for i in range(len(ids) - 1)] + ["answer"]
    return Tokenised.of(ids.tolist(), roles)


def make_job(
    model: Model,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    kinds,
    metric="logit_diff",
    labels=LABELS,
    by=token_spans,
    gold=0,
    foil=1,
    **more,
) -> Job:
    """A job of counterfactual pairs from ids [pair pos]."""
    pairs = [
        Pair(
            Example("a b", "a", P, (0, 1), id=str(i)),
            tokens(a),
            tokens(b),
            gold,
            foil,
            Counterfactual(),
            first=int((a != b).nonzero()[0]),
        )
        for i, (a, b) in enumerate(zip(clean, corrupted, strict=True))
    ]
    vocabulary = get_metric(metric).need == "vocabulary"
    continuation = Continuation(
        (), () if vocabulary else tuple((i, (token,)) for i, token in enumerate(labels))
    )
    runs = make_runs(model, pairs, continuation)
    return Job(
        model,
        runs,
        components(model, kinds),
        [by(p) for p in pairs],
        get_metric(metric),
        **more,
    )


def random_ids(
    model: Model, n: int = 2, length: int = 7, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupted ids that differ at two tokens."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(10, 60, (n, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, [2, 4]] = torch.randint(60, 110, (n, 2), generator=generator)
    return clean, corrupted


def exact(model: Model, job: Job) -> torch.Tensor:
    """metric(patched) - metric(base) by the loop, [component span row]."""
    answers = loop.sweep(job)
    if job.metric.need == "vocabulary":
        return (answers.patched - answers.base)[..., 0]
    pairs = [job.runs.pairs[b] for b in job.pair_of_row().tolist()]
    gold, foil = torch.tensor([p.gold for p in pairs]), torch.tensor([p.foil for p in pairs])
    flat = answers.patched.flatten(0, 1)
    patched = torch.stack([job.metric(scores, gold, foil) for scores in flat]).unflatten(
        0, answers.patched.shape[:2]
    )
    return patched - job.metric(answers.base, gold, foil)


def of_kind(job: Job, effect: torch.Tensor, *kinds: str) -> torch.Tensor:
    return effect[[c.kind in kinds for c in job.components]]


def small(n_layers: int, n_heads: int, d_model: int, d_head: int, **more) -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=n_layers, n_heads=n_heads, d_model=d_model, d_head=d_head, d_mlp=8, n_ctx=8, d_vocab=120, act_fn="relu",
        normalization_type=None, use_attn_scale=False, dtype=torch.float64, device="cpu", init_weights=False, **more,
    )  # fmt: skip
    model = HookedTransformer(cfg, move_to_device=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model


@cache
def linear_model() -> Model:
    """Uniform attention (no queries, no keys), MLPs of relu pairs that cancel to a matrix, no norms: linear in its input."""
    hooked = small(n_layers=3, n_heads=2, d_model=6, d_head=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hooked.named_parameters():
            if not name.endswith(("W_Q", "W_K", "b_Q", "b_K", "W_in", "b_in", "W_out")):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.7)
        for block in hooked.blocks:
            into, out = (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in ((6, 4), (4, 6))
            )
            block.mlp.W_in.copy_(torch.cat([into, -into], 1))
            block.mlp.W_out.copy_(torch.cat([out, -out], 0))  # relu(x) - relu(-x) = x
    return Model(hooked, None, "linear", bos=False)
