"""Train an edit.

    edit = fit(model, train, presets.paper("L2.resid_post@query.last"), validation=0.1, seed=0)

`task.py` says what is asked and what the loss is, `training.py` what a step is. Nothing below the
first edited layer runs twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from ..edits.edit import Edit
from ..errors import ConfigError, choices
from ..examples import Example, class_counts, split_by_sentence
from ..model import Model
from ..progress import bar, wanted
from ..prompts import PromptTemplate, Verbalizer
from ..words import expect
from .prefix import PrefixCache
from .presets import Preset
from .task import Task
from .training import Progress, Training


def fit(
    model: Model,
    train: Sequence[Example],
    preset: Preset,
    *,
    validation: Sequence[Example] | float | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    cache: PrefixCache | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool | None = None,
    on_step: Callable[[Progress], Any] | None = None,
) -> Edit:
    """Train an edit of a model that itself stays as it is, to the last bit.

    Args:
        model: the base.
        train: examples to learn from.
        preset: the edit, its rates, and how long.
        validation: examples to choose the best epoch on, or the share of the training sentences to
            set aside for it; the edit returned has the lowest cross-entropy over the labels there.
            None returns the last state.
        seed: of the parameters, the order and the dropout.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        cache: streams below the edit, shared with other trainings of the same model; a new one
            where None.
        checkpoint: file that keeps the state while training; where it exists already, training goes
            on from it. The caller removes it.
        checkpoint_every: steps between two states.
        progress: show a bar; where None, in a terminal and in a notebook.
        on_step: called after every step.

    Returns:
        The edit, in eval mode, with its training in `record`. A loss that is not a number stops the
        training; the last good state is returned and `record.diverged` is true.

    Raises:
        ConfigError: an argument is of another type, there is nothing to train on, or a part of the
            edit acts at a role that no prompt has.
        PromptError: a prompt is too long, or a label is missing.

    Examples:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> train = ma.load_examples("builtin:restaurant/train")[:8]
        >>> edit = ma.fit(model, train, ma.presets.bundled("L3.resid_post@query.last", epochs=1))
        >>> edit.record.steps, edit.layers, edit.n_parameters
        (1, (3,), 2564)
    """
    expect(model, Model, "fit(model=...)", "a Model, from load_model()")
    expect(preset, Preset, "fit(preset=...)", "a Preset, such as presets.paper(sites)")
    if template is not None:
        expect(template, PromptTemplate, "fit(template=...)", "a PromptTemplate")
    if verbalizer is not None:
        expect(verbalizer, Verbalizer, "fit(verbalizer=...)", "a Verbalizer")
    _check_types(model, train, preset, seed)
    train, held, notes = divided(train, validation, seed)
    cache = cache if cache is not None and cache.model is model else PrefixCache(model)
    task = Task(model, preset.loss, template, verbalizer, cache, preset.shared_weight)
    training = Training(task, preset, train, held, seed)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        training.resume(path)
    first = training.team.rank == 0
    with bar("training", training.steps, quiet=not (first and wanted(progress))) as advance:
        advance(training.state.step)
        for group in training.groups():
            training.step(group)
            if training.epoch_ended:
                training.end_epoch()
            state = training.state
            if state.diverged:
                break
            if on_step is not None:
                on_step(state)
            advance(1)
            if path and first and (state.step % checkpoint_every == 0 or state.batch == 0):
                training.save(path)
    return training.finish().with_record(warnings=notes)


def keep_streams(
    model: Model,
    train: Sequence[Example],
    preset: Preset,
    cache: PrefixCache,
    *,
    validation: Sequence[Example] | float | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
) -> None:
    """Fill a cache as `fit` with these arguments does, without training.

    Streams are computed in batches, and the last digits depend on what a batch holds. So a study that
    is taken up after a kill first keeps the streams of the trainings that are done.

    Args:
        model, train, preset, cache, validation, seed, template, verbalizer: as in `fit`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the training that is done has warned already
        train, held, _ = divided(train, validation, seed)
    task = Task(model, preset.loss, template, verbalizer, cache, preset.shared_weight)
    Training(task, preset, train, held, seed)


def divided(
    train: Sequence[Example], validation: Any, seed: int
) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """Return (training examples, validation examples, warnings).

    Args:
        train: all examples.
        validation: examples, a share of the sentences, or None.
        seed: of the split.

    Raises:
        ConfigError: nothing is left to train on, or `validation` is neither a share nor examples.
    """
    if isinstance(validation, Real) and not isinstance(validation, bool):
        rest, held = split_by_sentence(train, float(validation), seed)
    elif validation is None or _examples(validation):
        rest, held = list(train), list(validation or ())
    else:
        raise ConfigError(
            f"validation is {_named(validation)}; accepted: a share such as 0.1, a list of examples, or None"
        )
    if not rest:
        raise ConfigError("there are no examples to train on; at least one is needed")
    before, after = class_counts(train), class_counts(rest)
    if not (lost := [c for c, n in before.items() if n and not after[c]]):
        return rest, held, ()
    note = (
        f"the validation split took all {choices(lost)} examples ({', '.join(str(before[c]) for c in lost)}), so the edit cannot "
        "learn to answer that; take a smaller share, another seed, or give more examples"
    )
    warnings.warn(note, stacklevel=3)
    return rest, held, (note,)


def _check_types(model: object, train: object, preset: object, seed: object) -> None:
    """Raise where an argument of `fit` is of another type."""
    if not isinstance(model, Model):
        raise ConfigError(f"model is {_named(model)}; a model of load_model is needed")
    if not _examples(train):
        raise ConfigError(f"train is {_named(train)}; examples of load_examples are needed")
    if not isinstance(preset, Preset):
        raise ConfigError(
            f"preset is {_named(preset)}; a Preset is needed, such as presets.bundled(sites, 'both')"
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed is {_named(seed)}; a whole number is needed")


def _examples(value: object) -> bool:
    """Return whether a value is a collection of examples."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return False
    return hasattr(value, "__len__") and all(isinstance(e, Example) for e in value)


def _named(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) < 40 else text[:37] + '...'} ({type(value).__name__})"
