"""The loss that weighs the tokens of an answer by whether a minimal edit to another label touches them."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE
from transformers import AutoModelForCausalLM

from mech_absa.edits import Edit, Part
from mech_absa.errors import ConfigError
from mech_absa.model import Model, load_model
from mech_absa.prompts import Verbalizer
from mech_absa.train import PrefixCache, Preset, fit
from mech_absa.train.task import Task, told_apart

LABELS = Verbalizer.of(["the food", "the wine", "a wine"])
PARTS = (Part("lora", "L1.W_O", {}, 3e-2),)


@pytest.fixture(scope="module")
def llama() -> Model:
    return load_model(tiny_folder("llama"))


@pytest.mark.parametrize(
    "answer, other, touched",
    [
        ("ab.", "cb.", [0]),  # replaced
        ("abc.", "ac.", [1]),  # deleted
        ("ac.", "abc.", [1]),  # inserted before the second token: another one stands in its place
        ("a.", "bcd.", [0]),
        ("abc", "xabcy", [0]),  # inserted behind the end: nothing is there
        ("abcd", "wxyz", [0, 1, 2, 3]),
        ("abc", "abc", []),
    ],
)
def test_a_minimal_edit_by_hand(answer, other, touched):
    flags = told_apart([*map(ord, answer)], [*map(ord, other)])
    assert [j for j, flag in enumerate(flags) if flag] == touched and len(flags) == len(answer)


def test_the_weighted_loss_by_hand(llama):
    """From all logits of Hugging Face: tokens that another label's answer lacks weigh 1, the shared ones 0.25."""
    task = Task(llama, "text", TEMPLATE, LABELS, PrefixCache(llama), 0.25)
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
    edit, items = Edit.fresh(llama, PARTS), task.prepare(EIGHT[:3])  # changes nothing yet
    assert [q.gold for q in items] == [0, 1, 2]
    want = 0.0
    for q in items:
        ids = torch.cat([q.prompt.ids[0], torch.tensor(q.answer)])
        with torch.no_grad():
            logp = hf(ids[None]).logits[0].log_softmax(-1)
        n = q.prompt.lengths[0]
        losses = [-float(logp[n - 1 + j, t]) for j, t in enumerate(q.answer)]
        # The end of sequence is in every answer; so are, for this tokenizer, the tokens of no other label.
        weights = [0.25 if all(t in a for a in task.answers) else 1.0 for t in q.answer]
        assert 0.25 in weights and weights[-1] == 0.25 and 1.0 in weights
        want += sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert task.loss(edit, items).item() == pytest.approx(want, rel=1e-5)
    plain = Task(llama, "text", TEMPLATE, LABELS, PrefixCache(llama))
    assert abs(plain.loss(edit, items).item() - want) > 1e-3


def test_weights_of_one_are_the_plain_loss(llama):
    """Also where the labels' answers have one and several tokens."""
    for labels in (LABELS, None):
        task = Task(llama, "text", TEMPLATE, labels, PrefixCache(llama))
        assert task.weights == [[1 / len(a)] * len(a) for a in task.answers]
        only = Task(llama, "text", TEMPLATE, labels, PrefixCache(llama), 0.0)
        assert all(sum(w) == pytest.approx(1) and w[-1] == 0 for w in only.weights)


def test_a_training_uses_the_weights(llama):
    """With weight 0, the end of sequence is not learnt; with the plain loss it is."""
    eos = {}
    for weight in (1.0, 0.0):
        preset = Preset("p", PARTS, epochs=6, batch_size=4, loss="text", shared_weight=weight)
        edit = fit(llama, EIGHT, preset, template=TEMPLATE)
        assert edit.record.preset["shared_weight"] == weight
        task = Task(llama, "text", TEMPLATE, None, PrefixCache(llama))
        with torch.no_grad():
            logits, target, _ = task.read(edit, task.prepare(EIGHT))
        ends = target == llama.tokenizer.eos_token_id
        eos[weight] = float(logits.log_softmax(-1)[ends, llama.tokenizer.eos_token_id].mean())
    assert eos[1.0] > eos[0.0] + 0.5


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shared_weight": -0.5, "loss": "text"}, "shared_weight is -0.5; accepted: 0 or more"),
        ({"shared_weight": math.inf, "loss": "text"}, "shared_weight is inf"),
        ({"shared_weight": math.nan, "loss": "text"}, "shared_weight is nan"),
        ({"shared_weight": 0.5}, "the loss labels reads no tokens"),
    ],
)
def test_what_weights_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words):
        Preset(**{"name": "p", "parts": PARTS} | changes)
