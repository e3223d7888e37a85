"""Averages over pairs and the choice of sites, against pandas and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mech_absa.commands.before import of_the_map
from mech_absa.errors import ConfigError, DataError, SiteError
from mech_absa.patch.directions import BothDirections
from mech_absa.patch.effects import Effects
from mech_absa.patch.importance import ImportanceMap, load_sites
from mech_absa.sites import ROLES, in_reading_order

LAYERS = 6


def effects(
    n: int = 24,
    strength: dict[tuple[int, str], float] | None = None,
    seed: int = 0,
    about: dict | None = None,
) -> Effects:
    """Pairs of two tokens a role, with a known mean effect in some cells and noise everywhere."""
    rng = np.random.default_rng(seed)
    roles = ("template", "before", "opinion", "query.last", "answer")
    rows, pairs = [], []
    for i in range(n):
        for layer in range(LAYERS):
            for position, role in enumerate(r for r in roles for _ in range(2)):
                value = (strength or {}).get((layer, role), 0.0) + rng.normal(0, 0.02)
                rows.append(
                    (
                        f"e{i}",
                        "resid_post",
                        layer,
                        -1,
                        position,
                        role,
                        0.9,
                        0.1,
                        0.1 + value,
                        value,
                        0.0,
                    )
                )
        words = ("Good food", "food", "positive", ["food"], ["answer"], ["good"], [0.9])
        pairs.append((f"e{i}", *words, f"s{i // 2}", 0.9, 0.1))
    frame = pd.DataFrame(
        rows,
        columns=[
            "example_id",
            "kind",
            "layer",
            "head",
            "position",
            "role",
            "clean",
            "corrupted",
            "patched",
            "effect",
            "draw_sd",
        ],
    )
    return Effects(
        frame,
        pd.DataFrame(pairs, columns=PAIR),
        KNOWN | about if about else {},
    )


KNOWN = {
    "model": "made", "n_layers": LAYERS, "n_heads": 1, "corruption": "Counterfactual", "direction": "denoise", "metric": "prob",
    "unit": "probability", "method": "exact", "by": "token",
}  # fmt: skip
"""What `about.json` must hold."""
PAIR = [
    "example_id", "sentence", "aspect", "polarity", "tokens", "roles", "labels", "p_clean", "cluster", "clean", "corrupted",
]  # fmt: skip
"""What `pairs.parquet` must hold."""


def test_roles_are_averaged_within_a_pair_first():
    found = effects(3)
    lopsided = found.frame[~((found.frame["example_id"] == "e0") & (found.frame["position"] == 0))]
    values, cells = Effects(lopsided, found.pairs).matrix("role")
    column = cells.index[(cells["layer"] == 0) & (cells["role"] == "template")][0]
    mine = lopsided[(lopsided["layer"] == 0) & (lopsided["role"] == "template")]
    by_hand = [mine[mine["example_id"] == e]["effect"].mean() for e in ("e0", "e1", "e2")]
    assert values[:, column] == pytest.approx(by_hand)
    # e0 has one token of the role and e1 two; each pair still counts once.
    assert values[:, column].mean() != pytest.approx(mine["effect"].mean(), abs=1e-12)


def test_a_missing_role_is_missing_and_not_zero():
    found = effects(4)
    frame = found.frame[~((found.frame["example_id"] == "e1") & (found.frame["role"] == "opinion"))]
    table = Effects(frame, found.pairs).importance(draws=50).table
    opinion = table[table["role"] == "opinion"]
    assert (opinion["n"] == 3).all() and (table[table["role"] == "before"]["n"] == 4).all()
    mean = (
        frame[(frame["role"] == "opinion") & (frame["layer"] == 2)]
        .groupby("example_id")["effect"]
        .mean()
        .mean()
    )
    assert opinion[opinion["layer"] == 2]["aie"].iloc[0] == pytest.approx(mean)


def test_roles_come_in_reading_order():
    table = effects(2).importance(draws=20).table
    seen = list(dict.fromkeys(table["role"]))
    assert seen == [r for r in ROLES if r in seen]


def test_total_effect():
    assert effects(2).total.to_dict() == pytest.approx({"e0": 0.8, "e1": 0.8})


def test_p_values_of_true_effects_survive_the_adjustment_and_others_do_not():
    table = effects(strength={(3, "query.last"): 0.3}).importance().table
    true = (table["layer"] == 3) & (table["role"] == "query.last")
    assert table[true]["p_adjusted"].iloc[0] <= 0.05
    assert (table[~true]["p_adjusted"] > 0.05).all()
    assert (table["p_adjusted"] >= table["p"]).all()


def test_skewed_cells_are_counted_and_named():
    """One pair of twelve carries all of a cell's effect; the others of the map are normal or 0."""
    traced = effects(12)
    alone = (traced.frame["role"] == "opinion") & (traced.frame["layer"] == 2)
    value = np.where(traced.frame["example_id"] == "e3", 1.0, 0.0)
    frame = traced.frame.assign(effect=np.where(alone, value, traced.frame["effect"]))
    frame.loc[frame["role"] == "before", "effect"] = 0.0
    about = replace(traced, frame=frame).importance(draws=50).about
    normal_ones = effects(12).importance(draws=50).about["skewed_cells"]
    assert about["tested_cells"] == 4 * LAYERS and 1 <= about["skewed_cells"] <= normal_ones + 1
    (note,) = of_the_map(about)
    assert note.startswith(f"{about['skewed_cells']} of {4 * LAYERS} cells have skewed effects")
    assert of_the_map({"skewed_cells": 0, "tested_cells": 9}) == []
    assert of_the_map(about | {"adjustment": "bootstrap"}) == []  # it assumes no symmetry


def test_zero_cells_are_no_hypotheses():
    found = effects(strength={(3, "query.last"): 0.3})
    frame = found.frame.copy()
    frame.loc[frame["layer"] == 5, "effect"] = 0.0
    table = Effects(frame, found.pairs).importance().table
    assert (
        table[table["layer"] == 5]["p"].isna().all()
        and table[table["layer"] != 5]["p"].notna().all()
    )


def test_select_finds_the_window_and_the_role():
    strong = {
        (2, "query.last"): 0.3,
        (3, "query.last"): 0.2,
        (4, "query.last"): 0.1,
        (0, "answer"): 0.9,
        (5, "answer"): 0.9,
    }
    importance = effects(strength=strong).importance(draws=200)
    chosen = importance.select(width=2)
    assert [str(s) for s in chosen] == ["L2.resid_post@query.last", "L3.resid_post@query.last"]
    assert (
        chosen.clear
        and chosen.aie == pytest.approx(0.25, abs=0.02)
        and chosen.ci_low > chosen.control_high
    )
    # `answer` is larger, and is chosen when it is asked for.
    assert str(importance.select(width=1, roles=["answer"])[0]).endswith("@answer")
    # Default width: the paper's 6 of 32 layers.
    assert len(importance.select()) == 1


def test_select_leaves_out_the_roles_that_a_counterfactual_changes():
    strong = {(0, "opinion"): 0.8, (3, "query.last"): 0.3}
    assert (
        str(effects(strength=strong).importance(draws=100).select()[0]) == "L0.resid_post@opinion"
    )
    chosen = (
        effects(strength=strong, about={"changed_roles": ["opinion"]})
        .importance(draws=100)
        .select()
    )
    assert (
        str(chosen[0]) == "L3.resid_post@query.last" and "opinion, answer left out" in chosen.rule
    )


def test_select_says_when_nothing_stands_out():
    chosen = effects(seed=3).importance(draws=200).select()
    flat = (
        effects(strength={(layer, "template"): 0.5 for layer in range(LAYERS)})
        .importance(draws=200)
        .select()
    )
    assert not flat.clear and "not clear" in str(flat)
    assert chosen.aie < 0.05


def test_select_refuses_what_is_not_there():
    importance = effects(2).importance(draws=20)
    with pytest.raises(ConfigError, match=r"attn_out.*resid_post"):
        importance.select("attn_out")
    with pytest.raises(ConfigError, match="window of 9 layers"):
        importance.select(width=9)
    with pytest.raises(DataError, match="no role is left"):
        importance.select(roles=["aspect.last"])


def test_sites_and_map_survive_the_file(tmp_path):
    importance = effects(strength={(3, "query.last"): 0.3}).importance(draws=100)
    chosen = importance.select(width=2)
    chosen.save(tmp_path / "sites.json")
    assert load_sites(tmp_path / "sites.json") == list(chosen)
    assert json.loads((tmp_path / "sites.json").read_text())["rule"] == chosen.rule
    importance.save(tmp_path / "importance.csv")
    again = pd.read_csv(tmp_path / "importance.csv")
    assert again["aie"].to_numpy() == pytest.approx(importance.table["aie"].to_numpy(), rel=1e-6)
    (tmp_path / "bad.json").write_text("[1, 2")
    with pytest.raises(SiteError, match=r"bad\.json: not JSON; the sites\.json of a traced run"):
        load_sites(tmp_path / "bad.json")


def test_no_head_is_na_in_tables_and_minus_one_in_files(tmp_path):
    found = effects(3, strength={(3, "query.last"): 0.3}, about={"kept": 3})
    assert found.frame["head"].isna().all() and found.frame["position"].notna().all()
    importance = found.importance(draws=50)
    assert importance.table["head"].isna().all()
    found.save(tmp_path)
    importance.save(tmp_path / "importance.csv")
    written = pd.read_parquet(tmp_path / "effects.parquet")
    assert (written["head"] == -1).all() and str(written["head"].dtype) == "int16"
    assert (pd.read_csv(tmp_path / "importance.csv")["head"] == -1).all()
    again = type(found).load(tmp_path)
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert ImportanceMap.load(tmp_path).table["head"].isna().all()


def test_xarray_and_grid_agree_with_the_table():
    importance = effects(4, strength={(3, "query.last"): 0.3}).importance(draws=50)
    row = importance.table[
        (importance.table["layer"] == 3) & (importance.table["role"] == "query.last")
    ].iloc[0]
    assert (
        float(
            importance.to_xarray()["aie"].sel(
                kind="resid_post", layer=3, head=-1, role="query.last"
            )
        )
        == row["aie"]
    )
    assert importance.grid("resid_post").loc["query.last", 3] == row["aie"]
    roles = importance.to_xarray()["role"].values.tolist()
    assert roles == list(importance.grid("resid_post").index) != sorted(roles)


def test_effects_as_an_array_match_the_matrix():
    found = effects(3)
    values, cells = found.matrix("role")
    array = found.to_xarray()
    for column, cell in cells.iterrows():
        at = {n: cell[n] for n in ("kind", "layer", "role")}
        mine = array.sel(**at, head=-1)
        assert mine.to_numpy() == pytest.approx(values[:, column])
    roles = array["role"].values.tolist()
    assert roles == in_reading_order(roles) != sorted(roles)


def test_of_is_deterministic():
    a, b = (ImportanceMap.of(effects(8), draws=100, seed=1).table for _ in range(2))
    pd.testing.assert_frame_equal(a, b)


def test_an_excerpt_has_no_averages(tmp_path):
    """One pair beside an about.json of two hundred used to give a map with n = 1."""
    effects(2, about={"kept": 200}).save(tmp_path)
    part = Effects.load(tmp_path)
    assert part.about["excerpt_of"] == 200 and len(part.pairs) == 2
    with pytest.raises(DataError, match="an excerpt: 2 of 200 pairs"):
        part.importance()
    effects(2, about={"kept": 2}).save(tmp_path / "whole")
    assert Effects.load(tmp_path / "whole").importance(draws=20).table["n"].max() == 2


def test_a_map_is_loaded_from_its_run_with_the_effects_behind_it(tmp_path):
    """From the folder sites can be chosen; from the table alone, or from an excerpt, they cannot."""
    traced = effects(12, {(2, "query.last"): 0.5}, about={"kept": 12})
    made = traced.importance(draws=50)
    with pytest.raises(DataError, match="holds no map"):
        ImportanceMap.load(tmp_path)
    made.save(tmp_path / "importance.csv")
    alone = ImportanceMap.load(tmp_path)
    assert alone.values.size == 0 and len(alone.table) == len(made.table)
    with pytest.raises(DataError, match="loaded without the effects"):
        alone.select()
    traced.save(tmp_path)
    for path in (tmp_path, tmp_path / "importance.csv"):
        whole = ImportanceMap.load(path)
        np.testing.assert_allclose(whole.table["aie"], made.table["aie"], rtol=1e-7)
        np.testing.assert_allclose(whole.values, made.values)
        assert whole.select(width=1).sites == made.select(width=1).sites
    replace(traced, about=traced.about | {"kept": 200}).save(tmp_path)
    assert ImportanceMap.load(tmp_path).values.size == 0


def test_both_directions_by_hand():
    """INT = TIE - PIE, cell by cell; the mean lies half way."""
    pie = effects(4, seed=1, about={"direction": "denoise", "metric": "prob"})
    tie = effects(4, seed=2, about={"direction": "noise", "metric": "prob"})
    both = BothDirections(pie, tie)
    a, b = pie.frame["effect"].to_numpy(), tie.frame["effect"].to_numpy()
    np.testing.assert_array_equal(both.interaction.frame["effect"], b - a)
    np.testing.assert_array_equal(both.mean.frame["effect"], (a + b) / 2)
    table = both.interaction.importance(draws=20).table
    apart = tie.importance(draws=20).table["aie"] - pie.importance(draws=20).table["aie"]
    np.testing.assert_allclose(table["aie"], apart, atol=1e-15)
    written = both.table(draws=20)
    assert list(written.columns[:8]) == [
        "kind", "layer", "head", "role", "pie", "tie", "interaction", "ci_low",
    ]  # fmt: skip
    np.testing.assert_allclose(written["tie"] - written["pie"], apart, atol=1e-15)
    np.testing.assert_array_equal(written["interaction"], table["aie"])
    by_rule = [both.by_rule(rule).frame["effect"].iloc[0] for rule in ("pie", "tie", "mean")]
    assert by_rule == [a[0], b[0], (a[0] + b[0]) / 2]
    with pytest.raises(ConfigError, match="unknown rule 'int'; accepted: mean, pie or tie"):
        both.by_rule("int")
    with pytest.raises(ConfigError, match="accepted: denoise, then noise"):
        BothDirections(tie, pie)
    with pytest.raises(ConfigError, match="other cells"):
        BothDirections(pie, effects(3, about={"direction": "noise", "metric": "prob"}))
