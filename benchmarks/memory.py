"""Measure the memory and the time of `mech-absa patch` as the number of examples grows.

    python -m benchmarks.memory             writes results/memory.json, one line per run as it ends
    python -m benchmarks.memory --only 20   one size
    python -m benchmarks.memory --only smollm2   one shipped model

The model is a random GPT-2 of two layers with the tokenizer of the bundled model, so that 10,000
examples take minutes; what is kept per example does not depend on the size of the model. Every run
traces one pair per example by role, with all kinds of state but heads, and 2 draws of noise. The peak
is that of the whole process (`ru_maxrss`), the report and the figures included.

The shipped models trace a few built-in reviews by role, as `make demo` does, with the default budget.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mech_absa as ma
from mech_absa.records import read_json, write_json

HERE = Path(__file__).parent
RESULT = HERE / "results" / "memory.json"
RUNS = ((20, 0.05), (1_000, 0.05), (10_000, 0.05), (20, 0.5), (1_000, 0.5))
"""Examples, and --memory in GiB."""
SHIPPED = (("bundled", 20), ("smollm2", 8))
"""Models that are shipped or fetched by name, and pairs."""
DOMAINS = ("restaurant", "laptop", "device", "service")


def rows_of(n: int) -> Iterator[dict[str, Any]]:
    """Yield built-in reviews as JSON lines hold them; every round over them begins with other words."""
    known = [e for d in DOMAINS for e in ma.load_examples(f"builtin:{d}/train")]
    for i in range(n):
        e, start = known[i % len(known)], f"Visit {i // len(known)}: "
        assert e.span is not None
        yield {
            "id": f"{i:05d}", "text": start + e.sentence, "aspect": e.aspect, "polarity": e.polarity.value,
            "from": e.span[0] + len(start), "to": e.span[1] + len(start), "domain": e.domain,
        }  # fmt: skip


def random_model(folder: Path) -> None:
    """Write a random GPT-2 of two layers with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(Path(ma.__file__).parent / "assets" / "model")
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=end,
        eos_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(words: list[str], out: Path) -> dict[str, Any]:
    """Trace in a process of its own and return what it took."""
    words = ["-m", "mech_absa.patch", *words, "--out", str(out), "--quiet"]
    start = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-W", "ignore", *words], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise SystemExit(f"mech-absa patch {' '.join(words[2:])} ended with {code}")
    made = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {
        "pairs": made["pairs"]["kept"],
        "effects": made["engine"]["cells"],
        "peak_mib": round(usage.ru_maxrss / 1024),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "effects_mib": round((out / "effects.parquet").stat().st_size / 2**20, 1),
    }


def of_size(n: int, memory: float, folder: Path) -> dict[str, Any]:
    """Return what a trace of n examples takes on the random model."""
    data = folder / f"{n}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(n)), encoding="utf-8")
    words = ["--model", str(folder / "model"), "--data", str(data), "--keep", "all", "--by", "role"]
    words += ["--noise-draws", "2", "--adapter", "none", "--memory", str(memory)]
    known = {"examples": n, "memory_gib": memory}
    return known | measure(words, folder / f"run-{n}-{memory}")


def of_model(name: str, pairs: int, folder: Path) -> dict[str, Any]:
    """Return what a trace of a shipped model takes."""
    words = ["--model", name, "--limit", str(pairs), "--by", "role"]
    return measure(words, folder / name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a number of examples, or the name of a model")
    only = parser.parse_args(argv).only
    kept = read_json(RESULT) if RESULT.exists() else {}
    runs, models = kept.get("runs", []), kept.get("models", {})
    done = {(row["examples"], row["memory_gib"]) for row in runs}

    def keep() -> None:
        threads = os.environ.get("OMP_NUM_THREADS")
        write_json(RESULT, {"threads": threads, "runs": runs, "models": models})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(folder / "model")
        for n, memory in RUNS:
            if (n, memory) not in done and only in (None, str(n)):
                runs.append(of_size(n, memory, folder))
                print(runs[-1], flush=True)
                keep()
        for model, pairs in SHIPPED:
            if model not in models and only in (None, model):
                models[model] = of_model(model, pairs, folder)
                print(model, models[model], flush=True)
                keep()
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
