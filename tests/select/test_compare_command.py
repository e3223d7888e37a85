"""`python -m mech_absa.compare` on a tiny model: files, resumption, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from support.tiny_models import tiny_folder

import mech_absa
from mech_absa.commands import compare as command
from mech_absa.commands.compare import cli
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.select.trainings import Trainings

FLAGS = [
    *("--model", str(tiny_folder("llama")), "--template", "{sentence} {aspect} ?", "--quiet"),
    *("--corruption", "zero", "--width", "1", "--looks", "8", "--budgets", "4x1"),
    *("--rates", "0.5", "1", "--samples", "2", "--edits", "lora_o", "--validation", "0.3"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    for part, n in (("train", 16), ("test", 6)):
        write_jsonl(load_examples(f"builtin:device/{part}")[:n], home / f"{part}.jsonl")
    return ["--data", str(home / "train.jsonl"), "--test", str(home / "test.jsonl")]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run, and the folder of its trainings."""
    home = tmp_path_factory.mktemp("runs")
    flags = [*FLAGS, *data, "--selectors", "first", "last", "--trainings", str(home / "kept")]
    assert cli([*flags, "--out", str(home / "run")]) == 0
    return home, flags


def test_what_a_run_leaves(run):
    home, _ = run
    folder = home / "run"
    record = json.loads((folder / "run.json").read_text())
    names = {p.name for p in folder.rglob("*") if p.is_file()} - {"run.json"}
    assert {f.split("/")[-1] for f in record["files"]} == names
    assert names == {
        *("selectors.csv", "places.csv", "trainings.csv", "rankings.csv", "agreement.csv"),
        *("agreements.csv", "costs.csv"),
        *("report.md", "selectors_lora_o_4x1.png", "selectors_lora_o_4x1.pdf"),
    }
    rows = pd.read_csv(folder / "trainings.csv")
    assert len(rows) == record["trainings"] == 3 * (2 + 2)  # places x (rates + samples)
    assert set(rows["layers"]) == {0, 1, 2}
    report = (folder / "report.md").read_text()
    assert "| first | 0 |" in report and "| last | 2 |" in report


def test_numbers_follow_from_the_trainings(run):
    folder = run[0] / "run"
    rows = pd.read_csv(folder / "trainings.csv")
    wide = rows[rows["stage"] == "scored"].pivot(
        index="layers", columns="sample", values="accuracy"
    )
    table = pd.read_csv(folder / "selectors.csv").set_index("selector")
    assert table.loc["last", "difference"] == pytest.approx((wide.loc[2] - wide.mean()).mean())
    for layers, part in rows.groupby("layers"):
        tuned, scored = part[part["stage"] == "tuning"], part[part["stage"] == "scored"]
        assert set(scored["rate"]) == {tuned.loc[tuned["loss"].idxmin(), "rate"]}
        assert len(scored) == 2, layers
    assert np.isclose(table.loc["first", "regret"], wide.mean(axis=1).max() - wide.loc[0].mean())


def test_other_domains_are_scored_apart(run, data, tmp_path):
    """Rows of another domain change nothing about the others."""
    write_jsonl(load_examples("builtin:laptop/test")[:6], tmp_path / "laptop.jsonl")
    flags = [*FLAGS, *data, "--selectors", "last", "--no-report"]
    flags += ["--out-of-domain", str(tmp_path / "laptop.jsonl"), "--out", str(tmp_path / "run")]
    assert cli(flags) == 0
    rows = pd.read_csv(tmp_path / "run" / "trainings.csv")
    alone = pd.read_csv(run[0] / "run" / "trainings.csv").set_index(["layers", "rate", "sample"])
    both = rows.set_index(["layers", "rate", "sample"])
    assert both["accuracy"].to_dict() == alone["accuracy"].loc[both.index].to_dict()
    assert both.loc[both["stage"] == "tuning", "accuracy_out"].isna().all()
    scored = rows[rows["stage"] == "scored"]
    assert scored["accuracy"].tolist() != scored["accuracy_out"].tolist()
    wide = scored.pivot(index="layers", columns="sample", values="accuracy_out")
    row = pd.read_csv(tmp_path / "run" / "selectors.csv").iloc[0]
    assert row["difference_out"] == pytest.approx((wide.loc[2] - wide.mean()).mean(), abs=1e-6)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["out_of_domain"]["examples"] == 6 and record["test_data"]["examples"] == 6


@pytest.mark.slow
def test_two_processes_train_the_same(run, tmp_path, capsys):
    """One place each and the third one for the first: the same trainings as in one process."""
    home, flags = run
    at = flags.index("--trainings")
    out = tmp_path / "two"
    assert cli([*flags[:at], "--jobs", "2", "--no-report", "--out", str(out)]) == 0
    one, two = (
        pd.read_csv(folder / "trainings.csv").drop(columns="cpu_seconds")
        for folder in (home / "run", out)
    )
    pd.testing.assert_frame_equal(two, one, rtol=1e-5)
    assert json.loads((out / "run.json").read_text())["warnings"] == []


@pytest.mark.slow
def test_a_process_that_dies_leaves_its_places_to_this_one(run, tmp_path, monkeypatch):
    home, flags = run
    at = flags.index("--trainings")
    monkeypatch.setattr(command, "train_side_by_side", lambda *_: [0, -9])
    assert cli([*flags[:at], "--jobs", "2", "--out", str(tmp_path / "run")]) == 0
    rows = pd.read_csv(tmp_path / "run" / "trainings.csv")
    assert len(rows) == len(pd.read_csv(home / "run" / "trainings.csv"))
    assert (
        "1 of 2 processes ended early (exit code -9)"
        in (tmp_path / "run" / "report.md").read_text()
    )


@pytest.mark.slow
def test_other_selectors_train_nothing_again(run, monkeypatch):
    home, flags = run
    monkeypatch.setattr(
        Trainings, "train", lambda self, job: pytest.fail(f"{job} is trained again")
    )
    at = flags.index("--selectors")
    more = [*flags[: at + 3], "middle", "random", *flags[at + 3 :]]
    assert cli([*more, "--out", str(home / "more")]) == 0
    assert len(pd.read_csv(home / "more" / "selectors.csv")) == 4
    first = (home / "run" / "trainings.csv").read_bytes()
    assert (home / "more" / "trainings.csv").read_bytes() == first


@pytest.mark.slow
def test_a_killed_run_goes_on(data, tmp_path, monkeypatch, capsys):
    flags = [*FLAGS, *data, "--selectors", "last", "--out", str(tmp_path / "run"), "--no-report"]
    train, trained = Trainings.train, []

    def some(self, job):
        if len(trained) == 5:
            raise KeyboardInterrupt
        trained.append(job)
        return train(self, job)

    monkeypatch.setattr(Trainings, "train", some)
    assert cli(flags) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(
        Trainings, "train", lambda self, job: trained.append(job) or train(self, job)
    )
    assert cli([*flags, "--resume"]) == 0
    assert len(trained) == len(set(trained)) == 12
    assert not (tmp_path / "run" / "report.md").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--selectors", "nose"], "--selectors 'nose' is unknown; accepted: exact, "),
        (["--selectors", "last", "last"], "--selectors names last more than once"),
        (["--edits", "magic"], "--edits 'magic' is unknown; accepted: both, "),
        (["--budgets", "64"], "budget '64' was given; accepted: EXAMPLESxEPOCHS"),
        (["--samples", "1"], "1 training samples were asked for; at least 2"),
        (["--width", "3"], "places of 3 layers were asked for; the model has 3 layers"),
        (["--jobs", "0"], "--jobs is 0; accepted: 1 or more"),
        (["--places", "0"], "--places is 0; accepted: 1 or more"),
        (["--validation", "1.5"], "--validation 1.5 was given"),
        (["--corruption", "rust"], "'rust' is no corruption; accepted: noise"),
        (["--position", "nowhere"], "unknown role 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(flags, sentence, data, tmp_path, capsys):
    given = [f for f in FLAGS if flags[0] != "--width" or f not in ("--width", "1")]
    out = tmp_path / "run"
    assert cli([*given, *data, *flags, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1
    assert not out.exists()


def test_a_selector_that_cannot_rank_stops_only_itself(run, tmp_path, capsys):
    """The warning stands on the terminal, in the report and in run.json; the others are compared."""
    _, flags = run
    loud = [f for f in flags if f != "--quiet"]
    at = loud.index("--selectors")
    some = [*loud[: at + 1], "joint_mask", *loud[at + 1 :]]
    assert cli([*some, "--out", str(tmp_path / "run")]) == 0
    said = "the selector joint_mask is left out: a joint mask mixes states of two runs, and Zero"
    assert f"warning: {said}" in capsys.readouterr().err
    folder = tmp_path / "run"
    record = json.loads((folder / "run.json").read_text())
    assert any(note.startswith(said) for note in record["warnings"])
    assert list(record["selectors"]) == ["first", "last"]
    assert f"- {said}" in (folder / "report.md").read_text()
    assert list(pd.read_csv(folder / "selectors.csv")["selector"]) == ["first", "last"]


def test_no_selector_left_is_one_sentence(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli([*FLAGS, *data, "--selectors", "joint_mask", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert (
        "no selector is left to compare; the selector joint_mask is left out: a joint mask" in said
    )
    assert said.count("\n") == 1 and not out.exists()


def test_the_function_keeps_its_name():
    """`mech_absa.compare` is a module and, as before, a function."""
    import importlib

    importlib.import_module("mech_absa.compare")
    with pytest.raises(Exception, match="Predictions"):
        mech_absa.compare("a", "b")


@pytest.mark.slow
def test_when_the_time_is_over_no_other_place_is_begun(run, tmp_path):
    """Layers 0 and 2 are done, layer 1 is a random place alone."""
    home, flags = run
    (kept,) = (home / "kept").iterdir()
    for part in kept.iterdir():
        if "-L1-" not in part.name:
            (tmp_path / "kept" / kept.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "kept" / kept.name / part.name).write_bytes(part.read_bytes())
    at = flags.index("--trainings")
    late = [*flags[:at], "--trainings", str(tmp_path / "kept"), "--minutes", "0"]
    assert cli([*late, "--out", str(tmp_path / "run")]) == 0
    assert set(pd.read_csv(tmp_path / "run" / "trainings.csv")["layers"]) == {0, 2}
    assert "2 of 3 random places were trained" in (tmp_path / "run" / "report.md").read_text()
