"""Measure how good a system is and what an edit changes besides.

| module | question |
|---|---|
| `predictions` | what does a model, with an edit or without, or any other system answer? |
| `scores` | how good are the answers, how sure is that, and which of two systems is better? |
| `side_effects` | what else does an edit change? |
| `scorecard` | all of this in one table of several edits, with intervals and their cost |
| `fairness` | does it treat classes and groups alike, and how far does it move from the base? |
| `faithfulness` | does a ranking of sites name what the answer is made of? |
| `pruning` | how much of the task is left without the least important sites? |
| `card` | what can the bundled model do? |
"""

import sys
from types import ModuleType
from typing import Any

from .predictions import Predictions, predict, read_predictions
from .scores import Comparison, Quality, Scores, aggregate, compare, evaluate, score

__all__ = [
    "Comparison",
    "Predictions",
    "Quality",
    "Scores",
    "aggregate",
    "compare",
    "evaluate",
    "predict",
    "read_predictions",
    "score",
]


class _Callable(ModuleType):
    """Make a module callable: `ma.evaluate(...)` is the function, `python -m mech_absa.evaluate`
    the command.
    """

    def __call__(self, *args: Any, **options: Any) -> Scores:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable
