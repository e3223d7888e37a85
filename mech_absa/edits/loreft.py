"""Edits of representations: what passes a site is replaced by a function of itself, at chosen tokens.

Low-rank ReFT and its relatives are those of Wu et al. 2024 (arXiv 2404.03592, section 3), RED is Wu
et al. 2024 (arXiv 2402.15179). The letters are the papers'; h is a row, so that `R h` of the
formula reads `h @ R.T` below.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..model import Model
from .base import Place, Shape, SiteIntervention, parameter, rank_of


class _LowRank(SiteIntervention):
    """Share W [rank d] and b [rank], drawn as a linear layer is, among the three members of the
    family.
    """

    def __init__(self, place: Place, shape: Shape, rank: int = 4):
        super().__init__(place, shape)
        self.rank = rank_of(rank, self.width, place)
        self.W = parameter(rank, self.width)
        self.b = parameter(rank)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.W, -bound, bound, generator=generator)
        nn.init.uniform_(self.b, -bound, bound, generator=generator)


class LoReFT(_LowRank):
    """h + R^T (W h + b - R h), the rows of R orthonormal.

    In the r-dimensional subspace that R spans, the activation is replaced by W h + b; outside it
    nothing changes. R is kept orthonormal by one QR after every step of the optimiser. At the start
    R is random, so a fresh edit is not the identity.
    """

    family = "loreft"
    formula = "h + R^T (W h + b - R h), R R^T = 1"

    def __init__(self, place: Place, shape: Shape, rank: int = 4):
        super().__init__(place, shape, rank)
        self.R = parameter(rank, self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        super().reset(model, generator)
        nn.init.orthogonal_(self.R, generator=generator)

    @torch.no_grad()
    def settle(self) -> None:
        Q, upper = torch.linalg.qr(self.R.T.double())
        self.R.copy_((Q * upper.diagonal().sign()).T)  # the signs keep R near where it was

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        R, W, b = (p.to(h) for p in (self.R, self.W, self.b))
        return h + (h @ (W - R).T + b) @ R

    def affine(self) -> tuple[Tensor, Tensor]:
        R, W, b = self.R.double(), self.W.double(), self.b.double()
        return torch.eye(self.width, dtype=R.dtype, device=R.device) + (W - R).T @ R, b @ R


class NoReFT(_LowRank):
    """h + W2^T (W h + b - W2 h): LoReFT without the constraint."""

    family = "noreft"
    formula = "h + W2^T (W h + b - W2 h)"

    def __init__(self, place: Place, shape: Shape, rank: int = 4):
        super().__init__(place, shape, rank)
        self.W2 = parameter(rank, self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        super().reset(model, generator)
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.W2, -bound, bound, generator=generator)

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        W2, W, b = (p.to(h) for p in (self.W2, self.W, self.b))
        return h + (h @ (W - W2).T + b) @ W2

    def affine(self) -> tuple[Tensor, Tensor]:
        W2, W, b = self.W2.double(), self.W.double(), self.b.double()
        return torch.eye(self.width, dtype=W.dtype, device=W.device) + (W - W2).T @ W2, b @ W2


class DiReFT(NoReFT):
    """h + W2^T (W h + b): nothing is taken away either, which makes it a low-rank update with a
    bias.
    """

    family = "direft"
    formula = "h + W2^T (W h + b)"

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        W2, W, b = (p.to(h) for p in (self.W2, self.W, self.b))
        return h + (h @ W.T + b) @ W2

    def affine(self) -> tuple[Tensor, Tensor]:
        W2, W, b = self.W2.double(), self.W.double(), self.b.double()
        return torch.eye(self.width, dtype=W.dtype, device=W.device) + W.T @ W2, b @ W2


class RED(SiteIntervention):
    """l_s * h + l_b: a scale and a shift of every dimension. The identity at the start."""

    family = "red"
    formula = "l_s * h + l_b"

    def __init__(self, place: Place, shape: Shape):
        super().__init__(place, shape)
        self.l_s = parameter(self.width)
        self.l_b = parameter(self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.ones_(self.l_s)
        nn.init.zeros_(self.l_b)

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        return self.l_s.to(h) * h + self.l_b.to(h)

    def affine(self) -> tuple[Tensor, Tensor]:
        return torch.diag(self.l_s.double()), self.l_b.double()


class Steering(SiteIntervention):
    """h + v: an additive steering vector. The identity at the start."""

    family = "steering"
    formula = "h + v"

    def __init__(self, place: Place, shape: Shape):
        super().__init__(place, shape)
        self.v = parameter(self.width)

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.zeros_(self.v)

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        return h + self.v.to(h)

    def affine(self) -> tuple[Tensor, Tensor]:
        return torch.eye(self.width, dtype=torch.float64, device=self.v.device), self.v.double()
