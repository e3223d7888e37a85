"""Run folders made by hand: every number known, no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mech_absa.patch.effects import Effects
from mech_absa.records import SCHEMA, write_json

WORDS = "The pasta was really very good but our waiter seemed rather rude and slow that night".split()
ABOUT = {
    "model": "made-up-12l", "n_layers": 12, "n_heads": 4, "dtype": "float32", "corruption": "GaussianNoise",
    "corruption_settings": {"scale": 3.0, "draws": 10, "span": "all", "seed": 0}, "direction": "denoise", "metric": "prob",
    "unit": "probability of the gold label", "method": "exact", "steps": None, "by": "token", "window": 1,
    "labels": ["positive", "negative", "neutral"], "template": "Given the sentence: '{sentence}', what is ... {aspect} ?",
    "self_checks": {"engine_against_loop": 3.1e-7, "cells_compared": ["L1.resid_post@3 of made:1"], "same_onto_same": 0.0, "tolerance": 1e-4},
}  # fmt: skip


def prompt(aspect: str, sentence: list[str]) -> tuple[list[str], list[str]]:
    """Tokens and roles of the question about one word of a sentence."""
    at = sentence.index(aspect)
    middle = [(" " + w, "before" if i < at else "aspect.last" if i == at else "after") for i, w in enumerate(sentence)]
    head = [(w, "template") for w in ("Given", " the", " sentence", ":", " '")]
    tail = [(w, "template") for w in ("',", " what", " is", " the", " sentiment", " of", " the", " aspect")]
    items = [*head, *middle, *tail, (" " + aspect, "query.last"), (" ?", "answer")]
    return [t for t, _ in items], [r for _, r in items]


def made_effects(
    n: int = 12, layers: int = 12, kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out"), heads: int = 4, seed: int = 0, text: str = "", by: str = "token"
) -> Effects:
    """Effects with a bump at the aspect in early layers, at the question in the middle and at the answer late; noise elsewhere.

    Args:
        text: put into the first sentence as a word of its own.
    """
    rng = np.random.default_rng(seed)
    frames, pairs = [], []
    centre = {"aspect.last": 0.2, "query.last": 0.5, "answer": 0.9}
    for i in range(n):
        words = list(rng.permutation(WORDS)) if i else [*WORDS, text] if text else list(WORDS)
        aspect = ("pasta", "waiter")[i % 2]
        tokens, roles = prompt(aspect, words)
        clean, corrupted = rng.uniform(0.7, 0.99), rng.uniform(0.05, 0.4)
        places = list(range(len(tokens))) if by == "token" else list(dict.fromkeys(roles))
        for kind in kinds:
            for head in range(heads) if kind == "head" else [-1]:
                depth = np.arange(layers) / max(1, layers - 1)
                size = {"resid_post": 1.0, "attn_out": 0.4, "mlp_out": 0.3, "head": 0.2}.get(kind, 0.2)
                for place in places:
                    role = roles[place] if by == "token" else place
                    bump = np.exp(-(((depth - centre[role]) / 0.18) ** 2)) if role in centre else np.zeros(layers)
                    effect = (clean - corrupted) * size * bump + rng.normal(0, 0.01, layers)
                    frames.append((f"made:{i}", kind, head, place if by == "token" else -1, role, clean, corrupted, effect))
        share = np.array([clean, (1 - clean) * 0.7, (1 - clean) * 0.3])
        broken = np.array([corrupted, (1 - corrupted) * 0.8, (1 - corrupted) * 0.2])
        sentence = " ".join(words)
        pairs.append(
            (f"made:{i}", sentence, aspect, "positive", "restaurant", sentence.lower(), tokens, roles, ABOUT["labels"], share.tolist(), broken.tolist(),
             None, clean, corrupted)
        )  # fmt: skip
    from mech_absa.patch.effects import COLUMNS, PAIR_COLUMNS

    m = len(frames)
    frame = pd.DataFrame(
        {
            "example_id": np.repeat([f[0] for f in frames], layers), "kind": np.repeat([f[1] for f in frames], layers),
            "layer": np.tile(np.arange(layers, dtype=np.int16), m), "head": np.repeat(np.array([f[2] for f in frames], np.int16), layers),
            "position": np.repeat(np.array([f[3] for f in frames], np.int32), layers), "role": np.repeat([f[4] for f in frames], layers),
            "clean": np.repeat([f[5] for f in frames], layers), "corrupted": np.repeat([f[6] for f in frames], layers),
            "effect": np.concatenate([f[7] for f in frames]), "draw_sd": 0.01,
        }
    )  # fmt: skip
    frame["patched"] = frame["corrupted"] + frame["effect"]
    about = {**ABOUT, "n_layers": layers, "n_heads": heads, "by": by, "considered": 2 * n, "kept": n,
             "dropped": {"clean run wrong": n - n // 3, "corrupted run right": n // 3}, "sigma": 0.125, "draw_sd": 0.03,
             "classes_kept": {"positive": n}, "mixed_polarity": 0}  # fmt: skip
    return Effects(frame[list(COLUMNS)], pd.DataFrame(pairs, columns=list(PAIR_COLUMNS)), about)
