"""Record how an edit was trained, as a value with named fields.

The record travels with the edit: it is written to `edit.json`, read back by `load_edit`, and says
which question and labels the edit was trained with, so that an evaluation asks the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from ..errors import EditError
from ..examples import Example, class_counts, content_hash
from ..prompts import PromptTemplate, Verbalizer
from ..records import plain, versions


@dataclass(frozen=True)
class HeadChoice:
    """Record how LoFiT chose its heads.

    Attributes:
        sizes: norm of each head's scales, largest first.
        first_phase: training of the scales.
    """

    sizes: Mapping[str, float]
    first_phase: TrainingRecord


@dataclass(frozen=True)
class TrainingRecord:
    """Record how an edit was trained; every field has a default for an edit that was not trained.

    Attributes:
        preset: the preset as plain JSON values.
        seed: of parameters, order and dropout.
        examples: training examples.
        classes: training examples per class.
        validation: validation examples.
        data_sha256: hash of the training examples.
        template: the question; None stands for the paper's.
        labels: label words for positive, negative and neutral; None stands for the words
            themselves.
        separator: between question and label.
        steps: of the optimiser.
        best_step: step whose parameters were kept.
        best_validation_loss: cross-entropy over the labels there; None without validation examples.
        stopped: why training ended early; None where it did not.
        diverged: whether it ended because a loss was not a number.
        warnings: sentences about the data.
        processes: that trained together.
        seconds: wall time.
        examples_per_second: over the whole training.
        versions: of the packages.
        lofit: how heads were chosen, for an edit of `lofit`.
        made: what an edit that no gradient trained was computed from; empty for all others.

    Examples:
        >>> TrainingRecord(seed=3, steps=40).steps
        40
        >>> TrainingRecord().trained
        False
    """

    preset: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    examples: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    validation: int = 0
    data_sha256: str = ""
    template: str | None = None
    labels: tuple[str, ...] | None = None
    separator: str = " "
    steps: int = 0
    best_step: int = 0
    best_validation_loss: float | None = None
    stopped: str | None = None
    diverged: bool = False
    warnings: tuple[str, ...] = ()
    processes: int = 1
    seconds: float = 0.0
    examples_per_second: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    lofit: HeadChoice | None = None
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        template: PromptTemplate,
        verbalizer: Verbalizer,
        **facts: Any,
    ) -> TrainingRecord:
        """Return the record of an edit that was made from examples by asking a question.

        Args:
            examples: that it was made from.
            template, verbalizer: the question.
            facts: the other fields.
        """
        return cls(
            examples=len(examples),
            classes=class_counts(examples),
            data_sha256=content_hash(examples),
            template=template.text,
            labels=tuple(word for _, word in verbalizer.words),
            separator=verbalizer.separator,
            versions=versions(),
            **facts,
        )

    @property
    def trained(self) -> bool:
        """Return whether any step was taken."""
        return self.steps > 0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values; `lofit` and `made` only where there is one."""
        values: dict[str, Any] = plain(self)
        if self.lofit is None:
            del values["lofit"]
        if not self.made:
            del values["made"]
        return values

    @classmethod
    def from_json(cls, data: object) -> TrainingRecord:
        """Return the record that `to_json`, or an earlier version of the package, wrote.

        Raises:
            EditError: a field holds a value of another type.
        """
        if not isinstance(data, Mapping):
            raise EditError(f"its record is {_short(data)}; an object is needed")
        known = {f.name for f in fields(cls)}
        values = {name: value for name, value in data.items() if name in known}
        for name, value in values.items():
            _check(name, value)
        if values.get("labels") is not None:
            values["labels"] = tuple(values["labels"])
        values["warnings"] = tuple(values.get("warnings", ()))
        if "diverged" not in values:  # earlier versions said it in the sentence alone
            values["diverged"] = str(values.get("stopped") or "").startswith("the loss")
        if (choice := values.get("lofit")) is not None:
            values["lofit"] = HeadChoice(
                choice.get("sizes", {}), cls.from_json(choice.get("first_phase", {}))
            )
        return cls(**values)


@runtime_checkable
class Trained(Protocol):
    """A trained edit: it has parts and a record of its training."""

    parts: Any
    record: TrainingRecord


_TEXT = ("data_sha256", "separator")
_TEXT_OR_NONE = ("template", "stopped")
_COUNTS = ("examples", "validation", "steps", "best_step", "processes")
_OBJECTS = ("preset", "classes", "versions", "made")
_LISTS = {"labels": (2, 3), "warnings": range(10_000)}


def _check(name: str, value: object) -> None:
    """Raise where a field of the record has a value of another type."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if name in _TEXT:
        right, need = isinstance(value, str), "text"
    elif name in _TEXT_OR_NONE:
        right, need = value is None or isinstance(value, str), "text"
    elif name in _COUNTS:
        right, need = isinstance(value, int) and number and value >= 0, "a whole number"
    elif name in _OBJECTS:
        right, need = isinstance(value, Mapping), "an object"
    elif name == "diverged":
        right, need = isinstance(value, bool), "true or false"
    elif name in _LISTS:
        right = name == "labels" and value is None
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            right = len(value) in _LISTS[name]
        need = "a list of two or three words" if name == "labels" else "a list of sentences"
    elif name == "lofit":
        right = value is None or (
            isinstance(value, Mapping) and isinstance(value.get("sizes", {}), Mapping)
        )
        need = "an object with the sizes of the heads"
    elif name == "seed":
        right, need = value is None or (isinstance(value, int) and number), "a whole number"
    else:
        right, need = value is None or number, "a number"
    if not right:
        raise EditError(f"{name} of its record is {_short(value)}; {need} is needed")


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."
