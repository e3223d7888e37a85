"""Kept and read back to the last bit; refused when damaged or of another model; merged where algebra allows, and only there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import fast
from support.edit_cases import EVERYWHERE, logits, loud, prompts, tiny_model
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from mech_absa.edits import (
    HeadChoice,
    Part,
    Shape,
    TrainingRecord,
    export_peft,
    load_edit,
    merge,
    save_edit,
    store,
)  # fmt: skip
from mech_absa.errors import EditError
from mech_absa.model import load_model, weights_hash
from mech_absa.prompts import Tokens

CLOSE = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture
def llama():
    return tiny_model("llama")


def test_what_is_loaded_gives_the_same_logits_to_the_bit(llama, tmp_path):
    edit = loud(llama, *[Part(f, p) for f, p in EVERYWHERE.items()]).with_record(seed=7)
    tokens = Tokens.stack(prompts(llama))
    save_edit(edit, tmp_path)
    back = load_edit(tmp_path, llama)
    assert torch.equal(logits(llama, tokens, back), logits(llama, tokens, edit))
    assert (
        back.record == TrainingRecord(seed=7)
        and back.parts == edit.parts
        and back.shape == edit.shape
    )
    said = json.loads((tmp_path / "edit.json").read_text())
    assert (
        said["schema"] == 2
        and said["base"]["sha256"] == llama.sha256
        and said["n_parameters"] == edit.n_parameters
    )
    assert said["formulas"]["red"] == "l_s * h + l_b" and "L1.W_O" in said["sites"]
    assert {p.name for p in tmp_path.iterdir()} == {"edit.json", "edit.safetensors"}


@pytest.mark.parametrize("arch", ["gpt2"])
def test_another_base_is_refused(llama, tmp_path, arch):
    save_edit(loud(llama, Part("lora", "L1.W_O")), tmp_path)
    with pytest.raises(EditError, match="other weights"):
        load_edit(tmp_path, tiny_model(arch))


def test_an_edit_of_float32_knows_its_model_in_bfloat16(tmp_path):
    wide = load_model(tiny_folder("llama"))
    edit = loud(wide, Part("lora", "L1.W_O"))
    save_edit(edit, tmp_path)
    half = load_model(tiny_folder("llama"), dtype="bfloat16")
    assert half.sha256 == wide.sha256  # what the files hold
    first = weights_hash(wide.hooked)  # what version 0.1.0 wrote
    if wide.backend.name == "hooked":
        assert half.float32_sha256 == first and wide.float32_sha256 is None
        assert half.answers_to(first) and wide.answers_to(first)
    assert not half.answers_to("0" * 64)
    merged = load_edit(tmp_path, half).merged(half)
    assert merged.dtype == torch.bfloat16 and merged.sha256 != half.sha256
    with pytest.raises(EditError, match="other weights"):
        load_edit(tmp_path, merged)
    with pytest.raises(EditError, match="other weights"):
        load_edit(tmp_path, load_model(tiny_folder("gpt2"), dtype="bfloat16"))


def flip(path, at=-3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: flip(f / "edit.safetensors"), "damaged: its hash"),
        (
            lambda f: (f / "edit.safetensors").write_bytes(
                (f / "edit.safetensors").read_bytes()[:40]
            ),
            "damaged",
        ),
        (lambda f: (f / "edit.safetensors").unlink(), "edit.safetensors is missing"),
        (lambda f: (f / "edit.json").unlink(), "edit.json is missing"),
        (lambda f: (f / "edit.json").write_text("[1"), "no JSON object"),
        (lambda f: change(f, schema=99), "schema version 99"),
        (
            lambda f: change(
                f, parts=[{"family": "lora", "place": "L1.W_O", "options": {"rank": 5}}]
            ),
            "not of shape",
        ),
        (lambda f: change(f, parts=[{"family": "magic", "place": "L1.W_O"}]), "unknown family"),
        (lambda f: change(f, base=None), "do not describe an edit"),
        (lambda f: scale_up(f), "edit.json is damaged: its hash"),
        (lambda f: drop(f, "sha256_here"), "edit.json is damaged: its hash"),
        (lambda f: (f / "edit.json").write_text("[" * 100_000), "no JSON object"),
        (lambda f: (f / "edit.json").write_bytes(b"\xff\xfe{}"), "no JSON object"),
        (lambda f: change(f, schema=[1] * 500), "schema version"),
        (lambda f: change(f, parts=[{"family": "lora", "place": "L70.W_O"}]), "has 3 layers"),
        (lambda f: change(f, parts=[{"family": "prefix", "place": "L70"}]), "has 3 layers"),
        (
            lambda f: change(
                f, parts=[{"family": "prefix", "place": "L1", "options": {"length": 10**15}}]
            ),
            "do not describe",
        ),
        (
            lambda f: change(f, parts=[{"family": "lora", "place": "L1.W_O", "options": "alpha"}]),
            "options of a part",
        ),
        (lambda f: change(f, parts=[{"family": "x" * 5000, "place": "L1.W_O"}]), "unknown family"),
        (lambda f: change(f, parts="L1.W_O"), "do not describe"),
        (lambda f: change(f, record="good"), "record is 'good'; an object is needed"),
        (
            lambda f: change(f, record={"template": 5}),
            "template of its record is 5; text is needed",
        ),
        (lambda f: change(f, record={"labels": "good"}), "a list of two or three words is needed"),
        (lambda f: change(f, record={"steps": -1}), "steps of its record is -1"),
        (lambda f: change(f, record={"lofit": [1]}), "lofit of its record"),
    ],
)
def test_damage_is_refused_in_one_sentence(llama, tmp_path, spoil, words):
    save_edit(loud(llama, Part("lora", "L1.W_O")), tmp_path)
    spoil(tmp_path)
    with pytest.raises(EditError, match=words) as caught:
        load_edit(tmp_path, llama)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 600


def change(folder, **fields):
    """Other fields, with the hash that belongs to them."""
    path = folder / "edit.json"
    data = json.loads(path.read_text()) | fields
    data.pop("sha256_here", None)
    path.write_text(json.dumps(data | {"sha256_here": store._hash(data)}))


def scale_up(folder):
    """Another alpha, and nothing said of it."""
    path = folder / "edit.json"
    data = json.loads(path.read_text())
    data["parts"][0]["options"] = {"rank": 4, "alpha": 8000.0}
    path.write_text(json.dumps(data))


def drop(folder, name):
    path = folder / "edit.json"
    data = json.loads(path.read_text())
    del data[name]
    path.write_text(json.dumps(data))


def test_edits_of_version_1_are_read(llama, tmp_path):
    """No hash of edit.json, a record without `diverged`, and head gates that divided by the temperature in evaluation too."""
    edit = loud(llama, Part("lora", "L1.W_O"), Part("head_gate", "L1.head1", {"gates": "tempered"}))
    tokens = Tokens.stack(prompts(llama))
    save_edit(edit, tmp_path)
    path = tmp_path / "edit.json"
    data = json.loads(path.read_text())
    del data["sha256_here"], data["parts"][1]["options"]
    data |= {
        "schema": 1,
        "record": {
            "seed": 7,
            "stopped": "the loss was nan at step 3; the last good state was kept",
        },
    }
    path.write_text(json.dumps(data))
    back = load_edit(tmp_path, llama)
    assert torch.equal(logits(llama, tokens, back), logits(llama, tokens, edit))
    assert back.record.diverged and back.record.seed == 7
    bundled = load_edit("bundled")
    assert bundled.record.trained and not bundled.record.diverged and bundled.record.labels


def test_a_record_comes_back_whole():
    """Every field with a value of its own, a first phase inside, and plain JSON in between."""
    record = TrainingRecord(
        {"name": "both"}, 3, 10, {"positive": 4}, 2, "ab", "{sentence}", ("a", "b"), "", 5, 4, 0.25, "no gain", True, ("w",), 2, 1.5, 6.0,
        {"torch": "2"}, HeadChoice({"L1.head0": 0.5}, TrainingRecord(seed=9)), {"right": 3},
    )  # fmt: skip
    assert TrainingRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert not {"lofit", "made"} & set(TrainingRecord().to_json())


ALL = ["llama", "gpt2", "gemma2", "pythia", "qwen2", "mistral", "gptj", "bloom"]


@pytest.mark.parametrize("arch", ALL)
def test_merged_in_memory_equals_unmerged(arch):
    model = tiny_model(arch)
    matrices = Shape.of(model).matrices
    parts = [Part(f, f"L1.{m}") for f in ("lora", "full") for m in matrices] + [
        Part("dora", f"L2.{m}") for m in matrices
    ]
    edit = loud(model, *parts, size=0.1)
    before = weights_hash(model.hooked)
    merged = edit.merged(model)
    tokens = Tokens.stack(prompts(model))
    torch.testing.assert_close(logits(merged, tokens), logits(model, tokens, edit), **CLOSE)
    assert not torch.allclose(logits(merged, tokens), logits(model, tokens), **CLOSE)
    assert weights_hash(model.hooked) == before and model.sha256 != merged.sha256


def test_tinylora_is_kept_and_merged_with_its_frozen_factors(llama, tmp_path):
    """Scalars that two matrices share are written once; V, U S and P of each are in the file beside them."""
    parts = [Part("tinylora", f"L{layer}.{m}") for layer in (0, 2) for m in ("W_Q", "W_O", "W_out")]
    parts[1] = Part("tinylora", "L0.W_O", {"shared_with": "L2.W_out"})
    edit, tokens = loud(llama, *parts), Tokens.stack(prompts(llama))
    save_edit(edit, tmp_path / "edit")
    kept = load_file(tmp_path / "edit" / "edit.safetensors")
    assert set(kept) == {f"{i:03d}.{n}" for i in range(6) for n in ("v", "V", "US", "P")} - {
        "001.v"
    }
    back = load_edit(tmp_path / "edit")  # no model is needed: nothing is computed again
    assert back.n_parameters == edit.n_parameters == 5 * 4
    assert torch.equal(logits(llama, tokens, back), logits(llama, tokens, edit))
    hooked = logits(llama, tokens, back)
    assert not torch.allclose(hooked, logits(llama, tokens), **CLOSE)
    torch.testing.assert_close(logits(back.merged(llama), tokens), hooked, **CLOSE)
    hf = load_model(merge(back, llama, tmp_path / "merged"))
    torch.testing.assert_close(logits(hf, tokens), hooked, **CLOSE)


@pytest.mark.parametrize("family", ["loreft", "noreft", "direft", "red", "steering"])
@pytest.mark.parametrize("kind", ["attn_out", "mlp_out"])
def test_affine_edits_of_all_positions_merge(llama, family, kind):
    edit = loud(llama, Part(family, f"L1.{kind}"))
    tokens = Tokens.stack(prompts(llama))
    torch.testing.assert_close(
        logits(edit.merged(llama), tokens), logits(llama, tokens, edit), **CLOSE
    )


@pytest.mark.parametrize("matrix, kind", [("W_O", "attn_out"), ("W_out", "mlp_out")])
def test_a_matrix_is_merged_before_what_is_made_of_its_output(llama, matrix, kind):
    """In either order of the parts: (x (W + A B)) M and not x (W M + A B)."""
    parts = [Part("red", f"L1.{kind}"), Part("lora", f"L1.{matrix}")]
    tokens = Tokens.stack(prompts(llama))
    for given in (parts, parts[::-1]):
        edit = loud(llama, *given)
        hooked = logits(llama, tokens, edit)
        torch.testing.assert_close(logits(edit.merged(llama), tokens), hooked, **CLOSE)


def test_merging_loses_no_precision():
    model = tiny_model("gpt2", "float64")
    edit = loud(model, Part("loreft", "L1.attn_out"), Part("lora", "L2.W_Q")).double()
    tokens = prompts(model)[1]
    assert (
        float((logits(edit.merged(model), tokens) - logits(model, tokens, edit)).abs().max())
        < 1e-12
    )


@pytest.mark.parametrize(
    "arch, part, why",
    [
        ("llama", Part("loreft", "L1.attn_out@query.last"), "acts at query.last only"),
        ("llama", Part("loreft", "L1.resid_post"), "no single weight matrix makes resid_post"),
        ("llama", Part("adapter", "L1.mlp_out"), "no affine function"),
        ("llama", Part("prefix", "L1"), "belong to no token"),
        ("llama", Part("bitfit", "L1.W_gate"), "no bias"),
        ("gemma2", Part("loreft", "L1.attn_out"), "norms attn_out after"),
    ],
)
def test_what_no_weight_can_express_is_refused_with_the_reason(arch, part, why, tmp_path):
    model = tiny_model(arch)
    for attempt in (lambda e: e.merged(model), lambda e: merge(e, model, tmp_path / "out")):
        with pytest.raises(EditError, match=why):
            attempt(loud(model, part))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", fast(ALL, ["gemma2"]))
def test_a_merged_folder_runs_in_hugging_face(arch, tmp_path):
    model = tiny_model(arch)
    edit = loud(
        model,
        *[Part("lora", f"L{layer}.{m}") for layer in (0, 2) for m in Shape.of(model).matrices],
    )
    merge(edit, model, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    for tokens in prompts(model):
        with torch.no_grad():
            torch.testing.assert_close(hf(tokens.ids).logits, logits(model, tokens, edit), **CLOSE)
    back = load_model(
        tmp_path / "merged"
    )  # the folder is whole: tokenizer, configuration, and the same logits
    for tokens in prompts(model):
        torch.testing.assert_close(logits(back, tokens), logits(model, tokens, edit), **CLOSE)


@pytest.mark.parametrize(
    "arch, place",
    [
        ("gpt2", "L1.attn_out"),
        pytest.param("pythia", "L1.attn_out", marks=pytest.mark.slow),
        pytest.param("bloom", "L2.mlp_out", marks=pytest.mark.slow),
        pytest.param("gptj", "L2.mlp_out", marks=pytest.mark.slow),
    ],
)
def test_a_merged_reft_is_read_back(arch, place, tmp_path):
    model = tiny_model(arch)
    edit = loud(model, Part("loreft", place))
    back = load_model(merge(edit, model, tmp_path / "merged"))
    tokens = Tokens.stack(prompts(model))
    torch.testing.assert_close(logits(back, tokens), logits(model, tokens, edit), **CLOSE)
    assert not torch.allclose(logits(back, tokens), logits(model, tokens), **CLOSE)


def test_llama_gets_the_bias_that_a_merged_reft_needs(llama, tmp_path):
    edit = loud(llama, Part("loreft", "L1.attn_out"), Part("steering", "L2.mlp_out"))
    merge(edit, llama, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    assert hf.config.attention_bias and hf.config.mlp_bias
    tokens = prompts(llama)[1]
    with torch.no_grad():
        torch.testing.assert_close(hf(tokens.ids).logits, logits(llama, tokens, edit), **CLOSE)
    back = load_model(tmp_path / "merged")  # TransformerLens's own conversion forgets these biases
    torch.testing.assert_close(logits(back, tokens), logits(llama, tokens, edit), **CLOSE)


def test_llama_gets_the_biases_that_were_trained(llama, tmp_path):
    """BitFit at every matrix that can have a bias, and low-rank edits beside it, through the weights of Hugging Face's model."""
    parts = [Part("bitfit", f"L1.{m}") for m in ("W_Q", "W_K", "W_V", "W_O", "W_out")] + [
        Part("lora", "L1.W_K"),
        Part("dora", "L2.W_O"),
    ]
    edit = loud(llama, *parts)
    merge(edit, llama, tmp_path / "merged")
    hf = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    tokens = prompts(llama)[1]
    with torch.no_grad():
        torch.testing.assert_close(hf(tokens.ids).logits, logits(llama, tokens, edit), **CLOSE)
        assert not torch.allclose(hf(tokens.ids).logits, logits(llama, tokens), **CLOSE)
    torch.testing.assert_close(
        logits(load_model(tmp_path / "merged"), tokens), logits(llama, tokens, edit), **CLOSE
    )


def test_a_bias_that_the_architecture_lacks_is_refused(tmp_path):
    model = tiny_model("mistral")
    with pytest.raises(EditError, match="has none there"):
        merge(loud(model, Part("steering", "L1.attn_out")), model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(llama, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(EditError, match="not empty"):
        merge(loud(llama, Part("lora", "L1.W_O")), llama, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("arch", ALL)
def test_peft_reads_the_exported_adapter(arch, tmp_path):
    peft = pytest.importorskip(
        "peft", reason="peft is not installed: pip install mech-absa[oracles]"
    )
    model = tiny_model(arch)
    edit = loud(
        model,
        *[
            Part("lora", f"L{layer}.W_O", {"rank": 3, "alpha": 5.0, "rank_stabilised": True})
            for layer in (0, 2)
        ],
    )
    export_peft(edit, model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder(arch), attn_implementation="eager"),
        tmp_path,
    ).eval()
    tokens = prompts(model)[1]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens.ids).logits, logits(model, tokens, edit), **CLOSE)


def test_peft_is_given_nothing_by_halves(llama, tmp_path):
    both = loud(llama, Part("lora", "L1.W_O"), Part("loreft", "L1.resid_post@query.last"))
    with pytest.raises(EditError, match="cannot hold loreft"):
        export_peft(both, llama, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    export_peft(both, llama, tmp_path / "b", partial=True)
    mixed = loud(llama, Part("lora", "L1.W_O", {"rank": 2}), Part("lora", "L2.W_O", {"rank": 3}))
    with pytest.raises(EditError, match="other options"):
        export_peft(mixed, llama, tmp_path / "c")
