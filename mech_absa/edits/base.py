"""Define the parts of an edit: places in a model, and small modules that change what passes there.

An `Intervention` reads a place, writes a place, and owns a handful of parameters. There are three
sorts of place:

    L5.resid_post@query.last    a `Site`: an activation, optionally at one role or position
    L5.W_O                      a `Matrix`: what a weight matrix is given and what it returns, on every token
    L5                          a `Block`: the attention of a layer as a whole (prefixes)

Whatever it does, an intervention does it through forward hooks that `mech_absa.hooks` adds and
removes, so the weights of the base model are never touched and an edit is gone when its context is
left. Its parameters are float32 and are cast where they are used.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, EditError, SiteError, choices
from ..model import Model
from ..model.forward import Point
from ..model.hooks import at_site
from ..prompts import Tokens
from ..sites import Site, role_indices

MATRICES = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: all that is needed to count the parameters of an edit.

    Attributes:
        gated: whether the MLP has a gate (Llama's kind), and so a `W_gate`.
        n_parameters: of the base model, as Hugging Face counts them.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    gated: bool
    n_parameters: int = 0

    @classmethod
    def of(cls, model: Model) -> Shape:
        """Return the shape of a loaded model."""
        return cls(
            model.n_layers,
            model.d_model,
            model.n_heads,
            model.n_kv_heads,
            model.d_head,
            model.d_mlp,
            bool(model.cfg.gated_mlp),
            model.n_parameters,
        )

    @property
    def matrices(self) -> tuple[str, ...]:
        """Return the names of the weight matrices of a block."""
        return tuple(
            m
            for m in MATRICES
            if (self.gated or m != "W_gate") and (self.d_mlp or m[2:] not in ("in", "gate", "out"))
        )


LLAMA_2_7B = Shape(32, 4096, 32, 32, 128, 11008, True, 6_738_415_616)
"""The model of the paper's Table 2."""


@dataclass(frozen=True, order=True)
class Matrix:
    """A weight matrix of a block, written `L5.W_O`; rows are inputs, columns are outputs, heads
    side by side."""

    layer: int
    name: str

    def __post_init__(self) -> None:
        if self.name not in MATRICES:
            raise SiteError(
                f"unknown weight matrix {self.name!r} in layer {self.layer}; accepted: {choices(MATRICES)}"
            )

    def __str__(self) -> str:
        return f"L{self.layer}.{self.name}"

    def size(self, shape: Shape) -> tuple[int, int]:
        """Return (inputs, outputs)."""
        heads, kv = shape.n_heads * shape.d_head, shape.n_kv_heads * shape.d_head
        return {
            "W_Q": (shape.d_model, heads), "W_K": (shape.d_model, kv), "W_V": (shape.d_model, kv), "W_O": (heads, shape.d_model),
            "W_in": (shape.d_model, shape.d_mlp), "W_gate": (shape.d_model, shape.d_mlp), "W_out": (shape.d_mlp, shape.d_model),
        }[self.name]  # fmt: skip

    def reads(self, model: Model) -> nn.Module:
        """Return the module whose output the matrix reads."""
        read = {"W_O": "z", "W_out": "post", "W_in": "ln2", "W_gate": "ln2"}
        return model.point(self.layer, read.get(self.name, "ln1"))

    def writes(self, model: Model) -> nn.Module:
        """Return the module whose output is that of the matrix, before any post-norm."""
        gated = bool(model.cfg.gated_mlp)
        written = {
            "W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "projected",
            "W_in": "pre_linear" if gated else "pre", "W_gate": "pre", "W_out": "mlp",
        }  # fmt: skip
        return model.point(self.layer, written[self.name])

    def weight(
        self, model: Model
    ) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]:
        """Return the matrix and its bias (None where it has none), as the model holds them."""
        return model.backend.matrix(self.layer, self.name)

    def set_weight(self, model: Model, W: Tensor, b: Tensor | None = None) -> None:
        """Overwrite the matrix (and the bias, where one is given)."""
        model.backend.set_matrix(self.layer, self.name, W, b)


@dataclass(frozen=True, order=True)
class Block:
    """A layer as a whole, written `L5`."""

    layer: int

    def __str__(self) -> str:
        return f"L{self.layer}"


Place = Site | Matrix | Block


def parse_place(text: str) -> Place:
    """Return the place that `text` spells.

    Raises:
        SiteError: it spells none.

    Examples:
        >>> parse_place("L5.W_O"), parse_place("L5").layer
        (Matrix(layer=5, name='W_O'), 5)
    """
    if match := re.fullmatch(r"L(\d+)", text):
        return Block(int(match[1]))
    if match := re.fullmatch(r"L(\d+)\.(W_\w+)", text):
        return Matrix(int(match[1]), match[2])
    return Site.parse(text)


class Where:
    """The tokens of a batch that an edit acts on.

    Positions count inside the prompt: padding and the tokens of a continuation have no role and are
    never meant, so that an edit of prompt positions leaves what is generated alone.
    """

    def __init__(self, tokens: Tokens):
        self.roles, self.vocabulary = tokens.roles, tokens.vocabulary
        self._indices: dict[tuple[str | int, torch.device], tuple[Tensor, Tensor]] = {}

    def index(self, at: str | int | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return (rows, positions) of a role, a role group or a position of the prompt; None for every
        token there is.

        Args:
            at: as in `Site.at`; negative positions count from the end of the prompt.
        """
        if at is None:
            return None
        if (at, device) not in self._indices:
            rows, cols = self.mask(at).nonzero(as_tuple=True)
            self._indices[at, device] = rows.to(device), cols.to(device)
        return self._indices[at, device]

    def mask(self, at: str | int) -> Tensor:
        """Return the same tokens as a mask [batch pos]."""
        if isinstance(at, str):
            wanted = torch.tensor(role_indices(at, self.vocabulary), dtype=torch.long)
            return torch.isin(self.roles, wanted.to(self.roles.device))
        inside = self.roles >= 0
        n = inside.sum(1, keepdim=True)
        place = torch.full_like(n, at) if at >= 0 else n + at
        return inside & (torch.arange(self.roles.shape[1], device=self.roles.device) == place)


class Intervention(nn.Module):
    """A trained change of one place.

    A subclass opens its docstring with its formula, sets `formula` to the same, creates its
    parameters in `__init__` (sizes only, so that they can be counted without a model) and gives
    them their values in `reset`.

    Every family takes one option beside its own, `shared_with`: the place of another part of the edit
    of the same family, whose parameters this one uses instead of having any. They are counted,
    trained, settled and saved once, and their gradient is the sum over the places.

    Attributes:
        place: where it acts.
        own: why parts of this family cannot share their parameters; empty where they can.
    """

    family: ClassVar[str]
    formula: ClassVar[str]
    own: str = ""

    def __init__(self, place: Place):
        super().__init__()
        self.place = place
        self._sizes: dict[str, torch.Size] = {}  # of the parameters that it uses but does not have
        self._from = ""
        self._lenders: tuple[Intervention, ...] = ()

    def __getattr__(self, name: str) -> Any:
        """Return a parameter of the part that this one shares those of."""
        if name in self.__dict__.get("_sizes", ()) and self._lenders:
            return getattr(self._lenders[0], name)
        return super().__getattr__(name)

    @property
    def borrows(self) -> bool:
        """Return whether its parameters are those of another part."""
        return bool(self._sizes)

    def share(self, place: str) -> None:
        """Give up its parameters; `borrow` then finds those of the same family at `place`.

        Raises:
            ConfigError: the parameters of this family belong to their place.
        """
        if self.own:
            raise ConfigError(
                f"{self.family} at {self.place} cannot use the parameters of {place}: {self.own}"
            )
        self._from = place
        self._sizes = {name: p.shape for name, p in self.named_parameters()}
        for name in self._sizes:
            delattr(self, name)

    def borrow(self, parts: Sequence[Intervention]) -> None:
        """Find the part whose parameters this one uses, if it has none of its own.

        Args:
            parts: all parts of the edit, this one among them.

        Raises:
            ConfigError: the edit has no such part with parameters of these sizes.
        """
        if not self.borrows:
            return
        self._lenders = tuple(
            p
            for p in parts
            if p.family == self.family
            and str(p.place) == self._from
            and {name: q.shape for name, q in p.named_parameters()} == self._sizes
        )[:1]
        if not self._lenders:
            raise ConfigError(
                f"{self.family} at {self.place} shares the parameters of {self._from}, and the edit has no {self.family} there "
                "with parameters of its own and of the same sizes; add one, or leave shared_with out"
            )

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name; all of them train."""
        return dict(self.named_parameters())

    @abstractmethod
    def reset(self, model: Model, generator: torch.Generator) -> None:
        """Set the values that training starts from."""

    @abstractmethod
    def points(self, model: Model, where: Where) -> tuple[list[Point], list[Point]]:
        """Return (writers, readers): what is hooked while the edit is in force. All writers are hooked
        before all readers."""

    def meet(self, parts: Sequence[Intervention]) -> None:
        """Find the other parts of the edit that this one names; most name none.

        A part that is found is kept in a tuple, not as a module of this one: its parameters are
        counted, trained and saved once.

        Args:
            parts: all parts of the edit, this one among them.

        Raises:
            ConfigError: the edit lacks a part that is named.
        """
        return None

    def settle(self) -> None:
        """Bring the parameters back to where they must lie, after every step of the optimiser."""
        return None

    def penalty(self, step: int) -> Tensor | None:
        """Return what is added to the loss at this step, or None."""
        return None

    def batch_penalty(self, done: float) -> Tensor | None:
        """Return what is added to the loss of the batch that has just passed, or None.

        Args:
            done: steps taken, as a share of all steps of the training.

        Returns:
            A mean over the examples of the batch.
        """
        return None

    def merge(self, model: Model) -> None:
        """Put its effect into the weights of `model`, for good.

        Raises:
            EditError: no weights can express it; says why.
        """
        raise EditError(f"{self.family} at {self.place} cannot be merged: {self.unmergeable}")

    @property
    def unmergeable(self) -> str:
        """Return why it cannot be merged, for the message of `merge`."""
        return "no weight of the model expresses it"


def parameter(*sizes: int) -> nn.Parameter:
    """Return an uninitialised float32 parameter."""
    return nn.Parameter(torch.empty(*sizes, dtype=torch.float32))


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32, or wider where the model is."""
    return torch.promote_types(x.dtype, torch.float32)


class SiteIntervention(Intervention):
    """A change of an activation: h -> forward(h), at the tokens its site names."""

    def __init__(self, place: Place, shape: Shape):
        if not isinstance(place, Site):
            raise SiteError(
                f"{self.family} acts on activations, and {place} is none; sites look like L5.resid_post@query.last"
            )
        if place.kind in ("q", "k", "v"):
            raise SiteError(
                f"{self.family} at {place} is not offered; accepted: resid_pre, resid_mid, resid_post, attn_out, mlp_out or head"
            )
        super().__init__(place)
        self.site = place
        self.width = shape.d_model if place.head is None else shape.d_head

    @abstractmethod
    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        """Return the new activation, for activations in float32 or wider."""

    def _changed(self, h: Tensor) -> Tensor:
        """Return the new activation in the type of the old one."""
        new: Tensor = self(h.to(wide(h)))
        return new.to(h.dtype)

    def points(self, model: Model, where: Where) -> tuple[list[Point], list[Point]]:
        def change(h: Tensor) -> Tensor:
            index = where.index(self.site.at, h.device)
            if index is None:
                return self._changed(h)
            picked = h[index]
            return h.index_put(index, self._changed(picked)) if len(picked) else h

        return [at_site(model, self.site, change)], []

    def affine(self) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]] | None:
        """Return (M, c) of h -> h M + c; None where the change is not affine."""
        return None

    @property
    def unmergeable(self) -> str:
        if self.site.at is not None:
            return f"it acts at {self.site.at} only, and a weight acts on every token; an edit of all positions is needed"
        if self.site.kind not in ("attn_out", "mlp_out"):
            return f"no single weight matrix makes {self.site.kind}; attn_out or mlp_out at all positions is needed"
        return "it is no affine function of the activation"

    def merge(self, model: Model) -> None:
        affine = self.affine()
        if (
            self.site.at is not None
            or self.site.kind not in ("attn_out", "mlp_out")
            or affine is None
        ):
            return super().merge(model)
        if model.cfg.use_normalization_before_and_after:
            raise EditError(
                f"{self.family} at {self.place} cannot be merged: {model.name} norms {self.site.kind} after the matrix that makes it"
            )
        M, c = (t.detach().double() for t in affine)
        matrix = Matrix(self.site.layer, "W_O" if self.site.kind == "attn_out" else "W_out")
        W, b = matrix.weight(model)
        assert b is not None
        matrix.set_weight(model, W.double() @ M, b.double() @ M + c)
        return None


class MatrixIntervention(Intervention):
    """A change of what a weight matrix returns: y -> change(y, x), on every token, x being what the
    matrix was given."""

    def __init__(self, place: Place, shape: Shape):
        if not isinstance(place, Matrix):
            raise SiteError(
                f"{self.family} acts on weight matrices, and {place} is none; they are {choices(f'L5.{m}' for m in shape.matrices)}"
            )
        if place.name not in shape.matrices:
            raise SiteError(
                f"{self.family} at {place}: the model has no {place.name}; it has {choices(shape.matrices)}"
            )
        super().__init__(place)
        self.matrix = place
        self.d_in, self.d_out = place.size(shape)

    @abstractmethod
    def change(
        self, y: Float[Tensor, "batch pos d_out"], x: Float[Tensor, "batch pos d_in"], model: Model
    ) -> Float[Tensor, "batch pos d_out"]:
        """Return the new output."""

    def points(self, model: Model, where: Where) -> tuple[list[Point], list[Point]]:
        seen: dict[str, Tensor] = {}

        def read(x: Tensor) -> None:
            seen["x"] = x

        def write(y: Tensor) -> Tensor:
            x = seen.pop("x")
            x = x.flatten(2) if x.ndim == 4 else x
            return (
                self.change(y.flatten(2), x, model).view(y.shape)
                if y.ndim == 4
                else self.change(y, x, model)
            )

        return [(self.matrix.writes(model), write)], [(self.matrix.reads(model), read)]


def rank_of(rank: int, most: int, place: Place) -> int:
    """Return `rank` after a check.

    Raises:
        ConfigError: the matrix cannot have that rank.
    """
    if not 1 <= rank <= most:
        raise ConfigError(f"rank {rank} was asked for at {place}; accepted: 1 to {most}")
    return rank


@dataclass(frozen=True)
class Part:
    """One intervention as it is configured and saved.

    Attributes:
        family: a key of `FAMILIES`.
        place: as text.
        options: the arguments of the family (rank, alpha, ...).
        lr: learning rate of its parameters.
        weight_decay: of its parameters.
    """

    family: str
    place: str
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.0
