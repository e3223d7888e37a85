"""Describe the JSON files of a run folder, as JSON Schema.

One schema per file, in Python so that this package and its documentation share them; `SCHEMAS`
names the file of each. A schema names what a reader needs and leaves room for more, so that a file
of a later version still opens. `records.read_json` checks files; `published` gives the schemas as
files to publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    }
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
CARD = obj({"model": TEXT, "sha256": TEXT, "rows": some(ANY_OBJECT)})

SCHEMAS: dict[str, dict[str, Any]] = {
    "run.json": RUN,
    "about.json": ABOUT,
    "sites.json": SITES,
    "edit.json": EDIT,
    "side_effects.json": SIDE_EFFECTS,
    "card.json": CARD,
}
"""File of a run folder -> its schema."""


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
    }
