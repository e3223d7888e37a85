"""Parts that share one set of parameters: their gradient, their count, and that nothing pulls them apart again."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.edit_cases import EVERYWHERE, logits, loud, prompts, tiny_model
from support.training_cases import EIGHT
from support.training_cases import TEMPLATE as QUESTION

from mech_absa.edits import Edit, Part, Shape, count, export_peft, load_edit, save_edit
from mech_absa.edits.edit import FAMILIES
from mech_absa.errors import ConfigError, EditError
from mech_absa.prompts import Tokens
from mech_absa.train import Preset, fit, presets

SHARE = [f for f in EVERYWHERE if not FAMILIES[f].own and f != "tinylora"]


@pytest.fixture
def llama():
    return tiny_model("llama")


def pair(family: str) -> tuple[Part, Part]:
    """The same part in its layer and, sharing, in layer 0; the one that shares comes first."""
    place = EVERYWHERE[family]
    return Part(family, f"L0{place[2:]}", {"shared_with": place}), Part(family, place)


def alone(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(replace(p, options={k: v for k, v in p.options.items() if k != "shared_with"}) for p in parts)  # fmt: skip


def apart(model, edit: Edit) -> Edit:
    """The same edit without sharing: each part has a copy of the parameters."""
    other = Edit.fresh(model, alone(edit.parts))
    with torch.no_grad():
        for mine, theirs in zip(other, edit, strict=True):
            for name, p in mine.named_parameters():
                p.copy_(getattr(theirs, name))
    return other


def answer(model, edit: Edit) -> torch.Tensor:
    tokens = prompts(model)[1]
    with edit.applied(model, tokens):
        return model.forward(tokens.ids)[0, -1].log_softmax(-1)[7]


@pytest.mark.parametrize("family", SHARE)
def test_the_gradient_is_the_sum_of_the_single_ones(llama, family):
    edit = loud(llama, *pair(family))
    single = apart(llama, edit)
    tokens = Tokens.stack(prompts(llama))
    assert torch.equal(logits(llama, tokens, edit), logits(llama, tokens, single))
    answer(llama, edit).backward()
    answer(llama, single).backward()
    borrower, lender = edit
    assert not list(borrower.parameters()) and borrower.borrows and not lender.borrows
    for name, p in lender.named_parameters():
        parts = [i.get_parameter(name).grad for i in single]
        assert all(float(g.abs().max()) > 0 for g in parts), name
        torch.testing.assert_close(p.grad, sum(parts), atol=1e-6, rtol=1e-4)
    assert edit.n_parameters == count(edit.parts, Shape.of(llama)) == single.n_parameters / 2


@pytest.mark.parametrize("family", SHARE)
def test_saved_copied_and_cast_it_still_shares(llama, family, tmp_path):
    edit, tokens = loud(llama, *pair(family)), prompts(llama)[0]
    want = logits(llama, tokens, edit)
    again = load_edit(save_edit(edit, tmp_path / "edit"), llama)
    assert set(load_file(tmp_path / "edit" / "edit.safetensors")) == {
        f"001.{name}" for name, _ in list(edit)[1].named_parameters()
    }
    for other in (again, copy.deepcopy(edit)):
        assert torch.equal(logits(llama, tokens, other), want)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        borrower, lender = other
        for name, p in lender.named_parameters():
            assert getattr(borrower, name) is p and not p.any()
    assert torch.equal(logits(llama, tokens, edit), want), "the copies are not the original"
    borrower, lender = edit.double()
    assert all(getattr(borrower, n) is p for n, p in lender.named_parameters())


def test_merged_and_exported_every_place_has_the_shared_update(llama, tmp_path):
    edit = loud(llama, *pair("lora"))
    merged = edit.merged(llama)
    for i in edit:
        W, _ = i.matrix.weight(llama)
        torch.testing.assert_close(
            i.matrix.weight(merged)[0], (W + edit.interventions[1].update()).float()
        )
    export_peft(edit, llama, tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    A = [v for name, v in found.items() if "lora_A" in name]
    assert len(A) == 2 and torch.equal(*A)
    assert "shared_with" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_sharing_lasts_through_training_and_resuming(llama, tmp_path):
    """LoReFT is settled once a step; the pair is what one optimiser makes of the summed gradients."""
    made = presets.share(presets.bundled(presets.range_sites("0-2"), epochs=1), [(0, 1, 2)])
    preset = made.but(batch_size=4)
    whole = fit(llama, EIGHT, preset, template=QUESTION)
    assert [i.borrows for i in whole] == [True, False, True] * 2
    one = presets.bundled(presets.range_sites("1"))
    assert whole.n_parameters == count(one.parts, Shape.of(llama))
    assert all(a.R is whole.interventions[4].R for a in list(whole)[3:])
    R = whole.interventions[4].R
    torch.testing.assert_close(R @ R.T, torch.eye(4), atol=1e-6, rtol=0)

    class Killed(Exception):
        pass

    def kill(state):
        if state.step == 2:
            raise Killed

    path, options = tmp_path / "state.safetensors", {"template": QUESTION, "checkpoint_every": 1}
    with pytest.raises(Killed):
        fit(llama, EIGHT, preset, checkpoint=path, on_step=kill, **options)
    again = fit(llama, EIGHT, preset, checkpoint=path, **options)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_clusters_share_with_their_centre():
    """Five layers, clusters of three, one and one: by hand. Parts of other options keep their own."""
    preset = presets.bundled([f"L{n}.resid_post@query.last" for n in range(5)], "both")
    shared = presets.share(preset, [(0, 1, 2), (3,)])
    got = {p.place: p.options.get("shared_with") for p in shared.parts}
    assert got == {
        "L0.W_O": "L1.W_O", "L1.W_O": None, "L2.W_O": "L1.W_O", "L3.W_O": None, "L4.W_O": None,
        "L0.resid_post@query.last": "L1.resid_post@query.last", "L1.resid_post@query.last": None,
        "L2.resid_post@query.last": "L1.resid_post@query.last", "L3.resid_post@query.last": None,
        "L4.resid_post@query.last": None,
    }  # fmt: skip
    assert [p.lr for p in shared.parts] == [p.lr for p in preset.parts]
    mixed = (
        Part("steering", "L0.attn_out"),
        Part("steering", "L1.mlp_out"),
        Part("red", "L1.attn_out"),
    )
    assert presets.share(Preset("p", mixed), [(0, 1)]).parts == mixed, "nothing is alike"
    two = presets.share(
        Preset("p", (Part("steering", "L4.head1"), Part("steering", "L2.head1"))), [(2, 4)]
    )
    assert [p.options for p in two.parts] == [{}, {"shared_with": "L4.head1"}]
    named = presets.named("both_shared", presets.range_sites("1-2"), Shape.of(tiny_model("llama")))
    assert named.name == "both_shared" and [p.options.get("shared_with") for p in named.parts] == [
        "L2.W_O", None, "L2.resid_post@query.last", None,
    ]  # fmt: skip


def test_what_cannot_be_shared_is_refused(llama, tmp_path):
    both = Part("lora", "L1.W_O", {"rank": 2})
    with pytest.raises(ConfigError, match="layer 1 is in two clusters"):
        presets.share(Preset("p", (both,)), [(0, 1), (1, 2)])
    once = presets.bundled(presets.range_sites("0-1"), "both_shared")
    with pytest.raises(ConfigError, match=r"lora at L0.W_O already uses the parameters of L1.W_O"):
        presets.share(once, [(0, 1)])
    cases = [
        (Part("lora", "L0.W_O", {"rank": 2, "shared_with": "L2.W_O"}), "has no lora there"),
        (Part("lora", "L0.W_O", {"rank": 3, "shared_with": "L1.W_O"}), "of the same sizes"),
        (Part("bitfit", "L0.W_O", {"shared_with": "L1.W_O"}), "has no bitfit there"),
        (Part("lora", "L0.W_O", {"shared_with": "L0.W_O"}), "has no lora there"),
        (Part("dora", "L0.W_O", {"shared_with": "L1.W_O"}), "norms of its own matrix"),
        (Part("head_gate", "L0.head1", {"shared_with": "L1.head1"}), "its own gates"),
        (
            Part("post_block", "L0.resid_post", {"orthogonal_to": "L1.W_O", "shared_with": "L1.resid_post"}),
            "kept orthogonal to L1.W_O",
        ),
    ]  # fmt: skip
    for part, words in cases:
        with pytest.raises(ConfigError, match=words) as caught:
            Edit.fresh(llama, [part, both])
        assert "\n" not in str(caught.value)
    folder = save_edit(loud(llama, *pair("steering")), tmp_path / "edit")
    fields = json.loads((folder / "edit.json").read_text())
    fields["parts"][0]["options"]["shared_with"] = ["L7"]
    fields.pop("sha256_here")
    fields["schema"] = 1
    (folder / "edit.json").write_text(json.dumps(fields))
    with pytest.raises(EditError, match="damaged"):
        load_edit(folder)
