"""Describe the files of a run folder, as JSON Schema.

One schema per file, in Python so that this package and its documentation share them; `SCHEMAS`
names the JSON file of each, `TABLES` the tables, whose schema is that of one row. A schema names
what a reader needs and leaves room for more, so that a file of a later version still opens.
`records.read_json` and `records.read_table` check files; `published` gives the schemas as files to
publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

DIALECT = "https://json-schema.org/draft/2020-12/schema"

TEXT: dict[str, Any] = {"type": "string"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
NUMBER: dict[str, Any] = {"type": "number"}
MAYBE_NUMBER: dict[str, Any] = {"type": ["number", "null"]}
MAYBE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
FLAG: dict[str, Any] = {"type": "boolean"}
SHA: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
ANY_OBJECT: dict[str, Any] = {"type": "object"}
NOTES: dict[str, Any] = {"type": "array", "items": TEXT}


def obj(needed: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    """Return the schema of an object with some keys that must be there and some that may."""
    return {
        "type": "object",
        "properties": {**needed, **optional},
        "required": list(needed),
    }


def some(items: Any) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


VERSION: dict[str, Any] = {"enum": [1, 2]}
"""Of run.json and of the state of a run; `records.SCHEMA` is what is written."""
ACCOUNT = obj({"source": TEXT, "sha256": TEXT, "examples": COUNT}, left_out=ANY_OBJECT)
MODEL = obj({"name": TEXT, "sha256": TEXT, "parameters": COUNT})

STATE = obj({"key": TEXT, "config": ANY_OBJECT}, schema=VERSION, inputs=ANY_OBJECT)
"""What `--resume` reads: `.run/config.json`, or run.json once the run has ended."""

_COMMON: dict[str, Any] = {
    "schema": VERSION,
    "key": TEXT,
    "config": ANY_OBJECT,
    "versions": ANY_OBJECT,
    "seconds": NUMBER,
}
_LATER: dict[str, Any] = {"inputs": ANY_OBJECT, "files": some(TEXT), "warnings": NOTES}

RUNS: dict[str, dict[str, Any]] = {
    "patch": obj(
        {
            "command": {"const": "patch"},
            **_COMMON,
            "model": MODEL,
            "data": ACCOUNT,
            "pairs": obj({"considered": COUNT, "kept": COUNT, "dropped": ANY_OBJECT}),
            "engine": ANY_OBJECT,
            "self_checks": ANY_OBJECT,
            "average_total_effect": MAYBE_NUMBER,
            "sites": MAYBE_TEXT,
        },
        **_LATER,
    ),
    "patch.search": obj(
        {
            "command": {"const": "patch.search"},
            **_COMMON,
            "model": MODEL,
            "data": ACCOUNT,
            "search": obj(
                {"cells": COUNT, "certain": FLAG, "exact": COUNT, "of": COUNT, "share": NUMBER}
            ),
        },
        **_LATER,
    ),
    "train": obj(
        {
            "command": {"const": "train"},
            **_COMMON,
            "model": MODEL,
            "data": some(ACCOUNT),
            "preset": ANY_OBJECT,
            "edit": ANY_OBJECT,
        },
        **_LATER,
    ),
    "train.matrix": obj(
        {
            "command": {"const": "train.matrix"},
            **_COMMON,
            "model": MODEL,
            "domains": {
                "type": "object",
                "additionalProperties": obj({"train": ACCOUNT, "test": ACCOUNT}),
            },
            "sites": some(TEXT),
            "trainings": COUNT,
        },
        **_LATER,
    ),
    "compare": obj(
        {
            "command": {"const": "compare"},
            **_COMMON,
            "model": MODEL,
            "data": ACCOUNT,
            "test_data": ACCOUNT,
            "selectors": ANY_OBJECT,
            "random_places": some(some(COUNT)),
            "trainings": COUNT,
        },
        **_LATER,
    ),
    "evaluate": obj(
        {
            "command": {"const": "evaluate"},
            **_COMMON,
            "model": {"anyOf": [MODEL, {"type": "null"}]},
            "data": some(ACCOUNT),
            "scores": some(ANY_OBJECT),
        },
        **_LATER,
    ),
    "evaluate.card": obj(
        {"command": {"const": "evaluate.card"}, **_COMMON, "model": TEXT}, **_LATER
    ),
}
"""run.json of each command."""

RUN: dict[str, Any] = {
    "type": "object",
    "properties": {"command": {"enum": list(RUNS)}},
    "required": ["command"],
    "allOf": [
        {
            "if": {"properties": {"command": {"const": command}}},
            "then": schema,
        }
        for command, schema in RUNS.items()
    ],
}
"""run.json of any command."""

SITE = {"type": "string", "pattern": r"^L[0-9]+\."}
SITES = {
    "anyOf": [
        some(SITE),
        obj({"sites": some(SITE)}, rule=TEXT, clear=FLAG, aie=MAYBE_NUMBER, model=ANY_OBJECT),
    ]
}
ABOUT = obj(
    {
        "model": TEXT,
        "n_layers": COUNT,
        "n_heads": COUNT,
        "corruption": TEXT,
        "direction": TEXT,
        "metric": TEXT,
        "unit": TEXT,
        "method": TEXT,
        "by": TEXT,
    },
    kept=COUNT,
    level=MAYBE_NUMBER,
    window=COUNT,
    template=MAYBE_TEXT,
    labels=some(TEXT),
    changed_roles={"type": ["array", "null"], "items": TEXT},
)
EDIT = obj(
    {
        "schema": {"type": "integer"},
        "base": obj({"name": TEXT, "sha256": TEXT, "shape": ANY_OBJECT}),
        "sites": some(TEXT),
        "parts": some(ANY_OBJECT),
        "n_parameters": COUNT,
        "sha256": SHA,
    },
    record={"type": ["object", "null"]},
)
SIDE_EFFECTS = {
    "type": "object",
    "additionalProperties": obj({"summary": some(ANY_OBJECT)}),
}
FAIRNESS = {
    "type": "object",
    "additionalProperties": obj(
        {"classes": ANY_OBJECT, "groups": some(ANY_OBJECT), "layers": some(ANY_OBJECT)},
        rank={"type": ["integer", "null"]},
        accuracy_edited=NUMBER,
        summary=some(ANY_OBJECT),
    ),
}
SCORECARD = obj(
    {
        "systems": some(TEXT),
        "rows": some(obj({"measure": TEXT, "base": TEXT, "edited": some(TEXT)}, how=TEXT)),
    }
)
CARD = obj({"model": TEXT, "sha256": TEXT, "rows": some(ANY_OBJECT)})

SCHEMAS: dict[str, dict[str, Any]] = {
    "run.json": RUN,
    "about.json": ABOUT,
    "sites.json": SITES,
    "edit.json": EDIT,
    "side_effects.json": SIDE_EFFECTS,
    "fairness.json": FAIRNESS,
    "scorecard.json": SCORECARD,
    "card.json": CARD,
}
"""JSON file of a run folder -> its schema."""

WHOLE: dict[str, Any] = {"type": "integer"}
MAYBE_WHOLE: dict[str, Any] = {"type": ["integer", "null"]}
TEXTS = some(TEXT)
_CELL: dict[str, Any] = {"kind": TEXT, "layer": COUNT}
_SCORED: dict[str, Any] = {
    "n": COUNT,
    "accuracy": MAYBE_NUMBER,
    "accuracy_low": MAYBE_NUMBER,
    "accuracy_high": MAYBE_NUMBER,
    "majority": MAYBE_NUMBER,
}

_MEASURES = (
    "reliability", "gain", "out_of_domain", "generality", "consistency", "portability",
    "text_top1", "text_kl", "near_top1", "near_kl", "aspects",
)  # fmt: skip

TABLES: dict[str, dict[str, Any]] = {
    "effects.parquet": obj(
        {
            "example_id": TEXT,
            **_CELL,
            "head": MAYBE_WHOLE,
            "position": MAYBE_WHOLE,
            "role": TEXT,
            "patched": MAYBE_NUMBER,
            "effect": MAYBE_NUMBER,
        },
        clean=MAYBE_NUMBER,
        corrupted=MAYBE_NUMBER,
        draw_sd=MAYBE_NUMBER,
    ),
    "search.csv": obj(
        {
            "site": TEXT,
            "found": FLAG,
            "mean": NUMBER,
            "low": MAYBE_NUMBER,
            "high": MAYBE_NUMBER,
            "n": COUNT,
        }
    ),
    "controls.parquet": obj({"example_id": TEXT, **_CELL, "size": COUNT, "effect": MAYBE_NUMBER}),
    "pairs.parquet": obj(
        {
            "example_id": TEXT,
            "sentence": TEXT,
            "aspect": TEXT,
            "polarity": TEXT,
            "tokens": TEXTS,
            "roles": TEXTS,
            "labels": TEXTS,
            "p_clean": some(NUMBER),
            "clean": MAYBE_NUMBER,
            "corrupted": MAYBE_NUMBER,
        },
        cluster=MAYBE_TEXT,
    ),
    "importance.csv": obj(
        {
            **_CELL,
            "head": MAYBE_WHOLE,
            "aie": MAYBE_NUMBER,
            "ci_low": MAYBE_NUMBER,
            "ci_high": MAYBE_NUMBER,
            "p_adjusted": MAYBE_NUMBER,
            "n": COUNT,
        },
        p=MAYBE_NUMBER,
        role=TEXT,
        position=WHOLE,
    ),
    "history.csv": obj({}, step=COUNT, epoch=MAYBE_NUMBER, loss=MAYBE_NUMBER),
    "scores.csv": obj({"system": TEXT, "data": TEXT, "subset": TEXT, **_SCORED}),
    "predictions.parquet": obj(
        {
            "system": TEXT,
            "data": TEXT,
            "id": TEXT,
            "sentence": TEXT,
            "aspect": TEXT,
            "gold": TEXT,
            "predicted": MAYBE_TEXT,
            "correct": FLAG,
        }
    ),
    "scorecard.csv": obj(
        {
            "system": TEXT,
            "parameters": MAYBE_WHOLE,
            "seconds": MAYBE_NUMBER,
            "examples": MAYBE_WHOLE,
            **dict.fromkeys(_MEASURES, MAYBE_NUMBER),
        }
    ),
    "fairness.csv": obj(
        {
            "system": TEXT,
            "rank": MAYBE_WHOLE,
            "parameters": MAYBE_WHOLE,
            "n": COUNT,
            "accuracy_base": MAYBE_NUMBER,
            "accuracy": MAYBE_NUMBER,
            "class_gap": MAYBE_NUMBER,
            "kl_labels": MAYBE_NUMBER,
            "kl_vocabulary": MAYBE_NUMBER,
        }
    ),
    "matrix.csv": obj(
        {"method": TEXT, "train": MAYBE_TEXT, "test": TEXT, "seed": COUNT, "accuracy": MAYBE_NUMBER}
    ),
    "summary.csv": obj({"method": TEXT, "trainable": MAYBE_NUMBER}),
    "matrix_baselines.csv": obj(
        {
            "baseline": TEXT,
            "train": TEXT,
            "test": TEXT,
            "in_domain": FLAG,
            "accuracy": MAYBE_NUMBER,
            "macro_f1": MAYBE_NUMBER,
        }
    ),
    "interaction.csv": obj(
        {
            **_CELL,
            "head": MAYBE_WHOLE,
            "pie": MAYBE_NUMBER,
            "tie": MAYBE_NUMBER,
            "interaction": MAYBE_NUMBER,
        },
        role=TEXT,
    ),
}
"""Table of a run folder -> the schema of one of its rows."""


def table_problem(table: pd.DataFrame, schema: Mapping[str, Any], written: bool) -> str | None:
    """Say where a table differs from the schema of its rows; None where it does not.

    Args:
        table: of a run folder.
        schema: of a row.
        written: whether the file keeps types, as parquet does; a CSV file holds any value as text.
    """
    columns = {str(c) for c in table.columns}
    if len(columns) < len(table.columns):
        return "a column comes twice"
    for name in schema["required"]:
        if name not in columns:
            return f"it has no column {name}"
    for name, one in schema["properties"].items():
        if name in columns and not _fits(table[name], one, written):
            kinds = one["type"] if isinstance(one["type"], list) else [one["type"]]
            return f"the column {name} holds other values than {' or '.join(kinds)}"
    return None


def _fits(column: pd.Series, one: Mapping[str, Any], written: bool) -> bool:
    """Whether every value of a column is of a type that the schema of its cells names."""
    import pandas as pd

    kinds = one["type"] if isinstance(one["type"], list) else [one["type"]]
    if "null" not in kinds and bool(column.isna().any()):
        return False
    found: str = pd.api.types.infer_dtype(column, skipna=True)
    if found == "empty" or (found == "floating" and bool(column.isna().all())):
        return True
    if "array" in kinds:
        inner = str if one["items"] == TEXT else float
        return all(_holds(cell, inner) for cell in column)
    if "string" in kinds:
        return bool(found == "string") or not written
    if "boolean" in kinds:
        return bool(found == "boolean")
    if "integer" in kinds:
        present = column.dropna()
        whole = found == "integer" or (found == "floating" and bool((present % 1 == 0).all()))
        return whole and bool((present >= one.get("minimum", -(2**62))).all())
    return found in ("integer", "floating")


def _holds(cell: Any, kind: type) -> bool:
    """Whether a cell is a list of texts, or of numbers."""
    if not hasattr(cell, "tolist"):
        return False
    values = cell.tolist()
    wanted = str if kind is str else (int, float)
    return isinstance(values, list) and all(isinstance(v, wanted) for v in values)


def problem(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Say where a value differs from a schema, in part of a sentence; None where it does not."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(dict(schema)).iter_errors(value))
    if error is None:
        return None
    where = ".".join(str(p) for p in error.absolute_path)
    text = error.message if len(error.message) <= 200 else error.message[:197] + "..."
    return f"{where}: {text}" if where else text


def published() -> dict[str, dict[str, Any]]:
    """Return every schema under the name of the file that it is published as."""
    return {
        f"{name.removesuffix('.json')}.schema.json": {"$schema": DIALECT, "title": name, **schema}
        for name, schema in SCHEMAS.items()
    } | {
        f"{name}.row.schema.json": {"$schema": DIALECT, "title": f"a row of {name}", **schema}
        for name, schema in TABLES.items()
    }
