"""Run folders as they lie on disk -> tables and records, and nothing else.

A folder is told by its files: `effects.parquet` is a trace, `edit.json` a training, `scores.csv` an
evaluation, `matrix.csv` a domain matrix. Everything that a run may lack (an older record, no
selection, no side effects) is absent here too, never a made-up value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..errors import DataError
from ..records import read_json, read_table
from ..schemas import ABOUT, ANY_OBJECT, SITES

Kind = Literal["trace", "train", "evaluate", "matrix"]
SIGNS: dict[str, Kind] = {
    "effects.parquet": "trace",
    "edit.json": "train",
    "scores.csv": "evaluate",
    "matrix.csv": "matrix",
}
WORDS: dict[str, str] = {
    "trace": "Trace",
    "train": "Training",
    "evaluate": "Evaluation",
    "matrix": "Domain matrix",
}


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        path: of the folder.
        kind: what it holds.
        name: short, and told apart from the other runs of a report.
        record: `run.json`; empty where it is missing.
        tables: file name -> table, of the files that are there.
        notes: file name -> object, of the JSON files that are there.
    """

    path: Path
    kind: Kind
    name: str
    record: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(repr=False)
    notes: dict[str, Any] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.record.get("config") or {})


FILES: dict[str, tuple[str, ...]] = {
    "trace": ("effects.parquet", "pairs.parquet", "importance.csv", "about.json", "sites.json"),
    "train": ("history.csv", "edit.json"),
    "evaluate": (
        "scores.csv",
        "predictions.parquet",
        "comparisons.csv",
        "aggregate.csv",
        "side_effects.json",
    ),
    "matrix": ("matrix.csv", "summary.csv", "matrix_baselines.csv"),
}
NEEDED = {
    "trace": ("effects.parquet", "pairs.parquet", "importance.csv", "about.json"),
    "train": ("edit.json",),
    "evaluate": ("scores.csv",),
    "matrix": ("matrix.csv", "summary.csv"),
}
NOTES = {"about.json": ABOUT, "sites.json": SITES}
"""What a page needs of JSON files; of others, that they hold an object."""
EFFECT_COLUMNS = ["example_id", "kind", "layer", "head", "position", "role", "patched", "effect"]


def read_run(folder: str | Path, name: str | None = None) -> Run:
    """Read the run that a folder holds.

    Raises:
        DataError: it holds none, or one of its files is damaged or missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; the --out folder of a trace, a training, an evaluation or a domain matrix is needed"
        )
    kind = next((k for sign, k in SIGNS.items() if (folder / sign).is_file()), None)
    if kind is None:
        raise DataError(
            f"{folder} holds no run: none of {', '.join(SIGNS)} is there; the --out folder of a finished run is needed"
        )
    if missing := [f for f in NEEDED[kind] if not (folder / f).is_file()]:
        raise DataError(
            f"{folder} holds only part of a {kind} run: {missing[0]} is missing; let the run finish first"
        )
    tables: dict[str, pd.DataFrame] = {}
    notes: dict[str, Any] = {}
    for file in (*FILES[kind], "run.json"):
        path = folder / file
        if not path.is_file():
            continue
        if path.suffix == ".json":
            notes[file] = read_json(path, NOTES.get(file, ANY_OBJECT), DataError)
        else:
            columns = EFFECT_COLUMNS if file == "effects.parquet" else None
            tables[file] = read_table(path, columns, DataError)
    for file in ("effects.parquet", "importance.csv"):
        if file in tables:
            tables[file] = with_whole_numbers(tables[file])
    record = notes.pop("run.json", {})
    return Run(
        folder,
        kind,
        name or folder.resolve().name,
        record if isinstance(record, dict) else {},
        tables,
        notes,
    )


def with_whole_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with -1 for "no head" and "no position": older runs have that, newer ones
    leave them empty.
    """
    columns = [c for c in ("head", "position") if c in table]
    return table.assign(**{c: table[c].fillna(-1).astype(int) for c in columns})


def read_runs(folders: list[Path]) -> list[Run]:
    """Read several runs, each under a unique name: the folder's, with as much of its path as is
    needed.
    """
    paths = [f.resolve() for f in folders]
    names = ["/".join(p.parts[-1:]) for p in paths]
    depth = 1
    while len(set(names)) < len(names) and depth < 8:
        depth += 1
        names = [
            n if names.count(n) == 1 else "/".join(p.parts[-depth:])
            for n, p in zip(names, paths, strict=True)
        ]
    return [read_run(f, n) for f, n in zip(folders, names, strict=True)]
