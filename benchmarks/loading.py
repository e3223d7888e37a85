"""Measure the memory that loading a model takes, through every backend of the installed TransformerLens.

    python -m benchmarks.loading             SmolLM2, or what --model names; keeps results/loading.json
    python -m benchmarks.loading --random    a random Llama of 1.1 billion parameters in bfloat16

Every load runs in a process of its own, with the check against Hugging Face that `load_model` does.
The numbers are the kernel's: what the process holds at most (`VmHWM`) and after loading (`VmRSS`),
above what it held with all libraries imported. Run it once per version; other rows stay in the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mech_absa.records import read_json, write_json

RESULT = Path(__file__).parent / "results" / "loading.json"
VERSION = importlib.metadata.version("transformer-lens")
RANDOM = "random Llama, 1.1 billion, bfloat16"
MIB = 1024
"""KiB."""


def held(name: str) -> int:
    """Return a line of the kernel's account of this process, in MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) // MIB


def load(model: str, backend: str, dtype: str) -> dict[str, float]:
    """Load a model in this process and return what it took, in MiB, and how far its logits are from
    Hugging Face's.
    """
    import mech_absa as ma

    ma.load_model(backend=backend)  # every library, with a model of 16 MB
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts anew
    loaded = ma.load_model(model, backend=backend, dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in {*loaded.hooked.parameters()}) // MIB**2
    now = held("VmRSS") - before
    peak, off = held("VmHWM") - before, loaded.hf_difference
    return {"weights_mib": weights, "peak_mib": peak, "after_mib": now, "hf_difference": off}


def random_llama(folder: Path) -> str:
    """Write a random Llama of TinyLlama's shape, with the tokenizer of the bundled model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mech_absa.model import BUNDLED

    shape = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, vocab_size=32000)
    config = LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=4)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return str(folder)


def measure(name: str, source: str, backend: str, dtype: str) -> dict[str, Any]:
    """Load in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.loading", "--load", source, backend, dtype]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr.strip().splitlines()[-1])
    spent = json.loads(ran.stdout.splitlines()[-1])
    return {"model": name, "version": VERSION, "backend": backend, "dtype": dtype} | spent


def main(argv: list[str] | None = None) -> int:
    """Measure every backend of the installed version, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.load:
        print(json.dumps(load(*given.load)))
        return 0
    backends = ("hooked", "bridge") if VERSION.startswith("3.") else ("bridge",)
    with tempfile.TemporaryDirectory() as folder:
        source = random_llama(Path(folder)) if given.random else given.model
        name, dtype = (RANDOM, "bfloat16") if given.random else (given.model, "float32")
        new = [measure(name, source, backend, dtype) for backend in backends]
    keys = ("model", "version", "backend")
    rows = read_json(RESULT)["rows"] if RESULT.exists() else []
    rows = {tuple(r[k] for k in keys): r for r in [*rows, *new]}
    for row in new:
        print(row)
    write_json(RESULT, {"rows": [rows[k] for k in sorted(rows)]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
