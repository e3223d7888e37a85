"""Answers against Hugging Face's own forward pass and its own greedy decoding; files of answers against what was written into them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.small_cases import NEG, NEU, POS, Push, example
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from mech_absa.errors import ConfigError, DataError, EditError, PromptError
from mech_absa.evaluate import predict, read_predictions
from mech_absa.evaluate.predictions import greedy, match_label
from mech_absa.examples import Examples
from mech_absa.model import load_model
from mech_absa.prompts import PromptTemplate, Verbalizer
from mech_absa.scoring import question

TEMPLATE = "{sentence} Aspect: {aspect}:"


@pytest.fixture(scope="module")
def hf():
    return AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2")).eval()


def hf_label_scores(hf, tokenizer, text: str) -> list[float]:
    scores = []
    for word in ("positive", "negative", "neutral"):
        prompt, whole = (
            tokenizer(t, return_tensors="pt").input_ids for t in (text, f"{text} {word}")
        )
        with torch.no_grad():
            logp = hf(whole).logits.double().log_softmax(-1)[0]
        n = prompt.shape[1]
        scores.append(sum(logp[i - 1, whole[0, i]].item() for i in range(n, whole.shape[1])))
    return scores


def test_labels_are_scored_as_hugging_face_scores_them(model, examples, hf):
    p = predict(model, examples, template=TEMPLATE)
    for i, e in enumerate(examples):
        expected = hf_label_scores(hf, model.tokenizer, f"{e.sentence} Aspect: {e.aspect}:")
        assert p.scores[i] == pytest.approx(expected, abs=1e-3)
        assert p.answers[i] is (POS, NEG, NEU)[int(np.argmax(expected))]
    assert p.name == "base" and p.data == "eight" and p.probabilities.sum(1) == pytest.approx(1)


@pytest.mark.parametrize("decode", ["label", "generate"])
def test_a_batch_answers_as_one_by_one(model, examples, decode):
    edit = Push("L1.resid_post@query.last")
    one, many = (predict(model, examples, edit, decode=decode, batch_size=n) for n in (1, 5))
    assert one.answers == many.answers and one.texts == many.texts
    if decode == "label":
        np.testing.assert_allclose(one.scores, many.scores, atol=1e-4)
        assert not np.allclose(
            one.scores, predict(model, examples).scores, atol=0.05
        )  # the edit does something


def test_greedy_decoding_is_hugging_faces(model, examples, hf):
    prompts = [question(model, e) for e in examples]
    written = greedy(model, prompts, 6, batch_size=3)
    for tokens, ids in zip(prompts, written, strict=True):
        out = hf.generate(
            tokens.ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert out[0, tokens.lengths[0] :].tolist() == ids


def test_an_edit_of_the_prompt_sees_the_prompt_only_while_writing(model, examples):
    edit = Push("L1.resid_post@query")
    greedy(model, [question(model, e) for e in examples[:3]], 4, edit)
    assert [t.lengths[0] - edit.seen[0].lengths[0] for t in edit.seen] == [0, 1, 2, 3]
    first = [edit.seen[0].positions("query", r) for r in range(3)]
    for tokens in edit.seen:
        assert [tokens.positions("query", r) for r in range(3)] == first
        for r, n in enumerate(edit.seen[0].lengths):
            assert (tokens.roles[r, n:] == -1).all() and (tokens.roles[r, :n] >= 0).all()


def test_generation_answers_as_label_scoring_does_when_a_label_is_the_argmax(examples):
    model = load_model(tiny_folder("gpt2", seed=3))
    verbalizer = Verbalizer.of(["was", "the", "is"])
    ids = [i for (i,) in verbalizer.label_ids(model.tokenizer)]  # one token each
    ends_in_the_aspect = "{sentence} Aspect: {aspect}"
    usual = predict(
        model, examples, template=ends_in_the_aspect, verbalizer=verbalizer
    ).scores.mean(0)
    with (
        torch.no_grad()
    ):  # the labels are now the most probable tokens everywhere, and none of them always
        model.hooked.unembed.b_U[ids] += 100 - torch.tensor(usual, dtype=torch.float32)
    labels = predict(model, examples, template=ends_in_the_aspect, verbalizer=verbalizer)
    free = predict(
        model, examples, template=ends_in_the_aspect, verbalizer=verbalizer, decode="generate"
    )
    assert free.answers == labels.answers and len(set(free.answers)) > 1
    assert free.scores is None and len(free.texts) == len(examples)


def test_what_is_no_label_is_no_answer(model, examples):
    p = predict(model, examples, decode="generate")
    assert set(p.answers) == {None} and not p.correct.any()  # a random model writes no label word


@pytest.mark.parametrize(
    "text, answer",
    [(" positive", POS), ("negative.", NEG), ("neutral\nI", NEU), ("positively", None), ("the", None), ("", None), ("not positive", None)],
)  # fmt: skip
def test_matching_by_hand(text, answer):
    assert match_label(text, Verbalizer()) is answer


def test_the_longest_label_matches():
    v = Verbalizer.of(["good", "good enough", "bad"])
    assert match_label(" good enough to eat", v) is NEG and match_label(" good, enough", v) is POS


def test_bad_input(model, examples):
    with pytest.raises(ConfigError, match="eight holds no examples"):
        predict(model, examples[:0])
    with pytest.raises(PromptError, match="no label for neutral"):
        predict(model, examples, verbalizer=Verbalizer.of(["good", "bad"]))
    long = Examples((example("food " * 300, "food", POS),))
    with pytest.raises(PromptError, match="reads 256"):
        predict(model, long)
    fits = PromptTemplate("{sentence}{aspect}")
    e = example("food " * 50, "food", POS)
    n = question(model, e, fits).lengths[0]
    with pytest.raises(PromptError, match=r"reads 256"):
        greedy(model, [question(model, e, fits)], 256 - n + 2)
    assert len(greedy(model, [question(model, e, fits)], 256 - n + 1)[0]) == 256 - n + 1
    with pytest.raises(EditError, match="the scores of 8 of 8 prompts are not numbers"):
        predict(model, examples, Push("L2.resid_post", size=float("nan")))


# ---------------------------------------------------------------------------------------------------- files


ANSWERS = ["positive", "Neg", "neutral", "", "pos", "negative", "none", "NEU"]
READ = (POS, NEG, NEU, None, POS, NEG, None, NEU)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def table(examples, by_id, delimiter=","):
    if by_id:
        lines = [delimiter.join(("ID", "Label"))] + [
            delimiter.join((e.id, a)) for e, a in zip(examples, ANSWERS, strict=True)
        ]
    else:
        lines = [delimiter.join(("sentence", "aspect", "prediction"))]
        lines += [
            delimiter.join((f'"{e.sentence.upper()}"', e.aspect, a))
            for e, a in zip(examples, ANSWERS, strict=True)
        ]
    return "\n".join([lines[0], *reversed(lines[1:])]) + "\n"  # the order does not matter


def json_lines(examples):
    return "\n".join(
        json.dumps({"id": e.id, "predicted": a or None})
        for e, a in zip(examples, ANSWERS, strict=True)
    )


@pytest.mark.parametrize("kind", ["csv-id", "csv-text", "tsv", "jsonl", "json", "bom"])
def test_answers_are_read_as_they_were_written(tmp_path, examples, kind):
    text = {
        "csv-id": table(examples, True), "csv-text": table(examples, False), "tsv": table(examples, False, "\t"),
        "jsonl": json_lines(examples), "json": "[" + ",".join(json_lines(examples).split("\n")) + "]",
        "bom": "\ufeff" + table(examples, True),
    }[kind]  # fmt: skip
    p = read_predictions(write(tmp_path, f"gpt.{kind.split('-')[0]}", text), examples)
    assert p.answers == READ and p.name == "gpt" and p.scores is None and p.data == "eight"


def test_our_own_table_reads_back(tmp_path, model, examples):
    p = predict(model, examples, name="ours")
    p.to_pandas().to_parquet(tmp_path / "p.parquet")
    p.to_pandas().to_csv(tmp_path / "p.csv", index=False)
    for name in ("p.parquet", "p.csv"):
        assert read_predictions(tmp_path / name, examples).answers == p.answers


def test_a_table_of_several_files_gives_each_its_rows(tmp_path, examples):
    import pandas as pd

    one, two = Examples(tuple(examples)[:3], "one"), Examples(tuple(examples)[3:], "two")
    both = read_predictions(write(tmp_path, "a.csv", table(examples, True)), examples)
    frame = both.to_pandas().assign(data=["one"] * 3 + ["two"] * 5)
    frame.to_parquet(tmp_path / "both.parquet")
    assert read_predictions(tmp_path / "both.parquet", two).answers == READ[3:]
    assert read_predictions(tmp_path / "both.parquet", one).answers == READ[:3]
    pd.concat([frame, frame.assign(system="other")]).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(DataError, match="holds 2 systems, a or other; keep one"):
        read_predictions(tmp_path / "two.parquet", one)


def test_a_question_asked_twice_is_answered_in_order(tmp_path):
    twice = Examples(
        (
            example("good food , bad food", "food", POS),
            example("good food , bad food", "food", NEG),
        ),
        "twice",
    )
    head = "sentence,aspect,label\n"
    row = '"good food , bad food",food,'
    assert read_predictions(
        write(tmp_path, "a.csv", f"{head}{row}pos\n{row}neg\n"), twice
    ).answers == (POS, NEG)
    with pytest.raises(DataError, match=r"a.csv:4: the example 'food' is answered a second time"):
        read_predictions(write(tmp_path, "a.csv", f"{head}{row}pos\n{row}neg\n{row}neg\n"), twice)


BAD = {
    "unknown id": ("id,label\nx0,pos\nx99,neg\n", r"f.csv:3: no example has the id 'x99'; ids of eight look like 'x0'"),
    "unknown question": ('sentence,aspect,label\nthe staff were rude .,food,neg\n', r"f.csv:2: no example asks about 'food' in 'the staff"),
    "twice": ("id,label\nx0,pos\nx1,neg\nx0,pos\n", r"f.csv:4: the example 'x0' is answered a second time"),
    "no label": ("id,label\nx0,great\n", r"f.csv:2: the answer 'great' is no label; accepted: positive"),
    "number": ("id,label\nx0,1\n", r"f.csv:2: the answer is the number 1, which every system counts its own way"),
    "no answer column": ("id,score\nx0,1\n", r"f.csv:2: the row has no answer \(its fields: id, score\)"),
    "no key": ("sentence,label\nfine,pos\n", r"f.csv:2: the row has the fields sentence, label; an id, or a sentence and an aspect"),
    "cells": ("id,label\nx0,pos\nx1\n", r"f.csv:3: 1 cells came, but the header names 2 columns"),
    "quotes": ('id,label\nx0,"pos\n', r"f.csv:2: broken table"),
    "missing": ("id,label\nx1,pos\n", r"f.csv: 7 of 8 examples have no prediction, the first of them 'x0' \('food' in"),
    "empty": ("\n", r"f.csv: the file is empty"),
    "json": ('{"id": "x0", "label": "pos"}\n{"id": ', r"f.csv:2: broken JSON"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_where_it_is_bad(tmp_path, examples, text, message):
    with pytest.raises(DataError, match=message):
        read_predictions(write(tmp_path, "f.csv", text), examples)


def test_a_file_that_cannot_be_read(tmp_path, examples):
    with pytest.raises(DataError, match="there is no such file"):
        read_predictions(tmp_path / "nope.csv", examples)
    (tmp_path / "f.csv").write_bytes(b"id,label\nx0,\xff\n")
    with pytest.raises(DataError, match=r"f.csv:2: the byte 0xff is not UTF-8"):
        read_predictions(tmp_path / "f.csv", examples)
    (tmp_path / "f.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"f.parquet: the file cannot be read as parquet"):
        read_predictions(tmp_path / "f.parquet", examples)
