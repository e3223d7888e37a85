"""The model: loading it, running it block by block, reading and writing inside it."""

from .block import LayerStates, run
from .convert import hooked_from_hf
from .hashes import weights_hash
from .huggingface import BUNDLED
from .kernels import linear
from .load import DTYPES, load_model
from .model import Model, logits_of
from .pieces import NO_TAPS, Tap, Taps, heads_of

__all__ = [
    "BUNDLED",
    "DTYPES",
    "NO_TAPS",
    "LayerStates",
    "Model",
    "Tap",
    "Taps",
    "heads_of",
    "hooked_from_hf",
    "linear",
    "load_model",
    "logits_of",
    "run",
    "weights_hash",
]
