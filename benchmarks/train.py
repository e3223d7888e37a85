"""Measure how fast the training of an edit is, beside the same edit as plain Hugging Face forward
hooks, in one process.

    python benchmarks/train.py --write                         every shape and row
    python benchmarks/train.py --shapes bundled --write        the small one: a minute

Both sides train the paper's edit (W_O low-rank and LoReFT at one token, rank 4, in the middle third
of the layers) of the same weights on the same prompts in the same batches with the same optimiser.
The peer is what one writes in an afternoon: `register_forward_hook` on the modules of a Hugging
Face model (its default attention), the base frozen so that autograd stops at the first edited layer
by itself, logits of all positions, a loss over the answer. Ours is `fit`: streams below the edit
kept, the unembedding at the answer only.

Rows: one epoch, three epochs, and a study of layer ranges (the middle third, its lower and its
upper part, two seeds each, one epoch) in which ours shares one cache and the peer has nothing to
share. Every row starts cold: filling the cache is part of it.

What is measured: CPU seconds of the process (which a busy machine does not inflate) and wall
seconds, with one torch thread; the most memory above what was held before, by the kernel's
high-water mark; floating-point operations of matrix products. Both losses are compared after the
first step, so that what is compared is the same computation.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mech_absa.edits import Edit
from mech_absa.model import Model, hooked_from_hf, kernels, load_model
from mech_absa.readers import load_examples
from mech_absa.records import versions, write_json, write_text
from mech_absa.scoring import question
from mech_absa.sites import Site
from mech_absa.train import PrefixCache, Preset, fit, presets
from mech_absa.train.memory import peak, reset_peak
from mech_absa.train.task import Prepared, Task
from mech_absa.train.training import batches

HERE = Path(__file__).parent
BATCH = 8


def bundled() -> tuple[Any, Model]:
    """Return the model that ships with the package: 8 x 160, vocabulary 4,096."""
    model = load_model("bundled")
    return transformers.AutoModelForCausalLM.from_pretrained(
        model.source, dtype=torch.float32
    ).eval(), model


def random_weights(config: Any) -> tuple[Any, Model]:
    """Return a model of a shape with random weights; the bundled tokenizer gives it prompts."""
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    return hf, Model(hooked_from_hf(hf), load_model("bundled").tokenizer, type(config).__name__)


SHAPES: dict[str, tuple[str, Callable[[], tuple[Any, Model]]]] = {
    "bundled": ("the bundled model: 8 x 160, vocabulary 4,096", bundled),
    "llama": (
        "Llama: 12 x 768, vocabulary 32,000",
        lambda: random_weights(
            transformers.LlamaConfig(
                vocab_size=32000,
                hidden_size=768,
                intermediate_size=2048,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=256,
            )
        ),
    ),
    "gpt2-small": (
        "GPT-2 small: 12 x 768, vocabulary 50,257",
        lambda: random_weights(transformers.GPT2Config()),
    ),
}


@dataclass(frozen=True)
class Config:
    """Training speed against plain Hugging Face hooks."""

    shapes: tuple[str, ...] = tuple(SHAPES)
    """Which models."""
    examples: int = 64
    """Training examples."""
    threads: int = 1
    """Torch threads."""
    write: bool = False
    """Write results/train.json and the table in README.md."""


# ---- the peer --------------------------------------------------------------------------------------------------------------------


class Peer:
    """The edit as plain hooks on a Hugging Face model; its parameters are copies of one of ours."""

    def __init__(self, hf: Any, edit: Edit):
        self.hf = hf.requires_grad_(False)
        self.parameters = nn.ModuleList(
            nn.ParameterDict({n: p.detach().clone() for n, p in i.named_parameters()}) for i in edit
        )
        self.positions: list[int] = []
        layers = hf.model.layers if hasattr(hf, "model") else hf.transformer.h
        self.handles = []
        for i, p in zip(edit, self.parameters, strict=True):
            block = layers[i.place.layer]
            if isinstance(i.place, Site):
                self.handles.append(block.register_forward_hook(self.reft(p)))
            else:
                module = (
                    block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj
                )
                self.handles.append(module.register_forward_hook(self.lora(p, i.scale)))

    def reft(self, p: Any):
        def hook(module, args, output):
            h = output if torch.is_tensor(output) else output[0]
            rows = torch.arange(len(self.positions))
            at = h[rows, self.positions]
            new = at + (at @ p["W"].T + p["b"] - at @ p["R"].T) @ p["R"]
            h = h.index_put((rows, torch.tensor(self.positions)), new)
            return h if torch.is_tensor(output) else (h, *output[1:])

        return hook

    def lora(self, p: Any, scale: float):
        return lambda module, args, output: output + (args[0] @ p["A"]) @ p["B"] * scale

    def loss(self, batch: Sequence[Prepared], labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the label columns of the answer's logits, out of all logits."""
        width = max(q.length for q in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, q in enumerate(batch):
            ids[row, : q.length], mask[row, : q.length] = q.runs[0].ids[0], 1
        self.positions = [q.prompt.positions(presets.LAST_OF_QUERY)[0] for q in batch]
        logits = self.hf(ids, attention_mask=mask, use_cache=False).logits
        answer = logits[torch.arange(len(batch)), [q.length - 1 for q in batch]][:, labels]
        return nn.functional.cross_entropy(answer, torch.tensor([q.gold for q in batch]))

    def train(
        self, questions: Sequence[Prepared], labels: torch.Tensor, preset: Preset, seed: int
    ) -> float:
        """`fit`'s loop; the loss of the first step."""
        groups = [
            {"params": list(p.parameters()), "lr": part.lr}
            for p, part in zip(self.parameters, preset.parts, strict=True)
        ]
        optimiser = torch.optim.AdamW(groups, weight_decay=0)
        first = math.nan
        for epoch in range(preset.epochs):
            for batch in batches([q.length for q in questions], preset.batch_size, seed, epoch):
                loss = self.loss([questions[i] for i in batch], labels)
                first = float(loss.detach()) if math.isnan(first) else first
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(
                    [q for g in groups for q in g["params"]], preset.clip
                )
                optimiser.step()
                for p in self.parameters:
                    if "R" in p:
                        Q, upper = torch.linalg.qr(p["R"].data.T)
                        p["R"].data = (Q * upper.diagonal().sign()).T
        return first

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


# ---- measuring -------------------------------------------------------------------------------------------------------------------


def measured(work: Callable[[], float]) -> dict[str, float]:
    """CPU and wall seconds, memory above what was held, and the loss of the first step."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(
            0
        )  # free pages that are still held would hide what is needed
    device = torch.device("cpu")
    reset_peak(device)
    before, cpu, wall = peak(device), time.process_time(), time.perf_counter()
    loss = work()
    return {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_mib": (peak(device) - before) / 2**20,
        "first_loss": loss,
    }


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Our large products through the BLAS that the peer's run on, so that what the product itself gains can be told from the rest."""
    before, kernels.ONEDNN = kernels.ONEDNN, False
    try:
        yield
    finally:
        kernels.ONEDNN = before


def flops(work: Callable[[], Any]) -> int:
    """Of matrix products; the counter does not know oneDNN's own operator."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops()


def studies(n_layers: int) -> dict[str, list[tuple[range, int, int]]]:
    """Row -> the trainings in it, as (layers, epochs, seed)."""
    third = max(2, round(n_layers / 3))
    low = (n_layers - third) // 2
    middle = range(low, low + third)
    ranges = (middle, range(low, low + third // 2), range(low + third // 2, low + third))
    return {
        "one epoch": [(middle, 1, 0)],
        "three epochs": [(middle, 3, 0)],
        "layer-range study": [(r, 1, seed) for r in ranges for seed in (0, 1)],
    }


def preset(layers: range, epochs: int) -> Preset:
    made = presets.bundled(presets.range_sites(layers), "both", epochs=epochs)
    return made.but(batch_size=BATCH, schedule="constant", warmup=0.0)


def run(shape: str, config: Config) -> dict[str, Any]:
    """Measure one shape and return its rows."""
    title, make = SHAPES[shape]
    hf, model = make()
    examples = load_examples("builtin:restaurant/train").sample(config.examples)
    task = Task(model, "labels", None, None, PrefixCache(model))
    questions = task.prepare(examples.items)
    labels = torch.tensor([ids[0] for _, ids in task.continuations[0].labels])
    assert len(task.continuations) == 1
    rows: dict[str, Any] = {}
    warm = fit(
        model, examples.items[:BATCH], preset(range(1, 2), 1)
    )  # allocations, tables of rotations, kernels
    peer = Peer(hf, warm)
    peer.train(questions[:BATCH], labels, preset(range(1, 2), 1), 0)
    peer.close()
    for name, trainings in studies(model.n_layers).items():

        def ours(trainings=trainings) -> float:
            cache = PrefixCache(model)
            edits = [
                fit(model, examples.items, preset(layers, epochs), seed=seed, cache=cache)
                for layers, epochs, seed in trainings
            ]
            return edits[0].history[0]["loss"]

        def theirs(trainings=trainings) -> float:
            losses = []
            for layers, epochs, seed in trainings:
                how = preset(layers, epochs)
                peer = Peer(hf, Edit.fresh(model, how.parts, seed))
                losses.append(
                    peer.train(task.prepare(examples.items), labels, how, seed)
                )  # ours tokenises in every training too
                peer.close()
            return losses[0]

        a, b = measured(ours), measured(theirs)
        with without_onednn():
            slow = measured(ours)
        n = sum(epochs for _, epochs, _ in trainings) * len(examples)
        rows[name] = {
            "ours": a, "peer": b, "ours_without_onednn": slow, "faster_without_onednn": b["cpu_seconds"] / slow["cpu_seconds"], "examples": n, "faster": b["cpu_seconds"] / a["cpu_seconds"], "faster_wall": b["wall_seconds"] / a["wall_seconds"],
            "examples_per_cpu_second": n / a["cpu_seconds"], "peer_examples_per_cpu_second": n / b["cpu_seconds"],
            "difference_of_first_loss": abs(a["first_loss"] - b["first_loss"]),
        }  # fmt: skip
        if name == "one epoch":
            with without_onednn():
                rows[name] |= {"gflop": flops(ours) / 1e9, "peer_gflop": flops(theirs) / 1e9}
        print(
            f"{shape}, {name}: {rows[name]['faster']:.2f} x by CPU time, {rows[name]['faster_wall']:.2f} x by the clock",
            flush=True,
        )
    tokens = sum(question(model, e).lengths[0] for e in examples) / len(examples)
    load = [round(x, 1) for x in os.getloadavg()]
    return {
        "title": title, "rows": rows, "tokens_a_prompt": round(tokens, 1), "batch": BATCH, "threads": config.threads, "load_average": load,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "versions": versions(),
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    lines = [
        "| model | row | examples a CPU second, ours | the peer | times faster | without oneDNN | MiB, ours | the peer | GFLOP, ours | the peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in results.values():
        for name, r in entry["rows"].items():
            work = f"{r['gflop']:,.0f} | {r['peer_gflop']:,.0f}" if "gflop" in r else " | "
            lines.append(
                f"| {entry['title']} | {name} | {r['examples_per_cpu_second']:.1f} | {r['peer_examples_per_cpu_second']:.1f} | **{r['faster']:.2f}** | {r['faster_without_onednn']:.2f} | "
                f"{r['ours']['peak_mib']:.0f} | {r['peer']['peak_mib']:.0f} | {work} |"
            )
    lines.append("")
    for e in results.values():
        apart = max(r["difference_of_first_loss"] for r in e["rows"].values())
        lines.append(
            f"- {e['title']}: prompts of {e['tokens_a_prompt']} tokens, batches of {e['batch']}; {e['threads']} thread; {e['when']}, load average "
            f"{e['load_average'][0]}; the losses of the first step differ by {apart:.1g}."
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    random.seed(0)
    path = HERE / "results" / "train.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for shape in config.shapes:
        results[shape] = run(shape, config)
        if config.write:
            write_json(path, results)
    made = table(results)
    print(made)
    if config.write:
        readme = HERE / "README.md"
        text, begin, end = (
            readme.read_text(encoding="utf-8"),
            "<!-- train: begin -->",
            "<!-- train: end -->",
        )
        if begin not in text:
            text += f"\n## Training\n\n{begin}\n{end}\n"
        write_text(
            readme,
            text[: text.index(begin) + len(begin)] + "\n" + made + "\n" + text[text.index(end) :],
        )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
