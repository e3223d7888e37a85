"""Turn scores of the labels into one number per row.

The engines read a score of each label string for every row: its log-probability (summed over the
label's tokens), or its bare logit if no metric needs the normaliser. A `Metric` turns these into
the number that effects are differences of, in float32 or wider, whatever the model computes in.

| name | formula | needs |
|---|---|---|
| `prob` | P(gold), over the whole vocabulary (the paper's) | normaliser |
| `prob_label` | P(gold) / sum over the labels of P(label) | labels |
| `logprob` | log P(gold) | normaliser |
| `logit_diff` | score(gold) - score(foil); without a foil, minus the mean of the other labels | labels |
| `kl` | -KL(clean ‖ this run) over the vocabulary at the answer; 0 is the clean run | vocabulary |

`prob` saturates: a restored state that moves a confident model further shows little. `logit_diff`
is linear in the residual stream and splits into parts, but also shows changes that no answer would
show. If the two disagree, report both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import ConfigError, choices

Need = Literal["labels", "normaliser", "vocabulary"]


@dataclass(frozen=True)
class Metric:
    """Turn label scores into one number per row, and say what it needs.

    Attributes:
        name: as in the table above.
        unit: for axes and tables.
        need: `labels` (bare label scores will do), `normaliser` (log-probabilities), `vocabulary`
            (the whole answer row).
        fn: (scores [row label], gold [row], foil [row]) -> [row]; for `vocabulary`, see `kl`.
    """

    name: str
    unit: str
    need: Need
    fn: Callable[..., Tensor]

    def __call__(
        self,
        scores: Float[Tensor, "row label"],
        gold: Int[Tensor, " row"],
        foil: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, " row"]:
        """Return the metric of some scores, one number per row.

        Args:
            scores: of every label.
            gold: index of the right label.
            foil: index of the label to compare with, from `foil_indices`; None compares with the
                mean of all other labels.
        """
        return self.fn(_wide(scores), gold, foil)


def foil_indices(foils: Iterable[int | None]) -> Int[Tensor, " row"]:
    """Return the foils of some rows as a tensor; a row without a foil is compared with the mean of
    the others.

    Example:
        >>> foil_indices([1, None])
        tensor([ 1, -1])
    """
    return torch.tensor([-1 if f is None else f for f in foils], dtype=torch.long)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gold(scores: Tensor, gold: Tensor) -> Tensor:
    return scores.gather(-1, gold[:, None]).squeeze(-1)


def _prob(scores: Tensor, gold: Tensor, foil: Tensor | None) -> Tensor:
    return _gold(scores, gold).exp()


def _prob_label(scores: Tensor, gold: Tensor, foil: Tensor | None) -> Tensor:
    return _gold(scores.softmax(-1), gold)


def _logprob(scores: Tensor, gold: Tensor, foil: Tensor | None) -> Tensor:
    return _gold(scores, gold)


def _logit_diff(scores: Tensor, gold: Tensor, foil: Tensor | None) -> Tensor:
    right = _gold(scores, gold)
    others = (scores.sum(-1) - right) / (scores.shape[-1] - 1)
    if foil is None:
        return right - others
    return right - torch.where(foil < 0, others, _gold(scores, foil.clamp(min=0)))


def kl(
    logits: Float[Tensor, "row d_vocab"], clean: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    """Return -KL(P_clean || P) of the next token, in nats; 0 if the run answers as the clean run
    does.
    """
    log_p, log_q = _wide(clean).log_softmax(-1), _wide(logits).log_softmax(-1)
    return -(log_p.exp() * (log_p - log_q)).sum(-1)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("prob", "probability of the gold label", "normaliser", _prob),
        Metric(
            "prob_label", "probability of the gold label among the labels", "labels", _prob_label
        ),
        Metric("logprob", "log-probability of the gold label (nats)", "normaliser", _logprob),
        Metric("logit_diff", "logit difference, gold minus foil", "labels", _logit_diff),
        Metric("kl", "-KL(clean || run) (nats)", "vocabulary", kl),
    )
}


def get_metric(metric: str | Metric) -> Metric:
    """Return the metric of that name.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(metric, Metric):
        return metric
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}; accepted: {choices(METRICS)}")
    return METRICS[metric]
