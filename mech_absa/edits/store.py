"""Keeping an edit: two files, no pickle.

    edit.safetensors    the parameters, `000.A`, `000.B`, `001.R`, ... in the order of the parts
    edit.json           schema version, the base model and the hash of its weights, the parts with their formulas, the training record

Loading refuses a file of another version, a base model with other weights, and tensors that are missing, damaged or of another shape, each
with one sentence. What is loaded gives the same logits to the last bit.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..errors import EditError, MechAbsaError
from ..model import BUNDLED, Model
from ..records import atomic, sha256_bytes, write_json, write_text
from .base import Part, Shape
from .edit import FAMILIES, Edit

EDIT_SCHEMA = 1
WEIGHTS, ABOUT, HISTORY = "edit.safetensors", "edit.json", "history.csv"
BUNDLED_EDIT = BUNDLED.parent / "adapter"


def save_edit(edit: Edit, folder: str | Path) -> Path:
    """Write an edit to a folder, which is made where it is missing; its history too, where it has just been trained."""
    folder = Path(folder)
    data = save_tensors({name: p.contiguous() for name, p in _tensors(edit).items()})
    with atomic(folder / WEIGHTS) as temporary:
        temporary.write_bytes(data)
    write_json(folder / ABOUT, about(edit) | {"sha256": sha256_bytes(data)})
    if edit.history:
        columns = dict.fromkeys(name for row in edit.history for name in row)
        lines = [
            ",".join(columns),
            *(",".join(str(row.get(c, "")) for c in columns) for row in edit.history),
        ]
        write_text(folder / HISTORY, "\n".join(lines) + "\n")
    return folder


def about(edit: Edit) -> dict[str, Any]:
    """What edit.json says, but for the hash of the parameters."""
    return {
        "schema": EDIT_SCHEMA,
        "base": {"name": edit.base, "sha256": edit.sha256, "shape": asdict(edit.shape)},
        "sites": list(edit.places),
        "formulas": {
            family: FAMILIES[family].formula
            for family in dict.fromkeys(p.family for p in edit.parts)
        },
        "n_parameters": edit.n_parameters,
        "share": edit.share,
        "parts": [asdict(p) for p in edit.parts],
        "record": edit.record,
    }


def load_edit(folder: str | Path, model: Model | None = None) -> Edit:
    """The edit that a folder holds.

    Args:
        folder: with `edit.safetensors` and `edit.json`; `"bundled"` for the adaptation of the bundled model that ships with it.
        model: what it is for; checked now where it is given, and at the first use where it is not.

    Raises:
        EditError: the folder holds no edit, a damaged one, or one of another model.
    """
    folder = BUNDLED_EDIT if str(folder) == "bundled" else Path(folder)
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            raise EditError(
                f"{folder} holds no edit: {name} is missing; a folder with {ABOUT} and {WEIGHTS} is needed"
            )
    try:
        said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        schema = said["schema"]
    except (ValueError, KeyError, TypeError):
        raise EditError(
            f"{folder / ABOUT} is damaged: it is no JSON object with a schema version"
        ) from None
    if schema != EDIT_SCHEMA:
        raise EditError(
            f"{folder / ABOUT} has schema version {schema}; this version of the package reads {EDIT_SCHEMA}"
        )
    data = (folder / WEIGHTS).read_bytes()
    if sha256_bytes(data) != said.get("sha256"):
        raise EditError(
            f"{folder / WEIGHTS} is damaged: its hash is not the one that {ABOUT} names"
        )
    try:
        tensors = load_tensors(data)
        base = said["base"]
        edit = Edit(
            [Part(**p) for p in said["parts"]],
            Shape(**base["shape"]),
            base["name"],
            base["sha256"],
            said.get("record"),
        )
    except (SafetensorError, KeyError, TypeError, MechAbsaError) as error:
        raise EditError(
            f"{folder} is damaged: its files do not describe an edit ({error})"
        ) from None
    with torch.no_grad():
        for name, p in _tensors(edit).items():
            if name not in tensors or tensors[name].shape != p.shape:
                raise EditError(
                    f"{folder / WEIGHTS} is damaged: parameter {name} is missing or not of shape {tuple(p.shape)}"
                )
            p.copy_(tensors[name])
    if model is not None:
        edit.check(model)
        edit = edit.to(model.device)
    return edit.eval()


def _tensors(edit: Edit) -> dict[str, torch.Tensor]:
    return {
        f"{i:03d}.{name}": p.detach()
        for i, intervention in enumerate(edit)
        for name, p in intervention.trainable.items()
    }
