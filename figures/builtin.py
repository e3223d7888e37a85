"""List the studies of the bundled model, one function for each.

The first chooses the traced sites, which all others edit. `FAST` has the sizes of a trial.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mech_absa.world import DOMAINS

from .keep import (
    ESTIMATES,
    METRICS,
    keep_curves,
    keep_directions,
    keep_estimates,
    keep_map,
    keep_matrix,
    keep_trace,
)
from .plan import CIRCUIT, TRACED, Plan, Step, flags, matrix_step, trace_step

REAL_DOMAINS = ("device", "laptop", "rest", "service")
REAL = ("trace_real", "matrix_real")
"""Studies of the paper's data."""
N_LAYERS = 8
"""Layers of the bundled model."""
ALL_KINDS = ("resid_post", "attn_out", "mlp_out", "head")
POSITIONS = {
    "query.last": "aspect in the question",
    "aspect.last": "aspect in the sentence",
    "answer": "last word",
    "after": "words after the aspect",
    "8": "some word of the sentence",
    "2": "a word of the template",
}
"""Position at which a representation is edited -> its description; numbers count from the start of
the prompt.
"""
RANKS = (1, 2, 4, 8, 16)
METHODS = (
    "zero_shot", "both@sites", "both@first", "both@last", "both@random", "both@all", "lora_o@sites",
    "loreft@sites", "loreft@all", "lora@all", "dora@all", "prefix@all", "adapter@all", "bitfit@all",
    "red@sites",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Hold the sizes of all studies, and the flags that follow from them."""

    noise: int = 60
    """Pairs of the trace with noise on all tokens: ten draws of a whole prompt each."""
    pairs: int = 200
    """Pairs of the trace with counterfactuals."""
    estimates: int = 40
    """Pairs on which estimates are compared with exact effects."""
    interaction: int = 60
    """Pairs that are traced in both directions."""
    real_pairs: int = 30
    """Pairs of the trace of real reviews."""
    train: int = 320
    """Training examples per domain where methods are compared."""
    few: int = 128
    """The same where places are compared: few, so that the best do not all answer everything."""
    real_train: int | None = None
    test: int | None = 320
    """Test examples per built-in domain."""
    real_test: int | None = None
    epochs: int = 2
    few_epochs: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    many_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of studies that train on one domain only."""
    domains: tuple[str, ...] = tuple(DOMAINS)
    widths: tuple[int, ...] = (2, 4)
    """Widths of the ranges of layers that are edited."""
    circuit: int = 100
    """Pairs and examples on which a ranking is judged."""

    @cached_property
    def train_files(self) -> tuple[str, ...]:
        """Return the training part of every domain."""
        return tuple(f"builtin:{d}/train" for d in self.domains)

    @cached_property
    def test_files(self) -> tuple[str, ...]:
        """Return the test part of every domain."""
        return tuple(f"builtin:{d}/test" for d in self.domains)

    @cached_property
    def small(self) -> dict[str, Any]:
        """Return the flags of trainings on few examples."""
        sizes = {"limit_train": self.few, "limit_test": self.test, "epochs": self.few_epochs}
        return {**sizes, "validation": 0}


FAST = Sizes(
    noise=2, pairs=6, estimates=3, interaction=3, real_pairs=2, train=24, few=24, real_train=24,
    test=24, real_test=24, epochs=1, few_epochs=1, seeds=(0,), many_seeds=(0,),
    domains=tuple(DOMAINS)[:2], widths=(2,), circuit=4,
)  # fmt: skip


def plans(sizes: Sizes, me_absc: Path | None = None) -> list[Plan]:
    """Return all studies, that of the traced sites first; those of real data only if their folder
    is given.
    """
    built_in = (
        traced, trace_noise, matrix, windows_alone, ranges, positions, ranks, estimates,
        interaction, circuit,
    )  # fmt: skip
    made = [study(sizes) for study in built_in]
    if me_absc is not None:
        made += [trace_real(sizes, me_absc), matrix_real(sizes, me_absc)]
    return made


def windows(width: int, n_layers: int = N_LAYERS) -> list[str]:
    """Return every run of `width` neighbouring layers, as `2-3` (or `2`)."""
    return [str(i) if width == 1 else f"{i}-{i + width - 1}" for i in range(n_layers - width + 1)]


# ---- where it is decided -------------------------------------------------------------------------


def traced(s: Sizes) -> Plan:
    step = trace_step(
        "trace", data=s.test_files[0], corruption="counterfactual", limit=s.pairs, sites=ALL_KINDS
    )
    return Plan(
        TRACED,
        "Which states tell two polarities apart: attention, MLP, heads, residual stream, by "
        "minimal edits of the text?",
        (step,),
        keep_trace,
    )


def trace_noise(s: Sizes) -> Plan:
    step = trace_step("trace", data=s.test_files[0], corruption="noise", limit=s.noise)
    return Plan(
        "trace_noise",
        "Figure 3 of the paper: which states bring the answer back when all tokens are noised?",
        (step,),
        keep_trace,
    )


def estimates(s: Sizes) -> Plan:
    steps = tuple(
        trace_step(
            f"{metric}_{method}", data=s.test_files[0], corruption="counterfactual",
            limit=s.estimates, method=method, metric=metric, sites=ALL_KINDS,
        )
        for metric in METRICS
        for method in ("exact", *ESTIMATES)
    )  # fmt: skip
    return Plan(
        "estimates",
        "How far are estimates from gradients (AtP, AtP*, RelP, integrated gradients) from the "
        "exact map of the same pairs?",
        steps,
        keep_estimates,
    )


def interaction(s: Sizes) -> Plan:
    steps = tuple(
        trace_step(
            f"{metric}_{direction}", data=s.test_files[0], corruption="counterfactual",
            limit=s.interaction, by="role", metric=metric, direction=direction, sites=ALL_KINDS,
        )
        for metric in METRICS
        for direction in ("denoise", "noise")
    )  # fmt: skip
    return Plan(
        "interaction",
        "Does the direction matter? The same pairs with clean states restored and with corrupted "
        "states put in, and the difference.",
        steps,
        keep_directions,
    )


def circuit(s: Sizes) -> Plan:
    second = s.test_files[1]
    words = flags(importance="{sites}", data=second, limit=s.circuit, examples=s.test)
    return Plan(
        "circuit",
        "Do the best-ranked heads and MLPs alone give the answer, and can the worst be removed? "
        "Ranked on one domain, judged on another.",
        (Step("circuit", CIRCUIT, (*words, "--quiet"), {}),),
        keep_curves,
    )


# ---- where an edit helps -------------------------------------------------------------------------


def matrix(s: Sizes) -> Plan:
    steps = (
        matrix_step(
            f"seed{seed}", s.train_files, s.test_files, methods=METHODS, seeds=seed,
            sites="{sites}", epochs=s.epochs, limit_train=s.train, limit_test=s.test,
        )
        for seed in s.seeds
    )  # fmt: skip
    return Plan(
        "matrix",
        "Tables 2 and 3: every method at the traced sites and elsewhere, trained on each domain "
        "and tested on all.",
        tuple(steps),
        keep_matrix,
    )


def windows_alone(s: Sizes) -> Plan:
    steps = (
        matrix_step(
            f"{method}{width}", s.train_files[:1], s.test_files[:1], seeds=s.many_seeds,
            methods=[f"{method}@{w}" for w in windows(width)], **s.small,
        )
        for method in ("both", "lora_o", "loreft")
        for width in (1, 2)
    )  # fmt: skip
    return Plan(
        "windows",
        "Does tracing tell where to edit? Every layer and every two neighbours edited alone, with "
        "few training examples.",
        tuple(steps),
        keep_matrix,
    )


def ranges(s: Sizes) -> Plan:
    every = [f"0-{N_LAYERS - 1}", *(w for width in s.widths for w in windows(width))]
    steps = (
        matrix_step(
            f"seed{seed}", s.train_files, s.test_files, methods=[f"both@{r}" for r in every],
            seeds=seed, **s.small,
        )
        for seed in s.seeds[:2]
    )  # fmt: skip
    return Plan(
        "ranges",
        "Figure 4: accuracy over all domain pairs against the range of edited layers.",
        tuple(steps),
        keep_matrix,
    )


def positions(s: Sizes) -> Plan:
    steps = (
        matrix_step(
            at.replace(".", "_"), s.train_files, s.test_files, {"position": at, "place": what},
            methods=("both@{layers}", "loreft@{layers}"), positions=at, seeds=s.seeds, **s.small,
        )
        for at, what in POSITIONS.items()
    )  # fmt: skip
    return Plan(
        "positions",
        "Figure 5: accuracy against the token that is edited, with the weight part and without.",
        tuple(steps),
        keep_matrix,
    )


def ranks(s: Sizes) -> Plan:
    steps = (
        matrix_step(
            f"rank{r}", s.train_files, s.test_files, {"rank": r}, methods=("both@{layers}",),
            rank=r, seeds=s.seeds, **s.small,
        )
        for r in RANKS
    )  # fmt: skip
    return Plan(
        "ranks",
        "How large must the edit be, and which class needs it?",
        tuple(steps),
        keep_matrix,
    )


# ---- the paper's data ----------------------------------------------------------------------------


def trace_real(s: Sizes, me_absc: Path) -> Plan:
    data = str(me_absc / "laptop_test.json")
    step = trace_step("trace", data=data, corruption="noise", limit=s.real_pairs)
    return Plan(
        "trace_real",
        "Figure 3 on the paper's laptop reviews: noise on all tokens.",
        (step,),
        keep_map,
    )


def matrix_real(s: Sizes, me_absc: Path) -> Plan:
    train, test = (
        [str(me_absc / f"{d}_{part}.json") for d in REAL_DOMAINS] for part in ("train", "test")
    )
    steps = (
        matrix_step(
            f"seed{seed}", train, test, methods=("zero_shot", "both@sites", "lora@all", "loreft@all"),
            seeds=seed, sites="{sites}", limit_train=s.real_train, limit_test=s.real_test,
            epochs=s.epochs,
        )
        for seed in s.seeds
    )  # fmt: skip
    return Plan(
        "matrix_real",
        "Tables 2 and 3 on the paper's data: four domains, sixteen pairs.",
        tuple(steps),
        keep_matrix,
    )
