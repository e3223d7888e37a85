"""`mech-absa verify`, or `python -m mech_absa.verify`: does TransformerLens run this model as
Hugging Face does?

    mech-absa verify                       the bundled model
    mech-absa verify --model gpt2          any other, on your own text with --text

Prints the largest difference of logits over the texts, and fails where it is too large for a trace
to be of the same model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import OmitArgPrefixes, arg

from ..errors import ConfigError, ModelError
from ..model import load_model
from .cli import command
from .flags import ModelFlags

TEXTS = (
    "The food was great, but the service was slow.",
    "Given the sentence: 'i liked the screen , not the battery life', what is the sentiment polarity of the aspect term battery life ?",
    "Ça va? 价格 is fine 🙂 — but the déjà vu café’s waiter wasn't.",
)

LARGEST, HALF_LARGEST = 1e-3, 0.1
"""Differences of logits that rounding explains, in float32 and wider, and in half precision."""
HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Config:
    """Compare the logits of a model with those of Hugging Face's own forward pass.

    Examples:
      mech-absa verify --model gpt2
    """

    text: Annotated[tuple[str, ...], arg(metavar="TEXT ...", help_behavior_hint="")] = TEXTS
    """What to compare on. Default: three texts."""
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)


def main(config: Config) -> float:
    """Print the largest difference, and return it.

    Raises:
        ModelError: the difference is not a number.
    """
    if not config.text or not all(t.strip() for t in config.text):
        raise ConfigError("--text was given an empty text; at least one word is needed")
    model = load_model(
        config.model.model,
        device=config.model.device,
        dtype=config.model.dtype,
        backend=config.model.backend,
    )
    difference = model.verify(config.text)
    print(
        f"{model}: largest logit difference to Hugging Face over {len(config.text)} texts: {difference:.3g}"
    )
    if not math.isfinite(difference):
        raise ModelError(f"{model.name} gives logits that are not numbers; its weights are damaged")
    print(conclusion(difference, HALF_LARGEST if config.model.dtype in HALF else LARGEST))
    return difference


def conclusion(difference: float, largest: float) -> str:
    """Say in one line whether a trace here is a trace of Hugging Face's model."""
    if difference <= largest:
        return (
            f"They agree (up to {largest:g} is rounding): a trace here is of Hugging Face's model."
        )
    return f"They differ by more than rounding ({largest:g}): do not trust a trace before you know why."


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.verify", argv)
