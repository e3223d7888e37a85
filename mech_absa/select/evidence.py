"""What every selector gets, and the form of a selector.

    evidence = Evidence(adapted, examples, base=model)
    ranking = Exact()(evidence)

An `Evidence` holds training examples and two models: the one that is looked at, and the one that is
edited. The paper adapts a model to the task, traces the adapted one, and edits the base. Pairs,
prompts and states are made when the first selector asks for them, and shared.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int

from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..model.hooks import capture
from ..patch.corruption import Corruption, Counterfactual
from ..patch.pairs import Pairs, make_pairs
from ..prompts import PromptTemplate, Tokenised, Tokens, Verbalizer
from ..scoring import by_length, gold_indices, question, room_for
from ..sites import ROLES, Site
from .ranking import Pool, SiteRanking, layer_site

BATCH = 32
"""Prompts per forward pass."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Examples and models that selectors look at.

    Attributes:
        model: looked at.
        examples: training examples; no selector may see test rows.
        base: what an edit trains; the same as `model` where None.
        corruption: of the pairs of causal selectors.
        template, verbalizer: the question.
        keep: which pairs are kept, as in `make_pairs`.
        seed: of whatever is random.
        width: layers of a place, for selectors that name a set of layers together.
    """

    model: Model
    examples: tuple[Example, ...]
    base: Model | None = None
    corruption: Corruption = field(default_factory=Counterfactual)
    template: PromptTemplate = field(default_factory=PromptTemplate)
    verbalizer: Verbalizer = field(default_factory=Verbalizer)
    keep: str = "paper"
    seed: int = 0
    width: int = 2

    def __post_init__(self) -> None:
        if not self.examples:
            raise ConfigError("selectors were given no examples; at least one is needed")

    @property
    def edited(self) -> Model:
        """Return the model that an edit trains."""
        return self.model if self.base is None else self.base

    @cached_property
    def pairs(self) -> Pairs:
        """Return clean and corrupted runs of the examples."""
        return make_pairs(
            self.model,
            self.examples,
            self.corruption,
            template=self.template,
            verbalizer=self.verbalizer,
            keep=self.keep,
        )

    @cached_property
    def prompts(self) -> list[Tokenised]:
        """Return the questions as tokens."""
        room = room_for(self.verbalizer.continuations(self.model.tokenizer, self.template))
        return [question(self.model, e, self.template, room) for e in self.examples]

    @cached_property
    def gold(self) -> Int[np.ndarray, " example"]:
        """Return the index of the right label of each example."""
        return gold_indices(self.examples, self.verbalizer).numpy()

    @cached_property
    def clusters(self) -> list[str]:
        """Return the sentence of each example."""
        return [e.cluster for e in self.examples]

    @cached_property
    def states(self) -> Mapping[str, Float[np.ndarray, "layer example d_model"]]:
        """Return role -> the outputs of all layers, averaged over the tokens of the role.

        Only roles that every prompt has. Prompts run once, unedited.
        """
        return role_states(self.model, self.prompts)


@torch.inference_mode()
def role_states(
    model: Model, prompts: list[Tokenised]
) -> dict[str, Float[np.ndarray, "layer example d_model"]]:
    """Return role -> `resid_post` of every layer and prompt, the mean over the role's tokens.

    Args:
        model: what runs.
        prompts: batches of one.

    Returns:
        The roles that every prompt has, in the order of `ROLES`; float64.
    """
    shared = [r for r in ROLES if all(r in p.role_names for p in prompts)]
    found = {r: np.empty((model.n_layers, len(prompts), model.d_model)) for r in shared}
    sites = [layer_site(layer) for layer in range(model.n_layers)]
    for rows in by_length(prompts, BATCH):
        tokens = Tokens.stack([prompts[i] for i in rows])
        with capture(model, sites) as seen:
            model.run_hooked(model.embed(tokens.ids))
        for row, i in enumerate(rows):
            for role in shared:
                at = tokens.positions(role, row)
                for layer, site in enumerate(sites):
                    found[role][layer, i] = seen[site][row, at].double().mean(0).cpu().numpy()
    return found


class Selector(ABC):
    """Scores sites of a model.

    A subclass opens its docstring with its formula and its source, and defines `scores`.

    Attributes:
        name: for tables and flags.
        pool: how scores of sites become scores of layers.
        about: what the last call found beside the scores.
    """

    name: ClassVar[str] = ""
    pool: ClassVar[Pool] = "max"

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}

    @abstractmethod
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        """Return the score of each site; larger is more important."""

    def __call__(self, evidence: Evidence) -> SiteRanking:
        """Return the ranking of a model's sites.

        Raises:
            ConfigError: a score is not a finite number.
        """
        self.about = {}
        clock = time.process_time()
        found = self.scores(evidence)
        about = {"cpu_seconds": round(time.process_time() - clock, 3), **self.about}
        n_layers = evidence.edited.n_layers
        return SiteRanking.of(self.name, found, n_layers, self.pool, about)


__all__ = ["Evidence", "Selector", "role_states"]
