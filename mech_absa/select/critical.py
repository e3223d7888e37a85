"""Critical states: those through which much of the answer's information flows in attention.

With A_h the attention pattern of head h of layer l + 1 and m the metric,

    I[q, k] = | sum over h of A_h[q, k] dm/dA_h[q, k] |         (saliency)
    I[q, k] = mean over h of A_h[q, k]                          (attention)

    own(i)  = I[i, i]                      the token keeps what it has collected so far
    read(i) = sum over q > i of I[q, i]    later tokens take from it

    score of the output of layer l at a role = mean over examples and the role's tokens of own + read

Source: CRFT, Huang et al. 2025 (ACL 2025, arXiv 2507.10085), which trains LoReFT at such states: those
that integrate information, and those that regulate others, found by attention or saliency. Saliency of
attention is that of Wang et al. 2023 (arXiv 2305.14160). No code of CRFT was published, and its
constants were not readable, so this is like it and not the same. The choices made here:

- States are ranked; CRFT takes those above a threshold. The two kinds are added; CRFT joins their sets.
- m is the logit difference of the right label and the mean of the others, at the label.
- The pattern of layer l + 1 is what reads the output of layer l. Nothing reads that of the last layer
  in this way: it scores 0.
- Positions are roles, as everywhere here, so that one choice serves prompts of all lengths.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, choices
from ..metrics import get_metric
from ..model import Model
from ..model.forward import Point
from ..model.hooks import hooked_at
from ..model.pieces import rows_of
from ..patch.gradients import graph_bytes
from ..prompts import Continuation, Tokens
from ..scoring import by_length, positions_read, read_labels
from ..sites import ROLES, Site
from .evidence import BATCH, Evidence, Selector

Flow = Literal["saliency", "attention"]
"""How the flow between two tokens is measured."""
FLOWS = ("saliency", "attention")
PARTS = ("both", "own", "read")
MEMORY = 512 << 20
"""Bytes that graphs of prompts in flight may take, roughly."""


class CriticalStates(Selector):
    """own + read: saliency sum |sum_h A dm/dA| of the next layer's attention through a state.

    Source: CRFT, Huang et al. 2025 (arXiv 2507.10085); the module's docstring has formula and choices.

    Args:
        flow: `saliency`, or `attention` without gradients.
        part: `both`, or one of `own` and `read`.

    Raises:
        ConfigError: labels of several tokens, or settings outside what is accepted.
    """

    name: ClassVar[str] = "critical"

    def __init__(self, flow: Flow | str = "saliency", part: str = "both"):
        super().__init__()
        for value, accepted in ((flow, FLOWS), (part, PARTS)):
            if value not in accepted:
                raise ConfigError(
                    f"critical states by {value!r} were asked for; accepted: {choices(accepted)}"
                )
        self.flow, self.part = flow, part

    @torch.inference_mode(False)
    @torch.enable_grad()
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        model, prompts = evidence.model, evidence.prompts
        continuation = one_token(evidence)
        roles = [r for r in ROLES if all(r in p.role_names for p in prompts)]
        sums: dict[str, Float[np.ndarray, "layer role"]] = {
            part: np.zeros((model.n_layers, len(roles))) for part in ("own", "read")
        }
        longest = max(p.length for p in prompts)
        size = max(1, min(BATCH, MEMORY // (longest * graph_bytes(model, longest))))
        for rows in by_length(prompts, size):
            batch = Tokens.stack([prompts[i] for i in rows])
            gold = torch.from_numpy(evidence.gold[rows])
            for layer, flow in enumerate(flows(model, batch, continuation, gold, self.flow)[1:]):
                own, read = own_and_read(flow)
                for row in range(len(rows)):
                    for column, role in enumerate(roles):
                        at = batch.positions(role, row)
                        sums["own"][layer, column] += float(own[row, at].mean())
                        sums["read"][layer, column] += float(read[row, at].mean())
        means = {part: values / len(prompts) for part, values in sums.items()}
        self.about = self._described(means, roles)
        total = means["own"] + means["read"] if self.part == "both" else means[self.part]
        return {
            Site(layer, "resid_post", None, role): float(total[layer, column])
            for layer in range(model.n_layers)
            for column, role in enumerate(roles)
        }

    def _described(
        self, means: dict[str, Float[np.ndarray, "layer role"]], roles: list[str]
    ) -> dict[str, Any]:
        parts = {
            part: {role: values[:, i].tolist() for i, role in enumerate(roles)}
            for part, values in means.items()
        }
        return {"flow": self.flow, "part": self.part, **parts}


def one_token(evidence: Evidence) -> Continuation:
    """Return the run that reads all labels.

    Raises:
        ConfigError: labels have several tokens, and so several runs.
    """
    tokenizer = evidence.model.tokenizer
    continuations = evidence.verbalizer.continuations(tokenizer, evidence.template)
    if len(continuations) != 1 or continuations[0].reads != 1:
        words = ", ".join(word for _, word in evidence.verbalizer.words)
        raise ConfigError(
            f"the selector critical reads labels of one token off a single run; {words} have more, so "
            "choose other --labels"
        )
    return continuations[0]


def flows(
    model: Model, batch: Tokens, continuation: Continuation, gold: Tensor, flow: str
) -> list[Float[Tensor, "batch q_pos k_pos"]]:
    """Return I of every layer.

    Args:
        model: what runs.
        batch: prompts, padded on the right; nothing flows through padding.
        continuation: the labels, of one token.
        gold: index of the right label of each prompt.
        flow: `saliency` or `attention`.
    """
    kept: list[Tensor] = []
    points: list[Point] = [
        (model.point(layer, "pattern"), kept.append) for layer in range(model.n_layers)
    ]
    x = model.embed(batch.ids).detach().requires_grad_(flow == "saliency")
    with hooked_at(points, times=1, what="the attention pattern"):
        stream = model.run_hooked(x)
    if flow == "attention":
        inside = (batch.roles >= 0).to(stream.device)[:, :, None]
        return [pattern.detach().mean(1).double() * inside for pattern in kept]
    rows = rows_of(stream, positions_read(batch.lengths, continuation))
    scores = read_labels(model, rows, continuation, "labels")
    value = get_metric("logit_diff")(scores, gold.to(scores.device)).sum()
    # Rows do not touch each other, so that the gradient of the sum is every row's own.
    slopes = torch.autograd.grad(value, kept)
    return [
        (pattern.detach() * slope).double().sum(1).abs()
        for pattern, slope in zip(kept, slopes, strict=True)
    ]


def own_and_read(
    flow: Float[Tensor, "batch q_pos k_pos"],
) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Return the flow of each token into itself, and into later tokens.

    >>> flow = torch.tensor([[[5.0, 0.0], [2.0, 3.0]]])
    >>> own, read = own_and_read(flow)
    >>> own.tolist(), read.tolist()
    ([[5.0, 3.0]], [[2.0, 0.0]])
    """
    own = flow.diagonal(dim1=1, dim2=2)
    return own, flow.sum(1) - own


__all__ = ["CriticalStates", "flows", "own_and_read"]
