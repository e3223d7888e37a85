"""Gated edits of attention heads: where to edit is learned along with how.

JoLA, Lai et al. 2025 (arXiv 2502.01179): every head's output is scaled and shifted, each through a hard-concrete gate (Louizos et al.
2018, arXiv 1712.01312) whose expected openness is charged, so that most gates close. LoFiT, Yin et al. 2024 (arXiv 2406.01563), is two
edits in a row: scales with an L1 charge choose the heads, and `steering` vectors at the chosen ones are trained (`z + v`);
`mech_absa.train.lofit` does both.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, SiteError
from ..model import Model
from .base import Place, Shape, SiteIntervention, parameter

TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1
"""Of the hard-concrete distribution: its temperature, and the interval it is stretched to before it is cut to 0..1."""


class HeadGate(SiteIntervention):
    """(1 + g_m m) * z + g_a a, with hard-concrete gates g.

    While training, g = clamp(stretch(sigmoid((log u - log(1-u) + log_alpha) / temperature))) for a fresh u; in evaluation u = 1/2. The
    charge is lambda L0(g_a) + (1 - lambda) L0(g_m) with lambda = 0.1 exp(-0.01 step) and L0(g) = sigmoid(log_alpha - temperature
    log(-low / high)). `gates="none"` is LoFiT's first phase: the scale alone, (1 + m) * z, with |m| charged; a shift would learn the task in
    its stead, and the scales would say nothing of the heads.
    """

    family = "head_gate"
    formula = "(1 + g_m m) * z + g_a a"

    def __init__(
        self, place: Place, shape: Shape, gates: str = "hard_concrete", charge: float = 1e-3
    ):
        super().__init__(place, shape)
        if self.site.head is None:
            raise SiteError(
                f"head_gate acts on one head's output, and {place} is none; such sites look like L5.head3"
            )
        if gates not in ("hard_concrete", "none"):
            raise ConfigError(f"gates is {gates!r} at {place}; accepted: hard_concrete or none")
        self.gated, self.charge = gates == "hard_concrete", charge
        self.m = parameter(self.width)
        self.a = parameter(self.width) if self.gated else None
        self.log_alpha = parameter(2) if self.gated else None

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.normal_(self.m, std=1e-3, generator=generator)
        if self.a is not None and self.log_alpha is not None:
            nn.init.normal_(self.a, std=1e-3, generator=generator)
            nn.init.zeros_(self.log_alpha)

    def gates(self) -> Float[Tensor, 2]:
        """(g_m, g_a), drawn anew at every call while training."""
        if self.log_alpha is None:
            return torch.ones(2, device=self.m.device)
        noise = torch.zeros_like(self.log_alpha)
        if self.training:
            u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
            noise = u.log() - (1 - u).log()
        return (torch.sigmoid((noise + self.log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW).clamp(
            0, 1
        )

    def open(self) -> Float[Tensor, 2]:
        """The probability that each gate is not shut."""
        if self.log_alpha is None:
            return torch.ones(2, device=self.m.device)
        return torch.sigmoid(self.log_alpha - TEMPERATURE * math.log(-LOW / HIGH))

    def penalty(self, step: int) -> Tensor:
        if self.log_alpha is None:
            return self.charge * self.m.abs().sum()
        balance = 0.1 * math.exp(-0.01 * step)
        m, a = self.open()
        return self.charge * (balance * a + (1 - balance) * m)

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        if self.a is None:
            return (1 + self.m.to(h)) * h
        g_m, g_a = self.gates().to(h)
        return (1 + g_m * self.m.to(h)) * h + g_a * self.a.to(h)
