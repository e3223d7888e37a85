"""The doctor sees what is wrong, and its costs are what a stopwatch and a division give."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import replace

import pytest
from support.tiny_models import tiny_folder

from mech_absa import ZeroAblation, load_examples, load_model, make_pairs
from mech_absa.commands import before, doctor, machine
from mech_absa.commands.cli import parse, warn_of_crowd
from mech_absa.errors import SelfCheckError
from mech_absa.patch.plan import Plan

FLAGS = ["--model", str(tiny_folder("llama")), "--template", "{sentence} {aspect} ?"]
FLAGS += ["--data", "builtin:device/test", "--by", "role", "--asked", "6", "--tried", "2"]


def refuse(word):
    raise AssertionError(f"{word} is not JSON")


@pytest.fixture(scope="module")
def seen():
    """The flags, and what the doctor finds on a tiny model."""
    config = parse(doctor.Config, [*FLAGS, "--json"], "mech_absa.doctor")
    return config, doctor.examine(config)


def test_the_json_is_strict_and_costs_are_a_division(seen, capsys, monkeypatch):
    config, found = seen
    monkeypatch.setattr(doctor, "examine", lambda config: found)
    doctor.main(config)
    read = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert read["sound"] and read["model"]["difference_to_hugging_face"] < 1e-4
    assert read["engine"]["self_checks"]["engine_against_loop"] < 1e-4
    cost, engine = read["cost"], read["engine"]
    each = engine["seconds"] / engine["pairs"]
    assert cost["minutes"] == pytest.approx(cost["pairs"] * each / 60)


def test_the_number_of_pairs_follows_from_the_share_that_was_kept(seen):
    _, found = seen
    kept, asked, examples = (found.task[k] for k in ("pairs", "asked", "examples"))
    assert found.cost["pairs"] == -(-examples * kept // asked)
    assert 0 <= found.task["clean_accuracy"] <= 1


def test_a_model_that_guesses_is_told_so(seen):
    _, found = seen
    assert any("most frequent label" in line or "label words hold" in line for line in found.advice)


def test_a_broken_engine_is_told_after_everything_was_printed(seen, monkeypatch, capsys):
    config, _ = seen

    def broken(*args, **options):
        raise SelfCheckError("engine_against_loop is off by 1")

    monkeypatch.setattr(doctor, "self_check", broken)
    monkeypatch.setattr(Plan, "iterate", lambda self: ())
    with pytest.raises(SelfCheckError, match="off by 1"):
        doctor.main(replace(config, json=False))
    said = capsys.readouterr().out
    assert "cost " in said and "self-checks: engine_against_loop is off by 1" in said


def test_typical_pairs_have_the_lengths_of_the_quantiles(seen):
    config, _ = seen
    model = load_model(tiny_folder("llama"))
    examples = load_examples("builtin:device/test")
    template = config.question.prompt
    pairs = make_pairs(model, examples, ZeroAblation(), template=template, limit=9, keep="all")
    lengths = sorted(p.length for p in pairs)
    assert len(set(lengths)) > 3
    assert [p.length for p in doctor._typical(pairs, 1)] == [lengths[4]]
    assert [p.length for p in doctor._typical(pairs, 3)] == [lengths[2], lengths[4], lengths[6]]
    assert doctor._typical(pairs, 9) is pairs


@pytest.mark.parametrize(
    "threads, cores, others, warned",
    [
        (1, 2, 2.0, None),  # one thread waits for nobody
        (2, 2, 0.1, None),  # nobody else is here
        (2, 2, 1.0, "OMP_NUM_THREADS=1"),
        (8, 16, 4.0, None),  # there is room for all
        (16, 16, 4.0, "OMP_NUM_THREADS=12"),
        (2, 2, 2.0, "OMP_NUM_THREADS=1"),  # never none
    ],
)
def test_threads_are_counted_against_the_cores_that_are_left(threads, cores, others, warned):
    said = machine.crowding(threads, cores, others)
    assert said is None if warned is None else warned in said


ADVICE = {
    "difference_to_hugging_face": (0.5, "do not trust a trace"),
    "gib": (1e6, "lower --memory"),
    "minutes": (1e4, "--by role costs about a tenth"),
    "pairs": (1, "make a pair with this corruption"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_every_trouble_has_its_advice_and_a_sound_machine_has_none(name, seen):
    config, found = seen
    config = replace(config, sweep=replace(config.sweep, by="token"))
    quiet = replace(found.machine, threads=1, free_gib=1e3, devices=())
    groups = {
        "model": {"difference_to_hugging_face": 1e-6},
        "task": {"pairs": 6, "asked": 6},
        "cost": {"gib": 1.0, "minutes": 1.0, "pairs": 3},
    }

    def said():
        return list(
            doctor.advice(config, quiet, groups["model"], groups["task"], groups["cost"], ())
        )

    assert said() == []
    value, sentence = ADVICE[name]
    group = {"difference_to_hugging_face": "model", "pairs": "task"}.get(name, "cost")
    groups[group][name] = value
    (only,) = said()
    assert sentence in only


def test_a_crowded_machine_is_told_before_a_sweep(monkeypatch, capsys):
    monkeypatch.setattr(machine, "crowded", lambda: "the machine is crowded")
    assert before.of_the_machine() == ["the machine is crowded"]
    warn_of_crowd(quiet=False)
    warn_of_crowd(quiet=True)
    assert capsys.readouterr().err == "warning: the machine is crowded\n"
    monkeypatch.setattr(machine, "crowded", lambda: None)
    assert before.of_the_machine() == []
    warn_of_crowd(quiet=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["train", "matrix", "evaluate"])
def test_every_long_command_tells_of_a_crowded_machine(name):
    module = importlib.import_module(f"mech_absa.commands.{name}")
    assert "warn_of_crowd(" in inspect.getsource(module.main)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tried", "0"], "--tried is 0; accepted: 1 or more"),
        (["--corruption", "smoke"], "--corruption 'smoke' is unknown"),
        (["--data", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_flags_are_one_sentence(flags, sentence, capsys):
    assert doctor.cli(flags) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.out == "" and said.err.count("\n") == 1
