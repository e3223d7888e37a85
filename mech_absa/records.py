"""What a run leaves behind, and how it is written.

Every file is written to a temporary name beside its place and moved there whole, so that a killed run leaves complete files or none.
`RunFolder` guards an output folder: it refuses one that holds something else, keeps the parts of a sweep while it runs, and lets a run
with the same configuration take up where a killed one stopped. `run.json` is everything needed to make the result again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from .errors import RunFolderError

SCHEMA = 1
"""Version of the files; raised when a reader of old files would be misled."""


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; moved onto `path` when the block ends, removed when it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept in front: writers such as matplotlib choose their format by it.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(
            0o666 & ~mask
        )  # mkstemp makes private files; a result is to be read by others
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`text` as UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` in JSON's types: dataclasses as objects, enums and paths as text, tuples as lists, numpy scalars as numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return str(value)


def write_json(path: str | Path, value: Any) -> None:
    """`value` as JSON, keys in the order given, whole or not at all."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def sha256_bytes(*chunks: bytes) -> str:
    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return h.hexdigest()


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else sha256_bytes(f.read())
        )


def fingerprint(config: Any) -> str:
    """A hash of a configuration: two runs with the same one make the same result."""
    return sha256_bytes(json.dumps(plain(config), sort_keys=True).encode())[:16]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
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
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class RunFolder:
    """An output folder that belongs to one configuration.

    Nothing is created before `open()`: a command checks its flags, its data and its model first, so that a bad input leaves no trace.

    Args:
        path: the folder.
        config: what the run does; part of it, the keys in `free`, may change between a run and its resumption.
        resume: take up a killed run of the same configuration.
        free: keys of the configuration that do not change the result (device, memory, engine chunking ...).

    Raises:
        RunFolderError: the folder is not empty and `resume` is off, or holds another run.
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
        self.started = time.time()
        self._check()

    def _check(self) -> None:
        if self.path.is_file():
            raise RunFolderError(
                f"--out {self.path} is a file; a folder that is new or empty is needed"
            )
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.resume:
            raise RunFolderError(
                f"--out {self.path} is not empty; choose a new folder, or give --resume to take up the run it holds"
            )
        state = self.path / self.STATE / "config.json"
        record = self.path / "run.json"
        if not state.exists() and not record.exists():
            raise RunFolderError(
                f"--out {self.path} holds no run to resume; choose a new or empty folder"
            )
        held = json.loads((state if state.exists() else record).read_text(encoding="utf-8"))
        if held.get("key") != self.key:
            mine, theirs = self.config, held.get("config", {})
            differ = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
            raise RunFolderError(
                f"--out {self.path} holds a run with another configuration (it differs in {', '.join(differ) or 'its data or model'}); "
                "choose another folder, or give the same flags again"
            )

    @property
    def finished(self) -> bool:
        """Whether the folder already holds the whole result of this configuration."""
        return (self.path / "run.json").exists()

    @property
    def state(self) -> Path:
        return self.path / self.STATE

    def open(self) -> RunFolder:
        """Create the folder and note the configuration in it."""
        self.state.mkdir(parents=True, exist_ok=True)
        if not (self.state / "config.json").exists():
            write_json(self.state / "config.json", {"key": self.key, "config": self.config})
        return self

    def part(self, name: str) -> Path:
        """Where the part of that name is kept while the run goes on."""
        return self.state / name

    def write(self, name: str, writer: Callable[[Path], Any]) -> Path:
        """`writer(temporary path)`, then the file moved to `name`."""
        with atomic(self.path / name) as temporary:
            writer(temporary)
        return self.path / name

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write `run.json`, the last file of a run, and drop the parts."""
        write_json(
            self.path / "run.json",
            {
                "schema": SCHEMA,
                "key": self.key,
                "config": self.config,
                "versions": versions(),
                **record,
                "seconds": round(time.time() - self.started, 3),
            },
        )
        shutil.rmtree(self.state, ignore_errors=True)
        return self.path / "run.json"
