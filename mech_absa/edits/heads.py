"""Gated edits of attention heads: where to edit is learned along with how.

JoLA, Lai et al. 2025 (arXiv 2502.01179): every head's output is scaled and shifted, each through a
hard-concrete gate (Louizos et al. 2018, arXiv 1712.01312) whose expected openness is charged, so
that most gates close. LoFiT, Yin et al. 2024 (arXiv 2406.01563), is two edits in a row: scales with
an L1 charge choose the heads, and `steering` vectors at the chosen ones are trained (`z + v`);
`mech_absa.train.lofit` does both.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import ConfigError, SiteError, choices
from ..model import Model
from .base import Place, Shape, SiteIntervention, parameter

TEMPERATURE, LOW, HIGH = 0.33, -0.1, 1.1
"""Of the hard-concrete distribution: its temperature, and the interval it is stretched to before it
is cut to 0..1."""


GATES = ("hard_concrete", "tempered", "none")
Gates = Literal["hard_concrete", "tempered", "none"]
DEFAULT_CHARGE = 1e-3
"""Charge of `tempered` and `none` per head. `hard_concrete` charges what JoLA's code does."""


class HeadGate(SiteIntervention):
    """(1 + g_m m) * z + g_a a, with hard-concrete gates g.

    With log_g the trained openness and s(x) = clamp(1.2 x - 0.1, 0, 1):

    - training: g = s(sigmoid((log u - log(1-u) + log_g) / 0.33)) for a fresh u in (0, 1);
    - evaluation: g = s(sigmoid(log_g)), without the temperature (Louizos et al. 2018, eq. 13;
      JoLA's `modeling_llama.py`);
    - start: m and a from N(0, 1e-3), log_g Xavier-uniform over the heads of a layer, so with a
      bound of sqrt(6 / (heads + 1));
    - charge: lambda P(g_a > 0) + (1 - lambda) P(g_m > 0), divided by heads * heads * layers of the
      model, where lambda = 0.1 exp(-0.01 step) and P(g > 0) = sigmoid(log_g - 0.33 log(0.1 / 1.1)),
      cut to 1e-6 .. 1 - 1e-6. (JoLA averages over the heads of a layer, adds the layers up and
      divides by layers * heads.)

    `gates="tempered"` is the variant of earlier versions of this package: the temperature divides
    in evaluation too, log_g starts at 0, and each head is charged 1e-3. `gates="none"` is LoFiT's
    first phase: the scale alone, (1 + m) * z, with |m| charged; a shift would learn the task in its
    place, and the scales would not tell the heads apart.

    Args:
        place: one head's output.
        shape: of the model.
        gates: `hard_concrete`, `tempered` or `none`.
        charge: of each head; None stands for JoLA's, or 1e-3 for the other two.
    """

    family = "head_gate"
    formula = "(1 + g_m m) * z + g_a a"
    own = "each head has its own gates, which choose it or leave it out"

    def __init__(
        self,
        place: Place,
        shape: Shape,
        gates: Gates = "hard_concrete",
        charge: float | None = None,
    ):
        super().__init__(place, shape)
        if self.site.head is None:
            raise SiteError(
                f"head_gate acts on one head's output, and {place} is none; such sites look like L5.head3"
            )
        if gates not in GATES:
            raise ConfigError(f"gates is {gates!r} at {place}; accepted: {choices(GATES)}")
        self.variant, self.n_heads = gates, shape.n_heads
        jola = 1 / (shape.n_heads**2 * shape.n_layers)
        default = jola if gates == "hard_concrete" else DEFAULT_CHARGE
        self.charge = default if charge is None else charge
        self.m = parameter(self.width)
        self.a = parameter(self.width) if gates != "none" else None
        self.log_alpha = parameter(2) if gates != "none" else None

    def reset(self, model: Model, generator: torch.Generator) -> None:
        nn.init.normal_(self.m, std=1e-3, generator=generator)
        if self.a is None or self.log_alpha is None:
            return
        nn.init.normal_(self.a, std=1e-3, generator=generator)
        if self.variant == "tempered":
            nn.init.zeros_(self.log_alpha)
            return
        bound = math.sqrt(6 / (self.n_heads + 1))
        nn.init.uniform_(self.log_alpha, -bound, bound, generator=generator)

    def gates(self) -> Float[Tensor, 2]:
        """Return (g_m, g_a); drawn anew at every call while training."""
        if self.log_alpha is None:
            return torch.ones(2, device=self.m.device)
        logit: Tensor = self.log_alpha
        if self.training:
            u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
            logit = (u.log() - (1 - u).log() + logit) / TEMPERATURE
        elif self.variant == "tempered":
            logit = logit / TEMPERATURE
        return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)

    def open(self) -> Float[Tensor, 2]:
        """Return the probability that each gate is not shut while training."""
        if self.log_alpha is None:
            return torch.ones(2, device=self.m.device)
        p = torch.sigmoid(self.log_alpha - TEMPERATURE * math.log(-LOW / HIGH))
        return p if self.variant == "tempered" else p.clamp(1e-6, 1 - 1e-6)

    def penalty(self, step: int) -> Tensor:
        if self.log_alpha is None:
            return self.charge * self.m.abs().sum()
        balance = 0.1 * math.exp(-0.01 * step)
        m, a = self.open()
        charge: Tensor = self.charge * (balance * a + (1 - balance) * m)
        return charge

    def forward(self, h: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        if self.a is None:
            scaled: Tensor = (1 + self.m.to(h)) * h
            return scaled
        g_m, g_a = self.gates().to(h)
        moved: Tensor = (1 + g_m * self.m.to(h)) * h + g_a * self.a.to(h)
        return moved
