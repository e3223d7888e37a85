"""Balance the rates of the two parts of an edit by the progress that each of them makes.

The paper sets them by hand: 3e-4 for the weights, 1e-5 for the representations. CoMMIT (Li et al.
2025, arXiv 2407.20454), made for a language model and the encoder of its images, measures instead how
far a step of each module moves what the model answers, and scales the rates by the ratio. Here the
modules are the edits of weights (W) and those of representations (R), and p is the distribution that
the loss reads, over a batch:

    kappa = KL(p(W, R) || p(W', R)) / KL(p(W, R) || p(W, R'))        a step takes W to W', R to R'
    balance <- balance - 0.1 log kappa,  kept within -log 100 and log 100
    rate of W = preset's rate exp(balance / 2),  rate of R = preset's rate exp(-balance / 2)

So the part that moves the answers more is slowed and the other one is sped up, until both move them
alike (kappa = 1); the geometric mean of the two rates stays the preset's. No code of CoMMIT is public,
and no formula of its schedule was found: the ratio of two divergences is its coefficient, the rule
that follows it, its gain and its limits are this package's. CoMMIT's second half, a term of the loss
that keeps gradients from vanishing, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..edits.base import Intervention
from ..edits.edit import Edit
from ..sites import Site
from .task import Prepared, Task

GAIN = 0.1
"""How far one measurement moves the balance, as a share of log kappa."""
LIMIT = math.log(100)
"""Largest balance: rates are multiplied by 1/10 to 10."""
LEAST = 1e-12
"""Divergence below which a step has not moved the answers."""


def of_weights(part: Intervention) -> bool:
    """Return whether a part edits weights (or the attention as a whole), not an activation."""
    return not isinstance(part.place, Site)


def factor(balance: float, weights: bool) -> float:
    """Return what the rates of one sort of parts are multiplied by.

    Examples:
        >>> factor(0.0, weights=True), round(factor(math.log(4), weights=False), 3)
        (1.0, 0.5)
    """
    return math.exp(balance / 2 if weights else -balance / 2)


def moved(balance: float, kappa: float) -> float:
    """Return the balance after a measurement; a kappa that is not a number leaves it alone.

    Examples:
        >>> moved(0.0, 1.0), round(moved(0.0, math.e), 3), round(moved(0.5, 1 / math.e), 3)
        (0.0, -0.1, 0.6)
    """
    if not 0 < kappa < math.inf:
        return balance
    return max(-LIMIT, min(LIMIT, balance - GAIN * math.log(kappa)))


@torch.no_grad()
def divergences(
    task: Task, edit: Edit, batches: Sequence[Sequence[Prepared]], before: Mapping[str, Tensor]
) -> Tensor:
    """Return how far the last step moved the answers by each sort of parts alone.

    Args:
        task: what is asked.
        edit: after the step; left as it is.
        batches: of the step.
        before: parameters by name, before the step.

    Returns:
        float64 [2], on the CPU: KL(before || the weights after), KL(before || the representations
        after), summed over the examples. A mean over an example's tokens counts once, as in the
        loss.
    """
    weights = {id(p) for part in edit if of_weights(part) for p in part.parameters()}
    named = dict(edit.named_parameters())
    after = {name: p.detach().clone() for name, p in named.items()}

    def logprobs(new: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
        for name, p in named.items():
            p.copy_((after if (id(p) in weights) in new else before)[name])
        return [_logprobs(task, edit, batch) for batch in batches]

    try:
        old, *moves = logprobs([]), logprobs([True]), logprobs([False])
    finally:
        for name, p in named.items():
            p.copy_(after[name])
    sums = [
        sum(
            ((p.exp() * (p - q)).sum(-1) * weight).sum()
            for (p, weight), (q, _) in zip(old, move, strict=True)
        )
        for move in moves
    ]
    return torch.tensor([float(s) for s in sums], dtype=torch.float64)


def _logprobs(task: Task, edit: Edit, batch: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
    """Return log p [row, choice] in float64 and the weight of each row."""
    logits, _, weight = task.read(edit, batch)
    logp = logits.double().log_softmax(-1)
    return logp, logp.new_ones(len(logp)) if weight is None else weight.double()


def ratio(divergence: Tensor) -> float:
    """Return kappa of the two divergences.

    Examples:
        >>> ratio(torch.tensor([0.02, 0.005])), ratio(torch.tensor([0.0, 0.0]))
        (4.0, 1.0)
    """
    weights, representations = divergence.clamp(min=LEAST).tolist()
    return float(weights / representations)


__all__ = ["divergences", "factor", "moved", "of_weights", "ratio"]
