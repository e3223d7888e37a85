"""Show pictures of tokens in notebooks, by CircuitsVis, without a network.

    prompt_effects(effects, id)       one prompt of a trace, its tokens coloured by effect
    coloured_tokens(tokens, values)   a prompt whose tokens carry numbers
    attention(model, example)         the attention patterns of every head of a layer
    patterns(model, example, layer)   the same as numbers

CircuitsVis 1.43 loads its script from a content network if it finds one, and otherwise uses a copy
inside the package. Here the copy is always used, so a notebook shows the same picture offline and
in ten years.

The copy weighs 1.3 MB and goes into every output that a notebook keeps, and web readers run no
scripts. So a still picture stands where the script will draw. It shows until the script runs, and
it is all that is left after `without_script`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from .errors import ConfigError, DataError, SiteError, choices
from .words import expect

if TYPE_CHECKING:
    from .examples import Example
    from .model import Model
    from .patch.effects import Effects
    from .prompts import PromptTemplate

NEGATIVE, POSITIVE = "#2f79b5", "#c94741"


@dataclass(frozen=True)
class Widget:
    """Hold a piece of HTML that a notebook shows; `html` is all of it, script included."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Widget({len(self.html):,} characters of HTML; the last expression of a notebook cell shows it)"


def _titled(widget: Widget, above: str, below: str) -> Widget:
    """Return a widget with HTML above and below its picture, on the same white ground."""
    ground = "background:#fff;color:#1a1a1a;padding:.5rem;font-family:sans-serif"
    return Widget(f'<div style="{ground}">{above}{widget.html}{below}</div>')


_CALL = "\n    CircuitsVis.render(\n"
"""Where the package's script ends and the data begins."""


def without_script(html: str) -> str:
    """Return a widget's HTML with only its still picture; other HTML comes back as it was."""
    return re.sub(r"<script\b.*</script>", "", html, flags=re.DOTALL) if _CALL in html else html


def _offline(rendered: Any, still: str) -> Widget:
    """Return a CircuitsVis picture with the package's own copy of the script.

    The data in it can neither end the script nor open a comment.

    Args:
        rendered: from CircuitsVis.
        still: HTML that stands there until the script has drawn, and where none runs.

    Raises:
        ConfigError: another version of CircuitsVis writes its pictures otherwise.
    """
    html: str = rendered.local_src
    script, call, data = html.rpartition(_CALL)
    found = re.search(r'id="(circuits-vis-[^"]+)"', script)
    if not call or not found:
        raise ConfigError(
            "this version of circuitsvis writes pictures in another form; circuitsvis 1.43 is needed"
        )
    data, end, rest = data.rpartition("</script>")
    data = data.replace(found[1], "ID").replace("<", "\\u003c")
    # The id is the package's random one; here it follows from the data, so that a notebook run again does not change.
    name = "circuits-vis-" + hashlib.sha256(data.encode()).hexdigest()[:13]
    script = script.replace(found[1], name).replace(
        ';"/>\n', f';">{still}</div>\n', 1
    )  # a div cannot close itself
    data = data.replace('"ID"', f'"{name}"', 1)
    return Widget(
        f'<div style="background:#fff;color:#1a1a1a;padding:.5rem;overflow-x:auto">{script}{call}{data}{end}{rest}</div>'
    )


def coloured_tokens(tokens: Sequence[str], values: Sequence[float | int] | np.ndarray) -> Widget:
    """Return tokens coloured by one number each: red above 0, blue below, hover for the number.

    Args:
        tokens: texts.
        values: one per token; NaN counts as 0.

    Raises:
        ConfigError: there are not as many values as tokens.
    """
    from circuitsvis.tokens import colored_tokens

    numbers = np.nan_to_num(np.asarray(values, dtype=float))
    if numbers.shape != (len(tokens),):
        raise ConfigError(
            f"{len(tokens)} tokens came with values of shape {numbers.shape}; one number per token is needed"
        )
    limit = float(np.abs(numbers).max(initial=0.0)) or 1.0
    colours = {"negative_color": NEGATIVE, "positive_color": POSITIVE}
    spans = (
        f'<span style="background:{_tint(v / limit)};white-space:pre-wrap" title="{v:.4g}">{escape(t)}</span>'
        for t, v in zip(tokens, numbers.tolist(), strict=True)
    )
    still = f'<div style="line-height:1.9;font-family:sans-serif">{"".join(spans)}</div>'
    texts = [escape(t, quote=False) for t in tokens]  # CircuitsVis reads a token as HTML
    return _offline(
        colored_tokens(texts, numbers.tolist(), min_value=-limit, max_value=limit, **colours), still
    )


def prompt_effects(effects: Effects, example_id: str, kind: str | None = None) -> Widget:
    """Return the prompt of one pair, its tokens coloured by their largest effect over layers, with
    title, scale and caption.

    Effects that were traced by role belong to all tokens of the role together: then a table below
    gives one number per role, and the caption says that its tokens share it.

    Args:
        effects: from a trace.
        example_id: of a pair.
        kind: of state; default the first that was traced.

    Raises:
        DataError: the example or the kind was not traced.
    """
    rows = effects.example(example_id)
    kinds = list(rows["kind"].unique())
    kind = kind or str(kinds[0])
    if kind not in kinds:
        raise DataError(
            f"example {example_id!r} has no effects of kind {kind!r}; it was traced at {choices(kinds)}"
        )
    rows = rows[rows["kind"] == kind]
    pair = effects.pairs.set_index("example_id").loc[example_id]
    tokens, about = [str(t) for t in pair["tokens"]], effects.about
    single = bool((rows["position"].fillna(-1) >= 0).any())
    by, places = ("position", range(len(tokens))) if single else ("role", pair["roles"])
    best = rows.groupby(by, observed=True)["effect"].max()
    values = np.array([float(best.get(p, 0.0)) for p in places])
    unit = str(about.get("unit") or about.get("metric") or "metric")
    corrupted = (
        "" if np.isnan(float(pair["corrupted"])) else f", corrupted run {pair['corrupted']:.3g}"
    )
    title = (
        f"<b>{escape(str(pair['aspect']))}: {escape(str(pair['polarity']))}</b> · {escape(kind)}, largest effect over layers"
        f"<br><small>{escape(unit)}: clean run {pair['clean']:.3g}{corrupted}; pair {escape(example_id)}</small>"
    )
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    caption = "Red: the state carries the answer. Blue: it works against it. Point at a token for its number."
    table = ""
    if not single:
        caption = (
            "Effects are by role: all tokens of a role were restored together, so they share one number. "
            + caption
        )
        table = _role_table([str(r) for r in pair["roles"]], best.to_dict(), limit)
    below = f"{_scale_bar(limit, unit)}{table}<p><small>{caption}</small></p>"
    return _titled(coloured_tokens(tokens, values), title, below)


def _scale_bar(limit: float, unit: str) -> str:
    """Return the colours of a scale from -limit to limit, with their numbers."""
    stops = f"{NEGATIVE},#ffffff,{POSITIVE}"
    bar = f"display:inline-block;width:150px;height:10px;background:linear-gradient(90deg,{stops});border:1px solid #d0d4da"
    return f'<div><small>{-limit:.3g} <span style="{bar}"></span> {limit:.3g} {escape(unit)}</small></div>'


def _role_table(roles: Sequence[str], effect: dict[str, float], limit: float) -> str:
    """Return one row per role of a prompt: its name, its number of tokens, its effect."""
    lines = "".join(
        f'<tr><td>{escape(role)}</td><td style="text-align:right">{roles.count(role)}</td>'
        f'<td style="text-align:right;background:{_tint(effect.get(role, 0.0) / limit)}">{effect.get(role, 0.0):.4f}</td></tr>'
        for role in dict.fromkeys(roles)
    )
    return f"<table><tr><th>role</th><th>tokens</th><th>effect</th></tr>{lines}</table>"


def _tint(share: float) -> str:
    """Return a colour from white to red for 0 to 1, and to blue for 0 to -1."""
    colour = POSITIVE if share > 0 else NEGATIVE
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + abs(share) * (part - 255)):02x}" for part in parts)


def patterns(
    model: Model, example: Example, layer: int | None = None, template: PromptTemplate | None = None
) -> tuple[list[str], Float[np.ndarray, "head query key"]]:
    """Return the tokens of an example's prompt, and how much every head of a layer lets each of
    them read from each.

    Args:
        model: from `load_model`.
        example: its prompt is run once.
        layer: from 0; default the middle one.
        template: default the paper's.

    Raises:
        SiteError: the model has no such layer.
    """
    import torch

    from .model.hooks import hooked_at
    from .scoring import question

    layer = model.n_layers // 2 if layer is None else layer
    if not 0 <= layer < model.n_layers:
        raise SiteError(
            f"the attention of layer {layer} was asked for; {model.name} has layers 0 to {model.n_layers - 1}"
        )
    ids = question(model, example, template).ids
    seen: list[torch.Tensor] = []
    point = model.point(layer, "pattern")
    with (
        hooked_at(
            [(point, lambda pattern: seen.append(pattern[0].detach().float().cpu()))],
            times=1,
            what="the hook of a pattern",
        ),
        torch.inference_mode(),
    ):
        model.forward(ids)
    return [model.tokenizer.decode([i]) for i in ids[0].tolist()], seen[0].numpy()


def attention(
    model: Model, example: Example, layer: int | None = None, template: PromptTemplate | None = None
) -> Widget:
    """Show the attention patterns of all heads of a layer on the prompt of an example.

    Hover to look, click to keep a head large.

    Args:
        model, example, layer, template: as in `patterns`.

    Raises:
        SiteError: the model has no such layer.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> example = ma.Example("The food was great.", "food", ma.Polarity.POSITIVE, (4, 8))
        >>> widget = ma.attention(model, example, layer=3)
        >>> "attention" in widget._repr_html_().lower()
        True
    """
    from .examples import Example
    from .model import Model

    expect(model, Model, "attention(model=...)", "a Model, from load_model()")
    expect(example, Example, "attention(example=...)", "one Example, from load_examples(...)")
    from circuitsvis.attention import attention_heads

    texts, pattern = patterns(model, example, layer, template)
    layer = model.n_layers // 2 if layer is None else layer
    names = [f"L{layer}H{h}" for h in range(len(pattern))]
    still = "".join(_thumbnail(name, head) for name, head in zip(names, pattern, strict=True))
    still = (
        f'<div>{still}<p style="font:0.8em sans-serif">Rows are tokens that read, columns tokens that are read, first token top left; '
        "darker is more. With its script this picture is alive: hover to look, click to enlarge a head.</p></div>"
    )
    return _offline(
        attention_heads(
            pattern.round(4), texts, names, max_value=1.0, min_value=-1.0, mask_upper_tri=True
        ),
        still,
    )


def _thumbnail(name: str, pattern: Float[np.ndarray, "query key"]) -> str:
    """Return one head's pattern as a small picture, one pixel per pair of tokens."""
    from matplotlib.image import imsave

    png = io.BytesIO()
    undated: Any = {"Software": None}
    imsave(png, pattern, cmap="Blues", vmin=0.0, vmax=1.0, format="png", metadata=undated)
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return (
        '<figure style="display:inline-block;margin:0 .8em .4em 0"><figcaption style="font:0.8em sans-serif">'
        f'{name}</figcaption><img src="{source}" alt="attention pattern of {name}" width="150" height="150" '
        'style="image-rendering:pixelated;border:1px solid #d0d4da"></figure>'
    )
