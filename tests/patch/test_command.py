"""`python -m mech_absa.patch`: the files it leaves, the sentences it refuses with, and what happens when it is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from support import fast
from support.tiny_models import tiny_folder

from mech_absa.commands import patch
from mech_absa.commands.patch import cli
from mech_absa.examples import Example, Polarity
from mech_absa.model import load_model
from mech_absa.patch.effects import Effects
from mech_absa.patch.importance import load_sites
from mech_absa.patch.pairs import MeanAblation, Resample, ZeroAblation, make_pairs
from mech_absa.patch.trace import trace
from mech_absa.patch.traced import as_written
from mech_absa.prompts import PromptTemplate
from mech_absa.readers import load_examples, write_jsonl
from mech_absa.sites import Site

ROOT = Path(__file__).parents[2]
FAST = ["--no-figures", "--no-report", "--quiet"]


def examples(n: int = 4) -> list[Example]:
    words = ["good", "bad", "fine", "slow"]
    made = []
    for i in range(n):
        sentence = f"the food was {words[i % 4]} and the wine was {words[(i + 1) % 4]} ."
        made.append(Example(sentence, "food", list(Polarity)[i % 3], (4, 8), id=f"e{i}"))
        if i % 2:
            made.append(
                Example(
                    sentence,
                    "wine",
                    list(Polarity)[(i + 1) % 3],
                    (sentence.index("wine"), sentence.index("wine") + 4),
                    id=f"e{i}w",
                )
            )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    write_jsonl(examples(), path)
    return path


@pytest.fixture(scope="module")
def base(data) -> list[str]:
    """Flags of a run that works, by role: a tenth of the cells."""
    return [
        "--model",
        str(tiny_folder("gpt2")),
        "--data",
        str(data),
        "--keep",
        "all",
        "--noise-draws",
        "2",
        "--template",
        "{sentence} {aspect} ?",
        "--by",
        "role",
    ]


def test_a_run_leaves_what_it_says(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        cli(
            [
                *base,
                "--by",
                "token",
                "--out",
                str(out),
                "--sites",
                "resid_post",
                "attn_out",
                "head",
                "--no-report",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "6 pairs kept of 6, of 4 sentences" in printed and "sites chosen: L" in printed
    assert "resolution: 4 sentences and " in printed  # what the sentences can show at all
    record = json.loads((out / "run.json").read_text())
    assert record["pairs"]["kept"] == 6 and record["data"]["examples"] == 6
    assert record["self_checks"]["engine_against_loop"] < 1e-4
    effects = Effects.load(out)
    model_layers, heads = effects.about["n_layers"], effects.about["n_heads"]
    tokens = sum(len(t) for t in effects.pairs["tokens"])
    assert len(effects) == tokens * model_layers * (
        2 + heads
    )  # every token, layer and component, nothing averaged away
    # The averages are the means of the effects, computed here with pandas alone.
    table = pd.read_csv(out / "importance.csv")
    by_pair = (
        as_written(effects.frame)
        .groupby(["example_id", "kind", "layer", "head", "role"])["effect"]
        .mean()
    )
    mean = by_pair.groupby(level=["kind", "layer", "head", "role"]).mean()
    for _, row in table.iterrows():
        assert row["aie"] == pytest.approx(
            mean[row["kind"], row["layer"], row["head"], row["role"]], abs=1e-7
        )
        assert row["ci_low"] - 1e-9 <= row["aie"] <= row["ci_high"] + 1e-9
    sites = load_sites(out / "sites.json")
    assert all(s.kind == "resid_post" for s in sites)
    names = {p.name for p in (out / "figures").iterdir()}
    assert any(n.endswith(".png") for n in names) and any(n.endswith(".pdf") for n in names)
    assert not (out / ".run").exists()


def test_sites_may_be_those_of_a_traced_run(base, tmp_path, capsys):
    """`--sites` takes in `patch` what it takes in `train`; the record names the sites themselves."""
    chosen = tmp_path / "first"
    chosen.mkdir()
    (chosen / "sites.json").write_text('{"sites": ["L1.resid_post@query.last", "L2.mlp_out"]}')
    for i, words in enumerate(([str(chosen)], ["L1.resid_post@query.last", "L2.mlp_out"])):
        assert cli([*base, *FAST, "--out", str(tmp_path / f"{i}"), "--sites", *words]) == 0
    frames = [Effects.load(tmp_path / f"{i}").frame for i in range(2)]
    pd.testing.assert_frame_equal(*frames)
    assert set(frames[0]["role"][frames[0]["kind"] == "resid_post"]) == {"query.last"}
    records = [json.loads((tmp_path / f"{i}" / "run.json").read_text()) for i in range(2)]
    assert records[0]["config"]["sites"] == records[1]["config"]["sites"]
    flags = [*base, "--out", str(tmp_path / "no"), "--sites", str(tmp_path / "nowhere/sites.json")]
    assert "nowhere" in refused(flags, capsys) and not (tmp_path / "no").exists()


def refused(argv: list[str], capsys) -> str:
    assert cli(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--limit", "-1"], ["--limit", "1 or more"]),
        (["--sites", "L99.resid_post"], ["L99.resid_post", "layers", "L0 to L"]),
        (["--sites", "L1.foo"], ["foo", "resid_post"]),
        (["--sites", "soul"], ["soul", "resid_post"]),
        (["--layers", "7-9"], ["layer 9", "layers"]),
        (["--template", "what of {sentence} ?"], ["{aspect}"]),
        (["--labels", "good", "good", "bad"], ["good", "tokenise alike"]),
        (["--labels", "good", "bad"], ["--labels", "three"]),
        (["--metric", "beauty"], ["beauty", "prob"]),
        (["--corruption", "magic"], ["magic", "counterfactual"]),
        (["--corruption", "counterfactual"], ["no pair is left", "no counterfactual"]),
        (["--noise-draws", "0"], ["0 noise draws", "accepted: 1 to 10,000"]),
        (["--noise-span", "moon"], ["moon", "sentence"]),
        (["--direction", "up"], ["up", "denoise"]),
        (["--rule", "pie"], ["--rule pie", "--direction denoise", "both is needed"]),
        (["--direction", "both", "--rule", "int"], ["--rule", "int", "pie"]),
        (["--window", "0"], ["window 0", "1 or more"]),
        (["--window", "3", "--sites", "head"], ["window", "heads"]),
        (["--method", "guess"], ["guess", "exact"]),
        (["--engine", "steam"], ["steam", "wavefront"]),
        (["--by", "moon"], ["moon", "token"]),
        (["--keep", "some"], ["some", "paper"]),
        (["--dtype", "int3"], ["int3", "float32"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--memory", "-1"], ["--memory -1"]),
        (["--level", "2"], ["--level 2"]),
        (["--adapter", "nowhere"], ["nowhere"]),
        (["--data", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--model", "no/such/folder"], ["no/such/folder", "folder"]),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_bad_flags_get_one_sentence_and_leave_nothing(flags, words, base, tmp_path, capsys):
    out = tmp_path / "run"
    message = refused([*base, "--out", str(out), *flags, *FAST], capsys)
    for word in words:
        assert word in message
    assert not out.exists()


def test_flags_that_do_not_exist_exit_with_two(base, tmp_path, capsys):
    assert "there is no flag --limits; the nearest is --limit" in refused(
        [*base, "--out", str(tmp_path / "run"), "--limits", "3"], capsys
    )
    assert not (tmp_path / "run").exists()


GOOD = (
    '{"text": "the food was good", "aspect": "food", "from": 4, "to": 8, "polarity": "positive"}\n'
)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("broken.jsonl", GOOD + '{"text": "the fo', ["broken.jsonl:2", "JSON"]),
        (
            "missing.jsonl",
            GOOD
            + GOOD.replace('"aspect": "food"', '"aspect": "wine"').replace(
                '"from": 4, "to": 8, ', ""
            ),
            ["missing.jsonl:2", "wine"],
        ),
        ("offsets.jsonl", GOOD + GOOD.replace('"to": 8', '"to": 9'), ["offsets.jsonl:2", "4..9"]),
        ("beyond.jsonl", GOOD.replace('"to": 8', '"to": 800'), ["beyond.jsonl:1", "800"]),
        (
            "label.jsonl",
            GOOD + GOOD.replace("positive", "splendid"),
            ["label.jsonl:2", "splendid", "positive"],
        ),
        ("empty.jsonl", "", ["empty.jsonl", "empty"]),
        (
            "bomb.xml",
            '<?xml version="1.0"?>\n<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>\n<sentences><sentence><text>&b;</text></sentence></sentences>\n',
            ["bomb.xml", "entit"],
        ),
    ],
)
def test_bad_data_is_named_with_file_and_line(name, content, words, base, tmp_path, capsys):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    out = tmp_path / "run"
    message = refused([*base, "--data", str(path), "--out", str(out), *FAST], capsys)
    for word in words:
        assert word in message
    assert not out.exists()


@pytest.mark.slow
def test_columns_and_labels_of_other_names(base, tmp_path, capsys):
    """Numbers for labels and a foreign column, by flags: the same pairs as from the file that has the usual names."""
    number = {"positive": "2", "neutral": "1", "negative": "0"}
    rows = [
        {"Review": e.sentence, "Term": e.aspect, "Stars": number[e.polarity.value]}
        for e in examples()
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "r.csv", index=False)
    flags = [
        *base[:2],
        "--data",
        str(tmp_path / "r.csv"),
        *base[4:],
        "--limit",
        "2",
        "--by",
        "role",
        *FAST,
    ]
    assert cli([*flags, "--out", str(tmp_path / "no")]) == 2 and "r.csv" in capsys.readouterr().err
    flags += ["--columns", "sentence=Review", "aspect=Term", "polarity=Stars"]
    assert (
        cli([*flags, "--out", str(tmp_path / "no")]) == 2
        and "unknown label '2'" in capsys.readouterr().err
    )
    assert cli([*flags, "--meaning", "2", "--out", str(tmp_path / "no")]) == 2
    assert "words such as" in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert (
        cli(
            [
                *flags,
                "--meaning",
                "0=negative",
                "1=neutral",
                "2=positive",
                "--out",
                str(tmp_path / "yes"),
            ]
        )
        == 0
    )
    classes = json.loads((tmp_path / "yes" / "run.json").read_text())["data"]["classes"]
    assert classes == {p.value: sum(e.polarity is p for e in examples()) for p in Polarity}


def test_a_model_folder_without_weights(base, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_folder("gpt2") / "config.json").read_text())
    message = refused(
        [*base, "--model", str(folder), "--out", str(tmp_path / "run"), *FAST], capsys
    )
    assert "no weights" in message and "model.safetensors" in message


def test_a_folder_that_is_not_empty(base, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    message = refused([*base, "--out", str(out), *FAST], capsys)
    assert "not empty" in message
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run; of `run.json` everything but the timings."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    record = json.loads(found["run.json"])
    for key in ("seconds", "sweep_seconds"):
        record.pop(key, None)
    found["run.json"] = json.dumps(record).encode()
    return found


DIES = """
import os, signal, sys
from mech_absa.commands import patch
write = patch.write_part
def once(frame, path):
    write(frame, path)
    os.kill(os.getpid(), signal.SIGKILL)
patch.write_part = once
patch.cli(sys.argv[1:])
"""  # the process kills itself when the first part of its sweep is on disk


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(base, tmp_path, capsys):
    many = tmp_path / "many.jsonl"
    write_jsonl(
        [
            replace(e, id=f"{e.id}-{k}", sentence=e.sentence + " ok" * k)
            for k in range(2)
            for e in examples(2)
        ],
        many,
    )
    base = [*base, "--data", str(many), "--sites", "resid_post", "--by", "role"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli([*base, "--out", str(whole), *FAST]) == 0
    flags = [*base, "--out", str(killed), *FAST]
    done = subprocess.run([sys.executable, "-c", DIES, *flags], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert len(list(killed.glob(".run/*.parquet"))) == 1 and not (killed / "run.json").exists()
    assert "not empty" in refused(flags, capsys)
    assert "differs in metric" in refused([*flags, "--resume", "--metric", "logit_diff"], capsys)
    assert cli([*flags, "--resume"]) == 0
    assert contents(killed) == contents(whole)
    # A finished run is left as it is.
    assert cli([*flags, "--resume"]) == 0
    assert contents(killed) == contents(whole)


# `--cpu` would start one process, whatever number it is given; `--multi_gpu` starts two, on CPUs too
# where the command is told so.
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """Run two processes of a module or a script."""
    return subprocess.run([*LAUNCH, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(base, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli([*base, "--device", "cpu", "--out", str(one), *FAST]) == 0
    done = launched("-m", "mech_absa.patch", *base, "--device", "cpu", "--out", str(two), *FAST)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = contents(one), contents(two)
    assert a.keys() == b.keys()
    assert a == b


@pytest.mark.slow
def test_where_one_of_two_processes_dies_the_run_fails_and_can_be_taken_up(base, tmp_path):
    one, two, script = tmp_path / "one", tmp_path / "two", tmp_path / "dies.py"
    script.write_text(
        "import os, sys\nfrom mech_absa.commands import patch\n"
        "if os.environ['RANK'] == '1':\n    patch.write_part = lambda frame, path: os._exit(9)\n"
        "sys.exit(patch.cli(sys.argv[1:]))\n"
    )
    flags = [*base, "--device", "cpu", *FAST]
    done = launched(str(script), *flags, "--out", str(two))
    assert done.returncode != 0 and "exitcode  : 9" in done.stderr, done.stderr[-2000:]
    assert not (two / "run.json").exists() and not (two / "effects.parquet").exists()
    assert cli([*flags, "--out", str(two), "--resume"]) == 0
    assert cli([*flags, "--out", str(one)]) == 0
    assert contents(one) == contents(two)


@pytest.mark.slow
def test_estimates_are_compared_with_an_exact_sample(base, tmp_path):
    out = tmp_path / "run"
    flags = [
        "--labels",
        "a",
        "b",
        "d",
        "--separator",
        "",
        "--metric",
        "logit_diff",
        "--method",
        "ig",
        "--steps",
        "4",
        "--control",
        "40",
    ]
    assert cli([*base, *flags, "--out", str(out), *FAST]) == 0
    found = json.loads((out / "run.json").read_text())["estimate_against_exact"]
    assert found["cells"] == 40 and -1 <= found["spearman"] <= 1


@pytest.mark.parametrize("corruption", fast(["mean", "zero", "resample"], []))
def test_ablations_run_through(base, tmp_path, corruption, capsys):
    """They have no corrupted run: its column is nan on disk too, the direction is said, and the effects are those of a trace in memory."""
    out = tmp_path / "run"
    assert (
        cli(
            [
                *base,
                "--corruption",
                corruption,
                "--by",
                "role",
                "--metric",
                "logit_diff",
                "--out",
                str(out),
                "--no-figures",
            ]
        )
        == 0
    )
    assert "direction noise" in capsys.readouterr().out
    effects = Effects.load(out)
    assert (
        effects.about["direction"] == "noise"
        and effects.frame["corrupted"].isna().all()
        and effects.frame["corrupted"].dtype == float
    )
    model = load_model(base[1], device="cpu")
    made = {"mean": MeanAblation(), "zero": ZeroAblation(), "resample": Resample()}[corruption]
    pairs = make_pairs(
        model,
        load_examples(base[3]),
        made,
        template=PromptTemplate("{sentence} {aspect} ?"),
        keep="all",
    )
    again = trace(model, pairs, by="role", metric="logit_diff").frame
    np.testing.assert_allclose(effects.frame["effect"], again["effect"], atol=1e-5)
    assert (
        effects.frame["effect"].abs().max() > 1e-3 and (out / "report.html").stat().st_size > 10_000
    )


@pytest.mark.slow
def test_half_precision_is_checked_against_float32(base, tmp_path):
    out = tmp_path / "run"
    assert (
        cli(
            [
                *base,
                "--dtype",
                "bfloat16",
                "--control",
                "20",
                "--limit",
                "3",
                "--out",
                str(out),
                *FAST,
            ]
        )
        == 0
    )
    found = json.loads((out / "run.json").read_text())["half_precision_control"]
    assert found["cells"] == 20 and 0 < found["largest_difference"] < 0.2


@pytest.mark.slow  # tests of the engines compare them for every architecture
def test_loop_and_wavefront_leave_the_same_effects(base, tmp_path):
    frames = []
    for engine in ("loop", "wavefront"):
        out = tmp_path / engine
        assert (
            cli(
                [
                    *base,
                    "--engine",
                    engine,
                    "--limit",
                    "1",
                    "--by",
                    "role",
                    "--metric",
                    "logit_diff",
                    "--out",
                    str(out),
                    *FAST,
                ]
            )
            == 0
        )
        frames.append(Effects.load(out).frame)
    assert (frames[0]["effect"] - frames[1]["effect"]).abs().max() < 1e-5
    assert frames[0]["effect"].abs().max() > 1e-3


def test_selected_sites_parse():
    assert str(Site.parse("L3.resid_post@query.last")) == "L3.resid_post@query.last"


@pytest.mark.slow
def test_both_directions_leave_the_interaction_and_a_choice_by_rule(base, tmp_path):
    """TIE - PIE of the table is that of the effects, and sites are chosen by the effect that was named."""
    flags = [*base, *FAST, "--direction", "both", "--sites", "mlp_out", "--by", "role"]
    out = tmp_path / "run"
    assert cli([*flags, "--rule", "tie", "--out", str(out)]) == 0
    chosen = json.loads((out / "sites.json").read_text())
    frame = Effects.load(out).frame
    means = frame.groupby(["direction", "kind", "layer", "role"], observed=True)["effect"].mean()
    table = pd.read_csv(out / "interaction.csv")
    for row in table.itertuples():
        pie, tie = (means[way, row.kind, row.layer, row.role] for way in ("denoise", "noise"))
        assert (row.pie, row.tie) == pytest.approx((pie, tie), rel=1e-6)
        assert row.interaction == pytest.approx(tie - pie, abs=1e-8)
    assert "TIE, noise" in chosen["rule"]
    mean = Effects.load(out).importance(by="role", adjustment="none").select("mlp_out")
    assert "mean of PIE and TIE" in mean.rule
    site = Site.parse(chosen["sites"][0])
    assert chosen["aie"] == pytest.approx(means["noise", "mlp_out", site.layer, site.at])
    importance = pd.read_csv(out / "importance.csv")
    np.testing.assert_allclose(importance["aie"], (table["pie"] + table["tie"]) / 2, atol=1e-8)


@pytest.mark.slow
def test_case_is_ignored_only_on_request(base, tmp_path, capsys):
    path = tmp_path / "cased.csv"
    path.write_text("sentence,aspect,polarity\nThe Food was good .,food,positive\n")
    flags = [*base, "--data", str(path), "--by", "role", *FAST, "--out", str(tmp_path / "run")]
    assert "food" in refused(flags, capsys)
    assert cli([*flags, "--ignore-case"]) == 0
    assert Effects.load(tmp_path / "run").pairs["aspect"].tolist() == ["Food"]


@pytest.mark.slow
def test_a_limit_draws_from_all_files_and_head_takes_the_first(base, data, tmp_path):
    """Two files of six examples each: the draw holds both, and follows the seed."""
    other = tmp_path / "other.jsonl"
    write_jsonl([replace(e, id=f"o{e.id}") for e in examples()], other)
    drawn = {}
    for name, more in {"a": ["--seed", "1"], "b": ["--seed", "2"], "head": ["--head"]}.items():
        flags = ["--data", str(data), str(other), "--limit", "5", "--sites", "mlp_out", *more]
        config = tyro.cli(patch.Config, args=[*base, *flags])
        task = patch.prepare(config, patch._Group(config), lambda *_: None)
        drawn[name] = [pair.id for pair in task.pairs]
    assert drawn["head"] == [e.id for e in examples()][:5]
    for ids in (drawn["a"], drawn["b"]):
        assert len(set(ids)) == 5 and 0 < sum(i.startswith("o") for i in ids) < 5
    assert drawn["a"] != drawn["b"]


@pytest.mark.slow
def test_a_trace_without_a_choice_of_sites_keeps_its_map(base, tmp_path, capsys):
    """Where only the question differs, what stands before it is exactly 0, and no role is left."""
    out = tmp_path / "run"
    words = ["--corruption", "aspect-swap", "--by", "role", "--sites", "resid_post", "--no-figures"]
    assert cli([*base, *words, "--out", str(out)]) == 0
    assert "no sites were chosen: every resid_post effect" in capsys.readouterr().out
    record = json.loads((out / "run.json").read_text())
    assert record["sites"] is None and "no sites were chosen" in record["warnings"][-1]
    table = pd.read_csv(out / "importance.csv").groupby("role")["aie"]
    assert (table.max() == table.min())["before"] and not (table.max() == table.min())["query.last"]
    assert not (out / "sites.json").exists() and (out / "report.html").exists()
