"""What the low-rank edits are compared with: prefixes, bottleneck adapters, steering after a block,
biases, and the weights themselves.

Prefix tuning is Li & Liang 2021 (arXiv 2101.00190), the adapter Houlsby et al. 2019 (arXiv
1902.00751), post-block steering Adila et al. 2026 (arXiv 2603.00425), BitFit Ben Zaken et al. 2022
(arXiv 2106.10199). All of them are kept beside the base model and act through hooks, full
fine-tuning included: what is trained there is the difference to the base weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, EditError, SiteError, choices
from ..model import Model
from ..model.forward import Point
from .base import (
    Block,
    Intervention,
    MatrixIntervention,
    Place,
    Shape,
    SiteIntervention,
    Where,
    parameter,
    rank_of,
)
from .lowrank import LoRA


class Prefix(Intervention):
    """z = softmax(q [P_K; K]^T / scale) [P_V; V]: n keys and values before those of the prompt,
    visible to every token.

    The attention over the longer row is a mixture of two softmaxes, z' = (1 - g) z + g softmax(q
    P_K^T) P_V with g = sigmoid(lse(q P_K^T) - lse(q K^T)) (He et al. 2022, arXiv 2110.04366, eq.
    7), so that nothing in the model need change its length. Prefix keys are not rotated: they are
    what a key-value cache would hold.
    """

    family = "prefix"
    formula = "softmax(q [P_K; K]^T) [P_V; V]"

    def __init__(self, place: Place, shape: Shape, length: int = 10):
        if not isinstance(place, Block):
            raise SiteError(
                f"{self.family} acts on the attention of a layer, and {place} is more than that; write L{place.layer}"
            )
        if length < 1:
            raise ConfigError(
                f"a prefix of {length} vectors was asked for at {place}; accepted: 1 or more"
            )
        super().__init__(place)
        self.P_K = parameter(length, shape.n_kv_heads, shape.d_head)
        self.P_V = parameter(length, shape.n_kv_heads, shape.d_head)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.normal_(self.P_K, std=0.02, generator=generator)
        nn.init.normal_(self.P_V, std=0.02, generator=generator)

    def points(self, model: Model, where: Where) -> tuple[list[Point], list[Point]]:
        cfg, layer = model.cfg, self.place.layer
        sinks = bool(getattr(cfg, "use_attention_sinks", False))
        if sinks or cfg.positional_embedding_type == "alibi":
            what = "attention sinks" if sinks else "ALiBi positions"
            raise EditError(
                f"prefix at {self.place}: {model.name} has {what}, which give a prefix no place"
            )
        seen: dict[str, Tensor] = {}

        def read_q(q: Tensor) -> None:
            seen["q"] = q

        def read_scores(scores: Tensor) -> None:
            seen["lse"] = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)

        def write_z(z: Tensor) -> Tensor:
            if seen.keys() != {"q", "lse"}:
                raise EditError(
                    f"{self.family} at {self.place}: the bridge of {model.name} does not show its queries and scores before "
                    "the heads' output; load the model with backend hooked (TransformerLens below 4)"
                )
            q, lse = seen.pop("q"), seen.pop("lse")
            group = q.shape[2] // self.P_K.shape[1]
            keys, values = (
                repeat(p, "n kv d -> n (kv group) d", group=group).to(lse)
                for p in (self.P_K, self.P_V)
            )
            s = einsum(
                q.to(lse.dtype), keys, "batch pos head d, n head d -> batch head pos n"
            ) / model.backend.scale(layer)
            if cfg.attn_scores_soft_cap > 0:
                s = cfg.attn_scores_soft_cap * torch.tanh(s / cfg.attn_scores_soft_cap)
            g = rearrange(
                torch.sigmoid(s.logsumexp(-1) - lse), "batch head pos -> batch pos head 1"
            )
            own = einsum(s.softmax(-1), values, "batch head pos n, n head d -> batch pos head d")
            return ((1 - g) * z + g * own).to(z.dtype)

        rotary = cfg.positional_embedding_type == "rotary"
        readers = [("rot_q" if rotary else "q", read_q), ("scores", read_scores)]
        return [(model.point(layer, "z"), write_z)], [
            (model.point(layer, name), read) for name, read in readers
        ]

    @property
    def unmergeable(self) -> str:
        return "its keys and values belong to no token"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Adapter(SiteIntervention):
    """h + W_up f(W_down h): a bottleneck after a sublayer. W_up = 0 at the start, so that a fresh
    one is the identity."""

    family = "adapter"
    formula = "h + W_up f(W_down h)"

    def __init__(self, place: Place, shape: Shape, rank: int = 16, f: str = "relu"):
        super().__init__(place, shape)
        if f not in ACTIVATIONS:
            raise ConfigError(f"f is {f!r} at {place}; accepted: {choices(ACTIVATIONS)}")
        rank_of(rank, self.width, place)
        self.f: Callable[[Tensor], Tensor] = ACTIVATIONS[f]
        self.W_down = parameter(self.width, rank)
        self.W_up = parameter(rank, self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.W_down, -bound, bound, generator=generator)
        nn.init.zeros_(self.W_up)

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        return h + self.f(h @ self.W_down.to(h)) @ self.W_up.to(h)


class PostBlock(SiteIntervention):
    """h + alpha W_up SiLU(W_down h): a low-rank steering of what a block returns.

    Adila et al. 2026 (arXiv 2603.00425, "Weight Updates as Activation Shifts") put one behind every
    block, on every token, with rank 8 and alpha 1. There are no biases. W_down starts small, uniform
    within 1e-3 / sqrt(d) (the authors' code: Kaiming-uniform with a = sqrt 5, times 1e-3), and W_up
    at 0, so that a fresh one is the identity.

    Beside a LoRA in the same edit it can be kept from reading what that writes (the paper's joint
    training of weights and activations, `joint/train_orthogonal.py` of its code): with V an
    orthonormal basis of what the LoRA's B can write, every row w of W_down becomes w (I - V V^T)
    after every step of the optimiser. Where a model norms the MLP's output, V is what is written
    before that norm.

    Args:
        place: the output of a block (`resid_post`).
        shape: of the model.
        rank: width of the bottleneck.
        alpha: factor of the shift.
        orthogonal_to: the place of a `lora` part of the edit that writes to the residual stream,
            such as L5.W_out; None for no constraint.
    """

    family = "post_block"
    formula = "h + alpha W_up SiLU(W_down h)"

    def __init__(
        self,
        place: Place,
        shape: Shape,
        rank: int = 8,
        alpha: float = 1.0,
        orthogonal_to: str | None = None,
    ):
        super().__init__(place, shape)
        if self.site.kind != "resid_post":
            raise SiteError(
                f"{self.family} acts on what a block returns, and {place} is something else; write L{place.layer}.resid_post"
            )
        rank_of(rank, self.width, place)
        self.alpha, self.orthogonal_to = alpha, orthogonal_to
        if orthogonal_to is not None:
            self.own = f"it is kept orthogonal to {orthogonal_to}"
        self._writer: tuple[LoRA, ...] = ()
        self.W_down = parameter(self.width, rank)
        self.W_up = parameter(rank, self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        bound = 1e-3 / math.sqrt(self.width)
        nn.init.uniform_(self.W_down, -bound, bound, generator=generator)
        nn.init.zeros_(self.W_up)

    def meet(self, parts: Sequence[Intervention]) -> None:
        if self.orthogonal_to is None:
            return
        self._writer = tuple(
            p
            for p in parts
            if isinstance(p, LoRA)
            and p.family == "lora"
            and p.matrix.name in ("W_O", "W_out")
            and str(p.place) == self.orthogonal_to
        )
        if not self._writer:
            raise ConfigError(
                f"{self.family} at {self.place} is to be orthogonal to {self.orthogonal_to}, and the edit has no lora of "
                f"W_O or W_out there; add one, or leave orthogonal_to out"
            )

    @torch.no_grad()
    def settle(self) -> None:
        for lora in self._writer:
            V, W_down = lora.written(), self.W_down.double()
            self.W_down.copy_(W_down - V @ (V.T @ W_down))

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        return h + self.alpha * F.silu(h @ self.W_down.to(h)) @ self.W_up.to(h)


class BitFit(MatrixIntervention):
    """y + b: the bias of a matrix, also where the base model has none. 0 at the start."""

    family = "bitfit"
    formula = "y + b"

    def __init__(self, place: Place, shape: Shape):
        super().__init__(place, shape)
        self.b = parameter(self.d_out)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.zeros_(self.b)

    def change(self, y: Tensor, x: Tensor, model: Model) -> Tensor:
        return y + self.b.to(y)

    def merge(self, model: Model) -> None:
        W, bias = self.matrix.weight(model)
        if bias is None:
            return super().merge(model)
        return self.matrix.set_weight(model, W, bias.double() + self.b.detach().double())

    @property
    def unmergeable(self) -> str:
        return f"a gated MLP has no bias at {self.matrix.name}"


class Full(MatrixIntervention):
    """y + x D: the matrix itself, trained as its difference D to the base. 0 at the start."""

    family = "full"
    formula = "x (W + D)"

    def __init__(self, place: Place, shape: Shape):
        super().__init__(place, shape)
        self.D = parameter(self.d_in, self.d_out)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.zeros_(self.D)

    def change(self, y: Tensor, x: Tensor, model: Model) -> Tensor:
        return y + x @ self.D.to(x)

    def merge(self, model: Model) -> None:
        W, _ = self.matrix.weight(model)
        self.matrix.set_weight(model, W.double() + self.D.detach().double())
