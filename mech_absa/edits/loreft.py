"""Edits of representations: what passes a site is replaced by a function of itself, at chosen tokens.

Low-rank ReFT and its relatives are those of Wu et al. 2024 (arXiv 2404.03592, section 3), RED is Wu
et al. 2024 (arXiv 2402.15179), ReFT-r1 is of AxBench (Wu et al. 2025, arXiv 2501.17148). The letters are the papers'; h is a row, so that `R h` of the
formula reads `h @ R.T` below.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError
from ..model import Model
from ..model.forward import Point
from ..model.hooks import at_site
from .base import Place, Shape, SiteIntervention, Where, parameter, rank_of, wide


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


class ReFTr1(SiteIntervention):
    """h + mean(top-k(ReLU(h . v))) v, |v| = 1: one direction, as strong as a prompt contains it.

    The latent ReLU(h . v) of every token of the site is computed, and the mean of the k largest of a
    prompt scales v for all of them (AxBench, arXiv 2501.17148; `axbench/models/lsreft.py`). The loss
    has c t times the sum of the other latents over the number of tokens, as a mean over the prompts,
    where t is the share of the training that is done: the charge grows from 0.

    v is normed where it is used, which takes the part along v from its gradient, and after every
    step. It starts as the weight of a linear layer, normed (the authors' code). The first token,
    which most models use as a sink of attention, is neither read nor written, as in their code. A
    prompt of fewer than k tokens uses all it has. Where the site has no role or position, the tokens
    of the prompt are read, and what is generated afterwards is written to as well.

    Args:
        place: a site; `all` tokens of a layer's output are the published place.
        shape: of the model.
        k: latents that count.
        charge: c, of the other latents; 0 for none.
    """

    family = "reft_r1"
    formula = "h + mean(top-k(ReLU(h . v))) v, |v| = 1"

    def __init__(self, place: Place, shape: Shape, k: int = 8, charge: float = 5e-3):
        super().__init__(place, shape)
        if k < 1:
            raise ConfigError(f"k is {k} at {place}; accepted: 1 latent or more")
        if not 0 <= charge < math.inf:
            raise ConfigError(f"charge is {charge} at {place}; accepted: 0 or more")
        self.k, self.charge = k, charge
        self.v = parameter(self.width)
        self._others: Tensor | None = None  # the latents that do not count, of the last batch

    def reset(self, model: Model, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.width)
        nn.init.uniform_(self.v, -bound, bound, generator=generator)
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        self.v.div_(self.v.double().norm())

    def train(self, mode: bool = True) -> ReFTr1:
        self._others = None
        return super().train(mode)

    def strength(
        self, h: Float[Tensor, "batch pos d"], read: Bool[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return the mean of the k largest latents of each prompt, and the sum of the others over the
        number of its tokens.

        Args:
            h: activations.
            read: the tokens that count.
        """
        latent = torch.relu(h @ self.direction.to(h)) * read
        top = latent.masked_fill(~read, -1.0).topk(min(self.k, h.shape[1]), dim=1).values
        there = top >= 0
        n, largest = read.sum(1).clamp(min=1), (top * there).sum(1)
        return largest / there.sum(1).clamp(min=1), (latent.sum(1) - largest) / n

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """Return v with norm 1."""
        v: Tensor = self.v
        unit: Tensor = v / v.norm()
        return unit

    def forward(
        self,
        h: Float[Tensor, "batch pos d"],
        read: Bool[Tensor, "batch pos"] | None = None,
        write: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d"]:
        """Return the new activations.

        Args:
            h: in float32 or wider.
            read: tokens whose latents count; all where None.
            write: tokens that change; those that are read where None.
        """
        read = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if read is None else read
        strength, others = self.strength(h, read)
        if self.training and torch.is_grad_enabled() and self.charge:
            self._others = others
        moved = h + strength[:, None, None] * self.direction.to(h)
        return torch.where((read if write is None else write)[..., None], moved, h)

    def points(self, model: Model, where: Where) -> tuple[list[Point], list[Point]]:
        read = where.roles >= 0 if self.site.at is None else where.mask(self.site.at)
        read = read.clone()
        read[:, 0] = False
        write = torch.ones_like(read) if self.site.at is None else read
        write[:, 0] = False

        def change(h: Tensor) -> Tensor:
            new: Tensor = self(h.to(wide(h)), read.to(h.device), write.to(h.device))
            return new.to(h.dtype)

        return [at_site(model, self.site, change)], []

    def batch_penalty(self, done: float) -> Tensor | None:
        others, self._others = self._others, None
        return None if others is None else self.charge * done * others.mean()

    @property
    def unmergeable(self) -> str:
        return "its strength depends on all tokens of a prompt"
