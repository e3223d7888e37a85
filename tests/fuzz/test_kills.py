"""Killed commands resume to the same bytes; the comparison that says so can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fuzz import kills


def made(folder: Path, value: float = 1.0, seconds: float = 2.0) -> Path:
    """A folder of a run with every kind of file."""
    folder.mkdir()
    record = {"config": {"a": value}, "seconds": seconds, "deep": [{"sweep_seconds": seconds}]}
    (folder / "run.json").write_text(json.dumps(record))
    frame = pd.DataFrame({"effect": [value], "x": ["y"]})
    frame.to_parquet(folder / "effects.parquet", index=False)
    frame.assign(seconds=seconds).to_csv(folder / "history.csv", index=False)
    (folder / "report.html").write_text(f"<html>{seconds}</html>")
    return folder


def test_measured_seconds_are_no_difference_and_anything_else_is(tmp_path):
    one = made(tmp_path / "one")
    assert kills.differences(one, made(tmp_path / "two", seconds=9.0)) == []
    other = made(tmp_path / "other", value=1.0000001)
    assert kills.differences(one, other) == ["effects.parquet", "history.csv", "run.json"]
    (other / "sites.json").write_text("{}")
    assert "sites.json is in one of them only" in kills.differences(one, other)


def test_files_by_halves_are_seen(tmp_path):
    folder = made(tmp_path / "run")
    (folder / ".tmp-x.csv").write_bytes(b'"')
    assert kills.damaged(folder) == [], "what a killed process leaves is no file of the run"
    for name in ("run.json", "effects.parquet", "report.html"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-7])
    assert [line.split(":")[0] for line in kills.damaged(folder)] == [
        "effects.parquet", "report.html", "run.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_fifty_kills():
    """In a process of its own: it forks, which a process with threads must not."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", kills.__file__, "--kills", "50"], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-500:]
