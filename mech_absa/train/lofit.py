"""LoFiT, Yin et al. 2024 (arXiv 2406.01563): heads are chosen by training, and then edited.

    edit = lofit(model, train, LoFiT(heads=8))

First every head's output is scaled, z -> (1 + m) * z, with the scales' absolute values charged; the
heads with the largest scales (norm of m) are kept and the scales thrown away. Then an offset is
trained at each of them, z -> z + v. The heads that training chose can then be set beside those that
tracing found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..edits.edit import Edit
from ..edits.record import HeadChoice
from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..sites import Site
from .fit import fit
from .prefix import PrefixCache
from .presets import RATES, Preset, parts


@dataclass(frozen=True)
class LoFiT:
    """Describe what LoFiT trains.

    Attributes:
        heads: how many to keep.
        layers: to choose from; all where None.
        at: role or position; every token where None, as in the paper.
        lr: learning rates of the scales and of the offsets.
        charge: of the scales' absolute values, added to the loss.
        epochs: of the two phases.
        batch_size: examples per forward pass.

    Examples:
        >>> LoFiT(heads=8, layers=(2, 3)).heads
        8
    """

    heads: int
    layers: tuple[int, ...] | None = None
    at: str | int | None = None
    lr: tuple[float, float] = (RATES["head_gate"], RATES["steering"])
    charge: float = 1e-3
    epochs: tuple[int, int] = (3, 3)
    batch_size: int = 16

    def places(self, model: Model) -> list[Site]:
        """Return all heads that can be chosen.

        Raises:
            ConfigError: no head, or more than there are, should be kept.
        """
        layers = range(model.n_layers) if self.layers is None else self.layers
        places = [Site(layer, "head", h, self.at) for layer in layers for h in range(model.n_heads)]
        if not 1 <= self.heads <= len(places):
            raise ConfigError(
                f"{self.heads} heads were asked for; accepted: 1 to {len(places)}, which is all of the layers"
            )
        return places

    def scales(self, places: Sequence[Site]) -> Preset:
        """Return the first phase."""
        made = parts("head_gate", places, self.lr[0], gates="none", charge=self.charge)
        return Preset("lofit heads", made, epochs=self.epochs[0], batch_size=self.batch_size)

    def offsets(self, places: Sequence[Site]) -> Preset:
        """Return the second phase."""
        made = parts("steering", places, self.lr[1])
        return Preset("lofit", made, epochs=self.epochs[1], batch_size=self.batch_size)


def lofit(model: Model, train: Sequence[Example], plan: LoFiT, **options: Any) -> Edit:
    """Choose heads by their scales, then train an offset at each.

    Args:
        model: stays as it is.
        train: examples to learn from, in both phases.
        plan: how many heads, where, and with which rates.
        options: keyword options of `fit` for both phases (validation, seed, template, verbalizer,
            cache, progress).

    Returns:
        The second phase's edit. `record.lofit` has all heads in order of the size of their scales,
        and the first phase's record.

    Raises:
        ConfigError: no head, or more than there are, should be kept.
    """
    places = plan.places(model)
    options.setdefault("cache", PrefixCache(model))
    first = fit(model, train, plan.scales(places), **options)
    size = {str(i.place): float(i.get_parameter("m").detach().norm()) for i in first}
    order = sorted(places, key=lambda site: -size[str(site)])
    edit = fit(model, train, plan.offsets(sorted(order[: plan.heads])), **options)
    sizes = {str(site): round(size[str(site)], 6) for site in order}
    return edit.with_record(lofit=HeadChoice(sizes, first.record))
