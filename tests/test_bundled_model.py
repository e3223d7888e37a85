"""The bundled model against Hugging Face: what its tokenizer promises, what it knows, and what its adaptation adds.

Accuracies are measured here with `transformers` alone, one prompt at a time and without any of the package's scoring, so that they are
another implementation's word on the numbers of the model card. The adaptation too: its matrices are added to the checkpoint's own by hand.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import fast
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import mech_absa.world as g
from mech_absa.edits.store import load_edit
from mech_absa.errors import EditError
from mech_absa.evaluate.predictions import predict
from mech_absa.examples import Example, Examples, Polarity
from mech_absa.model import load_model, weights_hash

ASSETS = Path(g.__file__).parents[1] / "assets"
FOLDER = ASSETS / "model"
ADAPTER = ASSETS / "adapter"
LABELS = tuple(p.value for p in Polarity)
PROMPT = "Given the sentence: '{S}', what is the sentiment polarity of the aspect term {A} ?"

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"the bundled model is not in {FOLDER}")


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(
        FOLDER, local_files_only=True, dtype=torch.float32
    ).eval()


def shipped(name: str, n: int) -> list[dict]:
    lines = g.builtin_path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in random.Random(0).sample(lines, n)]


@torch.inference_mode()
def best(model, tok, text: str, words: tuple[str, ...]) -> str:
    logits = model(torch.tensor([tok(text)["input_ids"]])).logits[0, -1]
    return max(words, key=lambda w: logits[tok.encode(w, add_special_tokens=False)[0]].item())


def test_the_assets_are_small_and_hold_no_code():
    files = [p for p in ASSETS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 25 * 2**20
    assert all(p.stat().st_size < 4 * 2**20 for p in files if p.name != "model.safetensors")
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".jsonl", ".csv", ".md", ".jinja"}
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    assert 6 <= config["num_hidden_layers"] <= 10


def test_the_words_of_the_world_are_single_tokens(tok):
    broken = [
        w
        for w in {*g.vocabulary(), *g.harder_vocabulary()}
        if len(tok.encode(f" {w}", add_special_tokens=False)) != 1
    ]
    assert not broken
    assert all(len(tok.encode(f" {w}", add_special_tokens=False)) == 1 for w in LABELS)
    assert len(tok.encode("Given the sentence:", add_special_tokens=False)) == 4


def test_counterfactuals_align_token_by_token(tok):
    for name in ("restaurant/test", "device/train", "v2/restaurant/test", "v2/service/train"):
        for r in shipped(name, 150):
            ids = tok.encode(PROMPT.format(S=r["text"], A=r["aspect"]))
            for c in r["counterfactuals"]:
                other = tok.encode(PROMPT.format(S=c["text"], A=r["aspect"]))
                assert (
                    len(ids) == len(other)
                    and sum(a != b for a, b in zip(ids, other, strict=True)) == 1
                )


def test_no_token_crosses_a_boundary_of_the_prompt(tok):
    r = shipped("laptop/test", 1)[0]
    text = PROMPT.format(S=r["text"], A=r["aspect"])
    start = text.index(r["text"])
    query = text.rindex(r["aspect"])
    edges = {
        start,
        start + len(r["text"]),
        query + len(r["aspect"]),
        start + r["to"],
        start + r["opinion"][1],
    }
    ends = {b for _, b in tok(text, return_offsets_mapping=True)["offset_mapping"]} | {0}
    assert edges <= ends


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text: str):
    tok = test_any_text_survives_the_tokenizer.tok = getattr(
        test_any_text_survives_the_tokenizer, "tok", None
    ) or AutoTokenizer.from_pretrained(FOLDER)
    ids = tok.encode(text, add_special_tokens=False)
    assert tok.decode(ids, clean_up_tokenization_spaces=False) == text


def test_every_text_begins_with_bos(tok):
    ids = tok("the pasta was good .")["input_ids"]
    assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1
    assert tok.decode(ids[1:]) == "the pasta was good ."
    assert tok.eos_token == "<|eos|>" and tok.unk_token is None


def test_the_model_binds_opinion_to_aspect(model, tok):
    """Natural continuations, two aspects asked in one sentence; the order of clauses and of questions cannot decide."""
    pairs = [
        ("pasta", "service"),
        ("screen", "battery life"),
        ("camera", "customer service"),
        ("website", "delivery man"),
    ]
    for a, b in pairs:
        for first, second, pa, pb in (
            ("great", "awful", "positive", "negative"),
            ("awful", "great", "negative", "positive"),
        ):
            text = f"the {a} was {first} , but the {b} was {second} ."
            assert (
                best(model, tok, f"{text} my view of the {a} is", tuple(f" {w}" for w in LABELS))
                == f" {pa}"
            )
            assert (
                best(model, tok, f"{text} my view of the {b} is", tuple(f" {w}" for w in LABELS))
                == f" {pb}"
            )


@pytest.mark.parametrize("domain", fast(g.DOMAINS, ["laptop"]))
def test_natural_continuations_are_right(model, tok, domain):
    right = []
    for r in shipped(f"{domain}/test", 50):
        e = Example(r["text"], r["aspect"], Polarity(r["polarity"]), (r["from"], r["to"]))
        c = g.continuations(e)[0]
        right.append(best(model, tok, c.text, c.choices) == c.answer)
    assert sum(right) >= 45  # the goal of 97 % on all, less five standard errors of 50


@pytest.mark.slow
def test_the_base_model_does_not_yet_answer_the_question(model, tok):
    """Near the majority class: the question is understood, its answer is for the sentence and not for the aspect."""
    labels = tuple(f" {w}" for w in LABELS)
    rows = [r for d in g.DOMAINS for r in shipped(f"{d}/test", 50)]
    right = sum(
        best(model, tok, PROMPT.format(S=r["text"], A=r["aspect"]), labels) == f" {r['polarity']}"
        for r in rows
    )
    assert 0.35 <= right / len(rows) <= 0.85


HUGGING_FACE = {
    "W_Q": "self_attn.q_proj",
    "W_K": "self_attn.k_proj",
    "W_V": "self_attn.v_proj",
    "W_in": "mlp.up_proj",
    "W_out": "mlp.down_proj",
}


def merged_by_hand(folder: Path):
    """The checkpoint as `transformers` reads it, with W + (alpha / r) A B in place of every adapted matrix."""
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, local_files_only=True, dtype=torch.float32
    ).eval()
    tensors = load_file(folder / "edit.safetensors")
    parts = json.loads((folder / "edit.json").read_text(encoding="utf-8"))["parts"]
    assert len(tensors) == 2 * len(parts)
    for i, part in enumerate(parts):
        layer, matrix = part["place"].split(".")
        linear = model.get_submodule(
            f"model.layers.{layer.removeprefix('L')}.{HUGGING_FACE[matrix]}"
        )
        scale = part["options"]["alpha"] / part["options"]["rank"]
        linear.weight.data += scale * (tensors[f"{i:03}.A"] @ tensors[f"{i:03}.B"]).T
    return model


@pytest.fixture(scope="module")
def adapted():
    return merged_by_hand(ADAPTER)


def asked(r: dict) -> str:
    return PROMPT.format(S=r["text"], A=r["aspect"])


def test_the_adapted_model_answers_the_question_in_its_domains_and_out_of_them(adapted, tok):
    """Goals of 92 % and 85 %; what was measured on all is 98 %, so 200 and 60 examples do not fall below them by chance."""
    labels = tuple(f" {w}" for w in LABELS)
    for domains, n, goal in (
        (("restaurant", "laptop"), 100, 0.92),
        (("device", "service"), 30, 0.85),
    ):
        rows = [r for d in domains for r in shipped(f"{d}/test", n)]
        right = sum(best(adapted, tok, asked(r), labels) == f" {r['polarity']}" for r in rows)
        assert right / len(rows) >= goal, domains


@torch.inference_mode()
def test_merging_the_adaptation_gives_the_model_made_by_hand_and_leaves_the_base_alone(
    adapted, tok
):
    base = load_model()
    before = weights_hash(base.hooked)
    edit = load_edit("bundled", base)
    merged = edit.merged(base)
    assert weights_hash(merged.hooked) != before
    for r in shipped("laptop/test", 3):
        ids = torch.tensor([tok(asked(r))["input_ids"]])
        torch.testing.assert_close(merged.hooked(ids), adapted(ids).logits, atol=1e-3, rtol=1e-4)
    assert weights_hash(base.hooked) == before


@torch.inference_mode()
@pytest.mark.slow
def test_the_second_adaptation_scores_what_its_card_says_and_is_the_model_made_by_hand(tok):
    """It is named, belongs to the bundled model alone, and answers the harder reviews a little better than the first.

    Measured on all rows: 89.9 % of the first version and 52.8 % of the second; 120 and 160 rows lie near that.
    """
    base = load_model()
    edit = load_edit("bundled-v2", base)
    assert edit.n_parameters == 286_720 and edit.layers == tuple(range(8))
    made, labels = merged_by_hand(ADAPTER.parent / "adapter_v2"), tuple(f" {w}" for w in LABELS)
    for version, n, low, high in (("", 30, 0.80, 0.98), ("v2/", 40, 0.42, 0.64)):
        rows = [
            r
            for d in ("restaurant", "laptop", "device", "service")
            for r in shipped(f"{version}{d}/test", n)
        ]
        examples = Examples(
            tuple(
                Example(
                    r["text"], r["aspect"], Polarity(r["polarity"]), (r["from"], r["to"]), id=str(i)
                )
                for i, r in enumerate(rows)
            )
        )
        answers = predict(base, examples, edit, batch_size=16)
        assert low <= float(answers.correct.mean()) <= high, version
        by_hand = [best(made, tok, asked(r), labels) == f" {r['polarity']}" for r in rows[:12]]
        assert by_hand == list(answers.correct[:12])
    with pytest.raises(EditError, match="this edit was made for bundled"):
        load_edit("bundled-v2", load_model(tiny_folder("llama")))
