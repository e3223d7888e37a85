"""LoFiT, Yin et al. 2024 (arXiv 2406.01563): heads are chosen by training, and then edited.

    edit = lofit(model, train, heads=8)

First every head's output is scaled, z -> (1 + m) * z, with the scales' absolute values charged; the heads with the largest scales (norm of
m) are kept and the scales thrown away. Then an offset is trained at each of them, z -> z + v. What localisation *learned* on the task says
of the heads can so be set beside what tracing says of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..edits.edit import Edit
from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..prompts import PromptTemplate, Verbalizer
from ..sites import Site
from .fit import fit
from .prefix import PrefixCache
from .presets import RATES, Preset, parts


def lofit(
    model: Model,
    train: Sequence[Example],
    heads: int,
    *,
    layers: Iterable[int] | None = None,
    at: str | int | None = None,
    lr: tuple[float, float] = (RATES["head_gate"], RATES["steering"]),
    charge: float = 1e-3,
    epochs: tuple[int, int] = (3, 3),
    batch_size: int = 16,
    validation: Sequence[Example] | float | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    cache: PrefixCache | None = None,
    progress: bool = False,
) -> Edit:
    """Choose heads by their scales, then train an offset at each.

    Args:
        model: stays as it is.
        train: what to learn from, in both phases.
        heads: how many to keep.
        layers: to choose from; all where None.
        at: role or position; every token where None, as in the paper.
        lr: of the scales, and of the offsets.
        charge: of the scales' absolute values, added to the loss.
        epochs: of the two phases.
        batch_size: examples a forward pass.
        validation, seed, template, verbalizer, cache, progress: as in `fit`, of both phases.

    Returns:
        The second phase's edit. Its record has under `lofit` the heads in order of the size of their scales, all of them.

    Raises:
        ConfigError: no head, or more than there are, should be kept.
    """
    places = [
        Site(layer, "head", h, at)
        for layer in (range(model.n_layers) if layers is None else layers)
        for h in range(model.n_heads)
    ]
    if not 1 <= heads <= len(places):
        raise ConfigError(
            f"{heads} heads were asked for; accepted: 1 to {len(places)}, which is all of the layers"
        )
    how: dict[str, Any] = {
        "validation": validation, "seed": seed, "template": template, "verbalizer": verbalizer, "progress": progress,
        "cache": cache if cache is not None else PrefixCache(model),
    }  # fmt: skip
    scales = parts("head_gate", places, lr[0], gates="none", charge=charge)
    first = fit(
        model, train, Preset("lofit heads", scales, epochs=epochs[0], batch_size=batch_size), **how
    )
    size = {str(i.place): float(i.get_parameter("m").detach().norm()) for i in first}
    order = sorted(places, key=lambda site: -size[str(site)])
    chosen = sorted(order[:heads])
    edit = fit(
        model,
        train,
        Preset("lofit", parts("steering", chosen, lr[1]), epochs=epochs[1], batch_size=batch_size),
        **how,
    )
    return edit.with_record(
        lofit={
            "sizes": {str(site): round(size[str(site)], 6) for site in order},
            "first_phase": first.record,
        }
    )
