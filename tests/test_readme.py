"""Every command and every line of code in the README runs, as it stands there."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for _, block in BLOCKS
    for line in block.splitlines()
    if line.startswith("python -m mech_absa") and "# not run" not in line
]
CODE = [block for language, block in BLOCKS if language == "python"]
GROUPS = {
    "patch": [
        "pairs",
        "corruption",
        "tracing",
        "search",
        "statistics",
        "reading",
        "question",
        "model",
        "run",
    ],
    "train": ["data", "place", "training", "reading", "question", "model", "run"],
    "evaluate": ["data", "scoring", "statistics", "reading", "question", "model", "run"],
    "matrix": ["data", "place", "training", "reading", "question", "model", "run"],
    "compare": ["selectors", "places", "training", "reading", "question", "model", "run"],
    "card": ["data", "statistics", "model", "run"],
    "doctor": ["corruption", "tracing", "reading", "question", "model"],
    "explore": ["reading", "question", "model"],
}
OUTPUT = [block for language, block in BLOCKS if language == "text"]


def test_the_readme_has_what_is_tested_here():
    assert len(COMMANDS) >= 6 and len(CODE) == len(OUTPUT) == 1
    assert all(
        "# not run:" in line
        for _, block in BLOCKS
        for line in block.splitlines()
        if "gpt2" in line and line.startswith("python -m")
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
def test_commands(tmp_path):
    """In their order, in one folder: a later one may use what an earlier one left."""
    for command in COMMANDS:
        argv = [sys.executable, *shlex.split(command, comments=True)[1:]]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


@pytest.mark.slow
def test_the_code_prints_what_the_readme_says(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE[0]],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == OUTPUT[0].strip()


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 180
    prose = [
        line
        for line in re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL).splitlines()
        if not line.startswith("|") and "<!--" not in line
    ]
    assert max(map(len, prose)) <= 110


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


@pytest.mark.parametrize("command", [*GROUPS, "report", "generate", "verify", "models"])
def test_help_names_every_flag_the_readme_uses(command, capsys):
    used = {
        flag
        for line in COMMANDS
        if f"mech_absa.{command} " in line
        for flag in re.findall(r"--[a-z-]+", line)
    }
    assert importlib.import_module(f"mech_absa.commands.{command}").cli(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in used), used
    assert "Examples:\n" in said and f"  mech-absa {command}" in said
    if command in GROUPS:  # the flags of long commands stand in groups, each with its sentence
        # A terminal gets boxes around the groups, a pipe or a file may get their titles alone.
        titles = re.findall(r"^\W*(\w+) options\b", said, flags=re.MULTILINE)
        assert titles[: len(GROUPS[command])] == GROUPS[command]
        first = said[: said.index(f"{titles[0]} options")]
        assert 0 < len(re.findall(r"^\W*--[a-z]", first, flags=re.MULTILINE)) <= 10


@pytest.mark.slow
def test_a_command_starts_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "mech_absa.patch", "--help"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "--corruption" in done.stdout
