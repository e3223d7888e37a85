"""Bad input to train, evaluate and the matrix: one sentence that says what came, where, and what is accepted; code 2; nothing written.

What is odd but not wrong (a class without examples, a training file that is also the test file) is a warning with counts, on the screen, in
run.json and on the page.
"""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from support.tiny_models import tiny_folder
from support.training_cases import TEXT, WORDING, write

from mech_absa.commands.evaluate import cli as evaluate
from mech_absa.commands.matrix import cli as matrix
from mech_absa.commands.train import cli as train
from mech_absa.edits import Edit, Part, save_edit
from mech_absa.evaluate.caveats import caveats
from mech_absa.model import load_model
from mech_absa.readers import load_examples

MODEL = str(tiny_folder("llama"))


@pytest.fixture
def files(tmp_path):
    """Two domains of toy reviews; `plain` has no neutral example."""
    rows = {
        "toys_train": WORDING[:6], "toys_test": WORDING[4:], "b_train": WORDING[3:], "b_test": WORDING[:4],
        "plain": [r for r in WORDING if r[2] != "neutral"],
    }  # fmt: skip
    return {name: write(tmp_path / f"{name}.jsonl", part) for name, part in rows.items()}


@pytest.fixture
def refuse(files, tmp_path, capsys):
    """Runs a command with some flags otherwise, and gives the sentence it refuses with."""
    usual = {
        train: {"--data": ["{toys_train}"], "--layers": ["1"], "--epochs": ["1"]},
        matrix: {
            "--train": ["{toys_train}", "{b_train}"], "--test": ["{toys_test}", "{b_test}"], "--methods": ["zero_shot", "both@1"],
            "--seeds": ["0"], "--epochs": ["1"], "--validation": ["0"],
        },
        evaluate: {"--data": ["{toys_test}"]},
    }  # fmt: skip

    def runner(command, *flags: str, without: str = "") -> str:
        given = {
            "--model": [MODEL],
            "--template": [TEXT],
            "--out": [str(tmp_path / "out")],
        } | usual[command]
        given.pop(without, None)
        name = ""
        for word in flags:
            if word.startswith("--"):
                given[name := word] = []
            else:
                given[name].append(word)
        words = [
            w.format(**files) if w.startswith("{") and w != TEXT else w
            for k, v in given.items()
            for w in (k, *v)
        ]
        assert command(words) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith("mech_absa.") and "\n" not in said and "Traceback" not in said
        assert not (tmp_path / "out").exists()
        return said

    return runner


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--rank", "-3"), "rank -3 was asked for at L1.W_O; accepted: 1 to 32"),
        (("--rank", "33"), "rank 33 was asked for at L1.W_O; accepted: 1 to 32"),
        (("--seed", "-1"), "--seed is -1; accepted: 0 to 4294967295"),
        (("--memory", "-1"), "--memory is -1.0; accepted: 0 or more"),
        (("--clip", "-1"), "clip is -1.0; accepted: 0 or more"),
        (("--separator", "\ud800"), "--separator '\\ud800' is not UTF-8 text"),
        (("--clip", "nan"), "--clip nan was given; a finite number is needed"),
        (("--patience", "-1"), "patience is -1"),
        (
            ("--patience", "2", "--validation", "0"),
            "--patience 2 waits for a gain on validation examples",
        ),
        (("--batch-size", "0"), "batch_size is 0; accepted: 1 or more"),
        (("--lr-weight", "nan"), "--lr-weight nan was given; a finite number is needed"),
        (("--limit", "0"), "limit is 0"),
        (("--dtype", "float12"), "unknown dtype 'float12'"),
        (("--device", "banana"), "unknown device 'banana'"),
        (("--labels", "good", "good", "bad"), "tokenise alike"),
        (("--template", "what of it?"), "has 0 fields {sentence}"),
        (("--preset", "table2:lora"), "brings its own places; leave --sites and --layers out"),
        (("--test", "nowhere.jsonl"), "nowhere.jsonl: there is no such file"),
        (("--lyers", "2"), "there is no flag --lyers; the nearest is --layers"),
        (("--seed", "one"), "--seed: 'one' was given; a whole number is needed"),
    ],
)
def test_train_refuses(refuse, flags, words):
    assert words in refuse(train, *flags)


@pytest.mark.parametrize("command", [train, matrix])
def test_a_review_that_is_too_long_is_left_out_of_a_training(command, files, tmp_path, capsys):
    """One review of 700 words once ended the whole run; --strict still stops at it."""
    long = ("very " * 700 + "good food", "food", "positive")
    mixed = write(tmp_path / "toys_train.jsonl", [*WORDING[:6], long])
    words = ["--model", MODEL, "--template", TEXT, "--epochs", "1", "--validation", "0"]
    words += ["--out", str(tmp_path / "out"), "--quiet"]
    if command is train:
        words += ["--data", mixed, "--layers", "1"]
    else:
        words += [
            "--train",
            mixed,
            "--test",
            files["toys_test"],
            "--methods",
            "both@1",
            "--seeds",
            "0",
        ]
    assert command([*words, "--strict"]) == 2 and not (tmp_path / "out").exists()
    assert "the prompt of " in capsys.readouterr().err
    assert command(words) == 0
    assert "left out 1 (prompt longer than the model reads" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    data = record["data"][0] if command is train else record["domains"]["toys"]["train"]
    assert data["left_out"] == {"prompt longer than the model reads": 1}
    assert data["examples"] == 6


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1", "not JSON"),
        ('{"sites": []}', "names no sites"),
        ('{"sites": ["L1.soul"]}', "unknown kind of site 'soul'"),
        ('{"sites": ["L9.resid_post@query.last"]}', "3 layers"),
    ],
)
@pytest.mark.parametrize("command", [train, matrix], ids=["train", "matrix"])
def test_a_sites_file_that_does_not_fit(refuse, tmp_path, command, content, words):
    sites = tmp_path / "sites.json"
    sites.write_text(content)
    flags = ["--sites", str(sites), *(["--methods", "both@sites"] if command is matrix else [])]
    said = refuse(command, *flags, without="--layers")
    assert words in said and str(sites) in said


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seeds", "0", "0"), "--seeds names 0 more than once"),
        (("--seeds", "1", "-1"), "--seeds is -1; accepted: 0 to 4294967295"),
        (("--seeds",), "each need at least one"),
        (("--seeds", "x"), "--seeds"),
        (("--methods", "both@1", "both@1"), "--methods names both@1 more than once"),
        (("--methods", "magic@1"), "unknown preset 'magic'"),
        (("--methods", "zero_shot@2"), "zero_shot trains nothing, so it takes no place"),
        (("--methods", "@1"), "methods look like both@sites"),
        (("--methods", "zero_shot", "both@7"), "layer 7 was asked for"),
        (("--methods", "zero_shot", "both"), "none were given; give --sites"),
        (("--rank", "0"), "rank 0 was asked for at L1.W_O; accepted: 1 to 32"),
        (("--rank", "33"), "accepted: 1 to 32"),
        (("--epochs", "-1"), "epochs is -1"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--lr-scale", "-1"), "learning rate"),
        (("--lr-scale", "nan"), "--lr-scale nan was given; a finite number is needed"),
        (("--validation", "1"), "--validation is 1.0"),
        (("--limit-train", "0"), "--limit-train is 0"),
        (("--limit-test", "-1"), "--limit-test is -1"),
        (("--template", "what of it?"), "has 0 fields {sentence}"),
        (("--labels", "good", "good", "bad"), "tokenise alike"),
        (("--labels", "good"), "--labels gives 1 words"),
        (
            ("--positions", "opinion"),
            "L1.resid_post@opinion was asked for; none of the 6 training prompts of toys has a token there",
        ),
        (("--positions", "99"), "@99 was asked for"),
        (("--positions", "verb"), "unknown role 'verb'"),
        (("--memory", "-1"), "--memory is -1.0; accepted: 0 or more"),
        (("--test", "{toys_test}"), "--train names 2 files and --test 1"),
        (("--train", "{toys_train}", "{toys_train}"), "each domain can stand once"),
        (("--model", "/nowhere/at/all"), "there is no folder /nowhere/at/all"),
    ],
)
def test_the_matrix_refuses_before_it_trains(refuse, flags, words):
    assert words in refuse(matrix, *flags)


def test_a_review_too_long_for_the_model_is_refused_before_the_first_training(
    refuse, files, tmp_path
):
    write(tmp_path / "b_test.jsonl", [("the food " * 900, "food", "positive")])
    assert "tokens" in refuse(matrix)


def test_a_folder_in_use_is_refused_by_all(files, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    common = ["--model", MODEL, "--template", TEXT, "--out", str(tmp_path / "out")]
    for command, flags in (
        (train, ["--data", files["toys_train"], "--layers", "1"]),
        (
            matrix,
            [
                "--train",
                files["toys_train"],
                "--test",
                files["toys_test"],
                "--methods",
                "zero_shot",
            ],
        ),
        (evaluate, ["--data", files["toys_test"]]),
    ):
        assert command([*common, *flags]) == 2
        assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--seed", "-1"), "--seed is -1; accepted: 0 to 4294967295"),
        (("--draws", "0"), "--draws is 0; accepted: 1 or more"),
        (("--draws", "2000000"), "--draws is 2000000; accepted: 1 to 1,000,000"),
        (("--limit", "0"), "limit is 0"),
        (("--dtype", "q"), "unknown dtype 'q'"),
        (("--decode", "quick"), "--decode: 'quick' was given; accepted: label, generate"),
        (("--compare", "nowhere"), "nowhere holds no edit"),
        (("--train-data", "nowhere"), "there is no such file"),
    ],
)
def test_evaluate_refuses(refuse, flags, words):
    assert words in refuse(evaluate, *flags)


def test_evaluate_refuses_an_edit_of_another_base_and_a_damaged_one(refuse, tmp_path):
    other = load_model(tiny_folder("mistral"))
    save_edit(Edit.fresh(other, [Part("lora", "L1.W_O")]), tmp_path / "other")
    said = refuse(evaluate, "--edit", str(tmp_path / "other"))
    assert (
        f"made for {other.name} (weights {other.sha256[:12]})" in said
        and "load the model it was made for" in said
    )
    save_edit(Edit.fresh(load_model(MODEL), [Part("lora", "L1.W_O")]), tmp_path / "hurt")
    weights = tmp_path / "hurt" / "edit.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert f"{weights} is damaged: its hash is not the one that edit.json names" in refuse(
        evaluate, "--edit", str(tmp_path / "hurt")
    )


def test_evaluate_refuses_predictions_that_do_not_fit(refuse, files, tmp_path):
    examples = load_examples(files["toys_test"])
    table = pd.DataFrame(
        {"id": [e.id for e in examples], "label": [e.polarity.value for e in examples]}
    )
    for change, words in (
        (table.iloc[1:], "have no prediction"),
        (table.assign(label="splendid"), "splendid"),
        (table.drop(columns="label"), "label"),
    ):
        change.to_csv(tmp_path / "gpt.csv", index=False)
        said = refuse(evaluate, "--predictions", str(tmp_path / "gpt.csv"))
        assert words in said and "gpt.csv" in said


# ---- odd, but not wrong ---------------------------------------------------------------------------------------------------------------


def test_caveats_by_hand(files):
    toys, plain, other = (load_examples(files[n]) for n in ("toys_train", "plain", "toys_test"))
    assert caveats(toys, [load_examples(files["b_train"])])[-1].startswith("3 of 5 rows of")
    missing, neutral, leak = caveats(plain, [other])
    assert missing.startswith(
        "no neutral example among the 6 to train on (3 positive, 3 negative, 0 neutral)"
    )
    assert neutral.startswith("1 of 4 rows of") and neutral.endswith(
        "are neutral, and no training example is"
    )
    assert leak.startswith("3 of 4 rows of") and "(75.0 %; 3 with the same label)" in leak
    (same,) = caveats(toys, [toys], "toys")
    assert same.startswith("toys: all 6 rows of") and "100.0 %" in same
    (empty,) = caveats(None, [plain])
    assert (
        empty.startswith("no neutral example among the 6 of")
        and "macro-F1 is over the other classes" in empty
    )
    assert (
        caveats(toys, [load_examples(files["b_test"])])[0].startswith("all 4 rows of")
        and caveats(None, [toys]) == []
    )


def warnings_of(folder, capsys) -> list[str]:
    """What run.json warns of; the same must stand on the screen and on the page."""
    said = json.loads((folder / "run.json").read_text())["warnings"]
    screen, page = capsys.readouterr().err, (folder / "report.html").read_text()
    for warning in said:
        assert f"warning: {warning}" in screen and warning.split("/")[0] in page
    return said


@pytest.mark.slow
def test_every_command_warns_in_three_places(files, tmp_path, capsys):
    common = ["--model", MODEL, "--template", TEXT, "--out", str(tmp_path / "run")]
    assert (
        train(
            [
                *common,
                "--data",
                files["plain"],
                "--layers",
                "1",
                "--epochs",
                "1",
                "--test",
                files["plain"],
                files["toys_test"],
            ]
        )
        == 0
    )
    said = " ".join(warnings_of(tmp_path / "run", capsys))
    assert (
        "no neutral example among the 6 to train on" in said
        and "all 6 rows of" in said
        and "are neutral, and no training example is" in said
    )
    # The evaluation finds the training file by the record beside the edit, and by --train-data.
    common[-1] = str(tmp_path / "scores")
    assert (
        evaluate(
            [*common, "--edit", str(tmp_path / "run"), "--data", files["plain"], "--draws", "20"]
        )
        == 0
    )
    said = " ".join(warnings_of(tmp_path / "scores", capsys))
    assert (
        "was trained on this very file" in said
        and "(6 rows)" in said
        and "macro-F1 is over the other classes" in said
    )
    shutil.rmtree(tmp_path / "scores")
    assert (
        evaluate(
            [
                *common,
                "--edit",
                str(tmp_path / "run"),
                "--data",
                files["plain"],
                "--train-data",
                files["plain"],
                "--draws",
                "20",
            ]
        )
        == 0
    )
    said = " ".join(warnings_of(tmp_path / "scores", capsys))
    assert "all 6 rows of" in said and "very file" not in said
    scores = pd.read_csv(tmp_path / "scores" / "scores.csv")
    assert scores["leaked"].tolist() == [6] * len(scores) and "unseen" not in set(scores["subset"])


def test_the_matrix_warns_and_records_a_training_that_broke(files, tmp_path, capsys):
    out = tmp_path / "run"
    words = [
        "--train", files["plain"], "--test", files["toys_test"], "--model", MODEL, "--template", TEXT, "--methods", "red@all", "zero_shot",
        "--positions", "all", "--lr-scale", "1e38", "--seeds", "0", "--epochs", "9", "--validation", "0", "--out", str(out),
    ]  # fmt: skip
    assert matrix(words) == 0
    said = warnings_of(out, capsys)
    assert any(w.startswith("plain: no neutral example among the 6 to train on") for w in said)
    assert any(w.startswith("plain: 3 of 4 rows of") for w in said)
    assert any(w.startswith("red@all trained on plain with seed 0: the loss was") for w in said)
    table = pd.read_csv(out / "matrix.csv")
    assert table[table["method"] == "red@all"]["accuracy"].notna().all()
