"""Effects in files, read a few pairs at a time, so that memory does not grow with the examples.

A trace by the command writes one part per batch as the batch ends (`write_part`), with one row group
per pair. `join_parts` puts the parts together in the order of the pairs and writes `effects.parquet`, whose
row groups hold whole pairs and about `ROWS` rows. `StoredEffects` gives maps, single examples and
samples of cells from that file, one row group in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from ..records import About, atomic, write_json
from .effects import Effects
from .importance import ImportanceMap
from .plan import Plan, leading_cells, without_controls
from .table import pair_table
from .traced import as_written, matrix_of, with_absent, write_frame

ROWS = 1 << 17
"""Rows of a row group of `effects.parquet`, give or take one pair: what is in memory at a time."""
OPEN = 64
"""Parts that are open at a time while they are joined."""
PAIRS = b"mech_absa.pairs"
"""Key of a part's metadata: the ids of the pairs of its row groups, in order."""
FLOPS = b"mech_absa.flops"


def write_part(frame: pd.DataFrame, path: Path) -> None:
    """Write the effects of one batch with one row group per pair.

    Args:
        frame: of `Plan.trace_batch`.
        path: of the part.
    """
    codes, ids = pd.factorize(frame["example_id"])
    frame = frame.iloc[np.argsort(codes, kind="stable")]
    more = {PAIRS: json.dumps(list(ids)), FLOPS: str(frame.attrs.get("flops", 0))}
    frame.attrs = {}
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **more})
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd") as writer,
    ):
        at = 0
        for rows in np.bincount(codes, minlength=len(ids)):
            writer.write_table(table.slice(at, int(rows)), row_group_size=int(rows))
            at += int(rows)


class Parts:
    """The parts of a trace, read pair by pair in the order of the pairs.

    Args:
        paths: of all parts.

    Attributes:
        flops: floating-point operations of all parts, as planned.

    Raises:
        DataError: a part is damaged.
    """

    def __init__(self, paths: Iterable[Path]):
        self.flops = 0
        self._at: dict[str, tuple[Path, int]] = {}
        self._open: OrderedDict[Path, pq.ParquetFile] = OrderedDict()
        for path in paths:
            with _read(path), pq.ParquetFile(path) as file:
                about = file.schema_arrow.metadata
                self.flops += int(about[FLOPS])
                ids = json.loads(about[PAIRS])
                self._at |= {name: (path, group) for group, name in enumerate(ids)}

    def close(self) -> None:
        """Close the parts that are open."""
        while self._open:
            self._open.popitem()[1].close()

    def chunks(self, ids: Sequence[str]) -> Iterator[pd.DataFrame]:
        """Yield tables of whole pairs, in the order of `ids`, each of about `ROWS` rows."""
        kept: list[pa.Table] = []
        for name in ids:
            if name not in self._at:
                continue  # a site that names a role, in a pair that lacks it
            path, group = self._at[name]
            with _read(path):
                kept.append(self._file(path).read_row_group(group))
            if sum(t.num_rows for t in kept) >= ROWS:
                yield _frame(kept)
                kept = []
        if kept:
            yield _frame(kept)

    def _file(self, path: Path) -> pq.ParquetFile:
        if path not in self._open:
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[path] = pq.ParquetFile(path)
        self._open.move_to_end(path)
        return self._open[path]


def _frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    frame: pd.DataFrame = pa.concat_tables(tables).combine_chunks().to_pandas()
    return frame


@contextlib.contextmanager
def _read(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{path} is damaged ({reason}); make the run again") from None


@dataclass(frozen=True, eq=False)
class StoredEffects:
    """Effects that lie in the folder of a run. They have what `Effects` has, but for the whole table.

    Attributes:
        folder: which holds `effects.parquet`, and `controls.parquet` if there are controls.
        pairs, about: as in `Effects`.
        groups: ids of the pairs of each row group.
        controlled: the row group of the controls of each row group of effects; None without any.
        size: rows.
        columns: of `effects.parquet`.
        change: what is made of the effects of a few pairs before anything is computed from them.
    """

    folder: Path
    pairs: pd.DataFrame
    about: About
    groups: tuple[tuple[str, ...], ...]
    controlled: tuple[int | None, ...]
    size: int
    columns: tuple[str, ...]
    change: Callable[[Effects], Effects] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return self.size

    @property
    def total(self) -> pd.Series:
        """Return TE of every pair, as `Effects.total`."""
        return self._some((), self.pairs).total

    @property
    def kinds(self) -> list[str]:
        """Return the kinds of state that were traced."""
        return list(self.about.get("kinds") or ())

    def chunks(self) -> Iterator[Effects]:
        """Yield the effects of a few pairs after the other, in order."""
        pairs = self.pairs.set_index("example_id", drop=False)
        path, controls = self.folder / "effects.parquet", self.folder / "controls.parquet"
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(pq.ParquetFile(path))
            other = None
            if any(group is not None for group in self.controlled):
                other = stack.enter_context(pq.ParquetFile(controls))
            for group, (ids, control) in enumerate(zip(self.groups, self.controlled, strict=True)):
                few = self._some(ids, pairs.loc[list(ids)].reset_index(drop=True))
                frame = with_absent(file.read_row_group(group).to_pandas())
                matched = None
                if other is not None and control is not None:
                    matched = other.read_row_group(control).to_pandas()
                few = replace(few, frame=frame, controls=matched)
                yield few if self.change is None else self.change(few)

    def _some(self, ids: Sequence[str], pairs: pd.DataFrame) -> Effects:
        nothing = pd.DataFrame({name: [] for name in self.columns})
        return Effects(nothing, pairs, self.about)

    def over(
        self, change: Callable[[Effects], Effects], about: About | None = None
    ) -> StoredEffects:
        """Return a view of these effects that changes them before use, pairs by pairs.

        Args:
            change: must treat every pair by itself.
            about: what is said of the result.
        """
        return replace(self, change=change, about=self.about | (about or About()))

    def matrix(self, by: str = "role") -> tuple[np.ndarray, pd.DataFrame]:
        """Return effects as `[pair cell]`, and what each cell is; see `Effects.matrix`."""
        return matrix_of((few.frame for few in self.chunks()), self.pairs, by)

    def matched(self, cells: pd.DataFrame) -> np.ndarray | None:
        """Return the control of each cell of a map by role; see `Effects.matched`."""
        if "role" not in cells or all(group is None for group in self.controlled):
            return None
        place = {name: i for i, name in enumerate(self.pairs["example_id"])}
        values = np.full((len(place), len(cells)), np.nan)
        for few in self.chunks():
            if (some := few.matched(cells)) is not None:
                values[[place[name] for name in few.pairs["example_id"]]] = some
        return values

    def importance(self, by: str = "role", **options: Any) -> ImportanceMap:
        """Return averages over pairs with intervals; see `ImportanceMap.of`."""
        return ImportanceMap.of(self, by=by, **options)

    def example(self, example_id: str) -> pd.DataFrame:
        """Return the rows of one pair.

        Raises:
            DataError: no such example was traced.
        """
        some = (few for few in self.chunks() if example_id in set(few.pairs["example_id"]))
        few = next(some, None)
        if few is None:
            return self._some((), self.pairs).example(example_id)
        return few.example(example_id)

    def sample(self, column: str, cells: int, seed: int) -> pd.DataFrame:
        """Return rows drawn at random among those whose `column` is not 0."""
        there = [np.flatnonzero(few.frame[column] != 0) for few in self.chunks()]
        ends = np.cumsum([0, *map(len, there)])
        drawn = pd.Series(np.arange(ends[-1])).sample(frac=1.0, random_state=seed).head(cells)
        rows = []
        for few, at, start in zip(self.chunks(), there, ends, strict=False):
            mine = drawn[(drawn >= start) & (drawn < start + len(at))]
            found = few.frame.iloc[at[mine.to_numpy() - start]]
            rows.append(found.set_axis(mine.index, axis=0))
        return pd.concat(rows).loc[drawn.index] if rows else self._some((), self.pairs).frame


def join_parts(plan: Plan, parts: Sequence[Path], folder: Path) -> StoredEffects:
    """Write `effects.parquet`, `pairs.parquet`, and `controls.parquet` if any, from the parts.

    Args:
        plan: of the trace.
        parts: one per batch.
        folder: of the run.

    Returns:
        the effects, which are read from these files when something is asked of them.

    Raises:
        DataError: a part is damaged.
    """
    files = Parts(parts)
    ids = [pair.id for pair in plan.pairs]
    leading = None
    if plan.request.exact_top:
        leading = leading_cells(
            (without_controls(chunk)[0] for chunk in files.chunks(ids)), plan.request.exact_top
        )
    runs, groups, controlled, columns, size = [], [], [], (), 0
    with contextlib.closing(files), _Writer(folder / "effects.parquet") as effects, _Writer(folder / "controls.parquet") as controls:  # fmt: skip
        for chunk in files.chunks(ids):
            frame, control = without_controls(chunk)
            if leading is not None:
                frame = plan.finish_exactly(frame, leading)
            frame = as_written(with_absent(frame))
            groups.append(tuple(dict.fromkeys(frame["example_id"])))
            controlled.append(None if control is None else controls.groups)
            if control is not None:
                controls.write(control)
            effects.write(frame)
            runs.append(frame.drop_duplicates("example_id")[["example_id", "clean", "corrupted"]])
            columns, size = tuple(frame.columns), size + len(frame)
    pairs = pair_table(plan.model, plan.pairs, pd.concat(runs, ignore_index=True))
    write_frame(pairs, folder / "pairs.parquet")
    about = plan.about() | {"flops": files.flops}
    return StoredEffects(folder, pairs, about, tuple(groups), tuple(controlled), size, columns)


def save_about(effects: StoredEffects) -> None:
    """Write `about.json`."""
    write_json(effects.folder / "about.json", effects.about)


class _Writer:
    """Write a parquet file row group by row group; no file where nothing was written.

    The file appears under its name when it is whole.

    Args:
        path: of the file.

    Attributes:
        groups: row groups written so far.
    """

    def __init__(self, path: Path):
        self.path, self.groups = path, 0
        self._stack = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def write(self, frame: pd.DataFrame) -> None:
        """Write one row group."""
        frame.attrs = {}
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if self._writer is None:
            temporary = self._stack.enter_context(atomic(self.path))
            self._writer = self._stack.enter_context(
                pq.ParquetWriter(temporary, table.schema, compression="zstd")
            )
        self._writer.write_table(table, row_group_size=max(1, len(table)))
        self.groups += 1

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


__all__ = ["ROWS", "Parts", "StoredEffects", "join_parts", "save_about", "write_part"]
