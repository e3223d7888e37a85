"""The scorecard: its numbers are those of the side effects, and implied questions are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.small_cases import NEU, POS, NoEdit, Push

from mech_absa.edits import TrainingRecord
from mech_absa.errors import ConfigError
from mech_absa.evaluate import scorecard as module
from mech_absa.evaluate.predictions import Predictions
from mech_absa.evaluate.scorecard import IMPLIED, MEASURES, NO, YES, follows, scorecard, table
from mech_absa.evaluate.side_effects import NEAR, PARAPHRASES, side_effects
from mech_absa.prompts import PromptTemplate
from mech_absa.schemas import TABLES

FEW = {"paraphrases": PARAPHRASES[:2], "near": NEAR[:1], "draws": 20}


@pytest.fixture(scope="module")
def effects(model, examples):
    edit = Push("L2.resid_post@query.last", size=20.0)
    return edit, side_effects(model, edit, examples, others=[examples[:4], examples[5:]], **FEW)


def test_the_numbers_are_those_of_the_side_effects(model, examples, effects):
    edit, found = effects
    edit.record, edit.n_parameters = TrainingRecord(steps=3, seconds=1.5, examples=320), 1234
    card = scorecard(model, edit, found, examples, draws=20)
    assert set(card.numbers) == set(MEASURES) <= set(TABLES["scorecard.csv"]["properties"])
    assert card.numbers["gain"] == found.reliability.difference
    assert card.numbers["near_kl"] == found.intervals.near_kl
    bases = [p.accuracy_second * p.n for p in found.portability]
    assert card.base["out_of_domain"] == pytest.approx(sum(bases) / 7)
    assert card.base["generality"] == pytest.approx(np.mean([g.base for g in found.generality]))
    row = card.row()
    assert row["reliability"] == found.reliability.accuracy_first
    assert row["reliability_base"] == found.reliability.accuracy_second
    assert (row["parameters"], row["seconds"], row["examples"]) == (1234, 1.5, 320)
    assert row["portability"] == follows(model, examples, edit, draws=20).value
    assert row["portability_base"] == follows(model, examples, None, draws=20).value


def test_the_table_has_a_column_per_edit(model, examples, effects):
    edit, found = effects
    edit.record = TrainingRecord()
    first = scorecard(model, edit, found, examples, questions=IMPLIED[:1], draws=20)
    second = replace(first, name="second", parameters=1234567, seconds=2.25)
    read = table([first, second]).set_index("measure")
    assert read.columns.tolist() == ["base", found.name, "second"]
    assert read.loc["seconds of training", [found.name, "second"]].tolist() == ["-", "2.2"]
    assert read.loc["parameters", "second"] == "1,234,567"
    share = 100 * found.reliability.accuracy_second
    assert read.loc["in domain: accuracy, %", "base"] == f"{share:.1f}"
    assert read.loc["locality, text: KL", found.name].startswith("0.000 [0.000")
    with pytest.raises(ConfigError, match="no scorecards"):
        table([])


def test_implied_questions_by_hand(model, examples, monkeypatch):
    """A model that always says yes is right about half; neutral rows are not asked about."""
    asked = []

    def always_yes(model, rows, edit, *, template, verbalizer, batch_size):
        asked.append((template.text, tuple(e.polarity for e in rows)))
        (yes,) = [p for p, word in verbalizer.words if word == "yes"]
        return Predictions(tuple(rows), (yes,) * len(rows), "yes")

    monkeypatch.setattr(module, "predict", always_yes)
    rows = [*examples[:2], examples[2], examples[4]]  # positive, negative, positive, neutral
    yes, no = ("{sentence} {aspect} a ?", YES), ("{sentence} {aspect} b ?", NO)
    assert follows(model, rows, NoEdit(), questions=[yes], draws=20).value == pytest.approx(2 / 3)
    assert follows(model, rows, NoEdit(), questions=[no], draws=20).value == pytest.approx(1 / 3)
    assert follows(model, rows, NoEdit(), questions=[yes, no], draws=20).value == 0.5
    assert len(asked) == 4 and all(NEU not in classes for _, classes in asked)
    assert np.isnan(follows(model, [examples[4]], None).value)
    with pytest.raises(ConfigError, match="no questions were given for portability"):
        follows(model, rows, None, questions=())


def test_the_questions_ask_about_the_aspect_and_are_balanced(examples):
    assert sum(words == YES for _, words in IMPLIED) * 2 == len(IMPLIED)
    for text, _ in IMPLIED:
        assert PromptTemplate(text)(examples[0]).queries and POS.value not in text
