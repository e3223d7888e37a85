"""`python -m mech_absa.verify`: does TransformerLens run this model as Hugging Face does?

    python -m mech_absa.verify                       the bundled model
    python -m mech_absa.verify --model gpt2          any other, on your own text with --text

Prints the largest difference of logits over the texts, and fails where it is too large for a trace to be of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..model import load_model
from .cli import command

TEXTS = (
    "The food was great, but the service was slow.",
    "Given the sentence: 'i liked the screen , not the battery life', what is the sentiment polarity of the aspect term battery life ?",
    "Ça va? 价格 is fine 🙂 — but the déjà vu café’s waiter wasn't.",
)


@dataclass(frozen=True)
class Config:
    """Compare the logits of a model with those of Hugging Face's own forward pass."""

    model: str = "bundled"
    """bundled, a local Hugging Face folder, or a hub name."""
    text: tuple[str, ...] = TEXTS
    """What to compare on."""
    dtype: str = "float32"
    """float32, bfloat16, float16 or float64."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def main(config: Config) -> float:
    """Print the largest difference, and give it."""
    if not config.text or not all(t.strip() for t in config.text):
        raise ConfigError("--text was given an empty text; at least one word is needed")
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    difference = model.verify(config.text)
    print(
        f"{model}: largest logit difference to Hugging Face over {len(config.text)} texts: {difference:.3g}"
    )
    return difference


def cli(argv: Sequence[str] | None = None) -> int:
    return command(Config, main, "mech_absa.verify", argv)
