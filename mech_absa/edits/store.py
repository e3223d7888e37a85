"""Save and load an edit: two files, no pickle.

    edit.safetensors    the parameters, `000.A`, `000.B`, `001.R`, ... in the order of the parts,
                        and what a part holds fixed (the factors of TinyLoRA)
    edit.json           schema version, base model and hash of its weights, parts with their formulas, training record, two hashes

`sha256` is the hash of the parameters, `sha256_here` that of all other fields of edit.json: a
changed scale or place is noticed as a changed parameter is. Loading rejects a file of an unknown
version, a base model with other weights, and files that are damaged, each with one sentence. A
loaded edit gives the same logits to the last bit.

Version 1 had no hash of edit.json, and its head gates divided by the temperature in evaluation too;
both are still read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ..errors import EditError, MechAbsaError
from ..model import BUNDLED, Model
from ..model.downloads import SMOLLM2
from ..model.downloads import folder as downloaded
from ..records import atomic, finite, plain, sha256_bytes, write_json, write_text
from ..words import expect
from .base import Part, Shape
from .edit import FAMILIES, Edit
from .record import TrainingRecord

EDIT_SCHEMA = 2
WEIGHTS, ABOUT, HISTORY = "edit.safetensors", "edit.json", "history.csv"
BUNDLED_EDIT = BUNDLED.parent / "adapter"
BUNDLED_V2_EDIT = BUNDLED.parent / "adapter_v2"
"""The bundled model's second adaptation, trained on both versions of the built-in reviews."""
SMOLLM2_EDIT = BUNDLED.parent / "adapter_smollm2"
MOST_SHOWN = 200
"""Characters of a library's own error in a message."""


def save_edit(edit: Edit, folder: str | Path) -> Path:
    """Write an edit to a folder, and its history where it has just been trained.

    Args:
        edit: any edit, trained or not.
        folder: created where it is missing.

    Returns:
        The folder.

    Examples:
        >>> import tempfile
        >>> from mech_absa import load_edit, load_model
        >>> model = load_model()
        >>> edit = load_edit("bundled", model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_edit(save_edit(edit, folder), model)
        >>> again.n_parameters == edit.n_parameters
        True
    """
    folder = Path(folder)
    data = save_tensors({name: p.contiguous() for name, p in _tensors(edit).items()})
    with atomic(folder / WEIGHTS) as temporary:
        temporary.write_bytes(data)
    fields = finite(plain(about(edit) | {"sha256": sha256_bytes(data)}))
    write_json(folder / ABOUT, fields | {"sha256_here": _hash(fields)})
    if edit.history:
        columns = dict.fromkeys(name for row in edit.history for name in row)
        lines = [
            ",".join(columns),
            *(",".join(str(row.get(c, "")) for c in columns) for row in edit.history),
        ]
        write_text(folder / HISTORY, "\n".join(lines) + "\n")
    return folder


def about(edit: Edit) -> dict[str, Any]:
    """Return the fields of edit.json without the hashes."""
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
        "record": edit.record.to_json(),
    }


def load_edit(folder: str | Path, model: Model | None = None) -> Edit:
    """Load the edit that a folder holds.

    Args:
        folder: with `edit.safetensors` and `edit.json`; `"bundled"` for the adaptation that ships
            with the package: of SmolLM2 where `model` is that, and of the bundled model otherwise;
            `"bundled-v2"` for the bundled model's adaptation to the harder reviews.
        model: the model it is for; checked now where it is given, and at the first use where it is
            not.

    Raises:
        EditError: the folder holds no edit, a damaged one, or one of another model.

    Examples:
        >>> from mech_absa import load_edit, load_model
        >>> load_edit("bundled", load_model()).layers
        (0, 1, 2, 3, 4, 5, 6, 7)
    """
    expect(folder, (str, Path), "load_edit(folder=...)", "a folder, bundled or bundled-v2")
    if model is not None:
        expect(model, Model, "load_edit(model=...)", "a Model, from load_model()")
    folder = _folder(folder, model)
    fields = _read(folder)
    data = (folder / WEIGHTS).read_bytes()
    if sha256_bytes(data) != fields.get("sha256"):
        raise EditError(
            f"{folder / WEIGHTS} is damaged: its hash is not the one that {ABOUT} names"
        )
    try:
        edit = _build(fields)
        tensors = load_tensors(data)
    except EditError as error:
        raise EditError(f"{folder / ABOUT} is damaged: {error}") from None
    except (SafetensorError, MechAbsaError, *BROKEN) as error:
        raise EditError(
            f"{folder} is damaged: its files do not describe an edit ({_short(error)})"
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


def _folder(name: str | Path, model: Model | None) -> Path:
    """Return the folder of an edit that ships with the package, or the folder of this name."""
    if str(name) == "bundled":
        return bundled_edit(model) or BUNDLED_EDIT
    return BUNDLED_V2_EDIT if str(name) == "bundled-v2" else Path(name)


def bundled_edit(model: Model | None) -> Path | None:
    """Return the folder of the adaptation of a model that ships with the package.

    Args:
        model: any; None for the bundled model.

    Returns:
        None where none ships for it.
    """
    ships = {str(BUNDLED): BUNDLED_EDIT, str(downloaded(SMOLLM2)): SMOLLM2_EDIT}
    folder = BUNDLED_EDIT if model is None else ships.get(str(model.source))
    return folder if folder is not None and (folder / ABOUT).is_file() else None


BROKEN = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError)
"""Errors that fields of a wrong type or size cause while an edit is built (a RecursionError is a
RuntimeError, and is named for the reader)."""


def _read(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's edit.json.

    Raises:
        EditError: a file is missing, edit.json is no JSON object, of an unknown version, or not the
            one that was written.
    """
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            raise EditError(
                f"{folder} holds no edit: {name} is missing; a folder with {ABOUT} and {WEIGHTS} is needed"
            )
    path = folder / ABOUT
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = fields["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise EditError(f"{path} is damaged: it is no JSON object with a schema version") from None
    if schema not in (1, EDIT_SCHEMA):
        raise EditError(
            f"{path} has schema version {_short(schema)}; this version of the package reads 1 and {EDIT_SCHEMA}"
        )
    if schema > 1 and fields.pop("sha256_here", None) != _hash(fields):
        raise EditError(
            f"{path} is damaged: its hash is not the one that was written with it; save the edit again"
        )
    return fields


def _build(fields: Mapping[str, Any]) -> Edit:
    """Return the edit that the fields describe, its parameters without values."""
    base = fields["base"]
    return Edit(
        [_part(p, fields["schema"]) for p in fields["parts"]],
        Shape(**base["shape"]),
        str(base["name"]),
        str(base["sha256"]),
        TrainingRecord.from_json(fields.get("record") or {}),
    )


def _part(fields: Mapping[str, Any], schema: int) -> Part:
    """Return one part; a head gate of version 1 becomes the variant that it was trained as."""
    if not isinstance(options := fields.get("options", {}), Mapping):
        raise EditError(f"options of a part are {_short(options)}; an object is needed")
    part = Part(**fields)
    if schema == 1 and part.family == "head_gate" and part.options.get("gates") != "none":
        former = {"charge": 1e-3} | dict(part.options) | {"gates": "tempered"}
        part = Part(part.family, part.place, former, part.lr, part.weight_decay)
    return part


def _hash(fields: Mapping[str, Any]) -> str:
    """Return the hash of the fields of edit.json, whatever their order and spacing."""
    return sha256_bytes(json.dumps(fields, sort_keys=True).encode())


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "..."


def _tensors(edit: Edit) -> dict[str, torch.Tensor]:
    return {
        f"{i:03d}.{name}": tensor
        for i, intervention in enumerate(edit)
        for name, tensor in intervention.state_dict().items()
    }
