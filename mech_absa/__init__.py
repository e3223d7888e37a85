"""mech_absa: trace which activations carry the sentiment of an aspect in a language model, train
low-rank edits at chosen places, and measure what they change.

    import mech_absa as ma
    model    = ma.load_model()
    examples = ma.load_examples("builtin:restaurant/test")
    pairs    = ma.make_pairs(model, examples, ma.GaussianNoise(scale=3.0, draws=10))
    effects  = ma.trace(model, pairs, sites=("resid_post", "attn_out", "mlp_out"))
    importance = effects.importance(by="role")
    edit     = ma.fit(model, train, ma.presets.paper(importance.select()))
    scores   = ma.evaluate(model, test, edit)

Names are imported when they are first used, so that reading and checking data needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .edits import Edit, load_edit, save_edit
    from .errors import MechAbsaError
    from .evaluate import Scores, compare, evaluate, predict, read_predictions
    from .examples import (
        Example,
        Examples,
        Polarity,
        class_counts,
        duplicates,
        leakage,
        mixed_polarity,
        split_by_sentence,
    )
    from .explore import Explorer, explore
    from .model import Model, load_model
    from .own import PromptPair, PromptPairs
    from .patch.corruption import (
        AspectSwap,
        Counterfactual,
        GaussianNoise,
        Lexicon,
        MeanAblation,
        OpinionSwap,
        Resample,
        ZeroAblation,
    )
    from .patch.directions import BothDirections
    from .patch.effects import Effects
    from .patch.importance import ImportanceMap, Selection, load_sites
    from .patch.own import prompt_pairs
    from .patch.pairs import Pair, Pairs, make_pairs
    from .patch.trace import trace
    from .prompts import Prompt, PromptTemplate, Tokens, Verbalizer
    from .readers import load_examples, write_jsonl
    from .readers.own import load_prompt_pairs
    from .report import write_report
    from .sites import ROLES, Site
    from .train import Preset, fit, presets
    from .widgets import attention

_HOMES = {
    "edits": ("Edit", "load_edit", "save_edit"),
    "errors": ("MechAbsaError",),
    "evaluate": ("Scores", "compare", "evaluate", "predict", "read_predictions"),
    "examples": (
        "Example",
        "Examples",
        "Polarity",
        "class_counts",
        "duplicates",
        "leakage",
        "mixed_polarity",
        "split_by_sentence",
    ),
    "explore": ("Explorer", "explore"),
    "model": ("Model", "load_model"),
    "patch.corruption": (
        "AspectSwap",
        "Counterfactual",
        "GaussianNoise",
        "Lexicon",
        "MeanAblation",
        "OpinionSwap",
        "Resample",
        "ZeroAblation",
    ),
    "own": ("PromptPair", "PromptPairs"),
    "patch.own": ("prompt_pairs",),
    "patch.pairs": ("Pair", "Pairs", "make_pairs"),
    "patch.directions": ("BothDirections",),
    "patch.effects": ("Effects",),
    "patch.importance": ("ImportanceMap", "Selection", "load_sites"),
    "patch.trace": ("trace",),
    "prompts": ("Prompt", "PromptTemplate", "Tokens", "Verbalizer"),
    "readers": ("load_examples", "write_jsonl"),
    "readers.own": ("load_prompt_pairs",),
    "report": ("write_report",),
    "widgets": ("attention",),
    "sites": ("ROLES", "Site"),
    "train": ("Preset", "fit", "presets"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(
            f"mech_absa has no name {name!r}; public names are {', '.join(__all__)}"
        )
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = (
        value  # importing the package `evaluate` must not shadow the function of that name
    )
    return value


def __dir__() -> list[str]:
    return __all__
