"""The figures' tables against numbers worked by hand, the paper's against one another, and everything rebuilt from the kept results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro
from support import fast

from mech_absa.errors import ConfigError, DataError, MechAbsaError
from mech_absa.patch.effects import COLUMNS, Effects
from mech_absa.sites import Site

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "figures" / "make.py").exists():
    pytest.skip("the figures are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from figures import (  # noqa: E402
    builtin,
    circuit,
    editing,
    interaction,
    keep,
    make,
    methods,
    plan,
    reproduce,
    selectors,
    smollm2,
    tables,
)
from figures.study import Study  # noqa: E402

RESULTS = ROOT / "figures" / "results"
kept = pytest.mark.skipif(
    not (RESULTS / "trace_counterfactual" / "run.json").exists(),
    reason="no results are kept yet: make reproduce",
)


def rows(*given: tuple, **constant) -> pd.DataFrame:
    """(method, train, test, seed, accuracy) as a matrix.csv has them."""
    table = pd.DataFrame(given, columns=["method", "train", "test", "seed", "accuracy"])
    where = table["method"].str.partition("@")
    extra = {
        "in_domain": (table["train"] == table["test"]),
        "preset": where[0],
        "where": where[2],
        "share": np.where(table["train"] == "", 0, 0.00125),
    }
    return table.assign(**extra, **constant)


MATRIX = rows(
    ("zero_shot", "", "restaurant", 0, 0.5), ("zero_shot", "", "laptop", 0, 0.3),
    ("both@sites", "restaurant", "restaurant", 0, 0.9), ("both@sites", "restaurant", "restaurant", 1, 0.7),
    ("both@sites", "laptop", "laptop", 0, 0.6), ("both@sites", "laptop", "laptop", 1, 0.6),
    ("both@sites", "restaurant", "laptop", 0, 0.55), ("both@sites", "restaurant", "laptop", 1, 0.65),
    ("both@sites", "laptop", "restaurant", 0, 0.8), ("both@sites", "laptop", "restaurant", 1, 0.8),
    ("lora@all", "restaurant", "restaurant", 0, 1.0), ("lora@all", "restaurant", "restaurant", 1, 0.8),
    ("lora@all", "laptop", "laptop", 0, 0.7), ("lora@all", "laptop", "laptop", 1, 0.7),
    ("lora@all", "restaurant", "laptop", 0, 0.65), ("lora@all", "restaurant", "laptop", 1, 0.75),
    ("lora@all", "laptop", "restaurant", 0, 0.9), ("lora@all", "laptop", "restaurant", 1, 0.9),
)  # fmt: skip
"""Two domains, two seeds; LoRA is ten points above the edit in every row."""


# ---- tables -------------------------------------------------------------------------------------------------------------------


def test_table_2_is_what_the_rows_say():
    """Restaurant 0.9 and 0.7: mean 0.8, sd 0.2 / √2. The average's sd is over each seed's mean: (0.75, 0.65)."""
    table = tables.table_2([("ours", MATRIX)], "caption")
    (_, printed), (title, own) = table.blocks
    assert title == "ours" and table.header == (
        "method",
        "% trained",
        "Device",
        "Laptop",
        "Rest",
        "Service",
        "avg",
    )
    assert own[0] == ("zero-shot", "–", "–", "30.0", "50.0", "–", "40.0")
    assert own[1] == (
        "both parts, traced layers",
        "0.125",
        "–",
        "60.0 ± 0.0",
        "80.0 ± 14.1",
        "–",
        "70.0 ± 7.1",
    )
    assert own[2][0] == "LoRA, all layers"
    assert printed[-1] == (
        "both parts, layers 10-15",
        "0.006",
        "96.2",
        "76.7",
        "88.1",
        "89.5",
        "87.6",
    )


def test_table_3_keeps_the_two_unprinted_pairs_apart():
    matrix = pd.concat(
        [
            MATRIX,
            rows(
                ("both@sites", "device", "laptop", 0, 0.1),
                ("both@sites", "device", "laptop", 1, 0.1),
            ),
        ]
    )
    table = tables.table_3([("ours", matrix)], "caption")
    own = dict(zip(table.header, table.blocks[1][1][0], strict=True))
    assert (
        own["L,R"] == "80.0 ± 0.0"
        and own["R,L"] == "60.0 ± 7.1"
        and own["D,L"] == "10.0 ± 0.0"
        and own["D,R"] == "–"
    )
    assert (
        own["avg of 10"] == "70.0 ± 3.5"
    )  # seeds (0.55 + 0.8) / 2 and (0.65 + 0.8) / 2; device to laptop does not count
    assert [row[0] for row in table.blocks[1][1]] == [
        "both parts, traced layers",
        "LoRA, all layers",
    ]
    printed = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.blocks[0][1]}
    assert (
        printed["LoRA"]["D,R"] == "82.9"
        and printed["LoReFT"]["R,D"] == "94.5"
        and printed["LoRA"]["D,L"] == "–"
    )
    assert (
        printed["BERT-base, full"]["avg of 10"] == "81.9"
        and printed["BERT-base, full"]["S,R"] == "–"
    )


@pytest.mark.parametrize("table", [2, 3])
def test_the_papers_cells_give_its_averages(table):
    """Its printed averages are those of its printed cells, to the rounding of one decimal."""
    checked = 0
    for method, of in tables.published(table).groupby("method"):
        average, cells = (
            of[of["train"] == "average"]["accuracy"],
            of[of["train"] != "average"]["accuracy"],
        )
        if len(cells):
            checked += 1
            assert cells.mean() == pytest.approx(float(average.iloc[0]), abs=0.11), method
            assert len(cells) == (4 if table == 2 else 10)
    assert checked == (13 if table == 2 else 6)


def test_published_numbers_are_the_papers():
    """A few, read from the paper's tables again."""
    found = {
        (r["table"], r["method"], r["train"], r["test"]): r["accuracy"]
        for _, r in pd.read_csv(tables.PUBLISHED).iterrows()
    }
    assert (
        found[2, "PrefixFT", "service", "service"] == 37.6
        and found[2, "zero-shot", "laptop", "laptop"] == 53.2
    )
    assert (
        found[3, "both parts, layers 10-15", "service", "laptop"] == 71.6
        and found[3, "DoRA", "rest", "laptop"] == 80.2
    )


def test_latex_prints_hostile_text_as_it_is():
    hostile = r"50% of a_b & {c} \input{x} #1 $x$ ~^"
    table = tables.Table(hostile, "tab:x", ("a", "b"), ((hostile, ((hostile, "1 ± 2"),)),))
    text = table.latex()
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    assert (
        r"50\% of a\_b \& \{c\} \textbackslash{}input\{x\} \#1 \$x\$ \textasciitilde{}\textasciicircum{}"
        in body
    )
    assert r"$\pm$" in body and not re.search(r"(?<!\\)[%#_]", body)
    for line in body.strip().splitlines():
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert len(re.findall(r"(?<!\\)&", line)) == 1
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_markdown_keeps_its_columns():
    table = tables.Table("", "", ("a", "b"), (("block", (("x|y", "1"),)), ("", (("z", "2"),))))
    assert table.markdown().splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| **block** |  |",
        "| x\\|y | 1 |",
        "| z | 2 |",
    ]


def test_significance_counts_cells():
    cells = pd.DataFrame(
        {
            "kind": ["head"] * 4, "aie": [0.5, -0.2, 0.1, 0.0], "ci_low": [0.4, -0.3, -0.1, 0.0], "ci_high": [0.6, -0.1, 0.2, 0.0],
            "p": [0.001, 0.02, 0.3, np.nan], "p_adjusted": [0.003, 0.04, 0.3, np.nan],
        }
    )  # fmt: skip
    assert tables.significance([("map", cells)], "").blocks == (
        ("map", (("head", "4", "3", "2", "2", "1"),)),
    )


# ---- what the sentences rest on -----------------------------------------------------------------------------------------------


def test_methods_are_compared_row_by_row():
    """Ten points in each of 4 pairs x 2 seeds: no spread, and 4 trained models cannot give a p below 2 / 2^4."""
    (row,) = methods.compared(MATRIX).to_dict("records")
    assert row["method"] == "lora@all"
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((0.1, 0.1, 0.1))
    assert row["p"] == pytest.approx(2 / 2**4)


def test_layers_drawn_by_seed_count_once_per_draw():
    """Three draws of layers, each with the same gap in four domain pairs: mean -0.06, t interval over -0.1, -0.02, -0.06.

    sd 0.04, so the half width is 4.3027 * 0.04 / √3; three units cannot give a p below 2 / 2^3.
    """
    gaps, table = {0: -0.1, 1: -0.02, 2: -0.06}, []
    for seed, gap in gaps.items():
        for train in ("laptop", "restaurant"):
            for test in ("laptop", "restaurant"):
                table.append(("both@sites", train, test, seed, 0.9))
                table.append(("both@random", train, test, seed, 0.9 + gap))
    matrix = rows(*table)
    drawn = matrix["seed"].map({0: "0 1", 1: "3 4", 2: "5 6"})
    matrix["layers"] = np.where(matrix["where"] == "random", drawn, "3 4")
    (row,) = methods.compared(matrix).to_dict("records")
    half = 4.3027 * 0.04 / 3**0.5
    assert row["units"] == 3 and row["p"] == pytest.approx(2 / 2**3)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(
        (-0.06, -0.06 - half, -0.06 + half), abs=1e-5
    )


def test_a_budget_of_all_examples_is_the_number_of_training_rows(tmp_path):
    """A budget of 0 examples takes every row and is kept as "all", so the column holds numbers and that word."""
    folder = tmp_path / "places"
    folder.mkdir()
    columns = "budget,epochs,place,accuracy\n"
    (folder / "places.csv").write_text(f'{columns}64,1,traced,0.5\nall,2,"traced, before",0.75\n')
    (folder / "run.json").write_text('{"rows": {"train": 1054}}')
    table = editing._places(Study(folder))
    assert table["budget"].tolist() == [64, 1054]
    assert table["place"].tolist() == ["traced layers", "traced layers, words before"]
    (folder / "places.csv").write_text(f"{columns}64,1,traced,0.5\n")
    assert editing._places(Study(folder))["budget"].tolist() == [64]


def test_budgets_that_were_planned_and_not_run_are_named(tmp_path):
    """Three of four budgets are whole, one lacks a place, and one was never planned."""
    (tmp_path / "run.json").write_text(
        '{"rows": {"train": 900}, "config": {"examples": [64, 0], "epochs": [1, 2, 10], '
        '"skip": ["0x10"], "rates": [1, 2.5]}}'
    )
    done = [(64, 1, "a"), (64, 1, "b"), (64, 2, "a"), (64, 2, "b"), (900, 1, "a")]
    table = pd.DataFrame(done, columns=["budget", "epochs", "place"]).assign(
        rates=["1; 2.5", "2.5", "1", "1", "1"]
    )
    study = Study(tmp_path)
    assert editing._missing(study, table) == [
        "64 examples and 10 epochs",
        "900 examples and 1 epoch",
        "900 examples and 2 epochs",
    ]
    assert editing._at_the_end(study, table).startswith("Of 6 tuned rates, 2 are the largest")


def test_random_layers_of_the_results_share_none_with_the_traced_or_the_last():
    """Every seed of every kept matrix; the traced ones are those of its own rows."""
    kept = list((make.HERE / "results").glob("*/matrix.csv"))
    seen = 0
    for path in kept:
        table = pd.read_csv(path)
        layers = {w: t["layers"].unique() for w, t in table.groupby("where")}
        taken = {
            i for w in ("sites", "last") for row in layers.get(w, ()) for i in str(row).split()
        }
        for row in layers.get("random", ()):
            seen += 1
            assert not taken & set(str(row).split()), (path.parent.name, row)
    assert seen >= 3


def test_effects_of_windows_are_rounded_so_that_noise_does_not_rank_them():
    importance = pd.DataFrame(
        [
            ("resid_post", layer, "query.last", aie)
            for layer, aie in ((0, 3e-5), (1, -2e-4), (2, 0.4))
        ],
        columns=["kind", "layer", "role", "aie"],
    )
    matrix = rows(*((f"both@{i}", "restaurant", "restaurant", 0, 0.6) for i in range(3)))
    table = editing.window_effects(
        matrix.assign(layers=["0", "1", "2"]), importance, Site.parse("L0.resid_post@query.last")
    )
    assert table["aie"].tolist() == [0.0, 0.0, 0.4]


def test_a_windows_effect_is_the_mean_over_its_layers():
    importance = pd.DataFrame(
        [
            ("resid_post", layer, role, aie)
            for layer, aie in ((0, 0.1), (1, 0.5))
            for role, aie in (("query.last", aie), ("answer", 9.0))
        ],
        columns=["kind", "layer", "role", "aie"],
    )
    matrix = rows(
        ("both@0", "restaurant", "restaurant", 0, 0.6), ("both@0", "restaurant", "restaurant", 1, 0.8),
        ("both@0-1", "restaurant", "restaurant", 0, 0.9), ("both@0-1", "restaurant", "restaurant", 1, 0.9),
    ).assign(layers=["0", "0", "0 1", "0 1"])  # fmt: skip
    table = editing.window_effects(matrix, importance, Site.parse("L0.resid_post@query.last"))
    assert table["aie"].tolist() == pytest.approx([0.1, 0.3]) and table["size"].tolist() == [1, 2]
    assert table["accuracy"].tolist() == pytest.approx([0.7, 0.9]) and table["window"].tolist() == [
        "layer 0",
        "layers 0-1",
    ]
    assert table["accuracy_high"].tolist() == pytest.approx([0.7 + 0.2 / 2**0.5, 0.9])


def test_a_component_is_ranked_by_its_best_role():
    table = pd.DataFrame(
        [
            ("head", 1, 0, "answer", 0.2),
            ("head", 1, 0, "before", -0.5),
            ("mlp_out", 1, -1, "answer", 0.1),
            ("resid_post", 1, -1, "answer", 9.0),
        ],
        columns=["kind", "layer", "head", "role", "aie"],
    )
    assert {str(s): v for s, v in circuit.ranking(table, by_role=False)} == {
        "L1.head0": 0.2,
        "L1.mlp_out": 0.1,
    }
    assert [str(s) for s, _ in circuit.ranking(table, by_role=True)] == [
        "L1.head0@answer",
        "L1.head0@before",
        "L1.mlp_out@answer",
    ]


def direction(effects: dict[str, list[float]], direction: str) -> Effects:
    """Effects of three pairs from three sentences at one head per role."""
    rows = [
        (f"p{i}", "head", 2, 1, -1, role, 0.9, 0.1, 0.0, value, 0.0)
        for role, values in effects.items()
        for i, value in enumerate(values)
    ]
    pairs = pd.DataFrame(
        {
            "example_id": ["p0", "p1", "p2"],
            "cluster": ["a", "b", "c"],
            "roles": [list(effects)] * 3,
            "clean": 0.9,
            "corrupted": 0.1,
        }
    )
    return Effects(pd.DataFrame(rows, columns=list(COLUMNS)), pairs, {"direction": direction})


def test_interaction_is_the_paired_difference_of_the_directions():
    """INT per pair is 0.1, 0.2, 0.3 at `answer`: mean 0.2, and no interval can leave [0.1, 0.3]; at `before` it is 0."""
    one = direction({"answer": [0.5, 0.1, 0.3], "before": [0.2, 0.2, 0.2]}, "denoise")
    two = direction({"answer": [0.6, 0.3, 0.6], "before": [0.2, 0.2, 0.2]}, "noise")
    two = Effects(two.frame.sample(frac=1, random_state=0), two.pairs, two.about)
    table, about = interaction.interaction_table(one, two)
    table = table.set_index("role")
    assert about["n_sentences"] == 3
    row = table.loc["answer"]
    assert (row["pie"], row["tie"], row["int"]) == pytest.approx((0.3, 0.5, 0.2))
    assert 0.1 - 1e-9 <= row["int_low"] <= 0.2 <= row["int_high"] <= 0.3 + 1e-9
    assert table.loc["before", "int"] == pytest.approx(0) and table.loc["before", "head"] == 1
    fewer = direction({"answer": [0.6, 0.3]}, "noise")
    with pytest.raises(DataError, match="different pairs or cells"):
        interaction.interaction_table(one, fewer)


# ---- the kept results ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("figures")
    return out, make.run(make.Config(out=out))


@kept
@pytest.mark.slow
def test_everything_there_are_results_for_is_made_and_indexed(built):
    out, made = built
    index = (out / "README.md").read_text(encoding="utf-8")
    for item in make.ITEMS:
        complete = all((RESULTS / study / "run.json").exists() for study in item.needs)
        assert (item.name in made) == complete
        if not complete:
            assert f"`{item.name}`" in index.split("## Missing results")[1]
            continue
        endings = (
            (".md", ".tex")
            if item.name.startswith(("table", "significance_cells"))
            else (".png", ".pdf")
        )
        assert all((out / f"{item.name}{e}").stat().st_size > 300 for e in endings)
        assert f"## {item.title}\n" in index and all(f"({item.name}{e})" in index for e in endings)
        section = index.split(f"## {item.title}\n")[1].split("\n## ")[0]
        for study in item.needs:
            assert re.search(
                rf"Run {study} of \d{{4}}-\d\d-\d\d: model (bundled|smollm2)\S* \([0-9a-f]{{8}}\), .+; mech-absa \S+,",
                " ".join(section.split()),
            )
        assert "nan" not in re.findall(r"[a-z]+", section)


@kept
@pytest.mark.slow
def test_pictures_are_small_and_text_stays_text(built):
    out, made = built
    pictures = sorted(out.glob("*.png"))
    tables_made = [name for name in made if name.startswith(("table", "significance_cells"))]
    assert len(pictures) == len(made) - len(tables_made)
    assert all(p.stat().st_size < 200_000 for p in pictures)
    for pdf in out.glob("*.pdf"):
        content = pdf.read_bytes()
        assert (
            b"/Type3" not in content and b"/Font" in content and b"CreationDate" not in content
        ), pdf.name


@kept
@pytest.mark.slow
def test_the_same_results_give_the_same_bytes(built, tmp_path):
    out, made = built
    again = [name for name in ("maps_heads", "significance_cells", "table2") if name in made]
    make.run(make.Config(out=tmp_path, only=tuple(again)))
    written = sorted(p.name for p in tmp_path.iterdir())
    assert len(written) == 2 * len(again) and "README.md" not in written
    for name in written:
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


@kept
def test_the_kept_tables_are_those_of_the_kept_results(tmp_path):
    out = tmp_path
    names = ("table2", "table3", "significance_cells")
    needs = {item.name: item.needs for item in make.ITEMS}
    there = [n for n in names if all((RESULTS / s / "run.json").exists() for s in needs[n])]
    if not there:
        pytest.skip("no results of tables are kept")
    made = make.run(make.Config(out=out, only=tuple(there)))
    found = [
        name
        for name in ("table2", "table3", "significance_cells")
        if name in made and (ROOT / "figures" / f"{name}.md").exists()
    ]
    if not found:
        pytest.skip("no tables are kept yet: make figures")
    for name in found:
        for ending in (".md", ".tex"):
            assert (ROOT / "figures" / (name + ending)).read_text("utf-8") == (
                out / (name + ending)
            ).read_text("utf-8"), f"{name}{ending}: make figures"


@kept
def test_the_folder_of_a_map_is_no_folder_of_effects():
    """The map is of 200 pairs and the kept effects are of one, so they lie apart: nobody takes one pair for the map."""
    folder = RESULTS / "trace_counterfactual"
    with pytest.raises(DataError, match=r"effects\.parquet is missing"):
        Effects.load(folder)
    one = Effects.load(folder / "example")
    assert len(one.pairs) == 1 == one.about["kept"]


@kept
def test_kept_results_are_small_and_name_no_machine():
    files = [p for p in RESULTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 2_500_000
    for path in RESULTS.rglob("run.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["study"] == path.parent.relative_to(RESULTS).as_posix()
        if "runs" in record:
            assert record["runs"].keys() == record["commands"].keys() == record["seconds"].keys()
        assert not re.search(r'["\s=](/|[A-Za-z]:\\|\.\./|~/)', path.read_text(encoding="utf-8")), (
            path
        )


def test_a_missing_study_is_one_sentence(tmp_path, capsys):
    results = tmp_path / "results"
    with pytest.raises(DataError, match=r"holds no results; `make reproduce` makes them"):
        make.run(make.Config(runs=results, out=tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(make.ITEMS) and all(
        "is left out: " in line and "make reproduce" in line for line in said
    )
    with pytest.raises(
        ConfigError, match=r"--only 'figure9' is no figure or table; accepted: .*figure3_noise"
    ):
        make.run(make.Config(runs=results, out=tmp_path, only=("figure9",)))


# ---- making results anew ------------------------------------------------------------------------------------------------------


def configs() -> dict[str, type]:
    import mech_absa.commands.matrix as matrix
    import mech_absa.commands.patch as patch

    return {
        plan.PATCH: patch.Config,
        plan.MATRIX: matrix.Config,
        plan.CIRCUIT: circuit.Config,
    }


@pytest.mark.parametrize(
    "sizes", fast([builtin.Sizes(), builtin.FAST], [builtin.FAST]), ids=["full", "fast"]
)
def test_every_command_of_the_list_is_accepted(sizes, tmp_path):
    """Each is parsed by the command's own configuration, and names no study, step or method twice."""
    (tmp_path / plan.TRACED).mkdir()
    (tmp_path / plan.TRACED / "sites.json").write_text(
        '{"sites": ["L3.resid_post@query.last", "L4.resid_post@query.last"]}'
    )
    studies = builtin.plans(sizes, Path("data"))
    assert studies[0].name == plan.TRACED and set(builtin.REAL) < {s.name for s in studies}
    assert not set(builtin.REAL) & {s.name for s in builtin.plans(sizes)}
    assert len({s.name for s in studies}) == len(studies)
    for study in studies:
        assert len({step.name for step in study.steps}) == len(study.steps)
        for step in study.steps:
            _, module, *flags = step.words(tmp_path)
            config = tyro.cli(configs()[module], args=[*flags, "--out", "x", "--resume"])
            assert getattr(config, "run", config).resume and not any("{" in flag for flag in flags)
            if module == plan.MATRIX:
                assert len(set(config.methods)) == len(config.methods) and len(config.train) == len(
                    config.test
                )
                assert config.limits.limit_test is not None or study.name in builtin.REAL
            if study.name == "positions":
                assert config.place.positions == (step.mark["position"],) and config.methods == (
                    "both@3-4",
                    "loreft@3-4",
                )
    noise = next(s for s in studies if s.name == "trace_noise").steps[0]
    config = tyro.cli(configs()[plan.PATCH], args=noise.words(tmp_path)[2:])
    assert (
        config.corrupt.corruption == "noise"
        and config.corrupt.noise_span == "all"
        and config.corrupt.noise_draws == 10
        and config.pairs.limit == sizes.noise
    )
    own_command = {
        "compare",
        "compare_harder",
        "rank_fairness",
        "places",
        *(s.name for s in smollm2.studies(tmp_path, tmp_path, smollm2.FAST)),
    }
    assert {it for item in make.ITEMS for it in (*item.needs, *item.may)} <= {
        s.name for s in studies
    } | own_command


def test_all_neighbours_are_windows():
    assert (
        builtin.windows(1, 3) == ["0", "1", "2"]
        and builtin.windows(2, 3) == ["0-1", "1-2"]
        and builtin.windows(3, 3) == ["0-2"]
    )


def test_marks_and_the_untouched_model_stand_once(tmp_path):
    """Rows of two steps, each with its mark; the model as it is, scored by both, is kept once."""
    one = rows(("zero_shot", "", "laptop", 0, 0.3), ("both@3", "laptop", "laptop", 0, 0.123456789))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        one.to_csv(tmp_path / name / "matrix.csv", index=False)
    steps = tuple(
        plan.Step(name, plan.MATRIX, (), {"rank": rank}) for name, rank in (("a", 1), ("b", 2))
    )
    study = plan.Plan("ranks", "?", steps, keep.keep_matrix)
    study.keep(study, tmp_path, tmp_path / "out")
    found = pd.read_csv(tmp_path / "out" / "matrix.csv")
    assert found["method"].tolist() == ["zero_shot", "both@3", "both@3"] and found[
        "rank"
    ].tolist() == [1, 1, 2]
    assert found["accuracy"].tolist() == [0.3, 0.12346, 0.12346]
    assert not (tmp_path / "out" / "summary.csv").exists()


@pytest.mark.slow
def test_how_estimates_agree_is_counted_over_the_cells_that_have_an_effect():
    """Half of every effect: the same order, a straight line, and half of the sum."""
    exact = np.array([0.0, 0.0, 1.0, 2.0, 4.0, -1.0])
    estimates = dict.fromkeys(keep.ESTIMATES, 0.5 * exact) | {"ig": -exact}
    table = pd.DataFrame({"metric": "prob", "exact": exact, **estimates})
    table.loc[0, "atp"] = 9.0  # where nothing can have an effect, an estimate does not count
    found = keep.agreements(table).set_index("method")
    assert found.index.tolist() == ["atp", "atpstar", "relp", "ig"] and (found["n"] == 4).all()
    assert found.loc["atp", ["spearman", "pearson", "sum_ratio"]].tolist() == pytest.approx(
        [1, 1, 0.5]
    )
    assert found.loc["ig", ["pearson", "sum_ratio", "top_k_overlap"]].tolist() == pytest.approx(
        [-1, -1, 0]
    )


def test_folders_of_this_machine_are_named_by_what_they_are():
    value = {
        "a": ["/home/x/data/device.json", 3],
        "command": "python -m m --data /home/x/data/a --out runs/b",
    }
    assert keep.scrubbed(value, {"/home/x/data": "me_absc"}) == {
        "a": ["me_absc/device.json", 3],
        "command": "python -m m --data me_absc/a --out runs/b",
    }


@pytest.mark.slow
def test_a_step_that_fails_says_why_and_one_that_went_through_is_not_run_again(tmp_path):
    runner = reproduce.Runner(
        reproduce.Config(runs=tmp_path / "runs", results=tmp_path / "results")
    )
    runner.traced.set()
    step = plan.Step(
        "broken", plan.CIRCUIT, ("--importance", str(tmp_path / "none" / "sites.json")), {}
    )
    study = plan.Plan("circuit", "?", (step,), keep.keep_curves)
    with pytest.raises(
        MechAbsaError,
        match=r"circuit/broken ended with 2: .*importance\.csv: there is no such file",
    ):
        runner.run(study, step)
    log, folder = (
        tmp_path / "runs" / "circuit" / "broken.log",
        tmp_path / "runs" / "circuit" / "broken",
    )
    said = log.read_text().splitlines()[0]
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    log.write_text(f"{said}\nseconds 12.5\n")
    assert runner.run(study, step) == (said, 12.5)
    wants = plan.Step("wants", plan.MATRIX, ("--sites", "{sites}"), {})
    with pytest.raises(ConfigError, match="run the study trace_counterfactual first"):
        runner.run(study, wants)


def test_bad_flags_are_refused_before_anything_runs(tmp_path):
    def config(**given):
        return reproduce.Config(fast=True, runs=tmp_path / "runs", **given)

    with pytest.raises(
        ConfigError, match=r"--only 'fig' is no study; accepted: trace_counterfactual"
    ):
        reproduce.run(config(only=("fig",)))
    with pytest.raises(
        ConfigError,
        match=r"study matrix_real needs the paper's data; name its folder with --me-absc",
    ):
        reproduce.run(config(only=("matrix_real",)))
    with pytest.raises(ConfigError, match=r"holds no device_train\.json"):
        reproduce.run(config(me_absc=tmp_path))
    with pytest.raises(ConfigError, match="--jobs 0"):
        config(jobs=0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_studies_run_on_a_handful_and_are_drawn(tmp_path):
    """The whole list with --fast, twice (the second time nothing is left to do), and every figure from it."""
    config = reproduce.Config(fast=True, runs=tmp_path / "runs", results=tmp_path / "results")
    reproduce.run(config)
    times = pd.read_csv(tmp_path / "results" / "times.csv")
    assert list(dict.fromkeys(times["study"])) == [s.name for s in builtin.plans(builtin.FAST)]
    record = (tmp_path / "results" / "windows" / "run.json").read_bytes()
    reproduce.run(config)
    assert (tmp_path / "results" / "windows" / "run.json").read_bytes() == record
    made = make.run(make.Config(runs=tmp_path / "results", out=tmp_path / "out"))
    studies = {s.name for s in builtin.plans(builtin.FAST)}
    assert set(made) == {item.name for item in make.ITEMS if set(item.needs) <= studies}


def test_the_gap_of_classes_is_the_largest_recall_minus_the_smallest():
    """A class without rows has no recall; the unedited model has no row."""
    recalls = {
        "recall_positive": 0.9,
        "recall_negative": [*[0.5] * 17, 0.95],
        "recall_neutral": np.nan,
    }
    table = editing.with_gap(MATRIX.assign(**recalls))
    assert len(table) == 16 and set(table["data"]) == {"in domain", "out of domain"}
    assert table.set_index(table.index)["gap_of_classes"].drop(17).tolist() == pytest.approx(
        [0.4] * 15
    )
    assert table["gap_of_classes"][17] == pytest.approx(0.05)


def test_selectors_that_pass_need_both_the_p_value_and_two_points():
    """Of four selectors, one is too uncertain and one is ahead by a point only."""
    table = pd.DataFrame(
        {
            "selector": ["a", "b", "c", "d"], "layers": ["0 1", "2 3", "4 5", "6 7"], "budget": "64x2",
            "difference": [0.05, 0.01, 0.08, -0.1], "low": [0.04, 0.005, 0.0, -0.2], "high": [0.06, 0.015, 0.2, 0.0],
            "p": [0.001, 0.001, 0.02, 0.9], "p_adjusted": [0.004, 0.004, 0.06, 0.9],
        }
    )  # fmt: skip
    assert selectors.passing(table) == {"64x2": ["a"]}
    assert selectors.says(table).endswith("ahead: with 64 examples, 2 epochs: a.")
    rows = selectors.rows_of(table, "64x2")
    assert rows["name"].tolist() == ["c (4, 5)", "a (0, 1)", "b (2, 3)", "d (6, 7)"]
    assert rows["p"].tolist() == [0.06, 0.004, 0.004, 0.9]


@pytest.mark.parametrize(
    "folder, command",
    [
        ("places", "`python -m figures.places`, which"),
        ("smollm2/places", "`python -m figures.smollm2 --data DATA --only places`"),
        (
            "compare_harder",
            "`python -m mech_absa.compare` with the flags of docs/which_selector.md",
        ),
        ("ranks", "`python -m figures.reproduce --only ranks`"),
    ],
)
def test_a_missing_study_names_its_own_command(tmp_path, folder, command):
    from figures.study import Study

    with pytest.raises(DataError, match=re.escape(command)):
        Study(tmp_path / folder).table("x.csv")
