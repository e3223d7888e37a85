"""What a notebook shows of a result: the numbers that the object holds, and texts as text."""

from __future__ import annotations

import json
import re
from html import unescape

import pandas as pd
import pytest
import torch
from support.tiny_models import tiny_folder

import mech_absa as ma
from mech_absa.edits.base import Part
from mech_absa.edits.edit import Edit
from mech_absa.evaluate.predictions import Predictions
from mech_absa.evaluate.scores import score
from mech_absa.examples import Example, Polarity
from mech_absa.model import Model, load_model
from mech_absa.patch.effects import COLUMNS, Effects
from mech_absa.patch.selection import Selection
from mech_absa.stats import Estimate

NASTY = "<script>alert('1')</script> & co"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(str(tiny_folder("gpt2")))


@pytest.fixture
def example() -> Example:
    other = Example(f"{NASTY} food is y", "food", Polarity.NEGATIVE, (33, 37), id="other")
    away = Example(
        f"{NASTY} food is y and more", "food", Polarity.NEGATIVE, (33, 37), id="does not line up"
    )
    assert len(NASTY) == 32
    return Example(
        f"{NASTY} food is g",
        "food",
        Polarity.POSITIVE,
        (33, 37),
        id="<a>",
        counterfactuals=(away, other),
    )


def tables(html: str) -> list[list[list[str]]]:
    """Every table as rows of cells, markup taken out."""
    bare = lambda cell: unescape(re.sub(r"<[^>]*>", "", cell)).strip()  # noqa: E731
    rows = lambda table: re.findall(r"<tr.*?>(.*?)</tr>", table, re.S)  # noqa: E731
    cells = lambda row: [bare(c) for c in re.findall(r"<t[dh]\b.*?>(.*?)</t[dh]>", row, re.S)]  # noqa: E731
    return [[cells(r) for r in rows(t)] for t in re.findall(r"<table.*?>(.*?)</table>", html, re.S)]


def frame(table: list[list[str]]) -> pd.DataFrame:
    return pd.DataFrame(table[1:], columns=table[0])


def escaped(html: str) -> bool:
    return "<script" not in html and "&lt;script&gt;" in html


def test_example(example):
    html = example._repr_html_()
    assert escaped(html) and "&amp; co <b><u>food</u></b> is g" in html
    assert "<code>food</code>: <b>positive</b>" in html and "&lt;a&gt;" in html


def test_pair_shows_the_counterfactual_that_was_taken_and_both_runs(model, example):
    pairs = ma.make_pairs(model, [example], ma.Counterfactual(), keep="all")
    html = pairs[0]._repr_html_()
    assert escaped(html) and "is y" in html and "and more" not in html, (
        "the first counterfactual does not line up and was not run"
    )
    clean, corrupted = (
        ", ".join(f"{p:.3f}" for p in s.double().exp().flatten().tolist())
        for s in (pairs[0].clean_scores, pairs[0].corrupted_scores)
    )
    assert f"clean {clean}; corrupted {corrupted}<" in html

    whole = pairs._repr_html_()
    assert (
        escaped(whole)
        and "<b>1 pairs</b> of 1 examples, Counterfactual()" in whole
        and "none dropped" in whole
        and html in whole
    )


def test_pairs_say_what_was_dropped_and_how_many_are_not_shown(model, example):
    bare = Example("the food is fun", "food", Polarity.POSITIVE, (4, 8), id="b")
    html = ma.make_pairs(
        model, [example] * 5 + [bare] * 2, ma.Counterfactual(), keep="all"
    )._repr_html_()
    assert (
        "<b>5 pairs</b> of 7 examples" in html
        and "2 dropped: no counterfactual" in html
        and "2 more" in html
    )


def test_pair_of_noise_shows_the_mean_over_draws(model, example):
    pair = ma.make_pairs(model, [example], ma.GaussianNoise(scale=1.0, draws=3), keep="all")[0]
    mean = pair.corrupted_scores.double().exp().mean(0).tolist()
    assert (
        f"corrupted {mean[0]:.3f}, {mean[1]:.3f}, {mean[2]:.3f} (mean of 3 draws)"
        in pair._repr_html_()
    )


def test_pair_of_an_ablation_has_one_run(model, example):
    html = ma.make_pairs(model, [example], ma.MeanAblation(), keep="all")[0]._repr_html_()
    assert "clean 0." in html and "corrupted" not in html


@pytest.fixture
def effects() -> Effects:
    """Two pairs of different sentences; `answer` gains 0.5 and 0.7, `before` nothing."""
    rows = [
        (i, "resid_post", 0, -1, -1, role, 0.9, 0.1, 0.1 + e, e, 0.0)
        for i, a in (("p", 0.5), ("q", 0.7))
        for role, e in (("before", 0.0), ("answer", a))
    ]
    pairs = pd.DataFrame(
        {
            "example_id": ["p", "q"], "cluster": ["one", "two"], "clean": 0.9, "corrupted": 0.1, "sentence": NASTY, "aspect": "co",
            "polarity": "positive", "tokens": [[NASTY, " co", " ?"]] * 2, "roles": [["before", "before", "answer"]] * 2,
            "labels": [["positive", "negative"]] * 2, "p_clean": [[0.9, 0.1]] * 2, "p_corrupted": [[0.1, 0.9]] * 2,
            "corrupted_tokens": None,
        }
    )  # fmt: skip
    return Effects(
        pd.DataFrame(rows, columns=list(COLUMNS)), pairs, {"method": NASTY, "direction": "denoise"}
    )


def embedded_data(html: str) -> dict:
    """The data of the page inside the frame."""
    page = unescape(re.search(r'srcdoc="(.*?)"', html, re.S)[1])
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])["runs"][0]


def test_effects_and_their_map_are_interactive_and_hold_the_largest_cells(effects):
    """The map of the page and the table below it give 0.6 [0.5, 0.7] at the answer; a hostile text stays text."""
    for shown in (effects, effects.importance()):
        html = shown._repr_html_()
        table = frame(tables(html)[-1])
        assert table["site"].tolist() == ["L0.resid_post@answer", "L0.resid_post@before"]
        assert table["AIE"].tolist() == ["0.6 [0.5, 0.7]", "0 [0, 0]"]
        assert table["pairs"].tolist() == ["2", "2"]
        (kind,) = embedded_data(html)["average"]["kinds"]
        cells = {kind["places"][c[2]]: c[3:6] for c in kind["cells"]}
        assert cells == {"answer": [0.6, 0.5, 0.7], "before": [0.0, 0.0, 0.0]}
        assert "allow-same-origin" not in html and 'sandbox="allow-scripts allow-downloads"' in html
    html = effects._repr_html_()
    assert "<script" not in html and "2 pairs, 4 cells" in html
    assert NASTY not in unescape(re.search(r'srcdoc="(.*?)"', html, re.S)[1])
    (first, _) = embedded_data(html)["examples"]["list"]
    assert first["s"] == NASTY and first["pc"] == [0.9, 0.1]


def test_a_selection_shows_its_sites_and_its_verdict():
    sites = (ma.Site.parse("L3.resid_post@query.last"),)
    numbers = {"aie": 0.25, "ci_low": 0.125, "ci_high": 0.5, "control_high": 0.3, "n": 12}
    trust = {"honest": Estimate(0.2, 0.1, 0.3), "stability": 0.75, "warnings": ("few & rough",)}
    html = Selection(sites, rule="<rule>", clear=False, **numbers, **trust)._repr_html_()
    assert "not chosen on: 0.2 [0.1, 0.3]" in html and "bootstrap samples: 0.75" in html
    assert "few &amp; rough" in html
    assert "<code>L3.resid_post@query.last</code>" in html and "&lt;rule&gt;" in html
    assert "<b>0.25</b> [0.125, 0.5] over 12 pairs" in html and "not clear" in html
    assert "<iframe" not in html, "a choice that was read from a file has no map"


def test_a_selection_shows_the_map_it_was_chosen_from(effects, tmp_path):
    chosen = effects.importance().select(roles=("answer",), width=1)
    html = chosen._repr_html_()
    (kind,) = embedded_data(html)["average"]["kinds"]
    framed = [kind["places"][c[2]] for c in kind["cells"] if c[-1] == 1]
    assert framed == ["answer"] and "<code>L0.resid_post@answer</code>" in html
    chosen.save(tmp_path / "sites.json")
    assert "importance" not in json.loads((tmp_path / "sites.json").read_text())


def test_edit_lists_its_parts_with_sizes_that_add_up(model):
    parts = [
        Part("lora", f"L{i}.W_O", {"rank": 2, "alpha": 4.0}, 1e-3) for i in range(model.n_layers)
    ]
    parts.append(Part("loreft", "L1.resid_post@query.last", {"rank": 2}, 1e-2))
    edit = Edit.fresh(model, parts)
    table = frame(tables(edit._repr_html_())[0])
    assert table["family"].tolist() == ["lora", "loreft"], (
        "parts that differ in their place alone share a row"
    )
    assert table["at"].tolist() == [
        ", ".join(f"L{i}.W_O" for i in range(model.n_layers)),
        "L1.resid_post@query.last",
    ]
    assert table["options"].tolist() == ["rank 2, alpha 4.0", "rank 2"] and table[
        "rate"
    ].tolist() == ["0.001", "0.01"]
    d = model.d_model
    assert table["parameters"].tolist() == [
        f"{model.n_layers * 2 * (d + d):,}",
        f"{2 * d + 2 * d + 2:,}",
    ], "A and B; R, W and b"
    assert (
        f"{edit.n_parameters:,} parameters, {100 * edit.share:.3g} % of all" in edit._repr_html_()
        and "not trained" in edit._repr_html_()
    )


def test_edit_says_how_it_was_trained_and_escapes(model):
    edit = Edit.fresh(model, [Part("bitfit", "L0.W_O", {}, 1e-3)]).with_record(
        examples=58, steps=12, seed=3, best_validation_loss=0.41939, stopped=NASTY
    )
    edit.base = NASTY
    html = edit._repr_html_()
    assert escaped(html) and html.count("<script") == 0
    assert "trained on examples: 58; steps: 12; seed: 3; loss on validation examples: 0.419" in html


def test_scores_show_accuracy_classes_and_confusion():
    asked = [
        Example(f"{i} food", "food", p, (2, 6))
        for i, p in enumerate([Polarity.POSITIVE] * 3 + [Polarity.NEGATIVE])
    ]
    answers = (Polarity.POSITIVE, Polarity.POSITIVE, Polarity.NEGATIVE, None)
    html = score(Predictions(tuple(asked), answers, NASTY, "<i>"), draws=50)._repr_html_()
    assert escaped(html) and "<i>" not in html
    summary, classes, confusion = tables(html)
    shown = frame(summary).iloc[0]
    assert shown["accuracy %"].startswith("50.0 [") and (shown["n"], shown["no label"]) == (
        "4",
        "1",
    )
    of = frame(classes).set_index("label").loc["positive"]
    assert of.tolist() == ["1.000", "0.667", "0.800", "3", "2"], (
        "precision, recall, F1, support, answered"
    )
    assert [row[-4:] for row in confusion[-3:]] == [
        ["2", "1", "0", "0"],
        ["0", "0", "0", "1"],
        ["0", "0", "0", "0"],
    ]


def test_a_repr_leaves_no_gradient_behind(model):
    edit = Edit.fresh(model, [Part("bitfit", "L0.W_O", {}, 1e-3)])
    edit._repr_html_()
    assert all(p.grad is None for p in edit.parameters()) and torch.is_grad_enabled()
