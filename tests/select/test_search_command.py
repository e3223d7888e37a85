"""`python -m mech_absa.patch --budget` and `--until-clear`: the largest cells without a whole sweep."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from support.jobs import ONE_TOKEN
from support.tiny_models import tiny_folder

from mech_absa.commands.patch import cli
from mech_absa.commands.report import cli as report
from mech_absa.readers import load_examples, write_jsonl

TEMPLATE = "{sentence} {aspect} ?"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> list[str]:
    """Flags of a trace by role that works."""
    data = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    write_jsonl(load_examples("builtin:device/train")[:10], data)
    return [
        "--model", str(tiny_folder("gpt2")), "--data", str(data), "--keep", "all", "--by", "role",
        "--corruption", "counterfactual", "--metric", "logit_diff", "--template", TEMPLATE,
        "--sites", "attn_out", "mlp_out", "--labels", *ONE_TOKEN, "--no-figures", "--no-report",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def sweep(base, tmp_path_factory) -> pd.DataFrame:
    """The map of all cells."""
    out = tmp_path_factory.mktemp("sweep") / "run"
    assert cli([*base, "--quiet", "--out", str(out)]) == 0
    table = pd.read_csv(out / "importance.csv")
    named = [f"L{r.layer}.{r.kind}@{r.role}" for r in table.itertuples()]
    return table.assign(site=named)


@pytest.mark.slow
def test_with_the_whole_budget_it_finds_the_largest_cells_of_the_map(base, sweep, tmp_path, capsys):
    assert cli([*base, "--budget", "1", "--top", "3", "--out", str(tmp_path / "run")]) == 0
    table = pd.read_csv(tmp_path / "run" / "search.csv")
    largest = sweep.sort_values("aie", ascending=False).head(3)
    assert table["found"].tolist()[:4] == [True, True, True, False]
    assert table["site"].tolist()[:3] == largest["site"].tolist()
    assert table["mean"].tolist()[:3] == pytest.approx(largest["aie"].tolist(), abs=1e-6)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["search"]
    assert told["exact"] == told["of"] and told["certain"]
    assert table["low"][0] == table["high"][0] == table["mean"][0]  # nothing is left to measure
    printed = capsys.readouterr().out
    assert largest["site"].iloc[0] in printed and "these are the 3 largest cells" in printed


@pytest.mark.slow
def test_the_budget_is_kept_and_recorded(base, sweep, tmp_path):
    run = tmp_path / "run"
    assert cli([*base, "--budget", "0.2", "--top", "2", "--quiet", "--out", str(run)]) == 0
    found = json.loads((run / "run.json").read_text())
    told = found["search"]
    assert found["command"] == "patch.search" and told["cells"] == 2
    assert told["of"] == sweep["n"].sum()  # pairs of every cell
    assert 0 < told["exact"] <= 0.2 * told["of"] and told["share"] == told["exact"] / told["of"]
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "search.csv"]


@pytest.mark.parametrize("strategy", [[], ["--strategy", "thompson"]], ids=["ucb", "thompson"])
def test_until_clear_measures_all_where_nothing_is_certain(strategy, base, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli([*base, "--until-clear", "--top", "2", *strategy, "--out", str(run)]) == 0
    told = json.loads((run / "run.json").read_text())["search"]
    table = pd.read_csv(run / "search.csv")
    apart = table["low"][:2].min() > table["high"][2:].max()
    assert told["certain"] == apart
    assert ("It is not certain" in capsys.readouterr().out) == (not apart)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0"], ["budget of 0", "above 0, up to 1"]),
        (["--budget", "nan"], ["--budget nan", "finite"]),
        (["--budget", "0.5", "--by", "token"], ["--by token", "role"]),
        (["--until-clear", "--direction", "both"], ["--direction both", "denoise, noise"]),
        (["--budget", "0.5", "--window", "3"], ["--window 3", "1"]),
        (["--budget", "0.5", "--top", "999"], ["--top 999", "accepted: 1 to 87"]),
        (["--top", "3"], ["--top 3", "--budget"]),
        (["--strategy", "ucb"], ["--strategy ucb", "--budget"]),
        (["--until-clear", "--strategy", "halving"], ["--strategy halving", "ucb, thompson"]),
    ],
)
def test_what_it_refuses(flags, words, base, tmp_path, capsys):
    assert cli([*base, *flags, "--out", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(w in line for w in words), line
    assert not (tmp_path / "run").exists()


def test_the_report_says_what_there_is(base, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli([*base, "--budget", "0.3", "--top", "2", "--quiet", "--out", str(run)]) == 0
    assert report([str(run), "--out", str(tmp_path / "r.html")]) == 2
    assert "holds no run" in capsys.readouterr().err
