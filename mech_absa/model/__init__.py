"""model."""

from .model import (
    ACTIVATIONS,
    BUNDLED,
    DTYPES,
    ONEDNN,
    LayerStates,
    Model,
    heads_of,
    hooked_from_hf,
    linear,
    load_model,
    logits_of,
    norm_of,
    run,
    weights_hash,
)

__all__ = [
    "ACTIVATIONS",
    "BUNDLED",
    "DTYPES",
    "ONEDNN",
    "LayerStates",
    "Model",
    "heads_of",
    "hooked_from_hf",
    "linear",
    "load_model",
    "logits_of",
    "norm_of",
    "run",
    "weights_hash",
]
