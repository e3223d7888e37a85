"""What makes a map again outside of the page: its data, the command, and the Python code."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..examples import Example
from ..prompts import PromptTemplate, Verbalizer
from ..readers import write_jsonl
from .ask import Question, asked_examples, corruption_of
from .state import Corruptions, State

FILE = "review.jsonl"
WORD = {
    Corruptions.EDIT: "counterfactual",
    Corruptions.SWAP: "aspect-swap",
    Corruptions.NOISE: "noise",
}


def recipe(q: Question, state: State, words: Sequence[str], train: str) -> dict[str, Any]:
    """Return the data, the commands and the Python code of a state.

    Args:
        q: the model and how it is asked.
        state: whose two runs line up.
        words: flags that load the same model; none where it was not loaded by a command.
        train: where edits learn from.

    Raises:
        MechAbsaError: the state asks nothing.
    """
    examples = asked_examples(q, state)
    edit = [*words, "--sites", *state.sites] if state.sites else []
    training = [
        "train", "--data", train, "--limit", str(state.examples), "--epochs", str(state.epochs),
        "--validation", "0",
    ]  # fmt: skip
    return {
        "file": FILE,
        "data": jsonl(examples),
        "command": _line(["patch", *patch_words(state), *words]) if words else None,
        "train": _line([*training, *(w for w in edit if not w.startswith("--adapter"))]) if words and edit else None,
        "python": python(q, state, examples),
    }  # fmt: skip


def _line(words: Sequence[str]) -> str:
    return "mech-absa " + shlex.join(words)


def patch_words(state: State) -> list[str]:
    """Return the flags of `mech-absa patch` that trace the same cells."""
    words = [
        "--data", FILE, "--limit", "1", "--head", "--keep", "all", "--corruption",
        WORD[Corruptions(state.corruption)], "--sites", *state.kinds, "--metric", state.metric,
        "--direction", state.direction,
    ]  # fmt: skip
    if state.corruption == Corruptions.NOISE:
        words += [
            "--noise-scale", f"{state.scale:g}", "--noise-draws", str(state.draws), "--noise-span",
            state.span, "--seed", str(state.seed),
        ]  # fmt: skip
    return words


def jsonl(examples: Sequence[Example]) -> str:
    """Return examples as the JSON lines that `write_jsonl` writes."""
    with tempfile.TemporaryDirectory() as folder:
        return write_jsonl(examples, Path(folder) / FILE).read_text(encoding="utf-8")


def python(q: Question, state: State, examples: Sequence[Example]) -> str:
    """Return code that traces the same cells; `model` is loaded before, unless it is the bundled one."""
    asked = {"template": (q.template, PromptTemplate()), "verbalizer": (q.verbalizer, Verbalizer())}
    options = ["keep='all'", "limit=1"]
    if q.template != asked["template"][1]:
        options.append(f"template=ma.PromptTemplate({q.template.text!r})")
    if q.verbalizer != asked["verbalizer"][1]:
        spelled = {p.value: w for p, w in q.verbalizer.words}
        options.append(f"verbalizer=ma.Verbalizer.of({spelled!r}, {q.verbalizer.separator!r})")
    load = "ma.load_model()" if q.model.name == "bundled" else f"ma.load_model({q.model.name!r})"
    listed = ",\n    ".join(_example(e) for e in examples)
    corruption = repr(corruption_of(state))
    return (
        f"import mech_absa as ma\n\nmodel = {load}\nreviews = [\n    {listed},\n]\n"
        f"pairs = ma.make_pairs(model, reviews, ma.{corruption}, {', '.join(options)})\n"
        f"effects = ma.trace(\n    model, pairs, {list(state.kinds)!r},\n"
        f"    metric={state.metric!r}, direction={state.direction!r},\n)\n"
    )


def _example(e: Example) -> str:
    parts = [repr(e.sentence), repr(e.aspect), f"ma.Polarity({e.polarity.value!r})", repr(e.span)]
    if e.id:
        parts.append(f"id={e.id!r}")
    if e.counterfactuals:
        parts.append(f"counterfactuals=({''.join(_example(c) + ',' for c in e.counterfactuals)})")
    return f"ma.Example({', '.join(parts)})"


__all__ = ["FILE", "patch_words", "python", "recipe"]
