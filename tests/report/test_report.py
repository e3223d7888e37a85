"""The page: whole, closed to the world, true to its numbers, and indifferent to what reviews contain."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import fast
from support.made_runs import (
    NASTY,
    evaluate_folder,
    importance_of,
    made_effects,
    trace_folder,
    train_folder,
)

from mech_absa import records
from mech_absa.commands.report import cli
from mech_absa.errors import DataError
from mech_absa.report import leave_report, maps, write_report
from mech_absa.report.charts import Line, interval_chart, line_chart, ticks, y_range
from mech_absa.report.maps import NOTHING, quantised, spaced
from mech_absa.report.runs import read_runs
from mech_absa.report.text import embedded
from mech_absa.report.views.evaluate import answers

VOID = {
    "meta",
    "link",
    "br",
    "img",
    "input",
    "hr",
    "area",
    "base",
    "col",
    "embed",
    "source",
    "track",
    "wbr",
}
CLOSED_BY_OTHERS = {"circle", "line", "polyline", "polygon", "path", "rect"}
KINDS = ("trace", "train", "evaluate", "matrix", "comparison")


class Page(HTMLParser):
    """Elements, ids, addresses and text of a page; complains where tags do not match."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append((tag, value))
            assert not name.startswith("on"), f"<{tag} {name}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID | CLOSED_BY_OTHERS, f"<{tag}/>"
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.said).append(data)


def read(path: Path) -> tuple[str, Page, dict]:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    return text, page, json.loads(page.scripts[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_and_loads_nothing(pages, kind):
    text, page, _ = read(pages[kind])
    assert text.startswith("<!doctype html>")
    assert len(page.ids) == len(set(page.ids)), "every id once"
    for tag, address in page.addresses:
        assert address.startswith("#") or (tag, address) == ("link", "data:,"), (tag, address)
    inner = {a for t, a in page.addresses if t == "a"}
    assert {a[1:] for a in inner} <= set(page.ids), "links lead somewhere"
    assert page.tags.count("script") == 2 and "iframe" not in page.tags and "img" not in page.tags
    assert not re.search(r"url\(|@import|https?://", text), "nothing to fetch"
    assert "default-src 'none'" in text


def test_the_conclusion_comes_first_and_holds_the_side_effects(pages, tmp_path):
    """The first words of the page are the conclusion; side effects stand in it, or that nobody measured them."""
    text = read(pages["evaluate"])[0]
    main = text[text.index("<main") :]
    assert main.index('class="conclusion"') < main.index("What was run") < main.index("Scores")
    said = main[: main.index("What was run")]
    assert (
        "paper minus base on test.jsonl: +30.0 points [−10.0, +50.0]; 14 rows fixed, 2 broken; no difference is shown."
        in said
    )
    assert (
        "Side effects of paper: unrelated text: KL 0.0120 nats, top-1 the same at 98.0 % of 878"
        in said
    )
    folder = evaluate_folder(tmp_path / "e")
    (folder / "side_effects.json").unlink()
    assert "Side effects were not measured" in read(write_report(folder))[0]


def test_the_scorecard_and_the_gaps_stand_in_the_report(pages, tmp_path):
    """A row per measure and per edit, a drift curve for each; without their files there is no section."""
    text, page = read(pages["evaluate"])[:2]
    said = " ".join(" ".join(page.said).split())
    assert (
        "measure base paper <r32> in domain: accuracy, % 50.0 85.0 [70, 95] - by <sentence>" in said
    )
    assert "none – – 50.0 60.0 0.0 – – paper 4 5,128 85.0 20.0 [10.0, 35.0]" in said
    assert "12.5 [0.0, 25.0], p 0.43 0.512 [0.4, 0.6] 0.7" in said
    assert "<r32> –" in said and "gap of classes 60.0 20.0 [10.0, 35.0] change -40.0 points" in said
    drawn = re.search(r'<section id="[^"]*-fairness">.*?</section>', text, re.DOTALL)
    assert drawn is not None and drawn[0].count('<polyline class="line') == 2
    folder = evaluate_folder(tmp_path / "e")
    for name in ("scorecard.json", "fairness.csv", "fairness.json"):
        (folder / name).unlink()
    said = " ".join(read(write_report(folder))[1].said)
    assert "Scorecard" not in said and "Classes and groups" not in said


def test_the_conclusion_of_a_trace_names_its_units_and_its_doubt(tmp_path):
    effects = made_effects(6, 4, ("resid_post",))
    folder = trace_folder(tmp_path / "t", effects)
    sites = json.loads((folder / "sites.json").read_text())
    trust = {"clear": False, "honest": {"value": 0.2, "low": -0.1, "high": 0.4}, "stability": 0.5}
    (folder / "sites.json").write_text(json.dumps(sites | trust | {"warnings": ["too few"]}))
    record = json.loads((folder / "run.json").read_text())
    record["config"]["adjustment"] = "holm"
    (folder / "run.json").write_text(json.dumps(record))
    said = " ".join(" ".join(read(write_report(folder))[1].said).split())
    top = importance_of(effects).sort_values("aie").iloc[-1]
    assert (
        f"The largest average effect is {top.aie:.4g} [{top.ci_low:.4g}, {top.ci_high:.4g}] at L{top.layer}.resid_post@{top.role}"
        in said
    )
    assert "6 pairs from 6 sentences; with so few, p-values cannot get small" in said
    assert "The choice is not clear" in said.split("What was run")[1]
    assert "The choice is clear" not in said, "`sites.clear` of a template is a method of the dict"
    assert "On sentences they were not chosen on the effect is 0.2 [−0.1, 0.4]" in said
    assert "Jaccard index of 0.50" in said and "too few" in said
    cells = len(importance_of(effects))
    assert f"Resolution: 6 sentences and {cells} cells" in said and "no cell can reach 0.05" in said
    assert f"3 of {cells} tested cells have skewed effects" in said


@pytest.mark.parametrize("kind", ("trace", "evaluate", "comparison"))
def test_a_review_is_text(pages, kind):
    text, page, data = read(pages[kind])
    assert NASTY not in text, "not even inside the data"
    found = json.dumps(data)
    assert json.dumps(NASTY)[1:-1] in found, "and yet nothing of it is lost"
    assert "owned" not in "".join(page.said)


def test_names_from_files_are_escaped(tmp_path):
    folder = evaluate_folder(tmp_path / "<b>&")
    table = pd.read_csv(folder / "scores.csv")
    table.assign(system="<i>x</i>").to_csv(folder / "scores.csv", index=False)
    text, page, _ = read(write_report(folder))
    assert "<i>x" not in text and "<i>x</i>" in "".join(page.said)
    assert "<b>&" in "".join(page.said)


@given(st.text())
def test_embedded_data_survives_and_cannot_end_its_element(text):
    script = str(embedded({"a": text}))
    assert not set("<>&\u2028\u2029") & set(script)
    assert json.loads(script) == {"a": text}


def test_numbers_that_are_none_become_null():
    assert json.loads(str(embedded([float("nan"), float("inf"), 1.5, np.float64(2).item()]))) == [
        None,
        None,
        1.5,
        2.0,
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_folder_gives_the_same_bytes(pages, runs, kind, tmp_path):
    again = write_report(
        list(runs.values()) if kind == "comparison" else runs[kind], tmp_path / "again.html"
    )
    assert again.read_bytes() == pages[kind].read_bytes()


# ---- what it says ---------------------------------------------------------------------------------------------------------------


def test_what_was_run_and_why_pairs_were_dropped(pages):
    _, page, _ = read(pages["trace"])
    said = " ".join(" ".join(page.said).split())
    for fact in (
        "made-up-12l, 1,234,567 parameters", "Gaussian noise on all tokens, 3 sd, mean of 10 draws", "clean states restored", "reviews & more.jsonl",
        "2 (conflict)", "6 pairs were kept of 12 examples looked at", "clean run wrong 4", "corrupted run right 2", "L5.resid_post@query.last",
        "The choice is clear", "the engine agrees with one forward pass per cell 3.1e−07 0.0001 holds", "Chosen by a rule",
    ):  # fmt: skip
        assert fact in said, fact


def test_a_broken_self_check_is_shown(tmp_path):
    effects = made_effects(3, 2, ("resid_post",))
    effects.about["self_checks"] = {"same_onto_same": 0.5, "tolerance": 1e-4}
    said = " ".join(read(write_report(trace_folder(tmp_path / "t", effects)))[1].said)
    assert "broken" in said and "holds" not in said


def test_the_averages_are_those_of_the_table(pages, runs):
    average = read(pages["trace"])[2]["runs"][0]["average"]
    table = pd.read_csv(runs["trace"] / "importance.csv")
    found = {}
    for kind in average["kinds"]:
        for layer, head, place, aie, low, high, _p, n, chosen in kind["cells"]:
            found[kind["kind"], layer, head, kind["places"][place]] = (aie, low, high, n)
            assert bool(chosen) == (
                kind["kind"] == "resid_post"
                and layer == 5
                and kind["places"][place] == "query.last"
            )
    assert len(found) == len(table)
    for row in table.itertuples():
        assert found[row.kind, row.layer, row.head, row.role] == pytest.approx(
            (row.aie, row.ci_low, row.ci_high, row.n), rel=1e-3
        )


def decoded(entry, width):
    scale, text = entry
    whole = np.frombuffer(base64.b64decode(text), dtype=np.int8).reshape(-1, width).astype(float)
    whole[whole == NOTHING] = np.nan
    return whole * scale


def test_single_examples_are_those_of_the_effects(pages):
    effects = made_effects(6, 6, ("resid_post", "mlp_out", "head"), heads=2, text=NASTY)
    data = read(pages["trace"])[2]["runs"][0]["examples"]
    assert [e["id"] for e in data["list"]] == [f"made:{i}" for i in range(6)]
    one = data["list"][2]
    rows = effects.example("made:2")
    for k, kind in enumerate(data["kinds"]):
        mine = rows[rows["kind"] == kind]
        # Of several heads the page shows the one with the largest effect.
        mine = mine.loc[
            mine.groupby(["position", "layer"])["effect"].apply(lambda x: x.abs().idxmax())
        ]
        exact = mine.pivot(index="position", columns="layer", values="effect").to_numpy()
        drawn = decoded(one["m"][k], 6)
        assert np.abs(drawn - exact).max() <= np.abs(exact).max() / 254 * 1.001
    best = rows.loc[rows["effect"].idxmax()]
    assert (
        one["b"][1] == best["layer"]
        and one["b"][3] == best["position"]
        and one["b"][5] == pytest.approx(best["patched"], rel=1e-3)
    )
    pair = effects.pairs.iloc[2]
    assert one["pc"] == pytest.approx(pair["p_clean"], rel=1e-3) and one["px"] == pytest.approx(
        pair["p_corrupted"], rel=1e-3
    )
    assert [data["words"][t].strip() for t in one["t"]] == [t.strip() for t in pair["tokens"]]


@given(
    st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32) | st.just(float("nan")), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    )
)
def test_quantised_maps_keep_their_shape_and_size(rows):
    values = np.array(rows, dtype=float)
    back = decoded(quantised(values), 3)
    assert (np.isnan(back) == np.isnan(values)).all()
    if not np.isnan(values).all():
        limit = np.nanmax(np.abs(values))
        assert np.nanmax(np.abs(back - values)) <= limit / 254 * 1.001 + 1e-28


def test_blanks_come_back_from_the_prompt():
    assert (
        "".join(spaced(["Gi", "ven", "the", "food", ".", "'"], "Given the food. '"))
        == "Given the food. '"
    )
    assert spaced([" a", " ", "b"], " a  b") == [" a", " ", " b"]
    assert spaced(["<s>", "a", "\ufffd", "b"], "a é b") == ["<s>", "a", "\ufffd", "b"], (
        "what is not found stays as it is"
    )


def test_examples_that_a_system_got_wrong_are_kept_first(tmp_path):
    """Each row holds the answers of all systems to one example; the order is by wrong, then by file."""
    run = read_runs([evaluate_folder(tmp_path / "e", n=30)])[0]
    table = run.tables["predictions.parquet"]
    wrong = table[~table["correct"]].drop_duplicates("id")["id"]
    in_order = [i for i in table["id"].drop_duplicates() if i in set(wrong)]
    kept, total = answers(table, most=len(in_order) + 1)
    assert total == 30 and kept["systems"] == ["base", "paper"] and kept["sets"] == ["test.jsonl"]
    assert [r[1] for r in kept["rows"][:-1]] == in_order
    assert all(a[1] for a in kept["rows"][-1][5]), "the one row more is right in both"
    for row in kept["rows"]:
        for system, answer in zip(kept["systems"], row[5], strict=True):
            own = table[(table["system"] == system) & (table["id"] == row[1])].iloc[0]
            assert (answer[0], bool(answer[1]), row[4]) == (
                own["predicted"],
                own["correct"],
                own["gold"],
            )


def test_scores_and_confusions_are_printed(pages, runs):
    said = " ".join(" ".join(read(pages["evaluate"])[1].said).split())
    scores = pd.read_csv(runs["evaluate"] / "scores.csv")
    for row in scores.itertuples():
        assert f"{100 * row.accuracy:.1f} [" in said
    record = json.loads((runs["evaluate"] / "run.json").read_text())
    for row in record["scores"][0]["all"]["confusion"]:
        assert " ".join(map(str, row)) in said
    assert "3 of 40 rows of test.jsonl stand in the training data of paper" in said
    assert (
        "text · kl 0.012" in said
        and "unrelated text: KL - 0.0120 nats top-1 the same at 98.0 % of 878" in said
    )
    assert (
        "paper base test.jsonl 40 +30.0 [−10.0, +50.0] 0.001 +25.0 [+20.0, +30.0] 14 : 2 0.0042"
        in said
    )
    assert "2 edits test.jsonl 2 90.0 ± 5.0 [40.0, 100.0] 80.0 ± 10.0 [10.0, 100.0]" in said, (
        "shares end at 100"
    )


def test_the_matrix_is_that_of_the_table(pages, runs):
    text, page, _ = read(pages["matrix"])
    said = " ".join(" ".join(page.said).split())
    table = pd.read_csv(runs["matrix"] / "matrix.csv", keep_default_na=False)
    for (method, train, test), rows in table.groupby(["method", "train", "test"]):
        seeds = (100 * rows["accuracy"]).tolist()
        spread = f" ± {abs(seeds[0] - seeds[1]) / 2**0.5:.1f}" if len(seeds) > 1 else ""
        told = f"{method}, {f'trained on {train}' if train else 'untrained'}, tested on {test}: {', '.join(f'{x:.1f}' for x in seeds)}"
        where = text.index(f'title="{html.escape(told)}"')
        assert f">{sum(seeds) / len(seeds):.1f}<small>{spread}</small>" in text[where : where + 400]
    assert text.count('class="n own"') == 4, "the same domain in both, for each of two methods"
    means = table.groupby(["method", "train", "test"])["accuracy"].mean()
    assert text.count('style="--v:1.000') == int((means == means.max()).sum()), "one scale for all"
    short = pd.read_csv(runs["matrix"] / "summary.csv")
    for row in short.itertuples():
        assert f"{row.method} {row.trainable:,}" in said and f"{100 * row.accuracy_in:.1f}" in said
    assert "rest: 4 of 100 rows of x_test.jsonl" in said and "majority 60.0 60.0" in said
    assert "nearest <opinion> 71.0 62.0 53.0 44.0" in said


def test_a_page_that_cannot_be_made_loses_no_run(tmp_path, capsys):
    folder = train_folder(tmp_path / "t")
    kept = (folder / "edit.json").read_text()
    (folder / "history.csv").write_bytes(b"\xff\xfe\x00")
    assert leave_report(folder) is None
    said = capsys.readouterr().err
    assert "report.html could not be written (DataError" in said and said.count("\n") == 1
    assert (folder / "edit.json").read_text() == kept and not (folder / "report.html").exists()
    (folder / "history.csv").unlink()
    assert leave_report(folder) == folder / "report.html"


@pytest.mark.parametrize("rows", fast([7, 100], [100]))
def test_effects_that_are_read_in_parts_give_the_same_page(runs, monkeypatch, rows):
    (run,) = read_runs([runs["trace"]])
    whole = maps.examples(run)
    monkeypatch.setattr(records, "CHUNK", rows)
    (run,) = read_runs([runs["trace"]])
    assert maps.examples(run) == whole and run.effects is not None
    assert max(map(len, run.effects.of_pairs(run.tables["pairs.parquet"]["example_id"]))) < len(run.effects)  # fmt: skip
    few = maps.examples(run, budget=2_000)  # a sample of the pairs
    kept = {e["id"]: e for e in whole["list"]}
    assert 0 < len(few["list"]) < len(kept)
    assert all(e["m"] == kept[e["id"]]["m"] and e["b"] == kept[e["id"]]["b"] for e in few["list"])


@pytest.mark.parametrize(
    ("kind", "file", "spoil", "words"),
    [
        ("trace", "effects.parquet", lambda t: t.drop(columns="role"), "effects.parquet is damaged"),
        ("trace", "effects.parquet", lambda t: t.assign(layer="two"), "layer holds other values"),
        ("trace", "importance.csv", lambda t: t.assign(layer=-1), "layer holds other values"),
        ("trace", "importance.csv", lambda t: t.drop(columns="n"), "it has no column n"),
        ("trace", "pairs.parquet", lambda t: t.assign(roles="answer"), "roles holds other values"),
        ("trace", "pairs.parquet", lambda t: t.assign(roles=[["verb"]] * len(t)), "do not describe"),
        ("evaluate", "scores.csv", lambda t: t.assign(accuracy="good"), "accuracy holds other values"),
        ("evaluate", "predictions.parquet", lambda t: t.assign(correct=1.5), "correct holds other"),
        ("matrix", "summary.csv", lambda t: t.drop(columns="method"), "it has no column method"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_one_sentence(runs, tmp_path, kind, file, spoil, words):
    folder = shutil.copytree(runs[kind], tmp_path / "run")
    path = folder / file
    csv = path.suffix == ".csv"
    table = spoil(pd.read_csv(path) if csv else pd.read_parquet(path))
    table.to_csv(path, index=False) if csv else table.to_parquet(path, index=False)
    with pytest.raises(DataError, match=words) as caught:
        write_report(folder, tmp_path / "page.html")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1, "a": 2}', "[" * 9999])
def test_a_damaged_json_file_is_one_sentence(runs, tmp_path, text):
    folder = shutil.copytree(runs["trace"], tmp_path / "run")
    (folder / "about.json").write_text(text)
    with pytest.raises(DataError, match=r"about\.json(:1)? is damaged"):
        write_report(folder)


def test_a_comparison_sets_runs_side_by_side(pages, runs):
    text, page, data = read(pages["comparison"])
    said = " ".join(" ".join(page.said).split())
    assert len(data["runs"]) == 6 and "Comparison of 6 runs" in said
    a, b = (pd.read_csv(runs[k] / "importance.csv") for k in ("trace", "trace2"))
    both = a.merge(b, on=["kind", "layer", "head", "role"])
    rho = both["aie_x"].rank().corr(both["aie_y"].rank())
    assert f"ρ = {rho:.3g}" in said and f"over {len(both)} cells" in said
    assert text.count("data-compare") == 2, "the place, and the script that fills it"
    assert "Side effects" in said and "selected sites L5.resid_post@query.last" in said


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [train_folder(tmp_path / seed / "edit") for seed in ("seed0", "seed1")]
    page = write_report(folders)
    assert page == folders[0] / "comparison.html"
    assert "seed0/edit" in page.read_text(encoding="utf-8") and "seed1/edit" in page.read_text(
        encoding="utf-8"
    )


# ---- size -----------------------------------------------------------------------------------------------------------------------


def thousand(folder: Path, layers: int) -> Path:
    """A trace of 1,000 prompts: the effects of ten, and nine hundred and ninety namesakes."""
    few = made_effects(10, layers)
    frames, pairs = [], []
    for i in range(100):
        frames.append(few.frame.assign(example_id=few.frame["example_id"] + f":{i}"))
        pairs.append(few.pairs.assign(example_id=few.pairs["example_id"] + f":{i}"))
    whole = type(few)(
        pd.concat(frames, ignore_index=True), pd.concat(pairs, ignore_index=True), few.about
    )
    whole.save(folder)
    importance_of(made_effects(4, layers)).to_csv(folder / "importance.csv", index=False)
    return folder


@pytest.mark.slow
def test_a_thousand_examples_stay_small(tmp_path):
    page = write_report(thousand(tmp_path / "t", 12))
    assert page.stat().st_size < 15 << 20
    _, parsed, data = read(page)
    assert len(data["runs"][0]["examples"]["list"]) == 1000 and "drawn at random" not in "".join(
        parsed.said
    )


def test_too_many_examples_are_sampled_and_the_page_says_so(tmp_path, monkeypatch):
    from mech_absa.report import maps

    monkeypatch.setattr(maps, "BUDGET", 10_000)
    folder = trace_folder(tmp_path / "t", made_effects(12, 12))
    _, page, data = read(write_report(folder))
    kept = len(data["runs"][0]["examples"]["list"])
    assert 1 <= kept < 12 and f"{kept} of 12 pairs are in this page, drawn at random" in "".join(
        page.said
    )
    assert (
        sum(
            len(base64.b64decode(m[1])) for e in data["runs"][0]["examples"]["list"] for m in e["m"]
        )
        <= 10_000
    )


# ---- what can be missing --------------------------------------------------------------------------------------------------------


def test_a_run_without_its_extras_has_a_page(tmp_path):
    folder = trace_folder(tmp_path / "t", made_effects(3, 2, ("attn_out",)))
    for name in ("run.json", "sites.json"):
        (folder / name).unlink()
    _, page, _ = read(write_report(folder))
    assert "Selected sites" not in "".join(page.said)
    edit = train_folder(tmp_path / "e")
    for name in ("run.json", "history.csv"):
        (edit / name).unlink()
    assert "loreft" in "".join(read(write_report(edit))[1].said)


def test_only_heads_were_traced(tmp_path):
    folder = trace_folder(tmp_path / "t", made_effects(3, 2, ("head",), heads=2), sites=())
    assert "head of the layer" in "".join(read(write_report(folder))[1].said)


def test_no_run_no_page(tmp_path, capsys):
    with pytest.raises(DataError, match=r"effects\.parquet, edit\.json, scores\.csv"):
        write_report(tmp_path)
    folder = trace_folder(tmp_path / "t", made_effects(3, 2, ("attn_out",)))
    (folder / "about.json").write_text("{")
    assert cli([str(folder)]) == 2
    assert "about.json:1 is damaged" in (said := capsys.readouterr().err) and said.count("\n") == 1
    (folder / "about.json").unlink()
    assert cli([str(folder)]) == 2 and "only part of a trace run" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
    assert cli([str(tmp_path / "nowhere")]) == 2 and "there is no folder" in capsys.readouterr().err


def test_the_command_writes_where_it_is_told(runs, tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert cli([str(runs["train"]), "--out", str(out)]) == 0
    path, conclusion = capsys.readouterr().out.splitlines()
    assert path.startswith(str(out)) and out.is_file()
    assert conclusion == "Wrote one run as one page; open it in a browser, it needs no network."


# ---- charts ---------------------------------------------------------------------------------------------------------------------


def test_a_page_never_takes_the_place_of_a_record(tmp_path, capsys):
    folder = train_folder(tmp_path / "t")
    record = (folder / "run.json").read_bytes()
    assert cli([str(folder), "--out", str(folder / "run.json")]) == 2
    assert "is no page; a file that ends in .html is needed" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == record


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 4, 7, whole=True) == [0, 1, 2, 3, 4]
    assert ticks(-0.3, 0.52, 4) == [-0.2, 0, 0.2, 0.4] or set(ticks(-0.3, 0.52, 4)) == {0, 0.5}


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 12))
def test_ticks_stay_in_range(low, width, n):
    found = ticks(low, low + width, n)
    slack = 1e-6 * max(abs(low), width)
    assert all(low - slack <= t <= low + width + slack for t in found) and len(found) <= n + 2


def test_panels_share_one_scale_and_shares_end_at_one():
    """The axis holds all curves of all panels and 0; an accuracy has no room above 1."""
    a, b = Line("a", [0, 1], [0.2, 0.4]), Line("b", [0, 1], [-0.5, 1.5])
    low, high = y_range([a, b])
    assert low == pytest.approx(-0.5 - 0.04 * 2.0) and high == pytest.approx(1.5 + 0.04 * 2.0)
    assert y_range([Line("accuracy", [0, 1], [0.9, 1.0])], zero=False, most=1.0)[1] == 1.0
    assert y_range([Line("none", [0], [None])]) is None


def test_interval_rows_stand_where_their_values_are():
    """The axis runs from 3 below the least end to 100: 60 is at (60 - 37) / 63 of the track."""
    text = str(interval_chart([("<a>", 60.0, 40.0, 98.0)], "accuracy (%)", [50.0]))
    assert "&lt;a&gt;" in text and "<a>" not in text and "60.0 [40.0, 98.0]" in text
    assert (
        f'<b style="left:{100 * 23 / 63:.2f}%"' in text
        and f'<u style="left:{100 * 13 / 63:.2f}%"' in text
    )
    assert f'<i style="left:{100 * 3 / 63:.2f}%;right:calc(100% - {100 * 61 / 63:.2f}%)"' in text


def test_a_chart_says_its_numbers():
    svg = str(
        line_chart(
            [Line("<r>", [0, 1, 2], [0.0, None, 1.0], [-0.5, None, 0.5], [0.5, None, 1.5])],
            "layer",
            "AIE",
        )
    )
    assert "&lt;r&gt;, layer 2: 1 [0.5, 1.5]" in svg and svg.count("<circle") == 2
    assert not str(line_chart([Line("x", [0], [None])], "layer", "AIE"))
