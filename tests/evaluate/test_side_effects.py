"""Side effects: nothing for an edit that does nothing, hand-counted for hand-made answers, numpy's KL for one that does something."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_cases import NEG, NEU, POS, NoEdit, Push

from mech_absa.errors import ConfigError, DataError
from mech_absa.evaluate.predictions import Predictions, predict
from mech_absa.evaluate.side_effects import (
    NEAR,
    PARAPHRASES,
    PASSAGES,
    OtherAspects,
    TokenDrift,
    _intervals,
    agreement,
    drift,
    other_aspects,
    read_texts,
    side_effects,
    text_tokens,
    token_drift,
)
from mech_absa.model import weights_hash
from mech_absa.model.hooks import live_hooks
from mech_absa.prompts import PromptTemplate
from mech_absa.scoring import question


def test_an_edit_that_does_nothing_has_no_side_effects(model, examples):
    before = weights_hash(model.hooked)
    s = side_effects(model, NoEdit(), examples, others=[examples[:4]], draws=20)
    assert s.reliability.difference.value == 0 and (
        s.reliability.mcnemar.b,
        s.reliability.mcnemar.c,
    ) == (0, 0)
    assert s.consistency_base == s.consistency_edited
    assert all(g.base == g.edited for g in s.generality) and [
        g.template for g in s.generality
    ] == list(PARAPHRASES)
    for d in (s.text, s.near):
        assert (d.kl, d.kl_max, d.top1) == (0, 0, 1)
    assert s.near.n == len(NEAR) * len(examples)
    assert s.text.n == sum(len(model.tokenizer(t).input_ids) for t in PASSAGES)
    assert (
        s.other_aspects.n == 0
        and s.other_aspects.one_label_base == s.other_aspects.one_label_edited
    )
    assert [p.n for p in s.portability] == [4] and s.portability[0].difference.value == 0
    assert s.weights_unchanged and s.weights_before == before and live_hooks(model.hooked) == []
    assert s.record()["weights_unchanged"] is True and "unchanged" in s._repr_html_()


def test_the_intervals_are_those_of_the_means(model, examples):
    """Every mean of a table stands in the middle of an interval that was made from its own rows."""
    edit = Push("L2.resid_post@query.last", size=20.0)
    others = [examples[:4], examples[5:]]
    s = side_effects(model, edit, examples, others=others, draws=200, texts=PASSAGES[:3])
    found = s.intervals
    assert found.accuracy.value == s.reliability.accuracy_first
    assert found.generality.value == pytest.approx(np.mean([g.edited for g in s.generality]))
    assert found.consistency.value == pytest.approx(s.consistency_edited)
    right = sum(p.accuracy_first * p.n for p in s.portability)
    assert found.elsewhere.value == pytest.approx(right / 7)
    assert (found.text_kl.value, found.text_top1.value) == (s.text.kl, s.text.top1)
    assert (found.near_kl.value, found.near_top1.value) == pytest.approx((s.near.kl, s.near.top1))
    assert found.aspects.value == pytest.approx(s.other_aspects.agreement, nan_ok=True)
    for name, e in vars(found).items():
        assert np.isnan(e.low) or e.low <= e.value <= e.high, name
    assert found.near_kl.low < found.near_kl.high
    alone = side_effects(model, edit, examples, paraphrases=(), near=NEAR[:1], draws=20)
    assert np.isnan(alone.intervals.elsewhere.value) and np.isnan(alone.intervals.generality.value)


def test_the_drift_of_tokens_knows_their_prompts(model):
    """Texts of different length in batches of two, against each text alone."""
    edit = Push("L1.resid_post", size=1.0)
    tokens = [t for text in PASSAGES[:3] for t in text_tokens(model, text)]
    moved = token_drift(model, edit, tokens, batch_size=2)
    for i, t in enumerate(tokens):
        own = token_drift(model, edit, [t])
        assert moved.kl[moved.prompt == i] == pytest.approx(own.kl, rel=1e-4, abs=1e-7)
    assert np.bincount(moved.prompt).tolist() == [t.lengths[0] for t in tokens]


def test_a_note_says_what_an_answer_is_compared_with(model, examples):
    """`98 % as before` once meant the main wording, once the model without the edit, in one table."""
    s = side_effects(model, NoEdit(), examples, draws=20)
    s = replace(s, other_aspects=OtherAspects(4, 0.75, 0.1, 1, 0, 1.0, 1.0))
    notes = s.summary()[""].dropna()
    wordings = notes[notes.str.contains("answered as under the main wording")]
    assert len(wordings) == len(PARAPHRASES)
    (others,) = notes[notes.str.contains("answered as without the edit")]
    assert others == "75 % of 4 answered as without the edit; 1 fixed, 0 broken"
    assert not notes.str.contains("as before").any()


def kl_by_hand(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (a.astype(float), b.astype(float)))
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    return (p * np.log(p / q)).sum(-1)


def test_drift_is_the_kl_of_all_logits_at_all_tokens(model):
    """Texts of different length in one batch against one by one, through the plain forward pass."""
    edit = Push("L1.resid_post", size=1.0)
    tokens = [t for text in PASSAGES[:3] for t in text_tokens(model, text)]
    found = drift(model, edit, tokens, batch_size=2)
    divergences, same = [], []
    with torch.no_grad():
        for t in tokens:
            base = model.forward(t.ids)[0].numpy()
            with edit.applied(model, t):
                edited = model.forward(t.ids)[0].numpy()
            divergences.append(kl_by_hand(base, edited))
            same.append(base.argmax(-1) == edited.argmax(-1))
    divergences, same = np.concatenate(divergences), np.concatenate(same)
    assert (
        found.n == len(divergences)
        and found.kl == pytest.approx(divergences.mean(), rel=1e-4)
        and found.kl > 0.01
    )
    assert found.kl_max == pytest.approx(
        divergences.max(), rel=1e-3
    ) and found.top1 == pytest.approx(same.mean())


def test_an_edit_of_the_asked_aspect_leaves_text_alone_and_moves_other_questions(model, examples):
    s = side_effects(
        model, Push("L1.resid_post@query.last"), examples, paraphrases=PARAPHRASES[:1], draws=20
    )
    assert s.text.kl == 0 and s.near.kl > 0.01
    last = drift(
        model,
        Push("L1.resid_post@query.last"),
        [question(model, e, PromptTemplate(t)) for t in NEAR for e in examples],
        last=True,
    )
    assert s.near == last
    everywhere = side_effects(
        model, Push("L1.resid_post"), examples, paraphrases=PARAPHRASES[:1], draws=20
    )
    assert everywhere.text.kl > 0.01


def test_changed_weights_are_seen(model, examples):
    class Vandal:
        @contextmanager
        def applied(self, model, tokens):
            with torch.no_grad():
                model.hooked.unembed.b_U[0] += 1.0
            yield

    kept = model.hooked.unembed.b_U.clone()
    try:
        s = side_effects(model, Vandal(), examples[:2], paraphrases=(), near=NEAR[:1], draws=20)
    finally:
        with torch.no_grad():
            model.hooked.unembed.b_U.copy_(kept)
    assert not s.weights_unchanged and "CHANGED" in s._repr_html_()


def answers(examples, *given, scores=None, name="s"):
    return Predictions(tuple(examples), given, name, scores=scores)


def test_agreement_by_hand(examples):
    a = answers(examples[:4], POS, POS, NEG, NEU)
    b = answers(examples[:4], POS, NEG, NEG, NEU)
    c = answers(examples[:4], POS, NEU, NEG, POS)
    assert agreement([a, b, c]) == pytest.approx((3 / 4 + 2 / 4 + 2 / 4) / 3)
    assert agreement([a]) == 1.0


def test_other_aspects_by_hand(examples):
    """Sentence 1: rows 0 (pos), 1 (neg). Sentence 2: rows 2 (pos), 3 (neg), 4 (neu). Rows 5, 6, 7 stand alone."""
    logs = np.log(np.full((8, 3), 1 / 3))
    moved = logs.copy()
    moved[0] = np.log([0.5, 0.25, 0.25])
    base = answers(examples, POS, POS, POS, POS, POS, NEG, POS, POS, scores=logs)
    edit = answers(examples, POS, NEG, NEG, NEG, POS, POS, POS, POS, scores=moved)
    found = other_aspects(base, edit)
    # Row 1 changed, so row 0 is another aspect; rows 2 and 3 changed, so 2, 3 and 4 are. Row 1's neighbour did not change; row 5 has none.
    assert found.n == 4 and found.agreement == pytest.approx(2 / 4)
    assert (found.fixed, found.broken) == (1, 1)  # row 3 became right, row 2 wrong
    assert found.kl == pytest.approx(
        np.mean([np.log(1 / 3) - (np.log(0.5) + 2 * np.log(0.25)) / 3, 0, 0, 0])
    )
    assert (found.one_label_base, found.one_label_edited) == (1.0, 0.0)
    one = answers(examples, POS, NEG, POS, NEG, POS, NEG, POS, POS, scores=moved)
    # Rows 1 and 3 changed, so rows 0, 2 and 4 are other aspects, and all are answered as before.
    drifted = TokenDrift(np.array([0.1, 0.3]), np.array([True, False]), np.array([0, 1]))
    cells = {"text": (drifted, ["a", "b"]), "near": (drifted, ["a", "a"])}
    sure = _intervals([(base, one)], [(base, edit)], cells, level=0.95, draws=100, seed=0)
    assert sure.aspects.value == 1.0 == other_aspects(base, one).agreement
    assert sure.elsewhere.value == edit.correct.mean() and np.isnan(sure.generality.value)
    assert sure.text_kl.value == pytest.approx(0.2) and sure.text_kl.low == pytest.approx(0.1)
    assert np.isnan(sure.near_kl.low), "one cluster has no interval"
    nothing = other_aspects(base, base)
    assert nothing.n == 0 and np.isnan(nothing.agreement)
    alone = other_aspects(base.take([5, 6]), edit.take([5, 6]))
    assert np.isnan(alone.one_label_base)


def test_reliability_counts_what_was_put_right_and_wrong(model, examples):
    edit = Push("L2.resid_post@query.last", size=20.0)
    base, edited = predict(model, examples), predict(model, examples, edit)
    s = side_effects(model, edit, examples, paraphrases=PARAPHRASES[:2], near=NEAR[:1], draws=20)
    assert s.reliability.mcnemar.b == (edited.correct & ~base.correct).sum()
    assert s.reliability.mcnemar.c == (base.correct & ~edited.correct).sum()
    assert s.reliability.accuracy_first == edited.correct.mean()
    for g in s.generality:
        worded = predict(model, examples, edit, template=g.template)
        assert g.edited == worded.correct.mean()
        assert g.agreement == np.mean(
            [a is b for a, b in zip(worded.answers, edited.answers, strict=True)]
        )


def test_long_texts_come_in_pieces(model):
    text = "the food was great . " * 200
    pieces = text_tokens(model, text)
    assert len(pieces) > 1 and max(p.lengths[0] for p in pieces) <= model.n_ctx
    assert [i for p in pieces for i in p.ids[0].tolist()] == model.tokenizer(text).input_ids


def test_the_templates_ask_and_the_passages_do_not(examples):
    assert len({*PARAPHRASES, *NEAR}) == len(PARAPHRASES) + len(NEAR)
    for text in (*PARAPHRASES, *NEAR):
        assert PromptTemplate(text)(examples[0]).queries


def test_texts_from_a_file(tmp_path, model, examples):
    path = tmp_path / "t.txt"
    path.write_text("\ufeffone\ntwo\r\n\r\nthree\n\n\n\nfour\n", encoding="utf-8")
    assert read_texts(path) == ("one two", "three", "four")
    path.write_text(" \n\n ")
    with pytest.raises(DataError, match="the file is empty; at least one passage"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_texts(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "nope")
    with pytest.raises(ConfigError, match="no unrelated texts"):
        side_effects(model, NoEdit(), examples, texts=())
