"""One view per kind of run: what its part of the page says, and the data that its scripts draw."""

from collections.abc import Callable
from typing import Any

from ..runs import Run
from .evaluate import evaluate_view
from .matrix import matrix_view
from .trace import trace_view
from .train import train_view

VIEWS: dict[str, Callable[[Run, int], dict[str, Any]]] = {
    "trace": trace_view,
    "train": train_view,
    "evaluate": evaluate_view,
    "matrix": matrix_view,
}
"""Kind of run -> (run, bytes that its single examples may take) -> context of the template, with
`data` for the scripts.
"""
