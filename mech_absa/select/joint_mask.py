"""A mask over components, trained jointly: which set of heads and MLPs changes the answer together.

For component c, with its output h_c in the run at hand and h'_c in the corrupted run,

    h_c <- z_c h'_c + (1 - z_c) h_c      at every token, all components at once, z_c in [0, 1]

    loss = mean over pairs of o_0 / o + l(e) sum |z_c| + l(e) sum z_c (1 - z_c),  l(e) = l_0 (e + 1)

o is the odds of the right answer against the foil in the masked run and o_0 in the clean one, so that
the first term is 1 while nothing is patched, and near 0 where the answer has followed the
corruption. The second term keeps the set small, the third makes z_c 0 or 1. e counts epochs.

Source: Yan et al. 2026 (ACL 2026 long 154, arXiv 2606.03085) and the published training of heads:
z begins at 0.5, Adam with rate 0.1, 15 epochs, batches of 64, l_0 = 0.05, z clamped to [0, 1] after
each step, and the set is z >= 0.5. There, the odds of the two answers are the other way up, and the
first term is written 1 / (1 + (odds - odds_0) / odds_0), which is the same. The choices made here:

- The paper patches attention patterns of heads, or neurons. Here, the outputs of heads and of MLPs
  share one mask, so that heads and MLPs compete.
- A component that is not patched is computed from what the patched ones before it leave, as in
  exact patching.
- l_0 is 0.01 and a batch 16 pairs by default: with the published 0.05 and 64, the steps are too few
  and the penalty too large for tens of pairs, and the set was empty on the bundled model.
- Without a foil (noise), the odds are against the mean of the other labels' log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConfigError, choices
from ..metrics import foil_indices, get_metric
from ..model import Model
from ..model.forward import Point, advance, last
from ..patch.gradients import graph_bytes
from ..patch.job import components
from ..patch.pairs import Pair, Pairs, by_length, make_runs
from ..scoring import by_label, positions_read, read_labels
from ..sites import Site
from .evidence import Evidence, Selector
from .ranking import Pool

KINDS = ("head", "mlp_out", "attn_out")
"""Components that a mask may have."""
MEMORY = 512 << 20
"""Bytes that graphs of pairs in flight may take, roughly."""
LEAST = 2
"""Pairs that a mask needs."""

_VALUES = {"head": "z", "mlp_out": "mlp_out", "attn_out": "attn_out"}


class Mask:
    """Components and how far each is patched.

    Args:
        model: what runs.
        sites: the components.

    Attributes:
        z: the mask, `[component]`; 0 leaves a component alone, 1 takes it from the corrupted run.
    """

    def __init__(self, model: Model, sites: Sequence[Site]):
        self.model, self.sites = model, tuple(sites)
        wide = torch.promote_types(model.dtype, torch.float32)
        self.z = torch.full((len(self.sites),), 0.5, dtype=wide, device=model.device)
        self.z.requires_grad_(True)
        self.places: dict[tuple[int, str], list[int]] = defaultdict(list)
        for i, site in enumerate(self.sites):
            self.places[site.layer, site.kind].append(i)

    def odds(self, pairs: Sequence[Pair], all_pairs: Pairs) -> Float[Tensor, " row"]:
        """Return log o of pairs of one length, a row per pair and noise draw; differentiable in z."""
        parts = []
        for continuation in all_pairs.continuations:
            runs = make_runs(self.model, pairs, continuation)
            clean = runs.clean.repeat_interleave(runs.draws, 0)
            reads = positions_read([runs.length] * len(clean), continuation)
            rows = last(self.model, clean, reads, 0, self._points(runs.corrupted))
            parts.append(read_labels(self.model, rows, continuation))
        scores = by_label(parts, all_pairs.continuations)
        return log_odds(scores, pairs)

    def _points(self, corrupted: Tensor) -> list[Point]:
        """Return what mixes the states of a corrupted run into another run."""
        seen: dict[tuple[int, str], Tensor] = {}

        def keep(key: tuple[int, str]) -> Point:
            layer, kind = key
            return self.model.point(layer, _VALUES[kind]), lambda h: seen.update({key: h.detach()})

        with torch.no_grad():
            advance(self.model, corrupted, points=[keep(key) for key in self.places])

        def mix(key: tuple[int, str]) -> Point:
            layer, kind = key
            z = self.z[self.places[key]]  # in the order of heads; one for a whole layer

            def mixed(h: Tensor) -> Tensor:
                part = z.to(h)[:, None] if kind == "head" else z.to(h)
                return h + part * (seen[key] - h)

            return self.model.point(layer, _VALUES[kind]), mixed

        return [mix(key) for key in self.places]


def log_odds(scores: Float[Tensor, "row label"], pairs: Sequence[Pair]) -> Float[Tensor, " row"]:
    """Return log P(gold) - log P(foil), or minus the mean of the others where there is no foil."""
    draws = len(scores) // len(pairs)
    gold = torch.tensor([p.gold for p in pairs]).repeat_interleave(draws).to(scores.device)
    foil = foil_indices(p.foil for p in pairs).repeat_interleave(draws).to(scores.device)
    return get_metric("logit_diff")(scores, gold, foil)


class JointMask(Selector):
    """z_c of a mask trained on o_0 / o + l sum |z| + l sum z (1 - z), over all components together.

    Source: Yan et al. 2026 (arXiv 2606.03085); the module's docstring has the constants and choices.
    The clamped z of most components ends at exactly 0 or 1. The score is therefore 1 for a component
    of the set (z >= 0.5), plus the mean of its z over all steps, which orders equal ones by how long
    they stayed open. A layer's score is the sum of its components'.

    Args:
        kinds: of components: `head`, `mlp_out`, `attn_out`.
        epochs: passes over the pairs.
        penalty: l_0.
        rate: of Adam.
        batch: pairs per step.

    Raises:
        ConfigError: fewer than 2 pairs, pairs without a corrupted run, a mask that selects nothing,
            or settings outside what is accepted.
    """

    name: ClassVar[str] = "joint_mask"
    pool: ClassVar[Pool] = "sum"

    def __init__(
        self,
        kinds: Sequence[str] = ("head", "mlp_out"),
        epochs: int = 15,
        penalty: float = 0.01,
        rate: float = 0.1,
        batch: int = 16,
    ):
        super().__init__()
        if not kinds or not set(kinds) <= set(KINDS):
            raise ConfigError(
                f"a joint mask over {choices(kinds) if kinds else 'no kinds'} was asked for; "
                f"accepted: one or more of {', '.join(KINDS)}"
            )
        if epochs < 1 or batch < 1 or not 0 <= penalty < np.inf or not 0 < rate < np.inf:
            raise ConfigError(
                f"a joint mask with {epochs} epochs, batches of {batch}, a penalty of {penalty:g} and a "
                f"rate of {rate:g} was asked for; accepted: 1 or more epochs and pairs, a penalty of 0 "
                "or more and a rate above 0"
            )
        self.kinds, self.epochs, self.penalty = tuple(kinds), epochs, penalty
        self.rate, self.batch = rate, batch

    @torch.inference_mode(False)
    @torch.enable_grad()
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        pairs, model = evidence.pairs, evidence.model
        if pairs.corruption.is_ablation:
            raise ConfigError(
                f"a joint mask mixes states of two runs, and {pairs.corruption} has no corrupted run; "
                "accepted: noise, counterfactual, aspect-swap or opinion-swap"
            )
        if len(pairs) < LEAST:
            raise ConfigError(
                f"a joint mask was given {len(pairs)} pair; at least {LEAST} are needed"
            )
        mask = Mask(model, components(model, [k for k in self.kinds if k in model.kinds]))
        path, ratio = self.train(mask, pairs, evidence.seed)
        z = mask.z.detach()
        chosen = z >= 0.5
        self.about = {
            "pairs": len(pairs),
            "penalty": self.penalty,
            "odds_ratio": ratio,
            "selected": [str(s) for s, yes in zip(mask.sites, chosen, strict=True) if yes],
            "mask": {str(s): float(v) for s, v in zip(mask.sites, z, strict=True)},
        }
        if not bool(chosen.any()):
            raise ConfigError(
                f"the joint mask selected none of {len(z)} components with a penalty of {self.penalty:g} on "
                f"{len(pairs)} pairs (all ended below 0.5, the largest at {float(z.max()):.2g}); "
                "give JointMask a smaller penalty or more epochs, or leave joint_mask out"
            )
        found = chosen.to(path) + path
        return {site: float(x) for site, x in zip(mask.sites, found, strict=True)}

    def train(
        self, mask: Mask, pairs: Pairs, seed: int
    ) -> tuple[Float[Tensor, " component"], float]:
        """Train the mask; return the mean of z over all steps, and o_0 / o in the last epoch.

        Args:
            mask: changed in place.
            pairs: that have a corrupted run.
            seed: of the order of pairs.
        """
        optimiser = torch.optim.Adam([mask.z], lr=self.rate)
        rng = np.random.default_rng(seed)
        path, steps, ratio = torch.zeros_like(mask.z, requires_grad=False), 0, 0.0
        for epoch in range(self.epochs):
            weight, ratio = self.penalty * (epoch + 1), 0.0
            order = rng.permutation(len(pairs)).tolist()
            for start in range(0, len(order), self.batch):
                batch = [pairs[i] for i in order[start : start + self.batch]]
                optimiser.zero_grad()
                for part in alike(mask.model, batch):
                    rows = (mask.odds(part, pairs) - reference(part)).exp()
                    loss = rows.sum() * len(part) / len(rows) / len(batch)
                    loss.backward()
                    ratio += float(loss.detach()) * len(batch) / len(pairs)
                z = mask.z
                penalty = weight * (z.abs().sum() + (z * (1 - z)).sum())
                penalty.backward()
                optimiser.step()
                with torch.no_grad():
                    z.clamp_(0, 1)
                    path += z
                steps += 1
        return path / steps, ratio


def reference(pairs: Sequence[Pair]) -> Float[Tensor, " row"]:
    """Return log o_0 of the clean runs, a row per pair and noise draw."""
    draws = pairs[0].draws
    scores = [p.clean_scores for p in pairs if p.clean_scores is not None]
    return log_odds(torch.stack(scores), pairs).repeat_interleave(draws)


def alike(model: Model, batch: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Yield the pairs of a batch by length, as many at a time as memory allows."""
    for length, rows in by_length(batch).items():
        each = length * batch[rows[0]].draws * graph_bytes(model, length)
        size = max(1, MEMORY // each)
        for start in range(0, len(rows), size):
            yield [batch[i] for i in rows[start : start + size]]


__all__ = ["JointMask", "Mask"]
