"""The plan of large sweeps: its tables are those of the page, and the job for Slurm starts what it says."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks" / "plan.py").exists():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
sys.path.append(str(ROOT))
plan = importlib.import_module("benchmarks.plan")


def test_the_tables_of_the_page_are_those_of_the_script():
    text = plan.PAGE.read_text(encoding="utf-8")
    assert plan.filled(text) == text and "| Llama-2-70B |" in text


def test_operations_by_hand():
    """7B: 32 layers, 60 tokens, 3 kinds are 5,760 cells; a pass of 60 tokens is 0.804 TFLOP."""
    share = 827955011584 / 3943327334400
    seven = plan.operations(plan.MODELS[0])
    assert seven == pytest.approx(5760 * share * 0.804e12, rel=1e-9)
    assert plan.operations(plan.MODELS[0], "role", 10) == pytest.approx(seven)


def test_the_job_starts_one_launcher_per_node(tmp_path):
    """Stand-ins: srun runs its command once per node, and accelerate says how it was called."""
    tools = {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s\\n" "$*"',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    more = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "PROCESSES_PER_NODE": "3",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "cluster.slurm"), "--data", "two words.xml", "--out", "x"],
        env={**os.environ, **more, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    for rank, line in enumerate((first, second)):
        assert f"--num_machines 2 --machine_rank {rank} --num_processes 6" in line
        assert "--main_process_ip node-a --main_process_port 29500" in line
        assert line.endswith("-m mech_absa.patch --data two words.xml --out x")
