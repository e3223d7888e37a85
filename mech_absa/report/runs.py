"""Run folders as they lie on disk -> tables and records, and nothing else.

A folder is told by its files: `effects.parquet` is a trace, `edit.json` a training, `scores.csv` an
evaluation, `matrix.csv` a domain matrix. Everything that a run may lack (an older record, no
selection, no side effects) is absent here too, never a made-up value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ..errors import DataError
from ..records import read_chunks, read_json, read_table
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
class EffectRows:
    """The table of effects of a trace, which may be too large for memory.

    Attributes:
        source: the table, or the file that holds it.
        size: rows.
        kinds: kinds of state, in the order in which they first appear.
        layers: in ascending order.
        by_role: whether no row names a position.
    """

    source: pd.DataFrame | Path
    size: int
    kinds: list[str]
    layers: list[int]
    by_role: bool

    def __len__(self) -> int:
        return self.size

    @classmethod
    def of(cls, source: pd.DataFrame | Path) -> EffectRows:
        """Look through a table, or through a file, once.

        Raises:
            DataError: the file is damaged.
        """
        size, by_role = 0, True
        kinds: dict[str, None] = {}
        layers: set[int] = set()
        for rows in _chunks(source):
            size += len(rows)
            kinds |= dict.fromkeys(map(str, rows["kind"].unique()))
            layers |= {int(layer) for layer in rows["layer"].unique()}
            by_role = by_role and bool((rows["position"] < 0).all())
        return cls(source, size, list(kinds), sorted(layers), by_role)

    def of_pairs(self, wanted: Iterable[str]) -> Iterator[pd.DataFrame]:
        """Yield the rows of some pairs, a few pairs at a time.

        The rows of a pair stand together in the file; they are given together too.
        """
        names, rest = set(wanted), None
        for rows in _chunks(self.source):
            rows = rows[rows["example_id"].isin(names)]
            rows = rows if rest is None else pd.concat([rest, rows])
            if not len(rows):
                continue
            last = (rows["example_id"] == rows["example_id"].iloc[-1]).to_numpy()
            rest = rows[last]  # the next part may hold more of this pair
            if not last.all():
                yield rows[~last]
        if rest is not None:
            yield rest


def _chunks(source: pd.DataFrame | Path) -> Iterator[pd.DataFrame]:
    """Yield a table, or a file's part by part, with whole numbers for heads and positions."""
    if isinstance(source, pd.DataFrame):
        yield with_whole_numbers(source)
        return
    for rows in read_chunks(source, EFFECT_COLUMNS, DataError):
        yield with_whole_numbers(rows)


@dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        path: of the folder.
        kind: what it holds.
        name: short, and told apart from the other runs of a report.
        record: `run.json`; empty where it is missing.
        tables: file name -> table, of the files that are there, but for the effects of a trace.
        notes: file name -> object, of the JSON files that are there.
        effects: of a trace.
    """

    path: Path
    kind: Kind
    name: str
    record: dict[str, Any]
    tables: dict[str, pd.DataFrame] = field(repr=False)
    notes: dict[str, Any] = field(repr=False)
    effects: EffectRows | None = field(default=None, repr=False)

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
        "scorecard.json",
        "fairness.csv",
        "fairness.json",
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
    effects = None
    for file in (*FILES[kind], "run.json"):
        path = folder / file
        if not path.is_file():
            continue
        if file == "effects.parquet":
            effects = EffectRows.of(path)
        elif path.suffix == ".json":
            notes[file] = read_json(path, NOTES.get(file, ANY_OBJECT), DataError)
        else:
            tables[file] = read_table(path, error=DataError)
    if "importance.csv" in tables:
        tables["importance.csv"] = with_whole_numbers(tables["importance.csv"])
    record = notes.pop("run.json", {})
    return Run(
        folder,
        kind,
        name or folder.resolve().name,
        record if isinstance(record, dict) else {},
        tables,
        notes,
        effects,
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
