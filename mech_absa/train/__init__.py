"""Train edits: what to train (`presets`), how (`fit`, `training`; `lofit` chooses heads by
training; `contrast` on wrong answers), on what grid (`matrix`), and what needs no training (`means`,
`closed_form`)."""

from . import presets
from .closed_form import MEMIT, ROME, AlphaEdit, closed_form
from .contrast import Contrast, contrast, wrong_answers
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
    "Contrast",
    "DifferenceOfMeans",
    "LoFiT",
    "PrefixCache",
    "Preset",
    "Training",
    "closed_form",
    "contrast",
    "difference_of_means",
    "fit",
    "lofit",
    "mean_difference",
    "presets",
    "wrong_answers",
]
