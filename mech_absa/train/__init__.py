"""Training edits: what to train (`presets`), how (`fit`), and on what grid (`matrix`)."""

from . import presets
from .fit import fit
from .prefix import PrefixCache
from .presets import Preset

__all__ = ["PrefixCache", "Preset", "fit", "presets"]
