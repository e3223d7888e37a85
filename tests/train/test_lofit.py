"""LoFiT on models in which it is known which heads can matter."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE
from transformers import AutoModelForCausalLM

from mech_absa.edits import Edit, Part, load_edit, save_edit
from mech_absa.errors import ConfigError
from mech_absa.model import Model, load_model, weights_hash
from mech_absa.sites import Site
from mech_absa.train import LoFiT, lofit

PLANTED = (Site(0, "head", 2), Site(1, "head", 1), Site(2, "head", 3))


@pytest.fixture(scope="module")
def planted() -> Model:
    """The tiny Llama with a loud W_O at three heads; what the others attend to is computed as ever, and hardly written."""
    hf, plain = (
        AutoModelForCausalLM.from_pretrained(tiny_folder("llama")),
        load_model(tiny_folder("llama")),
    )
    with torch.no_grad():
        for layer, block in enumerate(hf.model.layers):
            write = block.self_attn.o_proj.weight.view(plain.d_model, plain.n_heads, plain.d_head)
            for head in range(plain.n_heads):
                write[:, head] *= 3.0 if Site(layer, "head", head) in PLANTED else 1e-3
    return load_model((hf, plain.tokenizer))


@pytest.mark.slow
def test_the_planted_heads_are_chosen_and_only_they_are_edited(planted, tmp_path):
    before = weights_hash(planted.hooked)
    edit = lofit(planted, EIGHT, LoFiT(3, batch_size=4, epochs=(12, 12)), template=TEMPLATE)
    assert set(edit.places) == {str(s) for s in PLANTED}
    assert {p.family for p in edit.parts} == {
        "steering"
    } and edit.n_parameters == 3 * planted.d_head
    sizes = edit.record.lofit.sizes
    assert len(sizes) == planted.n_layers * planted.n_heads and list(sizes.values()) == sorted(
        sizes.values(), reverse=True
    )
    loud, quiet = list(sizes.values())[:3], list(sizes.values())[3:]
    assert min(loud) > 2 * max(quiet), "the charge draws the others towards 0"
    assert (
        edit.history[-1]["loss"] < edit.history[0]["loss"]
        and weights_hash(planted.hooked) == before
    )
    save_edit(edit, tmp_path)
    assert load_edit(tmp_path, planted).record == edit.record


def test_the_first_phase_scales_and_does_not_shift(planted):
    """(1 + m) * z by hand, and the charge of it."""
    edit = Edit.fresh(planted, [Part("head_gate", "L1.head1", {"gates": "none", "charge": 0.5})])
    (gate,) = edit
    assert set(gate.trainable) == {"m"}
    with torch.no_grad():
        gate.m.copy_(torch.arange(8.0) - 3)
    z = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gate(z), (gate.m + 1) * z) and torch.equal(
        gate(torch.zeros(1, 8)), torch.zeros(1, 8)
    )
    assert float(gate.penalty(7).detach()) == pytest.approx(0.5 * (3 + 2 + 1 + 0 + 1 + 2 + 3 + 4))


@pytest.mark.parametrize("heads", [0, 13])
def test_how_many_heads_there_are(planted, heads):
    with pytest.raises(ConfigError, match=f"{heads} heads were asked for; accepted: 1 to 12"):
        lofit(planted, EIGHT, LoFiT(heads), template=TEMPLATE)
