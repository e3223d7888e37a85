"""Flags that several commands share: one name, one meaning, one default.

A command's configuration is a dataclass that holds these groups, flattened: `config.data.limit` is the
flag `--limit`. `flat` gives all values by the names of their flags, which is what run.json records.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from tyro.conf import arg

from ..errors import ConfigError, DataError, choices
from ..examples import Examples
from ..prompts import PromptTemplate, Verbalizer
from ..readers import NULL_TARGETS, load_examples

Config = TypeVar("Config")
LABELS = ("positive", "negative", "neutral")
LARGEST_SEED = 2**32 - 1
MOST_GIB = 2**20
MOST_DRAWS = 1_000_000
"""More draws of a bootstrap change no printed digit and may not fit into memory."""

# Types of flags that may be left out: the help names what is accepted, not Python's `None`.
OptionalInt = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Choice = TypeVar("Choice")
OptionalWord = Annotated[Choice | None, arg(metavar="WORD", help_behavior_hint="")]
Words = Annotated[tuple[str, ...], arg(metavar="WORD ...", help_behavior_hint="")]
Sources = Annotated[tuple[str, ...], arg(metavar="SOURCE ...")]
OptionalSources = Annotated[tuple[str, ...], arg(metavar="SOURCE ...", help_behavior_hint="")]
OptionalPaths = Annotated[tuple[Path, ...], arg(metavar="PATH ...", help_behavior_hint="")]
Names = Annotated[tuple[str, ...], arg(metavar="NAME ...")]
Numbers = Annotated[tuple[float, ...], arg(metavar="NUMBER ...")]
Seeds = Annotated[tuple[int, ...], arg(metavar="N ...")]
Named = Annotated[tuple[str, ...], arg(metavar="NAME=VALUE ...", help_behavior_hint="")]


@dataclass(frozen=True)
class LimitFlags:
    """Say how much of the data is used."""

    limit: OptionalInt = None
    """Use at most this many examples of each source, drawn by --seed."""
    head: bool = False
    """Take the first examples of the data for --limit, instead of drawing them."""

    def of(self, examples: Examples, seed: int) -> Examples:
        """Return the examples that are used, in the order of their source."""
        if self.limit is None:
            return examples
        return examples[: self.limit] if self.head else examples.sample(self.limit, seed)

    def check(self) -> None:
        """Reject a limit below one."""
        at_least(1, limit=self.limit)


@dataclass(frozen=True)
class IntervalFlags:
    """Say how intervals are made."""

    level: float = 0.95
    """Level of the intervals."""
    draws: int = 1000
    """Bootstrap draws."""

    def check(self) -> None:
        """Reject a level that is no share, and draws that nothing needs."""
        share("--level", self.level)
        at_least(1, draws=self.draws)
        if self.draws > MOST_DRAWS:
            raise ConfigError(f"--draws is {self.draws}; accepted: 1 to {MOST_DRAWS:,}")


@dataclass(frozen=True)
class SiteFlags:
    """Say which sites are edited."""

    sites: OptionalSources = ()
    """Where to edit: a traced run's folder, its sites.json, or single sites such as L3.resid_post@query.last."""
    any_sites: bool = False
    """Edit at sites that were found in another model."""


@dataclass(frozen=True)
class ReadFlags:
    """Say how data is read."""

    columns: Named = ()
    """Names of columns or fields that are not recognised, such as aspect=Term polarity=Rating."""
    meaning: Named = ()
    """What labels of the data mean that are not words, such as 0=negative 1=neutral 2=positive."""
    skip_bad: bool = False
    """Leave bad rows out and count them, instead of stopping at the first."""
    null_targets: str = "drop"
    """Aspects without words (SemEval's NULL): drop, or category to ask about the category."""
    ignore_case: bool = False
    """Accept an aspect whose case differs in the sentence; ask as the sentence writes it."""
    strict: bool = False
    """Stop at a prompt that is longer than the model reads, instead of dropping and counting it."""

    @property
    def options(self) -> dict[str, Any]:
        """Return keyword arguments of `load_examples`."""
        return {
            "skip_bad": self.skip_bad,
            "columns": named("--columns", self.columns),
            "meaning": named("--meaning", self.meaning),
            "null_targets": self.null_targets,
            "ignore_case": self.ignore_case,
        }

    def read(
        self, source: str, limit: int | None = None, seed: int = 0, head: bool = False
    ) -> Examples:
        """Load one source; of more than `limit` examples, draw that many by seed, or take the first
        with `head`.

        The examples are in the order of the source.
        """
        return LimitFlags(limit, head).of(load_examples(source, **self.options), seed)

    def check(self) -> None:
        """Reject what can be rejected before anything is read."""
        _ = self.options
        one_of("--null-targets", self.null_targets, NULL_TARGETS)


@dataclass(frozen=True)
class QuestionFlags:
    """Say how the model is asked."""

    template: OptionalText = None
    """The question, with {sentence} and {aspect}. Default: that of the edits, or the paper's."""
    labels: Words = ()
    """The label words for positive, negative and neutral. Default: as for the question."""
    separator: str = " "
    """Text between question and label. The paper's authors use none ("")."""

    @property
    def prompt(self) -> PromptTemplate:
        """Return the question; the paper's by default."""
        return PromptTemplate() if self.template is None else PromptTemplate(self.template)

    @property
    def verbalizer(self) -> Verbalizer:
        """Return the label words; the usual ones by default."""
        return Verbalizer.of(self.labels or LABELS, self.separator)

    def check(self, words: tuple[int, ...] = (2, 3)) -> None:
        """Reject what can be rejected before anything is loaded.

        Args:
            words: accepted numbers of label words.
        """
        _ = self.prompt
        if self.labels and len(self.labels) not in words:
            raise ConfigError(
                f"--labels gives {len(self.labels)} words; three are needed, for positive, negative and neutral"
            )


@dataclass(frozen=True)
class ModelFlags:
    """Say which model is used, and where it runs."""

    model: str = "bundled"
    """bundled, smollm2, a local Hugging Face folder, a GGUF file, or a hub name such as gpt2."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64. Metrics are always float32 or wider."""
    backend: str = "auto"
    """hooked (HookedTransformer, TransformerLens up to 3.9) or bridge (TransformerBridge); auto takes hooked where it exists."""


@dataclass(frozen=True)
class RunFlags:
    """Say where the result goes."""

    out: OptionalPath = None
    """A new or empty folder. Default: runs/COMMAND-<time>."""
    resume: bool = False
    """Continue a killed run of the same configuration in --out."""
    preset_file: OptionalPath = None
    """Folder or run.json of a finished run. Its flags become the defaults."""
    report: bool = True
    """Write report.html."""
    quiet: bool = False
    """Print nothing but errors."""


UNRECORDED = ("out", "resume", "quiet", "preset_file")
"""Flags that say where a run goes, not what it is."""
FREE = ("device", "report", "figures")
"""Flags that are recorded and may change when a run is resumed."""


def flat(config: Any) -> dict[str, Any]:
    """Return the values of all flags of a configuration by name, groups flattened."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        values |= flat(value) if dataclasses.is_dataclass(value) else {f.name: value}
    return values


def recorded(config: Any) -> dict[str, Any]:
    """Return the flags that run.json records."""
    return {k: v for k, v in flat(config).items() if k not in UNRECORDED}


def named(flag: str, words: Sequence[str]) -> dict[str, str]:
    """Return `name=value` words as a mapping, such as {"aspect": "Term"}.

    Raises:
        ConfigError: a word is not of that form.
    """
    for word in words:
        if not re.fullmatch(r"[^=]+=.+", word):
            raise ConfigError(f"{flag} {word!r} was given; words such as aspect=Term are accepted")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def one_of(flag: str, value: str, accepted: Sequence[str]) -> None:
    """Raise a ConfigError unless `value` is one of the accepted words."""
    if value not in accepted:
        raise ConfigError(f"{flag} {value!r} is unknown; accepted: {choices(accepted)}")


def at_least(least: int, **flags: int | float | None) -> None:
    """Raise a ConfigError for the first flag below `least`; None passes."""
    for name, value in flags.items():
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; accepted: {least} or more")


def share(flag: str, value: int | float) -> None:
    """Raise a ConfigError unless `value` lies between 0 and 1."""
    if not 0 < value < 1:
        raise ConfigError(f"{flag} {value:g} was given; it must lie between 0 and 1")


def check_numbers(config: Any) -> None:
    """Reject numbers that no flag takes: NaN, infinity, seeds that no generator accepts.

    Raises:
        ConfigError: the first of them.
    """
    for name, value in flat(config).items():
        flag = "--" + name.replace("_", "-")
        for number in value if isinstance(value, tuple) else (value,):
            if name in ("template", "labels", "separator") and number is not None:
                _check_text(flag, number)
            if isinstance(number, (str, Path)) and "\0" in str(number):
                raise ConfigError(f"{flag} holds a null character; text and paths have none")
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{flag} {number} was given; a finite number is needed")
            if name in ("seed", "seeds") and not 0 <= number <= LARGEST_SEED:
                raise ConfigError(f"{flag} is {number}; accepted: 0 to {LARGEST_SEED}")
            if name == "memory" and number is not None and not 0 <= number <= MOST_GIB:
                raise ConfigError(
                    f"{flag} {number:g} was given; it is a number of GiB from 0 to {MOST_GIB}"
                )
    layers = flat(config).get("layers")
    if isinstance(layers, str) and re.search(r"\d{5}", layers):
        raise ConfigError(f"--layers {layers[:40]} was given; layers are numbered from 0 to 9999")


def _check_text(flag: str, text: str) -> None:
    """Refuse text that no tokenizer reads: an argument that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{flag} {text!r} is not UTF-8 text") from None


def join(parts: Sequence[Examples]) -> Examples:
    """Return several sources as one, with what each of them left out.

    Raises:
        DataError: two examples have one id.
    """
    joined = parts[0]
    for more in parts[1:]:
        left = {
            k: joined.left_out.get(k, 0) + more.left_out.get(k, 0)
            for k in {**joined.left_out, **more.left_out}
        }
        joined = Examples(
            (*joined.items, *more.items), f"{joined.source} + {more.source}", joined.sha256 + more.sha256, left,
            joined.ambiguous + more.ambiguous, (*joined.problems, *more.problems),
        )  # fmt: skip
    ids = [e.id for e in joined]
    if len(set(ids)) < len(ids):
        raise DataError(f"{joined.source}: two examples have the same id; give every file once")
    return joined


# ---- a saved run's configuration ------------------------------------------------------------------------------------------------

RENAMED = {"cache_gib": "memory"}
"""Name of a flag in an older run.json -> its name now."""
DROPPED = ("model_sha256", "data_sha256", "train_sha256", "sample")
"""Keys of an older configuration that are no flags now."""


def preset_defaults(config: type[Config], path: str | Path, command: str) -> Config:
    """Return the configuration with which a finished run was started.

    Args:
        config: class of the command's configuration.
        path: run.json, or the folder it lies in.
        command: name that run.json must have.

    Raises:
        ConfigError: the file is of another command, or names a flag that there is not.
    """
    from ..records import read_json
    from ..schemas import STATE

    path = Path(path)
    record = read_json(path / "run.json" if path.is_dir() else path, STATE, ConfigError)
    if (theirs := record.get("command")) != command:
        raise ConfigError(
            f"--preset-file {path} is a run of {theirs}; a run of {command} is needed"
        )
    saved = {RENAMED.get(k, k): v for k, v in record["config"].items() if k not in DROPPED}
    known = set(flag_names(config)) - set(UNRECORDED)
    if strange := sorted(saved.keys() - known - set(UNRECORDED)):
        raise ConfigError(f"--preset-file {path} names {strange[0]}, and there is no such flag")
    filled: Config = _fill(config, saved)
    return filled


def _fill(config: Any, saved: Mapping[str, Any], default: Any = None) -> Any:
    """Return an instance of a configuration's class with saved values where there are any.

    Values that were not saved are those of `default`, or of the class.
    """
    values = {}
    for f in dataclasses.fields(config):
        if (group := group_of(config, f.name)) is not None:
            values[f.name] = _fill(group, saved, _default(f))
        elif f.name in saved and f.name not in UNRECORDED:
            values[f.name] = _value(str(f.type), saved[f.name])
            if not _is(values[f.name], get_type_hints(config)[f.name]):
                flag = "--" + f.name.replace("_", "-")
                raise ConfigError(
                    f"the preset file gives {flag} the value {saved[f.name]!r:.80}, which the flag does not accept"
                )
    return config(**values) if default is None else dataclasses.replace(default, **values)


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return the group that a configuration has by default; None where there is none."""
    if field.default_factory is dataclasses.MISSING:
        return None
    return field.default_factory()


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is one of a flag's type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(v, inner[0]) for v in value)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _value(kind: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_value(kind, v) for v in value)
    return Path(value) if isinstance(value, str) and "Path" in kind else value


def group_of(config: Any, field: str) -> Any:
    """Return the class of the group of flags that a field holds; None for a single flag."""
    kind = get_type_hints(config).get(field)
    return kind if dataclasses.is_dataclass(kind) else None


def flag_names(config: Any) -> list[str]:
    """Return the names of all flags of a configuration's class, groups flattened."""
    names: list[str] = []
    for f in dataclasses.fields(config):
        group = group_of(config, f.name)
        names += flag_names(group) if group is not None else [f.name]
    return names
