"""Low-rank edits of weight matrices, on every token.

LoRA is Hu et al. 2021 (arXiv 2106.09685), its rank-stabilised scale Kalajdzievski 2023 (arXiv
2312.03732), DoRA Liu et al. 2024 (arXiv 2402.09353), TinyLoRA "Learning to reason in 13 parameters"
2026 (arXiv 2602.04118). The paper's weight part is LoRA on the
attention's output projection alone. x is a row, so that A is [inputs rank] and B is [rank outputs];
B = 0 at the start, so that a fresh edit changes no bit of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..model import Model
from .base import Intervention, MatrixIntervention, Place, Shape, parameter, rank_of


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

    def written(self) -> Float[Tensor, "d_out k"]:
        """Return an orthonormal basis of what the update can write, in float64: of the rows of B.

        k is the rank of B, 0 for a fresh edit. A B with numbers that are not finite spans nothing:
        training ends at the next loss.
        """
        B = self.B.detach().double()
        if not bool(B.isfinite().all()):
            return B.new_empty(self.d_out, 0)
        _, size, V = torch.linalg.svd(B, full_matrices=False)
        noise = max(B.shape) * torch.finfo(torch.float32).eps * size.max()
        basis: Tensor = V[size > noise].T
        return basis

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
    own = "its magnitudes start as the norms of its own matrix"

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


class TinyLoRA(MatrixIntervention):
    """y + x V (sum_i v_i P_i)^T S U^T: a few scalars v_i move a matrix inside its own leading
    subspace.

    U, S, V are the leading r singular vectors and values of the base weights, U S V^T = W_r with a
    row per output ("Learning to reason in 13 parameters", arXiv 2602.04118, has dW = U S (sum_i v_i
    P_i) V^T). The u matrices P_i are [r r], drawn from N(0, 1/r) by the seed of the edit; the paper
    names no distribution, and this one is peft's. Only v trains. v = 0 at the start is the identity.

    U S, V and P are saved with the edit, not computed again from the base: a library may return a
    pair of singular vectors with the other sign, and then v would mean another change. (peft 0.21
    puts a square root of S on each side of the sum, which weighs the P_i differently.) A fresh edit
    costs one SVD per matrix: 0.3 to 0.5 CPU-seconds for a matrix of 576 x 1536.

    Args:
        place: a matrix.
        shape: of the model.
        rank: r, of the frozen factors.
        u: scalars that train.
        shared_with: the place of another `tinylora` part of the edit, whose v this one uses instead
            of its own; None for its own.
    """

    family = "tinylora"
    formula = "x (W + dW), dW^T = U S (sum_i v_i P_i) V^T"
    V: Tensor
    US: Tensor
    P: Tensor

    def __init__(
        self, place: Place, shape: Shape, rank: int = 2, u: int = 4, shared_with: str | None = None
    ):
        super().__init__(place, shape)
        rank_of(rank, min(self.d_in, self.d_out), place)
        if u < 1:
            raise ConfigError(f"u is {u} at {place}; accepted: 1 scalar or more")
        self.u, self.shared_with = u, shared_with
        self.v = parameter(u) if shared_with is None else None
        self._lender: tuple[TinyLoRA, ...] = ()
        self.register_buffer("V", torch.empty(self.d_in, rank, dtype=torch.float32))
        self.register_buffer("US", torch.empty(self.d_out, rank, dtype=torch.float32))
        self.register_buffer("P", torch.empty(u, rank, rank, dtype=torch.float32))

    def meet(self, parts: Sequence[Intervention]) -> None:
        if self.shared_with is None:
            return
        self._lender = tuple(
            p
            for p in parts
            if isinstance(p, TinyLoRA)
            and str(p.place) == self.shared_with
            and p.v is not None
            and p.u == self.u
        )[:1]
        if not self._lender:
            raise ConfigError(
                f"{self.family} at {self.place} shares the scalars of {self.shared_with}, and the edit has no {self.family} "
                f"there with {self.u} scalars of its own; add one, or leave shared_with out"
            )

    @property
    def scalars(self) -> Float[Tensor, " u"]:
        """Return v, its own or that of the part it is shared with."""
        v = self._lender[0].v if self._lender else self.v
        assert v is not None, "an edit makes its parts meet"
        return v

    @torch.no_grad()
    def reset(self, model: Model, generator: torch.Generator) -> None:
        rank = self.V.shape[1]
        W, _ = self.matrix.weight(model)
        V, S, Uh = torch.linalg.svd(W.cpu().double(), full_matrices=False)
        V, US = V[:, :rank], Uh[:rank].T * S[:rank]
        signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
        self.V.copy_(V * signs)  # the largest entry of each column is positive
        self.US.copy_(US * signs)
        self.P.normal_(std=1 / math.sqrt(rank), generator=generator)
        if self.v is not None:
            nn.init.zeros_(self.v)

    def update(self) -> Float[Tensor, "d_in d_out"]:
        """Return the change of the matrix, in float64."""
        V, US, P, v = (t.double() for t in (self.V, self.US, self.P, self.scalars))
        return V @ torch.einsum("i,iab->ba", v, P) @ US.T

    def change(self, y: Tensor, x: Tensor, model: Model) -> Tensor:
        R = torch.einsum("i,iab->ab", self.scalars, self.P.to(self.scalars))
        return y + x @ self.V.to(x) @ (R.T @ self.US.T.to(R)).to(x)

    def merge(self, model: Model) -> None:
        W, _ = self.matrix.weight(model)
        self.matrix.set_weight(model, W.double() + self.update().detach().to(W.device))


def _ratio(m: Float[Tensor, " d_out"], norm: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out"]:
    """Return m / norm; 1 for a column of zeros, which has no direction (trained models do have such
    columns)."""
    return torch.where(norm > 0, m / torch.where(norm > 0, norm, 1.0), 1.0)
