"""Edit W_out, the MLP's second matrix, by a formula: ROME, MEMIT and AlphaEdit.

    edit = closed_form(model, train, ROME(layer=3))
    edit = closed_form(model, train, MEMIT(layers=(2, 3), weight=100.0), background=more)
    edit = closed_form(model, train, AlphaEdit(layers=(2, 3), threshold=1e-3))

An MLP is read as a memory that gives the value v = k W for the key k. A fact (`facts.py`) is a key,
read at one token of a training prompt, with the value v0 + d that makes the model answer that prompt
rightly. d is found by 25 steps of Adam on an activation; the weights follow from it by a formula.
Rows are keys here, so that K is [fact d_in], R is [fact d_out], and the papers' formulas are
transposed. C is the second moment of keys, the mean of k^T k over the tokens of some prompts: what the
edit should leave alone.

| | change D of the matrix | source |
|---|---|---|
| ROME | u^T (v - k W) / (k u^T), u = k C^-1 / norm, one fact after the other | Meng et al. 2022, arXiv 2202.05262 |
| MEMIT | (weight C + K^T K)^-1 K^T R, layer by layer | Meng et al. 2023, arXiv 2210.07229 |
| AlphaEdit | (P K^T K + l2 1)^-1 P K^T R, P onto the null space of C | Fang et al. 2025, arXiv 2410.02355 |

In MEMIT and AlphaEdit, v is the layer's output at the last of the layers, and R is what is still missing
there, divided by the number of layers that are left. The defaults are those of EasyEdit (the code of the
survey arXiv 2305.13172) for language models with billions of parameters; choose weight, threshold and
l2 on validation rows for others. The matrix of a gated MLP is the same: what it reads is gated.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..edits.base import Matrix, Part, Shape, Where
from ..edits.edit import Edit, build
from ..edits.record import TrainingRecord
from ..errors import ConfigError, EditError
from ..examples import Example
from ..model import Model
from ..model.forward import advance
from ..prompts import PromptTemplate, Tokens, Verbalizer
from ..records import plain
from ..scoring import by_length, question
from .facts import Aim, Facts, Target, keeper
from .prefix import PrefixCache
from .presets import LAST_OF_QUERY

Keys = Float[Tensor, "fact d_in"]
Values = Float[Tensor, "fact d_out"]
Moment = Float[Tensor, "d_in d_in"]
Change = Float[Tensor, "d_in d_out"]


# ---- the formulas ---------------------------------------------------------------------------------------------------------------


def rome_update(
    k: Float[Tensor, " d_in"], missing: Float[Tensor, " d_out"], u: Float[Tensor, " d_in"]
) -> Float[Tensor, " d_out"]:
    """Return r with k (W + u^T r) = k W + missing: r = missing / (k u^T).

    Of all W' with k W' = v, W + u^T r with u = k C^-1 changes what other keys give least: it
    minimises tr((W' - W)^T C (W' - W)) (Meng et al. 2022, appendix A).

    Raises:
        ConfigError: k u^T is 0, as for a key of zeros.

    Examples:
        >>> k, u = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])
        >>> rome_update(k, torch.tensor([4.0]), u)
        tensor([2.])
    """
    along = k @ u
    if not bool(along.isfinite()) or float(along.abs()) == 0:
        raise ConfigError(
            f"a key has a product of {float(along)} with its direction, so that no rank-one change reaches its value"
        )
    return missing / along


def memit_update(K: Keys, R: Values, C: Moment, weight: float) -> Change:
    """Return (weight C + K^T K)^-1 K^T R, the minimiser of weight tr(D^T C D) + ||K D - R||^2.

    Raises:
        ConfigError: the matrix is singular.

    Examples:
        >>> K, R, C = torch.eye(2), torch.tensor([[3.0], [8.0]]), torch.diag(torch.tensor([1.0, 3.0]))
        >>> memit_update(K, R, C, 0.5).flatten()
        tensor([2.0000, 3.2000])
    """
    return solve(weight * C + K.T @ K, K.T @ R, "weight C + K^T K")


def alphaedit_update(
    K: Keys, R: Values, P: Moment, l2: float, earlier: Moment | None = None
) -> Change:
    """Return (P (K^T K + earlier) + l2 1)^-1 P K^T R; ridge regression where P = 1.

    D lies in the range of P, so that k D = 0 for every key with k P = 0. It is projected once more, for
    the digits that the solution of the equations loses.

    Args:
        K, R: keys, and the changes of their values.
        P: an orthogonal projector.
        l2: of the ridge.
        earlier: K^T K of facts that were written before.

    Examples:
        >>> K, R, P = torch.eye(2), torch.tensor([[3.0], [8.0]]), torch.diag(torch.tensor([0.0, 1.0]))
        >>> alphaedit_update(K, R, P, 1.0).flatten()
        tensor([0., 4.])
    """
    inner = K.T @ K if earlier is None else K.T @ K + earlier
    one = torch.eye(len(P), dtype=P.dtype)
    D: Tensor = P @ torch.linalg.solve(P @ inner + l2 * one, P @ K.T @ R)
    return D


def null_space(C: Moment, threshold: float, where: str = "C") -> Moment:
    """Return the projector onto the eigenvectors of C with eigenvalues below a threshold.

    Raises:
        ConfigError: no eigenvalue is below it, so that nothing can be edited, or all are, so that
            nothing is kept.

    Examples:
        >>> null_space(torch.diag(torch.tensor([4.0, 0.01])), 0.02)
        tensor([[0., 0.],
                [0., 1.]])
    """
    values, vectors = torch.linalg.eigh(C)
    below = values < threshold
    if not bool(below.any()) or bool(below.all()):
        which = "all" if bool(below.any()) else "none"
        raise ConfigError(
            f"threshold {threshold:g} has {which} of the {len(values)} eigenvalues of {where} below it; "
            f"accepted: between {float(values[0]):.3g} and {float(values[-1]):.3g}"
        )
    kept: Tensor = vectors[:, below]
    projector: Tensor = kept @ kept.T
    return projector


def solve(A: Moment, b: Float[Tensor, "d_in column"], what: str) -> Float[Tensor, "d_in column"]:
    """Return A^-1 b for a symmetric positive definite A.

    Raises:
        ConfigError: A is singular up to rounding.
    """
    root, broken = torch.linalg.cholesky_ex(A)
    pivots = root.diagonal() ** 2
    floor = len(A) * torch.finfo(A.dtype).eps * A.diagonal().max()
    if int(broken) or not bool((pivots > floor).all()):
        raise ConfigError(
            f"{what} is singular for keys of {len(A)} numbers: the prompts of C have too few different tokens; "
            "give more background prompts, or another ridge"
        )
    return torch.cholesky_solve(b, root)


# ---- the three methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ROME:
    """u^T (v - k W) / (k u^T) in one layer: a rank-one change per fact.

    With several facts, each is written into the matrix that the ones before it left, so that the last
    holds exactly and the others nearly.

    Attributes:
        layer: whose W_out is edited.
        at: role or position of the key.
        by: `class` makes one fact of all examples of a class, with the mean of their keys; `example`
            one of each.
        adjust: take u = k C^-1; without, u = k, as EasyEdit does for Llama-2.
        ridge: added to C's diagonal, as a share of its mean, before it is inverted.
        target: how d is found.

    Examples:
        >>> ROME(layer=3).places
        (3,)
    """

    layer: int
    at: str | int = LAST_OF_QUERY
    by: str = "class"
    adjust: bool = True
    ridge: float = 0.0
    target: Target = field(default_factory=Target)

    def __post_init__(self) -> None:
        _check("ridge", self.ridge, 0.0)

    @property
    def places(self) -> tuple[int, ...]:
        """Return the edited layers."""
        return (self.layer,)

    def write(self, facts: Facts, moments: dict[int, Tensor]) -> tuple[Edit, Aim]:
        """Return the edit, of the family `lora` where its factors are smaller than the matrix."""
        model, matrix = facts.model, Matrix(self.layer, "W_out")
        aim = facts.offsets(self.layer, "mlp", self.target)
        K = facts.read({"k": matrix.reads(model)}, self.layer + 1)["k"]
        U = self._directions(K, moments)
        A, B = torch.zeros(K.shape[1], 0).double(), torch.zeros(0, aim.d.shape[1]).double()
        for k, d, u in zip(K, aim.d, U, strict=True):
            B = torch.cat([B, rome_update(k, d - k @ A @ B, u)[None]])
            A = torch.cat([A, u[:, None]], 1)
        if (rank := len(B)) * sum(matrix.size(Shape.of(model))) >= A.shape[0] * B.shape[1]:
            return written(model, [Part("full", str(matrix), {}, 0.0)], [{"D": A @ B}]), aim
        part = Part("lora", str(matrix), {"rank": rank, "alpha": float(rank)}, 0.0)
        return written(model, [part], [{"A": A, "B": B}]), aim

    def _directions(self, K: Keys, moments: dict[int, Tensor]) -> Keys:
        U = K
        if self.adjust:
            C = moments[self.layer]
            C = C + self.ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
            U = solve(C, K.T, f"C of L{self.layer}.W_out").T
        units: Tensor = U / U.norm(dim=1, keepdim=True)
        return units


@dataclass(frozen=True)
class _Spread(ABC):
    """A change that several layers share.

    Attributes:
        layers: whose W_out is edited, lowest first.
        at: role or position of the keys.
        by: `example` makes a fact of each example, `class` one of all of a class.
        target: how d is found, at the output of the last layer.
    """

    layers: tuple[int, ...]
    at: str | int = LAST_OF_QUERY
    by: str = "example"
    target: Target = field(default_factory=Target)

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(
                f"layers are {self.layers}; accepted: one or more, each once, the lowest first"
            )

    @property
    def places(self) -> tuple[int, ...]:
        """Return the edited layers."""
        return self.layers

    @abstractmethod
    def change(self, K: Keys, R: Values, C: Moment, where: str) -> Change:
        """Return the change of one layer's matrix."""

    def write(self, facts: Facts, moments: dict[int, Tensor]) -> tuple[Edit, Aim]:
        """Return the edit, of the family `full`."""
        model, top = facts.model, self.layers[-1]
        if model.cfg.use_normalization_before_and_after:
            raise EditError(
                f"{type(self).__name__} adds to the stream through W_out, and {model.name} norms what W_out gives; use ROME"
            )
        output = model.point(top, "resid_post")
        aim = facts.offsets(top, "resid_post", self.target)
        wanted = facts.read({"z": output}, top + 1)["z"] + aim.d
        edit: Edit | None = None
        for i, layer in enumerate(self.layers):
            matrix = Matrix(layer, "W_out")
            now = facts.read({"k": matrix.reads(model), "z": output}, top + 1, edit, layer)
            R = (wanted - now["z"]) / (len(self.layers) - i)
            D = self.change(now["k"], R, moments[layer], str(matrix))
            before = [] if edit is None else [{"D": p.detach()} for p in edit.parameters()]
            parts = [Part("full", f"L{done}.W_out", {}, 0.0) for done in self.layers[: i + 1]]
            edit = written(model, parts, [*before, {"D": D}])
        assert edit is not None
        return edit, aim


@dataclass(frozen=True)
class MEMIT(_Spread):
    """(weight C + K^T K)^-1 K^T R in several layers.

    Attributes:
        layers, at, by, target: as above.
        weight: of what should stay, against the facts.

    Examples:
        >>> MEMIT(layers=(2, 3), weight=100.0).places
        (2, 3)
    """

    weight: float = 15000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("weight", self.weight, 0.0)

    def change(self, K: Keys, R: Values, C: Moment, where: str) -> Change:
        return memit_update(K, R, C, self.weight)


@dataclass(frozen=True)
class AlphaEdit(_Spread):
    """(P K^T K + l2 1)^-1 P K^T R in several layers: a change that only keys outside C's span see.

    Attributes:
        layers, at, by, target: as above.
        threshold: P projects onto the eigenvectors of C with smaller eigenvalues.
        l2: of the ridge; EasyEdit has 10 for GPT-J and GPT-2 XL, 1 for Llama-3.

    Examples:
        >>> AlphaEdit(layers=(3,), l2=1.0).places
        (3,)
    """

    threshold: float = 2e-2
    l2: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("threshold", self.threshold, 0.0)
        _check("l2", self.l2, 0.0)

    def change(self, K: Keys, R: Values, C: Moment, where: str) -> Change:
        P = null_space(C, self.threshold, f"C of {where}")
        return alphaedit_update(K, R, P, self.l2)


Plan = ROME | MEMIT | AlphaEdit
"""How W_out is edited."""

FORMULAS = {
    ROME: "W + u^T (v - k W) / (k u^T), u = k C^-1",
    MEMIT: "W + (weight C + K^T K)^-1 K^T R",
    AlphaEdit: "W + (P K^T K + l2 1)^-1 P K^T R",
}


def closed_form(
    model: Model,
    train: Sequence[Example],
    plan: Plan,
    *,
    background: Sequence[Example] | None = None,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    cache: PrefixCache | None = None,
    batch_size: int = 32,
    aims: dict[str, Aim] | None = None,
) -> Edit:
    """Return an edit of W_out that a formula gives; the model itself stays as it is.

    Args:
        model: unedited.
        train: examples that it should answer rightly.
        plan: `ROME`, `MEMIT` or `AlphaEdit`.
        background: examples whose prompts give C, all tokens of them; those of `train` where None.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        cache: of streams, shared with other edits of the same model.
        batch_size: prompts per forward pass.
        aims: filled with the d that were found. Given again, they are not searched for again, as when
            weight or threshold is chosen from a grid.

    Returns:
        An edit of the family `full`, or `lora` for a few facts of ROME. `record.made` says how many
        facts and prompts there were, and how many facts the wanted values answer.

    Raises:
        ConfigError: no examples, a prompt without the position, a singular C, or a threshold that
            keeps everything or nothing.
        SiteError: a layer that the model lacks, or a model without W_out.
        EditError: MEMIT or AlphaEdit of a model that norms what W_out gives.

    Examples:
        >>> import mech_absa as ma
        >>> model, train = ma.load_model(), ma.load_examples("builtin:laptop/train")[:6]
        >>> edit = closed_form(model, train, ROME(3, adjust=False, target=Target(steps=3)))
        >>> edit
        Edit(lora at 1 places in layers 3; 1,920 parameters; of bundled)
    """
    started = time.perf_counter()
    for layer in plan.places:
        build(Part("full", f"L{layer}.W_out"), Shape.of(model))  # rejects what the model lacks
    facts = Facts.of(
        model, train, plan.at, plan.by, template=template, verbalizer=verbalizer, cache=cache, batch_size=batch_size, aims=aims
    )  # fmt: skip
    others = train if background is None else background
    prompts = [question(model, e, facts.template) for e in others]
    moments = second_moments(model, prompts, plan.places, batch_size)
    edit, aim = plan.write(facts, moments)
    done = int((aim.losses < plan.target.stop).sum())
    made = {
        "formula": FORMULAS[type(plan)],
        "facts": len(facts),
        "facts_below_stop": done,
        "mean_loss": round(float(aim.losses.mean()), 6),
        "prompts_of_C": len(prompts),
        "tokens_of_C": sum(p.length for p in prompts),
    }
    record = TrainingRecord.of(
        train,
        facts.template,
        facts.verbalizer,
        preset={"name": type(plan).__name__, **plain(plan)},
        seconds=round(time.perf_counter() - started, 3),
        made=made,
    )
    return edit.with_record(record)


@torch.no_grad()
def second_moments(
    model: Model, prompts: Sequence[Tokens], layers: Sequence[int], batch_size: int = 32
) -> dict[int, Moment]:
    """Return C of each layer: the mean of k^T k over all tokens of the prompts, float64.

    Args:
        model: unedited.
        prompts: batches of one.
        layers: whose W_out reads the keys.
        batch_size: prompts per forward pass.

    Raises:
        ConfigError: no prompts.
    """
    if not prompts:
        raise ConfigError("there are no background prompts to take C over; at least one is needed")
    stop, count = max(layers) + 1, sum(p.lengths[0] for p in prompts)
    sums: dict[int, Tensor] = {}
    for rows in by_length(prompts, batch_size):
        tokens = Tokens.stack([prompts[i] for i in rows])
        inside = Where(tokens).mask("all").cpu()
        seen: dict[str, Tensor] = {}
        readers = [
            (Matrix(layer, "W_out").reads(model), keeper(seen, str(layer))) for layer in layers
        ]
        advance(model, model.embed(tokens.ids), 0, stop, readers)
        for layer in layers:
            keys = seen[str(layer)].cpu().double()[inside]
            sums[layer] = sums.get(layer, torch.zeros(())) + keys.T @ keys
    return {layer: total / count for layer, total in sums.items()}


def written(model: Model, parts: Sequence[Part], values: Sequence[dict[str, Tensor]]) -> Edit:
    """Return an edit whose parameters have these values."""
    edit = Edit.fresh(model, parts)
    with torch.no_grad():
        for intervention, given in zip(edit, values, strict=True):
            for name, value in given.items():
                intervention.get_parameter(name).copy_(value)
    return edit


def _check(name: str, value: float, low: float) -> None:
    if not low <= value < math.inf:
        raise ConfigError(f"{name} is {value}; accepted: {low:g} or more")
