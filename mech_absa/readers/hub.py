"""Read Hugging Face `datasets`: from the hub, a folder of `save_to_disk`, or a folder of data
files.

A split is written after the name, also after the name of a folder: `hf:owner/name:test`,
`hf:folder:test`.

Rows are either flat (one aspect per row, columns named as in `rows.FIELDS`) or have a list of
aspects beside the text, as the SemEval sets on the hub do (`aspectTerms: [{term, polarity, from,
to}]`, also as a dict of lists). Labels that are stored as class numbers get the names that the data
set gives them. The line of an example is its row, counted from 1.

Code from the hub is never executed: data sets that need a loading script are rejected, by this
module and by `datasets` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, choices
from .rows import FIELDS, Reading

if TYPE_CHECKING:
    from datasets import Dataset


def read(name: str, reading: Reading, split: str | None = None, subset: str | None = None) -> None:
    """Add the rows of one split of the data set `name`: a local folder if there is one, else an id
    on the hub.

    Raises:
        DataError: it cannot be loaded, or it has several splits and none was named.
    """
    dataset = _load(name, reading.source, split, subset)
    if reading.columns:
        reading.resolve(dataset.column_names, required=[f for f in reading.columns if f in FIELDS])
    nested = _nested_column(dataset, reading)
    for n, row in enumerate(dataset, 1):
        row = _named(dict(dataset.features), row)
        if nested is None:
            with reading.at(n):
                reading.add_row(_filled(row), n)
            continue
        rest = {c: v for c, v in row.items() if c != nested}
        aspects = _as_dicts(row[nested])
        if not aspects:
            reading.left_out["sentence without aspects"] += 1
        for k, aspect in enumerate(aspects, 1):
            with reading.at(n):
                reading.add_row(_filled({**rest, **aspect}), n, f"{reading.stem}:{n}.{k}")


def _load(name: str, source: str, split: str | None, subset: str | None) -> Dataset:
    """Return one split, memory-mapped."""
    import datasets  # seconds to import: only those who need it wait

    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, name=subset)
    except (
        Exception
    ) as e:  # a boundary: datasets raises whatever its network, file and format layers raise
        why = (str(e).strip() or type(e).__name__).partition("\n")[0].rstrip(".")
        holds = ""
        if folder.is_dir():
            inside = sorted(p.name for p in folder.iterdir())
            holds = f" (it holds {', '.join(inside[:8]) + (', ...' if len(inside) > 8 else '') or 'nothing'})"
        accepted = "one file, a folder of save_to_disk or of csv, json or parquet files, or the id of a public data set on the hub"
        raise DataError(
            f"no data set could be loaded from it{holds}: {why}; accepted: {accepted}", source
        ) from e
    if not isinstance(loaded, Mapping):
        if split is not None and split != str(loaded.split):
            raise DataError(
                f"there is no split {split!r}; it is one table, so leave the split out", source
            )
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        asked = "no split was named" if split is None else f"there is no split {split!r}"
        example = f"hf:{name.removeprefix('hf:')}:{next(iter(loaded))}"
        raise DataError(f"{asked}; there are {choices(loaded)}; write it as {example}", source)
    return loaded[split]


def _nested_column(dataset: Dataset, reading: Reading) -> str | None:
    """Return the column with a list of aspects per row, if no column has one aspect per row."""
    flat = [c for c in dataset.column_names if c not in (lists := _list_columns(dataset))]
    if "aspect" in reading.columns or any(_known(c, "aspect") for c in flat):
        return None
    fitting = [
        c
        for c, inside in lists.items()
        if any(_known(i, "aspect") for i in inside) and any(_known(i, "polarity") for i in inside)
    ]
    if len(fitting) > 1:
        raise DataError(
            f"the columns {choices(fitting)} could all hold the aspects; remove all but one",
            reading.source,
        )
    return fitting[0] if fitting else None


def _list_columns(dataset: Dataset) -> dict[str, list[str]]:
    """Return the columns that hold a list of records (or a record of lists), each with the names
    inside.
    """
    import pyarrow as pa

    found: dict[str, list[str]] = {}
    for column in dataset.features.arrow_schema:
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        elif not (
            pa.types.is_struct(kind)
            and all(pa.types.is_list(kind.field(i).type) for i in range(kind.num_fields))
        ):
            continue
        if pa.types.is_struct(kind):
            found[column.name] = [kind.field(i).name for i in range(kind.num_fields)]
    return found


def _known(name: str, as_field: str) -> bool:
    return name.strip().lower().replace(" ", "_") in FIELDS[as_field]


def _named(feature: Any, value: object) -> Any:
    """Replace class numbers in `value` by their names, at any depth; `datasets` writes -1 for
    none.
    """
    if isinstance(value, int) and (names := getattr(feature, "names", None)):
        return names[value] if value >= 0 else None
    if isinstance(value, dict):
        return {k: _named(feature[k], v) for k, v in value.items()}
    if isinstance(value, list):
        inside = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_named(inside, v) for v in value]
    return value


def _as_dicts(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return [dict(v) for v in value or ()]


def _filled(row: Mapping[str, Any]) -> dict[str, Any]:
    # A table has no way to leave a cell out: an empty one means "not known", not JSON's outright null.
    return {c: "" if v is None else v for c, v in row.items()}
