"""The model card: its questions are the world's own continuations, its numbers those of the library, its goals plain inequalities."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.small_cases import NEG, NEU, POS, Push, example
from support.tiny_models import tiny_folder

from mech_absa.commands import card
from mech_absa.commands.card import Goal, Row, continuation_prompts, continue_naturally, markdown
from mech_absa.evaluate import predict
from mech_absa.evaluate.predictions import Predictions, joined
from mech_absa.evaluate.scores import quality
from mech_absa.examples import Polarity
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.world import DOMAINS, continuations


def test_the_questions_are_the_worlds_own_continuations():
    for e in load_examples("builtin:service/test", limit=5):
        for c, (template, verbalizer) in zip(continuations(e), continuation_prompts(), strict=True):
            assert template(e).text == c.text
            assert tuple(verbalizer.separator + w for _, w in verbalizer.words) == c.choices
            assert c.choices[verbalizer.index(e.polarity)] == c.answer


def test_a_continuation_is_chosen_as_the_model_itself_weighs_the_words(model, examples):
    found = continue_naturally(model, examples[:3])
    assert len(found) == 5
    for i, p in enumerate(found):
        for row, e in enumerate(examples[:3]):
            c = continuations(e)[i]
            weights = []
            for choice in c.choices:
                prompt, whole = (
                    model.tokenizer(c.text).input_ids,
                    model.tokenizer(c.text + choice).input_ids,
                )
                with torch.inference_mode():
                    logp = model.forward(torch.tensor([whole]))[0].double().log_softmax(-1)
                weights.append(
                    sum(logp[t - 1, whole[t]].item() for t in range(len(prompt), len(whole)))
                )
            assert p.scores[row] == pytest.approx(weights, abs=1e-3)
            assert p.answers[row] is list(Polarity)[int(np.argmax(weights))]


def made(gold, answers):
    rows = tuple(example(f"sentence {i} about food", "food", g) for i, g in enumerate(gold))
    return quality(Predictions(rows, tuple(answers), "s"), draws=10)


def test_goals_by_hand():
    q = made([POS, POS, POS, NEG, NEU], [POS, POS, POS, NEG, NEG])  # 80 %, majority 60 %
    assert Goal(0.8).reached(q) and not Goal(0.81).reached(q)
    assert Goal(None, 0.8).reached(q) and not Goal(None, 0.79).reached(q)
    assert not Goal(None, 0.8).reached(made([POS, POS, NEG], [POS, NEG, NEU]))  # below the majority
    assert (str(Goal(0.97)), str(Goal(None, 0.8))) == (">= 97", "majority to 80")
    text = markdown([Row("base", "q", "d", q, Goal(0.9)), Row("base", "q", "d", q)])
    lines = text.splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert (
        "80.0 [" in lines[2]
        and lines[2].endswith("| >= 90 | no |")
        and lines[3].endswith("| - |  |")
    )


def test_several_sets_of_answers_as_one(model, examples):
    a, b = predict(model, examples[:3]), predict(model, examples[3:])
    both, whole = joined([a, b], "both"), predict(model, examples)
    assert both.answers == whole.answers and both.data == "both"
    np.testing.assert_allclose(both.scores, whole.scores, atol=1e-4)


@pytest.fixture
def small_world(monkeypatch, examples):
    """The built-in files are too long for a model that reads 256 tokens; real files are read as they are."""
    monkeypatch.setattr(
        card,
        "load_examples",
        lambda s, **more: (
            examples[:5] if str(s).startswith("builtin:") else load_examples(s, **more)
        ),
    )
    monkeypatch.setattr(
        card, "load", lambda name, model: None if name == "none" else Push("L2.resid_post", 20.0)
    )


@pytest.mark.slow
def test_the_command(small_world, tmp_path, model, examples, capsys):
    real, edits = tmp_path / "real", tmp_path / "edits"
    (edits / "rest").mkdir(parents=True)
    real.mkdir()
    for d in card.REAL:
        write_jsonl(examples, real / f"{d}_test.json")
    write_jsonl(examples[:2], real / "rest_train.json")
    flags = [
        "--model",
        str(tiny_folder("gpt2")),
        "--adapter",
        "x",
        "--device",
        "cpu",
        "--draws",
        "20",
        "--out",
        str(tmp_path / "out"),
    ]
    assert card.cli([*flags, "--real", str(real), "--real-edits", str(edits)]) == 0
    record = json.loads((tmp_path / "out" / "card.json").read_text())
    found = {(r["system"], r["question"], r["data"]): r for r in record["rows"]}
    assert record["sha256"] == model.sha256 and len(found) == len(record["rows"])
    five, edit = examples[:5], Push("L2.resid_post", 20.0)
    natural = np.mean([p.correct.mean() for p in continue_naturally(model, five)])
    for d in DOMAINS:
        assert found["base", "natural continuation", d]["accuracy"] == pytest.approx(natural)
    assert found["base", "natural continuation", "device"]["n"] == 25
    assert (
        found["base", "ABSC prompt", "all four"]["accuracy"] == predict(model, five).correct.mean()
    )
    adapted = predict(model, five, edit).correct.mean()
    assert found["adapted", "ABSC prompt, in-domain", "together"]["accuracy"] == adapted
    assert {d for s, q, d in found if q == "ABSC prompt, out-of-domain"} == {
        "device",
        "service",
        "together",
    }
    assert found["adapted", "mixed polarity only", "laptop"]["n"] == 5
    assert (
        found["base", "ABSC prompt", "rest (real)"]["accuracy"]
        == predict(model, examples).correct.mean()
    )
    own = found["adapted on its train file", "ABSC prompt, rows not in train", "rest (real)"]
    assert (
        own["n"] == 6 and ("adapted on its train file", "ABSC prompt", "device (real)") not in found
    )
    goal = found["adapted", "mixed polarity only", "all four"]
    assert goal["reached"] == (goal["accuracy"] >= 0.88) and goal["goal"] == ">= 88"
    table = (tmp_path / "out" / "card.md").read_text()
    assert table.count("\n") == len(found) + 2 and "goals reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--in-domain", "hotel"],
            "--in-domain names 'hotel'; the built-in domains are restaurant, laptop",
        ),
        (["--real", "nowhere"], "nowhere: the folder has no device_test.json"),
        (["--real-edits", "x"], "--real-edits was given without --real"),
    ],
)
def test_bad_input(tmp_path, capsys, flags, message):
    assert card.cli([*flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
