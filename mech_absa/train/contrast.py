"""Steer away from an edit that was trained on wrong answers.

    steered = contrast(model, train, presets.bundled("L3.resid_post", "adapter"))
    predict(model, test, steered)                        as with any edit

An edit of one layer is trained to answer wrongly. At the last token of a prompt, the heads' values z
of a layer are then moved away from what they are with that edit, z_wrong:

    d = z_wrong - z
    z' = z - strength (1 + ||d||)^exponent d, a norm per head
    z' is brought back to ||z||, the norm over all heads

Source: CogSteer (arXiv 2410.17714), which trains an adapter of one layer on toxic text; its code
(PostMindLab/cogsteer, `innerdetox_hook.py`) has strength 1 and exponent 0.4.

The change depends on z_wrong, which needs a second forward pass over the same prompt up to that layer.
So a `Contrast` is no `Edit`: it is scored as one (`predict`, `evaluate`, `scorecard`), but it is neither
merged nor saved. Save its `edit`, which is an ordinary one, and make it again with `Contrast(edit)`.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..edits.base import Block, Intervention, Matrix, Part, Where, wide
from ..edits.edit import Edit
from ..edits.record import TrainingRecord
from ..errors import ConfigError, choices
from ..examples import Example
from ..model import Model
from ..model.forward import Point, advance
from ..model.hooks import hooked_at
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..scoring import gold_indices, label_scores, question, room_for
from ..sites import Site
from .fit import fit
from .presets import Preset

WRONG = ("likeliest", "drawn")
"""Which wrong label stands for the right one: the one that the model likes best, or a drawn one."""
EXPONENT = 0.4
"""That of the authors' code."""


def moved_away(
    z: Float[Tensor, "*token head d_head"],
    wrong: Float[Tensor, "*token head d_head"],
    exponent: float = EXPONENT,
    strength: float = 1.0,
) -> Float[Tensor, "*token head d_head"]:
    """Return z - strength (1 + ||d||)^exponent d with d = wrong - z, at the norm of z.

    Args:
        z: the heads' values.
        wrong: the same with the edit that answers wrongly.
        exponent: of 1 + ||d||; the norm is each head's own.
        strength: factor of the whole step; 0 changes nothing.

    Examples:
        >>> z, wrong = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 1.0]])
        >>> moved_away(z, wrong, exponent=0.0)    # 4 + 3 = 7, and (3, 7) cut to the norm 5
        tensor([[1.9696, 4.5957]])
    """
    d = wrong - z
    new = z - strength * (1 + d.norm(dim=-1, keepdim=True)) ** exponent * d
    before, after = (x.norm(dim=(-2, -1), keepdim=True) for x in (z, new))
    rescaled: Tensor = new * (before / after.clamp_min(torch.finfo(new.dtype).tiny))
    return rescaled


class Contrast:
    """Move the heads of a layer away from what an edit makes of them, at the last token of the prompt.

    Args:
        edit: trained on wrong answers, in one layer.
        layer: whose heads are moved; the first whose heads the edit can change where None. That is
            its own for W_Q, W_K, W_V, resid_pre, heads and prefixes, and the next one for changes
            behind the heads, such as an adapter's.
        exponent, strength: as in `moved_away`.

    Raises:
        ConfigError: the edit has several layers, or cannot change the heads of `layer`; exponent or
            strength is not finite.
    """

    name = "contrast"

    def __init__(
        self,
        edit: Edit,
        layer: int | None = None,
        exponent: float = EXPONENT,
        strength: float = 1.0,
    ):
        if len(edit.layers) != 1:
            raise ConfigError(
                f"the edit to move away from has parts in layers {', '.join(map(str, edit.layers))}; accepted: one layer"
            )
        for what, value in (("exponent", exponent), ("strength", strength)):
            if not math.isfinite(value):
                raise ConfigError(f"{what} is {value}; accepted: a finite number")
        first, last = min(map(_reached, edit)), edit.shape.n_layers - 1
        self.layer = first if layer is None else layer
        if not first <= self.layer <= last:
            which = f"{first} to {last}" if first <= last else "an edit of an earlier layer"
            raise ConfigError(
                f"an edit at {edit.parts[0].place} cannot change the heads of layer {self.layer}; accepted: {which}"
            )
        self.edit, self.exponent, self.strength = edit, exponent, strength

    def __repr__(self) -> str:
        return f"Contrast(heads of layer {self.layer} away from {self.edit!r})"

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return those of the edit that answers wrongly."""
        return self.edit.parts

    @property
    def record(self) -> TrainingRecord:
        """Return how that edit was trained, and with which question."""
        return self.edit.record

    @property
    def n_parameters(self) -> int:
        """Return how many that edit trained."""
        return self.edit.n_parameters

    @torch.no_grad()
    def wrong_values(self, model: Model, tokens: Tokens) -> Float[Tensor, "batch pos head d_head"]:
        """Return the heads' values of the layer with the edit that answers wrongly.

        Raises:
            EditError: the edit was made for another model.
        """
        seen: list[Tensor] = []
        keep: Point = (model.point(self.layer, "z"), seen.append)
        points = [*self.edit.points(model, tokens), keep]
        advance(model, model.embed(tokens.ids), 0, self.layer + 1, points)
        return seen[0]

    def points(self, model: Model, tokens: Tokens) -> list[Point]:
        """Return what acts in a pass over `tokens`; runs the edit that answers wrongly once.

        Raises:
            EditError: the edit was made for another model.
        """
        wrong, where = self.wrong_values(model, tokens), Where(tokens)

        def move(z: Tensor) -> Tensor:
            index = where.index(-1, z.device)
            assert index is not None
            kept, away = z[index].to(wide(z)), wrong.to(z.device)[index].to(wide(z))
            return z.index_put(
                index, moved_away(kept, away, self.exponent, self.strength).to(z.dtype)
            )

        return [(model.point(self.layer, "z"), move)]

    @contextlib.contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[Contrast]:
        """Act in every forward pass over `tokens` inside the block.

        Raises:
            EditError: the edit was made for another model.
        """
        with hooked_at(self.points(model, tokens)):
            yield self


def contrast(
    model: Model,
    train: Sequence[Example],
    preset: Preset,
    *,
    layer: int | None = None,
    exponent: float = EXPONENT,
    strength: float = 1.0,
    wrong: str = "likeliest",
    validation: Sequence[Example] | float | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    **options: Any,
) -> Contrast:
    """Train an edit on wrong answers, and return what moves the model away from it.

    Args:
        model: stays as it is.
        train: examples with their right answers.
        preset: the edit that learns wrong answers, in one layer.
        layer, exponent, strength: as in `Contrast`.
        wrong: of the labels but the right one, `likeliest` takes the one that the unedited model
            likes best, the first among equals; `drawn` draws one by `seed`. With two labels both
            are the other one.
        validation: as in `fit`; their answers are made wrong in the same way.
        seed: of the training, and of the draw.
        template, verbalizer: the question.
        options: other keyword options of `fit`.

    Raises:
        ConfigError: as in `fit` and `Contrast`; an unknown `wrong`.

    Examples:
        >>> import mech_absa as ma
        >>> model, train = ma.load_model(), ma.load_examples("builtin:laptop/train")[:8]
        >>> steered = contrast(model, train, ma.presets.bundled("L3.resid_post", "adapter", epochs=1))
        >>> steered.layer, steered.edit.layers
        (4, (3,))
        >>> ma.predict(model, train, steered).scores.shape
        (8, 3)
    """
    asked: dict[str, Any] = {"template": template, "verbalizer": verbalizer, "seed": seed}
    Contrast(Edit.fresh(model, preset.parts), layer, exponent, strength)  # before any training
    learned = wrong_answers(model, train, wrong, **asked)
    if validation is not None and not isinstance(validation, float):
        validation = wrong_answers(model, validation, wrong, **asked)
    edit = fit(model, learned, preset, validation=validation, **asked, **options)
    edit = edit.with_record(preset={**edit.record.preset, "wrong_answers": wrong})
    return Contrast(edit, layer, exponent, strength)


def wrong_answers(
    model: Model,
    examples: Sequence[Example],
    wrong: str = "likeliest",
    *,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
) -> list[Example]:
    """Return the examples with a wrong label each.

    Args:
        model: unedited; not run for `drawn`.
        examples: with their right labels.
        wrong, seed, template, verbalizer: as in `contrast`.

    Raises:
        ConfigError: no examples; an unknown `wrong`.
    """
    if wrong not in WRONG:
        raise ConfigError(f"wrong is {wrong!r}; accepted: {choices(WRONG)}")
    if not len(examples):
        raise ConfigError("there are no examples to answer wrongly; at least one is needed")
    template, verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
    labels, gold = verbalizer.polarities, gold_indices(examples, verbalizer)
    if wrong == "drawn":
        rng = random.Random(seed)
        others = [[i for i in range(len(labels)) if i != right] for right in gold.tolist()]
        chosen = [rng.choice(other) for other in others]
    else:
        continuations = verbalizer.continuations(model.tokenizer, template)
        room = room_for(continuations)
        prompts = [question(model, e, template, room) for e in examples]
        scores = label_scores(model, prompts, continuations)
        scores[torch.arange(len(gold)), gold] = -torch.inf
        chosen = scores.argmax(-1).tolist()
    return [replace(e, polarity=labels[i]) for e, i in zip(examples, chosen, strict=True)]


def _reached(part: Intervention) -> int:
    """Return the first layer whose heads a part can change."""
    place = part.place
    before = (
        isinstance(place, Block)
        or (isinstance(place, Matrix) and place.name in ("W_Q", "W_K", "W_V"))
        or (isinstance(place, Site) and place.kind in ("resid_pre", "head"))
    )
    return place.layer + (not before)
