"""The study of SmolLM2: which rows it takes, what it averages, and what its commands are."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mech_absa.errors import ConfigError

if not (Path(__file__).parents[1] / "figures" / "make.py").exists():
    pytest.skip("the figures are not part of an installed package", allow_module_level=True)

from figures import smollm2, smollm2_adapter


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

    from mech_absa.commands import evaluate, matrix, patch

    commands = {"mech_absa.patch": patch, "mech_absa.evaluate": evaluate}
    made = smollm2.studies(data, tmp_path, smollm2.Sizes())
    assert len({s.name for s in made}) == len(made)
    for study in made:
        (step,) = study.steps
        module = commands.get(step.module, matrix)
        tyro.cli(module.Config, args=list(step.flags))
    assert 1 < smollm2.budget(made, smollm2.Sizes()) < 10


def test_what_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="holds no folder dmaste; it is needed"):
        smollm2.run(smollm2.Config(data, runs=tmp_path))
    (data / "dmaste").mkdir()
    with pytest.raises(ConfigError, match="--only 'x' is no study; accepted: aspect_swap, noise"):
        smollm2.run(smollm2.Config(data, only=("x",), runs=tmp_path))
