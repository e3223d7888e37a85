"""The command: what it writes is what the library computes, and bad input leaves one sentence and no file."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from support.small_cases import Push
from support.tiny_models import tiny_folder

from mech_absa.commands import evaluate as command
from mech_absa.edits import TrainingRecord
from mech_absa.evaluate import evaluate, fairness, predict
from mech_absa.evaluate.scorecard import MEASURES, follows
from mech_absa.examples import Example, Polarity
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.schemas import SCHEMAS, TABLES, problem, table_problem


@pytest.fixture
def files(tmp_path, examples):
    """Two test files and a training file that holds two rows of the first."""
    write_jsonl(examples, tmp_path / "test.jsonl")
    write_jsonl(examples[:5], tmp_path / "other.jsonl")
    write_jsonl(examples[6:], tmp_path / "train.jsonl")
    return tmp_path


@pytest.fixture
def run(files, monkeypatch):
    """The command on the tiny model, its edits by name; gives the exit code."""
    monkeypatch.setattr(
        command,
        "load",
        lambda name, model: (
            None if name == "none" else Push("L2.resid_post", 20.0, seed=int(name[-1]))
        ),
    )

    def runner(*flags: str, model: str = str(tiny_folder("gpt2"))) -> int:
        return command.cli(
            [
                "--model",
                model,
                "--out",
                str(files / "out"),
                "--device",
                "cpu",
                "--draws",
                "50",
                *flags,
            ]
        )

    return runner


def test_what_it_writes_is_what_the_library_computes(run, files, model, capsys):
    data, other = str(files / "test.jsonl"), str(files / "other.jsonl")
    flags = [
        "--data",
        data,
        other,
        "--train-data",
        str(files / "train.jsonl"),
        "--edit",
        "none",
        "seed1",
        "seed2",
        "--compare",
        "none",
    ]
    assert run(*flags, "--side-effects") == 0
    out = files / "out"
    assert {p.name for p in out.iterdir()} == {
        "scores.csv", "predictions.parquet", "comparisons.csv", "aggregate.csv", "side_effects.json", "run.json", "report.html",
        "baselines.csv",
    }  # fmt: skip
    scores = pd.read_csv(out / "scores.csv")
    examples = load_examples(data)
    expected = evaluate(
        model,
        examples,
        Push("L2.resid_post", 20.0, seed=2),
        train=load_examples(files / "train.jsonl"),
        draws=50,
    )
    row = scores[
        (scores.system == "seed2") & (scores.data == data) & (scores.subset == "unseen")
    ].iloc[0]
    assert (
        row.n == 6
        and row.leaked == 2
        and row.accuracy == pytest.approx(expected.unseen.accuracy.value)
    )
    assert row.macro_f1_low == pytest.approx(
        expected.unseen.macro_f1.low
    ) and row.nll == pytest.approx(expected.unseen.nll)
    answers = pd.read_parquet(out / "predictions.parquet")
    assert len(answers) == 3 * (8 + 5)
    mine = answers[(answers.system == "none") & (answers.data == other)]
    assert mine.predicted.tolist() == [
        a.value for a in predict(model, load_examples(other)).answers
    ]
    comparisons = pd.read_csv(out / "comparisons.csv")
    assert comparisons["first"].tolist() == ["seed1", "seed1", "seed2", "seed2"] and set(
        comparisons.second
    ) == {"none"}
    together = pd.read_csv(out / "aggregate.csv")
    both = scores[
        (scores.system != "none") & (scores.data == data) & (scores.subset == "all")
    ].accuracy
    assert together.accuracy[0] == pytest.approx(both.mean()) and together.accuracy_sd[
        0
    ] == pytest.approx(both.std())
    record = json.loads(
        (out / "run.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is no JSON"),
    )
    assert (
        record["model"]["sha256"] == model.sha256
        and record["inputs"]["train_data"]
        and len(record["scores"]) == 6
    )
    effects = json.loads((out / "side_effects.json").read_text())
    assert (
        set(effects) == {"seed1", "seed2"}
        and effects["seed1"]["weights_unchanged"]
        and len(effects["seed1"]["portability"]) == 1
    )
    said = capsys.readouterr()
    assert (
        "2 of 8 rows" in said.err and "points of accuracy" in said.out and "unchanged" in said.out
    )


def test_every_edit_has_a_row_of_the_scorecard(run, files, model, capsys):
    test, other = str(files / "test.jsonl"), str(files / "other.jsonl")
    edits = ["--edit", "seed1", "seed2", "--no-baselines"]
    assert run("--data", test, other, *edits, "--scorecard") == 0
    cards = pd.read_csv(files / "out" / "scorecard.csv").set_index("system")
    assert table_problem(cards.reset_index(), TABLES["scorecard.csv"], written=False) is None
    assert set(MEASURES) <= set(cards.columns) and cards.index.tolist() == ["seed1", "seed2"]
    scores = pd.read_csv(files / "out" / "scores.csv")
    scores = scores[(scores.subset == "all") & (scores.system == "seed2")].set_index("data")
    for column, data in (("reliability", test), ("out_of_domain", other)):
        assert cards[column]["seed2"] == pytest.approx(scores.accuracy[data])
        assert cards[f"{column}_low"]["seed2"] == pytest.approx(scores.accuracy_low[data])
    asked = follows(model, load_examples(test), Push("L2.resid_post", 20.0, seed=2), draws=50)
    assert cards.portability["seed2"] == pytest.approx(asked.value)
    assert set(json.loads((files / "out" / "side_effects.json").read_text())) == {"seed1", "seed2"}
    said = capsys.readouterr().out
    assert "Scorecard" in said and "prompt consistency, %" in said


def test_gaps_of_classes_and_groups_are_a_row_per_edit(run, files, model, monkeypatch, capsys):
    few = replace(fairness.SWAPS[1], groups=("Nokia", "Sony"), frames=fairness.SWAPS[1].frames[:2])
    measure = partial(fairness.fairness, swaps=[few])
    monkeypatch.setattr(fairness, "fairness", measure)
    test = str(files / "test.jsonl")
    assert run("--data", test, "--edit", "none", "seed1", "seed2", "--fairness") == 0
    table = pd.read_csv(files / "out" / "fairness.csv")
    assert table.system.tolist() == ["seed1", "seed2"]
    assert table_problem(table, TABLES["fairness.csv"], written=False) is None
    edit = Push("L2.resid_post", 20.0, seed=2)
    expected = measure(model, edit, load_examples(test), draws=50).row()
    for name in ("accuracy", "brand_gap", "brand_gap_p", "brand_swapped", "kl_labels_low"):
        assert table[name][1] == pytest.approx(expected[name]), name
    assert table.lens_L3[1] == pytest.approx(expected["kl_vocabulary"]) and table.lens_L1[1] == 0
    whole = json.loads((files / "out" / "fairness.json").read_text())
    assert whole["seed2"]["groups"][0]["kind"] == "brand"
    assert problem(whole, SCHEMAS["fairness.json"]) is None
    assert "Classes, groups and drift of seed2" in capsys.readouterr().out


def test_a_review_that_is_too_long_is_left_out_and_counted(run, files, model, examples, capsys):
    """One review of 700 words once ended the whole run, and --skip-bad did not help."""
    long = Example(f"{'very ' * 300}good food", "food", Polarity.POSITIVE, id="long")
    write_jsonl([long, *examples], files / "mixed.jsonl")
    flags = ["--data", str(files / "mixed.jsonl"), "--edit", "none", "seed1", "--side-effects"]
    assert run(*flags, "--strict") == 2
    said = capsys.readouterr()
    assert "the prompt of " in said.err and f"reads {model.n_ctx}" in said.err
    assert not (files / "out").exists()
    assert run(*flags) == 0
    reason = "prompt longer than the model reads"
    assert f"left out 1 ({reason}: {model.n_ctx})" in capsys.readouterr().err
    record = json.loads((files / "out" / "run.json").read_text())
    assert record["data"][0]["left_out"] == {reason: 1}
    answers = pd.read_parquet(files / "out" / "predictions.parquet")
    assert sorted(answers[answers.system == "none"].id) == sorted(e.id for e in examples)


def test_beside_a_model_another_system_is_scored_on_what_both_can_read(run, files, examples):
    """A file answers every row, the long one too; the model's row decides what is compared."""
    long = Example(f"{'very ' * 300}good food", "food", Polarity.POSITIVE, id="long")
    write_jsonl([long, *examples], files / "mixed.jsonl")
    rows = ["long,negative", *(f"{e.id},{e.polarity.value}" for e in examples)]
    (files / "gpt.csv").write_text("\n".join(["id,label", *rows]))
    flags = ["--data", str(files / "mixed.jsonl"), "--predictions", str(files / "gpt.csv")]
    assert run(*flags, "--edit", "none", "--compare", "none") == 0
    answers = pd.read_parquet(files / "out" / "predictions.parquet")
    ids = {system: sorted(rows.id) for system, rows in answers.groupby("system")}
    assert ids["gpt"] == ids["none"] == sorted(e.id for e in examples)
    scores = pd.read_csv(files / "out" / "scores.csv").set_index("system")
    assert (scores.loc["gpt"].accuracy == 1.0).all(), "the long row was answered wrongly"
    (files / "gpt.csv").write_text("\n".join(["id,label", *rows[1:]]))
    assert run(*flags, "--edit", "none") == 2, "a row without an answer is refused all the same"


def test_only_seeds_of_one_method_are_put_together():
    a, again, elsewhere = (
        Push("L2.resid_post", seed=0),
        Push("L2.resid_post", seed=1),
        Push("L1.resid_post", seed=2),
    )
    assert command.seeds_of_one([None, a, elsewhere, again]) == [[1, 3]]
    again.record = TrainingRecord(preset={"epochs": 2})
    assert command.seeds_of_one([a, again]) == [], "trained otherwise"


def test_another_systems_answers_need_no_model(run, files, examples, capsys):
    (files / "gpt.csv").write_text(
        "id,label\n" + "".join(f"{e.id},{e.polarity.value}\n" for e in examples)
    )
    assert (
        run(
            "--data",
            str(files / "test.jsonl"),
            "--predictions",
            str(files / "gpt.csv"),
            model="/nowhere/at/all",
        )
        == 0
    )
    scores = pd.read_csv(files / "out" / "scores.csv")
    assert scores.system.unique().tolist() == ["gpt"] and scores.accuracy.tolist() == [1.0, 1.0]
    assert json.loads((files / "out" / "run.json").read_text())["model"] is None


BAD = {
    "no such file": (["--data", "nope.jsonl"], "there is no such file"),
    "one prediction file for two": (
        ["--data", "{test}", "{other}", "--predictions", "{train}"],
        "--predictions names 1 files for 2 of --data",
    ),
    "a prediction file of other rows": (
        ["--data", "{test}", "--predictions", "{train}"],
        "have no prediction",
    ),
    "labels": (["--data", "{test}", "--labels", "a"], "--labels gives 1 words"),
    "labels that cannot be told apart": (
        ["--data", "{test}", "--labels", "good", "good", "bad"],
        "tokenise alike",
    ),
    "template": (["--data", "{test}", "--template", "{{sentence}}"], "has no field {aspect}"),
    "side effects of nothing": (
        ["--data", "{test}", "--side-effects"],
        "--side-effects was given without an edit",
    ),
    "gaps of nothing": (
        ["--data", "{test}", "--edit", "none", "--fairness"],
        "--fairness was given without an edit",
    ),
    "texts": (
        ["--data", "{test}", "--texts", "x"],
        "--texts was given without --side-effects or --scorecard",
    ),
    "twice": (["--data", "{test}", "{test}"], "--data names"),
    "batch size": (["--data", "{test}", "--batch-size", "0"], "--batch-size is 0"),
    "level": (
        ["--data", "{test}", "--level", "95"],
        "--level 95 was given; it must lie between 0 and 1",
    ),
    "no data": (["--data"], "--data names no file"),
}


@pytest.mark.parametrize("flags, message", BAD.values(), ids=BAD)
def test_bad_input_leaves_one_sentence_and_no_file(run, files, capsys, flags, message):
    names = {n: str(files / f"{n}.jsonl") for n in ("test", "other", "train")}
    assert run(*(f.format(**names) for f in flags)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.startswith("mech_absa.evaluate: ") and "\n" not in said
    assert not (files / "out").exists()


@pytest.mark.slow
def test_edits_are_asked_with_their_own_question(run, files, monkeypatch, model, capsys):
    own = Push("L2.resid_post", 20.0)
    own.record = TrainingRecord(
        template="{sentence} So the {aspect} is", labels=("good", "bad", "fair")
    )
    monkeypatch.setattr(
        command,
        "load",
        lambda name, model: {"none": None, "own": own}.get(name, Push("L1.resid_post")),
    )
    data = str(files / "test.jsonl")
    assert run("--data", data, "--edit", "none", "own") == 0
    record = json.loads((files / "out" / "run.json").read_text())
    assert record["template"] == own.record.template and record["labels"] == list(own.record.labels)
    answers = pd.read_parquet(files / "out" / "predictions.parquet")
    expected = predict(model, load_examples(data), own)
    assert answers[answers.system == "own"].logprob_positive.tolist() == pytest.approx(
        expected.scores[:, 0].tolist(), abs=1e-4
    )
    assert run("--data", data, "--edit", "own", "paper", "--out", str(files / "out2")) == 2
    assert "trained with different questions or labels" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(run, files, capsys):
    (files / "out").mkdir()
    (files / "out" / "thesis.tex").write_text("years of work")
    assert run("--data", str(files / "test.jsonl")) == 2
    assert "is not empty" in capsys.readouterr().err and [
        p.name for p in (files / "out").iterdir()
    ] == ["thesis.tex"]


def test_a_missing_edit_is_refused(files, capsys):
    flags = [
        "--model",
        str(tiny_folder("gpt2")),
        "--data",
        str(files / "test.jsonl"),
        "--out",
        str(files / "out"),
    ]
    assert command.cli([*flags, "--edit", str(files / "nope")]) == 2
    assert "holds no edit" in capsys.readouterr().err and not (files / "out").exists()


def test_names_tell_edits_apart():
    assert command.names(["none", "bundled", "runs/a", "runs/b/"]) == ["none", "bundled", "a", "b"]
    assert command.names(["x/seed0", "y/seed0"]) == ["x/seed0", "y/seed0"]
