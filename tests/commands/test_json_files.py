"""Every JSON file that any command leaves is strict JSON and looks as its schema says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_models import tiny_folder

from mech_absa.commands import card, compare, evaluate, generate, matrix, patch, report, train
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.schemas import SCHEMAS, problem

TEMPLATE = "{sentence} {aspect} ?"
MODEL = ["--model", str(tiny_folder("llama"))]


def strict(path: Path):
    """The value of a file, read as a browser's JSON.parse reads it: no NaN, no Infinity, no key twice."""

    def unique(pairs):
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse, object_pairs_hook=unique)


def test_the_check_can_fail(tmp_path):
    (tmp_path / "a.json").write_text('{"a": NaN}')
    with pytest.raises(AssertionError, match="holds NaN"):
        strict(tmp_path / "a.json")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with one run of every command, with the options that leave the most files."""
    home = tmp_path_factory.mktemp("runs")
    files = []
    for name, part in (("toys_train", "train"), ("toys_test", "test")):
        write_jsonl(load_examples(f"builtin:device/{part}")[:12], home / f"{name}.jsonl")
        files.append(str(home / f"{name}.jsonl"))
    learn, test = files

    def run(command, *flags: str) -> None:
        assert command.cli(list(flags)) == 0

    asked = [*MODEL, "--template", TEMPLATE]
    for corruption in ("noise", "mean"):
        where = [
            "--by",
            "role",
            "--noise-draws",
            "2",
            "--no-figures",
            "--out",
            f"{home}/{corruption}",
        ]
        run(
            patch,
            *asked,
            "--data",
            test,
            "--keep",
            "all",
            "--corruption",
            corruption,
            "--limit",
            "2",
            *where,
        )
    edit = ["--layers", "1", "--epochs", "1"]
    run(train, *asked, "--data", learn, "--test", test, *edit, "--out", f"{home}/edit")
    methods = ["--methods", "zero_shot", "both@1", "--seeds", "0", "--epochs", "1"]
    run(matrix, *asked, "--train", learn, "--test", test, *methods, "--out", f"{home}/matrix")
    short = [
        "--corruption",
        "zero",
        "--width",
        "1",
        "--places",
        "1",
        "--looks",
        "4",
        "--budgets",
        "4x1",
    ]
    short += ["--rates", "1", "--samples", "2", "--selectors", "last", "--validation", "0.4"]
    run(compare, *asked, "--data", learn, "--test", test, *short, "--out", f"{home}/compare")
    scored = [
        "--edit",
        "none",
        f"{home}/edit",
        "--compare",
        "none",
        "--side-effects",
        "--scorecard",
        "--fairness",
        "--draws",
        "20",
    ]
    run(evaluate, *MODEL, "--data", test, "--train-data", learn, *scored, "--out", f"{home}/scores")
    run(card, "--limit", "1", "--draws", "2", "--out", f"{home}/card")
    run(generate, "--out", f"{home}/world")
    run(report, f"{home}/noise", f"{home}/edit", "--out", f"{home}/both.html")
    return home


@pytest.mark.slow
def test_every_json_file_is_strict_and_fits_its_schema(runs):
    files = sorted(runs.rglob("*.json"))
    named = {p.name for p in files}
    assert set(SCHEMAS) <= named, "a schema that no command leaves a file for"
    commands = {json.loads(p.read_text())["command"] for p in files if p.name == "run.json"}
    assert commands == {"patch", "train", "train.matrix", "compare", "evaluate", "evaluate.card"}
    for path in files:
        value = strict(path)
        assert problem(value, SCHEMAS[path.name]) is None, (
            path,
            problem(value, SCHEMAS[path.name]),
        )


@pytest.mark.slow
def test_lines_of_json_are_strict(runs):
    for path in runs.rglob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            json.loads(line, parse_constant=pytest.fail)


@pytest.mark.slow
def test_a_number_that_is_none_is_null(runs):
    """An ablation has no corrupted run, so that its total effect is not a number."""
    assert strict(runs / "mean" / "run.json")["average_total_effect"] is None
    assert isinstance(strict(runs / "noise" / "run.json")["average_total_effect"], float)


@pytest.mark.slow
def test_run_json_names_every_other_file(runs):
    for path in runs.rglob("run.json"):
        beside = {str(p.relative_to(path.parent)) for p in path.parent.rglob("*") if p.is_file()}
        assert set(strict(path)["files"]) == beside - {"run.json", "report.html"}
