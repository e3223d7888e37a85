"""A study that was killed computes the batches of streams that it would have computed, and so the same numbers."""

from __future__ import annotations

import shutil

import pytest
from support import fast
from support.tiny_models import tiny_folder
from support.training_cases import TEMPLATE, WORDING

from mech_absa.examples import Example, Examples, Polarity
from mech_absa.model import load_model
from mech_absa.select.trainings import Budget, Data, Settings, Trainings
from mech_absa.train.matrix import Domain, Grid, Method, run_matrix
from mech_absa.train.prefix import PrefixCache

MEASURED = ("seconds", "cpu_seconds", "peak_memory_bytes")
ROWS = [Example(s, a, Polarity(p)) for s, a, p in WORDING]


@pytest.fixture
def batches(monkeypatch):
    """What every cache has computed: layer, and the token ids of the batch."""
    computed, run = [], PrefixCache._run

    def counted(self, layer, tokens):
        computed.append((layer, tokens.ids.tolist()))
        return run(self, layer, tokens)

    monkeypatch.setattr(PrefixCache, "_run", counted)
    return computed


def the_matrix(model, parts):
    rows = Examples(tuple(ROWS))
    domains = [Domain("a", rows, rows), Domain("b", rows[:5], rows[3:])]
    methods = [Method.parse("both@2"), Method.parse("lora@1")]
    grid = Grid(
        domains, methods, [0, 1], template=TEMPLATE, validation=0.3, change=lambda preset: preset.but(epochs=1)
    )  # fmt: skip
    return run_matrix(model, grid, parts=parts)


def the_comparison(model, parts):
    settings = Settings(budgets=(Budget(3, 1),), rates=(1.0,), samples=3, template=TEMPLATE)
    data = Data(ROWS[:5], ROWS[5:6], ROWS[6:])
    return Trainings(model, data, settings, [(1,), (2,)], parts).run()


@pytest.mark.parametrize("study", fast([the_matrix, the_comparison], [the_comparison]))
@pytest.mark.slow
def test_a_killed_study_computes_the_same_batches_and_numbers(study, batches, tmp_path):
    model = load_model(tiny_folder("llama"))
    whole = study(model, tmp_path / "whole")
    done = sorted((tmp_path / "whole").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    once, wanted = list(batches), [_without(row) for row in whole]
    assert len(once) > 3 and len(done) == 8
    for cut in (1, 2, 3):  # within the first domain, and within the first place
        batches.clear()
        parts = tmp_path / f"cut-{cut}"
        parts.mkdir()
        for path in done[:cut]:
            shutil.copy2(path, parts)
        assert [_without(row) for row in study(model, parts)] == wanted
        assert batches == once


def _without(row):
    return {k: v for k, v in row.items() if k not in MEASURED}
