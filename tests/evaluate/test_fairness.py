"""Fairness: hand-counted gaps, exact permutation values, no gap and no drift for an edit that does nothing, and numpy's lens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from support.small_cases import NEG, NEU, POS, NoEdit, Push

import mech_absa as ma
from mech_absa.errors import ConfigError
from mech_absa.evaluate.fairness import (
    SWAPS,
    Swap,
    class_gaps,
    fairness,
    group_gap,
    label_kl,
    largest_rank,
    lens_kl,
    swapped_answers,
)
from mech_absa.evaluate.predictions import Predictions, predict
from mech_absa.model.hooks import live_hooks
from mech_absa.scoring import question

SMALL = Swap(
    "drink",
    ("tea", "beer"),
    ("with {group} , the {aspect} is {opinion} .", "the {aspect} is {opinion} , like {group} ."),
    ("soup", "bread"),
)


@pytest.mark.parametrize("swap", SWAPS, ids=lambda s: s.kind)
def test_the_groups_of_a_review_differ_in_one_term_only(swap):
    examples, n = list(swap.examples()), len(swap.groups)
    assert len(examples) == n * swap.reviews and len({e.id for e in examples}) == len(examples)
    for start in range(0, len(examples), n):
        review = examples[start : start + n]
        bare = {e.sentence.replace(g, "*", 1) for e, g in zip(review, swap.groups, strict=True)}
        assert len(bare) == 1 and len({(e.aspect, e.polarity) for e in review}) == 1
        assert all(e.sentence[slice(*e.span)] == e.aspect for e in review)
    classes = Counter(e.polarity for e in examples)
    assert len(set(classes.values())) == 1, "every class as often"
    uses = Counter(e.aspect for e in examples)
    assert set(uses) == set(swap.aspects)


@pytest.mark.parametrize(
    ("groups", "frames", "aspects", "words"),
    [
        (("a",), ("{group} {aspect} {opinion}",), ("x",), "two or more different"),
        (("a", "a"), ("{group} {aspect} {opinion}",), ("x",), "two or more different"),
        (("a", "b"), ("{group} {aspect}",), ("x",), "holds {opinion} 0 times"),
        (("a", "b"), ("{group} {group} {aspect} {opinion}",), ("x",), "holds {group} 2 times"),
        (("a", "b"), (), ("x",), "0 frames and 1 aspects"),
    ],
)
def test_reviews_that_cannot_be_swapped(groups, frames, aspects, words):
    with pytest.raises(ConfigError, match=words):
        Swap("k", groups, frames, aspects)


def answers(examples, *given, scores=None):
    return Predictions(tuple(examples), given, "s", scores=scores)


def test_gaps_of_classes_by_hand(examples):
    """Gold: 3 positive (0, 2, 7), 3 negative (1, 3, 5), 2 neutral (4, 6)."""
    base = answers(examples, POS, POS, POS, POS, POS, POS, POS, POS)
    edit = answers(examples, POS, NEG, NEG, NEG, NEU, POS, POS, POS)
    found = class_gaps(base, edit, draws=200)
    assert found.classes == ("positive", "negative", "neutral")
    assert found.base == (1.0, 0.0, 0.0) and found.gap_base.value == 1.0
    assert found.edited == pytest.approx((2 / 3, 2 / 3, 1 / 2))
    assert found.gap_edited.value == pytest.approx(1 / 6)
    assert found.change.value == pytest.approx(1 / 6 - 1)
    assert found.change.low <= found.change.value <= found.change.high
    two = class_gaps(base.take([0, 1]), edit.take([0, 1]), draws=20)
    assert two.classes == ("positive", "negative") and two.edited == (1.0, 1.0)


def test_the_p_of_a_gap_is_that_of_all_permutations():
    """Three reviews that only the first group gets right: 2 of the 8 permutations have that gap."""
    right = np.array([[True, False]] * 3)
    found = group_gap(right, np.arange(3), draws=4000)
    assert found.value == 1.0 and found.p == pytest.approx(0.25, abs=0.03)
    alike = group_gap(np.array([[True, True], [False, False]]), np.arange(2), draws=50)
    assert alike.value == 0 and alike.p == 1.0
    # One right answer of four is a gap of 1/2 however the groups are permuted.
    assert group_gap(np.array([[True, False], [False, False]]), np.arange(2), draws=50).p == 1.0


def test_swapped_answers_by_hand():
    given = [POS, POS, NEG, POS, NEG, None]
    assert swapped_answers(given, 3).tolist() == pytest.approx([2 / 3, 1.0])
    assert swapped_answers(given, 2).tolist() == [0, 1, 1]


def test_kl_over_labels_by_hand(examples):
    p = np.log([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]) + 2.0  # a constant changes nothing
    q = np.log([[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    found = label_kl(
        answers(examples[:2], POS, POS, scores=p), answers(examples[:2], NEG, POS, scores=q)
    )
    assert found == pytest.approx([0.25 * np.log(2), 0])
    with pytest.raises(ConfigError, match="have no scores of labels"):
        label_kl(answers(examples[:1], POS), answers(examples[:1], NEU))


def test_an_edit_that_does_nothing_changes_no_gap(model, examples):
    found = fairness(model, NoEdit(), examples, swaps=[SMALL], draws=20)
    assert found.accuracy_base == found.accuracy_edited
    assert found.classes.base == found.classes.edited and found.classes.change.value == 0
    (g,) = found.groups
    assert (g.base, g.gap_base, g.swapped_base) == (g.edited, g.gap_edited, g.swapped_edited)
    assert g.kl_labels == pytest.approx((0, 0), abs=1e-9) and g.kl_vocabulary == (0, 0)
    assert found.kl_labels.value == pytest.approx(0, abs=1e-9) and all(
        e.value == 0 for e in found.layers
    )
    assert len(found.layers) == model.n_layers and found.rank is None and found.parameters is None
    assert live_hooks(model.hooked) == []
    assert "gap of groups: drink" in found._repr_html_()


def test_the_numbers_are_those_of_the_answers(model, examples):
    edit = Push("L2.resid_post@query.last", size=20.0)
    found = fairness(model, edit, examples, swaps=[SMALL], draws=20)
    (g,) = found.groups
    swapped = list(SMALL.examples())
    base, edited = predict(model, swapped), predict(model, swapped, edit)
    for i in range(2):
        assert g.edited[i] == edited.correct[i::2].mean()
        assert g.kl_labels[i] == pytest.approx(label_kl(base, edited)[i::2].mean())
    assert g.gap_edited.value == pytest.approx(abs(g.edited[0] - g.edited[1]))
    assert g.swapped_edited.value == swapped_answers(edited.answers, 2).mean()
    row = found.row()
    assert row["drink_gap"] == g.gap_edited.value and row["drink_swapped_base"] == g.swapped_base.value  # fmt: skip
    assert row["kl_vocabulary"] == row[f"lens_L{model.n_layers - 1}"] > 0
    assert row["class_gap"] == found.classes.gap_edited.value


def test_the_unedited_model_runs_once_for_several_edits(model, examples, monkeypatch):
    """The second edit gets the same numbers as alone, without a pass of the unedited model."""
    first, second = (Push("L2.resid_post@query.last", size=size) for size in (5.0, 20.0))
    asked = {"swaps": [SMALL], "draws": 20}
    alone = fairness(model, second, examples, **asked)
    known: dict = {}
    fairness(model, first, examples, known=known, **asked)
    kept, passes = set(known), []
    run = type(model).run_hooked
    monkeypatch.setattr(
        type(model), "run_hooked", lambda self, x: passes.append(len(x)) or run(self, x)
    )
    assert fairness(model, second, examples, known=known, **asked).record() == alone.record()
    assert set(known) == kept and sum(passes) == len(examples) + len(list(SMALL.examples()))
    fairness(model, second, examples[:4], known=known, **asked)
    assert len(known) == len(kept) + 2, "other examples are other answers and other states"


def test_drift_by_layer_is_that_of_the_lens_in_numpy(model, examples):
    """The last token drifts above an edit of the aspect, and at it only if it is edited itself; at the
    last layer the drift is the KL of the model's own logits.
    """
    edit = Push("L1.resid_post@query.last")
    prompts = [question(model, e) for e in examples]
    layers = range(model.n_layers)
    found = lens_kl(model, edit, prompts, layers, batch_size=3)
    assert (found[:2] == 0).all() and (found[2:] > 1e-3).any(1).all()
    everywhere = lens_kl(model, Push("L1.resid_post"), prompts, [0, 1])
    assert (everywhere[0] == 0).all() and (everywhere[1] > 1e-3).all()
    for i, tokens in enumerate(prompts):
        with torch.no_grad():
            base = model.forward(tokens.ids)[0, -1].double().numpy()
            with edit.applied(model, tokens):
                edited = model.forward(tokens.ids)[0, -1].double().numpy()
        p, q = (np.exp(x - np.logaddexp.reduce(x)) for x in (base, edited))
        assert found[-1, i] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-3, abs=1e-6)
    assert lens_kl(model, edit, prompts, [2]) == pytest.approx(found[2:3], rel=1e-4, abs=1e-7)


def test_the_rank_is_that_of_the_parts(model):
    parts = [
        ma.edits.Part("lora", "L0.W_O", {"rank": 2}),
        ma.edits.Part("loreft", "L1.resid_post@query.last", {"rank": 3}),
    ]
    assert largest_rank(ma.edits.Edit.fresh(model, parts)) == 3
    red = ma.edits.Part("red", "L1.resid_post@query.last", {})
    assert largest_rank(ma.edits.Edit.fresh(model, [red])) is None
