"""Describe what a study runs: public commands, their flags, and what is kept of their outcome.

`builtin.py` and `smollm2.py` list studies in these terms, `reproduce.py` runs them, and `study.py`
reads what was kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mech_absa.errors import ConfigError
from mech_absa.sites import Site

ROOT = Path(__file__).resolve().parents[1]
PATCH, MATRIX, CIRCUIT = "mech_absa.patch", "mech_absa.train.matrix", "figures.circuit"

TRACED = "trace_counterfactual"
"""The study whose sites all others edit."""


@dataclass(frozen=True)
class Step:
    """Describe one command.

    Attributes:
        name: of its folder in the study's.
        module: run by `python -m`.
        flags: all but --out and --resume; `{layers}` and `{sites}` stand for those of the traced
            study.
        mark: columns that its rows are given in the study's table.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    mark: Mapping[str, Any]

    def words(self, results: Path) -> list[str]:
        """Return what follows `python`.

        Raises:
            ConfigError: it wants the traced sites, and there are none yet.
        """
        if not any("{" in flag for flag in self.flags):
            return ["-m", self.module, *self.flags]
        path = results / TRACED / "sites.json"
        if not path.exists():
            raise ConfigError(
                f"step {self.name} edits the traced sites, and there is no {near(path)}; run the study {TRACED} first"
            )
        layers = sorted(
            Site.parse(s).layer for s in json.loads(path.read_text(encoding="utf-8"))["sites"]
        )
        said = {"layers": f"{layers[0]}-{layers[-1]}", "sites": str(near(path))}
        return ["-m", self.module, *(flag.format(**said) for flag in self.flags)]


@dataclass(frozen=True)
class Plan:
    """Describe a study: its question, the commands that answer it, and what is kept of their outcome.

    Attributes:
        keep: (folders of the steps by name, folder of the results) -> None.
    """

    name: str
    question: str
    steps: tuple[Step, ...]
    keep: Callable[[Plan, Path, Path], None]


def flags(**given: Any) -> tuple[str, ...]:
    """Return keywords as flags: `limit_train=96` as `--limit-train 96`, a sequence as several
    words, None left out.
    """
    words: list[str] = []
    for name, value in given.items():
        if value is not None:
            values = value if isinstance(value, (tuple, list)) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tuple(words)


def trace_step(name: str, **given: Any) -> Step:
    """Return a trace that writes its tables alone."""
    return Step(name, PATCH, (*flags(**given), "--no-figures", "--no-report", "--quiet"), {})


def matrix_step(
    name: str,
    train: Iterable[str],
    test: Iterable[str],
    mark: Mapping[str, Any] | None = None,
    **given: Any,
) -> Step:
    """Return trainings on each of `train`, scored on all of `test`."""
    return Step(
        name,
        MATRIX,
        (*flags(train=tuple(train), test=tuple(test), **given), "--quiet"),
        mark or {},
    )


def near(path: Path) -> Path:
    """Return the path as seen from the project's folder, if it lies inside."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
