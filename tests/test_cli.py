"""What all commands share: every refusal is one sentence, whoever makes it, and the exit code says what happened."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from mech_absa.commands.cli import command
from mech_absa.errors import ConfigError, HookError


@dataclass(frozen=True)
class Config:
    """A command of a test."""

    data: tuple[str, ...]
    """What to read."""
    layers: str | None = None
    rank: int = 4
    rate: float = 0.1
    schedule: Literal["linear", "cosine"] = "linear"
    batch_size: int = 8
    quiet: bool = False
    out: Path = Path("runs")


def run(*words: str, main=lambda config: None) -> int:
    return command(Config, main, "prog", words)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("--data", "x", "--layer", "2-4"), "there is no flag --layer; the nearest is --layers"),
        (
            ("--data", "x", "--batchsize=3"),
            "there is no flag --batchsize; the nearest is --batch-size",
        ),
        (("--data", "x", "--batch", "3"), "there is no flag --batch; the nearest is --batch-size"),
        (("--data", "x", "--zzzz"), "there is no flag --zzzz; --help names those there are"),
        (("--data", "x", "--no-quite"), "there is no flag --no-quite"),
        (("--data", "x", "--rank", "four"), "--rank: 'four' was given; a whole number is needed"),
        (("--data", "x", "--rate", "fast"), "--rate: 'fast' was given; a number is needed"),
        (("--data", "x", "--rank"), "Missing value for argument '--rank'"),
        (("--data", "x", "--schedule", "quick"), "'quick' for argument '--schedule'"),
        (("--rank", "3"), "--data must be given"),
        (("stray", "--data", "x"), "stray"),
    ],
)
def test_what_cannot_be_parsed_is_one_sentence(words, sentence, capsys):
    assert run(*words, main=lambda config: pytest.fail("it must not begin")) == 2
    said = capsys.readouterr()
    assert (
        sentence in said.err
        and said.err.startswith("prog: ")
        and said.err.count("\n") == 1
        and not said.out
    )
    assert (
        not set("│╭╰─|+") & set(said.err) and "--- " not in said.err and "For full" not in said.err
    )


def test_values_that_look_like_flags_are_not_blamed(capsys):
    assert run("--data", "a", "--layers=--zzz", "--rank", "x") == 2
    assert "'x' was given" in capsys.readouterr().err


def test_both_spellings_of_a_flag_and_its_negation(capsys):
    got = []
    assert run("--data", "a", "b", "--batch_size", "3", "--no-quiet", main=got.append) == 0
    assert got == [Config(("a", "b"), batch_size=3)] and capsys.readouterr().err == ""


def test_help_is_no_error(capsys):
    assert run("--help", main=lambda config: pytest.fail("it must not begin")) == 0
    said = capsys.readouterr()
    assert "--batch-size" in said.out and "A command of a test." in said.out and not said.err


@pytest.mark.parametrize(
    "error, code",
    [(ConfigError("no."), 2), (HookError("ours."), 1), (KeyboardInterrupt(), 130)],
    ids=["bad input", "our fault", "interrupted"],
)
def test_exit_codes(error, code, capsys):
    def fail(config):
        raise error

    assert run("--data", "x", main=fail) == code
    assert capsys.readouterr().err.count("\n") == 1


COMMANDS = (
    "patch",
    "train",
    "train.matrix",
    "evaluate",
    "evaluate.card",
    "verify",
    "doctor",
    "report",
    "generate",
    "models",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_knows_a_flag_that_is_not(name, capsys):
    module = importlib.import_module(
        f"mech_absa.{name}"
        + (
            ""
            if name in ("verify", "generate", "models", "doctor", "evaluate.card")
            else ".__main__"
        )
    )
    assert (module.cli if hasattr(module, "cli") else module.main)(["--modle", "x"]) == 2
    said = capsys.readouterr().err
    assert "there is no flag --modle" in said and said.count("\n") == 1
