"""A full disk, a folder that cannot be written, another process, a signal: one sentence, and a run that can be taken up."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from fuzz.kills import damaged, differences
from support.tiny_models import tiny_folder

from mech_absa.commands import patch

pytestmark = pytest.mark.slow

ROWS = [
    json.dumps({"text": f"the food was {word}", "aspect": "food", "polarity": p, "from": 4, "to": 8, "id": word}) + "\n"
    for word, p in (("great", "positive"), ("so awful", "negative"), ("fine", "neutral"))
]  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a run of two seconds."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(ROWS))
    words = "--keep all --noise-draws 2 --by role --adjustment none --quiet --template"
    return ["--model", str(tiny_folder("gpt2")), "--data", str(data), *words.split(), "{sentence} {aspect} ?"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert patch.cli([*flags, "--out", str(out)]) == 0
    return out


def one_sentence(capsys, *words: str) -> None:
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("mech_absa.patch: "), said
    assert all(word in said for word in words), said


def taken_up(flags, out: Path, whole: Path) -> None:
    """Resume a run and compare it with the one that nothing disturbed."""
    assert damaged(out) == []
    assert patch.cli([*flags, "--out", str(out), "--resume"]) == 0
    assert differences(whole, out) == []


@contextmanager
def longest_file(n: int):
    """Let no file grow beyond n bytes; the system refuses what would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n", [4_000, 12_000, 60_000], ids=["a part", "a table", "a figure"])
def test_a_file_that_may_not_grow(flags, whole, n, tmp_path, capsys):
    out = tmp_path / "run"
    with longest_file(n):
        assert patch.cli([*flags, "--out", str(out)]) == 2
    one_sentence(capsys, "File too large", "--resume")
    taken_up(flags, out, whole)


@contextmanager
def disk(folder: Path, size: str):
    """Mount a small disk in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    try:
        yield partial(subprocess.run, check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(flags, whole, tmp_path, capsys):
    where = tmp_path / "disk"
    with disk(where, "120k") as run:
        assert patch.cli([*flags, "--out", str(where / "run")]) == 2
        one_sentence(capsys, "No space left on device", "--resume")
        run(["mount", "-o", "remount,size=8m", str(where)])
        taken_up(flags, where / "run", whole)


def test_a_disk_that_can_only_be_read(flags, whole, tmp_path, capsys):
    where = tmp_path / "disk"
    with disk(where, "8m") as run:
        run(["mount", "-o", "remount,ro", str(where)])
        assert patch.cli([*flags, "--out", str(where / "run")]) == 2
        one_sentence(capsys, "Read-only file system")
        run(["mount", "-o", "remount,rw", str(where)])
        assert not list(where.iterdir())


def test_the_second_process_in_a_folder(flags, whole, tmp_path, capsys):
    out = tmp_path / "run"
    (out / ".run").mkdir(parents=True)
    with (out / ".run" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert patch.cli([*flags, "--out", str(out)]) == 2
    one_sentence(capsys, "is being written by another process")
    taken_up(flags, out, whole)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_in_the_middle(flags, whole, number, code, word, tmp_path, monkeypatch, capsys):
    write, out = patch.write_part, tmp_path / "run"

    def once(frame, path):
        write(frame, path)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(patch, "write_part", once)
        assert patch.cli([*flags, "--out", str(out)]) == code
    one_sentence(capsys, word, "--resume")
    taken_up(flags, out, whole)
