"""Write, read and guard the files of a run.

Every file is written to a temporary name beside its place and then moved there, so a killed run
leaves complete files or none. JSON is strict: a number that is NaN or infinite becomes `null`,
because JSON has no other word for it, and a value of an unknown type raises an error instead of
becoming its `str`. Files are checked against `mech_absa.schemas` when they are read.

`RunFolder` guards an output folder. It rejects a folder that holds something else, gives the folder
to one process at a time, and keeps the parts of a sweep while it runs. A run with the same
configuration, data and model can continue where a killed one stopped. `run.json` holds everything
that is needed to make the result again. The folder `.run` exists until the last file is written, so
a folder with `.run` is a run that has not ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from .errors import MechAbsaError, RunFolderError

if TYPE_CHECKING:
    import pandas as pd
    from filelock import FileLock

SCHEMA = 2
"""Version of the files of a run folder. 2 added `inputs` and `files` to run.json; 1 is still
read.
"""
CHUNK = 1 << 17
"""Rows of a table that are in memory at a time where it is read in chunks."""
TEMPORARY = ".tmp-"
"""Prefix of files and folders that a killed process may leave; the next owner of the folder removes
them.
"""


class About(TypedDict, total=False):
    """What a table of effects holds: `Effects.about`, `ImportanceMap.about` and `about.json`.

    Runs of earlier versions lack some keys.

    Keys:
        model, n_layers, n_heads, dtype, adapter: what was traced; the adapter is a name or None.
        corruption, corruption_settings, changed_roles: how corrupted runs were made, and the roles
            whose own tokens the corrupted texts change.
        direction: `denoise`, `noise`, `both`, or `interaction`.
        metric, unit, labels, template: what was measured, of which question.
        method, steps, rules, exact_top: the engine or estimate; steps of `ig`, rules of `relp`.
        by, window, kinds: cells by role or by token, layers per window, kinds of site.
        considered, kept, sentences, dropped, sigma, draw_sd, classes_kept, mixed_polarity: the pairs.
        flops: of the sweep, as planned.
        self_checks: name -> largest difference, the tolerance and the cells compared.
        estimate_against_exact, half_precision_control: how far an estimate, or half precision, is off.
        rule: which direction's effects choose sites, where both were traced.
        excerpt_of: pairs of the whole run, where a folder holds fewer.
        level, adjustment, traced_by, n_pairs, n_sentences, p_floor, resolution, tested_cells,
            skewed_cells: of a map alone.
    """

    model: str
    n_layers: int
    n_heads: int
    dtype: str
    adapter: str | None
    corruption: str
    corruption_settings: dict[str, Any]
    changed_roles: list[str]
    direction: str
    metric: str
    unit: str
    labels: list[str]
    template: str
    method: str
    steps: int | None
    rules: list[str]
    exact_top: int
    by: str
    window: int
    kinds: list[str]
    considered: int
    kept: int
    sentences: int
    dropped: dict[str, int]
    sigma: float | None
    draw_sd: float | None
    classes_kept: dict[str, int]
    mixed_polarity: int
    flops: int
    self_checks: dict[str, Any]
    estimate_against_exact: dict[str, Any]
    half_precision_control: dict[str, Any]
    rule: str
    excerpt_of: int
    level: float
    adjustment: str
    traced_by: str | None
    n_pairs: int
    n_sentences: int
    p_floor: float
    resolution: str
    tested_cells: int
    skewed_cells: int


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; move it onto `path` when the block ends, remove it when
    the block fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: writers such as matplotlib choose their format by it.
    handle, name = tempfile.mkstemp(
        prefix=f"{TEMPORARY}{path.stem}-", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes private files; others must read a result
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())  # or a power cut could leave the name without the bytes
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, completely or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: object) -> Any:
    """Return `value` in JSON's types, floats as they are.

    Dataclasses become objects, enums their values, paths text, tuples and sets lists, numpy scalars
    numbers.

    Raises:
        TypeError: a value, or a key of a mapping, has no such form. An array has none: `tolist()`
            says that a list is meant.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {_key(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return [plain(v) for v in sorted(value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    raise TypeError(
        f"a {type(value).__name__} cannot be written as JSON; numbers, text, lists, objects, paths, enums and dataclasses can"
    )


def _key(key: object) -> str:
    """Return a key of a mapping as JSON has it."""
    if isinstance(key, Enum):
        key = key.value
    if not isinstance(key, (str, int)):
        raise TypeError(
            f"a {type(key).__name__} cannot be the key of a JSON object; text and whole numbers can"
        )
    return str(key)


def finite(value: object) -> Any:
    """Return plain `value` with None for every number that is NaN or infinite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: object) -> None:
    """Write `value` as strict JSON, keys in the order given, completely or not at all; NaN and
    infinity become `null`.

    Raises:
        TypeError: it holds a value that `plain` does not know.
    """
    text = json.dumps(finite(plain(value)), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def read_json(
    path: str | Path,
    schema: Mapping[str, Any] | None = None,
    error: type[MechAbsaError] = RunFolderError,
) -> Any:
    """Read a JSON file that this package wrote.

    Args:
        path: of the file.
        schema: what it must look like, from `mech_absa.schemas`; not checked where None.
        error: class of what is raised.

    Returns:
        its value. `NaN` and `Infinity`, which versions before 0.2 wrote, are read as None.

    Raises:
        MechAbsaError: it cannot be read, is no JSON, names a key twice, or does not look like
            `schema`.
    """
    from .schemas import problem

    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=lambda word: None)
    except FileNotFoundError:
        raise error(f"there is no file {path}") from None
    except OSError as failure:
        raise error(f"{path} cannot be read ({failure.strerror})") from None
    except UnicodeDecodeError:
        raise error(f"{path} is damaged: it is not UTF-8 text") from None
    except json.JSONDecodeError as failure:
        raise error(f"{path}:{failure.lineno} is damaged: it is not JSON ({failure.msg})") from None
    except (ValueError, RecursionError) as failure:
        what = "it is nested too deep" if isinstance(failure, RecursionError) else str(failure)
        raise error(f"{path} is damaged: {what}") from None
    if schema is not None and (wrong := problem(value, schema)) is not None:
        raise error(f"{path} is damaged: {wrong}")
    return value


def read_table(
    path: str | Path,
    columns: Sequence[str] | None = None,
    error: type[MechAbsaError] = RunFolderError,
) -> pd.DataFrame:
    """Read a table that this package wrote, and check it by `schemas.TABLES`.

    Args:
        path: of a CSV or parquet file.
        columns: of a parquet file; all where None.
        error: class of what is raised.

    Raises:
        MechAbsaError: it cannot be read, or does not look like the schema of its name.
    """
    import pandas as pd

    from .schemas import TABLES, table_problem

    path = Path(path)
    csv = path.suffix == ".csv"
    try:
        table = pd.read_csv(path) if csv else pd.read_parquet(path, columns=columns)
    except FileNotFoundError:
        raise error(f"there is no file {path}") from None
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"{path} is damaged ({reason}); make the run again") from None
    schema = TABLES.get(path.name)
    if schema is not None and (wrong := table_problem(table, schema, not csv)) is not None:
        raise error(f"{path} is damaged ({wrong}); make the run again")
    return table


def read_chunks(
    path: str | Path, columns: Sequence[str], error: type[MechAbsaError] = RunFolderError
) -> Iterator[pd.DataFrame]:
    """Read a parquet table that this package wrote, about `CHUNK` rows at a time.

    Args:
        path: of a parquet file.
        columns: that are read.
        error: class of what is raised.

    Raises:
        MechAbsaError: it cannot be read, or does not look like the schema of its name.
    """
    import pyarrow.parquet as pq

    from .schemas import TABLES, table_problem

    path = Path(path)
    schema = TABLES[path.name]
    try:
        with pq.ParquetFile(path) as file:
            parts = file.iter_batches(batch_size=CHUNK, columns=list(columns))
            tables = (part.to_pandas() for part in parts) if file.metadata.num_rows else None
            for table in tables or [file.schema_arrow.empty_table().to_pandas()]:
                if (wrong := table_problem(table, schema, True)) is not None:
                    raise error(f"{path} is damaged ({wrong}); make the run again")
                yield table
    except FileNotFoundError:
        raise error(f"there is no file {path}") from None
    except (ValueError, OSError, KeyError, TypeError, RuntimeError) as failure:
        reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise error(f"{path} is damaged ({reason}); make the run again") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; reject a key that is there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [k for k, _ in pairs]
        twice = next(k for k in names if names.count(k) > 1)
        raise ValueError(f"an object names the key {twice[:80]!r} more than once")
    return value


def sha256_bytes(*chunks: bytes) -> str:
    """Return the SHA-256 of the chunks, one after the other."""
    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else sha256_bytes(f.read())
        )


def fingerprint(config: object) -> str:
    """Return a hash of a configuration: two runs with the same one make the same result."""
    return sha256_bytes(json.dumps(plain(config), sort_keys=True).encode())[:16]


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = (
        "mech-absa",
        "torch",
        "transformer-lens",
        "transformers",
        "numpy",
        "scipy",
        "statsmodels",
        "accelerate",
    )
    known = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[name] = importlib.metadata.version(name)
    return known


class RunFolder:
    """Guard an output folder that belongs to one configuration, on one set of inputs, and to one
    process at a time.

    Nothing is created before `open()`: a command checks its flags, its data and its model first, so
    that bad input leaves no trace.

    Args:
        path: the folder.
        config: what the run does; the keys in `free` may change between a run and its resumption.
        resume: take up a killed run of the same configuration.
        free: keys of the configuration that do not change the result (device, report, ...).

    Raises:
        RunFolderError: the folder is not empty and `resume` is off, it holds another run, or
            another process is writing to it.
    """

    STATE = ".run"

    def __init__(
        self,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool = False,
        free: Iterable[str] = (),
    ):
        self.path = Path(path)
        self.config = plain(config)
        self.resume = resume
        self.key = fingerprint({k: v for k, v in self.config.items() if k not in set(free)})
        self.inputs: dict[str, Any] = {}
        self.started = time.time()
        self._free = set(free)
        self._lock: FileLock | None = None
        self._new = False
        self._check()

    @property
    def state(self) -> Path:
        """Return the folder of parts, which exists while the run goes on."""
        return self.path / self.STATE

    @property
    def _config_file(self) -> Path:
        return self.state / "config.json"

    @property
    def finished(self) -> bool:
        """Return whether the folder already holds the whole result of this configuration.

        Raises:
            RunFolderError: it did, and a file of it is gone.
        """
        record = self.path / "run.json"
        if not record.exists() or self._config_file.exists():
            return False
        listed = read_json(record).get("files", [])
        for name in listed if isinstance(listed, list) else []:
            # os.path.exists is false of a name that no file system takes; Path.exists raises.
            if not os.path.exists(self.path / str(name)):
                raise RunFolderError(
                    f"--out {self.path} holds a finished run, but its {str(name)[:80]} is gone; choose another folder"
                )
        return True

    def _empty(self) -> bool:
        """Return whether the folder holds nothing but what a process leaves that was killed at
        once.
        """
        inside = [p for p in self.path.iterdir() if not p.name.startswith(TEMPORARY)]
        return all(p.name == self.STATE for p in inside) and not self._config_file.exists()

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(
                f"--out {self.path} is a file; a folder that is new or empty is needed"
            )
        if not self.path.exists() or self._empty():
            return
        if not self.resume:
            raise RunFolderError(
                f"--out {self.path} is not empty; choose a new folder, or give --resume to take up the run it holds"
            )
        held = self._held()
        if held.get("key") != self.key:
            mine, theirs = self.config, held.get("config") or {}
            differ = sorted(
                k for k in {*mine, *theirs} - self._free if mine.get(k) != theirs.get(k)
            )
            raise RunFolderError(
                f"--out {self.path} holds a run with another configuration (it differs in {', '.join(differ) or 'its version'}); "
                "choose another folder, or give the same flags again"
            )
        self._check_inputs(held)

    def _held(self) -> dict[str, Any]:
        """Return what the folder says of the run that it holds."""
        from .schemas import STATE

        record = self.path / "run.json"
        for path in (self._config_file, record):
            if path.exists():
                held: dict[str, Any] = read_json(path, STATE)
                return held
        raise RunFolderError(
            f"--out {self.path} holds no run to resume; choose a new or empty folder"
        )

    def _check_inputs(self, held: Mapping[str, Any]) -> None:
        theirs = held.get("inputs") or {}
        differ = [k for k in self.inputs if theirs and self.inputs[k] != theirs.get(k)]
        if differ:
            raise RunFolderError(
                f"--out {self.path} holds a run on other inputs: {', '.join(differ)} changed since it began; choose another folder"
            )

    def bind(self, inputs: Mapping[str, Any]) -> RunFolder:
        """Name what the run reads, by its hashes. A killed run continues only with the same data
        and model.

        Raises:
            RunFolderError: the folder holds a run on others.
        """
        known = versions()
        self.inputs = plain(inputs) | {
            k: known[k] for k in ("mech-absa", "torch", "transformer-lens") if k in known
        }
        if self.path.is_dir() and not self._empty():
            self._check_inputs(self._held())
        return self

    def open(self) -> RunFolder:
        """Create the folder, lock it, and write the configuration into it; do nothing if that is
        done.

        Raises:
            RunFolderError: another process has the folder.
        """
        if self._lock is not None:
            return self
        from filelock import FileLock, Timeout

        self._new = not self.path.exists()
        self.state.mkdir(parents=True, exist_ok=True)
        # The operating system releases the lock when the process ends, however it ends.
        lock = FileLock(self.state / "lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise RunFolderError(
                f"--out {self.path} is being written by another process; wait for it, or choose another folder"
            ) from None
        self._lock = lock
        try:
            self._check()  # the other process may have come and gone since the first check
            if self.finished:
                raise RunFolderError(f"--out {self.path} was finished by another process meanwhile")
        except RunFolderError:
            self._let_go()
            raise
        self._sweep_up()
        if not self._config_file.exists():
            write_json(
                self._config_file,
                {
                    "schema": SCHEMA,
                    "key": self.key,
                    "config": self.config,
                    "inputs": self.inputs,
                },
            )
        _OPEN.append(self)
        return self

    def _sweep_up(self) -> None:
        """Remove temporary files of a process that was killed."""
        for stale in list(self.path.rglob(f"{TEMPORARY}*")):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)

    def part(self, name: str) -> Path:
        """Return where the part of that name is kept while the run goes on."""
        return self.state / name

    def write(self, name: str, writer: Callable[[Path], Any]) -> Path:
        """Call `writer(temporary path)`, then move the file to `name`."""
        with atomic(self.path / name) as temporary:
            writer(temporary)
        return self.path / name

    def finish(self, record: Mapping[str, Any], then: Callable[[Path], Any] | None = None) -> Path:
        """Write `run.json`, call `then(folder)` (it writes the report), and drop the parts.

        A run that is killed before the last of these is taken up again with `resume`.
        """
        files = sorted(
            str(p.relative_to(self.path))
            for p in self.path.rglob("*")
            if p.is_file()
            and self.state not in p.parents
            and p.name not in ("run.json", "report.html")
        )
        write_json(
            self.path / "run.json",
            {
                "schema": SCHEMA,
                "key": self.key,
                "config": self.config,
                "inputs": self.inputs,
                "versions": versions(),
                **record,
                "files": files,
                "seconds": round(time.time() - self.started, 3),
            },
        )
        if then is not None:
            then(self.path)
        self._drop_state()
        self._let_go()
        return self.path / "run.json"

    def _drop_state(self) -> None:
        """Remove the parts in one step: a folder is either a run that goes on or one that ended."""
        gone = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=self.path))
        with contextlib.suppress(OSError):
            os.replace(self.state, gone / "run")
        shutil.rmtree(gone, ignore_errors=True)
        shutil.rmtree(self.state, ignore_errors=True)

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self in _OPEN:
            _OPEN.remove(self)

    def close(self) -> None:
        """Release a run that did not end; a folder to which nothing was written is removed."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            inside = {p.name for p in self.path.rglob("*")} - {self.STATE, "config.json", "lock"}
            if not inside and not self.resume:
                shutil.rmtree(self.path if self._new else self.state, ignore_errors=True)
        self._let_go()


_OPEN: list[RunFolder] = []
"""Folders of this process whose run has not ended."""


def close_all() -> None:
    """Release every folder whose run did not end. The commands call it when they fail."""
    for folder in list(_OPEN):
        folder.close()
