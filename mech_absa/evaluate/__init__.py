"""How good a system is, and what an edit does besides: scores, side effects, faithfulness of a ranking.

predict, evaluate, score, compare, aggregate, read_predictions       quality (predictions.py, scores.py)
"""

from .predictions import Predictions, predict, read_predictions
from .scores import Comparison, Quality, Scores, aggregate, compare, evaluate, score

__all__ = ["Comparison", "Predictions", "Quality", "Scores", "aggregate", "compare", "evaluate", "predict", "read_predictions", "score"]
