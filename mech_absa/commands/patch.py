"""`python -m mech_absa.patch`: from reviews to an importance map.

    python -m mech_absa.patch                                                    the bundled model on built-in reviews
    python -m mech_absa.patch --data reviews.csv --model gpt2 --out runs/mine    your data, your model
    accelerate launch --multi_gpu --num_processes 4 -m mech_absa.patch ...                   the same files, made by four processes

A run leaves `run.json` (all that is needed to make it again), `effects.parquet` (one row a pair and cell), `pairs.parquet`, `about.json`,
`importance.csv`, `sites.json`, `figures/` and `report.html`. It is written in parts while it goes on: a killed run is taken up with
`--resume` and ends in the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, DataError, choices
from ..examples import Examples
from ..model import BUNDLED, DTYPES, Model, load_model
from ..patch.corruption import (
    WORDS,
    Corruption,
    GaussianNoise,
    Lexicon,
    OpinionSwap,
    Resample,
    as_corruption,
)
from ..patch.effects import Effects, read_frame, write_frame
from ..patch.gradients import agreement
from ..patch.importance import ImportanceMap, Selection, traced_in
from ..patch.pairs import make_pairs
from ..patch.plan import Plan, plan
from ..patch.request import Request
from ..patch.self_check import self_check
from ..progress import bar
from ..prompts import PromptTemplate, Verbalizer
from ..readers import load_examples
from ..records import RunFolder
from ..sites import Site, parse_layers
from ..stats import ADJUSTMENTS, resolution, spelled_p
from .cli import command, reading, report, tell_left_out

UNRECORDED = ("out", "resume", "quiet")
"""Settings that say how a run is made, not what it is: two runs that differ in these leave the same bytes."""
FREE = ("device", "report", "figures")
"""Settings that are recorded, and may change when a run is resumed."""
CORRUPTIONS = tuple(WORDS)


@dataclass(frozen=True)
class Config:
    """Find which layer, token and component of a language model carry the sentiment of an aspect.

    Every example is run clean and corrupted; then one clean state at a time is put back into the corrupted run, and the effect on the
    probability of the right answer is measured, exactly, for every layer, token and component.
    """

    data: tuple[str, ...] = ("builtin:restaurant+laptop/test",)
    """Files, folders, hub data sets (hf:owner/name), or built-in reviews (builtin:restaurant/test); several are joined."""
    model: str = "bundled"
    """bundled, a local Hugging Face folder, or a hub name such as gpt2."""
    adapter: str = "auto"
    """A trained edit whose weights are merged before tracing (the paper traces the adapted model): a folder, bundled, or none. auto is
    bundled for the bundled model and none otherwise."""
    out: Path | None = None
    """Output folder, new or empty; default runs/patch-<time>."""
    limit: int | None = None
    """Trace at most this many pairs."""
    sample: int | None = None
    """Draw this many examples at random (by --seed) before anything else."""
    keep: str = "paper"
    """Which pairs are traced: paper (clean answer right, corrupted answer wrong), clean (clean answer right) or all."""
    corruption: str = "auto"
    """noise (Gaussian noise on the embeddings, the paper's), counterfactual (a minimal edit of the text; the data must have them), aspect-swap
    (the question asks about another aspect of the same sentence), opinion-swap (the opinion expression replaced from --lexicon), mean, zero or
    resample (ablations of the clean run). auto takes counterfactuals where all examples have them, and noise otherwise."""
    lexicon: tuple[str, ...] = ()
    """Training data with opinion spans, from which opinion-swap takes its expressions."""
    strict: bool = False
    """Stop at a prompt that is longer than the model reads, instead of dropping and counting it."""
    noise_scale: float = 3.0
    """Noise in standard deviations of the aspect terms' embeddings."""
    noise_draws: int = 10
    """Independent draws of the noise for every pair."""
    noise_span: str = "all"
    """Tokens that are noised: all (the paper), sentence, aspect or query."""
    sites: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    """Kinds of state (resid_pre, resid_mid, resid_post, attn_out, mlp_out, head; q, k, v by the loop), or single sites such as L5.head3."""
    layers: str = "all"
    """Layers to trace: 3, 2-5, 0,2-4, all, first, middle or last (thirds of the depth)."""
    by: str = "token"
    """token restores one token at a time and averages by role afterwards; role restores all tokens of a role together, at a tenth of the cost."""
    metric: str = "prob"
    """prob (P of the right label, the paper's), prob_label (among the labels only), logprob, logit_diff or kl."""
    direction: str = "denoise"
    """denoise puts clean states into the corrupted run; noise puts corrupted states into the clean run; both does both. Ablations are noise."""
    window: int = 1
    """Neighbouring layers restored together (ROME: 10 for attention and MLP)."""
    method: str = "exact"
    """exact, or an estimate from gradients, compared with an exact sample of cells: atp, atpstar, relp, ig."""
    steps: int = 16
    """Steps of integrated gradients."""
    rules: tuple[str, ...] = ("ln", "identity", "half")
    """Rules of RelP: ln, identity, half, pattern."""
    exact_top: int = 0
    """Of an estimate, compute this many leading cells of the map exactly afterwards."""
    control: int = 200
    """Cells computed exactly beside an estimate; in half precision, cells computed again in float32."""
    engine: str = "wavefront"
    """wavefront (all cells in one walk over the layers) or loop (one forward pass a cell)."""
    template: str = PromptTemplate().text
    """The question; must contain {sentence} and {aspect}."""
    labels: tuple[str, ...] = ("positive", "negative", "neutral")
    """Label words for positive, negative and neutral."""
    separator: str = " "
    """Between prompt and label; the paper's authors glue the label on ("")."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64. Metrics are float32 or wider whatever this says."""
    n_devices: int = 1
    """Spread the layers over this many accelerators."""
    memory: float | None = None
    """Budget in GiB for activations in flight; default half a GiB on a CPU, a third of an accelerator."""
    seed: int = 0
    """Of the noise, of samples, of the bootstrap and of the self-checks."""
    level: float = 0.95
    """Of the intervals."""
    adjustment: str = "maxt"
    """Of the p-values over all cells: maxt or holm (family-wise), bh or by (false discovery rate), or none."""
    select_kind: str | None = None
    """Kind of state that sites are chosen from; default resid_post."""
    select_width: int | None = None
    """Neighbouring layers chosen; default the paper's share of the depth, 6 of 32."""
    columns: tuple[str, ...] = ()
    """Names of columns or fields that are not recognised, such as aspect=Term polarity=Rating."""
    meaning: tuple[str, ...] = ()
    """What labels of the data mean that are not words, such as 0=negative 1=neutral 2=positive."""
    skip_bad: bool = False
    """Leave bad rows of the data out and count them, instead of stopping at the first."""
    null_targets: str = "drop"
    """Aspects that no words stand for (SemEval's NULL): drop, or category to ask about the category's words."""
    resume: bool = False
    """Take up a killed run of the same configuration."""
    figures: bool = True
    """Draw the figures."""
    report: bool = True
    """Write report.html."""
    quiet: bool = False
    """Print nothing but errors."""


def corruption_of(config: Config, examples: Examples) -> Corruption:
    """The corruption that the flags name.

    Raises:
        ConfigError: there is none of that name.
    """
    name = config.corruption
    if name == "auto":
        name = (
            "counterfactual"
            if len(examples) and all(e.counterfactuals for e in examples)
            else "noise"
        )
    if name == "noise":
        return GaussianNoise(config.noise_scale, config.noise_draws, config.noise_span, config.seed)
    if name == "resample":
        return Resample(config.seed)
    if name == "opinion-swap" and config.lexicon:
        training = [e for source in config.lexicon for e in load_examples(source)]
        return OpinionSwap(Lexicon.of(training), seed=config.seed)
    return as_corruption(name)


def read_data(config: Config) -> Examples:
    """All data named, joined, with what was left out."""
    parts = [
        load_examples(source, null_targets=config.null_targets, **reading(config))
        for source in config.data
    ]
    joined = parts[0]
    for more in parts[1:]:
        left = {
            k: joined.left_out.get(k, 0) + more.left_out.get(k, 0)
            for k in {**joined.left_out, **more.left_out}
        }
        joined = Examples(
            (*joined.items, *more.items), f"{joined.source} + {more.source}", joined.sha256 + more.sha256, left,
            joined.ambiguous + more.ambiguous, (*joined.problems, *more.problems),
        )  # fmt: skip
    ids = [e.id for e in joined]
    if len(set(ids)) < len(ids):
        raise DataError(f"{joined.source}: two examples have the same id; give every file once")
    return joined if config.sample is None else joined.sample(config.sample, config.seed)


def adapted(config: Config, model: Model) -> tuple[Model, str | None]:
    """The model with the adapter's weights merged, and the adapter's name."""
    from ..edits import load_edit
    from ..edits.store import BUNDLED_EDIT

    name = config.adapter
    if name == "auto":
        name = (
            "bundled"
            if model.source == str(BUNDLED) and (BUNDLED_EDIT / "edit.json").exists()
            else "none"
        )
    if name == "none":
        return model, None
    return load_edit(name, model).merged(model), name


def check_flags(config: Config) -> None:
    """What can be refused before anything is loaded."""
    for flag, value in (
        ("--limit", config.limit),
        ("--sample", config.sample),
        ("--select-width", config.select_width),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value} was given; it must be 1 or more")
    if config.memory is not None and not 2**-10 <= config.memory <= 2**20:
        raise ConfigError(
            f"--memory {config.memory:g} was given; accepted: GiB between 0.001 and 1048576"
        )
    if not 0 < config.level < 1:
        raise ConfigError(f"--level {config.level:g} was given; it must lie between 0 and 1")
    if config.adjustment not in ADJUSTMENTS:
        raise ConfigError(
            f"--adjustment {config.adjustment!r} is unknown; accepted: {choices(ADJUSTMENTS)}"
        )
    if config.dtype not in DTYPES:
        raise ConfigError(f"--dtype {config.dtype!r} is unknown; accepted: {choices(DTYPES)}")
    if len(config.labels) != 3:
        raise ConfigError(
            f"--labels was given {len(config.labels)} words; three are needed: for positive, negative and neutral"
        )
    if config.corruption not in ("auto", *CORRUPTIONS):
        raise ConfigError(
            f"--corruption {config.corruption!r} is unknown; accepted: {choices(['auto', *CORRUPTIONS])}"
        )
    if config.corruption == "opinion-swap" and not config.lexicon:
        raise ConfigError(
            "--corruption opinion-swap needs --lexicon with training data that marks opinion expressions"
        )
    if config.corruption in ("auto", "noise"):
        GaussianNoise(config.noise_scale, config.noise_draws, config.noise_span, config.seed)
    PromptTemplate(config.template)
    request_of(config)


def request_of(config: Config, layers: Sequence[int] | None = None) -> Request:
    """Return what the flags ask for.

    Raises:
        ConfigError, SiteError: a word or a number is not accepted.
    """
    return Request.parse(
        config.sites,
        layers=layers,
        by=config.by,
        metric=config.metric,
        direction=config.direction,
        window=config.window,
        method=config.method,
        steps=config.steps,
        rules=config.rules,
        exact_top=config.exact_top,
        engine=config.engine,
        memory=None if config.memory is None else config.memory * 2**30,
    )


def main(config: Config) -> Path | None:
    """Trace, and say where the result went."""
    check_flags(config)
    group = _Group(config)
    say = (
        (lambda *parts: None)
        if config.quiet or not group.first
        else (lambda *parts: print(*parts, flush=True))
    )
    out = config.out or Path("runs") / time.strftime("patch-%Y%m%d-%H%M%S")
    folder = RunFolder(
        out, {k: v for k, v in vars(config).items() if k not in UNRECORDED}, config.resume, FREE
    )
    if folder.finished:
        say(f"{out} already holds this run, whole; nothing to do")
        return out

    examples = read_data(config)
    if group.first:
        tell_left_out(examples)
    if not len(examples):
        raise DataError(f"{examples.source}: no example is left (left out: {examples.left_out})")
    template = PromptTemplate(config.template)
    verbalizer = Verbalizer.of(config.labels, config.separator)
    base = load_model(
        config.model, device=group.device, dtype=config.dtype, n_devices=config.n_devices
    )
    layers = parse_layers(config.layers, base.n_layers)
    for site in config.sites:
        if "." in site:
            base.check_site(Site.parse(site))
    model, adapter = adapted(config, base)
    verbalizer.label_ids(model.tokenizer, template)
    folder.bind({"data": examples.sha256, "model": model.sha256})
    say(
        f"{len(examples)} examples from {examples.source}; {model}"
        + (f", adapter {adapter}" if adapter else "")
    )
    pairs = make_pairs(
        model,
        examples,
        corruption_of(config, examples),
        template=template,
        verbalizer=verbalizer,
        keep=config.keep,
        limit=config.limit,
        strict=config.strict,
    )
    say(
        f"{len(pairs)} pairs kept of {pairs.considered}"
        + "".join(f"; {n} dropped: {reason}" for reason, n in pairs.dropped.items())
    )
    p = plan(model, pairs, request_of(config, layers))
    e = p.estimate()
    say(
        f"{e['cells']:,} cells by {e['engine']} in {e['batches']} batches; activations in flight up to {p.memory / 2**20:,.0f} MiB, "
        f"{e['pair_bytes'] / 2**20:,.1f} MiB a pair of {e['longest_prompt']} tokens"
    )
    cells_of_map = len(p.components) * len({r for q in pairs for r in q.clean.role_names})
    say(f"resolution: {resolution(pairs.sentences, cells_of_map, config.adjustment)}")
    if p.request.direction != config.direction:
        say(
            "an ablation has no corrupted run to restore: its states are put into the clean run (direction noise)"
        )
    if p.why_loop is not None:
        say(f"the plain loop runs instead of the wavefront: {p.why_loop}")

    if group.first:
        folder.open()
    group.wait()
    seconds = {"start": time.time()}
    checks = self_check(p, seed=config.seed) if group.first and config.method == "exact" else {}
    _sweep(p, folder, group, config)
    group.wait()
    if not group.first:
        return None
    effects = p.gather([read_frame(folder.part(_part(i))) for i in range(len(p.batches))])
    effects.about["self_checks"] = checks
    effects.about["adapter"] = adapter
    extra: dict[str, Any] = {}
    if config.method != "exact":
        extra["estimate_against_exact"] = compare_with_exact(
            p, effects, config.control, config.seed
        )
        say(
            f"against {extra['estimate_against_exact']['cells']} exact cells: {_spelled(extra['estimate_against_exact'])}"
        )
    elif config.dtype in ("bfloat16", "float16"):
        extra["half_precision_control"] = half_precision_control(p, effects, config)
        say(f"against float32: {_spelled(extra['half_precision_control'])}")
    effects.about.update(extra)
    return _finish(config, folder, effects, examples, model, base, checks, extra, seconds, say)


def _sweep(p: Plan, folder: RunFolder, group: _Group, config: Config) -> None:
    """This process's share of the batches, each written as soon as it is there."""
    mine = [i for i in range(len(p.batches)) if i % group.size == group.rank]
    todo = [i for i in mine if not folder.part(_part(i)).exists()]
    cells = {i: p.cells_of(i) for i in mine}
    with bar("tracing", sum(cells.values()), quiet=config.quiet or not group.first) as tick:
        tick(sum(cells[i] for i in mine if i not in todo))
        for index, frame in p.iterate(todo, tick):
            write_frame(frame, folder.part(_part(index)))


def _part(index: int) -> str:
    return f"effects-{index:06d}.parquet"


def compare_with_exact(p: Plan, effects: Effects, cells: int, seed: int) -> dict[str, Any]:
    """An estimate against the exact effects of cells drawn at random among those that are not zero for certain."""
    column = "estimate" if "estimate" in effects.frame else "effect"
    frame = effects.frame[effects.frame[column] != 0].sample(frac=1.0, random_state=seed)
    exact = p.exact(frame.head(cells))
    estimate = frame.head(cells)[column].to_numpy()
    return {"cells": len(exact), **agreement(exact, estimate, k=max(1, len(exact) // 10))}


def half_precision_control(p: Plan, effects: Effects, config: Config) -> dict[str, Any]:
    """The largest and mean difference to float32 on cells drawn at random."""
    from dataclasses import replace

    frame = (
        effects.frame[effects.frame["effect"] != 0]
        .sample(frac=1.0, random_state=config.seed)
        .head(config.control)
    )
    wide, _ = adapted(
        config,
        load_model(config.model, device=config.device, dtype="float32", n_devices=config.n_devices),
    )
    exact = replace(p, model=wide).exact(frame)
    difference = abs(exact - frame["effect"].to_numpy())
    return {
        "cells": len(frame),
        "largest_difference": float(difference.max(initial=0.0)),
        "mean_difference": float(difference.mean()) if len(frame) else 0.0,
    }


def _finish(
    config: Config, folder: RunFolder, effects: Effects, examples: Examples, model: Model, base: Model, checks: dict[str, Any],
    extra: dict[str, Any], seconds: dict[str, float], say: Any,
) -> Path:  # fmt: skip
    """Averages, choice of sites, files, figures, report, table."""
    importance = effects.importance(
        by="role", level=config.level, adjustment=config.adjustment, seed=config.seed
    )
    selection = _select(importance, config)
    effects.save(folder.path)
    importance.save(folder.path / "importance.csv")
    if selection is not None:
        selection.save(folder.path / "sites.json", traced_in(model, base, effects.about["adapter"]))
    if config.figures:
        from ..plots import save_trace_figures

        save_trace_figures(importance, folder.path / "figures", selection, effects)
    record = {
        "command": "patch", "model": {"name": model.name, "source": config.model, "adapter": effects.about["adapter"], "sha256": model.sha256,
        "hf_difference": model.hf_difference, "parameters": model.n_parameters},
        "data": examples.account(),
        "pairs": {k: effects.about[k] for k in ("considered", "kept", "dropped", "sigma", "draw_sd", "classes_kept", "mixed_polarity")},
        "engine": {"method": config.method, "cells": len(effects), "flops": effects.about["flops"]}, "self_checks": checks, **extra,
        "average_total_effect": float(effects.total.mean()), "sites": None if selection is None else str(selection),
        "device": str(model.device), "sweep_seconds": round(time.time() - seconds["start"], 3),
    }  # fmt: skip
    folder.finish(record, report(config))
    if not config.quiet:
        _print_table(importance, effects, selection)
        say(
            f"\n{len(effects):,} effects of {len(effects.pairs)} pairs in {time.time() - seconds['start']:.1f} s"
        )
        for name in (
            "report.html",
            "figures",
            "importance.csv",
            "sites.json",
            "effects.parquet",
            "run.json",
        ):
            if (folder.path / name).exists():
                say(f"  {folder.path / name}")
    return folder.path


def _select(importance: ImportanceMap, config: Config) -> Selection | None:
    kinds = set(importance.table["kind"])
    if config.select_kind is None and not kinds - {"head", "q", "k", "v"}:
        return None  # heads have no neighbouring layers to choose
    return importance.select(config.select_kind, width=config.select_width, seed=config.seed)


def _print_table(importance: ImportanceMap, effects: Effects, selection: Selection | None) -> None:
    from rich.console import Console
    from rich.table import Table

    about = importance.about
    total = effects.total.mean()
    title = (
        f"Average indirect effect ({about['direction']}, {about['corruption']}, {about['unit']})"
    )
    if total == total:
        title += f"; average total effect {total:.4g}"
    table = Table(title=title, title_justify="left")
    for name in ("site", "AIE", f"{about['level']:.0%} interval", "p (adjusted)", "n"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for _, row in importance.top(10).iterrows():
        table.add_row(
            row["site"],
            f"{row['aie']:.4g}",
            f"{row['ci_low']:.4g} to {row['ci_high']:.4g}",
            spelled_p(row["p_adjusted"], importance.about.get("p_floor", 0.0)),
            str(int(row["n"])),
        )
    console = Console()
    console.print(table)
    if selection is not None:
        console.print(
            f"sites chosen: {selection}\n  by the rule: {selection.rule}",
            highlight=False,
            markup=False,
        )


def _spelled(record: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in record.items() if isinstance(v, float))


class _Group:
    """The processes of `accelerate launch`; one process where there is no launcher."""

    def __init__(self, config: Config):
        self.state = None
        self.rank, self.size = 0, 1
        self.device = config.device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            cpu = config.device == "cpu" or not torch.cuda.is_available()
            self.state = PartialState(cpu=cpu)
            self.rank, self.size = self.state.process_index, self.state.num_processes
            if not cpu and config.device in ("auto", "cuda"):
                self.device = f"cuda:{self.state.local_process_index}"

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()


def cli(argv: Sequence[str] | None = None) -> int:
    return command(Config, main, "mech_absa.patch", argv)


__all__ = ["Config", "cli", "main"]
