"""Training edits: what to train (`presets`), how (`fit`; `lofit` for heads that are chosen by training), and on what grid (`matrix`)."""

from . import presets
from .fit import fit
from .lofit import lofit
from .prefix import PrefixCache
from .presets import Preset

__all__ = ["PrefixCache", "Preset", "fit", "lofit", "presets"]
