"""A full disk, a folder that cannot be written, another process, a signal: one sentence, and a run that can be taken up."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
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


def test_a_full_disk(flags, whole, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no small disk can be made here")
    try:
        assert patch.cli([*flags, "--out", str(disk / "run")]) == 2
        one_sentence(capsys, "No space left on device", "--resume")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        taken_up(flags, disk / "run", whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def nobody():
    """Be a user whom the permissions of files concern."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(mine)


def test_a_folder_that_cannot_be_written(flags, whole, capsys):
    # `whole` has imported everything: where Python itself lies, nobody may not read.
    model, data = Path(flags[1]), Path(flags[3])
    for path in (model, model.parent, data.parent, data.parent.parent):
        path.chmod(0o755)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        rows.write_text("".join(ROWS))
        words = [str(rows) if word == str(data) else word for word in flags]
        folder.chmod(0o555)
        with nobody():
            assert patch.cli([*words, "--out", str(folder / "run")]) == 2
        folder.chmod(0o755)
        one_sentence(capsys, "run", "Permission denied")
        assert [p.name for p in folder.iterdir()] == ["rows.jsonl"]


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
