"""Spoiled input gives the right result or one sentence: a few cases of every target here, many in the slow run."""

from __future__ import annotations

import random

import pytest

from fuzz.harness import TARGETS, run_case, run_target
from mech_absa.errors import DataError

FEW = {
    "readers": 60, "words": 150, "flags": 15, "sites": 60, "edits": 15, "records": 30, "run folders": 6, "gguf": 1, "models": 1,
    "wheel": 30, "explorer": 5,
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_input_is_accepted_or_refused(name):
    ends, failures = run_target(TARGETS[name], 0, FEW[name])
    assert not failures and sum(ends.values()) == FEW[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_spoiled_input(name):
    target = TARGETS[name]
    _, failures = run_target(target, 1000, max(20, int(5000 * target.cheap)))
    assert not failures, failures[:5]


def test_the_harness_sees_what_it_looks_for():
    class TwoLines(DataError):
        def __str__(self):
            return "two\nlines"  # an error of ours joins its lines by itself

    def raises(error):
        def case(rng):
            raise error

        return run_case(case, random.Random(0))

    assert raises(DataError("no.")) == "refused"
    assert raises(KeyError("x")).startswith("KeyError at test_fuzz.py")
    assert "line ends" in raises(TwoLines("x"))
