"""Train edits: what to train (`presets`), how (`fit`, `training`; `lofit` chooses heads by
training), and on what grid (`matrix`)."""

from . import presets
from .fit import fit
from .lofit import LoFiT, lofit
from .prefix import PrefixCache
from .presets import Preset
from .training import Training

__all__ = ["LoFiT", "PrefixCache", "Preset", "Training", "fit", "lofit", "presets"]
