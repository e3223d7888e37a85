"""Several processes that train one edit: it is the edit of one process up to rounding, and one of them alone writes and speaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import TEXT, WORDING, write

from mech_absa.commands.train import cli
from mech_absa.edits import load_edit

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0", "-m", "mech_absa.train"]  # fmt: skip
"""`--cpu` would start one process, whatever number it is given."""


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Two halves of an edit, no dropout, batches of three (so that the processes' shares differ), a validation share."""
    data = write(tmp_path / "toys.jsonl", WORDING)
    return ["--data", data, "--model", str(tiny_folder("llama")), "--template", TEXT, "--layers", "1-2", "--epochs", "4", "--batch-size", "3",
            "--validation", "0.3", "--device", "cpu", "--checkpoint-every", "1"]  # fmt: skip


def launch(flags: list[str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*LAUNCH, *flags, "--out", str(out), *more],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("preset", ["both", "joint_orthogonal", "tinylora"])
def test_two_processes_train_the_edit_of_one(flags, tmp_path, preset):
    flags += ["--preset", preset]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli([*flags, "--out", str(one), "--quiet"]) == 0
    done = launch(flags, two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1 and done.stdout.count("Edit(") == 1
    record = json.loads((two / "run.json").read_text())
    assert record["edit"]["processes"] == 2 and {p.name for p in two.iterdir()} == {
        p.name for p in one.iterdir()
    }
    a, b = load_edit(one), load_edit(two)
    moved = [
        float((x - y).detach().abs().max())
        for x, y in zip(a.parameters(), b.parameters(), strict=True)
    ]
    assert max(moved) < 2e-4 < 0.02 < max(float(x.detach().abs().max()) for x in a.parameters())
    for i in b:
        if i.family == "loreft":
            assert torch.allclose(i.R @ i.R.T, torch.eye(4), atol=1e-6)


def test_two_killed_processes_resume_together(flags, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launch(flags, whole, "--quiet").returncode == 0
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(
        [*LAUNCH, *flags, "--out", str(cut), "--quiet"],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 120
    while (
        not (cut / ".run" / "state.safetensors").exists()
        and running.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    if (cut / "run.json").exists():
        pytest.skip("it was over before it could be killed")
    done = launch(flags, cut, "--quiet", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (cut / "edit.safetensors").read_bytes() == (whole / "edit.safetensors").read_bytes()


def test_one_of_them_says_what_is_wrong(flags, tmp_path):
    done = launch([*flags, "--rank", "0"], tmp_path / "out")
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert done.stderr.count("rank 0 was asked for at L1.W_O; accepted: 1 to 32") == 1
