"""Pictures of tokens for notebooks, by CircuitsVis, without a network.

    coloured_tokens(tokens, values)     a prompt whose tokens carry numbers
    attention(model, example)           the attention patterns of every head, by layer

CircuitsVis 1.43 looks for the internet whenever one of its pictures is shown, and then loads its script from a content network; offline it
falls back to a copy of the script inside the package. Here that copy is always taken, so that a notebook shows the same picture on a train
and in ten years. The copy weighs 1.3 MB and goes into every output that a notebook keeps.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, SiteError

if TYPE_CHECKING:
    from .examples import Example
    from .models import Model
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


def _offline(rendered: Any) -> Widget:
    """A CircuitsVis picture with the package's own copy of the script; the data in it can neither end the script nor open a comment.

    Raises:
        ConfigError: another version of CircuitsVis writes its pictures otherwise.
    """
    html: str = rendered.local_src
    script, call, data = html.rpartition(_CALL)
    found = re.search(r'id="(circuits-vis-[^"]+)"', script)
    if not call or not found:
        raise ConfigError("this version of circuitsvis writes pictures in another form; circuitsvis 1.43 is needed")
    data, end, rest = data.rpartition("</script>")
    data = data.replace(found[1], "ID").replace("<", "\\u003c")
    # The id is the package's random one; here it follows from the data, so that a notebook run again does not change.
    name = "circuits-vis-" + hashlib.sha256(data.encode()).hexdigest()[:13]
    script = script.replace(found[1], name).replace(';"/>\n', ';"></div>\n', 1)  # a div cannot close itself
    data = data.replace('"ID"', f'"{name}"', 1)
    return Widget(f'<div style="background:#fff;color:#1a1a1a;padding:.5rem;overflow-x:auto">{script}{call}{data}{end}{rest}</div>')


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
        raise ConfigError(f"{len(tokens)} tokens came with values of shape {numbers.shape}; one number a token is needed")
    limit = float(np.abs(numbers).max(initial=0.0)) or 1.0
    colours = {"negative_color": NEGATIVE, "positive_color": POSITIVE}
    return _offline(colored_tokens(list(tokens), numbers.tolist(), min_value=-limit, max_value=limit, **colours))


def attention(model: Model, example: Example, layer: int | None = None, template: PromptTemplate | None = None) -> Widget:
    """The attention patterns of all heads of a layer on the prompt of an example: hover to look, click to keep a head large.

    Args:
        model: from `load_model`.
        example: its prompt is run once.
        layer: from 0; default the middle one.
        template: default the paper's.

    Raises:
        SiteError: the model has no such layer.
    """
    import torch
    from circuitsvis.attention import attention_heads

    from .hooks import hooked_at
    from .scoring import question

    layer = model.n_layers // 2 if layer is None else layer
    if not 0 <= layer < model.n_layers:
        raise SiteError(f"the attention of layer {layer} was asked for; {model.name} has layers 0 to {model.n_layers - 1}")
    ids = question(model, example, template).ids
    seen: list[torch.Tensor] = []
    point = model.hooked.mod_dict[f"blocks.{layer}.attn.hook_pattern"]
    with (
        hooked_at([(point, lambda pattern: seen.append(pattern[0].detach().float().cpu()))], times=1, what="the hook of a pattern"),
        torch.inference_mode(),
    ):
        model.forward(ids)
    pattern = seen[0].numpy().round(4)
    texts = [model.tokenizer.decode([i]) for i in ids[0].tolist()]
    return _offline(
        attention_heads(pattern, texts, [f"L{layer}H{h}" for h in range(len(pattern))], max_value=1.0, min_value=-1.0, mask_upper_tri=True)
    )
