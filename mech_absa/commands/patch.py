"""Run `mech-absa patch`, or `python -m mech_absa.patch`: from reviews to an importance map.

    mech-absa patch                                                   # bundled model and reviews
    mech-absa patch --data reviews.csv --model gpt2 --out runs/mine   # your data, your model
    accelerate launch --multi_gpu --num_processes 4 -m mech_absa.patch ...   # by four processes

A run writes `run.json` (everything that is needed to make it again), `effects.parquet` (one row per
pair and cell), `pairs.parquet`, `about.json`, `importance.csv`, `sites.json`, `figures/` and
`report.html`. It writes in parts while it goes on: `--resume` continues a killed run, which then
ends with the same bytes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from tyro.conf import OmitArgPrefixes, arg

from ..errors import ConfigError, DataError
from ..examples import Examples
from ..model import DTYPES, Model, load_model
from ..own import PromptPairs
from ..patch.corruption import (
    WORDS,
    Corruption,
    GaussianNoise,
    Lexicon,
    NoiseSpan,
    OpinionSwap,
    Resample,
    as_corruption,
)
from ..patch.directions import BothDirections, interaction_table
from ..patch.gradients import agreement
from ..patch.importance import ImportanceMap, Selection, load_sites, traced_in
from ..patch.own import prompt_pairs
from ..patch.pairs import Pairs, make_pairs
from ..patch.plan import Plan, plan
from ..patch.request import DEFAULT_RULES, Direction, Request
from ..patch.self_check import self_check
from ..patch.stored import StoredEffects, join_parts, save_about, write_part
from ..patch.traced import as_written
from ..progress import bar
from ..readers import load_examples
from ..readers.own import holds_prompt_pairs, load_prompt_pairs
from ..records import About, RunFolder, atomic
from ..sites import HEAD_KINDS, Site, parse_layers
from ..stats import ADJUSTMENTS, spelled_p
from . import before, search
from .cli import command, out_folder, report, tell_left_out, warn
from .flags import (
    FREE,
    ModelFlags,
    Names,
    OptionalFloat,
    OptionalInt,
    OptionalSources,
    OptionalText,
    QuestionFlags,
    ReadFlags,
    RunFlags,
    Sources,
    at_least,
    join,
    one_of,
    recorded,
    share,
)

HALF = ("bfloat16", "float16")

Data = TypeVar("Data", Examples, PromptPairs)


@dataclass(frozen=True)
class PairFlags:
    """Say which examples are traced."""

    limit: OptionalInt = None
    """Trace at most this many pairs, drawn by --seed from all data."""
    head: bool = False
    """Take the first examples of the data for --limit, instead of drawing them."""
    sample: OptionalInt = None
    """Draw this many examples by --seed before anything else."""
    keep: str = "paper"
    """Pairs that are traced: paper (clean answer right, corrupted answer wrong), clean (clean answer right) or all."""


@dataclass(frozen=True)
class CorruptionFlags:
    """Say how the corrupted run is made."""

    corruption: str = "auto"
    """noise (Gaussian noise on the embeddings, the paper's), counterfactual (a minimal edit of the text; the data must have them),
    aspect-swap (the question asks about another aspect of the sentence), opinion-swap (the opinion expression replaced from --lexicon),
    mean, zero or resample (ablations of the clean run). auto takes counterfactuals where all examples have them, and noise otherwise."""
    lexicon: OptionalSources = ()
    """Training data with opinion spans, from which opinion-swap takes its expressions."""
    noise_scale: float = 3.0
    """Noise in standard deviations of the aspect terms' embeddings."""
    noise_draws: int = 10
    """Independent draws of the noise per pair."""
    noise_span: str = "all"
    """Tokens that are noised: all (the paper), sentence, aspect or query; or a named span of your own prompt pairs."""


@dataclass(frozen=True)
class StateFlags:
    """Say which states are put back, and what is read."""

    sites: Sources = ("resid_post", "attn_out", "mlp_out")
    """Which sites: kinds of state (resid_pre, resid_mid, resid_post, attn_out, mlp_out, head; q, k, v by the loop),
    single sites such as L5.head3, or the folder of a traced run (or its sites.json), whose chosen sites are taken."""
    layers: str = "all"
    """Layers of the kinds: 3, 2-5, 0,2-4, all, first, middle or last (thirds of the depth)."""
    by: str = "token"
    """token restores one token at a time and averages by role afterwards;
    role restores all tokens of a role together, at a tenth of the cost."""
    metric: str = "prob"
    """prob (P of the right label, the paper's), prob_label (among the labels only), logprob, logit_diff or kl."""
    direction: str = "denoise"
    """denoise puts clean states into the corrupted run; noise puts corrupted states into the clean run; both does both.
    Ablations are always noise."""
    memory: OptionalFloat = None
    """GiB for activations in flight. Default: half a GiB on a CPU, a third of a GPU."""

    @property
    def named(self) -> tuple[str, ...]:
        """Return kinds and single sites, the chosen sites of a folder in its place.

        Raises:
            SiteError: a folder or a file holds no sites.
        """
        found: list[str] = []
        for word in self.sites:
            elsewhere = "/" in word or word.endswith(".json") or Path(word, "sites.json").exists()
            found += map(str, load_sites(word)) if elsewhere else [word]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class SweepFlags(StateFlags):
    """Say which states are put back, what is read, and how all of it is computed."""

    window: int = 1
    """Neighbouring layers restored together (ROME: 10 for attention and MLP)."""
    method: str = "exact"
    """exact, or an estimate from gradients, compared with an exact sample of cells: atp, atpstar, relp or ig."""
    steps: int = 16
    """Steps of integrated gradients."""
    rules: Names = tuple(str(r.value) for r in DEFAULT_RULES)
    """Rules of RelP: ln, identity, half, pattern."""
    exact_top: int = 0
    """Of an estimate, compute this many leading cells of the map exactly afterwards."""
    control: int = 200
    """Cells computed exactly beside an estimate; in half precision, cells computed again in float32."""
    engine: str = "wavefront"
    """wavefront (all cells in one walk over the layers) or loop (one forward pass per cell)."""
    n_devices: int = 1
    """Number of devices over which the layers are spread."""


@dataclass(frozen=True)
class ChoiceFlags:
    """Say how effects are averaged, tested and drawn, and how sites are chosen."""

    level: float = 0.95
    """Level of the intervals."""
    adjustment: str = "maxt"
    """Correction of p-values: maxt, bootstrap (for skewed effects) or holm (family-wise), bh or by (false discoveries), or none."""
    rule: Literal["mean", "pie", "tie"] = "mean"
    """With --direction both, choose sites by PIE (denoise), TIE (noise) or their mean."""
    select_kind: OptionalText = None
    """Kind of state that sites are chosen from. Default: resid_post."""
    select_width: OptionalInt = None
    """Neighbouring layers that are chosen. Default: the paper's share of the depth, 6 of 32."""
    figures: bool = True
    """Draw the figures."""


@dataclass(frozen=True)
class Config:
    """Find which layers, tokens and components of a language model carry the sentiment of an aspect.

    Every example is run clean and corrupted. Then one clean state at a time is put back into the
    corrupted run, and its effect on the answer is measured, for every layer, token and component.

    Examples:
      mech-absa patch --limit 40 --out runs/first
      mech-absa patch --data reviews.csv --model gpt2 --by role --out runs/mine
      mech-absa patch --method ig --metric logit_diff --limit 20
    """

    data: Sources = ("builtin:restaurant+laptop/train",)
    """Files, folders, hub data sets (hf:owner/name), or built-in reviews (builtin:restaurant/train); several are joined.
    JSON lines with clean, corrupted, answer, foil and spans are prompt pairs of your own, of any task."""
    adapter: str = "auto"
    """A trained edit whose weights are merged before tracing (the paper traces the adapted model): a folder, bundled, bundled-v2, or none.
    auto is bundled for the models that one ships for (bundled, smollm2) and none otherwise."""
    seed: int = 0
    """Seed of the noise, of draws, of the bootstrap and of the self-checks."""
    pairs: OmitArgPrefixes[PairFlags] = field(default_factory=PairFlags)
    corrupt: Annotated[OmitArgPrefixes[CorruptionFlags], arg(name="corruption")] = field(
        default_factory=CorruptionFlags
    )
    sweep: Annotated[OmitArgPrefixes[SweepFlags], arg(name="tracing")] = field(
        default_factory=SweepFlags
    )
    search: OmitArgPrefixes[search.SearchFlags] = field(default_factory=search.SearchFlags)
    choice: Annotated[OmitArgPrefixes[ChoiceFlags], arg(name="statistics")] = field(
        default_factory=ChoiceFlags
    )
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)


@dataclass(frozen=True, eq=False)
class Task:
    """Hold what a run traces: everything that is loaded and checked before the sweep.

    Attributes:
        config: the flags.
        examples: all that were read.
        base: the model as it was loaded.
        model: the same with the adapter's weights merged.
        adapter: name of the adapter.
        plan: of the sweep, with the pairs.
        notes: warnings.
    """

    config: Config
    examples: Examples | PromptPairs
    base: Model
    model: Model
    adapter: str | None
    plan: Plan
    notes: list[str]

    @property
    def pairs(self) -> Pairs:
        """Return the pairs that are traced."""
        return self.plan.pairs


def corruption_of(config: Config, examples: Examples | PromptPairs) -> Corruption:
    """Return the corruption that the flags name.

    Raises:
        ConfigError: there is none of that name.
    """
    name = config.corrupt.corruption
    if name == "auto":
        whole = len(examples) and all(e.counterfactuals for e in examples)
        name = "counterfactual" if whole else "noise"
    if name == "noise":
        return GaussianNoise(
            config.corrupt.noise_scale,
            config.corrupt.noise_draws,
            config.corrupt.noise_span,
            config.seed,
        )
    if name == "resample":
        return Resample(config.seed)
    if name == "opinion-swap" and config.corrupt.lexicon:
        training = [
            e for s in config.corrupt.lexicon for e in load_examples(s, **config.reading.options)
        ]
        return OpinionSwap(Lexicon.of(training), seed=config.seed)
    return as_corruption(name)


def own_pairs(config: Config) -> PromptPairs | None:
    """Return the prompt pairs that --data names; None where it names reviews.

    It runs before anything else, since the spans of the pairs are roles that flags may name.

    Raises:
        DataError, SiteError: a line cannot be read.
        ConfigError: prompt pairs stand beside other data.
    """
    own = [source for source in config.data if holds_prompt_pairs(source)]
    if not own:
        return None
    if len(config.data) > 1:
        raise ConfigError(
            f"--data names {own[0]}, which holds prompt pairs, and other data; give one file of "
            "prompt pairs by itself"
        )
    if config.question.template is not None or config.question.labels:
        raise ConfigError(
            f"{own[0]} holds prompt pairs, which bring prompts and answers; leave --template and "
            "--labels out"
        )
    return load_prompt_pairs(own[0])


def read_data(config: Config) -> Examples:
    """Return the reviews that are tried, of all data named, in the order in which they are tried.

    Raises:
        DataError: a source cannot be read, or no example is left.
    """
    return drawn(join([config.reading.read(s) for s in config.data]), config)


def drawn(data: Data, config: Config) -> Data:
    """Return the rows that `--sample` and `--limit` leave, in the order in which they are tried.

    Raises:
        DataError: none is left.
    """
    if config.pairs.sample is not None:
        data = data.sample(config.pairs.sample, config.seed)
    if not len(data):
        raise DataError(f"{data.source}: no example is left (left out: {data.left_out})")
    if config.pairs.limit is None or config.pairs.head:
        return data
    order = list(range(len(data)))
    random.Random(config.seed).shuffle(order)
    return replace(data, items=tuple(data.items[i] for i in order))


def adapted(config: Config, model: Model) -> tuple[Model, str | None]:
    """Return the model with the adapter's weights merged, and the adapter's name."""
    return with_adapter(config.adapter, model)


def with_adapter(name: str, model: Model) -> tuple[Model, str | None]:
    """Return a model with the adapter of a name merged, and its name; `auto` and `none` as in --adapter."""
    from ..edits import load_edit
    from ..edits.store import bundled_edit

    if name == "auto":
        name = "none" if bundled_edit(model) is None else "bundled"
    if name == "none":
        return model, None
    return load_edit(name, model).merged(model), name


def check_flags(config: Config, spans: Sequence[str] = ()) -> None:
    """Reject what can be rejected before anything is loaded; `spans` are those of own prompts."""
    at_least(
        1,
        limit=config.pairs.limit,
        sample=config.pairs.sample,
        select_width=config.choice.select_width,
    )
    at_least(1, control=config.sweep.control, n_devices=config.sweep.n_devices)
    if config.sweep.memory is not None and not 2**-10 <= config.sweep.memory <= 2**20:
        raise ConfigError(
            f"--memory {config.sweep.memory:g} was given; accepted: GiB between 0.001 and 1048576"
        )
    share("--level", config.choice.level)
    one_of("--adjustment", config.choice.adjustment, list(ADJUSTMENTS))
    one_of("--dtype", config.model.dtype, list(DTYPES))
    one_of("--corruption", config.corrupt.corruption, ["auto", *WORDS])
    if config.corrupt.corruption == "opinion-swap" and not config.corrupt.lexicon:
        raise ConfigError(
            "--corruption opinion-swap needs --lexicon with training data that marks opinion expressions"
        )
    if config.corrupt.corruption in ("auto", "noise"):
        GaussianNoise(
            config.corrupt.noise_scale,
            config.corrupt.noise_draws,
            config.corrupt.noise_span,
            config.seed,
        )
        if config.corrupt.noise_span not in spans:
            NoiseSpan.parse(config.corrupt.noise_span, "noise span")
    if config.choice.rule != "mean" and config.sweep.direction != "both":
        raise ConfigError(
            f"--rule {config.choice.rule} was given with --direction {config.sweep.direction}; both is needed"
        )
    config.search.check(vars(config.sweep), config.choice.level)
    config.reading.check()
    config.question.check(words=(3,))
    request_of(config, spans=spans)
    if config.choice.select_kind is not None:
        kinds = [Site.parse(s, spans).kind if "." in s else s for s in config.sweep.named]
        named = [k for k in dict.fromkeys(kinds) if k not in HEAD_KINDS]
        one_of("--select-kind", config.choice.select_kind, named)


def request_of(
    config: Config, layers: Sequence[int] | None = None, spans: Sequence[str] = ()
) -> Request:
    """Return what the flags ask for; `spans` are those of own prompts.

    Raises:
        ConfigError, SiteError: a word or a number is not accepted.
    """
    return Request.parse(
        config.sweep.named,
        layers=layers,
        by=config.sweep.by,
        metric=config.sweep.metric,
        direction=config.sweep.direction,
        window=config.sweep.window,
        method=config.sweep.method,
        steps=config.sweep.steps,
        rules=config.sweep.rules,
        exact_top=config.sweep.exact_top,
        engine=config.sweep.engine,
        memory=None if config.sweep.memory is None else int(config.sweep.memory * 2**30),
        spans=spans,
    )


def main(config: Config) -> Path | None:
    """Trace, and say where the result went."""
    # The record names the sites themselves: the folder they were chosen in may change.
    config = replace(config, sweep=replace(config.sweep, sites=config.sweep.named))
    own = own_pairs(config)
    check_flags(config, () if own is None else own.spans)
    group = _Group(config)
    quiet = config.run.quiet or not group.first
    say: Callable[..., None] = (lambda *p: None) if quiet else (lambda *p: print(*p, flush=True))
    folder = RunFolder(
        group.shared(out_folder(config, "patch")), recorded(config), config.run.resume, FREE
    )
    if folder.finished:
        say(f"{folder.path} already holds this run, whole; nothing to do")
        return folder.path
    task = prepare(config, group, say, own)
    folder.bind({"data": task.examples.sha256, "model": task.model.sha256})
    if config.search.asked:
        search.check_size(question_of(task), task.plan)
    group.wait()  # every process has looked at the folder before the first of them opens it
    if group.first:
        if not config.run.quiet:
            warn([*task.notes, *before.of_the_machine()])
        folder.open()
    group.wait()
    if config.search.asked:
        if group.first:
            leave_search(task, folder, quiet)
        return folder.path
    started = time.time()
    exact = config.sweep.method == "exact"
    checks = self_check(task.plan, seed=config.seed) if group.first and exact else {}
    sweep(task.plan, folder, group, config.run.quiet)
    group.wait()
    if not group.first:
        return None
    parts = [folder.part(_part(i)) for i in range(len(task.plan.batches))]
    effects = join_parts(task.plan, parts, folder.path)
    extra = controls(task, effects, say)
    effects.about.update(extra)
    effects.about.update({"self_checks": checks, "adapter": task.adapter})
    leave(task, folder, effects, {"self_checks": checks, **extra, "sweep_seconds": started}, say)
    return folder.path


def prepare(
    config: Config, group: _Group, say: Callable[..., None], own: PromptPairs | None = None
) -> Task:
    """Load the data and the model, make the pairs, and lay out the sweep.

    Raises:
        MechAbsaError: an input is not accepted; nothing has been written then.
    """
    examples: Examples | PromptPairs
    examples = read_data(config) if own is None else drawn(own, config)
    spans = () if own is None else own.spans
    if group.first:
        tell_left_out(examples)
    m = config.model
    base = load_model(
        m.model,
        device=group.device,
        dtype=m.dtype,
        backend=m.backend,
        n_devices=config.sweep.n_devices,
    )
    layers = parse_layers(config.sweep.layers, base.n_layers)
    if config.choice.select_width is not None and config.choice.select_width > len(layers):
        raise ConfigError(
            f"--select-width {config.choice.select_width} was given; {len(layers)} layers are traced"
        )
    for site in config.sweep.named:
        if "." in site:
            base.check_site(Site.parse(site, spans))
    model, adapter = adapted(config, base)
    merged = f", adapter {adapter}" if adapter else ""
    more = f" ({examples.ambiguous} with an aspect that stands twice)" if examples.ambiguous else ""
    say(f"{len(examples)} examples from {examples.source}{more}; {model}{merged}")
    pairs = pairs_of(config, model, examples)
    p = plan(model, pairs, request_of(config, layers, spans))
    for line in before.lines(p, config.sweep.direction, config.choice.adjustment):
        say(line)
    return Task(config, examples, base, model, adapter, p, before.warnings(p, examples))


def pairs_of(config: Config, model: Model, examples: Examples | PromptPairs) -> Pairs:
    """Return the runs of the examples, or of the prompt pairs."""
    filters: dict[str, Any] = {
        "keep": config.pairs.keep, "limit": config.pairs.limit, "strict": config.reading.strict,
    }  # fmt: skip
    corruption = corruption_of(config, examples)
    if isinstance(examples, PromptPairs):
        return prompt_pairs(model, examples, corruption, **filters)
    template, verbalizer = config.question.prompt, config.question.verbalizer
    return make_pairs(
        model, examples, corruption, template=template, verbalizer=verbalizer, **filters
    )


def sweep(p: Plan, folder: RunFolder, group: _Group, quiet: bool) -> None:
    """Compute this process's share of the batches; write each as soon as it is there."""
    mine = [i for i in range(len(p.batches)) if i % group.size == group.rank]
    todo = [i for i in mine if not folder.part(_part(i)).exists()]
    cells = {i: p.cells_of(i) for i in mine}
    with bar("tracing", sum(cells.values()), quiet=quiet or not group.first) as tick:
        tick(sum(cells[i] for i in mine if i not in todo))
        for index, frame in p.iterate(todo, tick):
            write_part(frame, folder.part(_part(index)))


def _part(index: int) -> str:
    return f"effects-{index:06d}.parquet"


def controls(task: Task, effects: StoredEffects, say: Callable[..., None]) -> About:
    """Return how far an estimate, or half precision, is from exact effects; empty for an exact
    run.
    """
    config = task.config
    if config.sweep.method != "exact":
        against = compare_with_exact(task.plan, effects, config.sweep.control, config.seed)
        say(f"against {against['cells']} exact cells: {_spelled(against)}")
        return {"estimate_against_exact": against}
    if config.model.dtype in HALF:
        against = half_precision_control(task.plan, effects, config)
        say(f"against float32: {_spelled(against)}")
        return {"half_precision_control": against}
    return {}


def compare_with_exact(p: Plan, effects: StoredEffects, cells: int, seed: int) -> dict[str, Any]:
    """Compare an estimate with exact effects of random cells that are not zero for certain."""
    column = "estimate" if "estimate" in effects.columns else "effect"
    frame = effects.sample(column, cells, seed)
    exact = p.exact(frame)
    estimate = frame[column].to_numpy()
    return {"cells": len(exact), **agreement(exact, estimate, k=max(1, len(exact) // 10))}


def half_precision_control(p: Plan, effects: StoredEffects, config: Config) -> dict[str, Any]:
    """Return the largest and mean difference to float32 on cells drawn at random."""
    frame = effects.sample("effect", config.sweep.control, config.seed)
    wide, _ = adapted(
        config,
        load_model(
            config.model.model,
            device=config.model.device,
            dtype="float32",
            backend=config.model.backend,
            n_devices=config.sweep.n_devices,
        ),
    )
    exact = replace(p, model=wide).exact(frame)
    difference = abs(exact - frame["effect"].to_numpy())
    return {
        "cells": len(frame),
        "largest_difference": float(difference.max(initial=0.0)),
        "mean_difference": float(difference.mean()) if len(frame) else 0.0,
    }


def leave(
    task: Task,
    folder: RunFolder,
    effects: StoredEffects,
    extra: dict[str, Any],
    say: Callable[..., None],
) -> None:
    """Average, choose sites, and write all files, the figures and the report."""
    config = task.config
    started = extra.pop("sweep_seconds")
    importance = effects.importance(
        by="role", level=config.choice.level, adjustment=config.choice.adjustment, seed=config.seed
    )
    both = effects if "direction" in effects.columns else None
    selection = _chosen(task, importance, both, say)
    save_about(effects)
    importance.save(folder.path / "importance.csv")
    if both is not None:
        leave_interaction(both, config, folder.path)
    if selection is not None:
        selection.save(folder.path / "sites.json", traced_in(task.model, task.base, task.adapter))
    if config.choice.figures:
        from ..plots import save_trace_figures

        save_trace_figures(importance, folder.path / "figures", selection, effects)
    seconds = time.time() - started
    extra["skewed_cells"] = importance.about["skewed_cells"]
    folder.finish(record_of(task, effects, selection, extra, seconds), report(config))
    if config.run.quiet:
        return
    print_map(importance, effects, selection)
    warn(before.of_the_map(importance.about))
    say(f"\n{len(effects):,} effects of {len(effects.pairs)} pairs in {seconds:.1f} s")
    names = (
        "report.html",
        "figures",
        "importance.csv",
        "interaction.csv",
        "sites.json",
        "effects.parquet",
        "run.json",
    )
    for name in names:
        if (folder.path / name).exists():
            say(f"  {folder.path / name}")
    say(conclusion(importance, selection, folder.path))


def record_of(
    task: Task,
    effects: StoredEffects,
    selection: Selection | None,
    extra: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Return what run.json says of a trace."""
    model, about = task.model, effects.about
    counted = (
        "considered",
        "kept",
        "dropped",
        "sigma",
        "draw_sd",
        "classes_kept",
        "mixed_polarity",
    )
    return {
        "command": "patch",
        "model": model_account(task),
        "data": task.examples.account(),
        "pairs": {k: v for k, v in about.items() if k in counted} | before.account(task.pairs),
        "engine": {
            "method": task.config.sweep.method,
            "cells": len(effects),
            "flops": about["flops"],
        },
        **extra,
        "average_total_effect": float(effects.total.mean()),
        "sites": None if selection is None else str(selection),
        "warnings": task.notes,
        "device": str(model.device),
        "sweep_seconds": round(seconds, 3),
    }


def question_of(task: Task) -> search.Question:
    """Return what a search looks for, and in what."""
    config, asked = task.config, task.config.sweep
    how = config.search.how(config.choice.level, config.seed)
    return search.Question(
        task.model, task.pairs, asked.sites, asked.metric, asked.direction, asked.method, how
    )


def leave_search(task: Task, folder: RunFolder, quiet: bool) -> None:
    """Search for the largest cells, and write the folder."""
    about = {
        "model": model_account(task), "data": task.examples.account(), "warnings": task.notes,
        "device": str(task.model.device),
    }  # fmt: skip
    search.run(question_of(task), folder, about, quiet)


def model_account(task: Task) -> dict[str, Any]:
    """Return what run.json says of the model that is traced."""
    model = task.model
    return {
        "name": model.name,
        "source": task.config.model.model,
        "adapter": task.adapter,
        "sha256": model.sha256,
        "hf_difference": model.hf_difference,
        "parameters": model.n_parameters,
    }


def leave_interaction(both: StoredEffects, config: Config, folder: Path) -> None:
    """Write `interaction.csv`: PIE, TIE and their difference for every cell of the map by role."""
    interaction = both.over(lambda few: BothDirections.of(few).interaction)
    pie = both.over(lambda few: BothDirections.of(few).pie)
    tie = both.over(lambda few: BothDirections.of(few).tie)
    options = {
        "level": config.choice.level,
        "adjustment": config.choice.adjustment,
        "seed": config.seed,
    }
    table = interaction_table(interaction, pie, tie, **options)
    with atomic(folder / "interaction.csv") as temporary:
        as_written(table).to_csv(temporary, index=False, float_format="%.8g")


def _chosen(
    task: Task, importance: ImportanceMap, both: StoredEffects | None, say: Callable[..., None]
) -> Selection | None:
    """Return the sites; None, with a warning in the record, where no effect leaves a choice.

    So it is with aspect-swap where only the question differs: what stands before it is exactly 0.
    """
    try:
        return _select(importance, task.config, both)
    except DataError as error:
        task.notes.append(f"no sites were chosen: {error}")
        say(f"mech_absa.patch: {task.notes[-1]}")
        return None


def _select(
    importance: ImportanceMap, config: Config, both: StoredEffects | None
) -> Selection | None:
    kinds = set(importance.table["kind"])
    if config.choice.select_kind is None and not kinds - set(HEAD_KINDS):
        return None  # heads have no neighbouring layers to choose
    if both is not None and config.choice.rule != "mean":
        way = Direction.DENOISE if config.choice.rule == "pie" else Direction.NOISE
        ruled = both.over(
            lambda few: BothDirections.of(few).by_rule(config.choice.rule),
            {"direction": str(way), "rule": config.choice.rule},
        )
        importance = ruled.importance(
            by="role", level=config.choice.level, adjustment="none", seed=config.seed
        )
    return importance.select(
        config.choice.select_kind, width=config.choice.select_width, seed=config.seed
    )


def print_map(
    importance: ImportanceMap, effects: StoredEffects, selection: Selection | None
) -> None:
    """Print the cells with the largest effects, and the sites that were chosen."""
    from .tables import print_table

    about, total = importance.about, effects.total.mean()
    title = (
        f"Average indirect effect ({about['direction']}, {about['corruption']}, {about['unit']})"
    )
    if total == total:
        title += f"; average total effect {total:.4g}"
    columns = ("site", "AIE", f"{about['level']:.0%} interval", "p (adjusted)", "n")
    rows = [
        (
            row["site"],
            f"{row['aie']:.4g}",
            None
            if row["ci_low"] != row["ci_low"]
            else f"{row['ci_low']:.4g} to {row['ci_high']:.4g}",
            spelled_p(row["p_adjusted"], about.get("p_floor", 0.0)),
            int(row["n"]),
        )
        for _, row in importance.top(10).iterrows()
    ]
    print_table(columns, rows, title)
    if selection is not None:
        print(f"sites chosen: {selection}\n  by the rule: {selection.rule}")


def conclusion(importance: ImportanceMap, selection: Selection | None, folder: Path) -> str:
    """Say in one line what came out and what to do next."""
    best = importance.top(1).iloc[0]
    if selection is None:
        return f"Largest effect: {best['aie']:.4g} at {best['site']}."
    if not selection.clear:
        return "No site is clear of its control: trace more sentences, or another metric, before editing there."
    where = f"{', '.join(map(str, selection))}"
    return f"Restoring {where} brings back {selection.aie:.4g}; edit there: mech-absa train --sites {folder}"


def _spelled(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))


class _Group:
    """Hold the processes of `accelerate launch`; one process without a launcher."""

    def __init__(self, config: Config) -> None:
        self.state: Any = None
        self.rank, self.size = 0, 1
        self.device = config.model.device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            cpu = config.model.device == "cpu" or not torch.cuda.is_available()
            self.state = PartialState(cpu=cpu)
            self.rank, self.size = self.state.process_index, self.state.num_processes
            if not cpu and config.model.device in ("auto", "cuda"):
                self.device = f"cuda:{self.state.local_process_index}"

    @property
    def first(self) -> bool:
        """Return whether this process writes and prints."""
        return self.rank == 0

    def shared(self, path: Path) -> Path:
        """Return the first process's path: the default holds the time, and clocks differ."""
        if self.state is None:
            return path
        from accelerate.utils import broadcast_object_list

        return Path(broadcast_object_list([str(path)])[0])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.patch", argv)


__all__ = ["Config", "cli", "main"]
