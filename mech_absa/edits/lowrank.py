"""Low-rank edits of weight matrices, on every token.

LoRA is Hu et al. 2021 (arXiv 2106.09685), its rank-stabilised scale Kalajdzievski 2023 (arXiv
2312.03732), DoRA Liu et al. 2024 (arXiv 2402.09353). The paper's weight part is LoRA on the
attention's output projection alone. x is a row, so that A is [inputs rank] and B is [rank outputs];
B = 0 at the start, so that a fresh edit changes no bit of the logits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..model import Model
from .base import MatrixIntervention, Place, Shape, parameter, rank_of


class LoRA(MatrixIntervention):
    """y + s (dropout(x) A) B, with s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised."""

    family = "lora"
    formula = "y + s (dropout(x) A) B, s = alpha / r or alpha / sqrt(r)"

    def __init__(
        self,
        place: Place,
        shape: Shape,
        rank: int = 4,
        alpha: float = 8.0,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(place, shape)
        self.rank = rank_of(rank, min(self.d_in, self.d_out), place)
        if not 0 <= dropout < 1:
            raise ConfigError(
                f"dropout {dropout} was asked for at {place}; accepted: 0 up to (not including) 1"
            )
        self.scale = alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
        self.dropout = dropout
        self.A = parameter(self.d_in, rank)
        self.B = parameter(rank, self.d_out)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(
            self.A.T, a=math.sqrt(5), generator=generator
        )  # fan-in is the number of inputs
        nn.init.zeros_(self.B)

    def low_rank(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_out"]:
        """Return s (dropout(x) A) B."""
        x = F.dropout(x, self.dropout, self.training)
        return (x @ self.A.to(x) * self.scale) @ self.B.to(x)

    def update(self) -> Float[Tensor, "d_in d_out"]:
        """Return s A B, the change of the matrix, in float64."""
        return self.scale * self.A.double() @ self.B.double()

    def change(self, y: Tensor, x: Tensor, model: Model) -> Tensor:
        return y + self.low_rank(x)

    def merge(self, model: Model) -> None:
        W, _ = self.matrix.weight(model)
        self.matrix.set_weight(model, W.double() + self.update().detach())


class DoRA(LoRA):
    """x m (W + s A B) / ||W + s A B|| + bias: LoRA that turns the columns, and a magnitude m for
    each of them.

    The norm is of a column (all inputs of one output) and is held constant in the backward pass, as
    its authors advise. m starts as the norm, which makes a fresh edit the identity. Dropout thins
    what A is given and nothing else.
    """

    family = "dora"
    formula = "x m (W + s A B) / ||W + s A B||_col"

    def __init__(
        self,
        place: Place,
        shape: Shape,
        rank: int = 4,
        alpha: float = 8.0,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(place, shape, rank, alpha, rank_stabilised, dropout)
        self.m = parameter(self.d_out)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        super().reset(model, generator)
        with torch.no_grad():
            self.m.copy_(self.norm(model))

    @torch.no_grad()
    def norm(self, model: Model) -> Float[Tensor, " d_out"]:
        """Return ||W + s A B|| of every column."""
        W, _ = self.matrix.weight(model)
        kind = torch.promote_types(W.dtype, torch.float32)
        A, B = (p.to(W.device, kind) for p in (self.A, self.B))
        norm: Tensor = torch.linalg.vector_norm(W.to(kind) + self.scale * A @ B, dim=0)
        return norm

    def change(self, y: Tensor, x: Tensor, model: Model) -> Tensor:
        _, bias = self.matrix.weight(model)
        norm = self.norm(model)
        c = _ratio(self.m.to(norm), norm).to(y)
        base = y if bias is None else y - bias
        return y + (c - 1) * base + c * self.low_rank(x)

    def merge(self, model: Model) -> None:
        W, _ = self.matrix.weight(model)
        turned = W.double() + self.update().detach()
        self.matrix.set_weight(model, _ratio(self.m.detach().double(), turned.norm(dim=0)) * turned)


def _ratio(m: Float[Tensor, " d_out"], norm: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
    """Return m / norm; 1 for a column of zeros, which has no direction (trained models do have such
    columns)."""
    return torch.where(norm > 0, m / torch.where(norm > 0, norm, 1.0), 1.0)
