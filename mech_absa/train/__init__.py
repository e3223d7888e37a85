"""Train edits: what to train (`presets`), how (`fit`, `training`; `lofit` chooses heads by
training), on what grid (`matrix`), and what needs no training (`means`)."""

from . import presets
from .fit import fit
from .lofit import LoFiT, lofit
from .means import DifferenceOfMeans, difference_of_means, mean_difference
from .prefix import PrefixCache
from .presets import Preset
from .training import Training

__all__ = [
    "DifferenceOfMeans",
    "LoFiT",
    "PrefixCache",
    "Preset",
    "Training",
    "difference_of_means",
    "fit",
    "lofit",
    "mean_difference",
    "presets",
]
