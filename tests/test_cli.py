"""What all commands share: every refusal is one sentence, whoever makes it, and the exit code says what happened."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from mech_absa.commands.cli import command
from mech_absa.commands.flags import (
    ReadFlags,
    flag_names,
    flat,
    group_of,
    preset_defaults,
    recorded,
)
from mech_absa.commands.tables import print_table
from mech_absa.errors import LONGEST, ConfigError, DataError, HookError
from mech_absa.records import plain


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
        (
            ("--data", "x", "--schedule", "quick"),
            "--schedule: 'quick' was given; accepted: linear, cosine",
        ),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", "four"),
        ("rank", True),
        ("rank", 1.5),
        ("rate", None),
        ("schedule", "zz"),
        ("data", "x"),
        ("data", [1]),
    ],
)
def test_a_preset_file_with_a_value_of_another_type(tmp_path, name, value):
    record = {"key": "k", "command": "prog", "config": {"data": ["x"], name: value}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"gives --{name} the value"):
        preset_defaults(Config, tmp_path, "prog")
    record["config"] = {"data": ["x"], "rank": 2}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert preset_defaults(Config, tmp_path, "prog") == Config(("x",), rank=2)


def test_a_message_has_an_end_and_can_be_printed():
    """A value of a hostile file may be as long as the file, and hold half of a surrogate pair."""
    text = str(ConfigError("begin " + "x" * 10**7 + " end"))
    assert len(text) == LONGEST and text.startswith("begin ") and text.endswith(" end")
    assert str(ConfigError("y" * LONGEST)) == "y" * LONGEST
    assert str(ConfigError("a field {x\ny}")) == "a field {x y}"
    str(DataError("half \ud800", "a\udcff.jsonl", 3)).encode()


COMMANDS = (
    "patch",
    "train",
    "train.matrix",
    "compare",
    "evaluate",
    "evaluate.card",
    "verify",
    "doctor",
    "report",
    "explore",
    "generate",
    "models",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_knows_a_flag_that_is_not(name, capsys):
    module = importlib.import_module(
        f"mech_absa.{name}"
        + (
            ""
            if name in ("verify", "generate", "models", "doctor", "evaluate.card", "compare")
            else ".__main__"
        )
    )
    assert (module.cli if hasattr(module, "cli") else module.main)(["--modle", "x"]) == 2
    said = capsys.readouterr().err
    assert "there is no flag --modle" in said and said.count("\n") == 1


def test_verify_ends_with_its_verdict():
    from mech_absa.commands.verify import LARGEST, conclusion

    assert conclusion(1.5e-5, LARGEST).startswith("They agree (up to 0.001 is rounding)")
    assert conclusion(2e-3, LARGEST).startswith("They differ by more than rounding (0.001)")


def test_version_is_said_and_nothing_begins(capsys):
    assert run("--version", main=lambda config: pytest.fail("it must not begin")) == 0
    said = capsys.readouterr()
    assert re.fullmatch(r"mech_absa (\d+\.\S+|of this folder)\n", said.out) and not said.err


@dataclass(frozen=True)
class Resumable:
    """A command that can be taken up."""

    resume: bool = False


def test_sigterm_ends_with_one_sentence_and_gives_the_handler_back(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def main(config):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("it was not terminated")

    assert command(Resumable, main, "prog", []) == 143
    assert capsys.readouterr().err == (
        "prog: terminated; give the same flags with --resume to go on\n"
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_the_machine_refuses_is_one_sentence_and_what_a_library_raises_is_not_hidden(capsys):
    def full(config):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/effects.parquet")

    assert command(Resumable, full, "prog", []) == 2
    assert capsys.readouterr().err == (
        "prog: runs/x/effects.parquet: No space left on device; give the same flags with --resume "
        "to go on\n"
    )

    def damaged(config):
        raise OSError("Parquet magic bytes not found")  # a library's own has no number

    with pytest.raises(OSError, match="magic bytes"):
        run("--data", "x", main=damaged)


def a_run(folder, command: str, **config):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"key": "0", "command": command, "config": config}))
    return str(folder)


def test_a_preset_file_gives_the_defaults_and_flags_win(tmp_path, capsys):
    folder = a_run(tmp_path / "a", "prog", data=["x", "y"], rank=9, rate=0.5)
    for preset in (["--preset-file", folder], [f"--preset_file={folder}/run.json"]):
        got = []
        assert run(*preset, "--rate", "0.25", main=got.append) == 0, capsys.readouterr().err
        assert got == [Config(("x", "y"), rank=9, rate=0.25)]


@pytest.mark.parametrize(
    "command_name, config, sentence",
    [
        ("other", {}, "is a run of other; a run of prog is needed"),
        ("prog", {"soul": 1}, "names soul, and there is no such flag"),
    ],
)
def test_a_preset_file_of_another_command_or_flag(command_name, config, sentence, tmp_path, capsys):
    folder = a_run(tmp_path / "a", command_name, **config)
    assert run("--data", "x", "--preset-file", folder) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert run("--data", "x", "--preset-file") == 2
    assert "--preset-file needs a run folder or its run.json" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "80"])
def test_tables_are_never_cut_on_a_narrow_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    cells = ["L3.attn_out@query.last", "0.1234 to 0.5678", "<= 0.0001", "a sentence of some length"]
    print_table(["site", "interval", "p", "note", "n"], [[*cells, None]], "A title")
    lines = capsys.readouterr().out.splitlines()
    assert any(all(cell in line for cell in cells) for line in lines)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize(
    "name", ["patch", "train", "matrix", "compare", "evaluate", "doctor", "explore"]
)
def test_every_command_that_reads_data_knows_how_data_is_read(name):
    """--null-targets was missing in two of them."""
    module = importlib.import_module(f"mech_absa.commands.{name}")
    flags = {f.name for f in fields(ReadFlags)}
    assert {"columns", "meaning", "skip_bad", "null_targets", "ignore_case", "strict"} <= flags
    assert flags <= set(flag_names(module.Config))


GROUPED = ("patch", "train", "matrix", "evaluate", "card", "compare", "doctor", "explore")
OWN_DEFAULTS = {
    "adapter": {
        "card",
        "explore",
    },  # the card is of the bundled edit; the explorer trains one itself
    "batch_size": {"card", "train", "matrix"},  # prompts per pass, against examples per step
    "corruption": {"compare"},  # a pair of texts is what all selectors can look at
    "data": {"compare", "explore"},
    "draws": {"card"},  # the card was made with twice as many
    "layers": {"train"},  # either --sites or --layers must be given
    "limit_test": {"compare"},  # hundreds of edits are scored
    "memory": {"patch", "doctor"},  # in flight, against kept
    "sites": {"train", "matrix"},  # where to edit, against what is traced
    "test": {"train", "compare"},
    "train": {"explore"},
    "validation": {"compare"},  # tunes rates, where others choose an epoch
}
"""Flag -> the commands in which it has another default than in the first that knows it, and why."""


def defaults(config) -> dict[str, object]:
    """Return the default of every flag of a configuration's class; flags that must be given are left out."""
    found: dict[str, object] = {}
    for f in fields(config):
        if (group := group_of(config, f.name)) is not None:
            held = f.default_factory() if f.default_factory is not MISSING else None
            found |= flat(held) if held is not None else defaults(group)
        elif f.default is not MISSING:
            found[f.name] = f.default
    return found


def test_a_flag_has_one_default_wherever_it_stands():
    """`--draws` or `--rank` must not mean another number in another command without a reason."""
    known: dict[str, dict[str, object]] = {}
    for name in GROUPED:
        config = importlib.import_module(f"mech_absa.commands.{name}").Config
        for flag, value in defaults(config).items():
            known.setdefault(flag, {})[name] = value
    assert len(known) > 60 and len(known["seed"]) >= 6
    for flag, values in known.items():
        usual = [v for name, v in values.items() if name not in OWN_DEFAULTS.get(flag, ())]
        assert all(v == usual[0] for v in usual), (flag, values)


@pytest.mark.parametrize("name", ["patch", "train", "matrix", "evaluate", "card", "compare"])
def test_a_saved_run_knows_flags_by_name_whatever_group_they_stand_in(name, tmp_path):
    """Runs of older versions hold one flat table; with it, a run is the same and is resumed."""
    config = importlib.import_module(f"mech_absa.commands.{name}").Config
    command_name = {"matrix": "train.matrix", "card": "evaluate.card"}.get(name, name)
    needed = {"data": ["x"]} if name in ("train", "evaluate") else {}
    needed |= {"layers": "2"} if name == "train" else {}
    changed = {"seed": 7, "seeds": [7], "separator": "", "dtype": "float64"}
    changed |= {"level": 0.9, "rank": 3, "limit": 5, "limit_test": 5, "positions": ["aspect"]}
    known = set(flag_names(config))
    saved = needed | {flag: value for flag, value in changed.items() if flag in known}
    assert len(saved) > 3
    folder = a_run(tmp_path / "a", command_name, **saved)
    filled = plain(recorded(preset_defaults(config, folder, command_name)))
    assert {flag: filled[flag] for flag in saved} == saved
    usual = plain(defaults(config))
    others = {flag: usual[flag] for flag in filled if flag in usual and flag not in saved}
    assert {flag: filled[flag] for flag in others} == others
