"""Sites by the written rule, and a small edit that is trained while you look.

Both use the functions of the commands: the rule is `ImportanceMap.select` on a map by role of some training
reviews, the edit is `presets.bundled` trained by `fit`. The test is on other reviews, drawn once by a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..edits import Edit
from ..errors import ConfigError, DataError
from ..examples import Example, Examples, leakage
from ..patch.corruption import Counterfactual, GaussianNoise
from ..patch.pairs import Keep, Pairs, make_pairs
from ..patch.plan import plan
from ..patch.request import By, Request
from ..report.text import digits
from ..sites import Site
from ..stats import wilson
from ..train import presets
from ..train.fit import fit
from ..train.training import Progress
from .ask import Question
from .live import Tell
from .state import State

RULED = 24
"""Pairs that the rule looks at."""
TESTED = 50
"""Held-out reviews on which an edit is tested."""
SEED = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """An edit of one browser.

    Attributes:
        edit: trained.
        sites: where, as they were chosen.
    """

    edit: Edit
    sites: tuple[str, ...]


# ---- the rule -----------------------------------------------------------------------------------------


def by_rule(
    q: Question, train: Examples, tell: Tell, breathe: Callable[[], None]
) -> tuple[Site, ...]:
    """Choose sites by the rule on a map of training reviews; tell `progress` and `chosen`.

    Args:
        q: the model and how it is asked.
        train: examples that edits learn from.
        tell: given the events.
        breathe: called between batches; what it raises ends the sweep.
    """
    pairs = _pairs_for_rule(q, train)
    p = plan(q.model, pairs, Request.parse(["resid_post"], by=By.ROLE))
    frames, total = [], len(p.batches)
    for index in range(total):
        frames.append(p.trace_batch(index, seen=lambda part: breathe()))
        tell("progress", {"done": index + 1, "total": total})
    chosen = p.gather(frames).importance().select()
    tell(
        "chosen",
        {
            "sites": [str(s) for s in chosen.sites], "rule": chosen.rule, "clear": chosen.clear,
            "aie": digits(chosen.aie), "low": digits(chosen.ci_low), "high": digits(chosen.ci_high),
            "pairs": chosen.n, "sentences": chosen.sentences, "warnings": list(chosen.warnings),
        },
    )  # fmt: skip
    return chosen.sites


def _pairs_for_rule(q: Question, train: Examples) -> Pairs:
    """Return pairs of training reviews: right ones that the corruption turns where there are any."""
    told = all(e.counterfactuals for e in train)
    corruption = Counterfactual() if told else GaussianNoise(draws=2)
    options: dict[str, Any] = {"template": q.template, "verbalizer": q.verbalizer, "limit": RULED}
    examples = train.sample(8 * RULED, SEED)
    try:
        return make_pairs(q.model, examples, corruption, keep=Keep.PAPER, **options)
    except DataError:
        return make_pairs(q.model, examples, corruption, keep=Keep.ALL, **options)


# ---- a small edit -------------------------------------------------------------------------------------


def train_edit(
    q: Question,
    state: State,
    train: Examples,
    held: Examples,
    tell: Tell,
    breathe: Callable[[], None],
) -> Trained:
    """Train an edit at the sites of a state and compare it with the base; tell `plan`, `step`, `tested`.

    Args:
        q: the model and how it is asked.
        state: sites, epochs and number of examples.
        train, held: what it learns from, and what both are tested on.
        tell: given the events.
        breathe: called after every step; what it raises ends the training.

    Raises:
        ConfigError: there are no sites.
    """
    if not state.sites:
        raise ConfigError("no sites are chosen; take some from the map, or let the rule choose")
    sites = [q.model.check_site(Site.parse(s)) for s in state.sites]
    examples = train.sample(state.examples, SEED)
    preset = presets.bundled(sites, epochs=state.epochs)
    steps = preset.epochs * -(-len(examples) // preset.batch_size)
    tell("plan", {"steps": steps, "examples": len(examples), "epochs": preset.epochs})

    def step(progress: Progress) -> None:
        row = progress.history[-1]
        tell("step", {"step": row["step"], "epoch": row["epoch"], "loss": digits(row["loss"])})
        breathe()

    edit = fit(
        q.model,
        examples,
        preset,
        seed=SEED,
        template=q.template,
        verbalizer=q.verbalizer,
        on_step=step,
        progress=False,
    )
    tell(
        "tested",
        compared(q, edit, examples, held.sample(TESTED, SEED)) | {"parameters": edit.n_parameters},
    )
    return Trained(edit, state.sites)


def compared(
    q: Question, edit: Edit, train: Sequence[Example], held: Sequence[Example]
) -> dict[str, Any]:
    """Return what the base and the edited model answer to held-out reviews, row by row.

    Reviews that stand in the training data are left out and counted.
    """
    leaks = set(leakage(train, held).rows)
    tested = [e for i, e in enumerate(held) if i not in leaks]
    prompts = [q.tokens(e) for e in tested]
    polarities = [p.value for p in q.verbalizer.polarities]
    answers = {
        name: [polarities[i] for i in q.scores(prompts, which).argmax(1).tolist()]
        for name, which in (("base", None), ("edited", edit))
    }
    rows = [
        {
            "sentence": e.sentence,
            "aspect": e.aspect,
            "gold": e.polarity.value,
            "base": a,
            "edited": b,
        }
        for e, a, b in zip(tested, answers["base"], answers["edited"], strict=True)
    ]
    right = {name: sum(row[name] == row["gold"] for row in rows) for name in answers}
    ends = {name: wilson(k, len(rows)) for name, k in right.items()}
    intervals = {name: [digits(x.low), digits(x.high)] for name, x in ends.items()}
    return {
        "rows": rows, "n": len(rows), "right": right, "intervals": intervals, "left_out": len(leaks),
    }  # fmt: skip


__all__ = ["Trained", "by_rule", "compared", "train_edit"]
