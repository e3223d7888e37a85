"""`mech-absa doctor`, or `python -m mech_absa.doctor`: will a trace of my data work here, and what will it cost?

    mech-absa doctor                                                   the bundled model on built-in reviews
    mech-absa doctor --data reviews.csv --model gpt2 --by role         the trace that you plan
    mech-absa doctor --json                                            the same for a program

Looks at the machine, compares the model's logits with Hugging Face's, asks the model about some reviews, traces a few of them with all
self-checks, and reckons from the time that these took. It writes no file. Exit code 1 where a check of the engine fails.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
from tyro.conf import OmitArgPrefixes, arg

from ..errors import SelfCheckError
from ..model import load_model
from ..patch.pairs import Pairs, make_pairs
from ..patch.plan import Plan, plan
from ..patch.self_check import self_check
from ..sites import parse_layers
from . import before, patch
from .cli import command, tell_left_out
from .flags import (
    ModelFlags,
    OptionalInt,
    QuestionFlags,
    ReadFlags,
    Sources,
    at_least,
)
from .machine import Machine, crowding
from .verify import LARGEST

TEXT = "The food was great, but the service was slow."


@dataclass(frozen=True)
class Config:
    """Check this machine, a model and the engine, and reckon what a trace of your data will cost.

    The flags are those of patch. Nothing is written.

    Examples:
      mech-absa doctor
      mech-absa doctor --data reviews.csv --model gpt2 --by role
    """

    data: Sources = ("builtin:restaurant+laptop/train",)
    """Files, folders, hub data sets (hf:owner/name), or built-in reviews; several are joined."""
    limit: OptionalInt = None
    """The number of pairs that you plan to trace. Default: all that the data may give."""
    tried: int = 4
    """Pairs that are traced now."""
    asked: int = 24
    """Examples that the model is asked about now."""
    adapter: str = "auto"
    """A trained edit whose weights are merged before tracing: a folder, bundled, bundled-v2, or none.
    auto is bundled for the models that one ships for (bundled, smollm2) and none otherwise."""
    seed: int = 0
    """Seed of the examples that are asked about, and of the self-checks."""
    json: bool = False
    """Print one JSON object instead of sentences."""
    corrupt: Annotated[OmitArgPrefixes[patch.CorruptionFlags], arg(name="corruption")] = field(
        default_factory=patch.CorruptionFlags
    )
    sweep: Annotated[OmitArgPrefixes[patch.StateFlags], arg(name="tracing")] = field(
        default_factory=patch.StateFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)

    @property
    def trace(self) -> patch.Config:
        """Return the trace that is planned."""
        return patch.Config(
            data=self.data,
            adapter=self.adapter,
            seed=self.seed,
            pairs=patch.PairFlags(limit=self.asked, keep="all"),
            corrupt=self.corrupt,
            sweep=patch.SweepFlags(**vars(self.sweep)),
            reading=self.reading,
            question=self.question,
            model=self.model,
        )


@dataclass(frozen=True)
class Findings:
    """Hold what was seen.

    Attributes:
        machine: the machine.
        model: name and shape, the weights in GiB, and the largest difference of logits to Hugging
            Face.
        task: how many examples there are; of those asked about, the accuracy, the probability on
            the label words, and the share that make a pair.
        engine: name, cells of the trial, the largest difference of each self-check.
        cost: pairs, minutes and GiB of the planned trace.
        advice: sentences.
        sound: whether every check held.
    """

    machine: Machine
    model: dict[str, Any]
    task: dict[str, Any]
    engine: dict[str, Any]
    cost: dict[str, Any]
    advice: tuple[str, ...]
    sound: bool


def examine(config: Config) -> Findings:
    """Look at everything, in the order in which a trace needs it.

    Raises:
        MechAbsaError: the flags, the data or the model are not accepted.
    """
    at_least(1, tried=config.tried, asked=config.asked, limit=config.limit)
    wanted = config.trace
    patch.check_flags(wanted)
    machine = Machine.here()
    examples = patch.read_data(wanted)
    tell_left_out(examples)
    m = config.model
    base = load_model(m.model, device=m.device, dtype=m.dtype, backend=m.backend)
    model, adapter = patch.adapted(wanted, base)
    layers = parse_layers(config.sweep.layers, base.n_layers)
    weights = base.n_bytes
    about_model = {
        "name": base.name,
        "shape": str(base),
        "adapter": adapter,
        "weights_gib": weights / 2**30,
        "difference_to_hugging_face": None if base.source is None else base.verify([TEXT]),
        "engine_refusal": base.refusal,
    }
    pairs = make_pairs(
        model,
        examples.sample(config.asked, config.seed),
        patch.corruption_of(wanted, examples),
        template=config.question.prompt,
        verbalizer=config.question.verbalizer,
        keep="all",
        strict=config.reading.strict,
    )
    considered = max(1, pairs.considered)
    known = before.account(pairs)
    task = {"examples": len(examples), "asked": pairs.considered, "pairs": len(pairs), **known}
    planned = math.ceil(len(examples) * len(pairs) / considered)
    planned = planned if config.limit is None else min(planned, config.limit)
    p = plan(model, _typical(pairs, config.tried), patch.request_of(wanted, layers))
    engine, seconds = _trial(p, config.seed)
    cost = {
        "pairs": planned,
        "minutes": planned * seconds / len(p.pairs) / 60,
        "gib": (2 * weights if adapter else weights) / 2**30 + p.memory / 2**30,
        "peak_gib_now": _peak_gib(),
    }
    sentences = tuple(
        advice(config, machine, about_model, task, cost, before.warnings(p, examples))
    )
    return Findings(machine, about_model, task, engine, cost, sentences, engine["sound"])


def _typical(pairs: Pairs, n: int) -> Pairs:
    """Return the pairs whose lengths are the quantiles of all lengths."""
    by_length = sorted(pairs, key=lambda pair: pair.length)
    if len(by_length) <= n:
        return pairs
    places = np.linspace(0, len(by_length) - 1, n + 2)[1:-1].round().astype(int)
    return replace(pairs, items=tuple(by_length[i] for i in places))


def _trial(p: Plan, seed: int) -> tuple[dict[str, Any], float]:
    """Trace a plan, check its identities, and return what was seen and the seconds of the sweep."""
    start = time.perf_counter()
    for _ in p.iterate():
        pass
    seconds = time.perf_counter() - start
    try:
        checks, failure = self_check(p, seed=seed), None
    except SelfCheckError as error:
        checks, failure = {}, str(error)
    e = p.estimate()
    return {
        "name": e["engine"],
        "why_loop": p.why_loop,
        "pairs": len(p.pairs),
        "cells": p.cells,
        "seconds": seconds,
        "self_checks": checks,
        "failure": failure,
        "sound": failure is None,
    }, seconds


def _peak_gib() -> float:
    """Return the most memory that this process has held, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def advice(
    config: Config,
    machine: Machine,
    model: dict[str, Any],
    task: dict[str, Any],
    cost: dict[str, Any],
    notes: Sequence[str],
) -> Iterator[str]:
    """Yield what to do about what was seen, a sentence each."""
    difference = model["difference_to_hugging_face"]
    if difference is not None and config.model.dtype == "float32" and not difference <= LARGEST:
        yield (
            f"the logits differ from Hugging Face's by {difference:.2g}, more than rounding explains: "
            "do not trust a trace of this model before you know why"
        )
    if (crowd := crowding(machine.threads, machine.cores, machine.others)) is not None:
        yield crowd
    if machine.devices and config.model.device == "cpu":
        yield f"{machine.devices[0]} is free to use: --device auto"
    if cost["gib"] > machine.free_gib and not machine.devices:
        yield (
            f"the trace needs about {cost['gib']:.1f} GiB and {machine.free_gib:.1f} GiB are free: "
            "lower --memory, or --dtype bfloat16"
        )
    if cost["minutes"] > 30 and config.sweep.by == "token":
        yield "--by role costs about a tenth of --by token; --limit takes fewer pairs"
    yield from notes
    if task["pairs"] < task["asked"] / 2:
        yield (
            f"only {task['pairs']} of {task['asked']} examples make a pair with this corruption: "
            "patch names the reasons"
        )


def spelled(seen: Findings) -> Iterator[str]:
    """Yield what was seen, as lines."""
    m, model, task, engine = seen.machine, seen.model, seen.task, seen.engine
    named = ", ".join(f"{k} {v}" for k, v in m.versions.items())
    yield f"machine   {m.system}; {named}"
    devices = "; ".join(m.devices) or "no accelerator"
    yield (
        f"          {m.cores} cores, {m.others:.1f} of them used by others; {m.threads} PyTorch threads; "
        f"{m.free_gib:.1f} of {m.memory_gib:.1f} GiB free; {devices}"
    )
    adapter = f" with adapter {model['adapter']}" if model["adapter"] else ""
    yield f"model     {model['shape']}{adapter}; weights {model['weights_gib']:.2f} GiB"
    if model["difference_to_hugging_face"] is not None:
        yield f"          logits differ from Hugging Face's by {model['difference_to_hugging_face']:.2g}"
    accuracy = task["clean_accuracy"]
    if accuracy is not None:
        yield (
            f"task      {accuracy:.0%} of {task['asked']} examples answered right; the label words hold "
            f"{task['label_mass']:.2g} of the probability; {task['pairs']} make a pair"
        )
    yield f"engine    {engine['name']}: {engine['cells']:,} cells of {engine['pairs']} pairs in {engine['seconds']:.1f} s"
    if engine["why_loop"]:
        yield f"          the plain loop, because {engine['why_loop']}"
    numbers = {k: v for k, v in engine["self_checks"].items() if isinstance(v, float)}
    off = ", ".join(f"{k} {v:.1g}" for k, v in numbers.items() if k != "tolerance")
    yield f"          self-checks: {engine['failure'] or off}"
    yield (
        f"cost      {seen.cost['pairs']:,} pairs: about {seen.cost['minutes']:.1f} minutes and "
        f"{seen.cost['gib']:.1f} GiB here, if the machine stays as busy as it is"
    )
    yield from (f"advice    {sentence}" for sentence in seen.advice or ("none: go ahead",))


def main(config: Config) -> Findings:
    """Print what was seen, and return it.

    Raises:
        SelfCheckError: a check of the engine failed; all else was printed.
    """
    seen = examine(config)
    if config.json:
        print(json.dumps(asdict(seen), indent=1, default=str, allow_nan=False))
    else:
        for line in spelled(seen):
            print(line)
    if not seen.sound:
        raise SelfCheckError(seen.engine["failure"])
    return seen


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.doctor", argv)


__all__ = ["Config", "Findings", "cli", "examine", "main"]
