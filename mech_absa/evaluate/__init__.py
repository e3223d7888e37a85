"""How good a system is, and what an edit does besides: scores, side effects, faithfulness of a ranking.

predict, evaluate, score, compare, aggregate, read_predictions       quality (predictions.py, scores.py)
"""

import sys
from types import ModuleType
from typing import Any

from .predictions import Predictions, predict, read_predictions
from .scores import Comparison, Quality, Scores, aggregate, compare, evaluate, score

__all__ = ["Comparison", "Predictions", "Quality", "Scores", "aggregate", "compare", "evaluate", "predict", "read_predictions", "score"]


class _Callable(ModuleType):
    """`ma.evaluate(model, test, edit)` is the function, `python -m mech_absa.evaluate` the command, and both have one name."""

    def __call__(self, *args: Any, **options: Any) -> Scores:
        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable
