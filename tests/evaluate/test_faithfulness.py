"""Faithfulness on circuits set by hand, where every curve is known: a step at the size of the circuit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import fast
from support.planted import LABELS, WORDS, planted_absa, random_planted
from support.small_cases import POS, Push, example

from mech_absa.errors import ConfigError, SiteError
from mech_absa.evaluate.faithfulness import (
    SHARES,
    areas,
    default_counts,
    faithfulness,
    mib_counts,
)
from mech_absa.evaluate.predictions import predict
from mech_absa.evaluate.pruning import Ablation, mean_activations, prune
from mech_absa.evaluate.ranking import in_order
from mech_absa.model import Model
from mech_absa.model.hooks import capture, live_hooks
from mech_absa.patch.pairs import (
    Counterfactual,
    GaussianNoise,
    MeanAblation,
    Pair,
    Pairs,
    make_pairs,
)
from mech_absa.prompts import ROLE, Continuation, PromptTemplate, Tokenised, Verbalizer
from mech_absa.scoring import question
from mech_absa.sites import Site


def tokens_of(ids: torch.Tensor) -> Tokenised:
    roles = torch.full_like(ids, ROLE["template"])
    roles[:, -1] = ROLE["answer"]
    return Tokenised(ids, roles, (ids.shape[1],))


def planted_pairs(planted, n: int = 3) -> tuple[Model, Pairs]:
    clean, corrupted = planted.prompts(n)
    model = Model(planted.model, None, "planted")
    asked = [example(f"sentence {i} about food", "food", POS, id=str(i)) for i in range(n)]
    items = [
        Pair(e, tokens_of(a[None]), tokens_of(b[None]), 0, 1, Counterfactual())
        for e, a, b in zip(asked, clean, corrupted, strict=True)
    ]
    labels = tuple((i, (WORDS.index(word),)) for i, word in enumerate(LABELS))
    return model, Pairs(
        tuple(items), Counterfactual(), (Continuation((), labels),), Verbalizer(), PromptTemplate()
    )


def components(model: Model) -> list[Site]:
    """All heads and all MLPs."""
    layers = range(model.n_layers)
    return [Site(layer, "head", h) for layer in layers for h in range(model.n_heads)] + [
        Site(layer, "mlp_out") for layer in layers
    ]


def ranked(planted, model) -> tuple[list[tuple[Site, float]], list[Site]]:
    """A ranking that puts the circuit first, in the order of its steps; everything else after it."""
    circuit = [
        Site(s.layer, "mlp_out") if s.head is None else Site(s.layer, "head", s.head)
        for s in planted.steps
    ]
    return [
        (site, 10.0 - circuit.index(site) if site in circuit else 0.0) for site in components(model)
    ], circuit


@pytest.mark.parametrize(
    "make",
    [
        planted_absa,
        pytest.param(lambda: planted_absa(dead=True), marks=pytest.mark.slow),
        lambda: random_planted(4),
    ],
)
def test_the_curve_is_a_step_at_the_size_of_the_circuit(make):
    planted = make()
    model, pairs = planted_pairs(planted)
    ranking, circuit = ranked(planted, model)
    n, size = len(ranking), len(circuit)
    every = range(n + 1)
    keep = faithfulness(model, pairs, ranking, counts=every, randoms=2, draws=5)
    assert [e.value for e in keep.faithfulness] == pytest.approx(
        [float(k >= size) for k in every], abs=1e-5
    )
    restore = faithfulness(model, pairs, ranking, counts=every, mode="restore", randoms=0, draws=2)
    assert [e.value for e in restore.faithfulness] == pytest.approx(
        [float(k >= 1) for k in every], abs=1e-5
    )  # each carries all before it
    ablate = faithfulness(model, pairs, ranking, counts=every, mode="ablate", randoms=0, draws=2)
    assert [e.value for e in ablate.faithfulness] == pytest.approx(
        [float(k < 1) for k in every], abs=1e-5
    )
    # A step at k = size, by trapezoids over a grid of 1/n: the sloping one counts half.
    assert keep.cpr.value == pytest.approx((n - size + 0.5) / n, abs=1e-5)
    assert keep.cmd.value == pytest.approx((size - 0.5) / n, abs=1e-5)
    # Random orders: everything that they hold before the last of the circuit's sites is nothing.
    assert np.allclose(keep.random[:, -1], 1) and (keep.random_cpr < keep.cpr.value).all()
    assert ((keep.random > 1e-4).sum(1) + size <= n + 1).all() and set(
        np.unique(keep.random.round(4))
    ) == {0.0, 1.0}
    table = keep.to_pandas()
    own, chance = (table[table.method == m] for m in ("ranking", "random order"))
    assert (
        own.added.iloc[1] == str(circuit[0])
        and own.share.iloc[-1] == 1
        and own.faithfulness.iloc[size] == pytest.approx(1, abs=1e-5)
    )
    assert (
        chance.faithfulness.tolist() == keep.random.mean(0).tolist() and "CPR" in keep._repr_html_()
    )
    assert live_hooks(model.hooked) == []


@pytest.mark.slow
def test_the_ends_are_the_clean_and_the_corrupted_run(model, examples):
    pairs = noise_pairs(model, examples)
    sites = components(model)
    ranking = [(s, float(i)) for i, s in enumerate(sites)]
    clean = np.mean([float(p.clean_scores[p.gold].exp()) for p in pairs])
    corrupted = np.mean([float(p.corrupted_scores[:, p.gold].exp().mean()) for p in pairs])
    for mode in ("keep", "restore", "ablate"):
        curve = faithfulness(
            model,
            pairs,
            ranking,
            metric="prob",
            mode=mode,
            counts=(0, len(sites)),
            randoms=0,
            draws=2,
        )
        assert curve.full == pytest.approx(clean, rel=1e-4)
        if mode != "keep":
            assert curve.empty == pytest.approx(corrupted, rel=1e-4)
        ends = [e.value for e in curve.faithfulness]
        assert ends[0] == pytest.approx({"keep": 0, "restore": 0, "ablate": 1}[mode], abs=1e-4)
        if mode == "keep":
            assert ends[1] == pytest.approx(1, abs=1e-4)


def noise_pairs(model, examples) -> Pairs:
    return make_pairs(model, examples, GaussianNoise(scale=3.0, draws=2), keep="all")


@pytest.mark.parametrize("mode", fast(["keep", "restore"], ["keep"]))
@pytest.mark.slow
def test_batches_and_noise_draws_change_nothing(model, examples, mode):
    pairs = noise_pairs(model, examples[:5])
    ranking = [
        (Site(2, "resid_post", at="query"), 2.0),
        (Site(1, "head", 2), 1.0),
        (Site(0, "mlp_out", at=-1), 0.5),
    ]
    one, many = (
        faithfulness(model, pairs, ranking, mode=mode, randoms=1, batch_size=b, draws=2)
        for b in (1, 64)
    )
    np.testing.assert_allclose(one.metric_mean, many.metric_mean, atol=1e-4)
    np.testing.assert_allclose(one.random, many.random, atol=1e-3)
    assert one.full == pytest.approx(many.full, abs=1e-4) and one.n == len(pairs)


@pytest.mark.slow
def test_restoring_the_whole_stream_restores_everything(model, examples):
    pairs = noise_pairs(model, examples)
    for site in (Site(0, "resid_pre"), Site(3, "resid_post"), Site(3, "resid_post", at="answer")):
        # Labels of several tokens are read behind the prompt as well, so that the answer's state alone is not all of it.
        curve = faithfulness(
            model, pairs, [(site, 1.0)], mode="restore", metric="logprob", randoms=0, draws=10
        )
        value = curve.faithfulness[1].value
        assert (
            value == pytest.approx(1, abs=1e-4)
            if site.at is None
            else not math.isclose(value, 0, abs_tol=1e-3)
        )


def test_areas_by_hand():
    """A straight line from 0 to 1: half. One that passes 1: CPR counts the excess, CMD counts it against it."""
    assert areas([0, 1], [0, 1]) == pytest.approx((0.5, 0.5))
    assert areas([0, 0.5, 1], [0, 2, 1]) == pytest.approx(
        (0.5 * 1 + 0.5 * 1.5, 0.5 * 1 + 0.5 * 0.5)
    )
    assert areas([0, 0.25, 1], [1, 1, 1]) == pytest.approx((1, 0))


def test_few_sites_are_all_tried_and_many_at_the_benchmarks_shares():
    assert default_counts(4) == (0, 1, 2, 3, 4)
    assert default_counts(1000) == (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert default_counts(100) == (0, 1, 2, 5, 10, 20, 50, 100)


def test_mib_counts_by_hand():
    """int(share n): rounded down, so that few sites repeat k = 0; never a k = 0 of its own."""
    assert mib_counts(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert mib_counts(9) == (0, 0, 0, 0, 0, 0, 0, 1, 4, 9)
    assert mib_counts(624) == (0, 1, 3, 6, 12, 31, 62, 124, 312, 624)


def mib_by_its_own_words(f_signed, f_magnitude) -> tuple[float, float]:
    """The benchmark's loop over neighbouring percentages, written out."""
    cpr = cmd = 0.0
    for i in range(len(SHARES) - 1):
        width = SHARES[i + 1] - SHARES[i]
        cpr += width * (f_signed[i + 1] + f_signed[i]) / 2
        cmd += width * (abs(1.0 - f_magnitude[i]) + abs(1.0 - f_magnitude[i + 1])) / 2
    return cpr, cmd


def test_the_mib_protocol_on_a_step_of_known_size():
    """Nine components, a circuit of known size: f is 0 below its size and 1 from there on, at the nominal shares."""
    planted = planted_absa()
    model, pairs = planted_pairs(planted)
    ranking, circuit = ranked(planted, model)
    assert len(ranking) == 9 and 1 < len(circuit) <= 4
    curve = faithfulness(model, pairs, ranking, protocol="mib", randoms=2, draws=5)
    assert curve.protocol == "mib" and curve.shares == SHARES and curve.counts == mib_counts(9)
    step = [float(k >= len(circuit)) for k in curve.counts]
    assert [e.value for e in curve.faithfulness] == pytest.approx(step, abs=1e-5)
    # f = 0 up to 0.2, 1 from 0.5: the slope between them counts half.
    assert curve.cpr.value == pytest.approx(0.3 / 2 + 0.5, abs=1e-5)
    assert curve.cmd.value == pytest.approx((0.2 - 0.001) + 0.3 / 2, abs=1e-5)
    assert "protocol mib" in curve._repr_html_() and len(curve.random_cpr) == 2


@pytest.mark.slow
def test_the_mib_protocol_against_an_independent_run(model, examples):
    """Every run again as plain counts of the other protocol, and the areas by the benchmark's own loop; scores of both signs."""
    pairs = noise_pairs(model, examples[:3])
    rng = np.random.default_rng(3)
    ranking = [(site, float(rng.normal())) for site in components(model)]
    curve = faithfulness(
        model, pairs, ranking, metric="logprob", protocol="mib", randoms=0, draws=2
    )
    n = len(ranking)
    signed = sorted(ranking, key=lambda item: -item[1])
    by_magnitude = sorted(ranking, key=lambda item: -abs(item[1]))
    assert signed != by_magnitude
    full = np.mean([float(p.clean_scores[p.gold]) for p in pairs])
    empty = np.mean([float(p.corrupted_scores[:, p.gold].mean()) for p in pairs])
    assert curve.empty == pytest.approx(empty, abs=1e-4)  # and not k = 0 of `keep`

    def f(order):
        ks = sorted({int(share * n) for share in SHARES})
        ranked = [(site, float(n - i)) for i, (site, _) in enumerate(order)]
        ours = faithfulness(
            model, pairs, ranked, metric="logprob", counts=ks, randoms=0, draws=2, batch_size=2
        )
        at = dict(zip(ks, ours.metric_mean, strict=True))
        return [(at[int(share * n)] - empty) / (full - empty) for share in SHARES]

    f_signed, f_magnitude = f(signed), f(by_magnitude)
    assert [e.value for e in curve.faithfulness] == pytest.approx(f_signed, abs=1e-3)
    assert curve.by_magnitude == pytest.approx(f_magnitude, abs=1e-3)
    cpr, cmd = mib_by_its_own_words(f_signed, f_magnitude)
    assert (curve.cpr.value, curve.cmd.value) == pytest.approx((cpr, cmd), abs=1e-3)
    assert cmd != pytest.approx(mib_by_its_own_words(f_signed, f_signed)[1], abs=1e-3)


def test_the_mib_protocol_fixes_its_options(model, examples):
    pairs, ranking = noise_pairs(model, examples[:2]), [(Site(0, "mlp_out"), 1.0)]
    for options in ({"mode": "ablate"}, {"counts": (0, 1)}, {"magnitude": True}):
        with pytest.raises(ConfigError, match="the protocol mib fixes mode, counts and magnitude"):
            faithfulness(model, pairs, ranking, protocol="mib", **options)
    with pytest.raises(ConfigError, match="unknown protocol 'eap'; accepted: ours or mib"):
        faithfulness(model, pairs, ranking, protocol="eap")


def test_the_order(model):
    a, b, c = Site(0, "mlp_out"), Site(1, "mlp_out"), Site(2, "mlp_out")
    ranking = [(a, 0.1), (b, -2.0), (c, 1.0)]
    assert in_order(ranking, model) == [c, a, b]
    assert in_order(ranking, model, magnitude=True) == [b, c, a]
    with pytest.raises(ConfigError, match=r"holds L0.mlp_out more than once"):
        in_order([(a, 1.0), (a, 2.0)], model)
    with pytest.raises(ConfigError, match=r"the score of L1.mlp_out is not a number"):
        in_order([(a, 1.0), (b, float("nan"))], model)
    with pytest.raises(ConfigError, match="holds no sites"):
        in_order([], model)
    with pytest.raises(SiteError, match=r"site L9.mlp_out does not exist"):
        in_order([(Site(9, "mlp_out"), 1.0)], model)


def test_bad_questions_are_refused():
    model, pairs = planted_pairs(planted_absa())
    ranking, _ = ranked(planted_absa(), model)
    for more, message in [
        ({"metric": "kl"}, "metric kl reads the whole vocabulary"),
        ({"metric": "f1"}, "unknown metric 'f1'"),
        ({"counts": (0, 99)}, r"counts \(0, 99\) of 9 sites"),
    ]:
        with pytest.raises(Exception, match=message):
            faithfulness(model, pairs, ranking, **more)
    with pytest.raises(ConfigError, match="pairs by MeanAblation have no corrupted run"):
        faithfulness(
            model,
            Pairs(
                pairs.items, MeanAblation(), pairs.continuations, pairs.verbalizer, pairs.template
            ),
            ranking,
        )
    same = tuple(Pair(p.example, p.clean, p.clean, 0, 1, Counterfactual()) for p in pairs)
    with pytest.raises(ConfigError, match="the full and the empty run have the same logit_diff"):
        faithfulness(
            model,
            Pairs(same, Counterfactual(), pairs.continuations, pairs.verbalizer, pairs.template),
            ranking,
        )


# ---------------------------------------------------------------------------------------------------- pruning


def test_an_ablated_head_gives_what_a_model_without_it_gives(model, examples):
    """Zeroing z of a head is zeroing its rows of the output matrix; zeroing mlp_out is zeroing its matrix and bias."""
    ablated = predict(model, examples, Ablation([Site(1, "head", 2), Site(2, "mlp_out")]))
    W_O, W_out, b_out = (
        model.hooked.blocks[1].attn.W_O,
        model.hooked.blocks[2].mlp.W_out,
        model.hooked.blocks[2].mlp.b_out,
    )
    kept = W_O[2].clone(), W_out.clone(), b_out.clone()
    try:
        with torch.no_grad():
            W_O[2], W_out[:], b_out[:] = 0, 0, 0
        expected = predict(model, examples)
    finally:
        with torch.no_grad():
            W_O[2], W_out[:], b_out[:] = kept
    np.testing.assert_allclose(ablated.scores, expected.scores, atol=1e-4)
    assert not np.allclose(ablated.scores, predict(model, examples).scores, atol=1e-2)


def test_means_are_over_real_tokens_and_of_what_the_edit_leaves(model, examples):
    prompts = [question(model, e) for e in examples]
    site, head = Site(1, "mlp_out"), Site(2, "head", 1)
    edit = Push("L1.mlp_out", size=3.0)
    for e in (None, edit):
        found = mean_activations(model, prompts, [site, head], e, batch_size=3)
        mlp, z = [], []
        for t in prompts:
            with torch.inference_mode():
                if e is None:
                    with capture(model.hooked, [site, head]) as seen:
                        model.forward(t.ids)
                else:
                    with e.applied(model, t), capture(model.hooked, [site, head]) as seen:
                        model.forward(t.ids)
            mlp.append(seen[site][0])
            z.append(seen[head][0])
        torch.testing.assert_close(
            found[1, "mlp_out"].float(), torch.cat(mlp).mean(0), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            found[2, "head"].float(), torch.cat(z).mean(0), atol=1e-4, rtol=1e-4
        )


@pytest.mark.slow
def test_pruning_keeps_the_answers_until_it_touches_what_matters(model, examples):
    """Gold is what the model itself answers, so that nothing removed is 1 and the curve is agreement with the whole model."""
    base = predict(model, examples)
    own = [
        example(e.sentence, e.aspect, a, e.id) for e, a in zip(examples, base.answers, strict=True)
    ]
    sites = components(model)
    ranking = [(s, float(i)) for i, s in enumerate(sites)]
    curve = prune(model, own, ranking, counts=(0, 1, 3, len(sites)), randoms=2, draws=10)
    assert (
        curve.accuracy[0].value == 1
        and curve.removed == tuple(sites)
        and (curve.random[:, 0] == 1).all()
    )
    means = mean_activations(model, [question(model, e) for e in own], sites)
    for k, estimate in zip(curve.counts, curve.accuracy, strict=True):
        assert estimate.value == predict(model, own, Ablation(sites[:k], means)).correct.mean()
    # All heads and MLPs at their means: the answer depends on the last token alone, and it is the same everywhere.
    assert len(set(predict(model, own, Ablation(sites, means)).answers)) == 1
    table = curve.to_pandas()
    ranked, chance = (table[table.method == m] for m in ("least important first", "random order"))
    assert (
        ranked["count"].tolist() == [0, 1, 3, len(sites)]
        and ranked.removed.iloc[-1] == 1
        and table.majority.notna().all()
    )
    assert (
        chance.accuracy.tolist() == curve.random.mean(0).tolist()
        and "removed" in curve._repr_html_()
    )
    zero = prune(model, own, ranking, how="zero", counts=(2,), randoms=0, draws=10)
    assert zero.accuracy[0].value == predict(model, own, Ablation(sites[:2])).correct.mean()
    assert live_hooks(model.hooked) == []


def test_an_edit_stays_in_force_below_the_ablation(model, examples):
    edit = Push("L2.resid_post@query.last", size=20.0)
    both = predict(model, examples, Ablation([Site(0, "mlp_out")], edit=edit))
    nothing = predict(model, examples, Ablation([], edit=edit))
    np.testing.assert_allclose(nothing.scores, predict(model, examples, edit).scores, rtol=1e-6)
    assert not np.allclose(both.scores, nothing.scores, atol=1e-2)
    # The ablation has the last word at a site that both write.
    last = predict(
        model, examples, Ablation([Site(2, "mlp_out")], edit=Push("L2.mlp_out", size=20.0))
    )
    np.testing.assert_allclose(
        last.scores, predict(model, examples, Ablation([Site(2, "mlp_out")])).scores, atol=1e-4
    )


def test_pruning_refuses(model, examples):
    with pytest.raises(ConfigError, match=r"counts \(7,\) of 1 sites"):
        prune(model, examples, [(Site(0, "mlp_out"), 1.0)], counts=(7,))
