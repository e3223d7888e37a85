"""Run folders made by hand: every number known, no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mech_absa.patch.effects import Effects
from mech_absa.patch.traced import as_written
from mech_absa.records import SCHEMA, write_json

SENTENCE = "The pasta was really very good but our waiter seemed rather rude and slow that night"
NASTY = "<script>document.title='owned'</script>&amp;<!--<img"
"""What a review must not be able to do to a page."""
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
    middle = [
        (" " + w, "before" if i < at else "aspect.last" if i == at else "after")
        for i, w in enumerate(sentence)
    ]
    head = [(w, "template") for w in ("Given", " the", " sentence", ":", " '")]
    tail = [
        (w, "template")
        for w in ("',", " what", " is", " the", " sentiment", " of", " the", " aspect")
    ]
    items = [*head, *middle, *tail, (" " + aspect, "query.last"), (" ?", "answer")]
    return [t for t, _ in items], [r for _, r in items]


def made_effects(
    n: int = 12,
    layers: int = 12,
    kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out"),
    heads: int = 4,
    seed: int = 0,
    text: str = "",
    by: str = "token",
) -> Effects:
    """Effects with a bump at the aspect in early layers, at the question in the middle and at the answer late; noise elsewhere.

    Args:
        text: put into the first sentence as a word of its own.
    """
    rng = np.random.default_rng(seed)
    words_all = SENTENCE.split()
    frames, pairs = [], []
    centre = {"aspect.last": 0.2, "query.last": 0.5, "answer": 0.9}
    for i in range(n):
        words = list(rng.permutation(words_all)) if i else [*words_all, *([text] if text else [])]
        aspect = ("pasta", "waiter")[i % 2]
        tokens, roles = prompt(aspect, words)
        clean, corrupted = rng.uniform(0.7, 0.99), rng.uniform(0.05, 0.4)
        places = list(range(len(tokens))) if by == "token" else list(dict.fromkeys(roles))
        for kind in kinds:
            for head in range(heads) if kind == "head" else [-1]:
                depth = np.arange(layers) / max(1, layers - 1)
                size = {"resid_post": 1.0, "attn_out": 0.4, "mlp_out": 0.3, "head": 0.2}.get(
                    kind, 0.2
                )
                for place in places:
                    role = roles[place] if by == "token" else place
                    bump = (
                        np.exp(-(((depth - centre[role]) / 0.18) ** 2))
                        if role in centre
                        else np.zeros(layers)
                    )
                    effect = (clean - corrupted) * size * bump + rng.normal(0, 0.01, layers)
                    frames.append(
                        (
                            f"made:{i}",
                            kind,
                            head,
                            place if by == "token" else -1,
                            role,
                            clean,
                            corrupted,
                            effect,
                        )
                    )
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


def importance_of(effects: Effects) -> pd.DataFrame:
    """Averages by role with a normal interval: quick, for pages and figures whose statistics are tested elsewhere."""
    values, cells = effects.matrix("role")
    n = (~np.isnan(values)).sum(0)
    mean, error = np.nanmean(values, axis=0), np.nanstd(values, axis=0) / np.sqrt(np.maximum(n, 1))
    return cells.assign(
        aie=mean, ci_low=mean - 2 * error, ci_high=mean + 2 * error, p=0.01, p_adjusted=0.04, n=n
    )


def trace_folder(
    folder: Path,
    effects: Effects,
    sites: tuple[str, ...] = ("L5.resid_post@query.last", "L6.resid_post@query.last"),
) -> Path:
    """What the patch command leaves."""
    effects.save(folder)
    as_written(importance_of(effects)).to_csv(folder / "importance.csv", index=False)
    rule = "the 2 neighbouring layers and the role with the largest mean resid_post effect whose interval lies above that of the control role"
    write_json(
        folder / "sites.json",
        {
            "sites": list(sites),
            "rule": rule,
            "aie": 0.626,
            "ci_low": 0.576,
            "ci_high": 0.672,
            "control_high": 0.004,
            "n": len(effects.pairs),
            "clear": True,
        },
    )
    keys = ("considered", "kept", "dropped", "sigma", "draw_sd", "classes_kept", "mixed_polarity")
    data = {
        "source": "reviews & more.jsonl",
        "sha256": "ab" * 32,
        "examples": 24,
        "classes": {"positive": 24},
        "left_out": {"conflict": 2},
        "ambiguous": 1,
    }
    record: dict[str, Any] = {
        "model": {"name": "made-up-12l", "sha256": "cd" * 32, "parameters": 1234567},
        "data": data,
        "device": "cpu",
    }
    return _record(
        folder,
        "patch",
        record
        | {
            "pairs": {k: effects.about[k] for k in keys},
            "self_checks": effects.about["self_checks"],
            "skewed_cells": 3,
        },
    )


def train_folder(folder: Path, seed: int = 0) -> Path:
    """What the train command leaves, but for the parameters."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, 61)
    loss = np.exp(-steps / 20) + 0.1 + rng.normal(0, 0.03, len(steps))
    known = steps % 10 == 0
    history = pd.DataFrame(
        {
            "step": steps,
            "epoch": 0,
            "examples": steps * 8,
            "loss": loss,
            "grad_norm": 1 / steps,
            "rate": 1 - steps / 60,
            "seconds": steps * 0.1,
        }
    )
    history["validation_loss"] = np.where(known, loss + 0.05, np.nan)
    history["validation_accuracy"] = np.where(known, 0.5 + steps / 150, np.nan)
    folder.mkdir(parents=True, exist_ok=True)
    history.to_csv(folder / "history.csv", index=False)
    places = [("lora", f"L{i}.W_O", {"rank": 4, "alpha": 8.0}, 3e-4) for i in (5, 6)]
    places += [("loreft", f"L{i}.resid_post@query.last", {"rank": 4}, 1e-5) for i in (5, 6)]
    parts = [
        {"family": f, "place": p, "options": o, "lr": lr, "weight_decay": 0.0}
        for f, p, o, lr in places
    ]
    write_json(
        folder / "edit.json",
        {
            "schema": 1, "base": {"name": "made-up-12l", "sha256": "cd" * 32}, "sites": [p[1] for p in places], "n_parameters": 2056 + seed, "share": 0.0017,
            "formulas": {"lora": "y + s (dropout(x) A) B, s = alpha / r", "loreft": "h + R^T (W h + b - R h), R R^T = 1"}, "parts": parts,
            "record": {"seed": seed, "steps": 60, "best_step": 50, "stopped": ""},
        },
    )  # fmt: skip
    preset = {
        "name": "paper",
        "parts": parts,
        "epochs": 1,
        "batch_size": 8,
        "schedule": "linear",
        "loss": "labels",
    }
    record = {"model": {"name": "made-up-12l", "parameters": 1234567}, "data": [{"source": "train.jsonl", "examples": 480, "classes": {"positive": 300}}],
              "validation_data": [], "preset": preset, "warnings": ["no neutral example among the 480 to train on"], "peak_memory_bytes": 5 << 28}  # fmt: skip
    return _record(folder, "train", record)


def evaluate_folder(folder: Path, text: str = "", n: int = 40, seed: int = 0) -> Path:
    """What the evaluate command leaves, with `text` as the first sentence."""
    rng = np.random.default_rng(seed)
    labels = ["positive", "negative", "neutral"]
    rows, scores, kept = [], [], []
    gold = rng.choice(labels, n, p=[0.6, 0.3, 0.1])
    for system, skill in (("base", 0.5), ("paper", 0.85)):
        said = np.where(rng.random(n) < skill, gold, rng.choice(labels, n))
        for i in range(n):
            p = np.full(3, 0.1)
            p[labels.index(said[i])] = 0.8
            sentence = text if text and not i else f"The pasta number {i} was what one hopes for."
            rows.append(
                (
                    system,
                    "test.jsonl",
                    f"t:{i}",
                    sentence,
                    "pasta",
                    gold[i],
                    said[i],
                    bool(said[i] == gold[i]),
                    *np.log(p),
                )
            )
        confusion = [
            [int(((gold == g) & (said == a)).sum()) for a in (*labels, "none")] for g in labels
        ]
        accuracy = float((gold == said).mean())
        numbers: dict[str, Any] = {
            "n": n, "sentences": n, "accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": min(1.0, accuracy + 0.1), 
            "macro_f1": accuracy - 0.05, "macro_f1_low": accuracy - 0.15, "macro_f1_high": accuracy, "majority": 0.6,
            "majority_class": "positive", "unanswered": 0, "gold_probability": 0.7, "nll": 0.5, "label_mass": 0.99,
        }  # fmt: skip
        for c in labels:
            numbers |= {f"f1_{c}": 0.8, f"support_{c}": int((gold == c).sum())}
        scores.append(
            {
                "system": system,
                "data": "test.jsonl",
                "subset": "all",
                "leaked": 3 if system == "paper" else None,
            }
            | numbers
        )
        kept.append(
            {
                "system": system,
                "data": "test.jsonl",
                "leaked": None,
                "all": numbers | {"confusion": confusion},
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        "system",
        "data",
        "id",
        "sentence",
        "aspect",
        "gold",
        "predicted",
        "correct",
        *(f"logprob_{c}" for c in labels),
    ]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "predictions.parquet", index=False)
    pd.DataFrame(scores).to_csv(folder / "scores.csv", index=False)
    against = {"first": "paper", "second": "base", "data": "test.jsonl", "n": n, "difference": 0.3, "difference_low": -0.1, "difference_high": 0.5,
               "p_sign_flip": 0.001, "macro_f1_difference": 0.25, "macro_f1_low": 0.2, "macro_f1_high": 0.3, "only_first_right": 14,
               "only_second_right": 2, "p_mcnemar": 0.0042}  # fmt: skip
    pd.DataFrame([against]).to_csv(folder / "comparisons.csv", index=False)
    together = {"system": "2 edits", "data": "test.jsonl", "seeds": 2, "accuracy": 0.9, "accuracy_sd": 0.05, "accuracy_low": 0.4, "accuracy_high": 1.4,
                "macro_f1": 0.8, "macro_f1_sd": 0.1, "macro_f1_low": 0.1, "macro_f1_high": 1.5}  # fmt: skip
    pd.DataFrame([together]).to_csv(folder / "aggregate.csv", index=False)
    write_json(
        folder / "side_effects.json",
        {
            "paper": {
                "text": {"kl": 0.012, "top1": 0.98},
                "reliability": {"value": 0.3, "low": 0.1, "high": 0.5},
                "summary": [
                    {
                        "measure": "unrelated text: KL",
                        "base": "-",
                        "edited": "0.0120 nats",
                        "note": "top-1 the same at 98.0 % of 878",
                    }
                ],
            }
        },
    )
    _judged(folder)
    return _record(
        folder,
        "evaluate",
        {
            "model": {"name": "made-up-12l"},
            "data": [{"source": "test.jsonl", "examples": n}],
            "train": [],
            "scores": kept,
        },
    )


def _judged(folder: Path) -> None:
    """What --scorecard and --fairness leave of two edits of four layers."""
    card = {"measure": "in domain: accuracy, %", "how": "by <sentence>", "base": "50.0", "edited": ["85.0 [70, 95]", "-"]}  # fmt: skip
    write_json(folder / "scorecard.json", {"systems": ["paper", "<r32>"], "rows": [card]})
    rows, records = [], {}
    for name, rank in (("paper", 4), ("<r32>", None)):
        rows.append(
            {"system": name, "rank": rank, "parameters": 5128, "n": 40, "accuracy": 0.85, "accuracy_base": 0.5,
             "class_gap": 0.2, "class_gap_low": 0.1, "class_gap_high": 0.35, "class_gap_base": 0.6,
             "brand_gap": 0.125, "brand_gap_low": 0.0, "brand_gap_high": 0.25, "brand_gap_p": 0.4321, "brand_gap_base": 0.0,
             "kl_labels": 0.51234, "kl_labels_low": 0.4, "kl_labels_high": 0.6, "kl_vocabulary": 0.7}
        )  # fmt: skip
        drift = [{"value": v, "low": v / 2, "high": 2 * v} for v in (0.0, 0.0, 0.25, 0.7)]
        summary = {"measure": "gap of classes", "base": "60.0", "edited": "20.0 [10.0, 35.0]", "note": "change -40.0 points"}  # fmt: skip
        records[name] = {"rank": rank, "classes": {}, "groups": [], "layers": drift, "summary": [summary]}  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "fairness.csv", index=False)
    write_json(folder / "fairness.json", records)


def matrix_folder(folder: Path, seed: int = 0) -> Path:
    """What the matrix command leaves: two methods and the model as it is, on two domains, two seeds."""
    rng = np.random.default_rng(seed)
    rows = []
    for method, trains, size in (
        ("zero_shot", ("",), 0),
        ("both@<sites>", ("lapt&op", "rest"), 7692),
        ("lora@all", ("lapt&op", "rest"), 99000),
    ):
        for train in trains:
            for s in (0, 1) if train else (0,):
                for test in ("lapt&op", "rest"):
                    accuracy = (
                        2 * int(rng.integers(25, 48)) / 100
                    )  # means of two are whole percents
                    rows.append(
                        {"method": method, "train": train, "test": test, "in_domain": train == test, "seed": s, "n": 100, "accuracy": accuracy,
                         "macro_f1": accuracy - 0.1, "majority": 0.6, "trainable": size, "share": size / 1e6, "seconds": 3.5, "steps": 30, "stopped": "",
                         "peak_memory_bytes": 5 << 28}
                    )  # fmt: skip
    from mech_absa.train.matrix import summary

    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "matrix.csv", index=False)
    summary(rows).to_csv(folder / "summary.csv", index=False)
    pairs = [(a, b) for a in ("lapt&op", "rest") for b in ("lapt&op", "rest")]
    simple = [
        {"baseline": "nearest <opinion>", "train": a, "test": b, "in_domain": a == b, "n": 100,
         "accuracy": 0.71 if a == b else 0.62, "macro_f1": 0.53 if a == b else 0.44}
        for a, b in pairs
    ]  # fmt: skip
    pd.DataFrame(simple).to_csv(folder / "matrix_baselines.csv", index=False)
    account = {"source": "x_train.jsonl", "examples": 480, "classes": {"positive": 300}}
    record = {"model": {"name": "made-up-12l", "parameters": 1234567}, "trainings": 9, "sites": ["L5.resid_post@query.last"],
              "domains": {d: {"train": account, "test": account | {"source": "x_test.jsonl"}} for d in ("lapt&op", "rest")},
              "warnings": ["rest: 4 of 100 rows of x_test.jsonl stand in the training data"]}  # fmt: skip
    return _record(folder, "train.matrix", record)


def _record(folder: Path, command: str, record: dict[str, Any]) -> Path:
    config = {"data": ["reviews & more.jsonl"], "model": "made-up-12l", "seed": 0}
    write_json(
        folder / "run.json",
        {
            "schema": SCHEMA,
            "key": "0123456789abcdef",
            "config": config,
            "versions": {"python": "3.11"},
            "command": command,
            **record,
            "seconds": 12.5,
        },
    )
    return folder
