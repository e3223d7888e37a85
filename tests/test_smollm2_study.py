"""The study of SmolLM2: which rows it takes, what it averages, and what its commands are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mech_absa.errors import ConfigError
from mech_absa.sites import Site

if not (Path(__file__).parents[1] / "figures" / "make.py").exists():
    pytest.skip("the figures are not part of an installed package", allow_module_level=True)

from figures import (
    real_model,
    smollm2,
    smollm2_adapter,
    smollm2_domains,
    smollm2_places,
    smollm2_selectors,
)


def rows(n: int, words: int = 3) -> list[dict[str, str]]:
    text = " ".join(["food"] + ["x"] * (words - 2))
    labels = ("Pos", "Neg", "Neu")
    return [{"sentence": f"{text} {i}", "aspect": "food", "label": labels[i % 3]} for i in range(n)]


@pytest.fixture
def data(tmp_path) -> Path:
    """Four domains and MAMS; the first two test questions of each domain stand in its train file."""
    folder = tmp_path / "data" / "me_absc"
    folder.mkdir(parents=True)
    for name in smollm2_adapter.DOMAINS.values():
        for part, items in {"train": rows(40), "test": rows(2)}.items():
            lines = "\n".join(
                json.dumps(r | {"sentence": f"{name} {r['sentence']}"}) for r in items
            )
            (folder / f"{name}_{part}.json").write_text(lines)
    mams = tmp_path / "data" / "mams"
    mams.mkdir()
    term = '<aspectTerm from="0" to="4" polarity="{}" term="food"/>'
    two = '<aspectTerm from="5" to="9" polarity="negative" term="wine"/>'
    for part, n in {"train": 20, "test": 1}.items():
        sentences = "".join(
            f"<sentence><text>food wine {part} {i}</text><aspectTerms>{term.format('positive')}{two}"
            "</aspectTerms></sentence>"
            for i in range(n)
        )
        (mams / f"{part}.xml").write_text(f"<sentences>{sentences}</sentences>")
    return tmp_path / "data"


def test_rows_are_disjoint_and_questions_of_test_files_are_left_out(data):
    found = smollm2_adapter.split(data, "laptop", 10)
    assert found.leaked == 2 and len(found.train) == 10
    assert len(found.train) + len(found.spare) + len(found.held) == 38
    sentences = [{e.sentence for e in part} for part in (found.train, found.spare, found.held)]
    assert not sentences[0] & sentences[1] and not sentences[0] & sentences[2]
    assert "laptop food x 0" not in set().union(*sentences)
    assert smollm2_adapter.split(data, "laptop", 10) == found


def test_sentences_of_several_aspects_stay_whole(data):
    mams = smollm2_adapter.split(data, "mams", 6)
    taken = smollm2.whole_sentences(mams.spare, 5, 30)
    assert len(taken) == 6 and all([e.cluster for e in taken].count(e.cluster) == 2 for e in taken)
    assert smollm2.whole_sentences(mams.spare, 5, 3) == []
    assert len(smollm2.drawn(mams.spare, 4, 30)) == 4 and smollm2.drawn(mams.spare, 4, 3) == []


def test_means_over_bands_by_hand():
    """Layer 9 has effects 1 and 3, layer 20 has 0 and 2; the second pair lacks the role elsewhere."""
    cells = [(9, "aspect.last"), (20, "aspect.last"), (9, "query.last"), (20, "query.last")]
    table = pd.DataFrame([{"kind": "resid_post", "layer": a, "role": r} for a, r in cells])
    values = np.array([[1.0, 0.0, 5.0, 4.0], [3.0, 2.5, np.nan, np.nan]])
    importance = SimpleNamespace(table=table, values=values, clusters=np.array(["a", "b"]))
    found = smollm2.banded(importance).set_index(["roles", "layers"])
    one = found.loc[("aspect", "9-14")]
    assert one["aie"] == 2.0 and one["minus_others"] == 0.75 and one["n"] == 2
    two = found.loc[("query", "15-20")]
    assert two["aie"] == 4.0 and two["minus_others"] == -1.0 and two["n"] == 1
    assert ("aspect", "0-5") not in found.index


def test_every_step_is_a_command_that_its_module_takes(data, tmp_path):
    """The flags of all steps are parsed by the commands themselves."""
    import tyro

    from mech_absa.commands import evaluate, patch

    commands = {
        "mech_absa.patch": patch,
        "mech_absa.evaluate": evaluate,
        "figures.smollm2_places": smollm2_places,
        "figures.smollm2_domains": smollm2_domains,
        "figures.smollm2_selectors": smollm2_selectors,
    }
    made = smollm2.studies(data, tmp_path, smollm2.Sizes())
    assert len({s.name for s in made}) == len(made)
    for study in made:
        (step,) = study.steps
        tyro.cli(commands[step.module].Config, args=list(step.flags))
    assert 1 < smollm2.budget(made, smollm2.Sizes()) < 10


def test_what_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="holds no folder dmaste; it is needed"):
        smollm2.run(smollm2.Config(data, runs=tmp_path))
    (data / "dmaste").mkdir()
    with pytest.raises(ConfigError, match="--only 'x' is no study; accepted: aspect_swap, noise"):
        smollm2.run(smollm2.Config(data, only=("x",), runs=tmp_path))


# ---- the edit at places --------------------------------------------------------------------------


def test_places_by_hand():
    """In 30 layers with 18-23 traced, the layers that no other place has are the random ones."""
    sites = [Site(layer, "resid_post", None, "query.last") for layer in range(18, 24)]
    found = {p.name: p for p in smollm2_places.places(sites, 30)}
    shown = {n: smollm2_places._layers(p.layers) for n, p in found.items()}
    assert shown == {
        "traced": "18-23", "paper": "9-14", "random": "6-8,15-17", "last": "24-29", "first": "0-5",
        "all": "0-29", "lora all": "0-29", "traced, last token": "18-23", "traced, a word": "18-23",
        "loreft traced": "18-23", "W_O traced": "18-23", "lora traced": "18-23", "loreft all": "0-29",
        **{f"layers {r}": r for r in ("4-9", "4-14", "9-18", "14-18", "14-23", "18-28")},
    }  # fmt: skip
    longer = [Site(layer, "resid_post", None, "query.last") for layer in (21, 22)]
    assert smollm2_places.places(sites, 30, longer)[-1].name == "layers 21-22"
    assert len(smollm2_places.places(sites, 30, sites)) == len(found)
    known = [Site(layer, "resid_post", None, "query.last") for layer in range(4, 10)]
    assert len(smollm2_places.places(sites, 30, known)) == len(found)  # a range of the paper's
    parts = found["traced, last token"].preset(1e-3).parts
    assert [p.place for p in parts if p.family == "loreft"] == [
        f"L{i}.resid_post@answer" for i in range(18, 24)
    ]
    assert [p.place for p in parts if p.family == "lora"] == [f"L{i}.W_O" for i in range(18, 24)]
    halves = (found["loreft traced"].preset(1e-3).parts, found["W_O traced"].preset(1e-3).parts)
    whole = found["traced"].preset(1e-3).parts
    assert sorted(map(str, halves[0] + halves[1])) == sorted(map(str, whole))
    assert len(halves[0]) == len(halves[1]) == 6
    assert {p.lr for p in parts} == {1e-3} and found["lora all"].preset(1.0).parts[
        0
    ].place == "L0.W_Q"


def test_differences_of_places_by_hand():
    """Two seeds of the traced layers answer 3 of 4 and 2 of 4 rows; one of the last layers 1 of 4."""
    answers = pd.DataFrame(
        {
            "file": ["a", "a", "b", "b"], "sentence": [0, 1, 2, 3], "gold": ["p", "n", "p", "neutral"],
            "zero_shot": ["p", "p", "p", "p"], "traced/0": ["p", "n", "p", "p"],
            "traced/1": ["p", "p", "p", "p"], "last/0": ["n", "n", "n", "p"],
        }
    )  # fmt: skip
    trainings = pd.DataFrame(
        {"place": ["traced", "traced"], "rate": [1.0, 4.0], "seed": [0, 0], "loss": [0.7, 0.6], "parameters": 5}
    )  # fmt: skip
    found = smollm2_places.compared(answers, trainings).set_index("place")
    traced, last = found.loc["traced"], found.loc["last"]
    assert traced["accuracy"] == 0.625 and traced["a"] == 0.75 and traced["b"] == 0.5
    assert traced[["seed_low", "seed_high", "rate", "parameters", "seeds"]].tolist() == [
        0.5,
        0.75,
        4,
        5,
        2,
    ]
    assert last["minus_traced"] == -0.5  # over seed 0, which both have
    assert found.loc["zero_shot", "minus_traced"] == -0.125 and np.isnan(traced["minus_traced"])
    assert last["parameters"] == 0 and found.loc["last", "neutral"] == 0


@pytest.fixture
def asked(data, tmp_path):
    """Two trainings in each place of the bundled model, on two rows a domain."""
    (tmp_path / "sites.json").write_text(json.dumps({"sites": ["L4.resid_post@query.last"]}))
    return smollm2_places.Config(
        data, model="bundled", sites=tmp_path / "sites.json", train=2, held=1, test=1, seeds=1,
        words=9, out=tmp_path / "places",
    )  # fmt: skip


@pytest.mark.slow
def test_a_stopped_study_of_places_goes_on_to_the_same_bytes(asked, capsys):
    """Two trainings, an answer and the wordings are taken away; what comes back is the same."""
    smollm2_places.main(replace(asked, until=0.0))
    assert not list(asked.out.glob("parts/*.json"))  # too late for anything
    smollm2_places.main(asked)
    names = ("answers.csv", "places.csv")
    before = [(asked.out / name).read_bytes() for name in names]
    table = pd.read_csv(asked.out / "trainings.csv")
    n = table["place"].nunique()
    assert len(table) == 2 * n and n == len(smollm2_places.Work(asked).places)
    kept = sorted(asked.out.glob("parts/*.json"))
    gone = [p for p in kept if p.stem in ("wordings", "paper-x0.001-s0", "last-x0.004-s0")]
    gone += [p for p in kept if p.name.startswith("paper") and p.name.endswith(".test.json")]
    assert len(gone) == 4
    for path in gone:
        path.unlink()
    capsys.readouterr()
    smollm2_places.main(asked)
    assert capsys.readouterr().out.count("\n") == 4  # the budget, two trainings, an answer
    assert [(asked.out / name).read_bytes() for name in names] == before
    record = json.loads((asked.out / "run.json").read_text())
    assert record["trainings"] == {"done": 2 * n, "planned": 2 * n}
    assert record["rows"] == {"train": 8, "validation": 4, "test": 4}
    assert "data" not in record["config"]


# ---- one domain for training, all for testing ----------------------------------------------------


def test_domains_by_hand():
    """Trained on `a` twice: half of a's two rows and a quarter of b's; trained on `b`: all and none."""
    answers = pd.DataFrame(
        {
            "file": ["a", "a", "b", "b"], "sentence": [0, 1, 2, 3], "gold": ["p", "n", "p", "n"],
            "s/a/0": ["p", "p", "n", "p"], "s/a/1": ["p", "p", "p", "p"], "s/b/0": ["n", "p", "p", "n"],
        }
    )  # fmt: skip
    found = smollm2_domains.scored(answers).set_index("domain")
    assert found.loc["a", ["a", "b", "inside", "outside", "seeds"]].tolist() == [0.5, 0.25, 0.5, 0.25, 2]  # fmt: skip
    assert found.loc["b", ["a", "b", "inside", "outside", "seeds"]].tolist() == [0, 1, 1, 0, 1]
    assert found.loc["all", ["inside", "outside", "seeds"]].tolist() == [0.75, 0.125, 1]
    assert found.loc["all", "inside_low"] < 0.75 < found.loc["all", "inside_high"]


def test_domains_train_on_their_own_rows_at_the_rates_of_places(asked, tmp_path):
    """Two domains' rows differ, rates come from the table, and a second run does nothing."""
    pd.DataFrame({"place": ["traced", "lora all", "last"], "rate": [4e-3, 1e-3, 1.0]}).to_csv(
        tmp_path / "places.csv"
    )
    config = smollm2_domains.Config(
        asked.data, model="bundled", sites=asked.sites, places=tmp_path, train=2, test=1, words=9,
        seeds=1, out=tmp_path / "domains",
    )  # fmt: skip
    works = smollm2_domains.run(replace(config, until=0.0))
    assert not list(config.out.glob("*/parts/*.json"))
    rows = [e.id for w in works for e in w.rows.train]
    assert len(set(rows)) == len(rows) == 8
    assert {e.source.split("_")[0] for e in works[3].rows.train} == {works[3].rows.train[0].source.split("_")[0]}  # fmt: skip
    assert all(w.rows.test is works[0].rows.test for w in works)
    smollm2_domains.main(config)
    table = pd.read_csv(config.out / "trainings.csv")
    assert table.groupby("place")["rate"].unique().map(list).to_dict() == {"traced": [4e-3], "lora all": [1e-3]}  # fmt: skip
    assert sorted(set(table["domain"])) == ["device", "laptop", "restaurant", "service"] and len(table) == 8  # fmt: skip
    before = {p: p.stat().st_mtime_ns for p in config.out.glob("*/parts/*.json")}
    smollm2_domains.main(config)
    assert before == {p: p.stat().st_mtime_ns for p in config.out.glob("*/parts/*.json")}
    with pytest.raises(ConfigError, match="no rate for 'traced'"):
        smollm2_domains.chosen_rates(config.out)


# ---- effects of a range and the accuracy of editing it -------------------------------------------


def test_ranges_that_are_set_beside_their_effects():
    """Neighbouring layers with the whole edit at the aspect; not random layers, halves or LoRA."""
    table = pd.DataFrame(
        {
            "place": ["traced", "random", "W_O traced", "lora all", "all", "layers 1-2", "zero_shot"],
            "layers": ["2-3", "0-1,5-6", "2-3", "0-7", "0-7", "1-2", np.nan],
        }
    )  # fmt: skip
    found = real_model.edited_ranges(table)
    assert found == {"all": list(range(8)), "layers 1-2": [1, 2], "traced": [2, 3]}
    effects = pd.DataFrame(
        {"kind": ["resid_post"] * 3 + ["attn_out"], "role": ["query.last"] * 2 + ["answer", "query.last"],
         "layer": [1, 2, 1, 1], "aie": [0.25, 0.75, 9.0, 9.0]}
    )  # fmt: skip
    assert real_model.mean_effect(effects, [1, 2]) == 0.5


def test_rank_correlation_of_effects_and_accuracies_by_hand():
    """Three places with 3, 2 and 0 of 4 rows right: the order of the effects, and its reverse."""
    answers = pd.DataFrame(
        {
            "file": "a", "sentence": [0, 1, 2, 3], "gold": ["p"] * 4, "x/0": ["p", "p", "p", "n"],
            "y/0": ["p", "p", "p", "n"], "y/1": ["p", "n", "n", "n"], "z/0": ["n"] * 4,
        }
    )  # fmt: skip
    accuracy = real_model.accuracies(answers, ["x", "y", "z"])
    assert accuracy[0].tolist() == [0.75, 0.5, 0.0] and accuracy.shape == (real_model.DRAWS + 1, 3)
    assert accuracy[1:].mean(0) == pytest.approx([0.75, 0.5, 0.0], abs=0.03)
    assert accuracy[1:, 0].std() == pytest.approx((0.75 * 0.25 / 4) ** 0.5, abs=0.02)
    rho, low, high, p = real_model.rank_correlation([3.0, 2.0, 1.0], accuracy)
    assert rho == 1 and low <= rho <= high and p == pytest.approx(2 / 6)
    assert real_model.rank_correlation([1.0, 2.0, 3.0], accuracy)[0] == -1


def test_layers_of_the_selectors_study_are_those_that_were_trained():
    traced, again = (
        [Site.parse(f"L{layer}.resid_post@query.last") for layer in layers]
        for layers in (range(18, 24), range(21, 27))
    )
    trained = {p.name: p for p in smollm2_places.places(traced, 30, again)}
    found = smollm2_selectors.trained_places(pd.read_csv(smollm2_selectors.KEPT / "places.csv"), 30)
    assert found == {n: trained[n].layers for n in found}
    at_the_aspect = {
        n for n, p in trained.items() if (p.method, p.position) == ("both", "query.last")
    }
    assert set(found) == at_the_aspect - {"all"}


def test_a_selector_takes_the_place_with_the_highest_mean_score():
    """Two places: `first` is right on 1 of 4 rows and `last` on 3; their mean is 1/2."""
    answers = pd.DataFrame(
        {
            "file": ["a"] * 4, "sentence": [0, 1, 2, 3], "gold": ["p"] * 4,
            "first/0": ["p", "n", "n", "n"], "last/0": ["p", "p", "p", "n"],
        }
    )  # fmt: skip
    deep, early = np.arange(30.0), np.r_[[np.nan, 9.0], np.zeros(28)]
    layers = pd.DataFrame(
        [
            (name, layer, score, 1.0)
            for name, scores in (("deep", deep), ("early", early))
            for layer, score in enumerate(scores)
        ],
        columns=["selector", "layer", "score", "seconds"],
    )
    places = {"first": (0, 1), "last": (28, 29)}
    table = smollm2_selectors.compared(layers, answers, places).set_index("selector")
    assert table["place"].to_dict() == {"deep": "last", "early": "first"}
    assert table.loc["deep", "difference"] == pytest.approx(0.25)
    assert table.loc["early", ["accuracy", "difference", "share", "regret"]].tolist() == [
        0.25, -0.25, 0.5, 0.5,
    ]  # fmt: skip
    assert (table["rho"].round(9) == [1, -1]).all()
    # Rows 1 and 2 say +1/2, the others 0: no resample is below 0, and many reach 0.
    assert table.loc["deep", "low"] == pytest.approx(0) and table.loc["deep", "high"] <= 0.5


def test_a_selector_that_fails_is_named_and_the_others_stay(data, tmp_path, monkeypatch):
    asked = []

    class Fails:
        def __call__(self, evidence):
            asked.append("fails")
            raise ConfigError("nothing was selected")

    ranking = SimpleNamespace(layer_scores=np.arange(30.0), about={"cpu_seconds": 2.0})
    known = {"exact": Fails, "last": lambda: lambda evidence: asked.append("last") or ranking}
    monkeypatch.setattr(smollm2_selectors, "selector", lambda name: known[name]())
    model = SimpleNamespace(edited=SimpleNamespace(name="tiny", sha256="0", n_layers=30))
    monkeypatch.setattr(smollm2_selectors.Asked, "evidence", model)
    config = smollm2_selectors.Config(data, selectors=("exact", "last"), out=tmp_path / "out")
    smollm2_selectors.main(config)
    smollm2_selectors.main(config)
    assert asked == ["fails", "last"]  # what is there is not asked for again
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["failed"] == {"exact": "nothing was selected"}
    table = pd.read_csv(tmp_path / "out" / "selectors.csv")
    assert table["selector"].tolist() == ["last"] and table["place"].tolist() == ["last"]

    def refuse(self):
        raise ConfigError("no data")

    monkeypatch.setattr(smollm2_selectors.Asked, "evidence", property(refuse))
    with pytest.raises(ConfigError, match="no data"):
        smollm2_selectors.main(replace(config, out=tmp_path / "bad"))
    # What is wrong with the data is no verdict on a selector.
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ConfigError, match="--looks is 3; accepted: 4 or more"):
        smollm2_selectors.Config(data, looks=3)
