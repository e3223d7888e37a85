"""Moving heads away from wrong answers: the formula by hand, and what changes in a model."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE

from mech_absa.edits import load_edit, save_edit
from mech_absa.edits.base import Part
from mech_absa.edits.edit import Edit
from mech_absa.errors import ConfigError
from mech_absa.evaluate import predict
from mech_absa.model import Model, load_model, weights_hash
from mech_absa.prompts import Tokens, Verbalizer
from mech_absa.scoring import question
from mech_absa.train import Contrast, Preset, contrast, presets, wrong_answers
from mech_absa.train.contrast import moved_away


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(tiny_folder("llama"))


def wrong_edit(model: Model, place: str = "L1.W_V") -> Edit:
    """An edit that changes much: all its parameters are drawn."""
    edit = Edit.fresh(model, [Part("lora" if "W_" in place else "adapter", place, {"rank": 2})])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in edit.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return edit


def batch(model: Model, n: int = 3) -> Tokens:
    return Tokens.stack([question(model, e, TEMPLATE) for e in EIGHT[:n]])


def test_two_heads_by_hand():
    """Head 0: d = (0, -3), (1 + 3)^0.5 = 2, z' = (3, 4 + 6). Head 1: d = (8, 0), 9^0.5 = 3, z' = (12 - 24, 0).

    The norm of all four numbers goes from 13 = |(3, 4, 12, 0)| to |(3, 10, -12, 0)| = sqrt(253).
    """
    z = torch.tensor([[[3.0, 4.0], [12.0, 0.0]]], dtype=torch.float64)
    wrong = torch.tensor([[[3.0, 1.0], [20.0, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[[3.0, 10.0], [-12.0, 0.0]]], dtype=torch.float64) * 13 / 253**0.5
    torch.testing.assert_close(moved_away(z, wrong, exponent=0.5), expected)


def test_no_step_is_the_identity_and_norms_are_kept():
    z, wrong = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    assert torch.equal(moved_away(z, wrong, strength=0.0), z)
    assert torch.equal(moved_away(z, z), z)
    new = moved_away(z, wrong)
    torch.testing.assert_close(new.norm(dim=(1, 2)), z.norm(dim=(1, 2)))
    assert moved_away(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)).isfinite().all()


@pytest.mark.parametrize(("place", "layer"), [("L1.W_V", 1), ("L0.attn_out", 1), ("L0.W_Q", 2)])
def test_only_the_last_position_of_that_layer_moves(model, place, layer):
    """The heads' values with hooks of TransformerLens, row by row and without the package's passes."""
    steered, tokens = Contrast(wrong_edit(model, place), layer), batch(model)
    name = "blocks.{}.attn.hook_z".format
    _, plain = model.hooked.run_with_cache(tokens.ids)
    with steered.edit.applied(model, tokens):
        _, wrong = model.hooked.run_with_cache(tokens.ids)
    with steered.applied(model, tokens):
        _, moved = model.hooked.run_with_cache(tokens.ids)
    for below in range(layer):
        assert torch.equal(moved[name(below)], plain[name(below)])
    for row, n in enumerate(tokens.lengths):
        z, z_wrong = (c[name(layer)][row, n - 1].double() for c in (plain, wrong))
        d = z_wrong - z
        new = torch.stack([h - (1 + x.norm()) ** 0.4 * x for h, x in zip(z, d, strict=True)])
        expected = new * z.norm() / new.norm()
        found = moved[name(layer)][row]
        torch.testing.assert_close(found[n - 1].double(), expected, atol=1e-6, rtol=1e-4)
        assert (found[n - 1] - z).abs().max() > 1e-3
        others = torch.arange(found.shape[0]) != n - 1
        assert torch.equal(found[others], plain[name(layer)][row, others])


def test_it_is_scored_as_an_edit_whatever_the_batch(model, tmp_path):
    edit = wrong_edit(model)
    before, steered = weights_hash(model.hooked), Contrast(edit)
    scores = [
        predict(model, EIGHT, e, template=TEMPLATE, batch_size=b).scores
        for e, b in ((steered, 8), (steered, 1), (None, 8), (Contrast(edit, strength=0.0), 8))
    ]
    assert abs(scores[0] - scores[1]).max() < 1e-4
    assert abs(scores[0] - scores[2]).max() > 1e-3
    assert abs(scores[3] - scores[2]).max() < 1e-4
    save_edit(edit, tmp_path)
    again = Contrast(load_edit(tmp_path, model))
    assert (predict(model, EIGHT, again, template=TEMPLATE).scores == scores[0]).all()
    written = predict(model, EIGHT[:2], steered, template=TEMPLATE, decode="generate")
    assert len(written.texts) == 2
    assert weights_hash(model.hooked) == before


def test_wrong_answers_are_the_likeliest_wrong_ones(model):
    labels = Verbalizer().polarities
    scores = predict(model, EIGHT, template=TEMPLATE).scores
    for e, w, row in zip(
        EIGHT, wrong_answers(model, EIGHT, template=TEMPLATE), scores, strict=True
    ):
        others = {row[i]: p for i, p in enumerate(labels) if p != e.polarity}
        assert w.polarity == others[max(others)] and w.sentence == e.sentence


def test_drawn_wrong_answers_are_wrong_and_depend_on_the_seed(model):
    drawn = [wrong_answers(model, EIGHT * 4, "drawn", seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(w.polarity != e.polarity for w, e in zip(drawn[0], EIGHT * 4, strict=True))
    two = Verbalizer.of({"positive": "positive", "negative": "negative"})
    few = [e for e in EIGHT if e.polarity != "neutral"]
    turned = [
        wrong_answers(model, few, w, template=TEMPLATE, verbalizer=two)
        for w in ("drawn", "likeliest")
    ]
    assert turned[0] == turned[1]


def test_the_edit_learns_the_wrong_answers(model):
    preset = Preset("values", presets.parts("lora", ["L1.W_V"], 3e-2, rank=4), epochs=12)
    steered = contrast(model, EIGHT, preset, validation=EIGHT, template=TEMPLATE)
    wrong = wrong_answers(model, EIGHT, template=TEMPLATE)
    losses = [
        -predict(model, [e], edit, template=TEMPLATE).scores[0, Verbalizer().index(e.polarity)]
        for edit in (None, steered.edit)
        for e in wrong
    ]
    assert sum(losses[8:]) < sum(losses[:8]) - 1
    assert steered.layer == 1 and steered.record.preset["wrong_answers"] == "likeliest"
    assert steered.record.template == TEMPLATE.text and steered.n_parameters > 0
    assert "layer 1" in repr(steered)


def test_what_is_refused(model):
    with pytest.raises(ConfigError, match="layers 0, 1; accepted: one layer"):
        Contrast(Edit.fresh(model, [Part("bitfit", "L0.W_O"), Part("bitfit", "L1.W_O")]))
    with pytest.raises(ConfigError, match="cannot change the heads of layer 1; accepted: 2 to"):
        Contrast(wrong_edit(model, "L1.attn_out"), 1)
    last = model.n_layers - 1
    with pytest.raises(ConfigError, match="accepted: an edit of an earlier layer"):
        Contrast(wrong_edit(model, f"L{last}.mlp_out"))
    with pytest.raises(ConfigError, match="exponent is nan"):
        Contrast(wrong_edit(model), exponent=float("nan"))
    with pytest.raises(ConfigError, match="wrong is 'worst'; accepted: likeliest"):
        wrong_answers(model, EIGHT, "worst")
    with pytest.raises(ConfigError, match="no examples to answer wrongly"):
        wrong_answers(model, [])
