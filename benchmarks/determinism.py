"""Compare runs that should give the same numbers: twice, with other threads, processes and hosts.

    python -m benchmarks.determinism                       writes results/determinism.json
    python -m benchmarks.determinism --only hosts          one part: twice, threads, processes or hosts

The commands and settings are those that `tests/fuzz/kills.py` kills. Hosts are two network namespaces
of this machine (`ip netns`, needs root), each with an address of its own and nothing else in common but
the disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from fuzz import kills  # noqa: E402

from mech_absa.records import read_json, write_json  # noqa: E402

RESULT = HERE / "results" / "determinism.json"
NAMES = ("trace", "train", "matrix", "compare", "evaluate")
LAUNCH = ["-W", "ignore", "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


def run(name: str, out: Path, threads: int = 1) -> None:
    """Run a command in a process of its own with so many threads; a forked one could not start others."""
    words = ["-m", "mech_absa", kills.COMMANDS[name][0], *kills.line_of(name, out)]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", *words, "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE.parent)},
    )
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}")


def compared(name: str, one: Path, other: Path) -> dict[str, Any]:
    """Return the files that differ, the bytes that were compared, and the largest differences of numbers."""
    sizes = [p.stat().st_size for p in kills.files_of(one)]
    found = {"command": name, "files": len(sizes), "bytes": sum(sizes), "differ": kills.differences(one, other)}  # fmt: skip
    return found | {"largest": dict(_largest(one, other))}


def _largest(one: Path, other: Path) -> Iterator[tuple[str, float]]:
    """Yield the largest difference of each kind of number that both runs hold."""
    from safetensors.numpy import load_file

    if (one / "effects.parquet").exists():
        a, b = (pd.read_parquet(p / "effects.parquet")["effect"] for p in (one, other))
        yield "effects", float((a - b).abs().max())
    if (one / "edit.safetensors").exists():
        x, y = (load_file(p / "edit.safetensors") for p in (one, other))
        yield "weights", max(float(np.abs(x[k] - y[k]).max()) for k in x)
    for file, column in (("matrix.csv", "nll"), ("trainings.csv", "loss"), ("scores.csv", "nll")):
        if (one / file).exists():
            frames = [pd.read_csv(p / file) for p in (one, other)]
            if column in frames[0]:
                yield column, float((frames[0][column] - frames[1][column]).abs().max())
    if (one / "predictions.parquet").exists():
        frames = [pd.read_parquet(p / "predictions.parquet") for p in (one, other)]
        for column in frames[0].columns:
            values = [np.asarray(f[column].tolist()) for f in frames]
            if all(v.dtype.kind == "f" and v.size for v in values):
                yield column, float(np.nanmax(np.abs(values[0] - values[1]), initial=0.0))


def twice(folder: Path) -> list[dict[str, Any]]:
    """Run every command twice."""
    for name in NAMES:
        run(name, folder / f"{name}-2")
    return [compared(name, folder / name, folder / f"{name}-2") for name in NAMES]


def threads(folder: Path) -> list[dict[str, Any]]:
    """Run every command with two threads."""
    for name in NAMES:
        run(name, folder / f"{name}-threads", 2)
    return [compared(name, folder / name, folder / f"{name}-threads") for name in NAMES]


def launched(name: str, out: Path, *words: str, before: tuple[str, ...] = (), **env: str) -> Any:
    """Start `accelerate launch` for a command and return the process."""
    command, line = kills.COMMANDS[name][0], kills.line_of(name, out)
    module = ["-m", f"mech_absa.{command}", *line, "--device", "cpu"]
    return subprocess.Popen(
        [*before, sys.executable, *LAUNCH, *words, *module],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), **env},
    )


def processes(folder: Path) -> list[dict[str, Any]]:
    """Run trace and train in two and three processes; `--device cpu` names what `auto` takes here."""
    rows = []
    for name, number in (("trace", 2), ("trace", 3), ("train", 2)):
        out = folder / f"{name}-of-{number}"
        words = ["--num_machines", "1", "--num_processes", str(number), "--main_process_port", "0"]
        if launched(name, out, *words).wait():
            raise SystemExit(f"{name} in {number} processes failed")
        rows.append({"processes": number} | compared(name, folder / name, out))
    return rows


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Make two network namespaces with a cable between them; yield their names."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    names = [f"mechabsa{i}" for i in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "ma0", "netns", names[0], "type", "veth", "peer", "ma1", "netns", names[1])  # fmt: skip
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"ma{i}")
            ip("-n", name, "link", "set", f"ma{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def hosts(folder: Path) -> list[dict[str, Any]]:
    """Run trace on two hosts, one process each."""
    out = folder / "trace-hosts"
    with two_hosts() as names:
        running = []
        for rank, name in enumerate(names):
            words = ["--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
            words += ["--main_process_ip", "10.77.0.1", "--main_process_port", "29511"]
            inside = ("ip", "netns", "exec", name)
            running.append(
                launched("trace", out, *words, before=inside, GLOO_SOCKET_IFNAME=f"ma{rank}")
            )
        ended = [process.wait() for process in running]
        if any(ended):
            raise SystemExit("the trace on two hosts failed")
    return [{"hosts": 2} | compared("trace", folder / "trace", out)]


PARTS = {"twice": twice, "threads": threads, "processes": processes, "hosts": hosts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--folder", type=Path, help="keeps the runs; made anew where None")
    options = parser.parse_args(argv)
    found = read_json(RESULT) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        for command in NAMES:
            if not (folder / command / "run.json").exists():
                run(command, folder / command)
        for part in [options.only] if options.only else PARTS:
            found[part] = PARTS[part](folder)
            for row in found[part]:
                print(part, row, flush=True)
            write_json(RESULT, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
