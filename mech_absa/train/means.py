"""Steer by a difference of means: an edit that no gradient made.

    edit = mean_difference(model, train, "L3.resid_post@query.last", alpha=2.0)
    found = difference_of_means(model, train, sites)      the vectors once, for several alphas and controls
    choice = found.choose_alpha(validation)               choice.edit, and choice.table with every alpha

    h + alpha (mean over the examples that the model answers rightly - mean over all examples)

Source: "Enhancing semantic consistency of large language models through model editing" (arXiv
2501.11041), which adds this vector to the output of the components that a probe ranks highest. It
reports that alpha 1 to 5 helps and 9 hurts, and that random components or directions hurt. Its
"consistent" examples are prompts that are answered rightly. There is no vector per class: the vector
is added whatever the label is, so that one that means a class would push every example towards it.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..edits.base import Part, Where
from ..edits.edit import Edit
from ..edits.record import TrainingRecord
from ..errors import ConfigError
from ..examples import Example
from ..model import Model
from ..model.hooks import capture
from ..prompts import PromptTemplate, Tokenised, Tokens, Verbalizer
from ..records import plain
from ..scoring import by_length, gold_indices, label_scores, question, room_for
from ..sites import Site
from .prefix import PrefixCache
from .presets import Sites, parts, read_sites
from .task import Task

ALPHAS = (1.0, 2.0, 3.0, 4.0, 5.0, 9.0)
"""The range that the paper reports, with the value that it finds too large."""


@dataclass(frozen=True)
class AlphaScore:
    """Hold how good an alpha is on validation examples.

    Attributes:
        alpha: the factor.
        accuracy: share of right answers.
        loss: mean cross-entropy over the labels.
    """

    alpha: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class AlphaChoice:
    """Hold the chosen alpha and all that were tried.

    Attributes:
        edit: with the chosen alpha; `record.made["alphas"]` has the table too.
        alpha: the highest accuracy; among equals the lowest loss, then the first.
        table: a row per alpha, in the order that was given.
    """

    edit: Edit
    alpha: float
    table: tuple[AlphaScore, ...]


@dataclass(frozen=True, eq=False)
class DifferenceOfMeans:
    """Hold v = mean over right answers - mean over all, at every site.

    Attributes:
        model: that was run, and that is edited.
        vectors: by site, float64, `d_model` or `d_head` wide.
        right: examples that the model answers rightly.
        record: of edits made from it, but for alpha.
        template, verbalizer: the question.
    """

    model: Model
    vectors: Mapping[Site, Float[Tensor, " d"]]
    right: int
    record: TrainingRecord
    template: PromptTemplate
    verbalizer: Verbalizer

    def edit(self, alpha: float) -> Edit:
        """Return h + alpha v as an ordinary edit of the family `steering`.

        Raises:
            ConfigError: alpha is not finite.
        """
        if not math.isfinite(alpha):
            raise ConfigError(f"alpha is {alpha}; accepted: a finite number, such as 1 to 5")
        edit = Edit.fresh(self.model, parts("steering", self.vectors, 0.0))
        with torch.no_grad():
            for intervention, v in zip(edit, self.vectors.values(), strict=True):
                intervention.get_parameter("v").copy_(alpha * v)
        preset = {**self.record.preset, "alpha": alpha}
        return edit.with_record(replace(self.record, preset=preset))

    def random_directions(self, seed: int = 0) -> DifferenceOfMeans:
        """Return the control with vectors of the same norms in random directions.

        Args:
            seed: of the directions.
        """
        generator = torch.Generator().manual_seed(seed)
        turned: dict[Site, Tensor] = {}
        for site, v in self.vectors.items():
            drawn = torch.randn(len(v), generator=generator, dtype=torch.float64)
            turned[site] = drawn * (v.norm() / drawn.norm())
        return self._control("random direction", turned, seed)

    def random_sites(self, seed: int = 0) -> DifferenceOfMeans:
        """Return the control with the same vectors at random other sites.

        A site's vector goes to another layer, or another head, of the same kind and at the same
        tokens; no given site is used again, and none twice.

        Args:
            seed: of the draw.

        Raises:
            ConfigError: there are not enough other sites.
        """
        rng, groups = random.Random(seed), defaultdict[tuple[str, str], list[Site]](list)
        for site in self.vectors:
            groups[site.kind, str(site.at)].append(site)
        moved: dict[Site, Tensor] = {}
        for given in groups.values():
            free = sorted(set(_alike(self.model, given[0])) - set(given))
            if len(free) < len(given):
                raise ConfigError(
                    f"{len(given)} sites like {given[0]} leave {len(free)} others in {self.model.name}; "
                    f"random sites need {len(given)}"
                )
            there = rng.sample(free, len(given))
            moved |= {new: self.vectors[old] for old, new in zip(given, there, strict=True)}
        return self._control("random sites", moved, seed)

    def choose_alpha(
        self,
        validation: Sequence[Example],
        alphas: Sequence[float] = ALPHAS,
        *,
        cache: PrefixCache | None = None,
        batch_size: int = 32,
    ) -> AlphaChoice:
        """Return the edit with the alpha that is best on validation examples.

        Args:
            validation: never the rows that the edit is tested on.
            alphas: the grid.
            cache: of streams below the edit; a new one where None.
            batch_size: prompts per forward pass.

        Raises:
            ConfigError: no validation examples, no alphas, or one that is not finite.
        """
        if not len(validation) or not len(alphas):
            what = "alphas" if len(validation) else "validation examples"
            raise ConfigError(f"no {what} were given to choose alpha; at least one is needed")
        edits = [self.edit(alpha) for alpha in alphas]
        cache = cache or PrefixCache(self.model)
        task = Task(self.model, "labels", self.template, self.verbalizer, cache)
        items, table = task.prepare(validation), []
        for alpha, edit in zip(alphas, edits, strict=True):
            loss, accuracy = task.quality(edit, items, batch_size)
            table.append(AlphaScore(float(alpha), accuracy, loss))
        best = max(range(len(table)), key=lambda i: (table[i].accuracy, -table[i].loss))
        record = edits[best].record
        record = replace(
            record,
            validation=len(validation),
            best_validation_loss=table[best].loss,
            made={**record.made, "alphas": plain(table)},
        )
        return AlphaChoice(edits[best].with_record(record), table[best].alpha, tuple(table))

    def _control(self, name: str, vectors: Mapping[Site, Tensor], seed: int) -> DifferenceOfMeans:
        preset = {**self.record.preset, "control": name, "sites": [str(s) for s in vectors]}
        record = replace(self.record, preset=preset, seed=seed)
        return replace(self, vectors=vectors, record=record)


def difference_of_means(
    model: Model,
    train: Sequence[Example],
    sites: Sites,
    *,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    batch_size: int = 32,
) -> DifferenceOfMeans:
    """Return mean activation over right answers - mean over all examples, at every site.

    An example counts once: its activation is the mean over the tokens that the site names. An example
    without such a token counts at other sites only.

    Args:
        model: unedited.
        train: examples; the model must answer some of them rightly and some not.
        sites: resid_pre, resid_mid, resid_post, attn_out, mlp_out or head, at a role, at a position
            or everywhere; a list, or a sites.json.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        batch_size: prompts per forward pass.

    Raises:
        ConfigError: no examples; all or none are answered rightly; no right answer has a site's token.
        SiteError: no sites, or one that the model lacks.

    Examples:
        >>> import mech_absa as ma
        >>> model, train = ma.load_model(), ma.load_examples("builtin:laptop/train")[:16]
        >>> found = difference_of_means(model, train, "L3.mlp_out@query.last")
        >>> found.edit(alpha=2.0).n_parameters == model.d_model
        True
    """
    started = time.perf_counter()
    places = list(dict.fromkeys(read_sites(sites)))
    Edit.fresh(model, [Part("steering", str(site)) for site in places])  # rejects what it lacks
    if not len(train):
        raise ConfigError("there are no examples to take means over; at least two are needed")
    template, verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
    continuations = verbalizer.continuations(model.tokenizer, template)
    room = room_for(continuations)
    prompts = [question(model, e, template, room) for e in train]
    scores = label_scores(model, prompts, continuations, batch_size=batch_size)
    right = scores.argmax(-1) == gold_indices(train, verbalizer)
    count = int(right.sum())
    if count in (0, len(train)):
        raise ConfigError(
            f"{model.name} answers {'none' if not count else 'all'} of the {len(train)} examples rightly, so that there is "
            "no difference between right answers and all; give examples of both kinds"
        )
    states = token_means(model, prompts, places, batch_size)
    vectors = {site: _difference(site, states[site], right) for site in places}
    record = TrainingRecord.of(
        train,
        template,
        verbalizer,
        preset={"name": "mean_difference", "sites": [str(s) for s in places]},
        seconds=round(time.perf_counter() - started, 3),
        made={
            "formula": "h + alpha (mean over right answers - mean over all)",
            "right": count,
            "norms": {str(s): round(float(v.norm()), 6) for s, v in vectors.items()},
        },
    )
    return DifferenceOfMeans(model, vectors, count, record, template, verbalizer)


def mean_difference(
    model: Model,
    train: Sequence[Example],
    sites: Sites,
    alpha: float,
    *,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
) -> Edit:
    """Return h + alpha (mean over right answers - mean over all) as an edit.

    Args:
        model, train, sites, template, verbalizer: as in `difference_of_means`.
        alpha: the factor; the paper reports gains from 1 to 5.

    Raises:
        ConfigError, SiteError: as in `difference_of_means`; alpha is not finite.

    Examples:
        >>> import mech_absa as ma
        >>> model, train = ma.load_model(), ma.load_examples("builtin:laptop/train")[:16]
        >>> edit = mean_difference(model, train, "L3.resid_post@query.last", alpha=2.0)
        >>> edit.parts[0].family, edit.record.examples, edit.record.steps
        ('steering', 16, 0)
    """
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha is {alpha}; accepted: a finite number, such as 1 to 5")
    found = difference_of_means(model, train, sites, template=template, verbalizer=verbalizer)
    return found.edit(alpha)


@torch.no_grad()
def token_means(
    model: Model, prompts: Sequence[Tokenised], sites: Sequence[Site], batch_size: int = 32
) -> dict[Site, Float[Tensor, "example d"]]:
    """Return the activation of every prompt at every site, averaged over the tokens of the site.

    Args:
        model: what runs, once, up to the last of the sites.
        prompts: batches of one.
        sites: what is looked at.
        batch_size: prompts per forward pass.

    Returns:
        float64, on the CPU; NaN for a prompt that has no such token.
    """
    width = {s: model.d_model if s.head is None else model.d_head for s in sites}
    found = {s: torch.empty(len(prompts), width[s], dtype=torch.float64) for s in sites}
    points = {s.hook_name: replace(s, at=None) for s in sites}
    stop = max(s.layer for s in sites) + 1
    for rows in by_length(prompts, batch_size):
        tokens = Tokens.stack([prompts[i] for i in rows])
        where = Where(tokens)
        with capture(model, points.values()) as seen:
            model.run_hooked(model.embed(tokens.ids), 0, stop)
        for site in sites:
            h = seen[points[site.hook_name]].double().cpu()
            h = h if site.head is None else h[:, :, site.head]
            mask = where.mask("all" if site.at is None else site.at).double().cpu()
            found[site][rows] = torch.einsum("bp,bpd->bd", mask, h) / mask.sum(1, keepdim=True)
    return found


def _difference(
    site: Site, states: Float[Tensor, "example d"], right: Tensor
) -> Float[Tensor, " d"]:
    """Return the mean over right answers minus that over all, of the prompts that have the token."""
    has = ~states.isnan().any(1)
    if not bool((has & right).any()):
        raise ConfigError(
            f"steering at {site}: none of the {int(right.sum())} prompts that are answered rightly has a token at {site.at}"
        )
    return states[has & right].mean(0) - states[has].mean(0)


def _alike(model: Model, site: Site) -> list[Site]:
    """Return all sites of the same kind at the same tokens."""
    if site.head is None:
        return [replace(site, layer=layer) for layer in range(model.n_layers)]
    return [
        replace(site, layer=layer, head=head)
        for layer in range(model.n_layers)
        for head in range(model.n_heads)
    ]
