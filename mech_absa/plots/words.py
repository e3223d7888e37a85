"""Words for figures, reports and cards: what was measured, how runs were corrupted, and in which
direction.

Every function takes the `about` of effects or of an importance map, or an object that reads like
that mapping.
"""

from __future__ import annotations

import textwrap

from ..records import About

SEPARATOR = "  ·  "
KIND_WORDS = {
    "resid_pre": "residual stream before the layer", "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream after the layer", "attn_out": "attention output", "mlp_out": "MLP output",
    "head": "attention head (z)", "q": "query", "k": "key", "v": "value",
}  # fmt: skip
SPAN_WORDS = {
    "all": "all tokens",
    "sentence": "the sentence",
    "aspect": "the aspect in the sentence",
    "query": "the aspect in the question",
}

CORRECTIONS = {
    "maxt": "max-T correction",
    "bootstrap": "bootstrap max-t correction",
    "holm": "Holm correction",
    "bh": "Benjamini-Hochberg correction",
    "by": "Benjamini-Yekutieli correction",
}
"""Adjustment of p-values over cells -> its name."""


def corruption_words(about: About) -> str:
    """Say how corrupted runs were made: `Gaussian noise on all tokens, 3 sd, mean of 10 draws`."""
    name, settings = str(about.get("corruption", "")), about.get("corruption_settings") or {}
    if name == "GaussianNoise":
        span = SPAN_WORDS.get(str(settings.get("span", "all")), str(settings.get("span")))
        draws = int(settings.get("draws", 1))
        repeats = "1 draw" if draws == 1 else f"mean of {draws} draws"
        return f"Gaussian noise on {span}, {settings.get('scale', 0):g} sd, {repeats}"
    if name == "MeanAblation":
        role = settings.get("by", "role") == "role"
        return f"states replaced by their mean over {'tokens of the same role' if role else 'all tokens'}"
    return {
        "Counterfactual": "minimal edit of the text with another polarity",
        "ZeroAblation": "states replaced by zero",
        "Resample": "states replaced by those of another example",
        "SpanAlignment": "another prompt, aligned by named spans",
    }.get(name, name or "unknown corruption")


def direction_words(about: About) -> str:
    """Say which states were put into which run."""
    ablations = ("MeanAblation", "ZeroAblation", "Resample", "SpanAlignment")
    if str(about.get("corruption", "")) in ablations:
        return "noise: states of the clean run are replaced"
    return {
        "denoise": "denoise: clean states restored in the corrupted run",
        "noise": "noise: corrupted states put into the clean run",
        "both": "both directions",
    }.get(str(about.get("direction")), str(about.get("direction", "")))


def method_words(about: About) -> str:
    """Say how effects were computed: exactly, or by which estimate."""
    steps = about.get("steps")
    method = str(about.get("method", "exact"))
    return {
        "exact": "exact",
        "atp": "estimate: attribution patching",
        "atpstar": "estimate: AtP*",
        "relp": "estimate: RelP",
        "ig": f"estimate: integrated gradients{f', {steps} steps' if steps else ''}",
    }.get(method, method)


def facts(about: About, n: int | None = None) -> str:
    """Return the lines under a title: model, number of pairs, method, corruption, direction."""
    n = about.get("n_pairs", about.get("kept")) if n is None else n
    window = int(about.get("window") or 1)
    parts = [
        f"model {about.get('model')}" if about.get("model") else "",
        f"n = {n} pairs" if n is not None else "",
        f"windows of {window} layers" if window > 1 else "",
        method_words(about),
    ]
    first = SEPARATOR.join(p for p in parts if p)
    return f"{first}\n{corruption_words(about)}{SEPARATOR}{direction_words(about)}"


def effect_label(about: About, name: str = "AIE") -> str:
    """Return the label of an axis of effects with its unit, in lines short enough for a panel."""
    unit = str(about.get("unit") or about.get("metric") or "metric")
    return "\n".join(textwrap.wrap(f"{name} ({unit})", 26))


def shown(token: str) -> str:
    """Return a token as an axis can show it: line ends and tabs visible, a leading blank dropped."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "")
    return text.strip(" ▁Ġ") or "␣"


def short(text: str, length: int) -> str:
    """Cut a text to a length, with an ellipsis where something is cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
