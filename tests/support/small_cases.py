"""Examples by hand, and edits small enough to reason about."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import torch

from mech_absa.edits import TrainingRecord
from mech_absa.examples import Example, Polarity
from mech_absa.model.hooks import at_site, hooked_at
from mech_absa.sites import Site, role_indices

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL


def example(sentence: str, aspect: str, polarity: Polarity, id: str = "") -> Example:
    start = sentence.index(aspect)
    return Example(sentence, aspect, polarity, (start, start + len(aspect)), id=id)


class NoEdit:
    """Does nothing."""

    def applied(self, model, tokens):
        return nullcontext()


class Push:
    """Adds a fixed random vector to a site, at its role or everywhere; notes the batches it saw."""

    def __init__(self, site: str, size: float = 5.0, seed: int = 0):
        self.site, self.size, self.seed = Site.parse(site), size, seed
        self.seen = []
        # What tells one method from another, as the parts and the record of a trained edit do.
        self.parts, self.record = (site, size), TrainingRecord()

    def points(self, model, tokens):
        self.seen.append(tokens)
        vector = (
            torch.randn(model.d_model, generator=torch.Generator().manual_seed(self.seed))
            * self.size
        )
        where = torch.ones_like(tokens.roles, dtype=torch.bool)
        if self.site.at is not None:
            where = torch.isin(tokens.roles, torch.tensor(role_indices(self.site.at)))
        return [at_site(model.hooked, self.site, lambda x: x + where[:, :, None] * vector)]

    @contextmanager
    def applied(self, model, tokens):
        with hooked_at(self.points(model, tokens)):
            yield
