"""Train edits: what to train (`presets`), how (`fit`, `training`; `lofit` chooses heads by
training), on what grid (`matrix`), and what needs no training (`means`, `closed_form`)."""

from . import presets
from .closed_form import MEMIT, ROME, AlphaEdit, closed_form
from .fit import fit
from .lofit import LoFiT, lofit
from .means import DifferenceOfMeans, difference_of_means, mean_difference
from .prefix import PrefixCache
from .presets import Preset
from .training import Training

__all__ = [
    "MEMIT",
    "ROME",
    "AlphaEdit",
    "DifferenceOfMeans",
    "LoFiT",
    "PrefixCache",
    "Preset",
    "Training",
    "closed_form",
    "difference_of_means",
    "fit",
    "lofit",
    "mean_difference",
    "presets",
]
