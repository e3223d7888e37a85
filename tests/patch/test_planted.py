"""A circuit that was put there by hand is found exactly, and nothing else is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from support import fast
from support.planted import Planted, planted_absa, random_planted

from mech_absa.examples import Example, Polarity
from mech_absa.metrics import get_metric
from mech_absa.model import Model
from mech_absa.patch import loop, wave
from mech_absa.patch.job import SPANS, Job, components
from mech_absa.patch.pairs import Counterfactual, Pair, make_runs
from mech_absa.prompts import Continuation, Tokenised
from mech_absa.sites import ROLES

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")
ENGINES = [loop, wave]
engines = pytest.mark.parametrize("engine", ENGINES, ids=["loop", "wavefront"])


def pairs_of(planted: Planted, n: int = 2) -> list[Pair]:
    clean, corrupted = planted.prompts(n)
    roles = torch.full((1, clean.shape[1]), ROLES.index("before"))
    for role, position in (("opinion", "opinion"), ("aspect.last", "aspect"), ("answer", "last")):
        roles[0, planted.positions[position]] = ROLES.index(role)
    roles[0, 0] = ROLES.index("template")
    tokens = lambda ids: Tokenised(ids[None], roles, (ids.shape[0],))  # noqa: E731
    first = min(planted.positions["opinion"], planted.positions["distractor"])
    sample = Example("a planted sentence", "planted", Polarity.POSITIVE, (2, 9))
    return [
        Pair(sample, tokens(a), tokens(b), 0, 1, Counterfactual(), first=first)
        for a, b in zip(clean, corrupted, strict=True)
    ]


def effects(
    engine,
    planted: Planted,
    kind: str,
    direction: str = "denoise",
    window: int = 1,
    by: str = "token",
    metric: str = "logit_diff",
):
    """Normalised to 0 for the base run and 1 for the other: `[component span pair]`, and the components."""
    model, pairs = Model(planted.model, None, "planted"), pairs_of(planted)
    good, bad = planted.labels
    measure = get_metric(metric)
    runs = make_runs(model, pairs, Continuation((), ((0, (good,)), (1, (bad,)), (2, (3,)))))
    job = Job(
        model,
        runs,
        components(model, [kind]),
        [SPANS[by](p) for p in pairs],
        measure,
        direction,
        window,
    )
    answers = engine.sweep(job)
    gold, foil = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    value = lambda scores: measure(scores, gold, foil)  # noqa: E731
    total = value(answers.clean) - value(answers.corrupted)
    patched = torch.stack([torch.stack([value(span) for span in cell]) for cell in answers.patched])
    sign = 1 if direction == "denoise" else -1
    return (sign * (patched - value(answers.base)) / total).numpy(), job


def as_map(found: np.ndarray, job: Job, truth: np.ndarray) -> np.ndarray:
    """`[component pos pair]` -> `[pair layer pos]` or `[pair layer pos head]`."""
    out = np.full((found.shape[2], *truth.shape), np.nan)
    for c, site in enumerate(job.components):
        for pos in range(truth.shape[1]):
            out[
                (slice(None), site.layer, pos)
                if site.head is None
                else (slice(None), site.layer, pos, site.head)
            ] = found[c, pos]
    return out


@pytest.fixture(scope="module", params=fast([False, True], [True]), ids=["linear", "dead-relu"])
def absa(request):
    return planted_absa(dead=request.param, dtype=torch.float64)


@engines
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_map_is_recovered_exactly(engine, absa, direction):
    """Every cell of every kind: 1 on the circuit and 0 elsewhere, in the dead circuit too, whether restored or broken."""
    for kind in KINDS:
        found, job = effects(engine, absa, kind, direction)
        error = np.abs(as_map(found, job, absa.truth(kind)) - absa.truth(kind)).max()
        assert error < 1e-9, (kind, error)


@engines
def test_the_map_by_role(engine, absa):
    """The slot is at one place at a time, so a role's tokens together have the effect of the one that carries it."""
    for kind in KINDS:
        found, job = effects(engine, absa, kind, by="role")
        truth = absa.truth(kind)
        for c, site in enumerate(job.components):
            cells = truth[site.layer] if site.head is None else truth[site.layer, :, site.head]
            expected = [cells[list(span.positions)].max() for span in job.spans[0]]
            assert np.abs(found[c] - np.array(expected)[:, None]).max() < 1e-9, (kind, str(site))
        assert [span.role for span in job.spans[0]] == [
            "template",
            "before",
            "aspect.last",
            "opinion",
            "answer",
        ]


@engines
@pytest.mark.parametrize("window", [2, 3])
def test_a_window_reaches_as_far_as_it_says(engine, absa, window):
    """Two layers are l-1 and l, three are l-1 to l+1; a cell counts if any of them carries the slot."""
    for kind in ("attn_out", "mlp_out", "resid_mid"):
        truth = absa.truth(kind)
        expected = np.zeros_like(truth)
        for layer in range(3):
            reach = {2: (layer - 1, layer), 3: (layer - 1, layer, layer + 1)}[window]
            expected[layer] = truth[[m for m in reach if 0 <= m < 3]].max(0)
        found, job = effects(engine, absa, kind, window=window)
        assert np.abs(as_map(found, job, truth) - expected).max() < 1e-9, kind
        assert kind == "mlp_out" or not np.array_equal(expected, truth)


@engines
def test_probabilities_saturate_but_normalised_they_tell_the_same(engine, absa):
    for metric in ("prob", "logprob", "prob_label"):
        found, job = effects(engine, absa, "attn_out", metric=metric)
        assert (
            np.abs(as_map(found, job, absa.truth("attn_out")) - absa.truth("attn_out")).max() < 1e-9
        )


@pytest.mark.parametrize("seed", fast(range(4), [1]))
def test_random_circuits_rank_perfectly(seed):
    """Anywhere in a model of 4 to 6 layers: the exact map, so that no cell off the circuit ranks above one on it."""
    planted = random_planted(seed, dead=seed % 2 == 1, dtype=torch.float64)
    maps = {}
    for engine in ENGINES if seed == 0 else [wave]:
        scores, truths = [], []
        for kind in KINDS:
            found, job = effects(engine, planted, kind)
            truth = planted.truth(kind)
            scores.append(as_map(found, job, truth)[1].ravel())
            truths.append(truth.ravel())
        score, truth = np.concatenate(scores), np.concatenate(truths)
        assert np.abs(score - truth).max() < 1e-9
        assert 0 < truth.sum() < truth.size / 5
        assert roc_auc_score(truth, score) == 1.0
        maps[engine] = score
    if len(maps) == 2:
        assert np.abs(maps[loop] - maps[wave]).max() < 1e-12
