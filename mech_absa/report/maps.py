"""Effects -> numbers small enough to travel inside a page.

Averages go as they are, to four digits. Single examples are many: the map of one prompt and kind is
stored as one byte a cell, signed, times a scale of its own (base64), so that 1,000 prompts of 40
tokens in 12 layers and three kinds need about 2 MiB, at an error of at most half a 127th of the
map's largest effect. Where even that is too much, a sample of the examples is kept, and the page
says so.
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..sites import HEAD_KINDS, ROLES, in_reading_order
from .runs import EffectRows, Run
from .text import digits

BUDGET = 8 << 20
"""Bytes of the maps of single examples in one page, before base64 makes four of three."""
NOTHING = -128
"""A cell that does not exist."""


def quantised(values: Float[np.ndarray, "row layer"]) -> tuple[float, str]:
    """(scale, base64 of one signed byte a cell, row by row): value = scale * byte, -128 where the
    value is NaN.
    """
    known = np.isfinite(values)
    scale = float(np.abs(values[known]).max()) / 127 if known.any() else 0.0
    scale = float(f"{scale:.6g}") if scale > 1e-30 else 0.0
    whole = np.full(values.shape, NOTHING, dtype=np.int8)
    whole[known] = (
        np.clip(np.rint(values[known] / scale), -127, 127).astype(np.int8) if scale else 0
    )
    return scale, base64.b64encode(whole.tobytes()).decode("ascii")


def spaced(tokens: Sequence[str], text: str) -> list[str]:
    """Tokens with the blanks that stand before them in the prompt.

    A tokenizer of words and their blanks, asked for the text of one token, may leave the blank out
    (sentencepiece does), and a prompt read from such pieces runs together. Tokens that are not
    found where they should be (bytes of a character, BOS) stay as they are.
    """
    made, at = [], 0
    for token in tokens:
        bare = token.strip()
        if not bare and text.startswith(token, at):
            at += len(token)
        start = text.find(bare, at, at + len(bare) + 4) if bare else -1
        if start < 0 or text[at:start].strip():
            made.append(token)
            continue
        made.append(text[at:start] + bare)
        at = start + len(bare)
    return made


def average(table: pd.DataFrame, sites: Iterable[str] = ()) -> dict[str, Any]:
    """Return an importance map as one object per kind, with its cells as rows.

    Args:
        table: an importance.csv.
        sites: names of the chosen sites.
    """
    by = "role" if "role" in table else "position"
    chosen = set(map(str, sites))
    kinds = []
    for kind, rows in table.groupby("kind", sort=False):
        present = rows[by].unique()
        places = in_reading_order(present) if by == "role" else sorted(present)
        index = {p: i for i, p in enumerate(places)}
        heads = kind in HEAD_KINDS
        cells: list[list[Any]] = [
            [
                int(r.layer), int(r.head), index[getattr(r, by)], digits(r.aie), digits(r.ci_low), digits(r.ci_high),
                digits(r.p_adjusted, 2), int(r.n),
                int(f"L{r.layer}.{kind}{r.head if heads else ''}@{getattr(r, by)}" in chosen),
            ]
            for r in rows.itertuples()
        ]  # fmt: skip
        kinds.append(
            {
                "kind": str(kind), "places": [str(p) for p in places], "layers": sorted({c[0] for c in cells}),
                "heads": sorted({c[1] for c in cells}) if heads else [], "cells": cells,
            }
        )  # fmt: skip
    return {"by": by, "kinds": kinds}


class _Cells:
    """The effects of some pairs of a trace as columns of numbers, sorted by example."""

    def __init__(self, frame: pd.DataFrame, of: EffectRows, roles: Sequence[str] = ROLES):
        self.roles = list(roles)
        self.kinds, self.layers, self.by_role = of.kinds, of.layers, of.by_role
        kind, names = _codes(frame["kind"])
        self.kind = np.array([self.kinds.index(k) for k in names], dtype=int)[kind]
        self.layer = np.searchsorted(self.layers, frame["layer"].to_numpy())
        self.head = frame["head"].to_numpy()
        self.position = frame["position"].to_numpy()
        self.effect = frame["effect"].to_numpy(float)
        self.patched = frame["patched"].to_numpy(float)
        role, names = _codes(frame["role"])
        self.role = np.array([self.roles.index(r) for r in names], dtype=int)[role]
        ids, examples = pd.factorize(frame["example_id"])
        order = np.argsort(ids, kind="stable")
        starts = np.searchsorted(ids[order], np.arange(len(examples) + 1))
        self.rows = {name: order[starts[i] : starts[i + 1]] for i, name in enumerate(examples)}

    def of(self, example_id: str) -> np.ndarray:
        """Return the rows of one example."""
        return self.rows.get(example_id, np.array([], dtype=int))

    def maps(self, rows: np.ndarray, places: Sequence[int]) -> list[tuple[float, str]]:
        """Return one small map per kind; of several heads in a cell the largest effect is kept."""
        place = np.searchsorted(places, self.role[rows]) if self.by_role else self.position[rows]
        drawn = []
        for k in range(len(self.kinds)):
            here = np.flatnonzero(self.kind[rows] == k)
            # Small effects first, so that of several heads the largest is written last.
            here = here[np.argsort(np.abs(self.effect[rows][here]), kind="stable")]
            grid = np.full((len(places), len(self.layers)), np.nan)
            grid[place[here], self.layer[rows][here]] = self.effect[rows][here]
            drawn.append(quantised(grid))
        return drawn

    def best(self, rows: np.ndarray) -> list[Any] | None:
        """Return the cell with the largest effect: kind, layer, head, position, role, metric,
        effect.
        """
        if not len(rows) or not np.isfinite(self.effect[rows]).any():
            return None
        b = rows[int(np.nanargmax(self.effect[rows]))]
        return [
            int(self.kind[b]), self.layers[self.layer[b]], int(self.head[b]), int(self.position[b]), int(self.role[b]),
            digits(self.patched[b]), digits(self.effect[b]),
        ]  # fmt: skip


def examples(run: Run, budget: int = BUDGET, seed: int = 0) -> dict[str, Any]:
    """Return the maps of single prompts, with tokens, roles and probabilities.

    For kinds that have heads, a cell is the effect of the layer's head with the largest one.

    Args:
        run: a trace.
        budget: bytes of maps; a random sample of the pairs is kept where all would need more.
        seed: of the sample.
    """
    pairs = run.tables["pairs.parquet"]
    roles = in_reading_order([*ROLES, *(role for own in pairs["roles"] for role in own)])
    effects = run.effects
    assert effects is not None
    template = str(run.notes["about.json"].get("template") or "")
    sizes = [len(set(r)) if effects.by_role else len(r) for r in pairs["roles"]]
    need = sum(sizes) * len(effects.layers) * len(effects.kinds)
    keep = len(pairs) if need <= budget else max(1, len(pairs) * budget // need)
    words: dict[str, int] = {}
    chosen = pairs.iloc[sorted(random.Random(seed).sample(range(len(pairs)), keep))]
    found = _drawn(chosen, effects, roles)
    drawn = [
        _one_example(pair, roles, template, words) | found[str(pair["example_id"])]
        for _, pair in chosen.iterrows()
    ]
    labels = next((list(map(str, x)) for x in pairs["labels"]), []) if len(pairs) else []
    return {
        "kinds": effects.kinds, "layers": effects.layers, "byRole": effects.by_role, "roles": roles, "labels": labels,
        "words": list(words), "total": len(pairs), "list": drawn,
    }  # fmt: skip


def _drawn(
    pairs: pd.DataFrame, effects: EffectRows, roles: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the largest effect and the small maps of pairs, by their ids."""
    drawn: dict[str, dict[str, Any]] = {}
    index = {role: i for i, role in enumerate(roles)}
    rows_of = dict(zip(pairs["example_id"], pairs["roles"], strict=True))

    def draw(name: str, cells: _Cells) -> None:
        codes = [index[r] for r in rows_of[name]]
        places = sorted(set(codes)) if effects.by_role else list(range(len(codes)))
        rows = cells.of(name)
        drawn[str(name)] = {"b": cells.best(rows), "m": cells.maps(rows, places)}

    for frame in effects.of_pairs(rows_of):
        cells = _Cells(frame, effects, roles)
        for name in cells.rows:
            draw(name, cells)
    nothing = pd.DataFrame(columns=["example_id", "kind", "layer", "head", "position", "role", "effect", "patched"])  # fmt: skip
    for name in rows_of:
        if str(name) not in drawn:
            draw(name, _Cells(nothing, effects, roles))
    return drawn


def _one_example(
    pair: pd.Series, known: Sequence[str], template: str, words: dict[str, int]
) -> dict[str, Any]:
    """Return one pair: texts, tokens as numbers of `words`, probabilities."""
    roles = [known.index(r) for r in pair["roles"]]
    parts = {"{sentence}": str(pair["sentence"]), "{aspect}": str(pair["aspect"])}
    asked = re.sub(r"\{sentence\}|\{aspect\}", lambda m: parts[m[0]], template)

    def tokens(column: str) -> list[int] | None:
        value = pair.get(column)
        if np.ndim(value) == 0:
            return None
        texts = [str(t) for t in value]
        return [
            words.setdefault(t, len(words))
            for t in spaced(texts, asked if column == "tokens" else "")
        ]

    return {
        "id": str(pair["example_id"]), "s": str(pair["sentence"]), "a": str(pair["aspect"]), "g": str(pair["polarity"]),
        "t": tokens("tokens"), "r": roles, "pc": _numbers(pair.get("p_clean")), "px": _numbers(pair.get("p_corrupted")),
        "x": tokens("corrupted_tokens"), "c": digits(pair.get("clean")), "d": digits(pair.get("corrupted")),
    }  # fmt: skip


def _codes(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Texts as numbers, and what the numbers stand for, in the order they first appear."""
    codes, names = pd.factorize(column)
    return codes, [str(n) for n in names]


def _numbers(values: Any) -> list[float | None] | None:
    return None if values is None or np.ndim(values) == 0 else [digits(v) for v in values]
