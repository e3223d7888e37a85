"""Pictures of tokens for notebooks, by CircuitsVis, without a network.

    coloured_tokens(tokens, values)     a prompt whose tokens carry numbers
    attention(model, example)           the attention patterns of every head of a layer
    patterns(model, example, layer)     the same as numbers

CircuitsVis 1.43 looks for the internet whenever one of its pictures is shown, and then loads its script from a content network; offline it
falls back to a copy of the script inside the package. Here that copy is always taken, so that a notebook shows the same picture on a train
and in ten years.

The copy weighs 1.3 MB and goes into every output that a notebook keeps, and readers on the web run no scripts. So a still picture stands
where the script will draw: it is what shows until then, and all that is left after `without_script`.
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

from .errors import ConfigError, SiteError

if TYPE_CHECKING:
    from .examples import Example
    from .model import Model
    from .prompts import PromptTemplate

NEGATIVE, POSITIVE = "#2f79b5", "#c94741"


@dataclass(frozen=True)
class Widget:
    """A piece of HTML that a notebook shows; the whole of it, script included, is in `html`."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"Widget({len(self.html):,} characters of HTML; the last expression of a notebook cell shows it)"


_CALL = "\n    CircuitsVis.render(\n"
"""Where the package's script ends and the data begins."""


def without_script(html: str) -> str:
    """A widget's HTML with its still picture alone; HTML that is no widget's comes back as it was."""
    return re.sub(r"<script\b.*</script>", "", html, flags=re.DOTALL) if _CALL in html else html


def _offline(rendered: Any, still: str) -> Widget:
    """A CircuitsVis picture with the package's own copy of the script; the data in it can neither end the script nor open a comment.

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
    """Tokens coloured by a number each: red above 0, blue below, hover for the number.

    Args:
        tokens: texts.
        values: one a token; NaN counts as 0.

    Raises:
        ConfigError: there are not as many values as tokens.
    """
    from circuitsvis.tokens import colored_tokens

    numbers = np.nan_to_num(np.asarray(values, dtype=float))
    if numbers.shape != (len(tokens),):
        raise ConfigError(
            f"{len(tokens)} tokens came with values of shape {numbers.shape}; one number a token is needed"
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


def _tint(share: float) -> str:
    """White towards red for 0 to 1, towards blue for 0 to -1."""
    colour = POSITIVE if share > 0 else NEGATIVE
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + abs(share) * (part - 255)):02x}" for part in parts)


def patterns(
    model: Model, example: Example, layer: int | None = None, template: PromptTemplate | None = None
) -> tuple[list[str], Float[np.ndarray, "head query key"]]:
    """The tokens of an example's prompt, and how much every head of a layer lets each of them read from each.

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
    point = model.hooked.mod_dict[f"blocks.{layer}.attn.hook_pattern"]
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
    """The attention patterns of all heads of a layer on the prompt of an example: hover to look, click to keep a head large.

    Args:
        model, example, layer, template: as in `patterns`.

    Raises:
        SiteError: the model has no such layer.
    """
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
    """One head's pattern as a small picture, a pixel for each pair of tokens."""
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
