"""Collect the answers of a system, one per example.

A system is a model, with an edit or without, or any other program that leaves a file of answers.
Every score starts from `Predictions`: answers in the order of the examples, with the
log-probability of every label if the system gives it. There are three ways to get them:

    predict(model, examples, edit)                     # score the label strings, take the best
    predict(model, examples, edit, decode="generate")  # write greedily, then match label strings
    read_predictions("gpt.csv", examples)              # read what another system answered

Label scoring always gives an answer. Generated text may be no label at all; such a row has the
answer None and counts as wrong. The paper's authors sample answers, so the same model has another
accuracy each time. Nothing here is random.

A predictions file is a table with a header (CSV, TSV), JSON lines, or the `predictions.parquet` of
an earlier run. It names its examples by `id`, or by `sentence` and `aspect`. It gives the answer as
`predicted`, `prediction`, `pred`, `answer`, `label` or `polarity`; the first of these that is there
counts. It must answer every example exactly once, and nothing else.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from ..errors import ConfigError, DataError, PromptError, choices
from ..examples import Example, Examples, Polarity, normal
from ..model import Model
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..readers.jsonl import json_records
from ..readers.rows import Reading
from ..scoring import Applicable, Stream, by_length, label_scores, last_residual, question, room_for
from ..words import expect, shown

if TYPE_CHECKING:
    import pandas as pd

Decode = Literal["label", "generate"]
DECODES = ("label", "generate")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Hold the answers of one system.

    Attributes:
        examples: what was asked, in order.
        answers: the class answered; None where the answer was no label.
        name: of the system, for tables.
        data: where the examples came from.
        labels: the classes that could be answered: the columns of `scores`.
        scores: log-probability of each label string after the prompt, in nats; None where only the
            answers are known.
        texts: what was generated; None where labels were scored.
    """

    examples: tuple[Example, ...]
    answers: tuple[Polarity | None, ...]
    name: str
    data: str = ""
    labels: tuple[Polarity, ...] = tuple(Polarity)
    scores: Float[np.ndarray, "example label"] | None = None
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.answers) != len(self.examples):
            raise ConfigError(
                f"{len(self.answers)} answers came for {len(self.examples)} examples; one an example is needed"
            )
        if not self.examples:
            raise ConfigError(
                f"{self.data or self.name}: no examples to predict; at least one is needed"
            )

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def correct(self) -> Bool[np.ndarray, " example"]:
        """Return which answers are right."""
        return np.array([e.polarity is a for e, a in zip(self.examples, self.answers, strict=True)])

    @cached_property
    def clusters(self) -> np.ndarray:
        """Return the sentence of each row. Intervals resample by sentence."""
        return np.array([e.cluster for e in self.examples])

    @cached_property
    def probabilities(self) -> Float[np.ndarray, "example label"] | None:
        """Return the probability of each label among the labels; None if there are no scores."""
        if self.scores is None:
            return None
        p = np.exp(self.scores - self.scores.max(axis=1, keepdims=True))
        shares: np.ndarray = p / p.sum(axis=1, keepdims=True)
        return shares

    def take(self, rows: Sequence[int]) -> Predictions:
        """Return the answers of some rows."""
        rows = list(rows)
        return replace(
            self,
            examples=tuple(self.examples[i] for i in rows),
            answers=tuple(self.answers[i] for i in rows),
            scores=None if self.scores is None else self.scores[rows],
            texts=None if self.texts is None else tuple(self.texts[i] for i in rows),
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per example: `system, data, id, sentence, aspect, gold, predicted,
        correct`, and `logprob_<label>` and `text` if known.
        """
        import pandas as pd

        columns: dict[str, Any] = {
            "system": [self.name] * len(self),
            "data": [self.data] * len(self),
            "id": [e.id for e in self.examples],
            "sentence": [e.sentence for e in self.examples],
            "aspect": [e.aspect for e in self.examples],
            "gold": [e.polarity.value for e in self.examples],
            "predicted": [None if a is None else a.value for a in self.answers],
            "correct": self.correct,
        }
        if self.scores is not None:
            columns |= {f"logprob_{p.value}": self.scores[:, i] for i, p in enumerate(self.labels)}
        if self.texts is not None:
            columns["text"] = list(self.texts)
        return pd.DataFrame(columns)

    def _repr_html_(self) -> str:
        head = f"<div><b>{len(self)} predictions</b>, {self.correct.mean():.1%} right</div>"
        html: str = head + self.to_pandas().head(10).to_html(index=False)
        return html


def joined(parts: Sequence[Predictions], data: str) -> Predictions:
    """Join the answers of one system to several sets of examples."""
    first = parts[0]
    scores = (
        None
        if any(p.scores is None for p in parts)
        else np.concatenate([p.scores for p in parts if p.scores is not None])
    )
    return Predictions(
        tuple(e for p in parts for e in p.examples),
        tuple(a for p in parts for a in p.answers),
        first.name,
        data,
        first.labels,
        scores,
    )


# ---------------------------------------------------------------------------------------------------- asking a model


def asked_with(edit: Applicable | None) -> tuple[PromptTemplate, Verbalizer]:
    """Return the question and the labels that an edit was trained with, or the paper's."""
    from ..edits.record import Trained

    if not isinstance(edit, Trained):
        return PromptTemplate(), Verbalizer()
    r = edit.record
    template = PromptTemplate() if r.template is None else PromptTemplate(r.template)
    return template, Verbalizer() if r.labels is None else Verbalizer.of(r.labels, r.separator)


def system_name(edit: Applicable | None) -> str:
    """Return the name of a system in tables: `base`, or the edit's own."""
    if edit is None:
        return "base"
    return getattr(edit, "name", None) or type(edit).__name__


def check_call(function: str, model: object, examples: object, edit: object) -> None:
    """Reject arguments of the wrong type and empty examples.

    Raises:
        ConfigError: with one sentence that names the argument.
    """
    expect(model, Model, f"{function}(model=...)", "a Model, from load_model()")
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Sequence):
        raise ConfigError(
            f"{function}(examples=...) got {shown(examples)}; accepted: examples of load_examples"
        )
    if edit is not None:
        expect(
            edit,
            Applicable,
            f"{function}(edit=...)",
            "an edit, such as load_edit('bundled', model)",
        )
    if not len(examples):
        source = examples.source if isinstance(examples, Examples) else ""
        raise ConfigError(
            f"{source or 'the data'} holds no examples to predict; at least one is needed"
        )
    if not isinstance(examples[0], Example):
        raise ConfigError(
            f"{function}(examples=...) holds {shown(examples[0])}; accepted: examples of load_examples"
        )


def predict(
    model: Model,
    examples: Sequence[Example],
    edit: Applicable | None = None,
    *,
    template: PromptTemplate | str | None = None,
    verbalizer: Verbalizer | None = None,
    decode: Decode = "label",
    batch_size: int = 32,
    name: str | None = None,
) -> Predictions:
    """Return the answers of `model` to `examples`, with `edit` applied.

    Args:
        edit: None for the unedited model.
        template: the question; by default the one that the edit was trained with, or the paper's.
        verbalizer: the label strings; by default those that the edit was trained with, or the
            paper's.
        decode: `label` scores the label strings; `generate` writes greedily and matches the text.
        batch_size: prompts per forward pass. The answers do not depend on it.
        name: of the system; by default `base`, or the edit's own name.

    Raises:
        ConfigError: no examples, or an unknown way to decode.
        PromptError: a prompt longer than the model's context; labels that cannot be told apart; an
            example whose class has no label.
        EditError: a score is not a number.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> examples = ma.load_examples("builtin:restaurant/test")[:4]
        >>> ma.predict(model, examples).scores.shape
        (4, 3)
    """
    if decode not in DECODES:
        raise ConfigError(f"decode is {decode!r}; accepted: {choices(DECODES)}")
    check_call("predict", model, examples, edit)
    own = asked_with(edit)
    template = PromptTemplate(template) if isinstance(template, str) else template or own[0]
    verbalizer = verbalizer or own[1]
    for example in examples:
        verbalizer.index(example.polarity)
    name = name or system_name(edit)
    made = Predictions(
        tuple(examples),
        (None,) * len(examples),
        name,
        examples.source if isinstance(examples, Examples) else "",
        verbalizer.polarities,
    )
    continuations = verbalizer.continuations(model.tokenizer, template)
    room = room_for(continuations)
    prompts = [question(model, e, template, room) for e in examples]
    if decode == "generate":
        texts = _continue(model, prompts, verbalizer, template, edit, batch_size)
        return replace(
            made, answers=tuple(match_label(t, verbalizer) for t in texts), texts=tuple(texts)
        )
    scores = label_scores(Stream(model, edit), prompts, continuations, batch_size=batch_size)
    answers = tuple(verbalizer.polarities[i] for i in scores.argmax(1).tolist())
    return replace(made, answers=answers, scores=scores.double().numpy())


def match_label(text: str, verbalizer: Verbalizer) -> Polarity | None:
    """Return the class whose label string begins the text as a whole word, or None. If several do,
    the longest label wins.
    """
    text = text.strip()
    found = [
        (len(w.strip()), p)
        for p, w in verbalizer.words
        if re.match(re.escape(w.strip()) + r"(?!\w)", text)
    ]
    return max(found, key=lambda f: f[0])[1] if found else None


def _continue(
    model: Model,
    prompts: Sequence[Tokens],
    verbalizer: Verbalizer,
    template: PromptTemplate,
    edit: Applicable | None,
    batch_size: int,
) -> list[str]:
    """Generate after each prompt: one token more than the longest label has, up to the
    end-of-sequence token.
    """
    steps = max(map(len, verbalizer.label_ids(model.tokenizer, template))) + 1
    end = model.tokenizer.eos_token_id
    texts = []
    for ids in greedy(model, prompts, steps, edit, batch_size):
        texts.append(
            model.tokenizer.decode(
                ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True
            )
        )
    return texts


@torch.inference_mode()
def greedy(
    model: Model,
    prompts: Sequence[Tokens],
    steps: int,
    edit: Applicable | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Return the `steps` tokens that greedy decoding writes after each prompt.

    The tokens that are written carry no role, so that an edit of prompt positions acts on the
    prompt alone.

    Raises:
        PromptError: a prompt and its answer are longer than the model's context.
    """
    if (longest := max(t.lengths[0] for t in prompts) + steps - 1) > model.n_ctx:
        raise PromptError(
            f"the longest prompt and {steps} tokens of answer make {longest} tokens; {model.name} reads {model.n_ctx}"
        )
    written: list[list[int]] = [[] for _ in prompts]
    for rows in by_length(prompts, batch_size):
        tokens = Tokens.stack([prompts[i] for i in rows])
        for step in range(steps):
            if step:
                tokens = _append(tokens, [written[i][-1] for i in rows])
            read = last_residual(model, tokens, edit, torch.tensor(tokens.lengths)[:, None] - 1)
            for i, token in zip(
                rows, model.finish(read[:, 0], None, "vocabulary").argmax(-1).tolist(), strict=True
            ):
                written[i].append(token)
    return written


def _append(tokens: Tokens, new: Sequence[int]) -> Tokens:
    """Append one token to every row."""
    ids = torch.nn.functional.pad(tokens.ids, (0, 1))
    roles = torch.nn.functional.pad(tokens.roles, (0, 1), value=-1)
    rows = torch.arange(len(tokens))
    ids[rows, torch.tensor(tokens.lengths)] = torch.tensor(list(new))
    return Tokens(ids, roles, tuple(n + 1 for n in tokens.lengths), tokens.vocabulary)


# ---- reading what others answered -----------------------------------------------------------------

ANSWERS = ("predicted", "prediction", "pred", "answer", "label", "polarity")
"""Columns that may hold the answer. The first that is there counts."""

NO_ANSWER = ("", "none", "null", "nan")
"""Values that stand for an answer that was no label."""


def read_predictions(
    path: str | os.PathLike[str], examples: Sequence[Example], name: str | None = None
) -> Predictions:
    """Read the answers of another system to `examples`.

    Args:
        path: CSV, TSV, JSON lines or parquet; see the module.
        examples: what was asked; every one must be answered once.
        name: of the system; the file's name by default.

    Raises:
        DataError: the file cannot be read; a row names no example, or one that was answered before;
            an answer is no label; an example has no answer.

    Example:
        >>> import mech_absa as ma
        >>> import tempfile, pathlib
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "gpt.csv"
        >>> _ = path.write_text("sentence,aspect,answer\\nThe food was great.,food,positive\\n")
        >>> ma.read_predictions(path, [example]).correct.tolist()
        [True]
    """
    path = Path(path)
    source = os.fspath(path)
    if not path.is_file():
        raise DataError(
            "there is no such file; predictions as CSV, TSV, JSON lines or parquet are accepted",
            source,
        )
    data = examples.source if isinstance(examples, Examples) else ""
    asked = _Asked(examples)
    answers: dict[int, Polarity | None] = {}
    for line, row in _records(path, data):
        value = _answer(row, source, line)
        i = asked.index(row, source, line)
        if i in answers:
            raise DataError(
                f"the example {examples[i].id or examples[i].aspect!r} is answered a second time",
                source,
                line,
            )
        answers[i] = value
    if missing := [e for i, e in enumerate(examples) if i not in answers]:
        first = f"{missing[0].id!r} ({missing[0].aspect!r} in {missing[0].sentence[:60]!r})"
        raise DataError(
            f"{len(missing)} of {len(examples)} examples have no prediction, the first of them {first}",
            source,
        )
    return Predictions(
        tuple(examples), tuple(answers[i] for i in range(len(examples))), name or path.stem, data
    )


class _Asked:
    """Find the example that a row answers, by its id or by its sentence and aspect."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples
        self.by_id: dict[str, list[int]] = defaultdict(list)
        self.by_key: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.times: Counter[tuple[str, str]] = Counter()
        for i, e in enumerate(examples):
            self.by_id[e.id].append(i)
            self.by_key[e.key].append(i)

    def index(self, row: Mapping[str, Any], source: str, line: int) -> int:
        """Return the index of the example that `row` answers."""
        if row.get("id") not in (None, "") and "" not in self.by_id:
            return self._by_id(str(row["id"]), source, line)
        if "sentence" in row and "aspect" in row:
            return self._by_question(str(row["sentence"]), str(row["aspect"]), source, line)
        raise DataError(
            f"the row has the fields {', '.join(map(str, row))}; an id, or a sentence and an aspect, is needed",
            source,
            line,
        )

    def _by_id(self, id: str, source: str, line: int) -> int:
        if id not in self.by_id:
            raise DataError(
                f"no example has the id {id!r}; ids of {_name(self.examples)} look like {self.examples[0].id!r}",
                source,
                line,
            )
        if len(self.by_id[id]) > 1:
            raise DataError(
                f"{len(self.by_id[id])} examples have the id {id!r}; name them by sentence and aspect",
                source,
                line,
            )
        return self.by_id[id][0]

    def _by_question(self, sentence: str, aspect: str, source: str, line: int) -> int:
        key = (normal(sentence), normal(aspect))
        if key not in self.by_key:
            raise DataError(
                f"no example asks about {aspect!r} in {sentence[:60]!r}",
                source,
                line,
            )
        # The n-th row that asks a question answers the n-th example that asks it.
        i = self.by_key[key][min(self.times[key], len(self.by_key[key]) - 1)]
        self.times[key] += 1
        return i


def _answer(row: dict[str, Any], source: str, line: int) -> Polarity | None:
    column = next((c for c in ANSWERS if c in row), None)
    if column is None:
        raise DataError(
            f"the row has no answer (its fields: {', '.join(map(str, row))}); a field {choices(ANSWERS)} is needed",
            source,
            line,
        )
    value = row[column]
    text = "" if value is None else str(value).strip().lower()
    if text in NO_ANSWER:
        return None
    if re.fullmatch(r"[-+]?\d+(\.\d*)?", text):
        raise DataError(
            f"the answer is the number {text}, which every system counts its own way; write positive, negative or neutral",
            source,
            line,
        )
    try:
        return Polarity.parse(text)  # `conflict` is a class that is not asked for: a wrong answer
    except DataError:
        raise DataError(
            f"the answer {value!r} is no label; accepted: positive, negative, neutral, or empty for none",
            source,
            line,
        ) from None


def _records(path: Path, data: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every row of a predictions file, with field names in lower case, and its line."""
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path, data)
        return
    source = os.fspath(path)
    reading = Reading(source, path.stem)
    text = reading.text(path.read_bytes())
    if not text.strip():
        raise DataError("the file is empty; one answer per example is needed", source)
    if text.lstrip()[0] in "[{":
        for line, parse in json_records(text, reading):
            with reading.at(line):
                record = parse()
            yield line, {str(k).strip().lower(): v for k, v in record.items()}
        return
    yield from _delimited(text, source)


def _parquet(path: Path, data: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pandas as pd

    source = os.fspath(path)
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the file cannot be read as parquet ({str(error).splitlines()[0][:100]})", source
        ) from None
    columns = [str(c).strip().lower() for c in table.columns]
    table.columns = pd.Index(columns)
    # A run over several files keeps them in one table.
    if "data" in columns and data in set(table["data"]):
        table = table[table["data"] == data]
    if "system" in columns and table["system"].nunique() > 1:
        raise DataError(
            f"the table holds {table['system'].nunique()} systems, {choices(table['system'].unique())}; keep one",
            source,
        )
    for n, row in enumerate(table.itertuples(index=False), 1):
        yield n, dict(zip(columns, row, strict=True))


def _delimited(text: str, source: str) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter = max(",;\t|", key=text.lstrip().partition("\n")[0].count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begins = 1
    try:
        for cells in rows:
            if any(c.strip() for c in cells):
                if header is None:
                    header = [c.strip().lower() for c in cells]
                elif len(cells) != len(header):
                    raise DataError(
                        f"{len(cells)} cells came, but the header names {len(header)} columns: {', '.join(header)}",
                        source,
                        begins,
                    )
                else:
                    yield begins, dict(zip(header, cells, strict=True))
            begins = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"broken table: {error}, in the row that begins here", source, begins
        ) from None


def _name(examples: Sequence[Example]) -> str:
    return (examples.source if isinstance(examples, Examples) else "") or "the data"
