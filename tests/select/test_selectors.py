"""Every selector against a case by hand, an identity, or another implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import fast
from support.jobs import EXAMPLES, ONE_TOKEN, TEMPLATE, tiny

from mech_absa.errors import ConfigError, DataError
from mech_absa.evaluate.ranking import in_order
from mech_absa.model.forward import advance
from mech_absa.patch.trace import trace
from mech_absa.prompts import Verbalizer
from mech_absa.scoring import label_scores
from mech_absa.select import SELECTORS, Evidence, selector
from mech_absa.select.probe import LinearProbe, control_labels, probe_accuracy
from mech_absa.sites import Site

LABELS = Verbalizer.of(ONE_TOKEN, " ")


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence(
        tiny("llama"), tuple(EXAMPLES), template=TEMPLATE, verbalizer=LABELS, keep="all"
    )


# ---- what all of them share


def test_an_unknown_selector():
    with pytest.raises(ConfigError, match="unknown selector 'nose'; accepted: exact, "):
        selector("nose")


def test_names_are_those_of_the_selectors():
    assert all(selector(name).name == name for name in SELECTORS)


def test_no_examples():
    with pytest.raises(ConfigError, match="no examples"):
        Evidence(tiny("llama"), ())


def test_states_are_those_of_each_prompt_alone(evidence):
    model = evidence.model
    for i, prompt in enumerate(evidence.prompts):
        for layer in range(model.n_layers):
            x = advance(model, model.embed(prompt.ids), 0, layer + 1)[0]
            for role, states in evidence.states.items():
                mean = x[prompt.positions(role)].mean(0).numpy()
                np.testing.assert_allclose(states[layer, i], mean, atol=1e-10)
    assert "answer" in evidence.states and "opinion" not in evidence.states


# ---- causal


@pytest.mark.parametrize(
    "name, kinds, direction",
    [
        ("exact", ["resid_post"], "denoise"),
        ("exact_noise", ["resid_post"], "noise"),
        ("writes", ["attn_out", "mlp_out"], "denoise"),
    ],
)
def test_causal_scores_are_means_of_the_loop(evidence, name, kinds, direction):
    """One hooked forward pass per cell is another implementation."""
    ranking = selector(name)(evidence)
    frame = trace(
        evidence.model,
        evidence.pairs,
        kinds,
        by="role",
        metric="logit_diff",
        direction=direction,
        engine="loop",
        check=False,
    ).frame
    assert {s.kind for s, _ in ranking} == set(kinds)
    for site, score in ranking:
        cell = (frame["kind"] == site.kind) & (frame["layer"] == site.layer)
        mean = frame.loc[cell & (frame["role"] == site.at), "effect"].mean()
        assert score == pytest.approx(mean, abs=1e-9)
    assert {"template", "answer"}.isdisjoint({s.at for s, _ in ranking})
    assert in_order(ranking, evidence.model) == ranking.top(len(ranking))


def test_roles_whose_tokens_change_are_left_out(evidence):
    ranking = selector("exact")(evidence)
    changed = set(ranking.about["left_out"]) - {"template", "answer"}
    assert changed and changed.isdisjoint({s.at for s, _ in ranking})


@pytest.mark.parametrize("name", fast(["atp", "atpstar", "relp", "ig"], ["relp"]))
def test_estimates_are_those_of_the_trace(evidence, name):
    ranking = selector(name)(evidence)
    options = {"by": "role", "metric": "logit_diff", "method": name, "check": False}
    effects = trace(evidence.model, evidence.pairs, ["resid_post"], **options)
    mean = effects.frame.groupby(["layer", "role"])["effect"].mean()
    for site, score in ranking:
        assert score == pytest.approx(mean[site.layer, site.at], abs=1e-12)
    exact = selector("exact")(evidence)
    assert {s for s, _ in exact} == {s for s, _ in ranking}


# ---- lens


def test_the_lens_at_the_last_layer_is_the_model(evidence):
    ranking = selector("lens")(evidence)
    continuations = LABELS.continuations(evidence.model.tokenizer, TEMPLATE)
    scores = label_scores(evidence.model, evidence.prompts, continuations)
    own = (scores.argmax(1).numpy() == evidence.gold).mean()
    assert ranking.layer_scores[-1] == pytest.approx(own)


def test_the_lens_below_by_hand(evidence):
    model, ids = evidence.model, [i for _, (i,) in _one_token_labels(evidence)]
    right = []
    for prompt, gold in zip(evidence.prompts, evidence.gold, strict=True):
        x = advance(model, model.embed(prompt.ids), 0, 1)[:, -1]
        logits = model.finish(x, None, "vocabulary")[0]
        right.append(int(logits[torch.tensor(ids)].argmax()) == gold)
    assert selector("lens")(evidence).layer_scores[0] == pytest.approx(np.mean(right))


def _one_token_labels(evidence):
    (continuation,) = LABELS.continuations(evidence.model.tokenizer, TEMPLATE)
    return continuation.labels


def test_the_lens_reads_labels_of_one_token(evidence):
    longer = Evidence(
        evidence.model,
        evidence.examples,
        template=TEMPLATE,
        verbalizer=Verbalizer.of(("the staff", "was food", "the was"), " "),
    )
    with pytest.raises(ConfigError, match="reads labels of one token"):
        selector("lens")(longer)


# ---- probe


def planted(n: int = 60):
    """Words and labels that have nothing to do with each other; every row a sentence of its own."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.integers(0, 4, n)]
    return words, rng.integers(0, 2, n), [str(i) for i in range(n)]


def test_a_probe_finds_what_is_there_and_nothing_else():
    _, labels, sentences = planted()
    noise = np.random.default_rng(1).normal(size=(len(labels), 3))
    there = np.column_stack([labels * 2.0 - 1, noise])
    assert probe_accuracy(there, labels, sentences) == 1
    assert probe_accuracy(noise, labels, sentences) < 0.75


def test_a_state_that_holds_the_word_alone_is_not_selective():
    words, labels, sentences = planted()
    one_hot = np.array([[w == f"w{k}" for k in range(4)] for w in words], dtype=float)
    control = control_labels(words, labels, seed=1)
    assert len(set(control)) == 2
    assert probe_accuracy(one_hot, control, sentences) == 1
    assert probe_accuracy(one_hot, labels, sentences) < 0.75


def test_control_labels_belong_to_words():
    words, labels, _ = planted(400)
    control = control_labels(words, labels, seed=3)
    for word in set(words):
        assert len({c for w, c in zip(words, control, strict=True) if w == word}) == 1
    many = control_labels([str(i) for i in range(4000)], np.tile([0, 0, 0, 1], 1000), seed=0)
    assert many.mean() == pytest.approx(0.25, abs=0.03)  # the labels' own frequencies


def test_sentences_are_never_split():
    """Rows of one sentence are alike, and their labels are noise: only a leak could predict them."""
    rng = np.random.default_rng(0)
    sentence = np.repeat(np.arange(30), 4)
    states = rng.normal(size=(30, 40))[sentence]
    labels = rng.integers(0, 2, 30)[sentence]
    assert probe_accuracy(states, labels, [str(s) for s in sentence]) < 0.8
    assert probe_accuracy(states, labels, [str(i) for i in range(120)]) > 0.95


def test_too_few_sentences_for_a_probe():
    with pytest.raises(DataError, match="2 sentences came to a probe with 5 folds"):
        probe_accuracy(np.zeros((4, 1)), np.array([0, 1, 0, 1]), ["a", "a", "b", "b"])


def test_selectivity_is_the_difference(evidence):
    probe = LinearProbe(folds=2)
    ranking = probe(evidence)
    for site, score in ranking:
        both = ranking.about[str(site)]
        assert score == pytest.approx(both["accuracy"] - both["control"])
    assert {s.at for s, _ in ranking} == set(evidence.states)


# ---- fixed


def test_fixed_layers():
    deep = Evidence(tiny("llama"), tuple(EXAMPLES))
    n = deep.model.n_layers
    assert selector("first")(deep).top_layers(1) == (0,)
    assert selector("last")(deep).top_layers(1) == (n - 1,)
    assert selector("middle")(deep).top_layers(1) == ((n - 1) // 2,)


def test_random_layers_follow_the_seed():
    a, b = (Evidence(tiny("llama"), tuple(EXAMPLES), seed=s) for s in (0, 1))
    one, again = (selector("random")(a).layer_scores for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert (one != selector("random")(b).layer_scores).any()


def test_a_ranking_names_sites_of_the_model(evidence):
    for name in SELECTORS:
        if name == "probe" or name.startswith("weight_patch"):
            continue  # more folds than these examples have sentences; no adapter
        ranking = selector(name)(evidence)
        assert all(isinstance(evidence.model.check_site(s), Site) for s, _ in ranking)
        assert ranking.about["cpu_seconds"] >= 0
