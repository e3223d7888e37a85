"""An `Edit`: trained interventions by place, and how they came to be.

    edit = fit(model, train, presets.paper("L2.resid_post@query.last"))
    with edit.applied(model, tokens):  ...         every forward pass over these tokens in the block runs edited
    scores = label_scores(Stream(model, edit), prompts, verbalizer.continuations(model.tokenizer))

An edit knows the model it was made for by the hash of its weights and refuses any other. It never
writes to them: `merged` gives a second model with the edit in its weights, where algebra allows.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from ..errors import ConfigError, EditError, HookError, choices
from ..model import Model
from ..model.forward import Point
from ..model.hooks import hooked_at
from ..prompts import Tokens
from ..sites import Site
from .base import Intervention, MatrixIntervention, Part, Shape, Where, parse_place
from .heads import HeadGate
from .loreft import RED, DiReFT, LoReFT, NoReFT, ReFTr1, Steering
from .lowrank import DoRA, LoRA, TinyLoRA
from .record import TrainingRecord
from .rivals import Adapter, BitFit, Full, PostBlock, Prefix

FAMILIES: dict[str, type[Intervention]] = {
    c.family: c
    for c in (
        LoReFT,
        NoReFT,
        DiReFT,
        RED,
        Steering,
        ReFTr1,
        LoRA,
        DoRA,
        TinyLoRA,
        Prefix,
        Adapter,
        PostBlock,
        BitFit,
        Full,
        HeadGate,
    )
}
"""Families of interventions by name."""

SHARED = "shared_with"
"""The option of every family that names the part whose parameters are used."""


def build(part: Part, shape: Shape) -> Intervention:
    """Return the intervention that a part describes, its parameters without values.

    Raises:
        ConfigError: the family is unknown, or its options are not accepted.
        SiteError: the place is none of its kind, or none of a model of this shape.
    """
    if part.family not in FAMILIES:
        raise ConfigError(
            f"unknown family of edits {part.family!r} at {part.place}; accepted: {choices(FAMILIES)}"
        )
    place = parse_place(part.place)
    if isinstance(place, Site):
        place.check(shape.n_layers, shape.n_heads, shape.n_kv_heads)
    elif place.layer >= shape.n_layers:
        Site(place.layer, "resid_post").check(shape.n_layers, shape.n_heads)
    make: Callable[..., Intervention] = FAMILIES[part.family]
    names = [n for n in inspect.signature(make).parameters if n not in ("place", "shape")]
    options = dict(part.options)
    lender = None if SHARED in names else options.pop(SHARED, None)
    try:
        made = make(place, shape, **options)
    except TypeError:
        names = list(dict.fromkeys([*names, SHARED]))
        raise ConfigError(
            f"{part.family} at {place} was given {', '.join(part.options)}; its options are {', '.join(names)}"
        ) from None
    if lender is not None:
        made.share(str(lender))
    return made


def count(parts: Sequence[Part], shape: Shape) -> int:
    """Return the trainable parameters of an edit of a model of this shape; no weights are needed."""
    with torch.device("meta"):
        return sum(p.numel() for part in parts for p in build(part, shape).trainable.values())


class Edit(nn.Module):
    """Interventions on one model.

    Args:
        parts: what it consists of.
        shape: of the model it is for.
        base: name of that model.
        sha256: hash of that model's weights.
        record: how it was trained (`TrainingRecord`).

    Attributes:
        history: one row per training step; empty for an edit that was loaded.

    Examples:
        >>> import mech_absa as ma
        >>> edit = ma.load_edit("bundled", ma.load_model())
        >>> edit.n_parameters, edit.layers[0], edit.parts[0].place
        (143360, 0, 'L0.W_Q')
        >>> edit.record.labels
        ('positive', 'negative', 'neutral')
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shape: Shape,
        base: str,
        sha256: str,
        record: TrainingRecord | None = None,
    ):
        super().__init__()
        if not parts:
            raise ConfigError("an edit of no parts was asked for; at least one is needed")
        self.parts = tuple(parts)
        self.shape, self.base, self.sha256 = shape, base, sha256
        self.record = record or TrainingRecord()
        self.history: list[dict[str, Any]] = []
        self.interventions = nn.ModuleList(build(part, shape) for part in self.parts)
        for intervention in self:
            intervention.borrow(tuple(self))
            intervention.meet(tuple(self))

    @classmethod
    def fresh(cls, model: Model, parts: Sequence[Part], seed: int = 0) -> Edit:
        """Return an untrained edit; the same seed gives the same parameters on every device.

        Raises:
            ConfigError: a part asks for what its family does not offer.
            SiteError: the model lacks a place.
        """
        edit = cls(parts, Shape.of(model), model.name, model.sha256)
        generator = torch.Generator().manual_seed(seed)
        for intervention in edit:
            if isinstance(intervention.place, Site):
                model.check_site(intervention.place)
            if not intervention.borrows:
                intervention.reset(model, generator)
        return edit.to(model.device).eval()

    def __iter__(self) -> Iterator[Intervention]:
        return cast(Iterator[Intervention], iter(self.interventions))

    def __repr__(self) -> str:
        families = dict.fromkeys(p.family for p in self.parts)
        layers = ", ".join(map(str, self.layers))
        return f"Edit({' + '.join(families)} at {len(self.parts)} places in layers {layers}; {self.n_parameters:,} parameters; of {self.base})"

    def _repr_html_(self) -> str:
        import html

        def row(cells: Sequence[Any], tag: str = "td") -> str:
            return (
                "<tr>"
                + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
                + "</tr>"
            )

        # Parts that differ in their place alone share a row: an edit of every matrix has hundreds.
        alike: dict[tuple[str, str, float], list[tuple[str, int]]] = {}
        for part, intervention in zip(self.parts, self, strict=True):
            options = ", ".join(f"{name} {value}" for name, value in part.options.items())
            size = sum(p.numel() for p in intervention.trainable.values())
            alike.setdefault((part.family, options, part.lr), []).append((part.place, size))
        rows = []
        for (family, options, rate), members in alike.items():
            places = [place for place, _ in members]
            named = ", ".join(places[:6]) + (
                f" and {len(places) - 6} more" if len(places) > 6 else ""
            )
            rows.append(
                row([family, named, options, f"{rate:g}", f"{sum(size for _, size in members):,}"])
            )
        r = self.record
        facts: dict[str, Any] = {"computed from examples": r.examples} if r.made else {}
        if r.trained:
            facts = {
                "trained on examples": r.examples, "steps": r.steps, "seed": r.seed, "loss on validation examples": r.best_validation_loss,
                "stopped": r.stopped,
            }  # fmt: skip
        training = "; ".join(
            f"{name}: {f'{v:.3g}' if isinstance(v, float) else v}"
            for name, v in facts.items()
            if v is not None
        )
        head = f"<b>Edit of {html.escape(self.base)}</b>: {self.n_parameters:,} parameters, {100 * self.share:.3g} % of all"
        table = row(("family", "at", "options", "rate", "parameters"), "th") + "".join(rows)
        return f"<div>{head}</div><table>{table}</table><div><small>{html.escape(training or 'not trained')}</small></div>"

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.place for p in self.parts))

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the layers with an intervention; below the first of them the model is unchanged."""
        return tuple(sorted({i.place.layer for i in self}))

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @property
    def share(self) -> float:
        """Trained parameters as a share of all there are, as published tables give it."""
        return self.n_parameters / (self.shape.n_parameters + self.n_parameters)

    def settle(self) -> None:
        """Bring constrained parameters back to their constraint."""
        for intervention in self:
            if not intervention.borrows:
                intervention.settle()

    def check(self, model: Model) -> None:
        """Check that this edit was made for `model`, or for the same weights in float32.

        Raises:
            EditError: it was made for another.
        """
        if not model.answers_to(self.sha256):
            raise EditError(
                f"this edit was made for {self.base} (weights {self.sha256[:12]}), and {model.name} has other weights "
                f"({model.sha256[:12]}); load the model it was made for"
            )

    @property
    def matrices_first(self) -> list[Intervention]:
        """Return the parts, those that change a weight matrix first.

        What W_O or W_out returns may be the very activation that another part changes: on bridges
        without a norm behind them, and where an edit is merged. The matrix comes first then, whatever
        the order of the parts.
        """
        return sorted(self, key=lambda part: not isinstance(part, MatrixIntervention))

    def _points(self, model: Model, tokens: Tokens) -> tuple[list[Point], list[Point]]:
        """Return (writers, readers) of all interventions."""
        self.check(model)
        where = Where(tokens)
        made = [intervention.points(model, where) for intervention in self.matrices_first]
        return [p for writers, _ in made for p in writers], [
            p for _, readers in made for p in readers
        ]

    def points(self, model: Model, tokens: Tokens) -> list[Point]:
        """Return what `forward.last` calls in a pass over `tokens`: the edit without hooks.

        Raises:
            EditError: it was made for another model.
        """
        writers, readers = self._points(model, tokens)
        return [*writers, *readers]

    @contextlib.contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[Edit]:
        """Apply the edit in every forward pass over `tokens` inside the block.

        Args:
            model: the one it was made for.
            tokens: the batch that passes; the roles say where edits of positions act.

        Raises:
            EditError: it was made for another model.
            HookError: an intervention took part in fewer passes than another, or wrote twice in
                one.
        """
        writers, readers = self._points(model, tokens)
        with hooked_at([*writers, *readers]) as firings:
            yield self
        if len(fired := set(firings[: len(writers)])) > 1:
            raise HookError(
                f"interventions of {self!r} took part in {sorted(fired)} passes; all must take part in the same ones"
            )

    def merged(self, model: Model) -> Model:
        """Return a second model with the edit in its weights.

        Raises:
            EditError: a part of it cannot be expressed by weights; says why.
        """
        self.check(model)
        twin = Model(
            model.backend.twin(),
            model.tokenizer,
            f"{model.name}+edit",
            None,
            model.bos,
            model.n_parameters,
        )
        for intervention in self.matrices_first:
            intervention.merge(twin)
        return twin

    def with_record(self, record: TrainingRecord | None = None, **changes: Any) -> Edit:
        """Set how the edit was trained, and return the edit itself.

        Args:
            record: the whole record; the present one where None.
            changes: fields of the record to set.
        """
        self.record = replace(record or self.record, **changes)
        return self


def at_rates(parts: Sequence[Part], scale: float) -> tuple[Part, ...]:
    """Return the parts with every learning rate times `scale`."""
    return tuple(replace(p, lr=p.lr * scale) for p in parts)
