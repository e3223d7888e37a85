"""Pairs: noise that is always the same, runs that line up, a filter that counts, and the sources of ablations, each worked by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.jobs import EXAMPLES, LONG, ONE_TOKEN, TEMPLATE, clean_states, example, pairs_of, tiny
from support.numpy_transformer import NumpyTransformer

from mech_absa.errors import AlignmentError, ConfigError, DataError
from mech_absa.examples import Example, Polarity
from mech_absa.patch import pairs as module
from mech_absa.patch.corruption import (
    Counterfactual,
    GaussianNoise,
    MeanAblation,
    Resample,
    ZeroAblation,
    check_alignment,
    partners,
    same_role_positions,
)
from mech_absa.patch.pairs import Pair, by_length, make_pairs, make_runs
from mech_absa.prompts import Continuation, Tokenised, Verbalizer
from mech_absa.sites import ROLES

P = Polarity


def tokens(*roles: str, ids: list[int] | None = None) -> Tokenised:
    return Tokenised.of(ids or list(range(len(roles))), roles)


def pair(corruption, id="x", sentence="The food was fine", sigma=1.0, roles=None, gold=0) -> Pair:
    aspect = "food"
    start = sentence.index(aspect)
    t = tokens(
        *(
            roles
            or (
                "template",
                "before",
                "aspect.first",
                "aspect.last",
                "opinion",
                "after",
                "query.first",
                "query.last",
                "answer",
            )
        )
    )
    return Pair(
        Example(sentence, aspect, list(P)[gold], (start, start + 4), id=id),
        t,
        t,
        gold,
        None,
        corruption,
        sigma,
    )


# ---- noise ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("span", "noised"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("sentence", [1, 2, 3, 4, 5]),
        ("aspect", [2, 3]),
        ("query", [6, 7]),
    ],
)
def test_noise_falls_on_its_span_and_nowhere_else(span, noised):
    noise = pair(GaussianNoise(draws=3, span=span)).noise(5)
    assert noise.shape == (3, 9, 5) and noise.dtype == torch.float32
    changed = (noise != 0).all(-1)
    assert changed.tolist() == [[i in noised for i in range(9)]] * 3
    assert not noise[:, [i for i in range(9) if i not in noised]].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.text(min_size=1, max_size=5), st.floats(0.01, 50))
def test_noise_depends_on_seed_and_example_alone(seed, id, sigma):
    one = pair(GaussianNoise(draws=2, seed=seed), id, sigma=sigma).noise(4)
    torch.manual_seed(99)  # whatever happened to the global generator in between
    torch.randn(7)
    assert torch.equal(
        one, pair(GaussianNoise(draws=2, seed=seed, span="all"), id, sigma=sigma).noise(4)
    )
    torch.testing.assert_close(
        pair(GaussianNoise(draws=2, seed=seed), id, sigma=2 * sigma).noise(4), 2 * one
    )
    for other in (
        pair(GaussianNoise(draws=2, seed=seed + 1), id, sigma=sigma),
        pair(GaussianNoise(draws=2, seed=seed), id + "!", sigma=sigma),
    ):
        assert not torch.isclose(one, other.noise(4)).any()
    assert not torch.isclose(one[0], one[1]).any()  # draws are independent


def test_noise_in_one_span_is_the_noise_of_all_there():
    """So that spans can be compared draw by draw."""
    whole, part = (
        pair(GaussianNoise(draws=4)).noise(6),
        pair(GaussianNoise(draws=4, span="aspect")).noise(6),
    )
    assert torch.equal(part[:, 2:4], whole[:, 2:4])


def test_noise_is_normal_with_standard_deviation_sigma():
    noise = pair(GaussianNoise(draws=200), sigma=0.7).noise(40).flatten().double()  # 72,000 numbers
    assert abs(noise.mean()) < 4 * 0.7 / 72000**0.5
    assert abs(noise.std() / 0.7 - 1) < 4 / (2 * 72000) ** 0.5
    assert abs((noise.abs() < 0.7).double().mean() - 0.6827) < 0.007


def test_noise_is_the_same_in_any_order_and_company():
    model = tiny("gpt2")
    everything = pairs_of(model, GaussianNoise(draws=2))
    turned = pairs_of(model, GaussianNoise(draws=2), examples=EXAMPLES[::-1])
    for p, q in zip(everything, reversed(turned), strict=True):
        assert p.id == q.id and p.sigma == pytest.approx(q.sigma, rel=1e-6)
        torch.testing.assert_close(p.noise(32), q.noise(32), rtol=1e-5, atol=0)


def test_sigma_is_rome_s_three_standard_deviations_of_the_aspects_embeddings():
    """By numpy, over the sub-tokens of the aspect in the question of every example."""
    model = tiny("gpt2")
    pairs = pairs_of(model, GaussianNoise())
    ids = [i for e in EXAMPLES for i in model.tokenizer(" " + e.aspect).input_ids]
    table = model.hooked.embed.W_E.numpy()[ids]
    assert len(ids) == 8  # " f" + "ood" three times, " b" + "ad" once
    assert pairs.sigma == pytest.approx(3 * table.std(ddof=1), rel=1e-6)
    assert all(p.sigma == pairs.sigma for p in pairs)
    assert pairs_of(model, GaussianNoise(scale=0.5)).sigma == pytest.approx(
        pairs.sigma / 6, rel=1e-6
    )


def test_first_is_the_first_noised_token():
    model = tiny("gpt2")
    for span, role in (
        ("all", None),
        ("sentence", "before"),
        ("aspect", "aspect.first"),
        ("query", "query.first"),
    ):
        p = pairs_of(model, GaussianNoise(draws=1, span=span), examples=EXAMPLES[:1])[0]
        assert p.first == (
            0 if role in (None, "before") else p.clean.roles[0].tolist().index(ROLES.index(role))
        )
    quiet = pairs_of(model, GaussianNoise(scale=0.0), examples=EXAMPLES[:1])[0]
    assert quiet.first == quiet.length and quiet.noise_positions() == []


def test_draw_sd_is_that_of_the_gold_probability():
    model = tiny("gpt2")
    pairs = pairs_of(model, GaussianNoise(draws=3))
    by_hand = [np.std(np.exp(p.corrupted_scores.numpy()[:, p.gold]), ddof=1) for p in pairs]
    assert pairs.draw_sd == pytest.approx(np.mean(by_hand), rel=1e-9) and pairs.draw_sd > 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(scale=-1.0), "a noise scale of -1 was given"),
        (lambda: GaussianNoise(draws=0), "0 noise draws were asked for"),
        (lambda: pair(Counterfactual()).noise(3), "made by Counterfactual has no noise"),
    ],
)
def test_impossible_noise_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- runs -------------------------------------------------------------------------------------------------------------------------


def test_scores_and_runs_are_the_numpy_transformers():
    """Clean and noised label scores from embeddings put together here."""
    model = tiny("gpt2")
    oracle = NumpyTransformer(model.hooked)
    for p in pairs_of(model, GaussianNoise(draws=2, span="aspect"), LONG, EXAMPLES[:1]):
        for index, word in enumerate(LONG):
            label = model.tokenizer(" " + word).input_ids
            clean = oracle.embed(p.clean.ids[0].tolist() + label[:-1])
            runs = [(clean, p.clean_scores[index])]
            for draw in range(2):
                noised = clean.copy()
                noised[: p.length] += p.noise(model.d_model)[draw].double().numpy()
                runs.append((noised, p.corrupted_scores[draw, index]))
            for embeddings, got in runs:
                logits = oracle.run(embeddings=embeddings)[0]
                logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                assert float(got) == pytest.approx(
                    sum(logp[p.length - 1 + j, t] for j, t in enumerate(label)), abs=1e-10
                )


def test_label_tokens_are_never_noised():
    model = tiny("gpt2")
    p = pairs_of(model, GaussianNoise(draws=2), examples=EXAMPLES[:1])[0]
    runs = make_runs(model, [p], Continuation((7, 8), ((0, (7, 8, 9)),)))
    assert runs.length == p.length + 2 and runs.prompt_length == p.length
    assert torch.equal(runs.corrupted[:, p.length :], runs.clean[:, p.length :].expand(2, -1, -1))
    assert (runs.corrupted[:, : p.length] != runs.clean[:, : p.length]).all()


def test_pairs_of_other_lengths_do_not_share_a_run():
    model = tiny("gpt2")
    pairs = pairs_of(model, GaussianNoise(draws=1))
    groups = by_length(pairs)
    short, long = groups
    assert list(groups.values()) == [[0, 1, 2], [3]] and short < long
    with pytest.raises(
        AlignmentError, match=rf"pairs of \[{short}, {long}\] tokens cannot share a run"
    ):
        make_runs(model, list(pairs), Continuation((), ()))


# ---- counterfactuals and alignment --------------------------------------------------------------------------------------------------


def test_the_first_edit_that_lines_up_is_taken():
    """The first moves the aspect, the second is too long, the third fits."""
    model = tiny("gpt2")
    e = example(
        "x", "The food was fine", "food", P.POSITIVE, ("fine was the food", P.NEUTRAL), ("The food was bad bad", P.NEGATIVE), ("The food was bad", P.NEGATIVE)
    )  # fmt: skip
    p = pairs_of(model, Counterfactual(), examples=[e])[0]
    assert (p.gold, p.foil) == (
        0,
        1,
    )  # of positive, negative, neutral: not the foil of the edits that were passed over
    assert torch.equal(
        p.corrupted.ids[0], torch.tensor(model.tokenizer("The food was bad food?").input_ids)
    )
    differs = [i for i in range(p.length) if p.clean.ids[0, i] != p.corrupted.ids[0, i]]
    assert p.first == differs[0] == len(model.tokenizer("The food was").input_ids)


def test_alignment_errors_name_the_token():
    e = EXAMPLES[0]
    a = tokens("template", "before", "aspect.last", "after", "answer", ids=[1, 2, 3, 4, 5])
    with pytest.raises(
        AlignmentError,
        match=r"^a: the clean prompt has 5 tokens and the corrupted one 4; they part at token 2;",
    ):
        check_alignment(
            a, tokens("template", "before", "aspect.last", "answer", ids=[1, 2, 9, 5]), e
        )
    with pytest.raises(
        AlignmentError, match=r"5 tokens and the corrupted one 4; they part at token 4;"
    ):
        check_alignment(
            a, tokens("template", "before", "aspect.last", "after", ids=[1, 2, 3, 4]), e
        )
    moved = tokens("template", "aspect.last", "before", "after", "answer")
    with pytest.raises(
        AlignmentError,
        match=r"^a: token 1 is before in the clean prompt and aspect\.last in the corrupted one; the edit moved the aspect",
    ):
        check_alignment(a, moved, e)
    with pytest.raises(AlignmentError, match="token 1"):
        Pair(e, a, moved, 0, 1, Counterfactual())
    check_alignment(
        a, tokens("template", "opinion", "aspect.last", "opinion", "answer"), e
    )  # an opinion may be known on one side only


def test_what_does_not_line_up_is_counted():
    model = tiny("gpt2")
    examples = [
        EXAMPLES[0],
        replace(EXAMPLES[0], id="none", counterfactuals=()),
        example(
            "longer", "The food was fine", "food", P.POSITIVE, ("The food was bad bad", P.NEGATIVE)
        ),
        EXAMPLES[1],
    ]
    pairs = pairs_of(model, Counterfactual(), examples=examples)
    assert [p.id for p in pairs] == ["a", "b"]
    assert pairs.dropped == {"no counterfactual": 1, "counterfactual does not line up": 1}
    assert pairs.considered == 4 and pairs.account()["kept"] == 2
    with pytest.raises(DataError, match=r"no pair is left of 1 examples \(1 no counterfactual\)"):
        pairs_of(model, Counterfactual(), examples=examples[1:2])


# ---- the filter -----------------------------------------------------------------------------------------------------------------------

SCORES = {  # id: gold, scores of the clean run, scores of the two noised runs (probabilities of three labels)
    "both right": (0, [0.6, 0.3, 0.1], [[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]]),
    "kept": (0, [0.6, 0.3, 0.1], [[0.2, 0.7, 0.1], [0.3, 0.4, 0.3]]),
    "kept on average": (1, [0.1, 0.8, 0.1], [[0.45, 0.55, 0.0], [0.9, 0.05, 0.05]]),  # one draw still right: mean 0.675, 0.3, 0.025
    "both wrong": (0, [0.3, 0.6, 0.1], [[0.2, 0.7, 0.1], [0.2, 0.7, 0.1]]),
    "mended by noise": (2, [0.3, 0.6, 0.1], [[0.2, 0.1, 0.7], [0.2, 0.1, 0.7]]),
}  # fmt: skip


@pytest.fixture
def scored(monkeypatch):
    """Scores from the table above in the place of the model's."""

    def noised(model, p, continuations):
        return torch.tensor(SCORES[p.id][2]).log()

    def labels(model, prompts, continuations, **kwargs):
        return torch.tensor([SCORES[by_prompt[tuple(t.ids[0].tolist())]][1] for t in prompts]).log()

    model, by_prompt, examples = tiny("gpt2"), {}, []
    for i, (name, (gold, _, _)) in enumerate(SCORES.items()):
        sentence = f"The food was fine{'!' * i}"
        examples.append(replace(example(name, sentence, "food", list(P)[gold]), id=name))
        by_prompt[tuple(model.tokenizer(TEMPLATE(examples[-1]).text).input_ids)] = name
    monkeypatch.setattr(module, "noised_scores", noised)
    monkeypatch.setattr(module, "label_scores", labels)

    def make(**kwargs):
        verbalizer = Verbalizer.of(list(ONE_TOKEN))
        return make_pairs(
            model,
            examples,
            GaussianNoise(draws=2),
            template=TEMPLATE,
            verbalizer=verbalizer,
            **kwargs,
        )

    return make


def test_the_papers_filter_and_its_account(scored):
    pairs = scored()
    assert [p.id for p in pairs] == ["kept", "kept on average"]
    assert (
        pairs.dropped == {"corrupted run right": 1, "clean run wrong": 2} and pairs.considered == 5
    )
    account = pairs.account()
    assert account["kept"] == 2 and account["classes_kept"] == {"positive": 1, "negative": 1}


def test_the_other_filters(scored):
    assert [p.id for p in scored(keep="clean")] == ["both right", "kept", "kept on average"]
    assert scored(keep="clean").dropped == {"clean run wrong": 2}
    assert [p.id for p in scored(keep="all")] == list(SCORES) and scored(keep="all").dropped == {}


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_limit_stops_looking(scored, batch_size):
    pairs = scored(limit=1, batch_size=batch_size)
    assert [p.id for p in pairs] == ["kept"]
    assert pairs.considered == 2 and pairs.dropped == {"corrupted run right": 1}
    assert [p.id for p in scored(limit=9)] == ["kept", "kept on average"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [({"limit": 0}, "a limit of 0 pairs"), ({"limit": -1}, "a limit of -1 pairs")],
)
def test_an_impossible_limit_is_refused(scored, flag, message):
    with pytest.raises(ConfigError, match=message):
        scored(**flag)


# ---- ablations ------------------------------------------------------------------------------------------------------------------------


def test_partners_have_another_polarity_and_another_sentence():
    ask = lambda sentence, gold: pair(Resample(), sentence=sentence, gold=gold)  # noqa: E731
    pool = [
        ask("food one", 0),
        ask("food two", 0),
        ask("food three", 1),
        ask("food one", 1),
        ask("food four", 2),
    ]
    allowed = [{2, 4}, {2, 3, 4}, {0, 1, 4}, {1, 4}, {0, 1, 2, 3}]
    seen = [set() for _ in pool]
    for seed in range(60):
        chosen = partners(pool, seed)
        assert chosen == partners(pool, seed)
        for i, j in enumerate(chosen):
            seen[i].add(j)
    assert seen == allowed  # all of them, and no other
    assert partners(pool[:2], 0) == [1, 0]  # one polarity only: another sentence
    assert partners([pool[0], pool[0]], 0) == [1, 0]  # one sentence only: another pair
    assert partners(pool[:1], 0) == [0]


def test_same_role_positions_by_hand():
    mine = tokens("template", "before", "before", "aspect.first", "aspect.last", "after", "answer")
    theirs = tokens(
        "template", "template", "before", "aspect.last", "after", "after", "after", "answer"
    )
    # template: its right end, 1; before: theirs has one, at 2, for both; aspect.first: none; after: the rightmost, 6
    assert same_role_positions(mine, theirs) == [1, 2, 2, -1, 3, 6, 7]
    assert same_role_positions(theirs, mine) == [0, 0, 2, 4, 5, 5, 5, 6]
    assert same_role_positions(mine, mine) == list(range(7))


def states_by_numpy(model, p):
    return NumpyTransformer(model.hooked).run(p.clean.ids[0].tolist())[1]


@pytest.mark.parametrize("by", ["role", "site"])
def test_mean_tables_by_numpy(by):
    model = tiny("gpt2")
    pairs = pairs_of(model, MeanAblation(by))
    keys = {(1, "attn_out"), (2, "head"), (0, "resid_pre")}
    means = pairs.corruption.source(
        pairs, keys, lambda chosen: clean_states(model, chosen, keys)
    ).means
    assert set(means) == keys
    acts, roles = (
        [states_by_numpy(model, p) for p in pairs],
        np.concatenate([p.clean.roles[0].numpy() for p in pairs]),
    )
    for layer, kind in keys:
        pool = np.concatenate([a["z" if kind == "head" else kind, layer] for a in acts])
        for r in set(roles.tolist()):
            chosen = pool if by == "site" else pool[roles == r]
            np.testing.assert_allclose(
                means[layer, kind][r].numpy(),
                chosen.mean(0),
                atol=1e-11,
                rtol=0,
                err_msg=f"{kind} {ROLES[r]}",
            )


def test_resampled_states_are_the_partners():
    model = tiny("gpt2")
    pairs = pairs_of(model, Resample(seed=1), examples=[EXAMPLES[0], EXAMPLES[3]])
    keys = {(1, "mlp_out"), (2, "head")}
    ablation = pairs.corruption.source(
        pairs, keys, lambda chosen: clean_states(model, chosen, keys)
    )
    for p, q in ((pairs[0], pairs[1]), (pairs[1], pairs[0])):
        got = ablation.states(clean_states(model, [p], keys), [p], p.length + 2)
        where = same_role_positions(p.clean, q.clean)
        mine, theirs = states_by_numpy(model, p), states_by_numpy(model, q)
        for layer, kind in keys:
            name = ("z" if kind == "head" else kind, layer)
            expected = np.stack(
                [mine[name][i] if j < 0 else theirs[name][j] for i, j in enumerate(where)]
            )
            np.testing.assert_allclose(
                got[layer, kind][0, : p.length].numpy(), expected, atol=1e-11, rtol=0
            )
            assert not got[layer, kind][0, p.length :].any()
        assert len(set(where)) > 4


def test_zero_is_zero_and_other_corruptions_have_no_ablation():
    model = tiny("gpt2")
    keys = {(1, "mlp_out")}
    ask = lambda chosen: clean_states(model, chosen, keys)  # noqa: E731
    pairs = pairs_of(model, ZeroAblation())
    group = list(pairs)[:3]
    states = pairs.corruption.source(pairs, keys, ask).states(ask(group), group, group[0].length)
    assert (
        states[1, "mlp_out"].shape == ask(group)[1, "mlp_out"].shape
        and not states[1, "mlp_out"].any()
    )
    assert all(p.corrupted_scores is None for p in pairs)
    for other in (Counterfactual(), GaussianNoise(draws=1)):
        assert other.source(pairs_of(model, other), keys, ask) is None
