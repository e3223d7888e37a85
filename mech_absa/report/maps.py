"""Effects -> numbers small enough to travel inside a page.

Averages go as they are, to four digits. Single examples are many: the map of one prompt and kind is stored as one byte a cell, signed,
times a scale of its own (base64), so that 1,000 prompts of 40 tokens in 12 layers and three kinds need about 2 MiB, at an error of at most
half a 127th of the map's largest effect. Where even that is too much, a sample of the examples is kept, and the page says so.
"""

from __future__ import annotations

import base64
import math
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..sites import HEAD_KINDS, ROLES
from .runs import Run

BUDGET = 8 << 20
"""Bytes of the maps of single examples in one page, before base64 makes four of three."""
NOTHING = -128
"""A cell that does not exist."""


def digits(value: Any, n: int = 4) -> float | None:
    """A number to `n` significant digits; None where it is none."""
    try:
        x = float(value)
    except (TypeError, ValueError):
        return None
    return float(f"{x:.{n}g}") if math.isfinite(x) else None


def quantised(values: Float[np.ndarray, "row layer"]) -> tuple[float, str]:
    """(scale, base64 of one signed byte a cell, row by row): value = scale * byte, -128 where the value is NaN."""
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

    A tokenizer of words and their blanks, asked for the text of one token, may leave the blank out (sentencepiece does), and a prompt read
    from such pieces runs together. Tokens that are not found where they should be (bytes of a character, BOS) stay as they are.
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


def average(run: Run) -> dict[str, Any]:
    """The importance map of a run: one object a kind, with its cells as rows."""
    table = run.tables["importance.csv"]
    by = "role" if "role" in table else "position"
    chosen = set(map(str, (run.notes.get("sites.json") or {}).get("sites", [])))
    kinds = []
    for kind, rows in table.groupby("kind", sort=False):
        present = set(rows[by])
        places = [r for r in ROLES if r in present] if by == "role" else sorted(present)
        index = {p: i for i, p in enumerate(places)}
        heads = kind in HEAD_KINDS
        cells: list[list[Any]] = [
            [
                int(r.layer), int(r.head), index[getattr(r, by)], digits(r.aie), digits(r.ci_low), digits(r.ci_high), digits(r.p_adjusted, 2), int(r.n),
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


def examples(run: Run, budget: int = BUDGET, seed: int = 0) -> dict[str, Any]:
    """The maps of single prompts, with tokens, roles and probabilities.

    For kinds that have heads, a cell is the effect of the layer's head with the largest one.

    Args:
        run: a trace.
        budget: bytes of maps; a random sample of the pairs is kept where all would need more.
        seed: of the sample.
    """
    pairs, frame = run.tables["pairs.parquet"], run.tables["effects.parquet"]
    template = str(run.notes["about.json"].get("template") or "")
    kind_of, kinds = _codes(frame["kind"])
    layers = sorted(int(x) for x in frame["layer"].unique())
    by_role = bool((frame["position"] < 0).all())
    lengths = [len(t) for t in pairs["tokens"]]
    need = (
        sum(len(set(r)) if by_role else n for r, n in zip(pairs["roles"], lengths, strict=True))
        * len(layers)
        * len(kinds)
    )
    keep = len(pairs) if need <= budget else max(1, len(pairs) * budget // need)
    rows = sorted(random.Random(seed).sample(range(len(pairs)), keep))

    ids, names = pd.factorize(frame["example_id"])
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(len(names) + 1))
    where = {name: order[starts[i] : starts[i + 1]] for i, name in enumerate(names)}
    layer_of = np.searchsorted(layers, frame["layer"].to_numpy())
    position, effect, patched = (
        frame["position"].to_numpy(),
        frame["effect"].to_numpy(float),
        frame["patched"].to_numpy(float),
    )
    role, named = _codes(frame["role"])
    role_of = np.array([ROLES.index(r) for r in named])[role]
    words: dict[str, int] = {}
    made = []
    for i in rows:
        pair = pairs.iloc[i]
        roles = [ROLES.index(r) for r in pair["roles"]]
        parts = {"{sentence}": str(pair["sentence"]), "{aspect}": str(pair["aspect"])}
        asked = re.sub(r"\{sentence\}|\{aspect\}", lambda m: parts[m[0]], template)  # noqa: B023 - called at once
        places = sorted(set(roles)) if by_role else list(range(len(roles)))
        mine = where.get(pair["example_id"], np.array([], dtype=int))
        place = np.searchsorted(places, role_of[mine]) if by_role else position[mine]
        maps = []
        for k in range(len(kinds)):
            here = kind_of[mine] == k
            # Small effects first, so that of several heads the largest is written last.
            at = np.flatnonzero(here)[np.argsort(np.abs(effect[mine][here]), kind="stable")]
            grid = np.full((len(places), len(layers)), np.nan)
            grid[place[at], layer_of[mine][at]] = effect[mine][at]
            maps.append(quantised(grid))
        best = None
        if len(mine) and np.isfinite(effect[mine]).any():
            b = mine[int(np.nanargmax(effect[mine]))]
            best = [
                int(kind_of[b]),
                layers[layer_of[b]],
                int(frame["head"].iat[b]),
                int(position[b]),
                int(role_of[b]),
                digits(patched[b]),
                digits(effect[b]),
            ]
        made.append(
            {
                "id": str(pair["example_id"]), "s": str(pair["sentence"]), "a": str(pair["aspect"]), "g": str(pair["polarity"]),
                "t": [words.setdefault(t, len(words)) for t in spaced([str(t) for t in pair["tokens"]], asked)], "r": roles,
                "pc": _numbers(pair.get("p_clean")), "px": _numbers(pair.get("p_corrupted")),
                "x": None if np.ndim(pair.get("corrupted_tokens")) == 0 else [words.setdefault(str(t), len(words)) for t in pair["corrupted_tokens"]],
                "c": digits(pair.get("clean")), "d": digits(pair.get("corrupted")), "b": best, "m": maps,
            }
        )  # fmt: skip
    labels = next((list(map(str, x)) for x in pairs["labels"]), []) if len(pairs) else []
    return {
        "kinds": kinds, "layers": layers, "byRole": by_role, "roles": list(ROLES), "labels": labels, "words": list(words), "total": len(pairs), "list": made,
    }  # fmt: skip


def _codes(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Texts as numbers, and what the numbers stand for, in the order they first appear."""
    codes, names = pd.factorize(column)
    return codes, [str(n) for n in names]


def _numbers(values: Any) -> list[float | None] | None:
    return None if values is None or np.ndim(values) == 0 else [digits(v) for v in values]
